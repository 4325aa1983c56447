// State space duality, backward; ssd.h has the plan.
//
// Tiles are walked from the last to the first. A unit of parallel work is a batch row and a block of heads of a group,
// which adds up its share of the gradients of B and C, head after head; then the shares of the blocks are summed, in
// order. G is the gradient of the state after a part, u = dt x, and v = dy:
//
//     dW   = (v u') * decays                 of the scores; their share of dB and dC follows from the sum over heads
//     du_s = after_s (G B_s) + sum_t W_ts v_t
//     dC_t = before_t (S' v_t) + ...         dB_s = after_s (G' u_s) + ...
//     G    = decay G + sum_t before_t v_t C_t'   of the part before
//
// The log decay of row r lies between rows s and t for s < r <= t, and its gradient is a sum over such pairs, never a
// difference of longer sums.
#include "ssd.h"

namespace LS_ISA {
namespace {

// A block's share of the gradients of B and C, transposed (d_state, lds), and of the scores (rows, lds).
struct Share {
  float *dB, *dC, *scores;
  static int64_t size(const Sizes &z) { return 2 * z.across + z.scores; }
  Share(const Segment *s, int64_t b, int64_t g, int64_t block, int64_t tile)
      : dB(s->shares + (((b * s->a->n_groups + g) * s->blocks.count + block) * s->tiles + tile) * size(s->z)),
        dC(dB + s->z.across),
        scores(dC + s->z.across) {}
};

// What a head needs of a tile besides: panels of u, v and du; u and v transposed; weights, and pairs (rows, lds).
struct Scratch {
  float *u, *v, *du, *ut, *vt, *weights, *pairs;
  static int64_t size(const Sizes &z) { return 3 * z.padded * z.head + 2 * z.head * z.lds + 2 * z.scores; }
  Scratch(float *at, const Sizes &z)
      : u(at),
        v(u + z.padded * z.head),
        du(v + z.padded * z.head),
        ut(du + z.padded * z.head),
        vt(ut + z.head * z.lds),
        weights(vt + z.head * z.lds),
        pairs(weights + z.scores) {}
};

// What the log decays' gradients are sums of, one number a row or lane.
struct Sums {
  alignas(64) float from_state[MAX_ROWS + NR], to_state[MAX_ROWS + NR], pairs[MAX_ROWS + NR];
  float through;
};

// x (rows, head) in panels -> (head, lds), row j times scale[j] if there is one.
void transpose(const Sizes &z, const Tile &tile, const float *x, const float *scale, float *to) {
  const int64_t end = panels(tile.rows) * NR;
  for (int64_t i = 0; i < z.n_head; ++i)
    for (int64_t j = 0; j < end; j += 4) {
      const float *row[4];
      for (int r = 0; r < 4; ++r) row[r] = x + (i * z.padded + j + r) * NR;
      transpose4(to + i * NR * z.lds + j, z.lds, row, NR);
    }
  if (!scale) return;
  for (int64_t p = 0; p < z.head; ++p)
    for (int64_t j = 0; j < tile.rows; j += W) {
      const int n = (int)(tile.rows - j < W ? tile.rows - j : W);
      store(to + p * z.lds + j, load(to + p * z.lds + j) * load_n(scale + j, n));
    }
}

// Lanes s, ..., s + W - 1 that are in [begin, end).
LS_INLINE vec inside(int s, int begin, int end) {
  return (vec)((ivec)lanes_below(end - s) & ~(ivec)lanes_below(begin - s));
}

struct Backward {
  const Segment *segment;
  int64_t b, h;
  Scratch scratch;
  float *G, *dD;            // of this head; dD (head)
  bool adds;                // to the shares, else it overwrites them
  int64_t next_x, next_dy;  // from a row's x and dy to those that will be needed next

  // The gradient of the scores of a part, added to `share`; the weights; sums over the pairs around each row.
  void attend(const Part &part, const float *scores, const Share &share, Sums *sums) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const bool add = adds;
    for_rows(part.begin, part.end, [&](auto count, int64_t t0) {
      constexpr int M = decltype(count)::value;
      const int seen = visible(a, part, (int)t0 + M - 1) + MR + (int)a->rank, end = seen < part.end ? seen : part.end;
      for (int s = part.begin & ~(NR - 1); s < end; s += NR) {
        Results<M> r;
        r.add_panels(scratch.v + t0 * NR, z.padded * NR, scratch.ut + s, z.lds, a->d_head);
        LS_UNROLL for (int m = 0; m < M; ++m)
          LS_UNROLL for (int v = 0; v < NV; ++v) {
            const int64_t at = (t0 + m) * z.lds + s + v * W;
            const vec mask = inside(s + v * W, part.begin, visible(a, part, (int)t0 + m));
            const vec decay = masked(load(scratch.weights + at), mask), score = masked(load(scores + at), mask);
            const vec d = masked(r.at[m][v], mask) * decay;
            store(share.scores + at, add ? load(share.scores + at) + d : d);
            store(scratch.weights + at, decay * score);
            store(scratch.pairs + at, d * score);
          }
      }
    });
    alignas(64) float column[MAX_ROWS + NR] = {};  // sums of the pairs of row s and the rows from t on
    const int first = part.begin & ~(W - 1);
    for (int t = part.end; t-- > part.begin;) {
      for (int s = first; s < visible(a, part, t); s += W) store(column + s, load(column + s) + load(scratch.pairs + t * z.lds + s));
      vec sum_of{};
      for (int s = first; s < t; s += W) sum_of += masked(load(column + s), lanes_below(t - s));
      sums->pairs[t] = sum(sum_of);
    }
  }

  // to (d_state, lanes) += state (d_state, head) x (head, lanes) for the rows of a part; sums of the products with
  // `other` (d_state, lanes) over d_state.
  void cross(const Part &part, const float *state, const float *x, const float *other, float *to, float *sums) const {
    const int64_t N = segment->a->d_state, P = segment->a->d_head, lds = segment->z.lds;
    const bool add = adds;
    for (int s = part.begin & ~(NR - 1); s < part.end; s += NR) {
      const vec mask[NV] = {inside(s, part.begin, part.end), inside(s + W, part.begin, part.end)};
      vec products[NV] = {};
      for_rows(0, N, [&](auto count, int64_t n) {
        constexpr int M = decltype(count)::value;
        Results<M> r;
        r.add_panels(state + n * NR, N * NR, x + s, lds, P);
        float *at = to + n * lds + s;
        const float *with = other + n * lds + s;
        LS_UNROLL for (int v = 0; v < NV; ++v) {
          vec sum_of = products[v];
          LS_UNROLL for (int m = 0; m < M; ++m) {
            const vec d = masked(r.at[m][v], mask[v]);
            store(at + m * lds + v * W, add ? load(at + m * lds + v * W) + d : d);
            sum_of = fma(d, load(with + m * lds + v * W), sum_of);
          }
          products[v] = sum_of;
        }
      });
      for (int v = 0; v < NV; ++v) store(sums + s + v * W, products[v]);
    }
  }

  void inputs(const Tile &tile, const Part &part, const Rows &rows, const Packed &packed, bool live) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const float *x = a->x.data + b * a->x.stride_batch + h * a->x_stride_head;
    const float *dy = a->dy.data + b * a->dy.stride_batch + h * a->dy_stride_head;
    for (int64_t i = 0; i < z.n_head; ++i)
      for_rows(part.begin, part.end, [&](auto count, int64_t s0) {
        constexpr int M = decltype(count)::value;
        Results<M> r;
        if (live) {
          r.add(packed.B + s0 * z.lda, z.lda, 1, G + i * a->d_state * NR, NR, a->d_state);
          r.scale(rows.after + s0);
        }
        for (int m = 0; m < M; ++m) {  // what is needed soon lies far apart, where no hardware looks ahead
          const int64_t at = tile.position[s0 + m];
          __builtin_prefetch(x + at * a->x.stride_time + i * NR + next_x, 0, 2);
          __builtin_prefetch(dy + at * a->dy.stride_time + i * NR + next_dy, 0, 2);
          __builtin_prefetch(a->dx + ((b * a->seq_len + at) * a->n_heads + h) * a->d_head + i * NR, 1, 2);
        }
        const int64_t t = visible(a, part, (int)s0) - a->rank;
        r.add(scratch.weights + t * z.lds + s0, 1, z.lds, scratch.v + (i * z.padded + t) * NR, NR, part.end - t);
        r.give(scratch.du + (i * z.padded + s0) * NR, NR);
      });
  }

  // G of the part before. Returns the sum of the products of the state with what comes from G.
  float retreat(const Part &part, const Rows &rows, const Packed &packed, const float *state, bool live) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const vec decay = splat(rows.before[part.end - 1]);
    vec through{};
    for (int64_t i = 0; i < z.n_head; ++i) {
      float *in = scratch.v + i * z.padded * NR;
      for (int j = part.begin; j < part.end; ++j)
        for (int v = 0; v < NV; ++v) store(in + j * NR + v * W, load(in + j * NR + v * W) * splat(rows.before[j]));
      for_rows(0, a->d_state, [&](auto count, int64_t n) {
        constexpr int M = decltype(count)::value;
        const int64_t at = (i * a->d_state + n) * NR;
        Results<M> r;
        if (live) r.take(G + at, decay);
        if (live && state) through = r.dot(state + at, through);
        r.add(packed.Ct + n * z.lds + part.begin, z.lds, 1, in + part.begin * NR, NR, part.end - part.begin);
        r.give(G + at, NR);
      });
    }
    return sum(through);
  }

  // Gradients of the rows of a part, from du and the sums.
  void give(const Tile &tile, const Part &part, const Rows &rows, const Sums &sums) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const float *x0 = a->x.data + b * a->x.stride_batch + h * a->x_stride_head;
    const float *dy0 = a->dy.data + b * a->dy.stride_batch + h * a->dy_stride_head;
    const int64_t P = a->d_head, panel = z.padded * NR;
    for (int j = part.begin; j < part.end; ++j) {
      const int64_t t = tile.position[j], at = (b * a->seq_len + t) * a->n_heads + h;
      const float *x = x0 + t * a->x.stride_time, *dy = dy0 + t * a->dy.stride_time, *du = scratch.du + j * NR;
      float *dx = a->dx + at * P;
      vec ddt{};
      for (int64_t p = 0; p < P; p += W) {
        const int n = (int)(P - p < W ? P - p : W);
        const vec d = load(du + p / NR * panel + p % NR), xp = load_n(x + p, n);
        vec out = d * splat(rows.dt[j]);
        ddt = fma(d, xp, ddt);
        if (a->D) {
          const vec dyp = load_n(dy + p, n), D = a->D_of_channels ? load_n(a->D + h * P + p, n) : splat(a->D[h]);
          out = fma(D, dyp, out);
          store(dD + p, fma(dyp, xp, load(dD + p)));
        }
        store_n(dx + p, out, n);
      }
      a->ddt[at] = sum(ddt);
    }
    float to_state = 0, from_state = 0;
    float before[MAX_ROWS];  // sums over earlier rows
    for (int j = part.begin; j < part.end; ++j) before[j] = to_state, to_state += sums.to_state[j];
    for (int j = part.end; j-- > part.begin;) {
      from_state += sums.from_state[j];
      const bool first = tile.position[j] % a->rank == 0;
      const float d = sums.pairs[j] + from_state + before[j] + sums.through;
      a->dlog_decay[(b * a->seq_len + tile.position[j]) * a->n_heads + h] = first ? d : 0.0f;
    }
  }

  // Padding has no gradients.
  void clear(int64_t index) const {
    const ls_ssd *a = segment->a;
    const int64_t chunk = segment->z.chunk;
    for (int64_t t = index * chunk; t < a->seq_len && t < (index + 1) * chunk; ++t) {
      const int64_t at = (b * a->seq_len + t) * a->n_heads + h;
      memset(a->dx + at * a->d_head, 0, sizeof(float) * a->d_head);
      a->ddt[at] = a->dlog_decay[at] = 0;
    }
  }

  // Returns whether G is not zero before the tile; `live` is whether it is not after.
  bool tile(int64_t index, const Packed &packed, const Share &share, const float *state, bool live) const {
    const ls_ssd *a = segment->a;
    const Sizes &z = segment->z;
    const Tile tile(a, z.chunk, b, index);
    const Rows rows(a, tile, b, h);
    if (a->seq_idx) clear(index);
    const int64_t at_x = b * a->x.stride_batch + h * a->x_stride_head;
    const int64_t at_dy = b * a->dy.stride_batch + h * a->dy_stride_head;
    ssd_take(a->x, at_x, a, z, tile, nullptr, rows.dt, scratch.u);
    ssd_take(a->dy, at_dy, a, z, tile, scratch.v, nullptr, nullptr);
    transpose(z, tile, scratch.u, nullptr, scratch.ut);
    transpose(z, tile, scratch.v, rows.before, scratch.vt);
    Sums sums;
    for (int i = tile.n_parts; i-- > 0;) {
      const Part part = tile.parts[i];
      ssd_weigh(a, z, part, rows, nullptr, 0.0f, scratch.weights);
      attend(part, packed.scores, share, &sums);
    }
    transpose(z, tile, scratch.u, rows.after, scratch.ut);
    for (int i = tile.n_parts; i-- > 0;) {
      const Part part = tile.parts[i];
      const float *before = i || part.fresh ? nullptr : state;
      memset(sums.from_state, 0, sizeof sums.from_state);
      memset(sums.to_state, 0, sizeof sums.to_state);
      inputs(tile, part, rows, packed, live);
      if (live) cross(part, G, scratch.ut, packed.Bt, share.dB, sums.to_state);
      if (before) cross(part, before, scratch.vt, packed.Ct, share.dC, sums.from_state);
      sums.through = retreat(part, rows, packed, before, live);
      give(tile, part, rows, sums);
      live = !part.fresh;
    }
    return live;
  }
};

void backward_task(int64_t begin, int64_t end, void *context) {
  const Segment *s = (const Segment *)context;
  const ls_ssd *a = s->a;
  const Sizes &z = s->z;
  float *memory = LS_STACK(float, Scratch::size(z));
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit(s, index);
    const int64_t b = unit.b, g = unit.g;
    for (int64_t i = s->tiles; i-- > 0;) {
      const int64_t tile = s->first + i;
      const Share share(s, b, g, unit.block, i);
      const Tile rows(a, z.chunk, b, tile);
      const bool last = tile + 1 == z.n_tiles, given = tile || a->initial_state, after = !last || a->dfinal;
      // one part, with states before and after it, fills the shares
      const bool full = rows.n_parts == 1 && !rows.parts[0].fresh && given && after;
      if (!full) memset(share.dB, 0, sizeof(float) * Share::size(z));
      for (int64_t h = unit.h0; h < unit.h1; ++h) {
        const int64_t head = b * a->n_heads + h;
        float *G = a->workspace + head * z.state, *dD = a->workspace + a->batch * a->n_heads * z.state + head * z.head;
        if (last && a->dfinal) ssd_pack_state(a, G, a->dfinal + head * a->d_head * a->d_state);
        if (last) memset(dD, 0, sizeof(float) * z.head);
        const Backward backward = {s, b, h, Scratch(memory, z), G, dD, !full || h > unit.h0,
                                   unit.next(s, h, -1, a->x_stride_head, a->x.stride_time),
                                   unit.next(s, h, -1, a->dy_stride_head, a->dy.stride_time)};
        const float *state = a->boundaries + ((b * z.n_tiles + tile) * a->n_heads + h) * z.state;
        const bool live = backward.tile(tile, s->at(b, g, i), share, given ? state : nullptr, after);
        if (!live) memset(G, 0, sizeof(float) * z.head * a->d_state);
        if (!tile && a->dinitial_state)
          ssd_unpack_state(a, a->dinitial_state + head * a->d_head * a->d_state, G);
      }
    }
  }
}

// The gradient of B or C (rows, d_state) of a tile from its share that is `across` (d_state, lds), and from that of the
// scores: for B, row s is the sum over rows t of scores[t][s] C_t; for C, row t is that of scores[t][s] B_s.
void give_matrix(const Segment *segment, const Tile &tile, int64_t b, int64_t g, const float *across,
                 const float *scores, const float *other, bool of_B, float *to) {
  const ls_ssd *a = segment->a;
  const Sizes &z = segment->z;
  float *rows = LS_STACK(float, z.padded * NR);  // NR columns, row after row
  for (int64_t n = 0; n < a->d_state; n += NR) {
    const int width = (int)(a->d_state - n < NR ? a->d_state - n : NR);
    for (int64_t k = 0; k < width; ++k)
      for (int j = 0; j < tile.rows; ++j) rows[j * NR + k] = across[(n + k) * z.lds + j];
    for (int i = 0; i < tile.n_parts; ++i) {
      const Part part = tile.parts[i];
      for_rows(part.begin, part.end, [&](auto count, int64_t j) {
        constexpr int M = decltype(count)::value;
        Results<M> r;
        const int end = of_B ? part.end : visible(a, part, (int)j + M - 1);
        const int64_t first = of_B ? visible(a, part, (int)j) - a->rank : part.begin;
        if (of_B)
          r.add(scores + first * z.lds + j, 1, z.lds, other + first * z.lda + n, z.lda, end - first);
        else
          r.add(scores + j * z.lds + first, z.lds, 1, other + first * z.lda + n, z.lda, end - first);
        for (int m = 0; m < M; ++m) {
          float *row = to + ((b * a->seq_len + tile.position[j + m]) * a->n_groups + g) * a->d_state + n;
          for (int v = 0; v < NV && v * W < width; ++v) {
            const int lanes = width - v * W < W ? width - v * W : W;
            store_n(row + v * W, r.at[m][v] + load(rows + (j + m) * NR + v * W), lanes);
          }
        }
      });
    }
  }
}

// Sum the blocks' shares, and give dB and dC of a tile.
void share_task(int64_t begin, int64_t end, void *context) {
  const Segment *s = (const Segment *)context;
  const ls_ssd *a = s->a;
  const Sizes &z = s->z;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = unit % s->tiles, g = unit / s->tiles % a->n_groups, b = unit / s->tiles / a->n_groups;
    const Tile tile(a, z.chunk, b, s->first + i);
    const Share total(s, b, g, 0, i);
    for (int64_t block = 1; block < s->blocks.count; ++block) {
      const Share share(s, b, g, block, i);
      for (int64_t k = 0; k < Share::size(z); k += W) store(total.dB + k, load(total.dB + k) + load(share.dB + k));
    }
    const Packed packed = s->at(b, g, i);
    if (a->seq_idx)  // padding
      for (int64_t t = (s->first + i) * z.chunk; t < a->seq_len && t < (s->first + i + 1) * z.chunk; ++t)
        for (int k = 0; k < 2; ++k)
          memset((k ? a->dB : a->dC) + ((b * a->seq_len + t) * a->n_groups + g) * a->d_state, 0, 4 * a->d_state);
    give_matrix(s, tile, b, g, total.dB, total.scores, packed.C, true, a->dB);
    give_matrix(s, tile, b, g, total.dC, total.scores, packed.B, false, a->dC);
  }
}

// Sum the batch rows' shares of dD.
void reduce_D(const ls_ssd *a, const Sizes &z, const float *shares) {
  for (int64_t h = 0; h < a->n_heads; ++h) {
    float total = 0;
    for (int64_t p = 0; p < a->d_head; ++p) {
      float channel = 0;
      for (int64_t b = 0; b < a->batch; ++b) channel += shares[(b * a->n_heads + h) * z.head + p];
      if (a->D_of_channels) a->dD[h * a->d_head + p] = channel;
      total += channel;
    }
    if (!a->D_of_channels) a->dD[h] = total;
  }
}

// Where the workspace has what; in floats.
struct Memory {
  int64_t tile, share, tiles, states, packed;  // of a tile over all rows and groups; tiles of a segment; sizes
  Memory(const ls_ssd *a, const Sizes &z, const Blocks &blocks) {
    tile = a->batch * a->n_groups * Packed::size(z, true);
    share = a->batch * a->n_groups * blocks.count * Share::size(z);
    tiles = segment_tiles(z, 2 * PACKED, tile + share);
    states = a->batch * a->n_heads * (z.state + z.head);
    packed = tiles * tile;
  }
};

}  // namespace

int64_t ssd_backward_workspace(const ls_ssd *a) {
  const Sizes z(a);
  const Memory memory(a, z, Blocks(a, z));
  return memory.states + memory.packed + memory.tiles * memory.share;
}

int32_t ssd_backward(const ls_ssd *a) {
  const Sizes z(a);
  const Blocks blocks(a, z);
  const Memory memory(a, z, blocks);
  float *packed = a->workspace + memory.states, *shares = packed + memory.packed;
  for (int64_t end = z.n_tiles; end > 0; end -= memory.tiles) {
    const int64_t tiles = end < memory.tiles ? end : memory.tiles;
    const Segment segment = {a, z, blocks, end - tiles, tiles, packed, shares};
    ssd_pack(&segment);
    ls_run(a->batch * a->n_groups * blocks.count, backward_task, (void *)&segment);
    ls_run(a->batch * a->n_groups * tiles, share_task, (void *)&segment);
  }
  if (a->D) reduce_D(a, z, a->workspace + a->batch * a->n_heads * z.state);
  return 0;
}

}  // namespace LS_ISA
