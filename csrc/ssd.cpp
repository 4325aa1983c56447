// State space duality, forward, and a single step of it; ssd.h has the plan.
#include "ssd.h"

namespace LS_ISA {

void ssd_pack(const ls_ssd *a, const Sizes &z, const Tile &tile, int64_t b, int64_t g, const Packed &to) {
  const int64_t N = a->d_state;
  const float *from_B = a->B.data + b * a->B.stride_batch + g * a->B_stride_group;
  const float *from_C = a->C.data + b * a->C.stride_batch + g * a->C_stride_group;
  for (int j = 0; j < tile.rows; ++j)
    memcpy(to.C + j * z.lda, from_C + tile.position[j] * a->C.stride_time, sizeof(float) * N);
  const int whole = tile.rows & ~3, end = (int)panels(tile.rows) * NR;
  for (int j = 0; j < whole; j += 4) {
    const float *row[4];
    for (int i = 0; i < 4; ++i) row[i] = from_B + tile.position[j + i] * a->B.stride_time;
    transpose4(to.Bt + j, z.lds, row, N);
  }
  for (int64_t n = 0; n < N; ++n)
    for (int j = whole; j < end; ++j)
      to.Bt[n * z.lds + j] = j < tile.rows ? from_B[tile.position[j] * a->B.stride_time + n] : 0.0f;
  for (int i = 0; i < tile.n_parts; ++i) {
    const Part part = tile.parts[i];
    for_rows(part.begin, part.end, [&](auto rows, int64_t t0) {
      constexpr int M = decltype(rows)::value;
      for (int s = part.begin & ~(NR - 1); s < visible(a, part, (int)t0 + M - 1); s += NR) {
        Results<M> r = {};
        r.add(to.C + t0 * z.lda, z.lda, 1, to.Bt + s, z.lds, N);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < NV; ++v) store(to.scores + (t0 + m) * z.lds + s + v * W, r.at[m][v]);
      }
    });
  }
}

namespace {

constexpr int64_t SHARED = 1 << 15;  // states from which on threads share a step

// dt x of a tile's rows in panels; returns whether all of it is finite.
bool pack_inputs(const ls_ssd *a, const Sizes &z, const Tile &tile, const Rows &rows, int64_t b, int64_t h, float *u) {
  vec zeros{};
  for (int j = 0; j < tile.rows; ++j) {
    const float *x = a->x.data + b * a->x.stride_batch + tile.position[j] * a->x.stride_time + h * a->x_stride_head;
    for (int64_t p = 0; p < z.head; p += W) {
      const int64_t left = a->d_head - p;
      const vec v = left > 0 ? load_n(x + p, (int)(left < W ? left : W)) * splat(rows.dt[j]) : vec{};
      zeros += v * splat(0.0f);
      store(u + p / NR * z.chunk * NR + j * NR + p % NR, v);
    }
  }
  return sum(zeros) == 0.0f;
}

// Attention weights of a part: scores times decays, with zeros where a tile of results looks ahead of a row.
void weigh(const ls_ssd *a, const Sizes &z, const Part &part, const Rows &rows, const float *scores, float *weights) {
  alignas(64) float sums[MAX_ROWS + NR] = {};  // of log decays from each earlier row to this one
  const int first = part.begin & ~(W - 1);
  for (int j = part.begin; j < part.end; ++j) {
    const int end = visible(a, part, j), step = end - (int)a->rank;
    if (j == step) {
      const vec log = splat(rows.log[j]);
      for (int s = first; s < j; s += W) store(sums + s, load(sums + s) + log);
      for (int s = j; s < end; ++s) sums[s] = 0;
    }
    float *to = weights + j * z.lds;
    const float *from = scores + j * z.lds;
    int s = first;
    for (; s + W <= end; s += W) store(to + s, load(from + s) * Rows::exp2_sum(load(sums + s)));
    if (s < end) store(to + s, masked(load(from + s) * Rows::exp2_sum(load(sums + s)), lanes_below(end - s))), s += W;
    const int ahead = end + MR + (int)a->rank < part.end ? end + MR + (int)a->rank : part.end;
    for (; s < ahead; s += W) store(to + s, vec{});
  }
}

// One head of a batch row on its way through the tiles.
struct Forward {
  const Segment *segment;
  int64_t b, h;
  float *u, *finite, *weights;

  float *panel(float *from, int64_t i) const { return from + i * segment->z.chunk * NR; }

  void outputs(const Tile &tile, const Part &part, const Rows &rows, const Packed &packed, const float *state,
               const float *inner) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    for (int64_t i = 0; i < z.n_head; ++i) {
      const int64_t p = i * NR;
      const float *in = inner + i * z.chunk * NR;
      for_rows(part.begin, part.end, [&](auto count, int64_t t0) {
        constexpr int M = decltype(count)::value;
        Results<M> r = {};
        if (state) {
          r.add(packed.C + t0 * z.lda, z.lda, 1, state + i * a->d_state * NR, NR, a->d_state);
          for (int m = 0; m < M; ++m)
            for (int v = 0; v < NV; ++v) r.at[m][v] *= splat(rows.before[t0 + m]);
        }
        const int end = visible(a, part, (int)t0 + M - 1);
        r.add(weights + t0 * z.lds + part.begin, z.lds, 1, in + part.begin * NR, NR, end - part.begin);
        for (int v = 0; v < NV; ++v) {
          const int64_t left = a->d_head - p - v * W;
          if (left <= 0) break;
          const int lanes = (int)(left < W ? left : W);
          vec D{};
          if (a->D) D = a->D_of_channels ? load_n(a->D + h * a->d_head + p + v * W, lanes) : splat(a->D[h]);
          for (int m = 0; m < M; ++m) {
            const int64_t t = tile.position[t0 + m];
            vec y = r.at[m][v];
            if (a->D) {
              const float *x = a->x.data + b * a->x.stride_batch + t * a->x.stride_time + h * a->x_stride_head;
              y = fma(D, load_n(x + p + v * W, lanes), y);
            }
            store_n(a->y + ((b * a->seq_len + t) * a->n_heads + h) * a->d_head + p + v * W, y, lanes);
          }
        }
      });
    }
  }

  // The state after a part; `to` may be `from`, which is null for a state of zero. Scales u.
  void advance(const Part &part, const Rows &rows, const Packed &packed, const float *from, float *to) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const vec decay = splat(rows.before[part.end - 1]);
    for (int64_t i = 0; i < z.n_head; ++i) {
      float *in = panel(u, i);
      for (int j = part.begin; j < part.end; ++j)
        for (int v = 0; v < NV; ++v) {
          float *at = in + j * NR + v * W;
          store(at, load(at) * splat(rows.after[j]));
        }
      for_rows(0, a->d_state, [&](auto count, int64_t n) {
        constexpr int M = decltype(count)::value;
        Results<M> r = {};
        const int64_t at = (i * a->d_state + n) * NR;
        if (from)
          for (int m = 0; m < M; ++m)
            for (int v = 0; v < NV; ++v) r.at[m][v] = load(from + at + m * NR + v * W) * decay;
        r.add(packed.Bt + n * z.lds + part.begin, z.lds, 1, in + part.begin * NR, NR, part.end - part.begin);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < NV; ++v) store(to + at + m * NR + v * W, r.at[m][v]);
      });
    }
  }

  // Products carry what is not finite to earlier rows, for 0 NaN is NaN: compute without, and add NaN to later rows.
  void without_infinity(const Tile &tile) const {
    const Sizes &z = segment->z;
    for (int64_t i = 0; i < z.n_head; ++i)
      for (int k = 0; k < tile.rows * NR; ++k) {
        const float v = panel(u, i)[k];
        panel(finite, i)[k] = v * 0.0f == 0.0f ? v : 0.0f;
      }
  }
  void add_infinity(const Tile &tile, const Part &part) const {
    const ls_ssd *a = segment->a;
    for (int64_t p = 0; p < a->d_head; ++p) {
      const float *in = panel(u, p / NR) + p % NR;
      float nan = 0;
      for (int t = part.begin, s = part.begin; t < part.end; ++t) {
        for (; s < visible(a, part, t); ++s) nan += in[s * NR] * 0.0f;
        a->y[((b * a->seq_len + tile.position[t]) * a->n_heads + h) * a->d_head + p] += nan;
      }
    }
  }

  void tile(int64_t index, const Packed &packed, const float *from, float *to) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const Tile tile(a, z.chunk, b, index);
    const Rows rows(a, tile, b, h);
    if (a->seq_idx)  // padding
      for (int64_t t = index * z.chunk; t < a->seq_len && t < (index + 1) * z.chunk; ++t)
        memset(a->y + ((b * a->seq_len + t) * a->n_heads + h) * a->d_head, 0, sizeof(float) * a->d_head);
    const bool clean = pack_inputs(a, z, tile, rows, b, h, u);
    if (!clean) without_infinity(tile);
    for (int i = 0; i < tile.n_parts; ++i) {
      const Part part = tile.parts[i];
      if (part.fresh) from = nullptr;
      weigh(a, z, part, rows, packed.scores, weights);
      outputs(tile, part, rows, packed, from, clean ? u : finite);
      if (!clean) add_infinity(tile, part);
      advance(part, rows, packed, from, to);
      from = to;
    }
    if (from == to) return;
    if (from)
      memcpy(to, from, sizeof(float) * z.head * a->d_state);
    else
      memset(to, 0, sizeof(float) * z.head * a->d_state);
  }
};

void pack_task(int64_t begin, int64_t end, void *context) {
  const Segment *s = (const Segment *)context;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / s->tiles, b = row / s->a->n_groups, g = row % s->a->n_groups;
    const Tile tile(s->a, s->z.chunk, b, s->first + i % s->tiles);
    ssd_pack(s->a, s->z, tile, b, g, Packed(s->packed + i * Packed::size(s->z), s->z));
  }
}

void forward_task(int64_t begin, int64_t end, void *context) {
  const Segment *s = (const Segment *)context;
  const ls_ssd *a = s->a;
  const Sizes &z = s->z;
  float *scratch = LS_STACK(float, 2 * z.chunk * z.head + z.scores);
  float *finite = scratch + z.chunk * z.head, *weights = finite + z.chunk * z.head;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a->n_heads, h = unit % a->n_heads;
    const Forward forward = {s, b, h, scratch, finite, weights};
    float *running = a->workspace + unit * z.state;
    for (int64_t i = 0; i < s->tiles; ++i) {
      const int64_t tile = s->first + i;
      const auto saved = [&](int64_t t) { return a->boundaries + ((b * z.n_tiles + t) * a->n_heads + h) * z.state; };
      float *from = a->boundaries ? saved(tile) : running;
      float *to = a->boundaries && tile + 1 < z.n_tiles ? saved(tile + 1) : running;
      const bool zero = !tile && !a->initial_state;
      if (!tile && a->initial_state) ssd_pack_state(a, from, a->initial_state + unit * a->d_head * a->d_state);
      const int64_t at = (b * a->n_groups + h / z.heads) * s->tiles + i;
      forward.tile(tile, Packed(s->packed + at * Packed::size(z), z), zero ? nullptr : from, to);
    }
    if (s->first + s->tiles == z.n_tiles)
      ssd_unpack_state(a, a->final_state + unit * a->d_head * a->d_state, running);
  }
}

// Tiles of a segment, from the shape alone.
int64_t segment_tiles(const ls_ssd *a, const Sizes &z) {
  const int64_t most = LS_SSD_PACKED / (a->batch * a->n_groups * Packed::size(z));
  return most < 1 ? 1 : most < z.n_tiles ? most : z.n_tiles;
}

// The new state of rows [p, p + R) of a head, and what they put out.
template <int R>
LS_INLINE void step_rows(float *state, float decay, const float *u, const float *B, const float *C, int64_t N, float *y) {
  vec out[R] = {};
  int64_t n = 0;
  for (; n + W <= N; n += W)
    for (int r = 0; r < R; ++r) {
      const vec s = fma(splat(u[r]), load(B + n), splat(decay) * load(state + r * N + n));
      store(state + r * N + n, s);
      out[r] = fma(s, load(C + n), out[r]);
    }
  if (n < N) {
    const int left = (int)(N - n);
    for (int r = 0; r < R; ++r) {
      const vec s = fma(splat(u[r]), load_n(B + n, left), splat(decay) * load_n(state + r * N + n, left));
      store_n(state + r * N + n, s, left);
      out[r] = fma(s, load_n(C + n, left), out[r]);
    }
  }
  if (R == 4) return sum4(y, out);
  for (int r = 0; r < R; ++r) y[r] = sum(out[r]);
}

void step_task(int64_t begin, int64_t end, void *context) {
  const ls_ssd *a = (const ls_ssd *)context;
  const int64_t P = a->d_head, N = a->d_state;
  float *u = LS_STACK(float, P);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a->n_heads, h = unit % a->n_heads, g = h / (a->n_heads / a->n_groups);
    const float *x = a->x.data + b * a->x.stride_batch + h * a->x_stride_head;
    const float *B = a->B.data + b * a->B.stride_batch + g * a->B_stride_group;
    const float *C = a->C.data + b * a->C.stride_batch + g * a->C_stride_group;
    const float decay = Rows::exp2_sum(splat(a->log_decay[unit] * LOG2E))[0];
    float *state = a->final_state + unit * P * N, *y = a->y + unit * P;
    for (int64_t p = 0; p < P; ++p) u[p] = a->dt[unit] * x[p];
    int64_t p = 0;
    for (; p + 4 <= P; p += 4) step_rows<4>(state + p * N, decay, u + p, B, C, N, y + p);
    for (; p < P; ++p) step_rows<1>(state + p * N, decay, u + p, B, C, N, y + p);
    if (a->D)
      for (p = 0; p < P; ++p) y[p] += a->D[a->D_of_channels ? h * P + p : h] * x[p];
  }
}

}  // namespace

void ssd_pack_state(const ls_ssd *a, float *to, const float *from) {
  for (int64_t p = 0; p < panels(a->d_head) * NR; ++p)
    for (int64_t n = 0; n < a->d_state; ++n)
      to[(p / NR * a->d_state + n) * NR + p % NR] = p < a->d_head ? from[p * a->d_state + n] : 0.0f;
}
void ssd_unpack_state(const ls_ssd *a, float *to, const float *from) {
  for (int64_t p = 0; p < a->d_head; ++p)
    for (int64_t n = 0; n < a->d_state; ++n)
      to[p * a->d_state + n] = from[(p / NR * a->d_state + n) * NR + p % NR];
}

int64_t ssd_workspace(const ls_ssd *a) {
  const Sizes z(a);
  return a->batch * (a->n_heads * z.state + a->n_groups * segment_tiles(a, z) * Packed::size(z));
}

int32_t ssd_step(const ls_ssd *a) {
  const int64_t units = a->batch * a->n_heads;
  if (units * a->d_head * a->d_state < SHARED)
    step_task(0, units, (void *)a);  // waking other threads would take longer
  else
    ls_run(units, step_task, (void *)a);
  return 0;
}

int32_t ssd_forward(const ls_ssd *a) {
  const Sizes z(a);
  const int64_t most = segment_tiles(a, z);
  for (int64_t first = 0; first < z.n_tiles; first += most) {
    const int64_t tiles = z.n_tiles - first < most ? z.n_tiles - first : most;
    Segment segment = {a, z, first, tiles, a->workspace + a->batch * a->n_heads * z.state};
    ls_run(a->batch * a->n_groups * tiles, pack_task, &segment);
    ls_run(a->batch * a->n_heads, forward_task, &segment);
  }
  return 0;
}

}  // namespace LS_ISA
