// y = x W^T + b for a few rows of x, as decoding needs it: the weights stream through once, at the speed of memory.
#include "kernels.h"
#include "simd.h"

namespace LS_ISA {
namespace {

constexpr int64_t OUTPUTS = 32;  // outputs of one unit of parallel work
constexpr int MAX_ROWS = 4;      // rows of x that share one pass over the weights

struct Linear {
  const float *x, *weight, *bias;
  float *y;
  int64_t rows, n_in, n_out;
};

// O outputs of R rows at once.
template <int R, int O>
LS_INLINE void dot(const Linear *a, int64_t row, int64_t o) {
  const float *x = a->x + row * a->n_in, *w = a->weight + o * a->n_in;
  vec acc[R][O] = {};
  int64_t i = 0;
  for (; i + W <= a->n_in; i += W)
    for (int j = 0; j < O; ++j) {
      const vec wj = load(w + j * a->n_in + i);
      for (int r = 0; r < R; ++r) acc[r][j] += wj * load(x + r * a->n_in + i);
    }
  for (int r = 0; r < R; ++r) {
    float totals[O];
    if (O == 4)
      sum4(totals, acc[r]);
    else
      for (int j = 0; j < O; ++j) totals[j] = sum(acc[r][j]);
    for (int j = 0; j < O; ++j) {
      float total = totals[j];
      for (int64_t k = i; k < a->n_in; ++k) total += w[j * a->n_in + k] * x[r * a->n_in + k];
      a->y[(row + r) * a->n_out + o + j] = total + (a->bias ? a->bias[o + j] : 0.0f);
    }
  }
}

template <int R>
void outputs(const Linear *a, int64_t row, int64_t o, int64_t end) {
  for (; o + 4 <= end; o += 4) dot<R, 4>(a, row, o);
  for (; o < end; ++o) dot<R, 1>(a, row, o);
}

void task(int64_t begin, int64_t end, void *context) {
  const Linear *a = (const Linear *)context;
  const int64_t first = begin * OUTPUTS, last = end * OUTPUTS < a->n_out ? end * OUTPUTS : a->n_out;
  for (int64_t row = 0; row < a->rows;) {
    const int64_t left = a->rows - row;
    if (left >= MAX_ROWS)
      outputs<4>(a, row, first, last), row += 4;
    else if (left >= 2)
      outputs<2>(a, row, first, last), row += 2;
    else
      outputs<1>(a, row, first, last), row += 1;
  }
}

}  // namespace

int32_t linear(const float *x, const float *weight, const float *bias, float *y, int64_t rows, int64_t n_in,
               int64_t n_out) {
  Linear args = {x, weight, bias, y, rows, n_in, n_out};
  ls_run(ls_ceil(n_out, OUTPUTS), task, &args);
  return 0;
}

// The arithmetic of a state update, exp and three multiply-adds, on eight vectors that stay in registers.
void probe_exp_fma(int64_t n, float *sink) {
  vec h[8] = {}, dt = splat(1e-3f), y = vec{};
  for (int64_t i = 0; i < n; i += 8 * W) {
    for (int j = 0; j < 8; ++j) {
      h[j] = exp2v(dt * splat(-1.0f - j)) * h[j] + splat(0.5f + j) * dt;
      y += splat(0.25f + j) * h[j];
    }
    dt += splat(1e-7f);
  }
  *sink = sum(y);
}

}  // namespace LS_ISA

#define LS_NAME2(isa) ls_kernels_##isa
#define LS_NAME(isa) LS_NAME2(isa)
#define LS_STRING2(isa) #isa
#define LS_STRING(isa) LS_STRING2(isa)

namespace LS_ISA {
int32_t scan_forward(const ls_scan *);
int32_t scan_backward(const ls_scan *);
int32_t conv_forward(const ls_conv *);
int32_t conv_backward(const ls_conv *);
}  // namespace LS_ISA

extern const ls_kernels LS_NAME(LS_ISA);
const ls_kernels LS_NAME(LS_ISA) = {LS_STRING(LS_ISA),     LS_ISA::scan_forward,  LS_ISA::scan_backward,
                                    LS_ISA::conv_forward, LS_ISA::conv_backward, LS_ISA::linear,
                                    LS_ISA::probe_exp_fma};
