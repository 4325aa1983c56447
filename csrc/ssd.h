// What the passes of the state space duality share; see src/longscan/ops/ssd.py for the equations.
//
// Time goes in tiles of about LS_SSD_CHUNK rows. What the heads of a group share is packed once: C, B and their products,
// the scores. Then a few heads of a group (a block) of a batch row are a unit of parallel work, which walks the tiles
// with products of matrices of a tile's size. To bound the memory, a few tiles (a segment) are packed at a time.
// States are held transposed, (d_state, d_head), in the panels of gemm.h.
#pragma once
#include "gemm.h"
#include "kernels.h"

namespace LS_ISA {

constexpr int MAX_ROWS = LS_SSD_CHUNK;  // of a tile

// Rows [begin, end) of a tile that belong to one sequence; a fresh part starts from a zero state.
struct Part {
  int begin, end;
  bool fresh;
};

// The rows of a tile without padding, and where sequences start among them.
struct Tile {
  int rows = 0, n_parts = 0;
  int64_t position[MAX_ROWS];
  Part parts[MAX_ROWS];

  Tile(const ls_ssd *a, int64_t chunk, int64_t b, int64_t index) {
    const int64_t t0 = index * chunk, t1 = t0 + chunk < a->seq_len ? t0 + chunk : a->seq_len;
    const int32_t *seq = a->seq_idx ? a->seq_idx + b * a->seq_len : nullptr;
    int32_t last = -1;
    if (seq)
      for (int64_t t = t0 - a->rank; t >= 0 && last < 0; t -= a->rank) last = seq[t];
    for (int64_t t = t0; t < t1; t += a->rank) {
      const int32_t now = seq ? seq[t] : 0;
      if (now < 0) continue;  // padding
      const bool start = seq && last >= 0 && now != last;
      if (start || !n_parts) parts[n_parts++] = {rows, rows, start};
      for (int64_t r = 0; r < a->rank; ++r) position[rows++] = t + r;
      parts[n_parts - 1].end = rows;
      last = now;
    }
  }
};

// Sizes in floats of what one head or one group needs. Leading dimensions are odd numbers of cache lines, or the rows
// of a tile would compete for the same few sets of a cache.
struct Sizes {
  int64_t chunk, n_tiles, heads;  // rows of a tile; heads of a group
  int64_t padded;                 // rows of a tile, in whole panels
  int64_t head, n_head;           // d_head in whole panels: floats, panels
  int64_t lda, lds;               // leading dimensions of (rows, d_state) and (d_state or rows, rows)
  int64_t state, rows, scores;    // (d_state, head), (rows, d_state), (rows, rows)
  int64_t across;                 // (d_state, rows)

  explicit Sizes(const ls_ssd *a) {
    chunk = a->rank * (MAX_ROWS / a->rank);
    n_tiles = ls_ceil(a->seq_len, chunk);
    heads = a->n_heads / a->n_groups;
    n_head = panels(a->d_head);
    head = n_head * NR;
    padded = panels(chunk) * NR;
    lda = odd_lines(panels(a->d_state) * NR);
    lds = odd_lines(padded);
    state = ls_ssd_state(a->d_head, a->d_state);
    rows = chunk * lda, scores = chunk * lds, across = a->d_state * lds;
  }
  static int64_t odd_lines(int64_t n) { return (ls_ceil(n, 16) | 1) * 16; }
};

// B and C of a tile and one group, zero beyond their last rows and columns, up to whole panels.
struct Packed {
  float *C, *Bt, *scores;  // (rows, lda), (d_state, lds), (rows, lds): C_t . B_s for s up to t's step
  float *B, *Ct;           // likewise, for the backward pass, else null
  static int64_t size(const Sizes &z, bool backward) {
    return (z.rows + z.across) * (backward ? 2 : 1) + z.scores;
  }
  Packed(float *at, const Sizes &z, bool backward)
      : C(at),
        Bt(C + z.rows),
        scores(Bt + z.across),
        B(backward ? scores + z.scores : nullptr),
        Ct(backward ? B + z.rows : nullptr) {}
};

// Heads and what they need of a tile: the numbers of every row.
struct Rows {
  float dt[MAX_ROWS], log[MAX_ROWS];       // log2 of a step's decay at its first row, else 0
  float before[MAX_ROWS], after[MAX_ROWS];  // decays from the start of the part to this row, and from it to the end

  Rows(const ls_ssd *a, const Tile &tile, int64_t b, int64_t h) {
    for (int j = 0; j < tile.rows; ++j) {
      const int64_t at = (b * a->seq_len + tile.position[j]) * a->n_heads + h;
      dt[j] = a->dt[at];
      log[j] = tile.position[j] % a->rank ? 0.0f : a->log_decay[at] * LOG2E;
    }
    for (int i = 0; i < tile.n_parts; ++i) {
      const Part part = tile.parts[i];
      float sum = 0;
      for (int j = part.begin; j < part.end; ++j) before[j] = sum += log[j];
      sum = 0;
      for (int j = part.end; j-- > part.begin;) after[j] = sum, sum += log[j];
    }
    for (int j = 0; j < tile.rows; j += W) {
      const int n = tile.rows - j < W ? tile.rows - j : W;
      store_n(before + j, exp2_sum(load_n(before + j, n)), n);
      store_n(after + j, exp2_sum(load_n(after + j, n)), n);
    }
  }
  // 2^x; minus infinity, too, is a decay.
  static vec exp2_sum(vec x) { return exp2v(vmax(splat(-200.0f), x)); }
};

// The end of row j's step: all rows before it are visible to row j.
LS_INLINE int visible(const ls_ssd *a, const Part &part, int j) {
  return part.begin + (int)(((j - part.begin) / a->rank + 1) * a->rank);
}
LS_INLINE vec lanes_below(int n) {
  ivec lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return (vec)(lane < (n - ivec{}));
}
LS_INLINE vec masked(vec x, vec mask) { return (vec)((ivec)x & (ivec)mask); }

// (d_head, d_state) <-> panels.
void ssd_pack_state(const ls_ssd *a, float *to, const float *from);
void ssd_unpack_state(const ls_ssd *a, float *to, const float *from);

constexpr int64_t UNITS = 16;       // of parallel work, or more; a block of many heads needs less memory and traffic
constexpr int64_t PACKED = 1 << 20;  // floats to pack at a time, unless one tile is more

// How the heads of a group are divided: from the shape alone, so that sums always run in one order.
struct Blocks {
  int64_t heads, count;  // of a block, but for the last one; of a group
  Blocks(const ls_ssd *a, const Sizes &z) {
    const int64_t most = ls_ceil(UNITS, a->batch * a->n_groups);
    heads = ls_ceil(z.heads, most < z.heads ? most : z.heads);
    count = ls_ceil(z.heads, heads);
  }
};

// Tiles of a segment that takes so many floats per tile.
LS_INLINE int64_t segment_tiles(const Sizes &z, int64_t most, int64_t size) {
  const int64_t tiles = most / size;
  return tiles < 1 ? 1 : tiles < z.n_tiles ? tiles : z.n_tiles;
}

// A segment: tiles [first, first + tiles), packed at `packed`. In the backward pass the blocks' shares of the gradients
// of B and C are at `shares`.
struct Segment {
  const ls_ssd *a;
  Sizes z;
  Blocks blocks;
  int64_t first, tiles;
  float *packed, *shares;

  Packed at(int64_t b, int64_t g, int64_t tile) const {
    const int64_t i = (b * a->n_groups + g) * tiles + tile;
    return Packed(packed + i * Packed::size(z, shares), z, shares);
  }
};

// Heads [h0, h1) of group g of row b.
struct Unit {
  int64_t b, g, block, h0, h1;
  Unit(const Segment *s, int64_t i) {
    block = i % s->blocks.count, i /= s->blocks.count;
    g = i % s->a->n_groups, b = i / s->a->n_groups;
    h0 = g * s->z.heads + block * s->blocks.heads;
    const int64_t end = (g + 1) * s->z.heads;
    h1 = h0 + s->blocks.heads < end ? h0 + s->blocks.heads : end;
  }
  // From a row of head h to the row that a walk in direction `steps` (1 or -1) through the tiles needs next.
  int64_t next(const Segment *s, int64_t h, int64_t steps, int64_t stride_head, int64_t stride_time) const {
    return h + 1 < h1 ? stride_head : (h0 - h) * stride_head + steps * s->z.chunk * stride_time;
  }
};

void ssd_pack(const Segment *segment);  // all of its tiles

// A tile's rows in panels: as they are, or row j times scale[j], or both; null if it is not needed. Returns whether all
// numbers are finite.
bool ssd_take(const ls_rows &from, int64_t offset, const ls_ssd *a, const Sizes &z, const Tile &tile, float *to,
              const float *scale, float *scaled);

// Decays of a part from each row to each later one, with zeros where a tile of results looks ahead of a row. With scores,
// the weights of x in y: scores times decays times dt, and D of its own x.
void ssd_weigh(const ls_ssd *a, const Sizes &z, const Part &part, const Rows &rows, const float *scores, float D,
               float *to);

}  // namespace LS_ISA
