// y = x W^T for many rows of x and weights in 8 or 4 bits, multiplied as integers.
//
// Activations are rounded to 16 or 8 bits, relative to the largest of LS_ACTIVATIONS neighbours in a row, so that no
// row depends on another. Products and their sums over the weights of one scale are exact integers, and those add up in
// float32 in the order of the weights: a result has the same bits in every tile and with every instruction set that
// fuses multiplications with additions.
//
// Weights are unpacked a panel at a time: PANEL outputs by LS_ACTIVATIONS weights, as a sequence of steps. One step
// multiplies a 32-bit word of activations, two of 16 bits or four of 8, by the C vectors of the panel.
#include <type_traits>
#include <utility>

#include "integers.h"
#include "kernels.h"

namespace LS_ISA {
namespace {

#if LS_LANES == 16
constexpr int C = 4;  // R x C vectors of results fill the registers
#else
constexpr int C = 2;
#endif
constexpr int R = 6;
constexpr int64_t PANEL = C * W;
constexpr int64_t ROWS = 512;  // that go over an unpacked panel, at most
constexpr int64_t UNITS = 32;  // of parallel work, at least, if there are rows
typedef int16_t block16 __attribute__((vector_size(2 * BLOCK)));
typedef uint8_t block8 __attribute__((vector_size(BLOCK)));

#if defined(__AVX512VNNI__)
constexpr bool QUADS = true;  // whether a step can multiply four 8-bit activations
constexpr int SHIFT = 128;    // what makes them unsigned, as its instruction takes them
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool QUADS = true;
constexpr int SHIFT = 0;
#else
constexpr bool QUADS = false;  // 8-bit activations go as 16-bit ones
constexpr int SHIFT = 0;
#endif

struct Gemm {
  const ls_matrix *m;
  const float *x;
  float *y;
  int64_t rows, bits;
  int16_t *q;    // (rows, words) of 32 bits, in the order of the steps
  float *scale;  // (rows, ceil(n_in / ACT))
  int64_t rows_of_unit;

  bool quads() const { return QUADS && bits == 8; }
  int64_t words() const { return ls_ceil(m->n_in, ACT) * ACT / (quads() ? 4 : 2); }  // of a row
  int64_t parts() const { return ls_ceil(m->n_in, ACT); }
  int64_t panels() const { return ls_ceil(m->n_out, PANEL); }
};

// acc + the products of a step: signed weights, activations of 16 bits or (quads) of 8, to which SHIFT was added.
template <bool Q>
LS_INLINE ivec multiply_step(ivec acc, hvec weights, ivec x) {
#if defined(__AVX512VNNI__)
  if (Q) return (ivec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, (__m512i)weights);
#elif defined(__ARM_FEATURE_DOTPROD)
  if (Q) return (ivec)vdotq_s32((int32x4_t)acc, (int8x16_t)weights, (int8x16_t)x);
#endif
  return madd(acc, weights, (hvec)x);
}

// --- activations ---

// The order in which a block of 32 activations meets the weights that the functions below unpack.
LS_INLINE block16 in_order(block16 v, bool nibbles, bool quads) {
  if (nibbles != quads) return v;
  if (!nibbles)
    return __builtin_shufflevector(v, v, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 16, 18, 17, 19, 20, 22,
                                   21, 23, 24, 26, 25, 27, 28, 30, 29, 31);
  return __builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26,
                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

void activations_task(int64_t begin, int64_t end, void *context) {
  const Gemm *a = (const Gemm *)context;
  const int64_t n = a->m->n_in, bytes = 4 * a->words();
  const bool nibbles = a->m->format == LS_INT4, quads = a->quads();
  for (int64_t row = begin; row < end; ++row) {
    char *to = (char *)a->q + row * bytes;
    for (int64_t part = 0; part < a->parts(); ++part) {
      const int64_t at = part * ACT;
      int16_t rounded[ACT];
      a->scale[row * a->parts() + part] =
          round_activations(a->x + row * n + at, n - at < ACT ? n - at : ACT, a->bits == 8 ? 127.0f : 32767.0f, rounded);
      for (int64_t i = 0; i < ACT; i += BLOCK) {
        const block16 v = in_order(load_as<block16>(rounded + i), nibbles, quads);
        if (quads) {
          const block8 bytes_of = __builtin_convertvector(v + SHIFT, block8);
          memcpy(to, &bytes_of, sizeof bytes_of), to += sizeof bytes_of;
        } else {
          memcpy(to, &v, sizeof v), to += sizeof v;
        }
      }
    }
  }
}

// --- weights ---

// Turn W rows of W words into columns.
template <int S, int... I>
LS_INLINE void exchange(ivec *v, std::integer_sequence<int, I...>) {  // of squares of S x S words off the diagonal
  LS_UNROLL
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const ivec a = v[i], b = v[i + S];
    v[i] = __builtin_shufflevector(a, b, (I & S ? W + I - S : I)...);
    v[i + S] = __builtin_shufflevector(a, b, (I & S ? W + I : I + S)...);
  }
}
LS_INLINE void transpose(ivec *v) {
  const std::make_integer_sequence<int, W> lanes;
  if (W > 8) exchange<W / 2>(v, lanes);
  if (W > 4) exchange<W < 8 ? 1 : 4>(v, lanes);
  exchange<2>(v, lanes);
  exchange<1>(v, lanes);
}

struct Panel {
  int16_t *weights;           // (steps, C, 2 W)
  float scale[ACT / BLOCK][PANEL];  // of the weights, per block; one for all of them if rows have scales
  int32_t offset[ACT / BLOCK][PANEL];  // quads: what SHIFT adds to the products is taken off here
};

// Unpack `bytes` bytes of W outputs, of which `outputs` exist, to column c of a panel.
template <bool NIBBLES, bool Q>
LS_INLINE void unpack(const int8_t *from, int64_t stride, int64_t outputs, int64_t bytes, int16_t *panel, int c) {
  auto put = [&](int64_t step, hvec v) { memcpy(panel + (step * C + c) * 2 * W, &v, sizeof v); };
  for (int64_t at = 0; at < bytes; at += 4 * W) {
    ivec words[W];
    const int64_t left = bytes - at < 4 * W ? bytes - at : 4 * W;
    for (int i = 0; i < W; ++i) {
      if (i < outputs && left == 4 * W) {
        words[i] = load_as<ivec>(from + i * stride + at);
      } else {
        words[i] = ivec{};
        if (i < outputs) memcpy(&words[i], from + i * stride + at, (size_t)left);
      }
    }
    transpose(words);
    const int64_t n = ls_ceil(left, 4);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t word = at / 4 + i;
      if (!NIBBLES && Q) {
        put(word, (hvec)words[i]);
      } else if (!NIBBLES) {
        put(2 * word, (hvec)words[i] << 8 >> 8);
        put(2 * word + 1, (hvec)words[i] >> 8);
      } else if (Q) {  // a block of weights is 4 words
        const ivec low = (ivec{} + 0x0f0f0f0f), eight = (ivec{} + 0x08080808);
        typedef int8_t all __attribute__((vector_size(4 * LS_LANES)));
        put(word / 4 * 8 + word % 4, (hvec)((all)(words[i] & low) - (all)eight));
        put(word / 4 * 8 + 4 + word % 4, (hvec)((all)(words[i] >> 4 & low) - (all)eight));
      } else {
        LS_UNROLL
        for (int k = 0; k < 4; ++k) put(word / 4 * 16 + 4 * k + word % 4, ((hvec)words[i] >> 4 * k & 15) - 8);
      }
    }
  }
}

// The panel of outputs from o on and of the weights from `begin` on; the number of its steps.
template <bool NIBBLES, bool Q>
LS_APART int64_t fill(const ls_matrix *m, int64_t o, int64_t begin, Panel *panel) {
  const int64_t n = m->n_in, length = n - begin < ACT ? n - begin : ACT;
  const int64_t stride = NIBBLES ? n / 2 : n, from = NIBBLES ? begin / 2 : begin, bytes = NIBBLES ? length / 2 : length;
  for (int c = 0; c < C; ++c) {
    const int64_t first = o + c * W, outputs = m->n_out - first < W ? m->n_out - first : W;
    if (outputs > 0)
      unpack<NIBBLES, Q>((const int8_t *)m->data + first * stride + from, stride, outputs, bytes, panel->weights, c);
  }
  const int64_t blocks = m->format == LS_INT8 ? 1 : length / BLOCK;
  const int64_t outputs = m->n_out - o < PANEL ? m->n_out - o : PANEL;
  if (m->format == LS_INT8) {
    memcpy(panel->scale[0], (const float *)m->scale + o, sizeof(float) * (size_t)outputs);
  } else {
    for (int64_t i = 0; i < outputs; ++i) {
      const uint16_t *scale = (const uint16_t *)m->scale + (o + i) * (n / BLOCK) + begin / BLOCK;
      float all[8];
      eight_scales(all, scale, blocks);
      for (int64_t b = 0; b < blocks; ++b) panel->scale[b][i] = all[b];
    }
  }
  const int64_t steps = ls_ceil(length, 4) * (Q ? 1 : 2);
  if (Q && SHIFT)
    for (int64_t b = 0; b < blocks; ++b)
      for (int c = 0; c < C; ++c) {
        ivec sum = ivec{};
        const int64_t last = blocks == 1 ? steps : (b + 1) * (BLOCK / 4);
        for (int64_t step = b * (BLOCK / 4); step < last; ++step)
          sum = multiply_step<Q>(sum, load_as<hvec>(panel->weights + (step * C + c) * 2 * W), ivec{} + 0x01010101);
        sum *= -SHIFT;
        memcpy(panel->offset[b] + c * W, &sum, sizeof sum);
      }
  return steps;
}

// --- products ---

struct Tile {
  const Gemm *a;
  const Panel *panel;
  float *sums;  // of the parts before, from this row on (rows, PANEL)
  int64_t row, o, part, steps;
};

// N rows by the first V vectors of a panel, over one part of the weights.
template <int N, int V, bool BLOCKS, bool Q>
LS_APART void multiply_tile(const Tile *t) {
  const Gemm *a = t->a;
  const int64_t words = a->words(), length = BLOCKS ? BLOCK / (Q ? 4 : 2) : t->steps;
  const int32_t *x = (const int32_t *)a->q + t->row * words + t->part * (ACT / (Q ? 4 : 2));
  const int16_t *weights = t->panel->weights;
  vec total[N][V];
  for (int64_t b = 0; b * length < t->steps; ++b) {
    ivec sums[N][V];
    LS_UNROLL
    for (int c = 0; c < V; ++c) {
      const ivec first = Q && SHIFT ? load_as<ivec>(t->panel->offset[b] + c * W) : ivec{};
      LS_UNROLL
      for (int r = 0; r < N; ++r) sums[r][c] = first;
    }
    for (int64_t step = 0; step < length; ++step, weights += C * 2 * W, ++x) {
      hvec w[V];
      LS_UNROLL
      for (int c = 0; c < V; ++c) w[c] = load_as<hvec>(weights + c * 2 * W);
      LS_UNROLL
      for (int r = 0; r < N; ++r) {
        const ivec word = ivec{} + x[r * words];
        LS_UNROLL
        for (int c = 0; c < V; ++c) sums[r][c] = multiply_step<Q>(sums[r][c], w[c], word);
      }
    }
    LS_UNROLL
    for (int c = 0; c < V; ++c) {
      const vec scale = load(t->panel->scale[b] + c * W);
      LS_UNROLL
      for (int r = 0; r < N; ++r)
        total[r][c] = BLOCKS && b ? fma(to_float(sums[r][c]), scale, total[r][c]) : to_float(sums[r][c]) * scale;
    }
  }
  const float *scale = a->scale + t->row * a->parts() + t->part;
  const bool last = t->part + 1 == a->parts();
  LS_UNROLL
  for (int c = 0; c < V; ++c) {
    const int64_t o = t->o + c * W, left = a->m->n_out - o;
    const int lanes = left < 0 ? 0 : left < W ? (int)left : W;
    LS_UNROLL
    for (int r = 0; r < N; ++r) {
      float *sum = t->sums + r * PANEL + c * W;
      const vec y = fma(total[r][c], splat(scale[r * a->parts()]), load(sum));
      if (!last)
        store(sum, y);
      else
        store_n(a->y + (t->row + r) * a->m->n_out + o, y, lanes);
    }
  }
}

template <int N, int V, bool BLOCKS, bool Q>
LS_INLINE void next_rows(Tile *t) {
  multiply_tile<N, V, BLOCKS, Q>(t);
  t->row += N, t->sums += N * PANEL;
}
template <int V, bool BLOCKS, bool Q>
void multiply_rows(Tile t, int64_t end) {
  while (t.row + R <= end) next_rows<R, V, BLOCKS, Q>(&t);
  if (t.row + 4 <= end) next_rows<4, V, BLOCKS, Q>(&t);
  if (t.row + 2 <= end) next_rows<2, V, BLOCKS, Q>(&t);
  if (t.row < end) next_rows<1, V, BLOCKS, Q>(&t);
}
template <bool BLOCKS, bool Q>
void multiply_panel(const Tile &t, int64_t end) {
  const int64_t left = t.a->m->n_out - t.o;  // the last panel may be narrow
  if (left <= W)
    multiply_rows<1, BLOCKS, Q>(t, end);
  else if (C > 2 && left <= 2 * W)
    multiply_rows<2, BLOCKS, Q>(t, end);
  else
    multiply_rows<C, BLOCKS, Q>(t, end);
}

template <bool Q>
void panel_task(int64_t begin, int64_t end, void *context) {
  const Gemm *a = (const Gemm *)context;
  const int64_t n_out = a->m->n_out;
  float *sums = LS_STACK(float, a->rows_of_unit * PANEL);  // y itself is too far apart for the caches
  alignas(64) int16_t weights[ACT * PANEL];
  Panel panel;
  memset(&panel, 0, sizeof panel);
  memset(weights, 0, sizeof weights);
  panel.weights = weights;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t o = unit % a->panels() * PANEL, first = unit / a->panels() * a->rows_of_unit;
    const int64_t last = first + a->rows_of_unit < a->rows ? first + a->rows_of_unit : a->rows;
    float bias[PANEL] = {};
    if (a->m->bias) memcpy(bias, a->m->bias + o, sizeof(float) * (size_t)(n_out - o < PANEL ? n_out - o : PANEL));
    for (int64_t row = 0; row < last - first; ++row) memcpy(sums + row * PANEL, bias, sizeof bias);
    for (int64_t part = 0; part < a->parts(); ++part) {
      const bool nibbles = a->m->format == LS_INT4;
      const int64_t steps = (nibbles ? fill<true, Q> : fill<false, Q>)(a->m, o, part * ACT, &panel);
      const Tile tile = {a, &panel, sums, first, o, part, steps};
      if (a->m->format == LS_INT8)
        multiply_panel<false, Q>(tile, last);
      else
        multiply_panel<true, Q>(tile, last);
    }
  }
}

}  // namespace

// n steps of a tile whose operands stay in the first cache.
void probe_multiply(int64_t n, int64_t bits, float *sink) {
  constexpr int64_t STEPS = 32;
  alignas(64) int16_t weights[STEPS * C * 2 * W];
  int16_t x[R * STEPS * 2];
  for (int64_t i = 0; i < STEPS * C * 2 * W; ++i) weights[i] = (int16_t)(i % 7);
  for (int64_t i = 0; i < R * STEPS * 2; ++i) x[i] = (int16_t)(i % 5);
  const auto run = [&](auto quads) {
    ivec sums[R][C] = {};
    for (int64_t i = 0; i < n; i += STEPS)
      for (int64_t step = 0; step < STEPS; ++step)
        LS_UNROLL
        for (int r = 0; r < R; ++r) {
          int32_t word;
          memcpy(&word, x + (r * STEPS + step) * 2, sizeof word);
          LS_UNROLL
          for (int c = 0; c < C; ++c)
            sums[r][c] = multiply_step<quads>(sums[r][c], load_as<hvec>(weights + (step * C + c) * 2 * W), ivec{} + word);
        }
    ivec all = ivec{};
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) all ^= sums[r][c];
    *sink = sum(to_float(all));
  };
  if (QUADS && bits == 8)
    run(std::integral_constant<bool, QUADS>());
  else
    run(std::integral_constant<bool, false>());
}
int64_t products_of_step(int64_t bits) { return PANEL * R * (QUADS && bits == 8 ? 4 : 2); }

int32_t quant_gemm(const ls_matrix *matrix, const float *x, float *y, int64_t rows, int64_t bits, char *workspace) {
  Gemm a = {matrix, x, y, rows, bits, (int16_t *)workspace, nullptr, 0};
  a.scale = (float *)(workspace + rows * 4 * a.words());
  a.rows_of_unit = ls_ceil(rows, ls_ceil(rows, ROWS));
  while (a.panels() * ls_ceil(rows, a.rows_of_unit) < UNITS && a.rows_of_unit > 16 * R)
    a.rows_of_unit = ls_ceil(a.rows_of_unit, 2);
  ls_run(rows, activations_task, &a);
  ls_run(a.panels() * ls_ceil(rows, a.rows_of_unit), a.quads() ? panel_task<QUADS> : panel_task<false>, &a);
  return 0;
}

}  // namespace LS_ISA
