// Convolution kernels of state spaces: Vandermonde and Cauchy products, forward and backward; see
// src/longscan/ops/vandermonde.py and cauchy.py. Vector lanes run along the kernel; a unit of work is one channel.
#include "kernels.h"
#include "simd.h"

namespace LS_ISA {
namespace {

constexpr int S = 256;  // kernel entries between two exact powers
constexpr int NV = 4;   // state components at once

struct Double2 {
  double re, im;
};
LS_INLINE Double2 times(Double2 a, Double2 b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }

// a^0 .. a^(S-1) rounded once each, and a^S: all powers beyond come from these two, in double precision.
struct Powers {
  float re[S], im[S];
  Double2 stretch;
  void fill(const double *a) {
    Double2 power = {1, 0};
    for (int j = 0; j < S; ++j) {
      re[j] = (float)power.re, im[j] = (float)power.im;
      power = times(power, {a[0], a[1]});
    }
    stretch = power;
  }
};

// kernel[l] += Re(sum_n c_n a_n^l) for N components.
template <int N>
void add_powers(float *kernel, int64_t length, const Powers *powers, Double2 *start) {
  for (int64_t l0 = 0; l0 < length; l0 += S) {
    vec re[N], im[N];
    for (int i = 0; i < N; ++i) {
      re[i] = splat((float)start[i].re), im[i] = splat((float)start[i].im);
      start[i] = times(start[i], powers[i].stretch);
    }
    for (int j = 0; j < S && l0 + j < length; j += W) {
      const int lanes = (int)(length - l0 - j < W ? length - l0 - j : W);
      vec sum = load_n(kernel + l0 + j, lanes);
      for (int i = 0; i < N; ++i)
        sum = fma(re[i], load(powers[i].re + j), sum) - im[i] * load(powers[i].im + j);
      store_n(kernel + l0 + j, sum, lanes);
    }
  }
}

void vandermonde_row(const ls_vandermonde *args, int64_t row) {
  const int64_t N = args->d_state;
  const double *a = args->a + row % args->channels * N * 2;
  const float *c = args->c + row * N * 2;
  float *kernel = args->kernel + row * args->length;
  memset(kernel, 0, sizeof(float) * args->length);
  Powers powers[NV];
  Double2 start[NV];
  for (int64_t n0 = 0; n0 < N; n0 += NV) {
    const int count = (int)(N - n0 < NV ? N - n0 : NV);
    for (int i = 0; i < count; ++i) {
      powers[i].fill(a + (n0 + i) * 2);
      start[i] = {2.0 * c[(n0 + i) * 2], 2.0 * c[(n0 + i) * 2 + 1]};
    }
    if (count == NV)
      add_powers<NV>(kernel, args->length, powers, start);
    else
      for (int i = 0; i < count; ++i) add_powers<1>(kernel, args->length, powers + i, start + i);
  }
}

// For each component sum_l g_l a^l and sum_l l g_l a^l: the gradients of c and of log a.
void vandermonde_back(const ls_vandermonde *args, int64_t row) {
  const int64_t N = args->d_state;
  const double *a = args->a + row % args->channels * N * 2;
  const float *g = args->dkernel + row * args->length;
  Powers powers;
  for (int64_t n = 0; n < N; ++n) {
    powers.fill(a + n * 2);
    Double2 power = {1, 0}, s0 = {0, 0}, s1 = {0, 0};
    for (int64_t l0 = 0; l0 < args->length; l0 += S) {
      vec re0{}, im0{}, re1{}, im1{}, at;
      for (int i = 0; i < W; ++i) at[i] = (float)i;
      for (int j = 0; j < S && l0 + j < args->length; j += W, at += splat((float)W)) {
        const vec v = load_n(g + l0 + j, (int)(args->length - l0 - j < W ? args->length - l0 - j : W));
        const vec w = v * at, pre = load(powers.re + j), pim = load(powers.im + j);
        re0 = fma(v, pre, re0), im0 = fma(v, pim, im0);
        re1 = fma(w, pre, re1), im1 = fma(w, pim, im1);
      }
      const Double2 b0 = {sum(re0), sum(im0)}, b1 = {sum(re1) + (double)l0 * b0.re, sum(im1) + (double)l0 * b0.im};
      const Double2 p0 = times(power, b0), p1 = times(power, b1);
      s0.re += p0.re, s0.im += p0.im, s1.re += p1.re, s1.im += p1.im;
      power = times(power, powers.stretch);
    }
    double *to = args->sums + (row * N + n) * 4;
    to[0] = s0.re, to[1] = s0.im, to[2] = s1.re, to[3] = s1.im;
  }
}

template <void (*ROW)(const ls_vandermonde *, int64_t)>
void vandermonde_task(int64_t begin, int64_t end, void *context) {
  for (int64_t i = begin; i < end; ++i) ROW((const ls_vandermonde *)context, i);
}

// --- Cauchy ---
//
// v / (i t - lambda) plus its conjugate twin is (i t alpha - beta) / d with alpha = 2 Re v, beta = 2 Re(v conj(lambda))
// and d = (i t - lambda)(i t - conj(lambda)) = (Im^2 - t^2) + Re^2 - 2 i t Re. Close to a pole Im - t loses all of
// float32's digits, so both come as a float and what it leaves out of a double.
struct Pole {
  vec re, re2, high, low;
  explicit Pole(const double *lambda) {
    re = splat((float)lambda[0]), re2 = splat((float)(lambda[0] * lambda[0]));
    const double frequency = lambda[1] < 0 ? -lambda[1] : lambda[1];  // the twin's, if it is the one t comes close to
    const float rounded = (float)frequency;
    high = splat(rounded), low = splat((float)(frequency - rounded));
  }
};
struct Places {
  vec high, low;
};

LS_INLINE Places places(const ls_cauchy *args, int64_t k, int lanes) {
  return {load_n(args->t + k, lanes), load_n(args->t_low + k, lanes)};
}

// W complex numbers as they lie in memory: their real and imaginary parts.
#if LS_LANES == 16
#define LS_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define LS_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LS_LANES == 8
#define LS_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define LS_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LS_EVEN 0, 2, 4, 6
#define LS_ODD 1, 3, 5, 7
#endif
LS_INLINE void load_complex(const float *p, int lanes, vec *re, vec *im) {
  const vec a = load_n(p, 2 * lanes < W ? 2 * lanes : W), b = lanes > W / 2 ? load_n(p + W, 2 * lanes - W) : vec{};
  *re = __builtin_shufflevector(a, b, LS_EVEN);
  *im = __builtin_shufflevector(a, b, LS_ODD);
}

// 1 / d
LS_INLINE void reciprocal(const Pole &pole, const Places &t, vec *re, vec *im) {
  const vec gap = (pole.high - t.high) + (pole.low - t.low);
  const vec dre = fma(gap, pole.high + t.high, pole.re2), dim = splat(-2.0f) * t.high * pole.re;
  const vec inverse = splat(1.0f) / fma(dre, dre, dim * dim);
  *re = dre * inverse, *im = -dim * inverse;
}

constexpr int MAX_J = LS_CAUCHY_NUMERATORS;

template <int J>
void cauchy_channel(const ls_cauchy *args, int64_t h) {
  const int64_t N = args->d_state, K = args->n_places, H = args->channels;
  for (int64_t k = 0; k < K; k += W) {
    const int lanes = (int)(K - k < W ? K - k : W);
    const Places t = places(args, k, lanes);
    vec a_re[J] = {}, a_im[J] = {}, b_re[J] = {}, b_im[J] = {};
    for (int64_t n = 0; n < N; ++n) {
      const Pole pole(args->lambda + (h * N + n) * 2);
      vec re, im;
      reciprocal(pole, t, &re, &im);
      for (int j = 0; j < J; ++j) {
        const vec alpha = splat(args->alpha[(j * H + h) * N + n]), beta = splat(args->beta[(j * H + h) * N + n]);
        a_re[j] = fma(alpha, re, a_re[j]), a_im[j] = fma(alpha, im, a_im[j]);
        b_re[j] = fma(beta, re, b_re[j]), b_im[j] = fma(beta, im, b_im[j]);
      }
    }
    for (int j = 0; j < J; ++j) {  // i t a - b
      const vec re = -t.high * a_im[j] - b_re[j], im = t.high * a_re[j] - b_im[j];
      float *to = args->out + ((j * H + h) * K + k) * 2;
      for (int i = 0; i < lanes; ++i) to[2 * i] = re[i], to[2 * i + 1] = im[i];
    }
  }
}

template <int J>
void cauchy_back(const ls_cauchy *args, int64_t h) {
  const int64_t N = args->d_state, K = args->n_places, H = args->channels;
  for (int64_t n = 0; n < N; ++n) {
    const Pole pole(args->lambda + (h * N + n) * 2);
    double dalpha[J] = {}, dbeta[J] = {}, s0_re = 0, s1_im = 0;
    vec alpha[J], beta[J];
    for (int j = 0; j < J; ++j) {
      alpha[j] = splat(args->alpha[(j * H + h) * N + n]), beta[j] = splat(args->beta[(j * H + h) * N + n]);
    }
    for (int64_t k0 = 0; k0 < K; k0 += S) {  // sums of a stretch in float32, of stretches in double
      vec da[J] = {}, db[J] = {}, q0{}, q1{};
      for (int64_t k = k0; k < k0 + S && k < K; k += W) {
        const int lanes = (int)(K - k < W ? K - k : W);
        const Places t = places(args, k, lanes);
        vec re, im, q_re{}, q_im{};
        reciprocal(pole, t, &re, &im);
        for (int j = 0; j < J; ++j) {
          vec g_re, g_im;  // of the output; conjugated, so that the loss grows by Re(g d out)
          load_complex(args->dout + ((j * H + h) * K + k) * 2, lanes, &g_re, &g_im);
          g_im = -g_im;
          const vec gr_re = g_re * re - g_im * im, gr_im = g_re * im + g_im * re;
          da[j] -= t.high * gr_im;  // Re(g i t r)
          db[j] -= gr_re;           // Re(-g r)
          const vec w_re = -beta[j], w_im = t.high * alpha[j];  // i t alpha - beta
          q_re += gr_re * w_re - gr_im * w_im, q_im += gr_re * w_im + gr_im * w_re;
        }
        // d(1/d) = -r^2 d(d); q holds g r (i t alpha - beta) already
        const vec s_re = -(q_re * re - q_im * im), s_im = -(q_re * im + q_im * re);
        q0 += s_re;
        q1 += t.high * s_im;
      }
      for (int j = 0; j < J; ++j) dalpha[j] += sum(da[j]), dbeta[j] += sum(db[j]);
      s0_re += sum(q0), s1_im += sum(q1);
    }
    for (int j = 0; j < J; ++j) {
      args->dalpha[(j * H + h) * N + n] = (float)dalpha[j];
      args->dbeta[(j * H + h) * N + n] = (float)dbeta[j];
    }
    double *to = args->dlambda + (h * N + n) * 2;  // of d: 2 Re - 2 i t along Re, 2 Im along Im
    to[0] = 2 * args->lambda[(h * N + n) * 2] * s0_re + 2 * s1_im;
    to[1] = 2 * args->lambda[(h * N + n) * 2 + 1] * s0_re;
  }
}

template <bool BACKWARD>
void cauchy_task(int64_t begin, int64_t end, void *context) {
  const ls_cauchy *a = (const ls_cauchy *)context;
  void (*const forward[])(const ls_cauchy *, int64_t) = {cauchy_channel<1>, cauchy_channel<2>, cauchy_channel<3>,
                                                         cauchy_channel<4>};
  void (*const backward[])(const ls_cauchy *, int64_t) = {cauchy_back<1>, cauchy_back<2>, cauchy_back<3>,
                                                          cauchy_back<4>};
  static_assert(MAX_J == 4, "one entry per count");
  for (int64_t h = begin; h < end; ++h) (BACKWARD ? backward : forward)[a->numerators - 1](a, h);
}

}  // namespace

int32_t vandermonde_forward(const ls_vandermonde *a) {
  ls_run(a->rows, vandermonde_task<vandermonde_row>, (void *)a);
  return 0;
}
int32_t vandermonde_backward(const ls_vandermonde *a) {
  ls_run(a->rows, vandermonde_task<vandermonde_back>, (void *)a);
  return 0;
}
int32_t cauchy_forward(const ls_cauchy *a) {
  ls_run(a->channels, cauchy_task<false>, (void *)a);
  return 0;
}
int32_t cauchy_backward(const ls_cauchy *a) {
  ls_run(a->channels, cauchy_task<true>, (void *)a);
  return 0;
}

}  // namespace LS_ISA
