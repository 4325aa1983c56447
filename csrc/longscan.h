// Every exported function of the native library, on one page. Plain C: raw pointers, sizes and strides in floats.
//
// All tensors are float32 with a contiguous last axis; (batch, time) strides are free where they are given. Functions
// return 0, or a negative code when sizes are invalid (the caller validates; these are the last line of defence).
// Nothing is allocated here that anybody must free. Threads split batch and channels, never a sum whose order could
// change, so results do not depend on how many there are.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { LS_ABI_VERSION = 11, LS_TILE = 32, LS_MAX_STATE = 256, LS_MAX_ORDER = 4096, LS_MAX_CONV = 8, LS_LANE_PAD = 16 };
enum { LS_ACTIVATIONS = 256 };  // activations that share a scale when they are rounded to 16 bits

// torch's thread pool: run task(begin, end, context) over pieces of [begin, end). Null means one thread.
typedef void (*ls_task)(int64_t begin, int64_t end, void *context);
typedef int32_t (*ls_parallel_for)(int64_t begin, int64_t end, int64_t grain, ls_task task, void *context);

// A (batch, time, channels) operand. A constant matrix (channels, state) has stride_time < 0.
typedef struct {
  const float *data;
  int64_t stride_batch, stride_time;
} ls_rows;

// Selective scan; see src/longscan/ops/scan.py for the equations. Absent optional operands are null.
typedef struct {
  int64_t batch, seq_len, d_inner, d_state, n_groups, dt_softplus;
  ls_rows u, dt, z, B, C;
  int64_t B_stride_group, C_stride_group;
  const float *A, *D, *dt_bias, *initial_state;
  const int32_t *seq_idx;  // (batch, seq_len) contiguous
  float *y, *final_state;  // final_state may be initial_state: then the state advances in place; y: see path
  float *boundaries;       // (tiles, batch, padded channels, d_state): states before each tile, in the kernel's order
  // backward only
  ls_rows dy;
  const float *dfinal;
  float *du, *ddt, *dA, *dB, *dC, *dD, *dz, *ddt_bias, *dinitial_state;
  float *workspace;  // ls_scan_workspace(...) floats
  // scans along paths, one a group; see src/longscan/ops/path_scan.py. Without seq_idx; B and C vary in time.
  const int32_t *path;  // (n_groups, seq_len) the position of each step, a permutation; null: t itself. y is the sum
                        // over the paths, (batch, seq_len, d_inner / n_groups)
  int64_t shared;       // whether u and dy have the d_inner / n_groups channels of one group: bits 1 and 2
  int64_t dt_stride_group;  // between the channels of two groups of dt
} ls_scan;

// State space duality; see src/longscan/ops/ssd.py. Heads are strided, the channels of a head are not.
enum { LS_SSD_CHUNK = 64, LS_SSD_MAX_HEAD = 512 };  // rows of a tile; d_head
typedef struct {
  int64_t batch, seq_len, n_heads, d_head, n_groups, d_state, rank, D_of_channels;
  ls_rows x, B, C;
  int64_t x_stride_head, B_stride_group, C_stride_group;
  const float *dt, *log_decay, *D, *initial_state;  // D (n_heads), or (n_heads, d_head) if D_of_channels
  const int32_t *seq_idx;
  float *y, *final_state;  // final_state may be initial_state
  float *boundaries;       // (batch, tiles, n_heads, ...): states before each tile; null if no gradient follows
  float *workspace;        // ls_ssd_forward_workspace(...) floats; backward ls_ssd_backward_workspace(...)
  // backward only
  ls_rows dy;
  int64_t dy_stride_head;
  const float *dfinal;
  float *dx, *ddt, *dlog_decay, *dB, *dC, *dD, *dinitial_state;
} ls_ssd;

// Causal depthwise convolution; see src/longscan/ops/conv.py.
typedef struct {
  int64_t batch, seq_len, d_inner, d_conv, silu;
  ls_rows x;
  const float *weight, *bias, *initial_state;  // weight (d_inner, d_conv), initial_state (batch, d_conv - 1, d_inner)
  const int32_t *seq_idx;
  float *y, *final_state;
  // backward only
  ls_rows dy;
  const float *dfinal;
  float *dx, *dweight, *dbias, *dinitial_state;
  float *workspace;  // batch * d_inner * (d_conv + 1) floats
} ls_conv;

// RMSNorm of rows, see src/longscan/ops/rms_norm.py: of each group of d_group adjacent channels. Rows are strided.
enum { LS_NORM_UNITS = 64 };  // runs of rows, each with a partial sum of dweight
typedef struct {
  int64_t rows, n_groups, d_group, norm_first, x_stride, z_stride;
  double eps;
  const float *x, *z, *weight;  // z: the gate or null; weight (n_groups d_group) or null
  float *y;
  // backward only
  const float *dy;
  int64_t dy_stride;
  float *dx, *dz, *dweight;
  float *workspace;  // LS_NORM_UNITS * n_groups * d_group floats
} ls_rms_norm;

// Rotation of B and C by sums of angles over time, see src/longscan/ops/rotary.py. All contiguous.
enum { LS_STARTS = 1, LS_PADDING = 2, LS_ROTARY_UNITS = 64 };
typedef struct {
  int64_t batch, seq_len, rank, n_heads, n_groups, d_state, n_angles, halves;
  const float *C, *B;            // (batch, seq_len, rank, n_groups, d_state)
  const float *rate, *dt;        // (batch, seq_len, n_angles), (batch, seq_len, n_heads)
  const float *C_bias, *B_bias;  // (rank, n_heads, d_state)
  const float *initial;          // (batch, n_heads, n_angles)
  const uint8_t *marks;          // (batch, seq_len) LS_STARTS and LS_PADDING, or null
  float *q, *k;                  // (batch, seq_len, rank, n_heads, d_state)
  float *products;               // (batch, seq_len, rank, rank, n_heads): of q and k of a token
  float *final;                  // as initial, between -pi and pi
  // backward only
  const float *dq, *dk, *dproducts, *dfinal;
  float *dC, *dB, *drate, *ddt, *dC_bias, *dB_bias, *dinitial;
  void *workspace;  // ls_rotary_workspace(args) floats, aligned to 8 bytes
} ls_rotary;

// Diagonal state space with constant parameters; see src/longscan/ops/diagonal.py. Complex numbers are (re, im) pairs.
enum { LS_DIAGONAL_CHANNELS = 64, LS_CAUCHY_NUMERATORS = 4 };
typedef struct {
  int64_t batch, seq_len, channels, d_state;
  ls_rows u;
  const float *a, *c, *initial_state;  // (channels, d_state), likewise, (batch, channels, d_state) or null
  const int32_t *seq_idx;
  float *y, *final_state;  // final_state may be initial_state
  float *boundaries;       // ls_diagonal_boundaries(...) floats: states before each tile; null if no gradient follows
  // backward only
  ls_rows dy;
  const float *dfinal;
  float *du, *da, *dc, *dinitial_state;
  float *workspace;  // 4 * batch * channels * d_state floats
} ls_diagonal;

// kernel (rows, length) = 2 Re sum_n c_n a_n^l; row i of c belongs to channel i % channels of a.
typedef struct {
  int64_t rows, channels, d_state, length;
  const double *a;  // (channels, d_state) complex
  const float *c;   // (rows, d_state) complex
  float *kernel;
  // backward only
  const float *dkernel;
  double *sums;  // (rows, d_state, 2) complex: sum_l g_l a^l and sum_l l g_l a^l for g = dkernel
} ls_vandermonde;

// out (numerators, channels, n_places) = sum_n v_n / (i t - lambda_n) and the conjugate twins; v as alpha = 2 Re v and
// beta = 2 Re(v conj(lambda)), (numerators, channels, d_state).
typedef struct {
  int64_t numerators, channels, d_state, n_places;
  const float *t, *t_low;  // (n_places) each: t, and what rounding it to float left over
  const double *lambda;    // (channels, d_state) complex
  const float *alpha, *beta;
  float *out;
  // backward only
  const float *dout;
  float *dalpha, *dbeta;
  double *dlambda;  // through the poles, at constant alpha and beta
} ls_cauchy;

// HiPPO-LegS; see src/longscan/ops/legs.py. The state (channels, order) advances in place by f (channels, seq_len).
typedef struct {
  int64_t channels, seq_len, order, start;  // start: samples taken in before
  double alpha;                             // 0 forward Euler, 1/2 bilinear, 1 backward Euler
  const double *f;
  double *state;
  int64_t every;      // 0, or a snapshot after every so many samples:
  double *snapshots;  // (channels, seq_len / every, order)
} ls_legs;

// A weight (n_out, n_in) in a format of src/longscan/ops/quant.py.
enum { LS_F32 = 0, LS_BF16 = 1, LS_INT8 = 2, LS_INT8_BLOCKS = 3, LS_INT4 = 4 };
typedef struct {
  int64_t format, n_out, n_in;
  const void *data, *scale;  // scale: float32 (n_out) of LS_INT8, float16 (n_out, n_in / 32) of blocks, else null
  const float *bias;         // (n_out) or null
  const struct ls_adapter *adapter;  // or null
} ls_matrix;

// What LoRA adds to the product: scale B A x, with A (rank, n_in) and B (n_out, rank) in float32, which have none.
enum { LS_MAX_ADAPTER = 256 };  // rank
typedef struct ls_adapter {
  ls_matrix A, B;
  double scale;
} ls_adapter;

// The sublayers of a model for decoding, each residual += out_scale f(in_scale norm(residual)); f by its kind. An absent
// weight is null. States: see ls_state. A side stream carries what is not for the residual stream.
enum { LS_MAMBA = 0, LS_MAMBA2 = 1, LS_ATTENTION = 2, LS_MLP = 3, LS_MAMBA3 = 4, LS_EXPERTS = 5 };

// Mamba: conv and ssm. The bias of dt_proj enters the softplus.
typedef struct {
  int64_t d_inner, d_state, d_conv, dt_rank;
  double inner_eps;  // of the norms of dt, B and C; negative: there are none
  ls_matrix in_proj, x_proj, dt_proj, out_proj;
  const float *conv_weight, *conv_bias;    // (d_conv, d_inner), (d_inner)
  const float *A, *D;                      // (d_inner, d_state) in powers of two: -exp(A_log) log2(e); (d_inner)
  const float *dt_norm, *B_norm, *C_norm;  // (dt_rank), (d_state) twice; null: all 1
} ls_mamba;

// Mamba-2: conv and ssm. in_proj yields [z; x; B; C; dt].
enum { LS_NO_NORM = 0, LS_GATE_FIRST = 1, LS_NORM_FIRST = 2 };
typedef struct {
  int64_t n_heads, d_head, n_groups, d_state, d_conv, order, D_per_channel;
  double eps, dt_least, dt_most;
  ls_matrix in_proj, out_proj;
  const float *factors;                  // (n_out of in_proj), of its outputs
  const float *conv_weight, *conv_bias;  // (d_conv, channels of x, B and C), (channels)
  const float *dt_bias, *A, *D, *norm;   // (n_heads), A in powers of two; D (n_heads) or (n_heads d_head); (n_heads d_head)
} ls_mamba2;

// Mamba-3: angle, ssm, k and v. in_proj yields [z; x; B; C; dt; A; trap; angle], B and C of every vector and group.
enum { LS_MAX_RANK = 16 };
typedef struct {
  int64_t n_heads, d_head, n_groups, d_state, rank, n_angles;
  int64_t A_softplus;          // else the heavy tail
  double eps, y_eps, A_floor;  // eps of the norms of B and C, and of that of y
  ls_matrix in_proj, out_proj;
  const float *dt_bias, *D;               // (n_heads)
  const float *B_bias, *C_bias;           // (n_heads, rank, d_state)
  const float *B_norm, *C_norm, *norm;    // (d_state) twice; (n_heads d_head), null: y has no norm
  const float *mimo_x, *mimo_z, *mimo_o;  // (n_heads, rank, d_head); null: rank is 1, and pairs that turn are adjacent
} ls_mamba3;

// Causal attention with a KV cache: k, v and length, and conv if queries, keys and values pass through a convolution.
// The first n_rotated numbers of a head turn, halves as pairs.
typedef struct {
  int64_t n_heads, n_kv_heads, d_head, n_rotated, d_conv, rank;  // d_conv 0: there is no convolution
  double scale, key_scale;
  ls_matrix q_proj, k_proj, v_proj, o_proj;  // of one format but for o_proj
  ls_matrix adapters[6];                     // of q, k and v, if rank is not 0: into (rank), of that format, and out
  const float *frequencies;                  // (n_rotated / 2)
  const float *conv_weight, *conv_bias;      // (d_conv, channels of q, k and v), (channels)
} ls_attention;

// down_proj (act(gate_scale gate_proj x) * up_proj x), or down_proj act(up_proj x) without a gate.
enum { LS_SILU = 0, LS_RELU2 = 1, LS_GELU = 2 };
typedef struct {
  int64_t activation, gated, rank, has_after;
  double gate_scale;
  ls_matrix gate_proj, up_proj, down_proj;  // gate_proj and up_proj of one format
  ls_matrix adapter[2];                     // of [gate; up], if rank is not 0: into (rank), of that format, and out
  ls_matrix after;                          // maps the result, if has_after
} ls_mlp;

// The sum of w_e f_e(x) over a few of n_experts MLPs, as the router chooses them for each token; of equal scores the
// first ones win. Their ls_mlp, whose up and gate projections are of one format, follow this struct in memory. With a
// latent width the experts map to_latent x, and from_latent the sum.
enum { LS_TOPK_SOFTMAX = 0, LS_SOFTMAX_TOPK = 1, LS_SIGMOID = 2 };
typedef struct {
  int64_t n_experts, n_active, router_kind, n_groups, n_active_groups, normalize, d_latent;
  double scale;                              // of the weights, of LS_SIGMOID
  ls_matrix router, to_latent, from_latent;  // float32; (d_latent, d_model) and back, if d_latent is not 0
  const float *correction;                   // (n_experts) of the scores that choose, of LS_SIGMOID
} ls_experts;

// What a sublayer reads: the residual stream, that beside the embedded tokens (2 d_model), or the side stream; and what
// it writes: residual += f, side = f or side = residual + f.
enum { LS_RESIDUAL = 0, LS_JOINED = 1, LS_SIDE = 2, LS_SUM = 3 };
typedef struct {
  int64_t kind, state;  // state: index among the states
  int64_t reads, writes;
  double in_scale, out_scale;
  const float *norm;    // (d_model); null: the input is that of the sublayer before
  const void *weights;  // of the struct of this kind
} ls_sublayer;

// What a layer remembers: conv (batch, d_conv - 1, channels), ssm (batch, d_inner or n_heads d_head, d_state), k and v
// (batch, capacity, n_kv_heads, d_head), length (batch). The caller adds the new tokens to length afterwards. Of Mamba-3
// angle (batch, n_heads, n_angles), and of the last token alone k (batch, rank, n_heads, d_state) and v (batch, n_heads,
// d_head).
typedef struct {
  float *conv, *ssm, *angle, *k, *v;
  const int64_t *length;
  int64_t capacity;
} ls_state;

// A few tokens for every row of a batch, through all sublayers. States advance in place.
typedef struct {
  int64_t batch, steps, threads, n_layers, d_model, n_states;
  double eps, embedding_scale, head_scale;
  const ls_sublayer *layers;
  const ls_state *states;
  ls_matrix embedding, head;
  const float *norm_f;
  const int64_t *ids;  // (batch, steps)
  float *logits;       // (batch, steps, n_out of the head)
  void *workspace;     // ls_decode_workspace(args) bytes, aligned to 64
} ls_decode;

int32_t ls_abi_version(void);
const char *ls_isa(void);
// Choose the instruction set by name, or the best one for "": "baseline", "avx2", "avx512", "avx512vnni"; on aarch64
// "neon", "dotprod". 0, or -1 if it can't run.
int32_t ls_choose_isa(const char *name);
int32_t ls_is_amd(void);  // 1 on an AMD processor
void ls_set_parallel_for(ls_parallel_for function);

int32_t ls_scan_forward(const ls_scan *args);
int32_t ls_scan_backward(const ls_scan *args);
// Floats of workspace that ls_scan_backward needs.
int64_t ls_scan_workspace(int64_t batch, int64_t seq_len, int64_t d_inner, int64_t d_state, int64_t n_groups);
int32_t ls_ssd_forward(const ls_ssd *args);
int32_t ls_ssd_backward(const ls_ssd *args);
int32_t ls_ssd_step(const ls_ssd *args);  // of one row: the state advances in place, see final_state
int64_t ls_ssd_forward_workspace(const ls_ssd *args);
int64_t ls_ssd_backward_workspace(const ls_ssd *args);
int32_t ls_rms_norm_forward(const ls_rms_norm *args);
int32_t ls_rms_norm_backward(const ls_rms_norm *args);
int32_t ls_rotary_forward(const ls_rotary *args);
int32_t ls_rotary_backward(const ls_rotary *args);
int64_t ls_rotary_workspace(const ls_rotary *args);
int32_t ls_conv_forward(const ls_conv *args);
int32_t ls_conv_backward(const ls_conv *args);
int32_t ls_diagonal_forward(const ls_diagonal *args);
int32_t ls_diagonal_backward(const ls_diagonal *args);
int64_t ls_diagonal_boundaries(int64_t batch, int64_t seq_len, int64_t channels, int64_t d_state);
int32_t ls_vandermonde_forward(const ls_vandermonde *args);
int32_t ls_vandermonde_backward(const ls_vandermonde *args);
int32_t ls_cauchy_forward(const ls_cauchy *args);
int32_t ls_cauchy_backward(const ls_cauchy *args);
int32_t ls_legs_scan(const ls_legs *args);
// y = x W^T + bias for a few rows x (rows, n_in): reads the weights once, at memory speed. The workspace takes
// ls_multiply_workspace(rows, n_in) bytes.
int32_t ls_multiply(const ls_matrix *matrix, const float *x, float *y, int64_t rows, void *workspace);
int64_t ls_multiply_workspace(int64_t rows, int64_t n_in);
int32_t ls_dequantize(const ls_matrix *matrix, float *weight);  // (n_out, n_in)
// The same for many rows and weights in 8 or 4 bits, with activations rounded to `bits`, 8 or 16: at the speed of integer
// arithmetic. The workspace is that of ls_multiply.
int32_t ls_quant_gemm(const ls_matrix *matrix, const float *x, float *y, int64_t rows, int64_t bits, void *workspace);
int32_t ls_decode_tokens(const ls_decode *args);
int64_t ls_decode_workspace(const ls_decode *args);
// State updates per second over all threads, n on each: exp and three multiply-adds that never leave registers.
double ls_probe_exp_fma(int64_t n, int64_t threads);
// Bytes per second at which all threads together read n floats, each its own part, and do nothing else.
double ls_probe_read(const float *data, int64_t n, int64_t threads);
// Products per second of ls_quant_gemm's arithmetic over all threads, n on each, with operands from the first cache.
double ls_probe_multiply(int64_t n, int64_t bits, int64_t threads);

#ifdef __cplusplus
}
#endif
