// Mamba and Mamba-2 while decoding: projection, convolution, recurrence, gate, projection.
#include "decode.h"

namespace LS_ISA {
namespace {

// h = exp(dt A) h + dt B u and y = C h of O channels. A is in powers of 2.
template <int O>
LS_INLINE void advance_states(const float *A, float *h, const float *dt, const float *u, const float *B,
                              const float *C, int64_t N, float *y) {
  vec total[O] = {};
  for (int64_t n = 0; n < N; n += W) {
    const int lanes = N - n < W ? (int)(N - n) : W;
    const vec Bn = load_n(B + n, lanes), Cn = load_n(C + n, lanes);
    vec x[O], decay[O];
    for (int o = 0; o < O; ++o) x[o] = splat(dt[o]) * load_n(A + o * N + n, lanes);
    exp2_many<O>(decay, x);
    for (int o = 0; o < O; ++o) {
      const vec state = decay[o] * load_n(h + o * N + n, lanes) + splat(dt[o] * u[o]) * Bn;
      store_n(h + o * N + n, state, lanes);
      total[o] += state * Cn;
    }
  }
  if (O == 4)
    sum4(y, total);
  else
    for (int o = 0; o < O; ++o) y[o] = sum(total[o]);
}

LS_APART void scan(Member *me, const ls_mamba *layer, float *h, int64_t b, int64_t begin, int64_t end) {
  const int64_t E = layer->d_inner, N = layer->d_state, width = layer->dt_rank + 2 * N;
  for (int64_t t = 0; t < me->a->steps; ++t) {
    const int64_t row = b * me->a->steps + t;
    const float *B = me->s->narrow + row * width + layer->dt_rank, *C = B + N;
    const float *u = me->s->wide + row * 2 * E, *z = u + E;
    float *dt = me->s->dt + row * E, *y = me->s->y + row * E;
    for (int64_t c = begin; c < end; c += W) {
      const int lanes = end - c < W ? (int)(end - c) : W;
      store_n(dt + c, softplus(load_n(dt + c, lanes)), lanes);
    }
    int64_t c = begin;
    for (; c + 4 <= end; c += 4) {
      me->prefetch(4);
      for (int64_t i = 0; i < 4 * N; i += 16) __builtin_prefetch(h + (b * E + c + 32) * N + i, 1);
      advance_states<4>(layer->A + c * N, h + (b * E + c) * N, dt + c, u + c, B, C, N, y + c);
    }
    for (; c < end; ++c)
      advance_states<1>(layer->A + c * N, h + (b * E + c) * N, dt + c, u + c, B, C, N, y + c);
    for (c = begin; c < end; c += W) {
      const int lanes = end - c < W ? (int)(end - c) : W;
      const vec gate = load_n(z + c, lanes);
      const vec out = load_n(y + c, lanes) + load_n(layer->D + c, lanes) * load_n(u + c, lanes);
      store_n(y + c, out * gate * sigmoid(gate), lanes);
    }
  }
}

// S = decay S + (dt x) B' and y = S C of O rows of a head's state.
template <int O>
LS_INLINE void advance_rows(float *S, float decay, const float *x, float dt, const float *B, const float *C, int64_t N,
                            float *y) {
  vec total[O] = {};
  for (int64_t n = 0; n < N; n += W) {
    const int lanes = N - n < W ? (int)(N - n) : W;
    const vec Bn = load_n(B + n, lanes), Cn = load_n(C + n, lanes);
    for (int o = 0; o < O; ++o) {
      const vec state = splat(decay) * load_n(S + o * N + n, lanes) + splat(dt * x[o]) * Bn;
      store_n(S + o * N + n, state, lanes);
      total[o] += state * Cn;
    }
  }
  if (O == 4)
    sum4(y, total);
  else
    for (int o = 0; o < O; ++o) y[o] = sum(total[o]);
}

// One head of one sequence. Row: [z; x; B; C; dt].
LS_APART void advance_head(Member *me, const ls_mamba2 *l, float *S, int64_t b, int64_t head) {
  const int64_t P = l->d_head, N = l->d_state, E = l->n_heads * P, GN = l->n_groups * N, width = l->in_proj.n_out;
  const int64_t group = head / (l->n_heads / l->n_groups);
  const float *D = l->D + (l->D_per_channel ? head * P : head);
  for (int64_t t = 0; t < me->a->steps; ++t) {
    const int64_t row = b * me->a->steps + t;
    const float *x = me->s->wide + row * width + E + head * P;
    const float *B = me->s->wide + row * width + 2 * E + group * N, *C = B + GN;
    float *y = me->s->y + row * E + head * P;
    float dt = softplus(splat(me->s->wide[row * width + 2 * E + 2 * GN + head] + l->dt_bias[head]))[0];
    dt = dt < (float)l->dt_least ? (float)l->dt_least : dt > (float)l->dt_most ? (float)l->dt_most : dt;
    const float decay = exp2v(splat(dt * l->A[head]))[0];
    int64_t p = 0;
    for (; p + 4 <= P; p += 4) {
      me->prefetch(4);
      for (int64_t i = 0; i < 4 * N; i += 16) __builtin_prefetch(S + (p + 8) * N + i, 1);
      advance_rows<4>(S + p * N, decay, x + p, dt, B, C, N, y + p);
    }
    for (; p < P; ++p) advance_rows<1>(S + p * N, decay, x + p, dt, B, C, N, y + p);
    for (p = 0; p < P; ++p) y[p] += D[l->D_per_channel ? p : 0] * x[p];
  }
}

// y silu(z) with its norm, in either order.
float *gate_and_norm(const Member *me, const ls_mamba2 *l, int64_t row) {
  const int64_t E = l->n_heads * l->d_head, group = E / l->n_groups;
  const float *z = me->s->wide + row * l->in_proj.n_out;
  float *y = me->s->y + row * E, *to = me->gated_row(row);
  auto normed = [&](const float *from) {
    for (int64_t c = 0; c < E; c += group) rms_norm(from + c, l->norm + c, (float)l->eps, group, to + c);
  };
  if (l->order == LS_NORM_FIRST) normed(y);
  const float *from = l->order == LS_NORM_FIRST ? to : y;
  for (int64_t c = 0; c < E; c += W) {
    const int lanes = E - c < W ? (int)(E - c) : W;
    const vec gate = load_n(z + c, lanes);
    store_n(to + c, load_n(from + c, lanes) * gate * sigmoid(gate), lanes);
  }
  if (l->order == LS_GATE_FIRST) normed(to);
  return to;
}

}  // namespace

Needs needs_of(const ls_mamba *l) {
  return {2 * l->d_inner, l->dt_rank + 2 * l->d_state, l->d_inner > l->dt_rank ? l->d_inner : l->dt_rank};
}

void advance(Member *me, const ls_sublayer *sublayer, const ls_mamba *layer, const ls_matrix *then) {
  const ls_decode *a = me->a;
  const Scratch &s = *me->s;
  const ls_state *state = a->states + sublayer->state;
  const int64_t E = layer->d_inner, N = layer->d_state, K = layer->d_conv, width = layer->dt_rank + 2 * N;
  const Pieces channels = me->cut(E), narrow = me->cut(width);
  const Convolution conv = {layer->conv_weight, layer->conv_bias, E, K, true};

  me->begin(sublayer, &layer->in_proj);
  me->expect(&layer->x_proj);
  me->phase(channels.units, [&](int64_t unit) {
    const int64_t begin = unit * channels.size, end = end_of(channels, unit);
    me->multiply(&layer->in_proj, s.wide, 2 * E, false, begin, end);          // x
    me->multiply(&layer->in_proj, s.wide, 2 * E, false, E + begin, E + end);  // z
    for (int64_t b = 0; b < a->batch; ++b)
      convolve(&conv, s.wide + b * a->steps * 2 * E, 2 * E, a->steps, state->conv + b * (K - 1) * E, begin, end);
  });
  me->prepare_rows(&layer->x_proj, [&](int64_t row) { return s.wide + row * 2 * E; });
  me->expect(&layer->dt_proj);
  me->phase(narrow.units, [&](int64_t unit) {
    me->multiply(&layer->x_proj, s.narrow, width, false, unit * narrow.size, end_of(narrow, unit));
  });
  if (layer->inner_eps >= 0)
    me->phase(me->rows, [&](int64_t row) {
      float *dt = s.narrow + row * width, *B = dt + layer->dt_rank, *C = B + N;
      rms_norm(dt, layer->dt_norm, (float)layer->inner_eps, layer->dt_rank, dt);
      rms_norm(B, layer->B_norm, (float)layer->inner_eps, N, B);
      rms_norm(C, layer->C_norm, (float)layer->inner_eps, N, C);
    });
  me->prepare_rows(&layer->dt_proj, [&](int64_t row) { return s.narrow + row * width; });
  me->expect(&layer->out_proj);
  me->phase(channels.units, [&](int64_t unit) {
    const int64_t begin = unit * channels.size, end = end_of(channels, unit);
    me->multiply(&layer->dt_proj, s.dt, E, false, begin, end);
    for (int64_t b = 0; b < a->batch; ++b) scan(me, layer, state->ssm, b, begin, end);
  });
  me->finish(sublayer, &layer->out_proj, then, [&](int64_t row) { return s.y + row * E; });
}

Needs needs_of(const ls_mamba2 *l) { return {l->in_proj.n_out, 0, l->n_heads * l->d_head}; }

void advance(Member *me, const ls_sublayer *sublayer, const ls_mamba2 *layer, const ls_matrix *then) {
  const ls_decode *a = me->a;
  const Scratch &s = *me->s;
  const ls_state *state = a->states + sublayer->state;
  const int64_t H = layer->n_heads, E = H * layer->d_head, N = layer->d_state, K = layer->d_conv;
  const int64_t width = layer->in_proj.n_out, channels = E + 2 * layer->n_groups * N;
  const Pieces p = me->cut(width);
  const Convolution conv = {layer->conv_weight, layer->conv_bias, channels, K, true};

  me->begin(sublayer, &layer->in_proj);
  me->expect(&layer->out_proj);
  me->phase(p.units, [&](int64_t unit) {
    const int64_t begin = unit * p.size, end = end_of(p, unit);
    me->multiply(&layer->in_proj, s.wide, width, false, begin, end);
    if (layer->factors)
      for (int64_t row = 0; row < me->rows; ++row)
        for (int64_t i = begin; i < end; ++i) s.wide[row * width + i] *= layer->factors[i];
    const int64_t first = begin > E ? begin - E : 0, last = end - E < channels ? end - E : channels;
    if (first < last)
      for (int64_t b = 0; b < a->batch; ++b)
        convolve(&conv, s.wide + b * a->steps * width + E, width, a->steps, state->conv + b * (K - 1) * channels,
                 first, last);
  });
  me->phase(a->batch * H, [&](int64_t unit) {
    advance_head(me, layer, state->ssm + unit * layer->d_head * N, unit / H, unit % H);
  });
  me->finish(sublayer, &layer->out_proj, then, [&](int64_t row) { return gate_and_norm(me, layer, row); });
}

}  // namespace LS_ISA
