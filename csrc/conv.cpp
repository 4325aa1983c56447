// Causal depthwise convolution. A unit of parallel work is one batch row and up to 128 channels, walked in time with a
// window of pointers to the rows it covers: tokens, rows of the initial state, or a row of zeros. Packed sequences and
// padding only change which rows the window holds.
#include "kernels.h"
#include "simd.h"

namespace LS_ISA {
namespace {

constexpr int CHANNELS = 128;
const float zeros[CHANNELS] = {};

struct Unit {
  int64_t b, first, channels;
  Unit(const ls_conv *a, int64_t i) {
    const int64_t units = ls_ceil(a->d_inner, CHANNELS);
    b = i / units;
    first = i % units * CHANNELS;
    channels = a->d_inner - first < CHANNELS ? a->d_inner - first : CHANNELS;
  }
};

// weight (channels, K) -> [K][CHANNELS], lanes beyond the channels zero.
template <int K>
void pack_weight(float *to, const ls_conv *a, const Unit &unit) {
  memset(to, 0, sizeof(float) * K * CHANNELS);
  for (int64_t c = 0; c < unit.channels; ++c)
    for (int k = 0; k < K; ++k) to[k * CHANNELS + c] = a->weight[(unit.first + c) * K + k];
}

// What the window does at a token of sequence s: true if the past must be forgotten first.
LS_INLINE bool starts(int32_t s, int32_t *last) {
  const bool start = *last >= 0 && s != *last;
  *last = s;
  return start;
}

template <int K>
LS_INLINE vec taps(const float *const *window, const float *weight, const float *bias, int64_t c, int n) {
  vec y = bias ? load_n(bias + c, n) : vec{};
  for (int k = 0; k < K; ++k) y += load(weight + k * CHANNELS + c) * load_n(window[k] + c, n);
  return y;
}

template <int K>
void forward_unit(const ls_conv *a, int64_t index) {
  const Unit unit(a, index);
  alignas(64) float weight[K * CHANNELS];
  pack_weight<K>(weight, a, unit);
  const float *bias = a->bias ? a->bias + unit.first : nullptr;
  const float *window[K];  // oldest first
  for (int k = 0; k < K - 1; ++k)
    window[k] = a->initial_state ? a->initial_state + (unit.b * (K - 1) + k) * a->d_inner + unit.first : zeros;
  const float *x = a->x.data + unit.b * a->x.stride_batch + unit.first;
  float *y = a->y + unit.b * a->seq_len * a->d_inner + unit.first;
  int32_t last = -1;
  for (int64_t t = 0; t < a->seq_len; ++t, x += a->x.stride_time, y += a->d_inner) {
    if (a->seq_idx) {
      const int32_t s = a->seq_idx[unit.b * a->seq_len + t];
      if (s < 0) {
        memset(y, 0, sizeof(float) * unit.channels);
        continue;
      }
      if (starts(s, &last))
        for (int k = 0; k < K - 1; ++k) window[k] = zeros;
    }
    window[K - 1] = x;
    for (int64_t c = 0; c < unit.channels; c += W) {
      const int n = (int)(unit.channels - c);
      vec out = taps<K>(window, weight, bias, c, n);
      if (a->silu) out = out * sigmoid(out);
      store_n(y + c, out, n);
    }
    for (int k = 0; k < K - 1; ++k) window[k] = window[k + 1];
  }
  for (int k = 0; k < K - 1; ++k)
    memmove(a->final_state + (unit.b * (K - 1) + k) * a->d_inner + unit.first, window[k],
            sizeof(float) * unit.channels);
}

template <int K>
void backward_unit(const ls_conv *a, int64_t index) {
  const Unit unit(a, index);
  alignas(64) float weight[K * CHANNELS], dweight[K * CHANNELS] = {}, dbias[CHANNELS] = {}, nowhere[CHANNELS] = {};
  pack_weight<K>(weight, a, unit);
  const float *bias = a->bias ? a->bias + unit.first : nullptr;
  const float *window[K];
  float *gradient[K];  // where the window's rows collect theirs
  for (int k = 0; k < K - 1; ++k) {
    const int64_t row = (unit.b * (K - 1) + k) * a->d_inner + unit.first;
    window[k] = a->initial_state ? a->initial_state + row : zeros;
    gradient[k] = a->dinitial_state ? a->dinitial_state + row : nowhere;
    memset(gradient[k], 0, sizeof(float) * unit.channels);
  }
  const float *x = a->x.data + unit.b * a->x.stride_batch + unit.first;
  const float *dy = a->dy.data + unit.b * a->dy.stride_batch + unit.first;
  float *dx = a->dx + unit.b * a->seq_len * a->d_inner + unit.first;
  int32_t last = -1;
  for (int64_t t = 0; t < a->seq_len; ++t, x += a->x.stride_time, dy += a->dy.stride_time, dx += a->d_inner) {
    if (a->seq_idx) {
      const int32_t s = a->seq_idx[unit.b * a->seq_len + t];
      if (s < 0) {
        memset(dx, 0, sizeof(float) * unit.channels);
        continue;
      }
      if (starts(s, &last))
        for (int k = 0; k < K - 1; ++k) window[k] = zeros, gradient[k] = nowhere;
    }
    window[K - 1] = x;
    gradient[K - 1] = dx;
    for (int64_t c = 0; c < unit.channels; c += W) {
      const int n = (int)(unit.channels - c);
      vec d = load_n(dy + c, n);
      if (a->silu) {
        const vec y = taps<K>(window, weight, bias, c, n), gate = sigmoid(y);
        d = d * gate * (splat(1.0f) + y * (splat(1.0f) - gate));
      }
      store(dbias + c, load(dbias + c) + d);
      for (int k = 0; k < K; ++k) {
        float *dw = dweight + k * CHANNELS + c;
        store(dw, load(dw) + d * load_n(window[k] + c, n));
      }
      for (int k = 0; k < K - 1; ++k)
        store_n(gradient[k] + c, load_n(gradient[k] + c, n) + d * load(weight + k * CHANNELS + c), n);
      store_n(dx + c, d * load(weight + (K - 1) * CHANNELS + c), n);  // the token's own row, touched here first
    }
    for (int k = 0; k < K - 1; ++k) window[k] = window[k + 1], gradient[k] = gradient[k + 1];
  }
  if (a->dfinal)
    for (int k = 0; k < K - 1; ++k)
      for (int64_t c = 0; c < unit.channels; ++c)
        gradient[k][c] += a->dfinal[(unit.b * (K - 1) + k) * a->d_inner + unit.first + c];
  // Partial sums of this row: (batch, d_inner, K) and (batch, d_inner).
  float *pw = a->workspace + (unit.b * a->d_inner + unit.first) * K;
  float *pb = a->workspace + a->batch * a->d_inner * K + unit.b * a->d_inner + unit.first;
  for (int64_t c = 0; c < unit.channels; ++c) {
    for (int k = 0; k < K; ++k) pw[c * K + k] = dweight[k * CHANNELS + c];
    pb[c] = dbias[c];
  }
}

template <int K, bool BACKWARD>
void task(int64_t begin, int64_t end, void *context) {
  for (int64_t i = begin; i < end; ++i)
    if (BACKWARD)
      backward_unit<K>((const ls_conv *)context, i);
    else
      forward_unit<K>((const ls_conv *)context, i);
}

template <bool BACKWARD>
void run(const ls_conv *a) {
  static const ls_task tasks[LS_MAX_CONV] = {task<1, BACKWARD>, task<2, BACKWARD>, task<3, BACKWARD>,
                                             task<4, BACKWARD>, task<5, BACKWARD>, task<6, BACKWARD>,
                                             task<7, BACKWARD>, task<8, BACKWARD>};
  ls_run(a->batch * ls_ceil(a->d_inner, CHANNELS), tasks[a->d_conv - 1], (void *)a);
}

}  // namespace

int32_t conv_forward(const ls_conv *a) {
  run<false>(a);
  return 0;
}

int32_t conv_backward(const ls_conv *a) {
  run<true>(a);
  const int64_t weights = a->d_inner * a->d_conv;
  const float *pw = a->workspace, *pb = a->workspace + a->batch * weights;
  for (int64_t i = 0; i < weights; ++i) {
    float total = 0;
    for (int64_t b = 0; b < a->batch; ++b) total += pw[b * weights + i];
    a->dweight[i] = total;
  }
  for (int64_t i = 0; a->bias && i < a->d_inner; ++i) {
    float total = 0;
    for (int64_t b = 0; b < a->batch; ++b) total += pb[b * a->d_inner + i];
    a->dbias[i] = total;
  }
  return 0;
}

}  // namespace LS_ISA
