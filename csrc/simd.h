// One vector of floats, as wide as the instruction set this file is compiled for, and the functions the kernels need.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LS_LANES 16
#elif defined(__AVX2__)
#define LS_LANES 8
#else
#define LS_LANES 4
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace LS_ISA {

constexpr int W = LS_LANES;
typedef float vec __attribute__((vector_size(4 * LS_LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LS_LANES)));

// Scratch that lives as long as the calling function: at most about a megabyte, for 128 channels of d_state 256.
#define LS_STACK(type, n) ((type *)__builtin_alloca_with_align(sizeof(type) * (n), 512))
#define LS_UNROLL _Pragma("GCC unroll 8")
// A function of its own, at the start of a cache line: elsewhere its loops would be up to 5 % slower, depending on what
// else is linked.
#define LS_APART __attribute__((noinline, aligned(64)))
#define LS_INLINE static inline __attribute__((always_inline))

LS_INLINE vec splat(float x) { return x - vec{}; }
LS_INLINE vec load(const float *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
LS_INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

// The first n lanes only; the others read as zero and are not written.
LS_INLINE vec load_n(const float *p, int n) {
  if (n >= W) return load(p);
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), p);
#endif
  vec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
LS_INLINE void store_n(float *p, vec v, int n) {
  if (n >= W) return store(p, v);
#if defined(__AVX512F__)
  return _mm512_mask_storeu_ps(p, (__mmask16)((1 << n) - 1), (__m512)v);
#endif
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

// A NaN in x survives vmax(constant, x): both return the second operand when one of them is NaN.
#if defined(__AVX512F__)
LS_INLINE vec vmax(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
LS_INLINE vec vmin(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
LS_INLINE vec vmax(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
LS_INLINE vec vmin(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__aarch64__)  // NaN if either is
LS_INLINE vec vmax(vec a, vec b) { return (vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
LS_INLINE vec vmin(vec a, vec b) { return (vec)vminq_f32((float32x4_t)a, (float32x4_t)b); }
#else
LS_INLINE vec vmax(vec a, vec b) { return a > b ? a : b; }
LS_INLINE vec vmin(vec a, vec b) { return a < b ? a : b; }
#endif

// a b + c, rounded once where the hardware can: for sums whose bits must not depend on what the compiler fuses.
#if defined(__AVX512F__)
LS_INLINE vec fma(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
LS_INLINE vec fma(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
LS_INLINE vec fma(vec a, vec b, vec c) {
  return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
LS_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
#endif

// 2^x within 2.5e-7 relative; 0 below -127, infinity from 128 on, NaN for NaN, exactly 1 at 0.
// x = k + f with k the nearest integer and |f| <= 1/2; the polynomial is the degree-5 minimax fit with p(0) = 1.
LS_INLINE vec exp2_poly(vec f) {
  vec p = splat(1.326472731307149e-3f);
  p = p * f + splat(9.671512991189957e-3f);
  p = p * f + splat(5.550733581185341e-2f);
  p = p * f + splat(2.4022242426872253e-1f);
  p = p * f + splat(6.931470036506653e-1f);
  return p * f + splat(1.0f);
}
LS_INLINE vec exp2v(vec x) {
#if defined(__AVX512F__)
  const vec k = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vec)_mm512_scalef_ps((__m512)exp2_poly(x - k), (__m512)k);
#else
  x = vmin(splat(128.0f), vmax(splat(-127.0f), x));
  const vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const vec t = x + shift;
  const vec p = exp2_poly(x - (t - shift));
  return (vec)((ivec)p + ((ivec)t << 23));
#endif
}
// N independent 2^x, stage by stage, so that their long dependency chains overlap.
template <int N>
LS_INLINE void exp2_many(vec *y, const vec *x) {
  vec k[N], f[N], p[N];
  for (int i = 0; i < N; ++i) {
#if defined(__AVX512F__)
    k[i] = (vec)_mm512_roundscale_ps((__m512)x[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f[i] = x[i] - k[i];
#else
    const vec clamped = vmin(splat(128.0f), vmax(splat(-127.0f), x[i]));
    k[i] = clamped + splat(12582912.0f);
    f[i] = clamped - (k[i] - splat(12582912.0f));
#endif
  }
  for (int i = 0; i < N; ++i) p[i] = splat(1.326472731307149e-3f) * f[i] + splat(9.671512991189957e-3f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(5.550733581185341e-2f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(2.4022242426872253e-1f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(6.931470036506653e-1f);
  for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + splat(1.0f);
  for (int i = 0; i < N; ++i) {
#if defined(__AVX512F__)
    y[i] = (vec)_mm512_scalef_ps((__m512)p[i], (__m512)k[i]);
#else
    y[i] = (vec)((ivec)p[i] + ((ivec)k[i] << 23));
#endif
  }
}
constexpr float LOG2E = 1.44269504088896341f;
LS_INLINE vec expv(vec x) { return exp2v(x * splat(LOG2E)); }
LS_INLINE vec sigmoid(vec x) { return splat(1.0f) / (splat(1.0f) + expv(-x)); }

// log(1 + e^x) within 5e-7 relative: max(x, 0) + log1p(e), e = exp(-|x|), log1p(e) = 2 atanh(e / (2 + e)).
LS_INLINE vec softplus(vec x) {
  const vec magnitude = vmax(x, -x);
  const vec e = expv(-magnitude);
  const vec s = e / (splat(2.0f) + e);  // <= 1/3, so nine terms of the odd series reach 1e-9
  const vec q = s * s;
  vec p = splat(1.0f / 15);
  p = p * q + splat(1.0f / 13);
  p = p * q + splat(1.0f / 11);
  p = p * q + splat(1.0f / 9);
  p = p * q + splat(1.0f / 7);
  p = p * q + splat(1.0f / 5);
  p = p * q + splat(1.0f / 3);
  p = p * q + splat(1.0f);
  return vmax(splat(0.0f), x) + splat(2.0f) * s * p;
}

// sum(v): in a fixed order, halves onto halves. sum4: to[i] = sum(v[i]), for four vectors at once and in that order.
#if defined(__SSE2__)
LS_INLINE __m128 quarter(vec v) {
#if defined(__AVX512F__)
  const __m512d d = (__m512d)v;
  const __m256 half = _mm256_add_ps((__m256)_mm512_castpd512_pd256(d), (__m256)_mm512_extractf64x4_pd(d, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  return (__m128)v;
#endif
}
LS_INLINE float sum(vec v) {
  const __m128 q = quarter(v), half = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
LS_INLINE void sum4(float *to, const vec *v) {
  const __m128 a = quarter(v[0]), b = quarter(v[1]), c = quarter(v[2]), d = quarter(v[3]);
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));  // a0+a2 b0+b2 a1+a3 b1+b3
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}
#elif defined(__aarch64__)
LS_INLINE float sum(vec v) {
  const float32x4_t q = (float32x4_t)v;
  const float32x2_t half = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(vpadd_f32(half, half), 0);
}
LS_INLINE void sum4(float *to, const vec *v) {
  const float32x4_t a = (float32x4_t)v[0], b = (float32x4_t)v[1], c = (float32x4_t)v[2], d = (float32x4_t)v[3];
  const float32x4_t ab = vaddq_f32(vzip1q_f32(a, b), vzip2q_f32(a, b));  // a0+a2 b0+b2 a1+a3 b1+b3
  const float32x4_t cd = vaddq_f32(vzip1q_f32(c, d), vzip2q_f32(c, d));
  vst1q_f32(to, vaddq_f32(vcombine_f32(vget_low_f32(ab), vget_low_f32(cd)),
                          vcombine_f32(vget_high_f32(ab), vget_high_f32(cd))));
}
#else
LS_INLINE float sum(vec v) {
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
LS_INLINE void sum4(float *to, const vec *v) {
  for (int i = 0; i < 4; ++i) to[i] = sum(v[i]);
}
#endif

}  // namespace LS_ISA
