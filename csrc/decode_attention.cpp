// Causal attention over a KV cache, and gated MLPs, while decoding.
#include <math.h>

#include "decode.h"

namespace LS_ISA {
namespace {

constexpr int64_t BLOCK = 64;   // cached tokens at a time, and of a unit: they begin at multiples of these, so that
constexpr int64_t SPAN = 1024;  // sums do not depend on the call

// Turn the pairs (x_i, x_{i + half}) of a head by their angles.
void rotate(float *x, const float *cosines, const float *sines, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

int64_t ls_min(int64_t a, int64_t b) { return a < b ? a : b; }

// How many spans the longest sequence has.
int64_t spans_of(const ls_decode *a, const ls_state *state) {
  int64_t longest = 0;
  for (int64_t b = 0; b < a->batch; ++b) longest = state->length[b] > longest ? state->length[b] : longest;
  return ls_ceil(longest + a->steps, SPAN);
}

// scores (R, BLOCK) = scale q K' for R queries and T cached tokens. A token's row in the block that follows, `ahead`
// numbers on, is asked for meanwhile.
template <int R, int T>
LS_INLINE void score(const float *q, const float *K, int64_t stride, int64_t ahead, float scale, int64_t d,
                     float *scores) {
  vec sums[R][T] = {};
  for (int64_t i = 0; i < d; i += W) {
    const int lanes = d - i < W ? (int)(d - i) : W;
    vec k[T];
    for (int t = 0; t < T; ++t) k[t] = load_n(K + t * stride + i, lanes);
    for (int r = 0; r < R; ++r) {
      const vec x = load_n(q + r * d + i, lanes);
      for (int t = 0; t < T; ++t) sums[r][t] = fma(x, k[t], sums[r][t]);
    }
    for (int t = 0; ahead && t < T; ++t) __builtin_prefetch(K + t * stride + ahead + i);
  }
  for (int r = 0; r < R; ++r) {
    float s[T];
    if constexpr (T == 4)
      sum4(s, sums[r]);
    else
      for (int t = 0; t < T; ++t) s[t] = sum(sums[r][t]);
    for (int t = 0; t < T; ++t) scores[r * BLOCK + t] = scale * s[t];
  }
}

// C vectors of channels of y (R, d) = fade y + weights V, over `count` cached tokens.
template <int R, int C>
LS_INLINE void gather(const float *weights, const float *fade, const float *V, int64_t count, int64_t stride,
                      int64_t ahead, int64_t d, int lanes, float *y) {
  vec sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = load_n(y + r * d + c * W, lanes) * splat(fade[r]);
  for (int64_t s = 0; s < count; ++s) {
    const float *from = V + s * stride;
    vec v[C];
    for (int c = 0; c < C; ++c) v[c] = load_n(from + c * W, lanes);
    for (int c = 0; ahead && c < C; ++c) __builtin_prefetch(from + ahead + c * W);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sums[r][c] = fma(splat(weights[r * BLOCK + s]), v[c], sums[r][c]);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store_n(y + r * d + c * W, sums[r][c], lanes);
}

// What R queries have taken in: y (R, d) = sum of exp(score - largest) V, and the sum of these weights.
struct Reading {
  const float *q;
  float *y, *largest, *total;
};

template <int R>
LS_APART void read_block(const Reading &to, const float *K, const float *V, int64_t count, int64_t stride,
                         int64_t ahead, float scale, int64_t d) {
  constexpr int T = W == 16 || R < 3 ? 4 : 2;                             // tokens, and
  constexpr int C = W == 16 || R == 2 ? 4 : R == 1 ? 8 : R == 3 ? 3 : 2;  // vectors whose sums fit the registers
  float weights[R * BLOCK], fade[R];
  int64_t s = 0;
  for (; s + T <= count; s += T) score<R, T>(to.q, K + s * stride, stride, ahead, scale, d, weights + s);
  for (; s < count; ++s) score<R, 1>(to.q, K + s * stride, stride, ahead, scale, d, weights + s);
  for (int r = 0; r < R; ++r) {
    float *w = weights + r * BLOCK, most = to.largest[r];
    for (s = 0; s < count; ++s) most = w[s] > most ? w[s] : most;
    fade[r] = expv(splat(to.largest[r] - most))[0];
    for (s = 0; s < count; s += W) {
      const int lanes = count - s < W ? (int)(count - s) : W;
      store_n(w + s, expv(load_n(w + s, lanes) - splat(most)), lanes);
    }
    float total = to.total[r] * fade[r];
    for (s = 0; s < count; ++s) total += w[s];
    to.largest[r] = most, to.total[r] = total;
  }
  int64_t i = 0;
  for (; i + C * W <= d; i += C * W) gather<R, C>(weights, fade, V + i, count, stride, ahead, d, W, to.y + i);
  for (; i + W <= d; i += W) gather<R, 1>(weights, fade, V + i, count, stride, ahead, d, W, to.y + i);
  if (i < d) gather<R, 1>(weights, fade, V + i, count, stride, ahead, d, (int)(d - i), to.y + i);
}

vec gelu(vec x) {
  float lane[W];
  store(lane, x);
  for (int i = 0; i < W; ++i) lane[i] = 0.5f * lane[i] * (1.0f + erff(lane[i] * (float)M_SQRT1_2));
  return load(lane);
}

// One layer at work on one call: rows of [q; k; v], and what every span of cached tokens gave every query.
struct Attention {
  const Member *me;
  const ls_attention *l;
  const ls_state *state;
  int64_t d, queries, stride, spans;  // queries of a head of keys, floats of a cached token

  Attention(const Member *me, const ls_attention *l, const ls_state *state)
      : me(me), l(l), state(state), d(l->d_head), queries(l->n_heads / l->n_kv_heads),
        stride(l->n_kv_heads * l->d_head), spans(spans_of(me->a, state)) {}

  float *row(int64_t row) const { return me->s->wide + row * (l->n_heads * d + 2 * stride); }
  int64_t position(int64_t b, int64_t t) const { return state->length[b] + t; }
  float *keys(int64_t b) const { return state->k + b * state->capacity * stride; }
  float *values(int64_t b) const { return state->v + b * state->capacity * stride; }
  Reading reading(int64_t row, int64_t span, int64_t head) const {
    float *y = me->s->partials + (((row * spans + span) * l->n_kv_heads) + head) * queries * (d + 2);
    return {this->row(row) + head * queries * d, y, y + queries * d, y + queries * (d + 1)};
  }

  // Rotate the queries of one head of keys and put its new keys and values into the cache.
  void put(int64_t b, int64_t head) const {
    const int64_t E = l->n_heads * d, half = l->n_rotated / 2;
    float *cosines = LS_STACK(float, half + 1), *sines = LS_STACK(float, half + 1);
    for (int64_t t = 0; t < me->a->steps; ++t) {
      const int64_t at = position(b, t);
      float *q = row(b * me->a->steps + t) + head * queries * d, *k = row(b * me->a->steps + t) + E + head * d;
      for (int64_t i = 0; i < half; ++i) {
        const float angle = (float)at * l->frequencies[i];
        cosines[i] = cosf(angle), sines[i] = sinf(angle);
      }
      float *key = keys(b) + at * stride + head * d;
      for (int64_t i = 0; i < d; ++i) key[i] = (float)l->key_scale * k[i];
      rotate(key, cosines, sines, half);
      memcpy(values(b) + at * stride + head * d, k + stride, sizeof(float) * (size_t)d);
      for (int64_t j = 0; j < queries; ++j) rotate(q + j * d, cosines, sines, half);
    }
  }

  // softmax(scale q K') V over one span, not yet divided by the weights' sum: block by block, with a running maximum.
  // Heads [first, last) and the tokens of the call take turns, so that memory is read once and in order.
  void read(int64_t b, int64_t span, int64_t first, int64_t last) const {
    const int64_t steps = me->a->steps, begin = span * SPAN;
    const int64_t end = ls_min(begin + SPAN, position(b, steps));
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t head = first; head < last; ++head) {
        const Reading to = reading(b * steps + t, span, head);
        for (int64_t j = 0; j < queries; ++j) to.largest[j] = -INFINITY, to.total[j] = 0.0f;
        for (int64_t i = 0; i < queries * d; ++i) to.y[i] = 0.0f;
      }
    for (int64_t at = begin; at < end; at += BLOCK)
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t left = position(b, t) + 1 - at, count = ls_min(left, BLOCK);
        for (int64_t head = first; count > 0 && head < last; ++head) {
          const float *K = keys(b) + at * stride + head * d, *V = values(b) + at * stride + head * d;
          const Reading whole = reading(b * steps + t, span, head);
          for (int64_t j = 0; j < queries; j += 4) {
            const Reading to = {whole.q + j * d, whole.y + j * d, whole.largest + j, whole.total + j};
            const int64_t n = queries - j, ahead = t || j || left <= BLOCK ? 0 : BLOCK * stride;
            const auto read = n > 3 ? read_block<4> : n == 3 ? read_block<3> : n == 2 ? read_block<2> : read_block<1>;
            read(to, K, V, count, stride, ahead, (float)l->scale, d);
          }
        }
      }
  }

  // y of a head: what all spans gave, divided by the sum of the weights.
  void combine(int64_t row, int64_t head) const {
    for (int64_t j = 0; j < queries; ++j) {
      float *y = me->s->y + row * l->n_heads * d + (head * queries + j) * d, most = -INFINITY, total = 0.0f;
      for (int64_t span = 0; span < spans; ++span) {
        const float largest = reading(row, span, head).largest[j];
        most = largest > most ? largest : most;
      }
      for (int64_t i = 0; i < d; ++i) y[i] = 0.0f;
      for (int64_t span = 0; span < spans; ++span) {
        const Reading from = reading(row, span, head);
        const float share = expv(splat(from.largest[j] - most))[0];
        total += share * from.total[j];
        for (int64_t i = 0; i < d; ++i) y[i] += share * from.y[j * d + i];
      }
      for (int64_t i = 0; i < d; ++i) y[i] /= total;
    }
  }
};

}  // namespace

int64_t n_partials(const ls_decode *a, const ls_attention *l, const ls_state *state) {
  return a->batch * a->steps * spans_of(a, state) * l->n_heads * (l->d_head + 2);
}

Needs needs_of(const ls_attention *l) {
  const int64_t E = l->n_heads * l->d_head, width = l->q_proj.n_in > E ? l->q_proj.n_in : E;
  return {E + 2 * l->n_kv_heads * l->d_head, 3 * l->rank, width, 0, 3 * prepared_bytes(l->rank)};
}

void advance(Member *me, const ls_sublayer *sublayer, const ls_attention *layer, const ls_matrix *then) {
  const ls_decode *a = me->a;
  const Scratch &s = *me->s;
  const ls_matrix *matrices[] = {&layer->q_proj, &layer->k_proj, &layer->v_proj};
  const int64_t E = layer->n_heads * layer->d_head, width = E + 2 * layer->n_kv_heads * layer->d_head;
  const int64_t steps = a->steps, past = (layer->d_conv - 1) * width, rank = layer->rank;
  const Convolution conv = {layer->conv_weight, layer->conv_bias, width, layer->d_conv, false};
  const Pieces q = me->cut(layer->q_proj.n_out), kv = me->cut(layer->k_proj.n_out), low = me->cut(rank ? rank : 1);
  // body(which of q, k and v, where it begins in a row, a piece of it) for every piece
  const auto phase = [&](const auto &body) {
    me->phase(q.units + 2 * kv.units, [&](int64_t unit) {
      const int64_t which = unit < q.units ? 0 : 1 + (unit - q.units) / kv.units;
      const Pieces &p = which ? kv : q;
      const int64_t piece = which ? (unit - q.units) % kv.units : unit;
      body(which, which ? E + (which - 1) * kv.n : 0, piece * p.size, end_of(p, piece));
    });
  };

  me->begin(sublayer, &layer->q_proj);
  me->expect(&layer->o_proj);
  if (rank)
    me->phase(3 * low.units, [&](int64_t unit) {
      const int64_t which = unit / low.units, piece = unit % low.units;
      me->multiply(layer->adapters + 2 * which, s.narrow + which * rank, 3 * rank, false, piece * low.size,
                   end_of(low, piece));
    });
  phase([&](int64_t which, int64_t offset, int64_t begin, int64_t end) {
    me->multiply(matrices[which], s.wide + offset, width, false, begin, end);
    for (int64_t b = 0; layer->d_conv && b < a->batch; ++b)
      convolve(&conv, s.wide + b * steps * width, width, steps, a->states[sublayer->state].conv + b * past,
               offset + begin, offset + end);
  });
  if (rank) {
    me->prepare_each(
        3 * me->rows, [&](int64_t i) { return layer->adapters + 2 * (i % 3) + 1; },
        [&](int64_t i) { return s.narrow + i * rank; });
    phase([&](int64_t which, int64_t offset, int64_t begin, int64_t end) {
      for (int64_t row = 0; row < me->rows; ++row)
        me->multiply_row(layer->adapters + 2 * which + 1, 3 * row + which, s.wide + row * width + offset, true, begin,
                         end);
    });
  }
  const Attention attention(me, layer, a->states + sublayer->state);
  const int64_t heads = layer->n_kv_heads, spans = attention.spans;
  if (spans == 1) {
    me->phase(a->batch * heads, [&](int64_t unit) {
      const int64_t b = unit / heads, head = unit % heads;
      attention.put(b, head);
      attention.read(b, 0, head, head + 1);
      for (int64_t t = 0; t < steps; ++t) attention.combine(b * steps + t, head);
    });
  } else {
    me->phase(a->batch * heads, [&](int64_t unit) { attention.put(unit / heads, unit % heads); });
    const int64_t groups = a->batch * spans < UNITS * a->threads ? heads : 1, size = heads / groups;
    me->phase(a->batch * groups * spans, [&](int64_t unit) {
      const int64_t group = unit / spans % groups;
      attention.read(unit / spans / groups, unit % spans, group * size, (group + 1) * size);
    });
    me->phase(me->rows * heads, [&](int64_t unit) { attention.combine(unit / heads, unit % heads); });
  }
  me->finish(sublayer, &layer->o_proj, then, [&](int64_t row) { return s.y + row * E; });
}

void activate(const ls_mlp *mlp, float *up, const float *gate, float scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += W) {
    const int lanes = end - i < W ? (int)(end - i) : W;
    const vec value = load_n(up + i, lanes);
    const vec x = mlp->gated ? load_n(gate + i, lanes) * splat((float)mlp->gate_scale) : value;
    const vec positive = vmax(vec{}, x);  // in this order NaN stays NaN
    const vec activated = mlp->activation == LS_RELU2  ? positive * positive
                          : mlp->activation == LS_GELU ? gelu(x)
                                                       : x * sigmoid(x);
    store_n(up + i, splat(scale) * (mlp->gated ? activated * value : activated), lanes);
  }
}

Needs needs_of(const ls_mlp *l) { return {2 * l->up_proj.n_out, l->rank, l->up_proj.n_out}; }

void advance(Member *me, const ls_sublayer *sublayer, const ls_mlp *layer, const ls_matrix *then) {
  const Scratch &s = *me->s;
  const int64_t F = layer->up_proj.n_out, rank = layer->rank, D = me->a->d_model;
  const Pieces p = me->cut(F), low = me->cut(rank ? rank : 1), out = me->cut(D);
  float *const gate = s.wide, *const up = s.wide + F;
  const auto activate_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < me->rows; ++row)
      activate(layer, up + row * 2 * F, gate + row * 2 * F, 1.0f, begin, end);
  };

  me->begin(sublayer, &layer->up_proj);
  me->expect(&layer->down_proj);
  me->phase(p.units + (rank ? low.units : 0), [&](int64_t unit) {
    if (unit >= p.units) {
      const int64_t piece = unit - p.units;
      return me->multiply(layer->adapter, s.narrow, rank, false, piece * low.size, end_of(low, piece));
    }
    const int64_t begin = unit * p.size, end = end_of(p, unit);
    me->multiply(&layer->up_proj, up, 2 * F, false, begin, end);
    if (layer->gated) me->multiply(&layer->gate_proj, gate, 2 * F, false, begin, end);
    if (!rank) activate_rows(begin, end);
  });
  if (rank) {
    me->prepare_rows(layer->adapter + 1, [&](int64_t row) { return s.narrow + row * rank; });
    me->phase(p.units, [&](int64_t unit) {
      const int64_t begin = unit * p.size, end = end_of(p, unit);
      me->multiply(layer->adapter + 1, s.wide, 2 * F, true, begin, end);
      me->multiply(layer->adapter + 1, s.wide, 2 * F, true, F + begin, F + end);
      activate_rows(begin, end);
    });
  }
  if (!layer->has_after)
    return me->finish(sublayer, &layer->down_proj, then, [&](int64_t row) { return up + row * 2 * F; });
  me->prepare_rows(&layer->down_proj, [&](int64_t row) { return up + row * 2 * F; });
  me->expect(&layer->after);
  me->phase(out.units, [&](int64_t unit) {
    me->multiply(&layer->down_proj, s.y, D, false, unit * out.size, end_of(out, unit));
  });
  me->finish(sublayer, &layer->after, then, [&](int64_t row) { return s.y + row * D; });
}

}  // namespace LS_ISA
