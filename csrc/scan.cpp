// The selective scan, forward and backward.
//
// Vector lanes run across channels; time is sequential. A unit of parallel work is one batch row and up to 128
// channels, walked in tiles of LS_TILE steps: a tile's operands are packed once, then for every few state components
// (NB at a time, in registers) the tile is run through. The backward pass recomputes a tile's states from the state
// the forward pass saved at its start, then runs the adjoint through the tile from its end.
#include "kernels.h"
#include "simd.h"

namespace LS_ISA {
namespace {

constexpr int T = LS_TILE;
constexpr int MAX_CHANNELS = 128;
constexpr int MAX_BLOCKS = MAX_CHANNELS / W;
constexpr int NF = 8;  // state components held in registers at once, forward
constexpr int NB = 4;  // and backward, where each has states and sums of a whole tile in the first-level cache
constexpr float LN2 = 0.693147180559945309f;

// Where a unit works.
struct Unit {
  int64_t b, group, first, channels, index;  // batch row, B/C group, first channel, channel count, unit of this row
  int64_t inside;                            // the first channel in its group
  int64_t first_u, first_dy, first_dt;       // the first channel in u, in dy and in dt
  const int32_t *path;                       // of the group, or null
  int64_t boundary;                          // first float of this unit inside a row of the boundaries
  int blocks;
  Unit(const ls_scan *a, int64_t i) : Unit(a, i, ls_unit_channels(a->batch, a->d_inner / a->n_groups)) {}
  Unit(const ls_scan *a, int64_t i, int64_t size) {
    const int64_t per_group = a->d_inner / a->n_groups, units = ls_ceil(per_group, size);
    b = i / (a->n_groups * units);
    index = i % (a->n_groups * units);
    group = index / units;
    inside = index % units * size;
    first = group * per_group + inside;
    channels = per_group - inside < size ? per_group - inside : size;
    first_u = a->shared & 1 ? inside : first;
    first_dy = a->shared & 2 ? inside : first;
    first_dt = a->path ? group * a->dt_stride_group + inside : first;
    path = a->path ? a->path + group * a->seq_len : nullptr;
    blocks = (int)ls_ceil(channels, W);
    boundary = (group * ls_ceil(per_group, LS_LANE_PAD) * LS_LANE_PAD + inside) * a->d_state;
  }
};

int64_t unit_count(const ls_scan *a) {
  const int64_t per_group = a->d_inner / a->n_groups;
  return a->batch * a->n_groups * ls_ceil(per_group, ls_unit_channels(a->batch, per_group));
}

// The sum over paths is a unit's own: all paths of some channels, few of them, so that there is work for many threads.
int64_t path_channels(const ls_scan *a) {
  const int64_t per_group = a->d_inner / a->n_groups;
  return a->batch * per_group < 1024 ? 16 : ls_unit_channels(a->batch, per_group);
}

int64_t padded_channels(const ls_scan *a) {
  return a->n_groups * ls_ceil(a->d_inner / a->n_groups, LS_LANE_PAD) * LS_LANE_PAD;
}

// B or C as the inner loop reads it: a broadcast scalar per step, or a packed vector per channel if constant.
struct Matrix {
  const float *rows;
  int64_t stride;
  vec *packed;
  Matrix(const ls_rows &m, int64_t stride_group, const Unit &unit, int64_t d_state, vec *buffer) {
    rows = m.data + unit.b * m.stride_batch + unit.group * stride_group;
    stride = m.stride_time;
    packed = nullptr;
    if (stride >= 0) return;
    stride = 0;  // rows is not read then, but stays inside the matrix
    packed = buffer;
    for (int k = 0; k < unit.blocks; ++k)
      for (int64_t n = 0; n < d_state; ++n)
        for (int i = 0; i < W; ++i) {
          const int64_t c = (int64_t)k * W + i;
          packed[k * d_state + n][i] = c < unit.channels ? m.data[(unit.first + c) * d_state + n] : 0.0f;
        }
  }
};

template <bool CONSTANT>
LS_INLINE vec entry(const float *row, const vec *packed, int i) {
  return CONSTANT ? packed[i] : splat(row[i]);
}

// (channels, d_state) rows of a tensor <-> vectors [block][n] with channels across lanes.
void pack(vec *to, const float *from, const Unit &unit, int64_t d_state, float scale) {
  for (int k = 0; k < unit.blocks; ++k)
    for (int64_t n = 0; n < d_state; ++n) {
      vec v{};
      if (from)
        for (int i = 0; i < W && k * W + i < unit.channels; ++i) v[i] = from[(k * W + i) * d_state + n] * scale;
      to[k * d_state + n] = v;
    }
}
void unpack(float *to, const vec *from, const Unit &unit, int64_t d_state) {
  for (int k = 0; k < unit.blocks; ++k)
    for (int64_t n = 0; n < d_state; ++n) {
      const vec v = from[k * d_state + n];
      for (int i = 0; i < W && k * W + i < unit.channels; ++i) to[(k * W + i) * d_state + n] = v[i];
    }
}

// Flags of a tile's steps. A start forgets the state before it; padding lets it pass. Both by not computing: what lies
// there may be NaN, which times zero is NaN.
struct Flags {
  bool start[T], padding[T];
};
// Reads seq_idx for one tile; `last` is the sequence of the latest token so far (negative: none yet).
void read_flags(Flags *flags, const int32_t *seq_idx, int steps, int32_t *last) {
  for (int t = 0; t < steps; ++t) {
    const int32_t s = seq_idx[t];
    flags->padding[t] = s < 0;
    flags->start[t] = s >= 0 && *last >= 0 && s != *last;
    if (s >= 0) *last = s;
  }
}

// What a sequence is: all steps in order, several packed sequences, or a path over positions.
enum { PLAIN, PACKED, PATH };

// The row of step t.
template <int MODE>
LS_INLINE int64_t row_of(const int32_t *path, int64_t t) {
  return MODE == PATH ? path[t] : t;
}

struct Tile {
  vec dt[T], x[T], y[T];  // step size, dt * u, output so far
};

// Load one block of one tile: dt after bias and softplus, x = dt u, y = D u.
template <int MODE>
LS_INLINE void load_tile(Tile *tile, const ls_scan *a, const Unit &unit, int64_t t0, int steps, int k, vec D, vec bias) {
  const int n = (int)(unit.channels - (int64_t)k * W);
  const float *u = a->u.data + unit.b * a->u.stride_batch + unit.first_u + (int64_t)k * W;
  const float *dt = a->dt.data + unit.b * a->dt.stride_batch + unit.first_dt + (int64_t)k * W;
  for (int t = 0; t < steps; ++t) {
    const int64_t row = row_of<MODE>(unit.path, t0 + t);
    const vec ut = load_n(u + row * a->u.stride_time, n);
    vec d = load_n(dt + row * a->dt.stride_time, n) + bias;
    if (a->dt_softplus) d = softplus(d);
    tile->dt[t] = d;
    tile->x[t] = d * ut;
    tile->y[t] = D * ut;
  }
}

// Rows lie pages apart, where no hardware prefetcher follows: while one block computes, rows that will be needed next
// are asked for, a step at a time.
struct Ahead {
  const float *rows[6];
  const int32_t *path[6];
  int64_t stride[6];
  int count = 0, steps[6];
  // Block k of the tile at t0, which may lie outside the sequence.
  void add(const ls_scan *a, const ls_rows &m, const Unit &unit, int64_t t0, int k) {
    if (!m.data || t0 < 0 || t0 >= a->seq_len) return;
    const int64_t first = &m == &a->u    ? unit.first_u
                          : &m == &a->dy ? unit.first_dy
                          : &m == &a->dt ? unit.first_dt
                                         : unit.first;
    rows[count] = m.data + unit.b * m.stride_batch + (unit.path ? 0 : t0 * m.stride_time) + first + (int64_t)k * W;
    path[count] = unit.path ? unit.path + t0 : nullptr;
    stride[count] = m.stride_time;
    steps[count++] = (int)(a->seq_len - t0 < T ? a->seq_len - t0 : T);
  }
  void add(const ls_scan *a, const float *contiguous, const Unit &unit, int64_t t0, int k) {
    const ls_rows m = {contiguous, a->seq_len * a->d_inner, a->d_inner};
    add(a, m, unit, t0, k);
  }
  void add_sum(const ls_scan *a, const Unit &unit, int64_t t0, int k) {  // y of paths
    if (t0 >= a->seq_len) return;
    stride[count] = a->d_inner / a->n_groups;
    rows[count] = a->y + unit.b * a->seq_len * stride[count] + unit.inside + (int64_t)k * W;
    path[count] = unit.path + t0;
    steps[count++] = (int)(a->seq_len - t0 < T ? a->seq_len - t0 : T);
  }
  template <int MODE>
  inline __attribute__((always_inline)) void step(int t) const {
    for (int i = 0; i < count; ++i)
      if (t < steps[i]) __builtin_prefetch(rows[i] + row_of<MODE>(path[i], t) * stride[i]);
  }
};

template <int N, int MODE, bool BC, bool CC>
LS_INLINE void run_forward(Tile *tile, const Ahead *ahead, const Flags *flags, const int32_t *path, int steps, const vec *A, vec *h, const Matrix &B,
                           const Matrix &C, const float *b_row, const float *c_row, int64_t offset) {
  vec An[N], hn[N];
  for (int i = 0; i < N; ++i) An[i] = A[i], hn[i] = h[i];
  for (int t = 0; t < steps; ++t) {
    const int64_t row = row_of<MODE>(path, t);
    const float *b = b_row + row * B.stride, *c = c_row + row * C.stride;
    if (MODE == PACKED && flags->start[t])
      for (int i = 0; i < N; ++i) hn[i] = vec{};
    if (ahead) ahead->step<MODE>(t);
    if (MODE == PACKED && flags->padding[t]) continue;
    const vec dt = tile->dt[t], x = tile->x[t];
    vec y = tile->y[t];
    vec a[N];
    for (int i = 0; i < N; ++i) a[i] = dt * An[i];
    exp2_many<N>(a, a);
    for (int i = 0; i < N; ++i) hn[i] = a[i] * hn[i] + entry<BC>(b, B.packed + offset, i) * x;
    for (int i = 0; i < N; ++i) y += entry<CC>(c, C.packed + offset, i) * hn[i];
    tile->y[t] = y;
  }
  for (int i = 0; i < N; ++i) h[i] = hn[i];
}

template <int MODE, bool BC, bool CC>
void forward_unit(const ls_scan *a, const Unit &unit) {
  const int64_t N = a->d_state;
  const int64_t states = unit.blocks * N;
  vec *A = LS_STACK(vec, states), *h = LS_STACK(vec, states);
  vec *Bp = LS_STACK(vec, BC ? states : 1), *Cp = LS_STACK(vec, CC ? states : 1);
  const Matrix B(a->B, a->B_stride_group, unit, N, Bp), C(a->C, a->C_stride_group, unit, N, Cp);
  const int64_t at = (unit.b * a->d_inner + unit.first) * N;
  pack(A, a->A + unit.first * N, unit, N, LOG2E);
  pack(h, a->initial_state ? a->initial_state + at : nullptr, unit, N, 1.0f);
  vec D[MAX_BLOCKS], bias[MAX_BLOCKS];
  for (int k = 0; k < unit.blocks; ++k) {
    const int n = (int)(unit.channels - (int64_t)k * W);
    D[k] = a->D ? load_n(a->D + unit.first + k * W, n) : vec{};
    bias[k] = a->dt_bias ? load_n(a->dt_bias + unit.first + k * W, n) : vec{};
  }
  Flags flags;
  int32_t last = -1;
  const int64_t boundary_row = padded_channels(a) * N;
  for (int64_t t0 = 0; t0 < a->seq_len; t0 += T) {
    const int steps = (int)(a->seq_len - t0 < T ? a->seq_len - t0 : T);
    if (MODE == PACKED) read_flags(&flags, a->seq_idx + unit.b * a->seq_len + t0, steps, &last);
    if (a->boundaries) {
      float *keep = a->boundaries + (t0 / T * a->batch + unit.b) * boundary_row + unit.boundary;
      for (int64_t i = 0; i < states; ++i) store(keep + i * W, h[i]);
    }
    const int64_t base = MODE == PATH ? 0 : t0;  // of the rows
    const int32_t *path = MODE == PATH ? unit.path + t0 : nullptr;
    const float *b_row = B.rows + base * B.stride, *c_row = C.rows + base * C.stride;
    for (int k = 0; k < unit.blocks; ++k) {
      Tile tile;
      load_tile<MODE>(&tile, a, unit, t0, steps, k, D[k], bias[k]);
      const bool last_block = k + 1 == unit.blocks;
      const int64_t next_t0 = last_block ? t0 + T : t0;
      const int next_k = last_block ? 0 : k + 1;
      Ahead ahead;
      ahead.add(a, a->u, unit, next_t0, next_k);
      ahead.add(a, a->dt, unit, next_t0, next_k);
      ahead.add(a, a->z, unit, next_t0, next_k);
      if (MODE == PATH)
        ahead.add_sum(a, unit, next_t0, next_k);
      else
        ahead.add(a, a->y, unit, next_t0, next_k);
      if (MODE == PACKED)
        for (int t = 0; t < steps; ++t)
          if (flags.padding[t]) tile.dt[t] = tile.x[t] = vec{};
      int64_t n = 0;
      for (; n + NF <= N; n += NF)
        run_forward<NF, MODE, BC, CC>(&tile, n ? nullptr : &ahead, &flags, path, steps, A + k * N + n, h + k * N + n, B, C, b_row + n, c_row + n,
                                     k * N + n);
      for (; n < N; ++n)
        run_forward<1, MODE, BC, CC>(&tile, nullptr, &flags, path, steps, A + k * N + n, h + k * N + n, B, C, b_row + n, c_row + n,
                                    k * N + n);
      const int lanes = (int)(unit.channels - (int64_t)k * W);
      const int64_t c = unit.first + (int64_t)k * W;
      const int64_t y_stride = MODE == PATH ? a->d_inner / a->n_groups : a->d_inner;
      float *y = a->y + (unit.b * a->seq_len + base) * y_stride + (MODE == PATH ? unit.inside + (int64_t)k * W : c);
      const float *z = a->z.data ? a->z.data + unit.b * a->z.stride_batch + base * a->z.stride_time + c : nullptr;
      for (int t = 0; t < steps; ++t) {
        const int64_t row = row_of<MODE>(path, t);
        vec out = tile.y[t];
        if (z) {
          const vec zt = load_n(z + row * a->z.stride_time, lanes);
          out = out * (zt * sigmoid(zt));
        }
        if (MODE == PACKED && flags.padding[t]) out = vec{};
        if (MODE == PATH && unit.group) out += load_n(y + row * y_stride, lanes);
        store_n(y + row * y_stride, out, lanes);
      }
    }
  }
  unpack(a->final_state + at, h, unit, N);
}

// --- backward -------------------------------------------------------------------------------------------------------

// What one block of one tile needs and gathers in the backward pass.
struct Adjoint {
  Tile tile;                     // dt, x, y (before the gate)
  vec u[T], dy[T];               // input, gradient of the ungated output
  vec gB[T], decay[T];           // sum_n g B, sum_n g a h_prev A log2(e)
};
// Scratch for NB components: states (one before the tile), decays, and sums for dB and dC over the unit's blocks.
struct Scratch {
  vec h[(T + 1) * NB], a[T * NB], dB[T * NB], dC[T * NB];
};

template <int N, int MODE, bool BC, bool CC>
LS_INLINE void run_backward(Adjoint *w, const Ahead *ahead, Scratch *s, const Flags *flags, const int32_t *path, int steps, bool gated, const vec *A, const vec *h0, vec *g,
                            vec *dA, vec *dBc, vec *dCc, const Matrix &B, const Matrix &C, const float *b_row,
                            const float *c_row, int64_t offset) {
  {
    vec An[N], hn[N];
    for (int i = 0; i < N; ++i) An[i] = A[i], s->h[i] = hn[i] = h0[i];
    for (int t = 0; t < steps; ++t) {
      const int64_t row = row_of<MODE>(path, t);
      const float *b = b_row + row * B.stride, *c = c_row + row * C.stride;
      if (ahead) ahead->step<MODE>(t);
      if (MODE == PACKED && flags->padding[t]) {
        for (int i = 0; i < N; ++i) s->h[(t + 1) * N + i] = hn[i];
        continue;
      }
      const vec dt = w->tile.dt[t], x = w->tile.x[t];
      vec y = w->tile.y[t], a[N];
      for (int i = 0; i < N; ++i) a[i] = dt * An[i];
      exp2_many<N>(a, a);
      if (MODE == PACKED && flags->start[t])
        for (int i = 0; i < N; ++i) a[i] = hn[i] = vec{};
      for (int i = 0; i < N; ++i) hn[i] = a[i] * hn[i] + entry<BC>(b, B.packed + offset, i) * x;
      for (int i = 0; i < N; ++i) s->a[t * N + i] = a[i], s->h[(t + 1) * N + i] = hn[i];
      if (gated)
        for (int i = 0; i < N; ++i) y += entry<CC>(c, C.packed + offset, i) * hn[i];
      w->tile.y[t] = y;
    }
  }
  vec An[N], gn[N], dAn[N], after[N];  // after: the state after step t, which is the one before step t + 1
  for (int i = 0; i < N; ++i) An[i] = A[i], gn[i] = g[i], dAn[i] = dA[i], after[i] = s->h[steps * N + i];
  for (int t = steps - 1; t >= 0; --t) {
    if (MODE == PACKED && flags->padding[t]) continue;
    const int64_t row = row_of<MODE>(path, t);
    const float *b = b_row + row * B.stride, *c = c_row + row * C.stride;
    const vec dt = w->tile.dt[t], x = w->tile.x[t], dy = w->dy[t];
    vec gB = w->gB[t], decay = w->decay[t];
    for (int i = 0; i < N; ++i) {
      const vec gi = entry<CC>(c, C.packed + offset, i) * dy + gn[i];
      if (CC)
        dCc[i] += dy * after[i];
      else
        s->dC[t * N + i] += dy * after[i];
      if (BC)
        dBc[i] += gi * x;
      else
        s->dB[t * N + i] += gi * x;
      gB += gi * entry<BC>(b, B.packed + offset, i);
      after[i] = s->h[t * N + i];
      if (MODE == PACKED && flags->start[t]) {
        gn[i] = vec{};
        continue;
      }
      gn[i] = s->a[t * N + i] * gi;
      const vec q = gn[i] * after[i];
      decay += q * An[i];
      dAn[i] += q * dt;
    }
    w->gB[t] = gB;
    w->decay[t] = decay;
  }
  for (int i = 0; i < N; ++i) g[i] = gn[i], dA[i] = dAn[i];
}

// Horizontal sums of N * steps vectors into rows of a (time, d_state) table.
template <int N>
void reduce(float *to, int64_t d_state, const vec *from, int steps) {
  for (int t = 0; t < steps; ++t)
    if (N == 4)
      sum4(to + t * d_state, from + t * N);
    else
      for (int i = 0; i < N; ++i) to[t * d_state + i] = sum(from[t * N + i]);
}

// Gradients of one unit that other units or rows share, before they are summed.
struct Partial {
  float *dB, *dC, *dA, *dD, *ddt_bias;
  // Layout: dB and dC (batch, units, seq_len, d_state), or (batch, d_inner, d_state) if constant; dA (batch, d_inner,
  // d_state); dD, ddt_bias (batch, d_inner).
  explicit Partial(const ls_scan *a) {
    const int64_t rows = unit_count(a) * a->seq_len * a->d_state, states = a->batch * a->d_inner * a->d_state;
    dB = a->workspace;
    dC = dB + (a->B.stride_time < 0 ? states : rows);
    dA = dC + (a->C.stride_time < 0 ? states : rows);
    dD = dA + states;
    ddt_bias = dD + a->batch * a->d_inner;
  }
};

template <int MODE, bool BC, bool CC>
void backward_unit(const ls_scan *a, int64_t index) {
  const Unit unit(a, index);
  const Partial partial(a);
  const int64_t N = a->d_state;
  const int64_t states = unit.blocks * N;
  vec *A = LS_STACK(vec, states), *h0 = LS_STACK(vec, states), *g = LS_STACK(vec, states);
  vec *dA = LS_STACK(vec, states), *dBc = LS_STACK(vec, states), *dCc = LS_STACK(vec, states);
  vec *Bp = LS_STACK(vec, BC ? states : 1), *Cp = LS_STACK(vec, CC ? states : 1);
  Adjoint *work = LS_STACK(Adjoint, unit.blocks);
  Ahead ahead[MAX_BLOCKS];
  Scratch scratch;
  const Matrix B(a->B, a->B_stride_group, unit, N, Bp), C(a->C, a->C_stride_group, unit, N, Cp);
  const int64_t at = (unit.b * a->d_inner + unit.first) * N;
  pack(A, a->A + unit.first * N, unit, N, LOG2E);
  pack(g, a->dfinal ? a->dfinal + at : nullptr, unit, N, 1.0f);
  vec D[MAX_BLOCKS], bias[MAX_BLOCKS], dD[MAX_BLOCKS], dbias[MAX_BLOCKS];
  for (int k = 0; k < unit.blocks; ++k) {
    const int n = (int)(unit.channels - (int64_t)k * W);
    D[k] = a->D ? load_n(a->D + unit.first + k * W, n) : vec{};
    bias[k] = a->dt_bias ? load_n(a->dt_bias + unit.first + k * W, n) : vec{};
    dD[k] = dbias[k] = vec{};
  }
  for (int64_t i = 0; i < states; ++i) dA[i] = dBc[i] = dCc[i] = vec{};
  const int64_t boundary_row = padded_channels(a) * N;
  const int32_t *seq_idx = a->seq_idx ? a->seq_idx + unit.b * a->seq_len : nullptr;

  for (int64_t t0 = (a->seq_len - 1) / T * T; t0 >= 0; t0 -= T) {
    const int steps = (int)(a->seq_len - t0 < T ? a->seq_len - t0 : T);
    Flags flags;
    if (MODE == PACKED) {
      int32_t last = -1;
      for (int64_t t = t0 - 1; t >= 0 && last < 0; --t) last = seq_idx[t];
      read_flags(&flags, seq_idx + t0, steps, &last);
    }
    const float *keep = a->boundaries + (t0 / T * a->batch + unit.b) * boundary_row + unit.boundary;
    for (int64_t i = 0; i < states; ++i) h0[i] = load(keep + i * W);

    for (int k = 0; k < unit.blocks; ++k) {
      Adjoint &w = work[k];
      load_tile<MODE>(&w.tile, a, unit, t0, steps, k, D[k], bias[k]);
      const int lanes = (int)(unit.channels - (int64_t)k * W);
      const int64_t c = unit.first + (int64_t)k * W;
      const int64_t c_u = unit.first_u + (int64_t)k * W, c_dy = unit.first_dy + (int64_t)k * W;
      for (int t = 0; t < steps; ++t) {
        const int64_t row = row_of<MODE>(unit.path, t0 + t);
        w.u[t] = load_n(a->u.data + unit.b * a->u.stride_batch + row * a->u.stride_time + c_u, lanes);
        vec dy = load_n(a->dy.data + unit.b * a->dy.stride_batch + row * a->dy.stride_time + c_dy, lanes);
        if (a->z.data) {
          const vec z = load_n(a->z.data + unit.b * a->z.stride_batch + row * a->z.stride_time + c, lanes);
          dy = dy * (z * sigmoid(z));
        }
        if (MODE == PACKED && flags.padding[t]) w.tile.dt[t] = w.tile.x[t] = w.u[t] = dy = vec{};
        w.dy[t] = dy;
        w.gB[t] = w.decay[t] = vec{};
      }
      ahead[k].count = 0;
      const ls_rows *next[] = {&a->u, &a->dt, &a->z, &a->dy};
      for (const ls_rows *m : next) ahead[k].add(a, *m, unit, t0 - T, k);
      ahead[k].add(a, a->du, unit, t0, k);
      ahead[k].add(a, a->ddt, unit, t0, k);
    }

    const int64_t base = MODE == PATH ? 0 : t0;  // of the rows
    const int32_t *path = MODE == PATH ? unit.path + t0 : nullptr;
    const float *b_row = B.rows + base * B.stride, *c_row = C.rows + base * C.stride;
    float *dB_row = partial.dB + ((unit.b * (unit_count(a) / a->batch) + unit.index) * a->seq_len + t0) * N;
    float *dC_row = partial.dC + ((unit.b * (unit_count(a) / a->batch) + unit.index) * a->seq_len + t0) * N;
    int64_t n = 0;
    for (; n + NB <= N; n += NB) {
      memset(scratch.dB, 0, sizeof scratch.dB);
      memset(scratch.dC, 0, sizeof scratch.dC);
      for (int k = 0; k < unit.blocks; ++k) {
        const int64_t i = k * N + n;
        run_backward<NB, MODE, BC, CC>(&work[k], n ? nullptr : &ahead[k], &scratch, &flags, path, steps, a->z.data != nullptr, A + i, h0 + i, g + i, dA + i, dBc + i, dCc + i,
                                      B, C, b_row + n, c_row + n, i);
      }
      if (!BC) reduce<NB>(dB_row + n, N, scratch.dB, steps);
      if (!CC) reduce<NB>(dC_row + n, N, scratch.dC, steps);
    }
    for (; n < N; ++n) {
      memset(scratch.dB, 0, sizeof(vec) * T);
      memset(scratch.dC, 0, sizeof(vec) * T);
      for (int k = 0; k < unit.blocks; ++k) {
        const int64_t i = k * N + n;
        run_backward<1, MODE, BC, CC>(&work[k], nullptr, &scratch, &flags, path, steps, a->z.data != nullptr, A + i, h0 + i, g + i, dA + i, dBc + i, dCc + i,
                                     B, C, b_row + n, c_row + n, i);
      }
      if (!BC) reduce<1>(dB_row + n, N, scratch.dB, steps);
      if (!CC) reduce<1>(dC_row + n, N, scratch.dC, steps);
    }

    for (int k = 0; k < unit.blocks; ++k) {
      const Adjoint &w = work[k];
      const int lanes = (int)(unit.channels - (int64_t)k * W);
      const int64_t c = unit.first + (int64_t)k * W;
      for (int t = 0; t < steps; ++t) {
        const int64_t row = row_of<MODE>(unit.path, t0 + t), out = (unit.b * a->seq_len + row) * a->d_inner + c;
        store_n(a->du + out, w.gB[t] * w.tile.dt[t] + D[k] * w.dy[t], lanes);
        dD[k] += w.dy[t] * w.u[t];
        vec ddt = w.gB[t] * w.u[t] + w.decay[t] * splat(LN2);
        if (a->dt_softplus)
          ddt = ddt * sigmoid(load_n(a->dt.data + unit.b * a->dt.stride_batch + row * a->dt.stride_time + unit.first_dt + (int64_t)k * W, lanes) +
                              bias[k]);
        if (MODE == PACKED && flags.padding[t]) ddt = vec{};
        dbias[k] += ddt;
        store_n(a->ddt + out, ddt, lanes);
        if (a->z.data) {
          const vec z = load_n(a->z.data + unit.b * a->z.stride_batch + row * a->z.stride_time + c, lanes);
          const vec dy = load_n(a->dy.data + unit.b * a->dy.stride_batch + row * a->dy.stride_time + c, lanes);
          const vec gate = sigmoid(z);
          vec dz = dy * w.tile.y[t] * gate * (splat(1.0f) + z * (splat(1.0f) - gate));
          if (MODE == PACKED && flags.padding[t]) dz = vec{};
          store_n(a->dz + out, dz, lanes);
        }
      }
    }
  }

  unpack(partial.dA + at, dA, unit, N);
  if (BC) unpack(partial.dB + at, dBc, unit, N);
  if (CC) unpack(partial.dC + at, dCc, unit, N);
  if (a->dinitial_state) unpack(a->dinitial_state + at, g, unit, N);
  for (int k = 0; k < unit.blocks; ++k) {
    const int lanes = (int)(unit.channels - (int64_t)k * W);
    const int64_t c = unit.b * a->d_inner + unit.first + (int64_t)k * W;
    store_n(partial.dD + c, dD[k], lanes);
    store_n(partial.ddt_bias + c, dbias[k], lanes);
  }
}

// Sum `count` blocks of n floats that lie `stride` apart, in order.
void add_up(float *to, const float *from, int64_t count, int64_t stride, int64_t n) {
  memcpy(to, from, sizeof(float) * n);
  for (int64_t j = 1; j < count; ++j)
    for (int64_t i = 0; i < n; ++i) to[i] += from[j * stride + i];
}

// Sum the partial gradients: over a group's units for dB and dC, over the batch for the rest.
struct Reduction {
  const ls_scan *a;
  Partial partial;
  int64_t row_pieces, piece, channel_pieces;
  explicit Reduction(const ls_scan *args) : a(args), partial(args) {
    piece = 256;
    row_pieces = a->batch * a->n_groups * ls_ceil(a->seq_len, piece);
    channel_pieces = ls_ceil(a->d_inner, 64);
  }
  void rows(const ls_rows &m, float *to, const float *from, int64_t i) const {
    if (m.stride_time < 0) return;
    const int64_t pieces = ls_ceil(a->seq_len, piece), units = unit_count(a) / a->batch / a->n_groups;
    const int64_t t0 = i % pieces * piece, group = i / pieces % a->n_groups, b = i / pieces / a->n_groups;
    const int64_t N = a->d_state, end = t0 + piece < a->seq_len ? t0 + piece : a->seq_len;
    const float *first = from + ((b * a->n_groups + group) * units * a->seq_len) * N;
    for (int64_t t = t0; t < end; ++t) {
      const int64_t row = a->path ? a->path[group * a->seq_len + t] : t;
      add_up(to + ((b * a->seq_len + row) * a->n_groups + group) * N, first + t * N, units, a->seq_len * N, N);
    }
  }
  void channels(int64_t i) const {
    const int64_t N = a->d_state, c = i * 64, n = c + 64 < a->d_inner ? 64 : a->d_inner - c, E = a->d_inner;
    add_up(a->dA + c * N, partial.dA + c * N, a->batch, E * N, n * N);
    if (a->B.stride_time < 0) add_up(a->dB + c * N, partial.dB + c * N, a->batch, E * N, n * N);
    if (a->C.stride_time < 0) add_up(a->dC + c * N, partial.dC + c * N, a->batch, E * N, n * N);
    if (a->D) add_up(a->dD + c, partial.dD + c, a->batch, E, n);
    if (a->dt_bias) add_up(a->ddt_bias + c, partial.ddt_bias + c, a->batch, E, n);
  }
};

void reduce_task(int64_t begin, int64_t end, void *context) {
  const Reduction *r = (const Reduction *)context;
  for (int64_t i = begin; i < end; ++i) {
    if (i >= r->row_pieces) {
      r->channels(i - r->row_pieces);
      continue;
    }
    r->rows(r->a->B, r->a->dB, r->partial.dB, i);
    r->rows(r->a->C, r->a->dC, r->partial.dC, i);
  }
}

template <int MODE, bool BC, bool CC, bool BACKWARD>
void task(int64_t begin, int64_t end, void *context) {
  for (int64_t i = begin; i < end; ++i)
    if (BACKWARD)
      backward_unit<MODE, BC, CC>((const ls_scan *)context, i);
    else
      forward_unit<MODE, BC, CC>((const ls_scan *)context, Unit((const ls_scan *)context, i));
}

// Some channels along all paths, one after the other: y is the sum, in this order.
void sum_task(int64_t begin, int64_t end, void *context) {
  const ls_scan *a = (const ls_scan *)context;
  const int64_t size = path_channels(a), units = ls_ceil(a->d_inner / a->n_groups, size);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t group = 0; group < a->n_groups; ++group)
      forward_unit<PATH, false, false>(a, Unit(a, (i / units * a->n_groups + group) * units + i % units, size));
}

template <bool BACKWARD>
void run(const ls_scan *a) {
  static const ls_task tasks[8] = {
      task<PLAIN, false, false, BACKWARD>,  task<PLAIN, false, true, BACKWARD>,  task<PLAIN, true, false, BACKWARD>,
      task<PLAIN, true, true, BACKWARD>,    task<PACKED, false, false, BACKWARD>, task<PACKED, false, true, BACKWARD>,
      task<PACKED, true, false, BACKWARD>,  task<PACKED, true, true, BACKWARD>};
  const int variant = (a->seq_idx != nullptr) * 4 + (a->B.stride_time < 0) * 2 + (a->C.stride_time < 0);
  ls_run(unit_count(a), tasks[variant], (void *)a);
}

}  // namespace

int32_t scan_forward(const ls_scan *a) {
  const int64_t per_group = a->d_inner / a->n_groups;
  if (a->path)
    ls_run(a->batch * ls_ceil(per_group, path_channels(a)), sum_task, (void *)a);
  else
    run<false>(a);
  return 0;
}

int32_t scan_backward(const ls_scan *a) {
  if (a->path)
    ls_run(unit_count(a), task<PATH, false, false, true>, (void *)a);
  else
    run<true>(a);
  const Reduction reduction(a);
  ls_run(reduction.row_pieces + reduction.channel_pieces, reduce_task, (void *)&reduction);
  return 0;
}

}  // namespace LS_ISA
