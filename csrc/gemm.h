// Products of small float32 matrices that stay in the caches: tiles of MR x NR results, held in registers.
#pragma once
#include <type_traits>

#include "simd.h"

namespace LS_ISA {

constexpr int NV = 2, NR = NV * W;  // columns of a tile: vectors, floats
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 8;  // rows of a tile: of 32 registers 16 are results
#else
constexpr int MR = 6;  // of 16 registers 12
#endif

template <int M>
struct Results {
  vec at[M][NV];

  inline __attribute__((always_inline)) Results() {
    LS_UNROLL for (int i = 0; i < M; ++i) at[i][0] = at[i][1] = vec{};
  }
  // *this += a b for a (M, k) with strides `row` and `next`, and b (k, NR) with rows `ldb` apart.
  inline __attribute__((always_inline)) void add(const float *a, int64_t row, int64_t next, const float *b, int64_t ldb, int64_t k) {
    for (int64_t s = 0; s < k; ++s, a += next, b += ldb) {
      const vec b0 = load(b), b1 = load(b + W);
      LS_UNROLL for (int i = 0; i < M; ++i) {
        const vec ai = splat(a[i * row]);
        at[i][0] = fma(ai, b0, at[i][0]);
        at[i][1] = fma(ai, b1, at[i][1]);
      }
    }
  }
  // The same for an `a` whose columns come in panels (see below) of M or more rows, each `panel` floats.
  inline __attribute__((always_inline)) void add_panels(const float *a, int64_t panel, const float *b, int64_t ldb, int64_t k) {
    for (int64_t s = 0; s < k; s += NR, a += panel, b += NR * ldb) add(a, NR, 1, b, ldb, k - s < NR ? k - s : NR);
  }
  // Row i times by[i].
  inline __attribute__((always_inline)) void scale(const float *by) {
    LS_UNROLL for (int i = 0; i < M; ++i) {
      const vec factor = splat(by[i]);
      at[i][0] *= factor, at[i][1] *= factor;
    }
  }
  // Rows of a panel.
  inline __attribute__((always_inline)) void take(const float *from, vec factor) {
    LS_UNROLL for (int i = 0; i < M; ++i) {
      at[i][0] = load(from + i * NR) * factor;
      at[i][1] = load(from + i * NR + W) * factor;
    }
  }
  inline __attribute__((always_inline)) void give(float *to, int64_t ld) const {
    LS_UNROLL for (int i = 0; i < M; ++i) {
      store(to + i * ld, at[i][0]);
      store(to + i * ld + W, at[i][1]);
    }
  }
  // this . from, for rows of a panel, added to `total`.
  inline __attribute__((always_inline)) vec dot(const float *from, vec total) const {
    LS_UNROLL for (int i = 0; i < M; ++i) {
      total = fma(at[i][0], load(from + i * NR), total);
      total = fma(at[i][1], load(from + i * NR + W), total);
    }
    return total;
  }
};

// Cut [begin, end) into tiles of MR rows, and the rest into one or two about equal ones: body(rows, first row) with a
// number of rows that the compiler knows.
template <class Body>
LS_INLINE void for_rows(int64_t begin, int64_t end, Body body) {
  while (begin < end) {
    const int64_t left = end - begin, rows = left >= 2 * MR || left == MR ? MR : left > MR ? (left + 1) / 2 : left;
    switch (rows) {
      case 1: body(std::integral_constant<int, 1>(), begin); break;
      case 2: body(std::integral_constant<int, 2>(), begin); break;
      case 3: body(std::integral_constant<int, 3>(), begin); break;
      case 4: body(std::integral_constant<int, 4>(), begin); break;
      case 5: body(std::integral_constant<int, 5>(), begin); break;
      case 6: body(std::integral_constant<int, 6>(), begin); break;
      case 7: body(std::integral_constant<int, MR < 7 ? MR : 7>(), begin); break;
      default: body(std::integral_constant<int, MR>(), begin);
    }
    begin += rows;
  }
}

// A panel holds NR columns of a matrix, row after row; a matrix of more columns is panel after panel.
LS_INLINE int64_t panels(int64_t columns) { return (columns + NR - 1) / NR; }

typedef float quad __attribute__((vector_size(16)));

// to[c * ld + i] = from[i][c] for four rows of n floats.
LS_INLINE void transpose4(float *to, int64_t ld, const float *const *from, int64_t n) {
  int64_t c = 0;
  for (; c + 4 <= n; c += 4) {
    quad r[4];
    for (int i = 0; i < 4; ++i) memcpy(&r[i], from[i] + c, sizeof r[i]);
    const quad ab_low = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    const quad ab_high = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const quad cd_low = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const quad cd_high = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
    for (int i = 0; i < 4; ++i) memcpy(to + (c + i) * ld, &r[i], sizeof r[i]);
  }
  for (; c < n; ++c)
    for (int i = 0; i < 4; ++i) to[c * ld + i] = from[i][c];
}

}  // namespace LS_ISA
