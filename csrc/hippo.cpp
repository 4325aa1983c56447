// HiPPO-LegS in O(N) a sample (src/longscan/ops/legs.py): the generalised bilinear step of c' = (A c + B f) / t.
//
// With r_n = sqrt(2n + 1) and h = 1/k, sample k does, for n = 0 .. N-1,
//
//   y_n = c_n - (1 - alpha) h (r_n sum_{j<n} r_j c_j + (n + 1) c_n) + h r_n f           the explicit part
//   c_n = (y_n - alpha h r_n sum_{j<n} r_j c_j) / (1 + alpha h (n + 1))                 the implicit part
//
// Both sums run along n, so one sample is one long chain. But component n of a sample needs of the sample before only
// components up to n: vector lanes hold consecutive samples, each one component behind the lane before it.
#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace LS_ISA {
namespace {

constexpr int V = LS_LANES / 2;
typedef double dvec __attribute__((vector_size(4 * LS_LANES)));

LS_INLINE dvec load_d(const double *p) {
  dvec v;
  memcpy(&v, p, sizeof v);
  return v;
}

// v moved up by a lane, x in the first.
LS_INLINE dvec shift_in(dvec v, double x) {
#if LS_LANES == 16
  v = __builtin_shufflevector(v, v, 0, 0, 1, 2, 3, 4, 5, 6);
#elif LS_LANES == 8
  v = __builtin_shufflevector(v, v, 0, 0, 1, 2);
#else
  v = __builtin_shufflevector(v, v, 0, 0);
#endif
  v[0] = x;
  return v;
}

// Take in `count` <= V samples, the first of them number k; `r` holds r_(N-1) .. r_0 with V zeros on either side.
void samples(double *c, int64_t N, const double *f, int count, int64_t k, double alpha, const double *r) {
  dvec h, hf{};
  for (int i = 0; i < V; ++i) h[i] = 1.0 / (double)(k + i);
  for (int i = 0; i < count; ++i) hf[i] = h[i] * f[i];
  const dvec ahead = (1 - alpha) * h, behind = alpha * h;
  dvec place, before{}, after{}, z{};  // place: n + 1 of each lane; before and after: the two running sums
  for (int i = 0; i < V; ++i) place[i] = 1.0 - i;
  const int last = count - 1;
  for (int64_t i = 0; i < N + last; ++i, place += 1.0) {
    const dvec x = shift_in(z, i < N ? c[i] : 0.0), rn = load_d(r + V + N - 1 - i);
    const dvec inverse = 1.0 / (1.0 + behind * place);
    const dvec y = x - ahead * (rn * before + place * x) + hf * rn;
    before += rn * x;
    z = (y - behind * rn * after) * inverse;
    after += rn * z;
    if (i >= last) c[i - last] = z[last];
  }
}

void task(int64_t begin, int64_t end, void *context) {
  const ls_legs *a = (const ls_legs *)context;
  const int64_t N = a->order;
  double *r = LS_STACK(double, N + 2 * V);
  for (int64_t i = 0; i < N + 2 * V; ++i) {
    const int64_t n = N - 1 + V - i;
    r[i] = n >= 0 && n < N ? sqrt(2.0 * (double)n + 1.0) : 0.0;
  }
  for (int64_t channel = begin; channel < end; ++channel) {
    double *c = a->state + channel * N;
    const double *f = a->f + channel * a->seq_len;
    for (int64_t t = 0, snapshot = 0; t < a->seq_len;) {
      const int64_t stop = a->every ? (snapshot + 1) * a->every : a->seq_len;
      const int64_t left = (stop < a->seq_len ? stop : a->seq_len) - t;
      const int count = (int)(left < V ? left : V);
      samples(c, N, f + t, count, a->start + t + 1, a->alpha, r);
      t += count;
      if (a->every && t == stop) {
        memcpy(a->snapshots + (channel * (a->seq_len / a->every) + snapshot) * N, c, sizeof(double) * N);
        ++snapshot;
      }
    }
  }
}

}  // namespace

int32_t legs(const ls_legs *a) {
  ls_run(a->channels, task, (void *)a);
  return 0;
}

}  // namespace LS_ISA
