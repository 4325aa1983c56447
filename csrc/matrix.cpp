// y = x W^T for a few rows of x and weights in any stored format: they stream through once, at the speed of memory.
//
// float32 and bfloat16 weights meet float32 activations. int8 and 4-bit weights meet activations rounded to 16 bits,
// relative to the largest of LS_ACTIVATIONS neighbours, so that products and their sums inside a block are exact
// integers; blocks add up in float32. See src/longscan/ops/quant.py for the formats.
#include "matrix.h"

#include "integers.h"

namespace LS_ISA {
namespace {

constexpr int64_t GROUP = W / 4;  // blocks of 32 4-bit weights in one register

#if LS_LANES == 16
constexpr int MAX_ROWS = 6;       // rows by 4 outputs that fill the registers
constexpr bool ONE_BY_ONE = true;  // outputs of a single row: reading as memory lies is what processors foresee best
constexpr int64_t AHEAD = 16384;   // bytes from the weights in use to those to ask for
#else
constexpr int MAX_ROWS = 3;
constexpr bool ONE_BY_ONE = false;  // the sums of one output alone depend on each other for too long
constexpr int64_t AHEAD = 4096;
#endif

// bfloat16 numbers as they come, the first n of them; the others read as zero.
LS_INLINE vec load_bf16(const uint16_t *p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m256i halves = _mm256_maskz_loadu_epi16((__mmask16)((1 << n) - 1), p);
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
  uint32_t bits[W] = {};
  for (int i = 0; i < n; ++i) bits[i] = (uint32_t)p[i] << 16;
  return load_as<vec>(bits);
#endif
}
LS_INLINE float bf16_to_float(uint16_t b) {
  const uint32_t bits = (uint32_t)b << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// --- preparing activations ---

struct Row {  // a prepared row
  const float *x;
  const int16_t *q;       // (n padded to ACT), for 4-bit weights in the order of a register's nibbles
  const int32_t *offset;  // 4-bit: -8 times the sum of the activations under each lane
  const float *scale;     // one per ACT activations
};
LS_INLINE Row row_of(const char *prepared, int64_t n) {
  const int64_t padded = ls_ceil(n, ACT) * ACT;
  return {(const float *)prepared, (const int16_t *)prepared, (const int32_t *)(prepared + 2 * padded),
          (const float *)(prepared + 4 * padded)};
}

// x of bfloat16 weights: in each 2 W the even ones first, as shifting and masking pairs of weights yields them.
void prepare_bf16(const float *x, int64_t n, float *to) {
  const int64_t whole = n / (2 * W) * (2 * W);
  for (int64_t i = 0; i < whole; i += 2 * W)
    for (int j = 0; j < W; ++j) to[i + j] = x[i + 2 * j], to[i + W + j] = x[i + 2 * j + 1];
  for (int64_t i = whole; i < n; ++i) to[i] = x[i];
}

void prepare_integers(const float *x, int64_t n, char *prepared, bool nibbles) {
  const int64_t padded = ls_ceil(n, ACT) * ACT;
  int16_t *q = (int16_t *)prepared;
  int32_t *offset = (int32_t *)(prepared + 2 * padded);
  float *scale = (float *)(prepared + 4 * padded);
  for (int64_t begin = 0; begin < n; begin += ACT) {
    int16_t rounded[ACT];
    scale[begin / ACT] = round_activations(x + begin, n - begin < ACT ? n - begin : ACT, 32767.0f, rounded);
    if (!nibbles) {
      memcpy(q + begin, rounded, sizeof rounded);
      continue;
    }
    for (int64_t group = 0; group < ACT; group += GROUP * BLOCK) {
      int16_t *to = q + begin + group;
      LS_UNROLL
      for (int k = 0; k < 4; ++k)
        for (int64_t block = 0; block < GROUP; ++block)
          memcpy(to + (k * GROUP + block) * 8, rounded + group + block * BLOCK + 8 * k, 16);
      ivec sum = ivec{};
      const hvec ones = hvec{} + 1;
      LS_UNROLL
      for (int k = 0; k < 4; ++k) sum = madd(sum, load_as<hvec>(to + k * 2 * W), ones);
      sum *= -8;
      memcpy(offset + (begin + group) / 8, &sum, sizeof sum);
    }
  }
}

// --- dot products: O outputs of R rows ---
//
// Not inlined, so that no multiplication fuses with what follows in one size of tile and not in another: a row has
// the same bits in every tile.

struct Tile {
  const ls_matrix *m;
  int64_t o;
  const Row *row;
  float *total;  // (R, O)
};

// Tiles read four outputs side by side, and the processor's own prefetching loses its way in pieces that short. So each
// asks for the memory behind its weights, in the order in which it lies, every line once.
template <int BYTES>
LS_INLINE const char *ask(const char *p) {
  LS_UNROLL
  for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i);
  return p + BYTES;
}

template <int R, int O>
LS_INLINE void totals(const Tile *t, const vec (*acc)[O]) {
  LS_UNROLL
  for (int r = 0; r < R; ++r) {
    if (O == 4)
      sum4(t->total + r * O, acc[r]);
    else
      LS_UNROLL
      for (int j = 0; j < O; ++j) t->total[r * O + j] = sum(acc[r][j]);
  }
}

template <int R, int O>
LS_APART void dot_f32(const Tile *t) {
  const int64_t n = t->m->n_in;
  const float *w = (const float *)t->m->data + t->o * n;
  const char *far = (const char *)w + AHEAD;
  vec acc[R][O] = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    if (O > 1) far = ask<4 * O * W>(far);
    LS_UNROLL
    for (int j = 0; j < O; ++j) {
      const vec wj = load(w + j * n + i);
      LS_UNROLL
      for (int r = 0; r < R; ++r) acc[r][j] = fma(wj, load(t->row[r].x + i), acc[r][j]);
    }
  }
  if (i < n)
    LS_UNROLL
    for (int j = 0; j < O; ++j) {
      const vec wj = load_n(w + j * n + i, (int)(n - i));
      LS_UNROLL
      for (int r = 0; r < R; ++r) acc[r][j] = fma(wj, load_n(t->row[r].x + i, (int)(n - i)), acc[r][j]);
    }
  totals<R, O>(t, acc);
}

template <int R, int O>
LS_APART void dot_bf16(const Tile *t) {
  const int64_t n = t->m->n_in;
  const uint16_t *w = (const uint16_t *)t->m->data + t->o * n;
  const char *far = (const char *)w + AHEAD;
  vec acc[R][O] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    if (O > 1) far = ask<4 * O * W>(far);
    LS_UNROLL
    for (int j = 0; j < O; ++j) {
      const ivec pairs = load_as<ivec>(w + j * n + i);
      const vec even = (vec)(pairs << 16), odd = (vec)(pairs & (int32_t)0xffff0000);
      LS_UNROLL
      for (int r = 0; r < R; ++r) {
        acc[r][j] = fma(even, load(t->row[r].x + i), acc[r][j]);
        acc[r][j] = fma(odd, load(t->row[r].x + i + W), acc[r][j]);
      }
    }
  }
  for (; i < n; i += W) {
    const int lanes = n - i < W ? (int)(n - i) : W;
    LS_UNROLL
    for (int j = 0; j < O; ++j) {
      const vec wj = load_bf16(w + j * n + i, lanes);
      LS_UNROLL
      for (int r = 0; r < R; ++r) acc[r][j] = fma(wj, load_n(t->row[r].x + i, lanes), acc[r][j]);
    }
  }
  totals<R, O>(t, acc);
}

// int8 with one scale a row
template <int R, int O>
LS_APART void dot_int8(const Tile *t) {
  const int64_t n = t->m->n_in;
  const int8_t *w = (const int8_t *)t->m->data + t->o * n;
  const char *far = (const char *)w + AHEAD;
  const int16_t *q[R];
  LS_UNROLL
  for (int r = 0; r < R; ++r) q[r] = t->row[r].q;
  vec acc[R][O] = {};
  for (int64_t begin = 0; begin < n; begin += ACT) {
    const int64_t end = begin + ACT < n ? begin + ACT : n;
    ivec sums[R][O] = {};
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W) {
      if (O > 1) far = ask<2 * O * W>(far);
      hvec x[R];
      LS_UNROLL
      for (int r = 0; r < R; ++r) x[r] = load_as<hvec>(q[r] + i);
      LS_UNROLL
      for (int j = 0; j < O; ++j) {
        const hvec wj = widen(w + j * n + i);
        LS_UNROLL
        for (int r = 0; r < R; ++r) sums[r][j] = madd(sums[r][j], wj, x[r]);
      }
    }
    if (i < end)  // the activations are padded with zeros
      LS_UNROLL
      for (int j = 0; j < O; ++j) {
        const hvec wj = widen_n(w + j * n + i, (int)(end - i));
        LS_UNROLL
        for (int r = 0; r < R; ++r) sums[r][j] = madd(sums[r][j], wj, load_as<hvec>(q[r] + i));
      }
    LS_UNROLL
    for (int r = 0; r < R; ++r) {
      const vec scale = splat(t->row[r].scale[begin / ACT]);
      LS_UNROLL
      for (int j = 0; j < O; ++j) acc[r][j] = fma(to_float(sums[r][j]), scale, acc[r][j]);
    }
  }
  totals<R, O>(t, acc);
  const float *scale = (const float *)t->m->scale + t->o;
  LS_UNROLL
  for (int r = 0; r < R; ++r)
    LS_UNROLL
    for (int j = 0; j < O; ++j) t->total[r * O + j] *= scale[j];
}

// int8 with a scale per 32, `blocks` of them, at most 8: the sums of R rows, not yet scaled like the activations.
template <int R>
LS_INLINE void part_int8_blocks(const int8_t *w, const uint16_t *scale, const Row *row, int64_t begin, int64_t blocks,
                                vec *part) {
  const Scales scales = scales_of(scale, blocks);
  LS_UNROLL
  for (int b = 0; b < blocks; ++b) {
    ivec sums[R] = {};
    LS_UNROLL
    for (int i = 0; i < BLOCK; i += 2 * W) {
      const hvec weights = widen(w + b * BLOCK + i);
      LS_UNROLL
      for (int r = 0; r < R; ++r) sums[r] = madd(sums[r], weights, load_as<hvec>(row[r].q + begin + b * BLOCK + i));
    }
    LS_UNROLL
    for (int r = 0; r < R; ++r) part[r] = fma(to_float(sums[r]), one_of(scales, b), part[r]);
  }
}

template <int R, int O>
LS_APART void dot_int8_blocks(const Tile *t) {
  const int64_t n = t->m->n_in, n_blocks = n / BLOCK;
  const int8_t *w = (const int8_t *)t->m->data + t->o * n;
  const uint16_t *scale = (const uint16_t *)t->m->scale + t->o * n_blocks;
  const char *far = (const char *)w + AHEAD;
  vec acc[R][O] = {};
  for (int64_t begin = 0; begin < n; begin += ACT) {
    LS_UNROLL
    for (int j = 0; j < O; ++j) {
      vec part[R] = {};
      const int8_t *from = w + j * n + begin;
      if (O > 1) far = ask<ACT>(far);
      const uint16_t *scales = scale + j * n_blocks + begin / BLOCK;
      if (begin + ACT <= n)
        part_int8_blocks<R>(from, scales, t->row, begin, ACT / BLOCK, part);
      else
        part_int8_blocks<R>(from, scales, t->row, begin, (n - begin) / BLOCK, part);
      LS_UNROLL
      for (int r = 0; r < R; ++r) acc[r][j] = fma(part[r], splat(t->row[r].scale[begin / ACT]), acc[r][j]);
    }
  }
  totals<R, O>(t, acc);
}

// The same for 4 bits and P outputs, which share the activations they load: n_in is a multiple of 32.
template <int R, int P>
LS_INLINE void part_int4(const uint8_t *w, int64_t stride, const uint16_t *scale, int64_t scale_stride,
                         const Row *row, int64_t begin, int64_t blocks, vec (*part)[P]) {
  Scales scales[P];
  LS_UNROLL
  for (int j = 0; j < P; ++j) scales[j] = scales_of(scale + j * scale_stride, blocks);
  const uvec low = uvec{} + 15;
  LS_UNROLL
  for (int b = 0; b < blocks; b += GROUP) {
    hvec nibbles[P][4];
    vec scaled[P];
    LS_UNROLL
    for (int j = 0; j < P; ++j) {
      const uint8_t *from = w + j * stride + b * (BLOCK / 2);
      uvec words;
      if (b + GROUP <= blocks) {
        words = load_as<uvec>(from);
      } else {
        uint8_t rest[4 * W] = {};
        memcpy(rest, from, (size_t)(blocks - b) * (BLOCK / 2));
        words = load_as<uvec>(rest);
      }
      LS_UNROLL
      for (int k = 0; k < 4; ++k) nibbles[j][k] = (hvec)(k == 3 ? words >> 12 : words >> 4 * k & low);
      scaled[j] = spread(scales[j], b);
    }
    const int64_t at = begin + b * BLOCK;
    LS_UNROLL
    for (int r = 0; r < R; ++r) {
      ivec sums[P];
      LS_UNROLL
      for (int j = 0; j < P; ++j) sums[j] = load_as<ivec>(row[r].offset + at / 8);
      LS_UNROLL
      for (int k = 0; k < 4; ++k) {
        const hvec x = load_as<hvec>(row[r].q + at + k * 2 * W);
        LS_UNROLL
        for (int j = 0; j < P; ++j) sums[j] = madd(sums[j], nibbles[j][k], x);
      }
      LS_UNROLL
      for (int j = 0; j < P; ++j) part[r][j] = fma(to_float(sums[j]), scaled[j], part[r][j]);
    }
  }
}

template <int R, int O>
LS_APART void dot_int4(const Tile *t) {
  constexpr int P = R > 1 && O > 1 && W == 16 ? 2 : 1;
  const int64_t n = t->m->n_in, n_blocks = n / BLOCK;
  const uint8_t *w = (const uint8_t *)t->m->data + t->o * (n / 2);
  const uint16_t *scale = (const uint16_t *)t->m->scale + t->o * n_blocks;
  const char *far = (const char *)w + AHEAD;
  vec acc[R][O] = {};
  for (int64_t begin = 0; begin < n; begin += ACT) {
    LS_UNROLL
    for (int j = 0; j < O; j += P) {
      vec part[R][P] = {};
      const uint8_t *from = w + (j * n + begin) / 2;
      if (O > 1) far = ask<P * ACT / 2>(far);
      const uint16_t *scales = scale + j * n_blocks + begin / BLOCK;
      if (begin + ACT <= n)
        part_int4<R, P>(from, n / 2, scales, n_blocks, t->row, begin, ACT / BLOCK, part);
      else
        part_int4<R, P>(from, n / 2, scales, n_blocks, t->row, begin, (n - begin) / BLOCK, part);
      LS_UNROLL
      for (int r = 0; r < R; ++r)
        LS_UNROLL
        for (int p = 0; p < P; ++p)
          acc[r][j + p] = fma(part[r][p], splat(t->row[r].scale[begin / ACT]), acc[r][j + p]);
    }
  }
  totals<R, O>(t, acc);
}

template <int R, int O>
void dot(const Tile *t) {
  switch (t->m->format) {
    case LS_F32: return dot_f32<R, O>(t);
    case LS_BF16: return dot_bf16<R, O>(t);
    case LS_INT8: return dot_int8<R, O>(t);
    case LS_INT8_BLOCKS: return dot_int8_blocks<R, O>(t);
    default: return dot_int4<R, O>(t);
  }
}

template <int R, int O>
LS_INLINE void tile(const Product *p, const Row *rows, int64_t row, int64_t o) {
  float total[R * O];
  const Tile t = {p->matrix, o, rows + row, total};
  dot<R, O>(&t);
  const float *bias = p->matrix->bias;
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < O; ++j) {
      float *y = p->y + (row + r) * p->stride + o + j;
      const float value = total[r * O + j] + (bias ? bias[o + j] : 0.0f);
      *y = p->add ? *y + value : value;
    }
}

template <int O>
LS_INLINE void all_rows(const Product *p, const Row *rows, int64_t n, int64_t o) {
  int64_t row = 0;
  for (; row + MAX_ROWS <= n; row += MAX_ROWS) tile<MAX_ROWS, O>(p, rows, row, o);
  if (MAX_ROWS > 4 && row + 4 <= n) tile<4, O>(p, rows, row, o), row += 4;
  if (MAX_ROWS > 2 && row + 2 <= n) tile<2, O>(p, rows, row, o), row += 2;
  if (row < n) tile<1, O>(p, rows, row, o);
}

}  // namespace

void prepare(const ls_matrix *m, const float *x, char *prepared) {
  memcpy(prepared + formatted_bytes(m->n_in), x, 4 * (size_t)m->n_in);
  if (m->format == LS_F32)
    memcpy(prepared, x, 4 * (size_t)m->n_in);
  else if (m->format == LS_BF16)
    prepare_bf16(x, m->n_in, (float *)prepared);
  else
    prepare_integers(x, m->n_in, prepared, m->format == LS_INT4);
}

namespace {

void product_of(const Product *p, int64_t begin, int64_t end) {
  constexpr int64_t BATCH = 96;  // rows that go over the weights together
  const int64_t bytes_of_row = prepared_bytes(p->matrix->n_in);
  Row rows[BATCH];
  for (int64_t first = 0; first < p->rows; first += BATCH) {
    const int64_t n = p->rows - first < BATCH ? p->rows - first : BATCH;
    for (int64_t r = 0; r < n; ++r) rows[r] = row_of(p->prepared + (first + r) * bytes_of_row, p->matrix->n_in);
    Product part = *p;
    part.y += first * p->stride;
    int64_t o = begin;
    if (n > 1 || !ONE_BY_ONE)
      for (; o + 4 <= end; o += 4) all_rows<4>(&part, rows, n, o);
    for (; o < end; ++o) all_rows<1>(&part, rows, n, o);
  }
}

// y += scale B A x of outputs [begin, end). Every unit of work computes A x anew: A is small, and waiting takes longer.
LS_APART void adapt(const Product *p, int64_t begin, int64_t end) {
  constexpr int64_t BATCH = 8;
  const ls_adapter *low = p->matrix->adapter;
  const int64_t rank = low->A.n_out, n = p->matrix->n_in, size = prepared_bytes(n);
  float narrow[BATCH * LS_MAX_ADAPTER];
  alignas(64) char rows[BATCH * (LS_MAX_ADAPTER * 8 + 128)];  // prepared
  for (int64_t first = 0; first < p->rows; first += BATCH) {
    const int64_t count = p->rows - first < BATCH ? p->rows - first : BATCH;
    // the numbers of a row, so many bytes from those of the one before, are what float32 multiplies by
    const Product down = {&low->A, p->prepared + first * size + formatted_bytes(n), count, narrow, rank, false};
    product_of(&down, 0, rank);
    for (int64_t i = 0; i < count * rank; ++i) narrow[i] *= (float)low->scale;
    for (int64_t r = 0; r < count; ++r) prepare(&low->B, narrow + r * rank, rows + r * prepared_bytes(rank));
    const Product up = {&low->B, rows, count, p->y + first * p->stride, p->stride, true};
    product_of(&up, begin, end);
  }
}

}  // namespace

void outputs(const Product *p, int64_t begin, int64_t end) {
  product_of(p, begin, end);
  if (p->matrix->adapter) adapt(p, begin, end);
}

void dequantize_row(const ls_matrix *m, int64_t o, float *weight) {
  const int64_t n = m->n_in;
  if (m->format == LS_F32) {
    memcpy(weight, (const float *)m->data + o * n, 4 * (size_t)n);
  } else if (m->format == LS_BF16) {
    const uint16_t *w = (const uint16_t *)m->data + o * n;
    for (int64_t i = 0; i < n; ++i) weight[i] = bf16_to_float(w[i]);
  } else if (m->format == LS_INT8) {
    const int8_t *w = (const int8_t *)m->data + o * n;
    const float scale = ((const float *)m->scale)[o];
    for (int64_t i = 0; i < n; ++i) weight[i] = (float)w[i] * scale;
  } else {
    const uint16_t *scale = (const uint16_t *)m->scale + o * (n / BLOCK);
    for (int64_t b = 0; b < n / BLOCK; ++b) {
      const float s = half_to_float(scale[b]);
      float *to = weight + b * BLOCK;
      if (m->format == LS_INT8_BLOCKS) {
        const int8_t *w = (const int8_t *)m->data + o * n + b * BLOCK;
        for (int i = 0; i < BLOCK; ++i) to[i] = (float)w[i] * s;
      } else {
        uint16_t words[8];
        memcpy(words, (const uint8_t *)m->data + (o * n + b * BLOCK) / 2, 16);
        LS_UNROLL
        for (int k = 0; k < 4; ++k)
          for (int j = 0; j < 8; ++j) to[8 * k + j] = (float)((words[j] >> 4 * k & 15) - 8) * s;
      }
    }
  }
}

// --- the ops of their own ---

namespace {
struct Multiply {
  const ls_matrix *matrix;
  const float *x;
  char *prepared;
  Product product;
};
constexpr int64_t OUTPUTS = 32;  // outputs of one unit of parallel work

void prepare_task(int64_t begin, int64_t end, void *context) {
  const Multiply *a = (const Multiply *)context;
  const int64_t n = a->matrix->n_in;
  for (int64_t r = begin; r < end; ++r) prepare(a->matrix, a->x + r * n, a->prepared + r * prepared_bytes(n));
}
void multiply_task(int64_t begin, int64_t end, void *context) {
  const Multiply *a = (const Multiply *)context;
  const int64_t n_out = a->matrix->n_out;
  outputs(&a->product, begin * OUTPUTS, end * OUTPUTS < n_out ? end * OUTPUTS : n_out);
}
struct Dequantize {
  const ls_matrix *matrix;
  float *weight;
};
void dequantize_task(int64_t begin, int64_t end, void *context) {
  const Dequantize *a = (const Dequantize *)context;
  const int64_t n_out = a->matrix->n_out;
  for (int64_t o = begin * OUTPUTS; o < (end * OUTPUTS < n_out ? end * OUTPUTS : n_out); ++o)
    dequantize_row(a->matrix, o, a->weight + o * a->matrix->n_in);
}
}  // namespace

int32_t multiply(const ls_matrix *matrix, const float *x, float *y, int64_t rows, char *workspace) {
  Multiply args = {matrix, x, workspace, {matrix, workspace, rows, y, matrix->n_out, false}};
  if (rows > 4)
    ls_run(rows, prepare_task, &args);
  else
    prepare_task(0, rows, &args);
  ls_run(ls_ceil(matrix->n_out, OUTPUTS), multiply_task, &args);
  return 0;
}

int64_t multiply_workspace(int64_t rows, int64_t n_in) { return rows * prepared_bytes(n_in); }

int32_t dequantize(const ls_matrix *matrix, float *weight) {
  Dequantize args = {matrix, weight};
  ls_run(ls_ceil(matrix->n_out, OUTPUTS), dequantize_task, &args);
  return 0;
}

}  // namespace LS_ISA
