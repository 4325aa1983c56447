// Mamba-3 while decoding: projection, norms, then each head with its turn, recurrence and gate, projection.
#include <math.h>

#include "decode.h"

namespace LS_ISA {
namespace {

// What a head takes in at one token. With rank R, 2 R keys and values: those of the token before, then its own.
struct Turned {
  int64_t d_state, d_head, rank;
  float decay;
  float *keys, *queries;  // (2 R, d_state), (R, d_state)
  float *values;          // (2 R, d_head), weighted
  float *y;               // (R, d_head)
};

// Where the rows [z; x; B; C; dt; A; trap; angle] have their parts.
struct Parts {
  int64_t x, B, C, dt, A, trap, angle;
};
Parts parts_of(const ls_mamba3 *l) {
  const int64_t E = l->n_heads * l->d_head, BC = l->rank * l->n_groups * l->d_state, H = l->n_heads;
  return {E, 2 * E, 2 * E + BC, 2 * E + 2 * BC, 2 * E + 2 * BC + H, 2 * E + 2 * BC + 2 * H, 2 * E + 2 * BC + 3 * H};
}

// S = decay S + sum_j values_j keys_j' and y_r = S queries_r of O rows of a head's state. R is the rank, or 0 for any.
template <int O, int R>
LS_INLINE void advance_rows(float *S, const Turned *h, int64_t p) {
  const int64_t N = h->d_state, P = h->d_head, rank = R ? R : h->rank;
  vec total[R ? R : LS_MAX_RANK][O] = {};
  for (int64_t n = 0; n < N; n += W) {
    const int lanes = N - n < W ? (int)(N - n) : W;
    vec state[O];
    for (int o = 0; o < O; ++o) state[o] = splat(h->decay) * load_n(S + o * N + n, lanes);
    LS_UNROLL
    for (int64_t j = 0; j < 2 * rank; ++j) {
      const vec key = load_n(h->keys + j * N + n, lanes);
      for (int o = 0; o < O; ++o) state[o] += splat(h->values[j * P + p + o]) * key;
    }
    for (int o = 0; o < O; ++o) store_n(S + o * N + n, state[o], lanes);
    LS_UNROLL
    for (int64_t r = 0; r < rank; ++r) {
      const vec query = load_n(h->queries + r * N + n, lanes);
      for (int o = 0; o < O; ++o) total[r][o] += state[o] * query;
    }
  }
  for (int64_t r = 0; r < rank; ++r)
    if (O == 4)
      sum4(h->y + r * P + p, total[r]);
    else
      for (int o = 0; o < O; ++o) h->y[r * P + p + o] = sum(total[r][o]);
}

// All rows; O of them together leave registers for the sums of R outputs.
template <int O, int R>
LS_APART void advance_state(Member *me, float *S, const Turned *h) {
  const int64_t N = h->d_state;
  int64_t p = 0;
  for (; p + O <= h->d_head; p += O) {
    me->prefetch(O);
    for (int64_t i = 0; i < O * N; i += 16) __builtin_prefetch(S + (p + 8) * N + i, 1);
    advance_rows<O, R>(S + p * N, h, p);
  }
  for (; p < h->d_head; ++p) advance_rows<1, R>(S + p * N, h, p);
}

// Turn pairs of channels: i with i + half, or neighbours.
void rotate(float *x, const float *cosines, const float *sines, int64_t n_angles, int64_t half) {
  const int64_t step = half ? 1 : 2, other = half ? half : 1;
  for (int64_t i = 0; i < n_angles; ++i) {
    const float a = x[i * step], b = x[i * step + other];
    x[i * step] = a * cosines[i] - b * sines[i];
    x[i * step + other] = a * sines[i] + b * cosines[i];
  }
}

// The angles after one more turn, less whole turns; the sum in double, as it must be over a long text.
void turn(const float *turns, float dt, int64_t n, float *angle, float *cosines, float *sines) {
  const double whole = 2.0 * M_PI, shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  for (int64_t i = 0; i < n; ++i) {
    const double sum_ = (double)angle[i] + (double)(turns[i] * dt);
    const double count = sum_ * (1.0 / whole) + shift;
    angle[i] = (float)(sum_ - whole * (count - shift));
  }
  for (int64_t i = 0; i < n; ++i) cosines[i] = cosf(angle[i]), sines[i] = sinf(angle[i]);
}

// sum_r mimo_o_r gate_r y_r into `out`, which the gate multiplies after the norm of each y_r, if there is one.
void gate_and_sum(const ls_mamba3 *l, int64_t head, const float *z, float *y, float *out) {
  const int64_t P = l->d_head, R = l->rank;
  for (int64_t r = 0; r < R; ++r) {
    const int64_t at = (head * R + r) * P;
    float *of = y + r * P;
    if (l->norm) rms_norm(of, l->norm + head * P, (float)l->y_eps, P, of);
    for (int64_t p = 0; p < P; p += W) {
      const int lanes = P - p < W ? (int)(P - p) : W;
      vec gate = load_n(z + p, lanes);
      if (l->mimo_z) gate = gate * load_n(l->mimo_z + at + p, lanes);
      vec gated = load_n(of + p, lanes) * (gate * sigmoid(gate));
      if (l->mimo_o) gated = gated * load_n(l->mimo_o + at + p, lanes);
      store_n(out + p, r ? load_n(out + p, lanes) + gated : gated, lanes);
    }
  }
}

// values_r = weight x_r with x_r = mimo_x_r x.
void weigh(const ls_mamba3 *l, int64_t head, const float *x, float weight, float *values) {
  const int64_t P = l->d_head;
  for (int64_t r = 0; r < l->rank; ++r)
    for (int64_t p = 0; p < P; ++p)
      values[r * P + p] = weight * (l->mimo_x ? x[p] * l->mimo_x[(head * l->rank + r) * P + p] : x[p]);
}

// B or C of a head: that of its group, normalised already, with the head's bias, and turned.
void vectors_of(const ls_mamba3 *l, int64_t head, const float *groups, const float *bias, const float *cosines,
                const float *sines, float *to) {
  const int64_t N = l->d_state, R = l->rank, group = head / (l->n_heads / l->n_groups);
  for (int64_t r = 0; r < R; ++r) {
    const float *from = groups + (r * l->n_groups + group) * N, *add = bias + (head * R + r) * N;
    for (int64_t n = 0; n < N; ++n) to[r * N + n] = from[n] + add[n];
    rotate(to + r * N, cosines, sines, l->n_angles, l->mimo_x ? N / 2 : 0);
  }
}

// One head of one sequence.
LS_APART void advance_head(Member *me, const ls_mamba3 *l, const ls_state *state, int64_t b, int64_t head) {
  const int64_t H = l->n_heads, P = l->d_head, N = l->d_state, R = l->rank, width = l->in_proj.n_out;
  const Parts at = parts_of(l);
  float *const S = state->ssm + (b * H + head) * P * N, *const angle = state->angle + (b * H + head) * l->n_angles;
  float *const k = state->k + (b * R * H + head) * N, *const v = state->v + (b * H + head) * P;
  float *const cosines = LS_STACK(float, 2 * l->n_angles + 1), *const sines = cosines + l->n_angles;
  Turned h = {N, P, R, 0.0f, LS_STACK(float, 3 * R * N), nullptr, LS_STACK(float, 3 * R * P), nullptr};
  h.queries = h.keys + 2 * R * N, h.y = h.values + 2 * R * P;
  for (int64_t r = 0; r < R; ++r) memcpy(h.keys + r * N, k + r * H * N, sizeof(float) * (size_t)N);
  for (int64_t t = 0; t < me->a->steps; ++t) {
    const int64_t row = b * me->a->steps + t;
    const float *from = me->s->wide + row * width, *x = from + at.x + head * P;
    const float dt = softplus(splat(from[at.dt + head] + l->dt_bias[head]))[0], a = from[at.A + head];
    float A = l->A_softplus ? softplus(splat(a))[0] : a >= 0 ? 1.0f + a : 1.0f / (1.0f - a);
    A = A < (float)l->A_floor ? (float)l->A_floor : A;
    const float late = sigmoid(splat(from[at.trap + head]))[0] * dt;
    h.decay = expv(splat(-dt * A))[0];

    turn(from + at.angle, dt, l->n_angles, angle, cosines, sines);
    vectors_of(l, head, from + at.B, l->B_bias, cosines, sines, h.keys + R * N);
    vectors_of(l, head, from + at.C, l->C_bias, cosines, sines, h.queries);
    weigh(l, head, v, h.decay * (dt - late), h.values);
    weigh(l, head, x, late, h.values + R * P);
    switch (R) {
      case 1: advance_state<4, 1>(me, S, &h); break;
      case 2: advance_state<4, 2>(me, S, &h); break;
      case 4: advance_state<2, 4>(me, S, &h); break;
      default: advance_state<1, 0>(me, S, &h);
    }
    for (int64_t r = 0; r < R; ++r)
      for (int64_t p = 0; p < P; ++p)
        h.y[r * P + p] += l->D[head] * (l->mimo_x ? x[p] * l->mimo_x[(head * R + r) * P + p] : x[p]);
    memcpy(h.keys, h.keys + R * N, sizeof(float) * (size_t)(R * N));
    memcpy(v, x, sizeof(float) * (size_t)P);
    gate_and_sum(l, head, from + head * P, h.y, me->s->y + row * H * P + head * P);
  }
  for (int64_t r = 0; r < R; ++r) memcpy(k + r * H * N, h.keys + r * N, sizeof(float) * (size_t)N);
}

}  // namespace

Needs needs_of(const ls_mamba3 *l) { return {l->in_proj.n_out, 0, l->n_heads * l->d_head}; }

void advance(Member *me, const ls_sublayer *sublayer, const ls_mamba3 *layer, const ls_matrix *then) {
  const Scratch &s = *me->s;
  const ls_state *state = me->a->states + sublayer->state;
  const int64_t H = layer->n_heads, N = layer->d_state, width = layer->in_proj.n_out;
  const Pieces p = me->cut(width);

  me->begin(sublayer, &layer->in_proj);
  me->expect(&layer->out_proj);
  me->phase(p.units, [&](int64_t unit) {
    me->multiply(&layer->in_proj, s.wide, width, false, unit * p.size, end_of(p, unit));
  });
  me->phase(me->rows, [&](int64_t row) {
    const Parts at = parts_of(layer);
    float *from = s.wide + row * width;
    for (int64_t i = 0; i < layer->rank * layer->n_groups; ++i) {
      rms_norm(from + at.B + i * N, layer->B_norm, (float)layer->eps, N, from + at.B + i * N);
      rms_norm(from + at.C + i * N, layer->C_norm, (float)layer->eps, N, from + at.C + i * N);
    }
    for (int64_t i = 0; i < layer->n_angles; ++i) from[at.angle + i] = (float)M_PI * tanhf(from[at.angle + i]);
  });
  me->phase(me->a->batch * H, [&](int64_t unit) { advance_head(me, layer, state, unit / H, unit % H); });
  me->finish(sublayer, &layer->out_proj, then, [&](int64_t row) { return s.y + row * H * layer->d_head; });
}

}  // namespace LS_ISA
