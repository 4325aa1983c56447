// The diagonal state space with constant parameters, forward and backward; see src/longscan/ops/diagonal.py.
//
// Vector lanes run across channels; time is sequential. A unit of parallel work is one batch row and up to 64
// channels, walked in tiles of LS_TILE steps: for every few state components (in registers) the tile is run through.
// The backward pass recomputes a tile's states from the state the forward pass saved at its start.
#include "kernels.h"
#include "simd.h"

namespace LS_ISA {
namespace {

constexpr int T = LS_TILE;
constexpr int64_t CHANNELS = LS_DIAGONAL_CHANNELS;  // of a unit
constexpr int MAX_BLOCKS = CHANNELS / W;
constexpr int NV = LS_LANES == 16 ? 4 : 2;  // state components held in registers at once

struct Complex {
  vec re, im;
};

// Where a unit works: channels [first, first + channels) of batch row b, in `blocks` vectors.
struct Unit {
  int64_t b, first, channels, blocks;
  Unit(const ls_diagonal *a, int64_t i) {
    const int64_t units = ls_ceil(a->channels, CHANNELS);
    b = i / units;
    first = i % units * CHANNELS;
    channels = a->channels - first < CHANNELS ? a->channels - first : CHANNELS;
    blocks = ls_ceil(channels, W);
  }
  int lanes(int64_t k) const { return (int)(channels - k * W < W ? channels - k * W : W); }
};

// (channels, d_state, 2) numbers <-> pairs of vectors [block][n] with channels across lanes.
void pack(Complex *to, const float *from, const Unit &unit, int64_t d_state, float scale) {
  for (int64_t k = 0; k < unit.blocks; ++k)
    for (int64_t n = 0; n < d_state; ++n) {
      Complex v{};
      if (from)
        for (int i = 0; i < unit.lanes(k); ++i) {
          const float *p = from + ((k * W + i) * d_state + n) * 2;
          v.re[i] = p[0] * scale, v.im[i] = p[1] * scale;
        }
      to[k * d_state + n] = v;
    }
}
void unpack(float *to, const Complex *from, const Unit &unit, int64_t d_state, float scale) {
  for (int64_t k = 0; k < unit.blocks; ++k)
    for (int64_t n = 0; n < d_state; ++n)
      for (int i = 0; i < unit.lanes(k); ++i) {
        float *p = to + ((k * W + i) * d_state + n) * 2;
        p[0] = from[k * d_state + n].re[i] * scale, p[1] = from[k * d_state + n].im[i] * scale;
      }
}

// A tile's steps. A start forgets the state before it; padding lets it pass.
struct Flags {
  bool start[T], padding[T];
  void read(const int32_t *seq_idx, int64_t t0, int steps) {
    int32_t last = -1;
    for (int64_t t = t0 - 1; t >= 0 && last < 0; --t) last = seq_idx[t];
    for (int t = 0; t < steps; ++t) {
      const int32_t s = seq_idx[t0 + t];
      padding[t] = s < 0;
      start[t] = s >= 0 && last >= 0 && s != last;
      if (s >= 0) last = s;
    }
  }
};

// h = a h + u over a tile, N components; with KEEP every state is stored, else y += Re(c h).
template <int N, bool SEQ, bool KEEP>
LS_INLINE void run(const vec *u, vec *y, Complex *kept, const Flags *flags, int steps, const Complex *a,
                   const Complex *c, Complex *h) {
  Complex an[N], cn[N], hn[N];
  for (int i = 0; i < N; ++i) an[i] = a[i], hn[i] = h[i], cn[i] = KEEP ? Complex{} : c[i];
  for (int t = 0; t < steps; ++t) {
    if (SEQ && flags->start[t])
      for (int i = 0; i < N; ++i) hn[i] = Complex{};
    if (!(SEQ && flags->padding[t])) {
      vec sum = KEEP ? vec{} : y[t];
      for (int i = 0; i < N; ++i) {
        const vec re = fma(an[i].re, hn[i].re, u[t] - an[i].im * hn[i].im);
        hn[i].im = fma(an[i].re, hn[i].im, an[i].im * hn[i].re);
        hn[i].re = re;
        if (!KEEP) sum = fma(cn[i].re, hn[i].re, sum) - cn[i].im * hn[i].im;
      }
      if (!KEEP) y[t] = sum;
    }
    if (KEEP)
      for (int i = 0; i < N; ++i) kept[t * N + i] = hn[i];
  }
  for (int i = 0; i < N; ++i) h[i] = hn[i];
}

// The steps of a tile for all components, NV at a time.
template <bool SEQ>
void run_all(const vec *u, vec *y, const Flags *flags, int steps, const Complex *a, const Complex *c, Complex *h,
             int64_t d_state) {
  int64_t n = 0;
  for (; n + NV <= d_state; n += NV) run<NV, SEQ, false>(u, y, nullptr, flags, steps, a + n, c + n, h + n);
  for (; n < d_state; ++n) run<1, SEQ, false>(u, y, nullptr, flags, steps, a + n, c + n, h + n);
}

int64_t unit_size(const ls_diagonal *a) { return MAX_BLOCKS * a->d_state; }  // pairs of vectors

Complex *boundary(const ls_diagonal *a, int64_t tile, int64_t unit) {
  const int64_t units = a->batch * ls_ceil(a->channels, CHANNELS);
  return (Complex *)(a->boundaries + (tile * units + unit) * CHANNELS * a->d_state * 2);
}

template <bool SEQ>
void forward_unit(const ls_diagonal *args, int64_t index) {
  const Unit unit(args, index);
  const int64_t N = args->d_state, states = unit_size(args), at = (unit.b * args->channels + unit.first) * N * 2;
  Complex *a = LS_STACK(Complex, states), *c = LS_STACK(Complex, states), *h = LS_STACK(Complex, states);
  pack(a, args->a + unit.first * N * 2, unit, N, 1.0f);
  pack(c, args->c + unit.first * N * 2, unit, N, 2.0f);
  pack(h, args->initial_state ? args->initial_state + at : nullptr, unit, N, 1.0f);
  Flags flags;
  for (int64_t t0 = 0, tile = 0; t0 < args->seq_len; t0 += T, ++tile) {
    const int steps = (int)(args->seq_len - t0 < T ? args->seq_len - t0 : T);
    if (SEQ) flags.read(args->seq_idx + unit.b * args->seq_len, t0, steps);
    if (args->boundaries) memcpy(boundary(args, tile, index), h, sizeof(Complex) * unit.blocks * N);
    for (int64_t k = 0; k < unit.blocks; ++k) {
      const int lanes = unit.lanes(k);
      const int64_t channel = unit.first + k * W;
      const float *from = args->u.data + unit.b * args->u.stride_batch + t0 * args->u.stride_time + channel;
      vec u[T], y[T];
      for (int t = 0; t < steps; ++t) u[t] = load_n(from + t * args->u.stride_time, lanes), y[t] = vec{};
      run_all<SEQ>(u, y, &flags, steps, a + k * N, c + k * N, h + k * N, N);
      float *to = args->y + (unit.b * args->seq_len + t0) * args->channels + channel;
      for (int t = 0; t < steps; ++t) store_n(to + t * args->channels, y[t], lanes);
    }
  }
  unpack(args->final_state + at, h, unit, N, 1.0f);
}

// What the adjoint of one unit carries and collects.
struct Adjoint {
  Complex *p, *da, *dc;
};

// The adjoint of a tile for N components: p is the gradient of the state after the step.
template <int N, bool SEQ>
LS_INLINE void run_back(const vec *u, const vec *dy, vec *du, const Flags *flags, int steps, const Complex *a,
                        const Complex *c, const Complex *before, const Adjoint &to) {
  Complex kept[T * N], an[N], cn[N], p[N], da[N] = {}, dc[N] = {}, h[N];
  for (int i = 0; i < N; ++i) h[i] = before[i];
  run<N, SEQ, true>(u, nullptr, kept, flags, steps, a, c, h);
  for (int i = 0; i < N; ++i) an[i] = a[i], cn[i] = c[i], p[i] = to.p[i];
  for (int t = steps - 1; t >= 0; --t) {
    if (SEQ && flags->padding[t]) continue;
    const bool start = SEQ && flags->start[t];
    const Complex *last = t ? kept + (t - 1) * N : before;
    vec sum = du[t];
    for (int i = 0; i < N; ++i) {
      const Complex now = kept[t * N + i];
      p[i].re = fma(dy[t], cn[i].re, p[i].re), p[i].im = p[i].im - dy[t] * cn[i].im;
      dc[i].re = fma(dy[t], now.re, dc[i].re), dc[i].im = dc[i].im - dy[t] * now.im;
      sum += p[i].re;
      if (start) {
        p[i] = Complex{};
        continue;
      }
      da[i].re = fma(p[i].re, last[i].re, fma(p[i].im, last[i].im, da[i].re));
      da[i].im = fma(p[i].im, last[i].re, da[i].im) - p[i].re * last[i].im;
      const vec re = fma(an[i].re, p[i].re, an[i].im * p[i].im);
      p[i].im = an[i].re * p[i].im - an[i].im * p[i].re;
      p[i].re = re;
    }
    du[t] = sum;
  }
  for (int i = 0; i < N; ++i) {
    to.p[i] = p[i];
    to.da[i].re += da[i].re, to.da[i].im += da[i].im;
    to.dc[i].re += dc[i].re, to.dc[i].im += dc[i].im;
  }
}

template <bool SEQ>
void backward_unit(const ls_diagonal *args, int64_t index) {
  const Unit unit(args, index);
  const int64_t N = args->d_state, states = unit_size(args), at = (unit.b * args->channels + unit.first) * N * 2;
  Complex *a = LS_STACK(Complex, states), *c = LS_STACK(Complex, states), *p = LS_STACK(Complex, states);
  Complex *da = LS_STACK(Complex, states), *dc = LS_STACK(Complex, states);
  pack(a, args->a + unit.first * N * 2, unit, N, 1.0f);
  pack(c, args->c + unit.first * N * 2, unit, N, 2.0f);
  pack(p, args->dfinal ? args->dfinal + at : nullptr, unit, N, 1.0f);
  memset(da, 0, sizeof(Complex) * states);
  memset(dc, 0, sizeof(Complex) * states);
  Flags flags;
  for (int64_t tile = ls_ceil(args->seq_len, T) - 1; tile >= 0; --tile) {
    const int64_t t0 = tile * T;
    const int steps = (int)(args->seq_len - t0 < T ? args->seq_len - t0 : T);
    if (SEQ) flags.read(args->seq_idx + unit.b * args->seq_len, t0, steps);
    const Complex *before = boundary(args, tile, index);
    for (int64_t k = 0; k < unit.blocks; ++k) {
      const int lanes = unit.lanes(k);
      const int64_t channel = unit.first + k * W;
      const float *u_at = args->u.data + unit.b * args->u.stride_batch + t0 * args->u.stride_time + channel;
      const float *dy_at = args->dy.data + unit.b * args->dy.stride_batch + t0 * args->dy.stride_time + channel;
      vec u[T], dy[T], du[T];
      for (int t = 0; t < steps; ++t) {
        u[t] = load_n(u_at + t * args->u.stride_time, lanes);
        dy[t] = load_n(dy_at + t * args->dy.stride_time, lanes);
        du[t] = vec{};
      }
      int64_t n = 0;
      for (; n + NV <= N; n += NV) {
        const int64_t i = k * N + n;
        run_back<NV, SEQ>(u, dy, du, &flags, steps, a + i, c + i, before + i, {p + i, da + i, dc + i});
      }
      for (; n < N; ++n) {
        const int64_t i = k * N + n;
        run_back<1, SEQ>(u, dy, du, &flags, steps, a + i, c + i, before + i, {p + i, da + i, dc + i});
      }
      float *to = args->du + (unit.b * args->seq_len + t0) * args->channels + channel;
      for (int t = 0; t < steps; ++t) store_n(to + t * args->channels, du[t], lanes);
    }
  }
  float *partial = args->workspace;
  unpack(partial + at, da, unit, N, 1.0f);
  unpack(partial + args->batch * args->channels * N * 2 + at, dc, unit, N, 2.0f);
  if (args->dinitial_state) unpack(args->dinitial_state + at, p, unit, N, 1.0f);
}

// Sum the batch rows' shares of the parameters' gradients, in order.
void reduce(int64_t begin, int64_t end, void *context) {
  const ls_diagonal *a = (const ls_diagonal *)context;
  const int64_t row = a->channels * a->d_state * 2, n = a->d_state * 2;
  for (int64_t i = begin * n; i < end * n; ++i) {
    float da = 0, dc = 0;
    for (int64_t b = 0; b < a->batch; ++b) {
      da += a->workspace[b * row + i];
      dc += a->workspace[(a->batch + b) * row + i];
    }
    a->da[i] = da, a->dc[i] = dc;
  }
}

template <bool SEQ, bool BACKWARD>
void task(int64_t begin, int64_t end, void *context) {
  for (int64_t i = begin; i < end; ++i)
    if (BACKWARD)
      backward_unit<SEQ>((const ls_diagonal *)context, i);
    else
      forward_unit<SEQ>((const ls_diagonal *)context, i);
}

}  // namespace

int32_t diagonal_forward(const ls_diagonal *a) {
  const int64_t units = a->batch * ls_ceil(a->channels, CHANNELS);
  ls_run(units, a->seq_idx ? task<true, false> : task<false, false>, (void *)a);
  return 0;
}

int32_t diagonal_backward(const ls_diagonal *a) {
  const int64_t units = a->batch * ls_ceil(a->channels, CHANNELS);
  ls_run(units, a->seq_idx ? task<true, true> : task<false, true>, (void *)a);
  ls_run(a->channels, reduce, (void *)a);
  return 0;
}

}  // namespace LS_ISA
