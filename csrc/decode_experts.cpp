// A mixture of experts while decoding: only the experts that a token passes through are multiplied by.
//
// Tokens are grouped by expert, so that the rows of a call share what they load. Each adds up its experts in
// ascending order, whatever the others have chosen.
#include <math.h>

#include "decode.h"

namespace LS_ISA {
namespace {

// The first of the largest scores that are not taken.
int64_t largest(const float *scores, const bool *taken, int64_t n) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i)
    if (!taken[i] && (best < 0 || scores[i] > scores[best])) best = i;
  return best;
}

// Take all experts but those of the groups whose two best scores have the largest sums.
LS_APART void rule_out(const ls_experts *l, const float *scores, bool *taken) {
  const int64_t size = l->n_experts / l->n_groups;
  float *sums = LS_STACK(float, l->n_groups);
  bool *active = LS_STACK(bool, l->n_groups);
  for (int64_t g = 0; g < l->n_groups; ++g) {
    const float *of = scores + g * size;
    const int64_t best = largest(of, taken + g * size, size);
    taken[g * size + best] = true;
    const int64_t second = largest(of, taken + g * size, size);
    sums[g] = of[best] + (second < 0 ? 0.0f : of[second]);
    active[g] = false;
  }
  for (int64_t i = 0; i < l->n_active_groups; ++i) active[largest(sums, active, l->n_groups)] = true;
  for (int64_t e = 0; e < l->n_experts; ++e) taken[e] = !active[e / size];
}

// x = exp(x - its largest), and their sum.
float exponentials(float *x, int64_t n) {
  float most = x[0], total = 0.0f;
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  for (int64_t i = 0; i < n; ++i) x[i] = expf(x[i] - most), total += x[i];
  return total;
}

// The experts of one token in ascending order, with their weights.
LS_APART void choose(const ls_experts *l, float *scores, int64_t row, Choice *to) {
  const int64_t n = l->n_experts, k = l->n_active;
  bool *taken = LS_STACK(bool, n), *chosen = LS_STACK(bool, n);
  float *choosing = scores, *weights = LS_STACK(float, k);
  for (int64_t e = 0; e < n; ++e) taken[e] = chosen[e] = false;
  if (l->router_kind == LS_SIGMOID) {
    choosing = LS_STACK(float, n);
    for (int64_t e = 0; e < n; ++e) {
      scores[e] = 1.0f / (1.0f + expf(-scores[e]));
      choosing[e] = scores[e] + l->correction[e];
    }
    if (l->n_active_groups < l->n_groups) rule_out(l, choosing, taken);
  }
  for (int64_t j = 0; j < k; ++j) {
    const int64_t best = largest(choosing, taken, n);
    taken[best] = chosen[best] = true;
  }
  float total = l->router_kind == LS_SOFTMAX_TOPK ? exponentials(scores, n) : 0.0f;
  for (int64_t e = 0, j = 0; e < n; ++e)
    if (chosen[e]) to[j] = {e, row, 0.0f}, weights[j++] = scores[e];
  if (l->router_kind == LS_TOPK_SOFTMAX) total = exponentials(weights, k);
  if (l->router_kind == LS_SIGMOID) {
    for (int64_t j = 0; j < k; ++j) total += weights[j];
    total = l->normalize ? total + 1e-20f : 1.0f;
  }
  const float scale = l->router_kind == LS_SIGMOID ? (float)l->scale : 1.0f;
  for (int64_t j = 0; j < k; ++j) to[j].weight = weights[j] / total * scale;
}

// Sort the choices of all tokens by expert.
void group(const Scratch &s, int64_t n_choices, int64_t n_experts) {
  int64_t count = 0, at = 0;
  for (int64_t e = 0; e < n_experts; ++e) {
    const int64_t begin = at;
    for (int64_t i = 0; i < n_choices; ++i)
      if (s.chosen[i].expert == e) s.sorted[at++] = s.chosen[i];
    if (at > begin) s.groups[1 + count++] = begin;
  }
  s.groups[0] = count, s.groups[1 + count] = at;
}

// The inputs of the experts, for every row: of the sublayer, or their projections.
void prepare_inputs(Member *me, const ls_sublayer *sublayer, const ls_experts *layer) {
  const ls_matrix *up = &experts_of(layer)->up_proj;
  const auto input = [&](int64_t row) { return me->input_row(sublayer, row); };
  if (!layer->d_latent) return me->prepare_rows(up, input);
  float *latent = me->s->narrow + me->rows * layer->n_experts;
  const Pieces p = me->cut(layer->d_latent);
  me->prepare_rows(&layer->to_latent, input);
  me->phase(p.units, [&](int64_t unit) {
    me->multiply(&layer->to_latent, latent, layer->d_latent, false, unit * p.size, end_of(p, unit));
  });
  me->prepare_rows(up, [&](int64_t row) { return latent + row * layer->d_latent; });
}

}  // namespace

Needs needs_of(const ls_experts *l) {
  const ls_matrix *up = &experts_of(l)->up_proj;
  const int64_t F = up->n_out, width = up->n_in > F ? up->n_in : F;
  return {l->n_active * 2 * F, l->n_experts + l->d_latent, width, l->n_active, l->n_active * prepared_bytes(F)};
}

void advance(Member *me, const ls_sublayer *sublayer, const ls_experts *layer, const ls_matrix *then) {
  const Scratch &s = *me->s;
  const ls_mlp *experts = experts_of(layer);
  const int64_t D = me->a->d_model, E = layer->n_experts, k = layer->n_active, F = experts->up_proj.n_out;
  const int64_t n_choices = me->rows * k, latent = layer->d_latent, width = latent ? latent : D;
  const Pieces scores = me->cut(E), hidden = me->cut(F), out = me->cut(width);
  const float scale = latent ? 1.0f : (float)sublayer->out_scale;
  float *const sums = latent ? s.y : s.residual;

  me->begin(sublayer, &layer->router);
  me->phase(scores.units, [&](int64_t unit) {
    me->multiply(&layer->router, s.narrow, E, false, unit * scores.size, end_of(scores, unit));
  });
  me->phase(me->rows, [&](int64_t row) { choose(layer, s.narrow + row * E, row, s.chosen + row * k); });
  me->phase(1, [&](int64_t) { group(s, n_choices, E); });
  prepare_inputs(me, sublayer, layer);
  // as many units as there may be groups: how many there are is valid only until the last unit is done, since the other
  // threads may then be in a later layer already
  me->phase((n_choices < E ? n_choices : E) * hidden.units, [&](int64_t unit) {
    if (unit / hidden.units >= s.groups[0]) return;
    const int64_t *of = s.groups + 1 + unit / hidden.units, piece = unit % hidden.units;
    const int64_t begin = piece * hidden.size, end = end_of(hidden, piece);
    for (int64_t i = of[0]; i < of[1]; ++i) {
      const Choice &choice = s.sorted[i];
      const ls_mlp *expert = experts + choice.expert;
      float *up = s.wide + i * 2 * F, *gate = up + F;
      me->multiply_row(&expert->up_proj, choice.row, up, false, begin, end);
      if (expert->gated) me->multiply_row(&expert->gate_proj, choice.row, gate, false, begin, end);
      activate(expert, up, gate, scale * choice.weight, begin, end);
    }
  });
  me->prepare_each(
      n_choices, [&](int64_t i) { return &experts[s.sorted[i].expert].down_proj; },
      [&](int64_t i) { return s.wide + i * 2 * F; });
  me->expect(latent ? &layer->from_latent : then);
  me->phase(out.units, [&](int64_t unit) {
    const int64_t begin = unit * out.size, end = end_of(out, unit);
    for (int64_t row = 0; latent && row < me->rows; ++row)
      memset(sums + row * width + begin, 0, sizeof(float) * (size_t)(end - begin));
    for (int64_t i = 0; i < n_choices; ++i) {
      const Choice &choice = s.sorted[i];
      me->multiply_row(&experts[choice.expert].down_proj, i, sums + choice.row * width, true, begin, end);
    }
  });
  if (latent) me->finish(sublayer, &layer->from_latent, then, [&](int64_t row) { return s.y + row * latent; });
}

}  // namespace LS_ISA
