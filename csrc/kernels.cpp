// The table of one instruction set, and what the machine could do at best.
#include "kernels.h"

#include "simd.h"

namespace LS_ISA {

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

// A sum that keeps eight loads in flight.
void probe_read(const float *data, int64_t n, float *sink) {
  vec acc[8] = {};
  for (int64_t i = 0; i + 8 * W <= n; i += 8 * W)
    for (int j = 0; j < 8; ++j) acc[j] += load(data + i + j * W);
  for (int j = 1; j < 8; ++j) acc[0] += acc[j];
  *sink = sum(acc[0]);
}

}  // namespace LS_ISA

#define LS_NAME2(isa) ls_kernels_##isa
#define LS_NAME(isa) LS_NAME2(isa)
#define LS_STRING2(isa) #isa
#define LS_STRING(isa) LS_STRING2(isa)

namespace LS_ISA {
int32_t scan_forward(const ls_scan *);
int32_t scan_backward(const ls_scan *);
int32_t ssd_forward(const ls_ssd *);
int32_t ssd_backward(const ls_ssd *);
int32_t ssd_step(const ls_ssd *);
int64_t ssd_forward_workspace(const ls_ssd *);
int64_t ssd_backward_workspace(const ls_ssd *);
int32_t conv_forward(const ls_conv *);
int32_t conv_backward(const ls_conv *);
int32_t rms_norm_forward(const ls_rms_norm *);
int32_t rms_norm_backward(const ls_rms_norm *);
int32_t rotary_forward(const ls_rotary *);
int32_t rotary_backward(const ls_rotary *);
int32_t diagonal_forward(const ls_diagonal *);
int32_t diagonal_backward(const ls_diagonal *);
int32_t vandermonde_forward(const ls_vandermonde *);
int32_t vandermonde_backward(const ls_vandermonde *);
int32_t cauchy_forward(const ls_cauchy *);
int32_t cauchy_backward(const ls_cauchy *);
int32_t legs(const ls_legs *);
int32_t multiply(const ls_matrix *, const float *, float *, int64_t, char *);
int64_t multiply_workspace(int64_t, int64_t);
int32_t dequantize(const ls_matrix *, float *);
int32_t quant_gemm(const ls_matrix *, const float *, float *, int64_t, int64_t, char *);
void probe_multiply(int64_t, int64_t, float *);
int64_t products_of_step(int64_t);
int32_t decode(const ls_decode *);
int64_t decode_workspace(const ls_decode *);
}  // namespace LS_ISA

extern const ls_kernels LS_NAME(LS_ISA);
const ls_kernels LS_NAME(LS_ISA) = {
    LS_STRING(LS_ISA), LS_ISA::scan_forward, LS_ISA::scan_backward,
    LS_ISA::ssd_forward, LS_ISA::ssd_backward, LS_ISA::ssd_step,
    LS_ISA::ssd_forward_workspace, LS_ISA::ssd_backward_workspace, LS_ISA::conv_forward,
    LS_ISA::conv_backward, LS_ISA::rms_norm_forward, LS_ISA::rms_norm_backward,
    LS_ISA::rotary_forward, LS_ISA::rotary_backward,
    LS_ISA::diagonal_forward, LS_ISA::diagonal_backward,
    LS_ISA::vandermonde_forward, LS_ISA::vandermonde_backward, LS_ISA::cauchy_forward,
    LS_ISA::cauchy_backward, LS_ISA::legs, LS_ISA::multiply,
    LS_ISA::multiply_workspace, LS_ISA::dequantize, LS_ISA::quant_gemm, LS_ISA::decode,
    LS_ISA::decode_workspace, LS_ISA::probe_exp_fma, LS_ISA::probe_read,
    LS_ISA::probe_multiply, LS_ISA::products_of_step};
