// Chooses the instruction set once, holds the thread pool, exports the C ABI.
#include <string.h>
#include <time.h>

#include "kernels.h"

#define LS_EXPORT extern "C" __attribute__((visibility("default")))

extern const ls_kernels ls_kernels_baseline;
#if defined(__x86_64__)
extern const ls_kernels ls_kernels_avx2;
extern const ls_kernels ls_kernels_avx512;
#endif

static ls_parallel_for pool = nullptr;
static const ls_kernels *kernels = &ls_kernels_baseline;

void ls_run(int64_t n, ls_task task, void *context) {
  if (!pool || n < 2 || pool(0, n, 1, task, context)) task(0, n, context);
}

static bool runs(const ls_kernels *candidate) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (candidate == &ls_kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (candidate == &ls_kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

LS_EXPORT int32_t ls_choose_isa(const char *name) {
  const ls_kernels *best_first[] = {
#if defined(__x86_64__)
      &ls_kernels_avx512, &ls_kernels_avx2,
#endif
      &ls_kernels_baseline};
  for (const ls_kernels *candidate : best_first) {
    if ((*name && strcmp(name, candidate->isa)) || !runs(candidate)) continue;
    kernels = candidate;
    return 0;
  }
  return -1;
}

LS_EXPORT int32_t ls_abi_version(void) { return LS_ABI_VERSION; }
LS_EXPORT const char *ls_isa(void) { return kernels->isa; }
LS_EXPORT int32_t ls_is_amd(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
#else
  return 0;
#endif
}
LS_EXPORT void ls_set_parallel_for(ls_parallel_for function) { pool = function; }

static bool bad(const ls_scan *a) {
  return a->batch < 1 || a->seq_len < 1 || a->d_inner < 1 || a->d_state < 1 || a->d_state > LS_MAX_STATE ||
         a->n_groups < 1 || a->d_inner % a->n_groups;
}
static bool bad(const ls_conv *a) {
  return a->batch < 1 || a->seq_len < 1 || a->d_inner < 1 || a->d_conv < 1 || a->d_conv > LS_MAX_CONV;
}

LS_EXPORT int32_t ls_scan_forward(const ls_scan *args) { return bad(args) ? -1 : kernels->scan_forward(args); }
LS_EXPORT int32_t ls_scan_backward(const ls_scan *args) { return bad(args) ? -1 : kernels->scan_backward(args); }
LS_EXPORT int32_t ls_conv_forward(const ls_conv *args) { return bad(args) ? -1 : kernels->conv_forward(args); }
LS_EXPORT int32_t ls_conv_backward(const ls_conv *args) { return bad(args) ? -1 : kernels->conv_backward(args); }
LS_EXPORT int32_t ls_linear(const float *x, const float *weight, const float *bias, float *y, int64_t rows,
                            int64_t n_in, int64_t n_out) {
  return rows < 1 || n_in < 1 || n_out < 1 ? -1 : kernels->linear(x, weight, bias, y, rows, n_in, n_out);
}

LS_EXPORT int64_t ls_scan_workspace(int64_t batch, int64_t seq_len, int64_t d_inner, int64_t d_state,
                                    int64_t n_groups) {
  const int64_t per_group = d_inner / n_groups, units = n_groups * ls_ceil(per_group, ls_unit_channels(batch, per_group));
  const int64_t rows = batch * units * seq_len * d_state, states = batch * d_inner * d_state;
  return 2 * (rows > states ? rows : states) + states + 2 * batch * d_inner;
}

namespace {
struct Probe {
  int64_t n;
  float sink[256];  // one per worker, so that the work is not optimised away
};
void probe_task(int64_t begin, int64_t end, void *context) {
  Probe *probe = (Probe *)context;
  for (int64_t i = begin; i < end; ++i) kernels->probe_exp_fma(probe->n, &probe->sink[i % 256]);
}
double seconds(void) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
}  // namespace

LS_EXPORT double ls_probe_exp_fma(int64_t n, int64_t threads) {
  Probe probe = {n, {}};
  const double begin = seconds();
  ls_run(threads, probe_task, &probe);
  return (double)n * (double)threads / (seconds() - begin);
}
