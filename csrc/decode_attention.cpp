// Causal attention over a KV cache, and gated MLPs, while decoding.
#include <math.h>

#include "decode.h"

namespace LS_ISA {
namespace {

constexpr int64_t BLOCK = 64;  // cached tokens at a time; blocks begin at multiples of it, whatever the call

float dot(const float *x, const float *y, int64_t n) {
  vec total = vec{};
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = n - i < W ? (int)(n - i) : W;
    total += load_n(x + i, lanes) * load_n(y + i, lanes);
  }
  return sum(total);
}

// Turn the pairs (x_i, x_{i + half}) of a head by their angles.
void rotate(float *x, const float *cosines, const float *sines, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

// y = softmax(scale q K') V over n cached tokens, block by block, with a running maximum.
void attend(const float *q, const float *K, const float *V, int64_t n, int64_t stride, float scale, int64_t d, float *y) {
  float largest = -INFINITY, total = 0.0f;
  for (int64_t i = 0; i < d; ++i) y[i] = 0.0f;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t count = n - begin < BLOCK ? n - begin : BLOCK;
    float weights[BLOCK], most = largest;
    for (int64_t s = 0; s < count; ++s) {
      weights[s] = scale * dot(q, K + (begin + s) * stride, d);
      most = weights[s] > most ? weights[s] : most;
    }
    const float fade = expv(splat(largest - most))[0];
    largest = most, total *= fade;
    for (int64_t s = 0; s < count; s += W) {
      const int lanes = count - s < W ? (int)(count - s) : W;
      store_n(weights + s, expv(load_n(weights + s, lanes) - splat(most)), lanes);
    }
    for (int64_t s = 0; s < count; ++s) total += weights[s];
    for (int64_t i = 0; i < d; i += W) {
      const int lanes = d - i < W ? (int)(d - i) : W;
      vec sum_ = load_n(y + i, lanes) * splat(fade);
      for (int64_t s = 0; s < count; ++s) sum_ += splat(weights[s]) * load_n(V + (begin + s) * stride + i, lanes);
      store_n(y + i, sum_, lanes);
    }
  }
  for (int64_t i = 0; i < d; ++i) y[i] /= total;
}

vec gelu(vec x) {
  float lane[W];
  store(lane, x);
  for (int i = 0; i < W; ++i) lane[i] = 0.5f * lane[i] * (1.0f + erff(lane[i] * (float)M_SQRT1_2));
  return load(lane);
}

// One head of keys and values of one sequence, and the queries that share it. Row: [q; k; v].
LS_APART void attend_heads(Member *me, const ls_attention *l, const ls_state *state, int64_t b, int64_t head) {
  const int64_t d = l->d_head, half = l->n_rotated / 2, queries = l->n_heads / l->n_kv_heads;
  const int64_t E = l->n_heads * d, stride = l->n_kv_heads * d, width = E + 2 * stride;
  float *K = state->k + b * state->capacity * stride + head * d, *V = state->v + (K - state->k);
  float *cosines = LS_STACK(float, half + 1), *sines = LS_STACK(float, half + 1);
  for (int64_t t = 0; t < me->a->steps; ++t) {
    const int64_t row = b * me->a->steps + t, position = state->length[b] + t;
    float *q = me->s->wide + row * width + head * queries * d, *k = me->s->wide + row * width + E + head * d;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = (float)position * l->frequencies[i];
      cosines[i] = cosf(angle), sines[i] = sinf(angle);
    }
    float *to = K + position * stride;
    for (int64_t i = 0; i < d; ++i) to[i] = (float)l->key_scale * k[i];
    rotate(to, cosines, sines, half);
    memcpy(V + position * stride, k + stride, sizeof(float) * (size_t)d);
    for (int64_t j = 0; j < queries; ++j) {
      rotate(q + j * d, cosines, sines, half);
      attend(q + j * d, K, V, position + 1, stride, (float)l->scale, d,
             me->s->y + row * E + (head * queries + j) * d);
    }
  }
}

}  // namespace

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
  me->phase(a->batch * layer->n_kv_heads, [&](int64_t unit) {
    attend_heads(me, layer, a->states + sublayer->state, unit / layer->n_kv_heads, unit % layer->n_kv_heads);
  });
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
