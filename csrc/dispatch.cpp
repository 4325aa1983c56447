// Chooses the instruction set once, holds the thread pool, exports the C ABI.
#include <string.h>

#include <atomic>
#include <chrono>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sched.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"

#if defined(_WIN32)
#pragma clang diagnostic ignored "-Wdll-attribute-on-redeclaration"  // exported here, declared for everybody
#define LS_EXPORT extern "C" __declspec(dllexport)
#else
#define LS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__aarch64__)
#define LS_FALLBACK ls_kernels_neon  // every processor of this kind has it
#else
#define LS_FALLBACK ls_kernels_baseline
#endif
extern const ls_kernels LS_FALLBACK;
#if defined(__aarch64__)
// Only products of 8-bit integers have an instruction of their own; all other kernels are those of NEON.
namespace dotprod {
int32_t quant_gemm(const ls_matrix *, const float *, float *, int64_t, int64_t, char *);
void probe_multiply(int64_t, int64_t, float *);
int64_t products_of_step(int64_t);
}  // namespace dotprod
static ls_kernels with_dotprod(ls_kernels kernels) {
  kernels.isa = "dotprod";
  kernels.quant_gemm = dotprod::quant_gemm;
  kernels.probe_multiply = dotprod::probe_multiply;
  kernels.products_of_step = dotprod::products_of_step;
  return kernels;
}
static const ls_kernels ls_kernels_dotprod = with_dotprod(LS_FALLBACK);
#elif defined(__x86_64__)
extern const ls_kernels ls_kernels_avx2;
#if !defined(LS_NO_AVX512)
extern const ls_kernels ls_kernels_avx512;
extern const ls_kernels ls_kernels_avx512vnni;
#endif
#endif

static ls_parallel_for pool = nullptr;
static const ls_kernels *kernels = &LS_FALLBACK;

void ls_run_each(int64_t n, ls_task task, void *context) {
  if (!pool || n < 2 || pool(0, n, 1, task, context)) task(0, n, context);
}

namespace {
struct Units {
  int64_t n;
  ls_task task;
  void *context;
  std::atomic<int64_t> next;
};
// One thread of [begin, end) by equal shares takes half a share first and ever less, so that one on a busy core does
// not make the others wait.
void take(int64_t begin, int64_t end, void *context) {
  Units *units = (Units *)context;
  const int64_t n = units->n, share = end - begin;
  for (int64_t at = units->next.load(std::memory_order_relaxed); at < n;) {
    const int64_t most = share == n ? n : (n - at) * share / (2 * n), size = most > 1 ? most : 1;
    if (units->next.compare_exchange_weak(at, at + size, std::memory_order_relaxed)) {
      units->task(at, at + size < n ? at + size : n, units->context);
      at = units->next.load(std::memory_order_relaxed);
    }
  }
}
}  // namespace

void ls_run(int64_t n, ls_task task, void *context) {
  Units units = {n, task, context, {0}};
  ls_run_each(n, take, &units);
}

void ls_yield(void) {
#if defined(_WIN32)
  SwitchToThread();
#else
  sched_yield();
#endif
}

#if defined(__aarch64__)
static bool has_dotprod(void) {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) && has;
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE);
#else
  return false;
#endif
}
#endif

static bool runs(const ls_kernels *candidate) {
  if (candidate == &LS_FALLBACK) return true;
#if defined(__aarch64__)
  if (candidate == &ls_kernels_dotprod) return has_dotprod();
#elif defined(__x86_64__)
  __builtin_cpu_init();
#if !defined(LS_NO_AVX512)
  if (candidate == &ls_kernels_avx512vnni && !__builtin_cpu_supports("avx512vnni")) return false;
  if (candidate == &ls_kernels_avx512vnni || candidate == &ls_kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
  if (candidate == &ls_kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return false;
}

LS_EXPORT int32_t ls_choose_isa(const char *name) {
  const ls_kernels *best_first[] = {
#if defined(__x86_64__)
#if !defined(LS_NO_AVX512)
      &ls_kernels_avx512vnni, &ls_kernels_avx512,
#endif
      &ls_kernels_avx2,
#elif defined(__aarch64__)
      &ls_kernels_dotprod,
#endif
      &LS_FALLBACK};
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
         a->n_groups < 1 || a->d_inner % a->n_groups ||
         (a->path && (a->seq_idx || a->B.stride_time < 0 || a->C.stride_time < 0));
}
static bool bad(const ls_conv *a) {
  return a->batch < 1 || a->seq_len < 1 || a->d_inner < 1 || a->d_conv < 1 || a->d_conv > LS_MAX_CONV;
}

LS_EXPORT int32_t ls_scan_forward(const ls_scan *args) { return bad(args) ? -1 : kernels->scan_forward(args); }
LS_EXPORT int32_t ls_scan_backward(const ls_scan *args) { return bad(args) ? -1 : kernels->scan_backward(args); }
static bool bad(const ls_ssd *a) {
  return a->batch < 1 || a->seq_len < 1 || a->n_heads < 1 || a->d_head < 1 || a->d_head > LS_SSD_MAX_HEAD ||
         a->n_groups < 1 || a->n_heads % a->n_groups || a->d_state < 1 || a->rank < 1 || a->rank > LS_SSD_CHUNK ||
         a->seq_len % a->rank;
}
LS_EXPORT int32_t ls_ssd_forward(const ls_ssd *args) { return bad(args) ? -1 : kernels->ssd_forward(args); }
LS_EXPORT int32_t ls_ssd_backward(const ls_ssd *args) { return bad(args) ? -1 : kernels->ssd_backward(args); }
LS_EXPORT int32_t ls_ssd_step(const ls_ssd *args) {
  return bad(args) || args->seq_len != 1 ? -1 : kernels->ssd_step(args);
}
LS_EXPORT int64_t ls_ssd_forward_workspace(const ls_ssd *args) { return bad(args) ? -1 : kernels->ssd_forward_workspace(args); }
LS_EXPORT int64_t ls_ssd_backward_workspace(const ls_ssd *args) {
  return bad(args) ? -1 : kernels->ssd_backward_workspace(args);
}
LS_EXPORT int32_t ls_conv_forward(const ls_conv *args) { return bad(args) ? -1 : kernels->conv_forward(args); }
LS_EXPORT int32_t ls_conv_backward(const ls_conv *args) { return bad(args) ? -1 : kernels->conv_backward(args); }

static bool bad(const ls_rms_norm *a) { return a->rows < 1 || a->n_groups < 1 || a->d_group < 1; }
LS_EXPORT int32_t ls_rms_norm_forward(const ls_rms_norm *args) {
  return bad(args) ? -1 : kernels->rms_norm_forward(args);
}
LS_EXPORT int32_t ls_rms_norm_backward(const ls_rms_norm *args) {
  return bad(args) ? -1 : kernels->rms_norm_backward(args);
}

static bool bad(const ls_rotary *a) {
  return a->batch < 1 || a->seq_len < 1 || a->rank < 1 || a->rank > LS_MAX_RANK || a->n_groups < 1 || a->n_heads < 1 ||
         a->n_heads % a->n_groups || a->d_state < 1 || a->d_state > LS_MAX_STATE || a->n_angles < 0 ||
         2 * a->n_angles > a->d_state;
}
LS_EXPORT int32_t ls_rotary_forward(const ls_rotary *args) { return bad(args) ? -1 : kernels->rotary_forward(args); }
LS_EXPORT int32_t ls_rotary_backward(const ls_rotary *args) { return bad(args) ? -1 : kernels->rotary_backward(args); }
LS_EXPORT int64_t ls_rotary_workspace(const ls_rotary *args) {
  if (bad(args)) return -1;
  const int64_t units = args->batch * ls_rotary_units(args), angles = args->n_heads * args->n_angles;
  const int64_t forward = 2 * units * angles + ls_ceil(units, 4);
  const int64_t vectors = args->rank * args->n_heads * args->d_state;
  return args->dq ? forward + args->batch * args->seq_len * angles + 2 * units * vectors : forward;
}

static bool bad(const ls_diagonal *a) {
  return a->batch < 1 || a->seq_len < 1 || a->channels < 1 || a->d_state < 1 || a->d_state > LS_MAX_STATE;
}
static bool bad(const ls_vandermonde *a) {
  return a->rows < 1 || a->channels < 1 || a->rows % a->channels || a->d_state < 1 || a->length < 1;
}
static bool bad(const ls_cauchy *a) {
  return a->numerators < 1 || a->numerators > LS_CAUCHY_NUMERATORS || a->channels < 1 || a->d_state < 1 ||
         a->n_places < 1;
}
static bool bad(const ls_legs *a) {
  return a->channels < 1 || a->seq_len < 1 || a->order < 1 || a->order > LS_MAX_ORDER || a->start < 0 || a->every < 0;
}

LS_EXPORT int32_t ls_diagonal_forward(const ls_diagonal *args) {
  return bad(args) ? -1 : kernels->diagonal_forward(args);
}
LS_EXPORT int32_t ls_diagonal_backward(const ls_diagonal *args) {
  return bad(args) ? -1 : kernels->diagonal_backward(args);
}
LS_EXPORT int64_t ls_diagonal_boundaries(int64_t batch, int64_t seq_len, int64_t channels, int64_t d_state) {
  const int64_t units = batch * ls_ceil(channels, LS_DIAGONAL_CHANNELS);
  return ls_ceil(seq_len, LS_TILE) * units * LS_DIAGONAL_CHANNELS * d_state * 2;
}
LS_EXPORT int32_t ls_vandermonde_forward(const ls_vandermonde *args) {
  return bad(args) ? -1 : kernels->vandermonde_forward(args);
}
LS_EXPORT int32_t ls_vandermonde_backward(const ls_vandermonde *args) {
  return bad(args) ? -1 : kernels->vandermonde_backward(args);
}
LS_EXPORT int32_t ls_cauchy_forward(const ls_cauchy *args) { return bad(args) ? -1 : kernels->cauchy_forward(args); }
LS_EXPORT int32_t ls_cauchy_backward(const ls_cauchy *args) { return bad(args) ? -1 : kernels->cauchy_backward(args); }
LS_EXPORT int32_t ls_legs_scan(const ls_legs *args) { return bad(args) ? -1 : kernels->legs(args); }

static bool bad(const ls_matrix *m) {
  const ls_adapter *low = m->adapter;
  if (low && (low->A.adapter || low->B.adapter || low->A.format != LS_F32 || low->B.format != LS_F32 ||
              low->A.bias || low->B.bias || low->A.n_out < 1 || low->A.n_out > LS_MAX_ADAPTER ||
              low->A.n_in != m->n_in || low->B.n_in != low->A.n_out || low->B.n_out != m->n_out))
    return true;
  return m->n_in < 1 || m->n_out < 1 || m->format < LS_F32 || m->format > LS_INT4 ||
         (m->format >= LS_INT8_BLOCKS && m->n_in % 32) || (m->format >= LS_INT8 && !m->scale);
}
static bool wrong(const ls_matrix *m, int64_t n_out, int64_t n_in) {
  return bad(m) || m->n_out != n_out || m->n_in != n_in;
}
static bool bad(const ls_mamba *l, int64_t d_model) {
  return l->d_state < 1 || l->d_state > LS_MAX_STATE || l->d_conv < 1 || l->d_conv > LS_MAX_CONV ||
         wrong(&l->in_proj, 2 * l->d_inner, d_model) || wrong(&l->out_proj, d_model, l->d_inner) ||
         wrong(&l->x_proj, l->dt_rank + 2 * l->d_state, l->d_inner) || wrong(&l->dt_proj, l->d_inner, l->dt_rank);
}
static bool bad(const ls_mamba2 *l, int64_t d_model) {
  const int64_t E = l->n_heads * l->d_head;
  return l->d_state < 1 || l->d_conv < 1 || l->d_conv > LS_MAX_CONV || l->n_groups < 1 || l->n_heads % l->n_groups ||
         wrong(&l->in_proj, 2 * E + 2 * l->n_groups * l->d_state + l->n_heads, d_model) ||
         wrong(&l->out_proj, d_model, E);
}
static bool bad(const ls_mamba3 *l, int64_t d_model) {
  const int64_t E = l->n_heads * l->d_head, BC = l->rank * l->n_groups * l->d_state;
  return l->d_state < 1 || l->d_state > LS_MAX_STATE || l->d_head < 1 || l->d_head > LS_SSD_MAX_HEAD || l->rank < 1 ||
         l->rank > (l->mimo_x ? LS_MAX_RANK : 1) || l->n_groups < 1 || l->n_heads % l->n_groups || l->n_angles < 0 ||
         2 * l->n_angles > l->d_state || wrong(&l->in_proj, 2 * E + 2 * BC + 3 * l->n_heads + l->n_angles, d_model) ||
         wrong(&l->out_proj, d_model, E);
}
static bool bad(const ls_attention *l, int64_t d_input, int64_t d_model) {
  const int64_t kv = l->n_kv_heads * l->d_head;
  for (int64_t i = 0; l->rank && i < 6; i += 2)
    if (wrong(l->adapters + i, l->rank, d_input) || wrong(l->adapters + i + 1, i ? kv : l->n_heads * l->d_head, l->rank))
      return true;
  return l->n_kv_heads < 1 || l->n_heads % l->n_kv_heads || l->n_rotated % 2 || l->n_rotated > l->d_head ||
         l->d_conv < 0 || l->d_conv > LS_MAX_CONV || l->rank < 0 || (l->rank && l->d_conv) ||
         wrong(&l->q_proj, l->n_heads * l->d_head, d_input) || wrong(&l->k_proj, kv, d_input) ||
         wrong(&l->v_proj, kv, d_input) || wrong(&l->o_proj, d_model, l->n_heads * l->d_head);
}
static bool bad(const ls_mlp *l, int64_t d_model) {
  return (l->gated && wrong(&l->gate_proj, l->up_proj.n_out, d_model)) ||
         wrong(&l->up_proj, l->up_proj.n_out, d_model) || wrong(&l->down_proj, d_model, l->up_proj.n_out) ||
         (l->rank && (!l->gated || wrong(l->adapter, l->rank, d_model) ||
                      wrong(l->adapter + 1, 2 * l->up_proj.n_out, l->rank))) ||
         (l->has_after && wrong(&l->after, d_model, d_model));
}
static bool bad(const ls_experts *l, int64_t d_model) {
  const int64_t width = l->d_latent ? l->d_latent : d_model;
  if (l->n_active < 1 || l->n_active > l->n_experts || l->n_groups < 1 || l->n_experts % l->n_groups ||
      l->n_active_groups < 1 || l->n_active_groups > l->n_groups ||
      l->n_active > l->n_active_groups * (l->n_experts / l->n_groups) ||
      wrong(&l->router, l->n_experts, d_model) || l->router.format != LS_F32 ||
      (l->d_latent && (wrong(&l->to_latent, width, d_model) || wrong(&l->from_latent, d_model, width))))
    return true;
  const ls_mlp *experts = (const ls_mlp *)(l + 1);
  for (int64_t e = 0; e < l->n_experts; ++e)
    if (bad(experts + e, width) || experts[e].rank || experts[e].has_after ||
        experts[e].up_proj.n_out != experts[0].up_proj.n_out ||
        experts[e].up_proj.format != experts[0].up_proj.format)
      return true;
  return false;
}
static bool bad(const ls_decode *a, const ls_sublayer *layer) {
  const int64_t D = a->d_model;
  if (layer->reads < LS_RESIDUAL || layer->reads > LS_SIDE || (layer->reads == LS_JOINED && layer->kind != LS_ATTENTION))
    return true;
  if (layer->writes != LS_RESIDUAL && layer->writes != LS_SIDE && layer->writes != LS_SUM) return true;
  if (layer->kind == LS_MLP) return bad((const ls_mlp *)layer->weights, D);
  if (layer->kind == LS_EXPERTS) return layer->writes != LS_RESIDUAL || bad((const ls_experts *)layer->weights, D);
  if (layer->state < 0 || layer->state >= a->n_states) return true;
  const ls_state *state = a->states + layer->state;
  if (layer->kind == LS_ATTENTION) {
    for (int64_t b = 0; b < a->batch; ++b)
      if (state->length[b] < 0 || state->length[b] + a->steps > state->capacity) return true;
    return bad((const ls_attention *)layer->weights, layer->reads == LS_JOINED ? 2 * D : D, D);
  }
  if (layer->kind == LS_MAMBA3) return bad((const ls_mamba3 *)layer->weights, D);
  return layer->kind == LS_MAMBA ? bad((const ls_mamba *)layer->weights, D)
                                 : layer->kind != LS_MAMBA2 || bad((const ls_mamba2 *)layer->weights, D);
}
static bool bad(const ls_decode *a) {
  if (a->batch < 1 || a->steps < 1 || a->threads < 1 || a->n_layers < 1 || bad(&a->embedding) ||
      wrong(&a->embedding, a->embedding.n_out, a->d_model) || wrong(&a->head, a->head.n_out, a->d_model))
    return true;
  for (int64_t l = 0; l < a->n_layers; ++l)
    if (bad(a, a->layers + l)) return true;
  for (int64_t i = 0; i < a->batch * a->steps; ++i)
    if (a->ids[i] < 0 || a->ids[i] >= a->embedding.n_out) return true;
  return false;
}

LS_EXPORT int32_t ls_multiply(const ls_matrix *matrix, const float *x, float *y, int64_t rows, void *workspace) {
  return rows < 1 || bad(matrix) ? -1 : kernels->multiply(matrix, x, y, rows, (char *)workspace);
}
LS_EXPORT int64_t ls_multiply_workspace(int64_t rows, int64_t n_in) {
  return kernels->multiply_workspace(rows, n_in);
}
LS_EXPORT int32_t ls_quant_gemm(const ls_matrix *matrix, const float *x, float *y, int64_t rows, int64_t bits,
                                void *workspace) {
  const bool integers = !bad(matrix) && matrix->format != LS_F32 && matrix->format != LS_BF16;
  if (rows < 1 || !integers || (bits != 8 && bits != 16)) return -1;
  return kernels->quant_gemm(matrix, x, y, rows, bits, (char *)workspace);
}
LS_EXPORT int32_t ls_dequantize(const ls_matrix *matrix, float *weight) {
  return bad(matrix) ? -1 : kernels->dequantize(matrix, weight);
}
LS_EXPORT int32_t ls_decode_tokens(const ls_decode *args) { return bad(args) ? -1 : kernels->decode(args); }
LS_EXPORT int64_t ls_decode_workspace(const ls_decode *args) { return kernels->decode_workspace(args); }

LS_EXPORT int64_t ls_scan_workspace(int64_t batch, int64_t seq_len, int64_t d_inner, int64_t d_state,
                                    int64_t n_groups) {
  const int64_t per_group = d_inner / n_groups, units = n_groups * ls_ceil(per_group, ls_unit_channels(batch, per_group));
  const int64_t rows = batch * units * seq_len * d_state, states = batch * d_inner * d_state;
  return 2 * (rows > states ? rows : states) + states + 2 * batch * d_inner;
}

namespace {
struct Probe {
  int64_t n, bits;
  const float *data;
  float sink[256];  // one per worker, so that the work is not optimised away
};
void exp_fma_task(int64_t begin, int64_t end, void *context) {
  Probe *probe = (Probe *)context;
  for (int64_t i = begin; i < end; ++i) kernels->probe_exp_fma(probe->n, &probe->sink[i % 256]);
}
void read_task(int64_t begin, int64_t end, void *context) {
  Probe *probe = (Probe *)context;
  for (int64_t i = begin; i < end; ++i)
    kernels->probe_read(probe->data + i * probe->n, probe->n, &probe->sink[i % 256]);
}
void multiply_task(int64_t begin, int64_t end, void *context) {
  Probe *probe = (Probe *)context;
  for (int64_t i = begin; i < end; ++i) kernels->probe_multiply(probe->n, probe->bits, &probe->sink[i % 256]);
}
double per_second(int64_t threads, double work, ls_task task, Probe *probe) {
  const auto begin = std::chrono::steady_clock::now();
  ls_run_each(threads, task, probe);
  return work / std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}
}  // namespace

LS_EXPORT double ls_probe_exp_fma(int64_t n, int64_t threads) {
  Probe probe = {n, 0, nullptr, {}};
  return per_second(threads, (double)n * (double)threads, exp_fma_task, &probe);
}
LS_EXPORT double ls_probe_read(const float *data, int64_t n, int64_t threads) {
  Probe probe = {n / threads, 0, data, {}};
  return per_second(threads, 4.0 * (double)(n / threads) * (double)threads, read_task, &probe);
}
LS_EXPORT double ls_probe_multiply(int64_t n, int64_t bits, int64_t threads) {
  Probe probe = {n / kernels->products_of_step(bits), bits, nullptr, {}};
  return per_second(threads, (double)n * (double)threads, multiply_task, &probe);
}
