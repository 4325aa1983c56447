// Decoding: one call takes every row a few tokens further through all sublayers of a model, weights streaming once.
#include "decode.h"

namespace LS_ISA {
namespace {

constexpr int64_t PHASES_OF_LAYER = 12, OTHER_PHASES = 3;

template <typename Body>
auto visit(const ls_sublayer *layer, const Body &body) {
  switch (layer->kind) {
    case LS_MAMBA: return body((const ls_mamba *)layer->weights);
    case LS_MAMBA2: return body((const ls_mamba2 *)layer->weights);
    case LS_MAMBA3: return body((const ls_mamba3 *)layer->weights);
    case LS_ATTENTION: return body((const ls_attention *)layer->weights);
    case LS_EXPERTS: return body((const ls_experts *)layer->weights);
    default: return body((const ls_mlp *)layer->weights);
  }
}

const ls_matrix *first_of(const ls_mamba *l) { return &l->in_proj; }
const ls_matrix *first_of(const ls_mamba2 *l) { return &l->in_proj; }
const ls_matrix *first_of(const ls_mamba3 *l) { return &l->in_proj; }
const ls_matrix *first_of(const ls_attention *l) { return &l->q_proj; }
const ls_matrix *first_of(const ls_mlp *l) { return l->gated ? &l->gate_proj : &l->up_proj; }
const ls_matrix *first_of(const ls_experts *l) { return &l->router; }

void more(int64_t *most, int64_t value) { *most = value > *most ? value : *most; }

Scratch scratch_of(const ls_decode *a) {
  const int64_t rows = a->batch * a->steps, copies = rows <= FEW ? a->threads : 1;
  int64_t at = 0;
  auto take = [&](int64_t bytes) {
    char *where = (char *)a->workspace + at;
    at += ls_ceil(bytes, 64) * 64;
    return where;
  };
  Scratch s;
  s.widest = a->d_model, s.n_wide = s.n_narrow = 1, s.n_choices = 0;
  int64_t prepared = 0, streams = 0, partials = 0;
  for (int64_t l = 0; l < a->n_layers; ++l) {
    const Needs needs = visit(a->layers + l, [](const auto *weights) { return needs_of(weights); });
    more(&s.n_wide, needs.wide), more(&s.n_narrow, needs.narrow), more(&s.widest, needs.widest);
    more(&s.n_choices, needs.n_choices), more(&prepared, needs.prepared);
    if (a->layers[l].kind == LS_ATTENTION)
      more(&partials, n_partials(a, (const ls_attention *)a->layers[l].weights, a->states + a->layers[l].state));
    if (a->layers[l].reads != LS_RESIDUAL || a->layers[l].writes != LS_RESIDUAL) streams = 2;
  }
  s.n_normed = (streams ? 2 : 1) * a->d_model;
  more(&s.widest, s.n_normed);
  s.n_counters = 1 + (PHASES_OF_LAYER * a->n_layers + OTHER_PHASES) * (1 + a->threads);
  s.counters = (Counter *)take((int64_t)sizeof(Counter) * s.n_counters);
  s.residual = (float *)take(4 * rows * a->d_model);
  s.embedded = (float *)take(4 * rows * a->d_model * streams);
  s.side = s.embedded + (streams ? rows * a->d_model : 0);
  s.normed = (float *)take(4 * rows * s.n_normed * (copies + 1));
  s.gated = (float *)take(4 * rows * s.widest * copies);
  s.wide = (float *)take(4 * rows * s.n_wide);
  s.narrow = (float *)take(4 * rows * s.n_narrow);
  s.dt = (float *)take(4 * rows * s.widest);
  s.y = (float *)take(4 * rows * s.widest);
  s.partials = (float *)take(4 * partials);
  more(&prepared, prepared_bytes(s.widest));
  s.prepared_size = rows * prepared;
  s.prepared = take(s.prepared_size * copies);
  s.chosen = (Choice *)take((int64_t)sizeof(Choice) * rows * s.n_choices);
  s.sorted = (Choice *)take((int64_t)sizeof(Choice) * rows * s.n_choices);
  s.groups = (int64_t *)take(8 * (rows * s.n_choices + 2));
  s.bytes = at;
  return s;
}

struct Decode {
  const ls_decode *a;
  Scratch s;
};

// All that one thread does. Every thread goes through the same phases.
void work(const Decode *d) {
  const ls_decode *a = d->a;
  const Scratch &s = d->s;
  const int64_t rows = a->batch * a->steps, D = a->d_model;
  const int64_t id = s.counters->value.fetch_add(1, std::memory_order_relaxed) % a->threads;
  const bool few = rows <= FEW;
  char *const ready = s.prepared + (few ? id * s.prepared_size : 0);
  Member me = {a, &s, rows, id, few, s.counters + 1, ready, nullptr, nullptr, false};

  me.phase(rows, [&](int64_t row) {
    float *x = s.residual + row * D;
    dequantize_row(&a->embedding, a->ids[row], x);
    if (a->embedding_scale != 1.0)
      for (int64_t i = 0; i < D; ++i) x[i] *= (float)a->embedding_scale;
    if (s.n_normed > D) memcpy(s.embedded + row * D, x, sizeof(float) * (size_t)D);
  });
  for (int64_t l = 0; l < a->n_layers; ++l) {
    const ls_sublayer *layer = a->layers + l;
    const ls_matrix *then = &a->head;
    if (l + 1 < a->n_layers) then = visit(layer + 1, [](const auto *weights) { return first_of(weights); });
    visit(layer, [&](const auto *weights) { advance(&me, layer, weights, then); });
  }
  const ls_sublayer last = {0, 0, LS_RESIDUAL, LS_RESIDUAL, a->head_scale, 1.0, a->norm_f, nullptr};
  me.begin(&last, &a->head);
  const Pieces vocabulary = pieces(a->head.n_out, 4 * UNITS * a->threads);
  me.phase(vocabulary.units, [&](int64_t unit) {
    me.multiply(&a->head, a->logits, a->head.n_out, false, unit * vocabulary.size, end_of(vocabulary, unit));
  });
}

void task(int64_t, int64_t, void *context) { work((const Decode *)context); }

}  // namespace

void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) {
  vec squares = vec{};
  int64_t i = 0;
  for (; i + W <= n; i += W) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(total / (float)n + eps);
  for (i = 0; i < n; i += W) {
    const int lanes = n - i < W ? (int)(n - i) : W;
    const vec normed = load_n(x + i, lanes) * splat(scale);
    store_n(y + i, weight ? normed * load_n(weight + i, lanes) : normed, lanes);
  }
}

void convolve(const Convolution *conv, float *x, int64_t stride, int64_t steps, float *past, int64_t begin,
              int64_t end) {
  const int64_t E = conv->channels, K = conv->d_conv;
  for (int64_t c = begin; c < end; c += W) {
    const int lanes = end - c < W ? (int)(end - c) : W;
    vec window[LS_MAX_CONV], taps[LS_MAX_CONV];
    for (int64_t k = 0; k < K; ++k) taps[k] = load_n(conv->weight + k * E + c, lanes);
    for (int64_t k = 0; k + 1 < K; ++k) window[k] = load_n(past + k * E + c, lanes);
    const vec bias = conv->bias ? load_n(conv->bias + c, lanes) : vec{};
    for (int64_t t = 0; t < steps; ++t) {
      float *at = x + t * stride + c;
      window[K - 1] = load_n(at, lanes);
      vec y = bias;
      for (int64_t k = 0; k < K; ++k) y += taps[k] * window[k];
      store_n(at, conv->silu ? y * sigmoid(y) : y, lanes);
      for (int64_t k = 0; k + 1 < K; ++k) window[k] = window[k + 1];
    }
    for (int64_t k = 0; k + 1 < K; ++k) store_n(past + k * E + c, window[k], lanes);
  }
}

int64_t decode_workspace(const ls_decode *a) { return scratch_of(a).bytes; }

int32_t decode(const ls_decode *a) {
  const Decode d = {a, scratch_of(a)};
  for (int64_t i = 0; i < d.s.n_counters; ++i) d.s.counters[i].value.store(0, std::memory_order_relaxed);
  ls_run_each(a->threads, task, (void *)&d);
  return 0;
}

}  // namespace LS_ISA
