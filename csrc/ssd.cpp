// State space duality, forward, and a single step of it; ssd.h has the plan.
#include "ssd.h"

namespace LS_ISA {

namespace {

// Four or fewer rows [j, j + n) of a tile, to be columns of `to`.
void pack_columns(float *to, int64_t ld, const ls_rows &rows, int64_t offset, const Tile &tile, int j, int64_t width) {
  const float *row[4];
  const int n = tile.rows - j < 4 ? tile.rows - j : 4;
  for (int i = 0; i < n; ++i) row[i] = rows.data + offset + tile.position[j + i] * rows.stride_time;
  if (n == 4) return transpose4(to + j, ld, row, width);
  for (int64_t c = 0; c < width; ++c)
    for (int i = 0; i < n; ++i) to[c * ld + j + i] = row[i][c];
}

// (rows, width) of a tile as they are and, where they are needed, transposed.
void pack_matrix(const ls_rows &from, int64_t offset, int64_t width, const Sizes &z, const Tile &tile, float *rows,
                 float *columns) {
  const int64_t end = panels(tile.rows) * NR;
  for (int j = 0; rows && j < tile.rows; ++j) {
    memcpy(rows + j * z.lda, from.data + offset + tile.position[j] * from.stride_time, sizeof(float) * width);
    for (int64_t n = width; n < panels(width) * NR; ++n) rows[j * z.lda + n] = 0;
  }
  for (int j = 0; columns && j < tile.rows; j += 4) pack_columns(columns, z.lds, from, offset, tile, j, width);
  for (int64_t n = 0; columns && n < width; ++n)
    for (int64_t j = tile.rows; j < end; ++j) columns[n * z.lds + j] = 0;
}

void pack_task(int64_t begin, int64_t end, void *context) {
  const Segment *segment = (const Segment *)context;
  const ls_ssd *a = segment->a;
  const Sizes &z = segment->z;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / segment->tiles, b = row / a->n_groups, g = row % a->n_groups;
    const Tile tile(a, z.chunk, b, segment->first + unit % segment->tiles);
    const Packed to = segment->at(b, g, unit % segment->tiles);
    pack_matrix(a->B, b * a->B.stride_batch + g * a->B_stride_group, a->d_state, z, tile, to.B, to.Bt);
    pack_matrix(a->C, b * a->C.stride_batch + g * a->C_stride_group, a->d_state, z, tile, to.C, to.Ct);
    for (int i = 0; i < tile.n_parts; ++i) {
      const Part part = tile.parts[i];
      for_rows(part.begin, part.end, [&](auto rows, int64_t t0) {
        constexpr int M = decltype(rows)::value;
        for (int s = part.begin & ~(NR - 1); s < visible(a, part, (int)t0 + M - 1); s += NR) {
          Results<M> r;
          r.add(to.C + t0 * z.lda, z.lda, 1, to.Bt + s, z.lds, a->d_state);
          r.give(to.scores + t0 * z.lds + s, z.lds);
        }
      });
    }
  }
}

}  // namespace

void ssd_pack(const Segment *segment) {
  ls_run(segment->a->batch * segment->a->n_groups * segment->tiles, pack_task, (void *)segment);
}

bool ssd_take(const ls_rows &from, int64_t offset, const ls_ssd *a, const Sizes &z, const Tile &tile, float *to,
              const float *scale, float *scaled) {
  const int end = (int)panels(tile.rows) * NR;
  vec zeros{};
  for (int j = 0; j < end; ++j) {
    const float *row = j < tile.rows ? from.data + offset + tile.position[j] * from.stride_time : nullptr;
    const vec factor = splat(row && scale ? scale[j] : 1.0f);
    for (int64_t p = 0; p < z.head; p += W) {
      const int64_t left = a->d_head - p, at = p / NR * z.padded * NR + j * NR + p % NR;
      const vec v = row && left > 0 ? load_n(row + p, (int)(left < W ? left : W)) : vec{};
      zeros += v * splat(0.0f);
      if (to) store(to + at, v);
      if (scaled) store(scaled + at, v * factor);
    }
  }
  return sum(zeros) == 0.0f;
}

void ssd_weigh(const ls_ssd *a, const Sizes &z, const Part &part, const Rows &rows, const float *scores, float D,
               float *to) {
  alignas(64) float sums[MAX_ROWS + NR] = {};  // of log decays from each earlier row to this one
  const int first = part.begin & ~(W - 1);
  for (int j = part.begin; j < part.end; ++j) {
    const int end = visible(a, part, j);
    if (j == end - a->rank) {
      const vec log = splat(rows.log[j]);
      for (int s = first; s < j; s += W) store(sums + s, load(sums + s) + log);
      for (int s = j; s < end; ++s) sums[s] = 0;
    }
    float *row = to + j * z.lds;
    const float *from = scores + j * z.lds;
    int s = first;
    for (; s < end; s += W) {
      vec w = Rows::exp2_sum(load(sums + s));
      if (scores) w *= load(from + s) * load(rows.dt + s);
      store(row + s, s + W <= end ? w : masked(w, lanes_below(end - s)));
    }
    const int ahead = end + MR + (int)a->rank < part.end ? end + MR + (int)a->rank : part.end;
    for (; s < ahead; s += W) store(row + s, vec{});
    row[j] += D;
  }
}

namespace {

constexpr int64_t SHARED = 1 << 15;  // states from which on threads share a step

// One head of a batch row on its way through the tiles.
struct Forward {
  const Segment *segment;
  int64_t b, h;
  float *x, *finite, *u, *weights;  // u: x times dt and the decay to the end of the part
  int64_t next_x;                   // from a row's x to that which will be needed next

  float *panel(float *from, int64_t i) const { return from + i * segment->z.padded * NR; }

  void outputs(const Tile &tile, const Part &part, const Rows &rows, const Packed &packed, const float *state,
               const float *inner) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const float *next = a->x.data + b * a->x.stride_batch + h * a->x_stride_head + next_x;
    for (int64_t i = 0; i < z.n_head; ++i) {
      const int64_t p = i * NR;
      const float *in = inner + i * z.padded * NR;
      for_rows(part.begin, part.end, [&](auto count, int64_t t0) {
        constexpr int M = decltype(count)::value;
        Results<M> r;
        if (state) {
          r.add(packed.C + t0 * z.lda, z.lda, 1, state + i * a->d_state * NR, NR, a->d_state);
          r.scale(rows.before + t0);
        }
        for (int m = 0; m < M; ++m)  // rows lie far apart, where no hardware looks ahead
          __builtin_prefetch(next + tile.position[t0 + m] * a->x.stride_time + p, 0, 2);
        const int end = visible(a, part, (int)t0 + M - 1);
        r.add(weights + t0 * z.lds + part.begin, z.lds, 1, in + part.begin * NR, NR, end - part.begin);
        const int64_t width = a->d_head - p, ld = a->n_heads * a->d_head;
        float *y = a->y + (b * a->seq_len * a->n_heads + h) * a->d_head + p;
        if (width >= NR && !a->D_of_channels) {
          LS_UNROLL for (int m = 0; m < M; ++m) {
            store(y + tile.position[t0 + m] * ld, r.at[m][0]);
            store(y + tile.position[t0 + m] * ld + W, r.at[m][1]);
          }
          return;
        }
        alignas(64) float result[M * NR];
        r.give(result, NR);
        for (int m = 0; m < M; ++m)
          for (int k = 0; k < NR && k < width; ++k) {
            const float skip = a->D_of_channels ? a->D[h * a->d_head + p + k] * in[(t0 + m) * NR + k] : 0.0f;
            y[tile.position[t0 + m] * ld + k] = result[m * NR + k] + skip;
          }
      });
    }
  }

  // The state after a part; `to` may be `from`, which is null for a state of zero.
  void advance(const Part &part, const Rows &rows, const Packed &packed, const float *from, float *to) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const vec decay = splat(rows.before[part.end - 1]);
    for (int64_t i = 0; i < z.n_head; ++i) {
      const float *in = panel(u, i);
      for_rows(0, a->d_state, [&](auto count, int64_t n) {
        constexpr int M = decltype(count)::value;
        Results<M> r;
        const int64_t at = (i * a->d_state + n) * NR;
        if (from) r.take(from + at, decay);
        r.add(packed.Bt + n * z.lds + part.begin, z.lds, 1, in + part.begin * NR, NR, part.end - part.begin);
        r.give(to + at, NR);
      });
    }
  }

  // Products carry what is not finite to earlier rows, for 0 NaN is NaN: compute without, and add NaN to later rows.
  void without_infinity(const Tile &tile) const {
    const Sizes &z = segment->z;
    for (int64_t i = 0; i < z.n_head; ++i)
      for (int k = 0; k < tile.rows * NR; ++k) {
        const float v = panel(x, i)[k];
        panel(finite, i)[k] = v * 0.0f == 0.0f ? v : 0.0f;
      }
  }
  void add_infinity(const Tile &tile, const Part &part) const {
    const ls_ssd *a = segment->a;
    for (int64_t p = 0; p < a->d_head; ++p) {
      const float *in = panel(x, p / NR) + p % NR;
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
    const int64_t offset = b * a->x.stride_batch + h * a->x_stride_head;
    float scale[MAX_ROWS];
    for (int j = 0; j < tile.rows; ++j) scale[j] = rows.dt[j] * rows.after[j];
    const bool clean = ssd_take(a->x, offset, a, z, tile, x, scale, u);
    const float D = a->D && !a->D_of_channels ? a->D[h] : 0.0f;
    if (!clean) without_infinity(tile);
    for (int i = 0; i < tile.n_parts; ++i) {
      const Part part = tile.parts[i];
      if (part.fresh) from = nullptr;
      ssd_weigh(a, z, part, rows, packed.scores, D, weights);
      outputs(tile, part, rows, packed, from, clean ? x : finite);
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

void forward_task(int64_t begin, int64_t end, void *context) {
  const Segment *s = (const Segment *)context;
  const ls_ssd *a = s->a;
  const Sizes &z = s->z;
  const int64_t rows = z.padded * z.head, given = a->d_head * a->d_state;
  float *scratch = LS_STACK(float, 3 * rows + z.scores);
  for (int64_t i = begin; i < end; ++i) {
    const Unit unit(s, i);
    for (int64_t k = 0; k < s->tiles; ++k)
      for (int64_t h = unit.h0; h < unit.h1; ++h) {
        const int64_t tile = s->first + k, head = unit.b * a->n_heads + h;
        float *running = a->workspace + head * z.state;
        float *saved = a->boundaries + ((unit.b * z.n_tiles + tile) * a->n_heads + h) * z.state;
        float *from = a->boundaries ? saved : running;
        float *to = a->boundaries && tile + 1 < z.n_tiles ? saved + a->n_heads * z.state : running;
        if (!tile && a->initial_state) ssd_pack_state(a, from, a->initial_state + head * given);
        const Forward forward = {s, unit.b, h, scratch, scratch + rows, scratch + 2 * rows, scratch + 3 * rows,
                                 unit.next(s, h, 1, a->x_stride_head, a->x.stride_time)};
        forward.tile(tile, s->at(unit.b, unit.g, k), tile || a->initial_state ? from : nullptr, to);
        if (tile + 1 == z.n_tiles) ssd_unpack_state(a, a->final_state + head * given, running);
      }
  }
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

int64_t ssd_forward_workspace(const ls_ssd *a) {
  const Sizes z(a);
  const int64_t tile = a->batch * a->n_groups * Packed::size(z, false);
  return a->batch * a->n_heads * z.state + segment_tiles(z, PACKED, tile) * tile;
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
  const Blocks blocks(a, z);
  float *packed = a->workspace + a->batch * a->n_heads * z.state;
  const int64_t most = segment_tiles(z, PACKED, a->batch * a->n_groups * Packed::size(z, false));
  for (int64_t first = 0; first < z.n_tiles; first += most) {
    const int64_t tiles = z.n_tiles - first < most ? z.n_tiles - first : most;
    const Segment segment = {a, z, blocks, first, tiles, packed, nullptr};
    ssd_pack(&segment);
    ls_run(a->batch * a->n_groups * blocks.count, forward_task, (void *)&segment);
  }
  return 0;
}

}  // namespace LS_ISA
