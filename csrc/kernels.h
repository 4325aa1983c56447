// What one instruction set offers, and the thread pool they all use.
#pragma once
#include "longscan.h"

struct ls_kernels {
  const char *isa;
  int32_t (*scan_forward)(const ls_scan *);
  int32_t (*scan_backward)(const ls_scan *);
  int32_t (*ssd_forward)(const ls_ssd *);
  int32_t (*ssd_backward)(const ls_ssd *);
  int32_t (*ssd_step)(const ls_ssd *);
  int64_t (*ssd_forward_workspace)(const ls_ssd *);
  int64_t (*ssd_backward_workspace)(const ls_ssd *);
  int32_t (*conv_forward)(const ls_conv *);
  int32_t (*conv_backward)(const ls_conv *);
  int32_t (*rms_norm_forward)(const ls_rms_norm *);
  int32_t (*rms_norm_backward)(const ls_rms_norm *);
  int32_t (*rotary_forward)(const ls_rotary *);
  int32_t (*rotary_backward)(const ls_rotary *);
  int32_t (*diagonal_forward)(const ls_diagonal *);
  int32_t (*diagonal_backward)(const ls_diagonal *);
  int32_t (*vandermonde_forward)(const ls_vandermonde *);
  int32_t (*vandermonde_backward)(const ls_vandermonde *);
  int32_t (*cauchy_forward)(const ls_cauchy *);
  int32_t (*cauchy_backward)(const ls_cauchy *);
  int32_t (*legs)(const ls_legs *);
  int32_t (*multiply)(const ls_matrix *, const float *, float *, int64_t, char *);
  int64_t (*multiply_workspace)(int64_t, int64_t);
  int32_t (*dequantize)(const ls_matrix *, float *);
  int32_t (*quant_gemm)(const ls_matrix *, const float *, float *, int64_t, int64_t, char *);
  int32_t (*decode)(const ls_decode *);
  int64_t (*decode_workspace)(const ls_decode *);
  void (*probe_exp_fma)(int64_t n, float *sink);
  void (*probe_read)(const float *data, int64_t n, float *sink);
  void (*probe_multiply)(int64_t n, int64_t bits, float *sink);
  int64_t (*products_of_step)(int64_t bits);
};

// Over [0, n), in parallel if there is a pool: in pieces that threads take when they are free, or in equal shares.
void ls_run(int64_t n, ls_task task, void *context);
void ls_run_each(int64_t n, ls_task task, void *context);
void ls_yield(void);                                   // let another thread have the processor

// Channels a unit of parallel work owns: more mean less memory for partial sums, fewer mean more units to share out.
// A function of the shape alone, so that sums always run in one order.
inline int64_t ls_unit_channels(int64_t batch, int64_t channels_of_group) {
  return batch * channels_of_group < 1024 ? 64 : 128;
}
inline int64_t ls_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs of tokens into which a row is cut: a function of the shape alone, likewise.
inline int64_t ls_rotary_units(const ls_rotary *a) {
  const int64_t most = ls_ceil(LS_ROTARY_UNITS, a->batch), of_16 = ls_ceil(a->seq_len, 16);
  return most < of_16 ? most : of_16;
}

// Floats of a head's state, with d_head padded for the widest vectors.
inline int64_t ls_ssd_state(int64_t d_head, int64_t d_state) { return ls_ceil(d_head, 32) * 32 * d_state; }
