// Integers for products with quantised weights: 16-bit lanes, scales of blocks, and activations rounded to 16 bits.
#pragma once
#include "longscan.h"
#include "simd.h"

namespace LS_ISA {

constexpr int64_t BLOCK = 32;            // weights that share a float16 scale
constexpr int64_t ACT = LS_ACTIVATIONS;  // activations that share a scale
typedef int16_t hvec __attribute__((vector_size(4 * LS_LANES)));  // 2 W lanes
typedef uint16_t uvec __attribute__((vector_size(4 * LS_LANES)));
typedef int8_t bytes __attribute__((vector_size(2 * LS_LANES)));    // 2 W lanes
typedef int16_t halves __attribute__((vector_size(2 * LS_LANES)));  // W lanes

template <typename V>
LS_INLINE V load_as(const void *p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// acc + the sums of neighbouring products
LS_INLINE ivec madd(ivec acc, hvec a, hvec b) {
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return acc + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return acc + (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return acc + (ivec)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  const ivec x = (ivec)a, y = (ivec)b;
  return acc + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}
LS_INLINE hvec widen(const int8_t *p) {
#if defined(__AVX512BW__)
  return (hvec)_mm512_cvtepi8_epi16(load_as<__m256i>(p));
#elif defined(__AVX2__)
  return (hvec)_mm256_cvtepi8_epi16(load_as<__m128i>(p));
#elif defined(__SSE2__)
  return (hvec)_mm_srai_epi16(_mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)p)), 8);
#elif defined(__aarch64__)
  return (hvec)vmovl_s8(vld1_s8(p));
#else
  return __builtin_convertvector(load_as<bytes>(p), hvec);
#endif
}
// The first n of them; the others read as zero.
LS_INLINE hvec widen_n(const int8_t *p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (hvec)_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((__mmask32)((1ull << n) - 1), p));
#else
  int8_t all[2 * W] = {};
  memcpy(all, p, (size_t)n);
  return widen(all);
#endif
}
LS_INLINE vec to_float(ivec v) { return __builtin_convertvector(v, vec); }

LS_INLINE float half_to_float(uint16_t h) {
  const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023, sign = (uint32_t)(h & 0x8000) << 16;
  uint32_t bits;
  if (exponent == 31)
    bits = sign | 0x7f800000 | mantissa << 13;
  else if (exponent)
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  else {  // zero or subnormal
    const float value = (float)mantissa * 5.9604644775390625e-8f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
// The scales of the last blocks of a row, instead of eight.
LS_APART static void few_scales(float *to, const uint16_t *scale, int64_t n) {
  for (int64_t i = 0; i < 8; ++i) to[i] = i < n ? half_to_float(scale[i]) : 0.0f;
}
// The float32 scales of 8 blocks, and one or a register's worth of them spread over the lanes of their blocks.
#if defined(__AVX512F__)
typedef __m512 Scales;
LS_INLINE Scales scales_of(const uint16_t *scale, int64_t n) {
  float last[8];
  if (n == 8) return _mm512_castps256_ps512(_mm256_cvtph_ps(load_as<__m128i>(scale)));
  few_scales(last, scale, n);
  return _mm512_castps256_ps512(load_as<__m256>(last));
}
LS_INLINE vec lanes_of(Scales scales, __m512i index) { return (vec)_mm512_permutexvar_ps(index, scales); }
LS_INLINE vec one_of(Scales scales, int block) { return lanes_of(scales, _mm512_set1_epi32(block)); }
LS_INLINE vec spread(Scales scales, int first) {  // lanes 4 b to 4 b + 3 hold the scale of block first + b
  return lanes_of(scales, _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2,
                                                                                       2, 2, 3, 3, 3, 3)));
}
#elif defined(__AVX2__)
typedef __m256 Scales;
LS_INLINE Scales scales_of(const uint16_t *scale, int64_t n) {
  float last[8];
  if (n == 8) return _mm256_cvtph_ps(load_as<__m128i>(scale));
  few_scales(last, scale, n);
  return load_as<__m256>(last);
}
LS_INLINE vec lanes_of(Scales scales, __m256i index) { return (vec)_mm256_permutevar8x32_ps(scales, index); }
LS_INLINE vec one_of(Scales scales, int block) { return lanes_of(scales, _mm256_set1_epi32(block)); }
LS_INLINE vec spread(Scales scales, int first) {
  return lanes_of(scales, _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)));
}
#else
struct Scales {
  float of[8];
};
LS_INLINE Scales scales_of(const uint16_t *scale, int64_t n) {
  Scales scales;
#if defined(__aarch64__)
  if (n == 8) {
    const float16x8_t all = load_as<float16x8_t>(scale);
    vst1q_f32(scales.of, vcvt_f32_f16(vget_low_f16(all)));
    vst1q_f32(scales.of + 4, vcvt_high_f32_f16(all));
    return scales;
  }
#endif
  few_scales(scales.of, scale, n);
  return scales;
}
LS_INLINE vec one_of(const Scales &scales, int block) { return splat(scales.of[block]); }
LS_INLINE vec spread(const Scales &scales, int first) { return splat(scales.of[first]); }
#endif

// The first eight lanes are the scales.
LS_INLINE void eight_scales(float *to, const uint16_t *scale, int64_t n) {
  const Scales scales = scales_of(scale, n);
  memcpy(to, &scales, 32);
}

// Round n <= ACT activations, the largest to +-limit; the rest of `rounded` (ACT) is zero. Return the scale, which NaN
// and infinity go into so that they stay visible.
LS_INLINE float round_activations(const float *x, int64_t n, float limit, int16_t *rounded) {
  float part[ACT];
  memcpy(part, x, 4 * (size_t)n);
  for (int64_t i = n; i < ACT; ++i) part[i] = 0.0f;
  vec most = vec{}, bad = vec{};
  for (int64_t i = 0; i < ACT; i += W) {
    const vec v = load(part + i);
    most = vmax(most, vmax(v, -v));
    bad += v - v;
  }
  float largest = 0.0f;
  for (int i = 0; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
  const float wrong = sum(bad), unit = largest / limit;
  const float inverse = unit > 1e-35f && wrong == 0.0f ? 1.0f / unit : 0.0f;
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  for (int64_t i = 0; i < ACT; i += W) {
    const vec v = wrong == 0.0f ? fma(load(part + i), splat(inverse), shift) : shift;
    const halves whole = __builtin_convertvector((ivec)v - (ivec)shift, halves);
    memcpy(rounded + i, &whole, sizeof whole);
  }
  return unit + wrong;
}

}  // namespace LS_ISA
