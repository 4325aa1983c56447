// Decoding: one call takes every row a few tokens further through all blocks of a Mamba, weights streaming once.
//
// The work is a sequence of phases, each cut into units that do not depend on each other. All threads enter once. In
// a phase each has a run of neighbouring units, takes over what others have left when its own are done, and then
// waits until the last one is finished; any number of threads will do, also one. No unit splits a sum: the
// results do not depend on the number of threads, nor on which rows share a call.
//
// Memory is what limits decoding, so it must never idle: who computes a recurrence or waits asks for the weights
// of its next units meanwhile.
#include <atomic>

#include "matrix.h"
#include "simd.h"

namespace LS_ISA {
namespace {

struct alignas(64) Counter {
  std::atomic<int64_t> value;
};

constexpr int64_t FAR = 3 << 16;  // bytes of the next weights to ask for: they fit the second-level cache
constexpr int64_t UNITS = 4;      // of a thread in a phase

// One thread's view of the call.
struct Member {
  Counter *counters;  // of each phase: units done, and units taken of every thread's run
  int64_t threads, id;
  const char *next, *end;  // weights worth asking for

  void expect(const ls_matrix *m, int64_t first_output, int64_t outputs) {
    const int64_t row = m->format == LS_F32    ? 4 * m->n_in
                        : m->format == LS_BF16 ? 2 * m->n_in
                        : m->format == LS_INT4 ? m->n_in / 2
                                               : m->n_in;
    const int64_t length = outputs * row;
    next = (const char *)m->data + first_output * row;
    end = next + (length < FAR ? length : FAR);
  }
  void prefetch(int lines) {
    for (; lines > 0 && next < end; --lines, next += 64) __builtin_prefetch(next);
  }
};

// [begin, end) of the units of a thread's run.
LS_INLINE int64_t run_begin(int64_t units, int64_t threads, int64_t id) { return units * id / threads; }

template <typename Body>
LS_INLINE void phase(Member *me, int64_t units, const Body &body) {
  Counter *done = me->counters, *taken = done + 1;
  me->counters += 1 + me->threads;
  int64_t mine = 0;
  for (int64_t turn = 0; turn < me->threads; ++turn) {
    const int64_t whose = (me->id + turn) % me->threads;
    const int64_t begin = run_begin(units, me->threads, whose), end = run_begin(units, me->threads, whose + 1);
    while (taken[whose].value.load(std::memory_order_relaxed) < end - begin) {
      const int64_t unit = begin + taken[whose].value.fetch_add(1, std::memory_order_relaxed);
      if (unit >= end) break;
      body(unit);
      ++mine;
    }
  }
  if (mine) done->value.fetch_add(mine, std::memory_order_acq_rel);
  for (int64_t turn = 0; done->value.load(std::memory_order_acquire) < units; ++turn) {
    me->prefetch(2);
#if defined(__SSE2__)
    _mm_pause();
#endif
    if (turn > 4000) ls_yield();  // the others may need this processor
  }
}

// [0, n) in about `units` pieces of whole cache lines.
struct Pieces {
  int64_t n, size, units;
};
LS_INLINE Pieces pieces(int64_t n, int64_t units) {
  const int64_t size = ls_ceil(ls_ceil(n, units), 16) * 16;
  return {n, size, ls_ceil(n, size)};
}
LS_INLINE int64_t end_of(const Pieces &p, int64_t unit) {
  return (unit + 1) * p.size < p.n ? (unit + 1) * p.size : p.n;
}

constexpr int64_t PHASES_OF_LAYER = 9, OTHER_PHASES = 3;
constexpr int64_t FEW = 4;  // so many rows every thread prepares for itself, which is quicker than to wait

// Where a call keeps what is between the phases.
struct Scratch {
  float *residual, *normed, *xz, *dbc, *dt, *y;  // (rows, width of each)
  char *prepared;                                // (rows, widest), for every thread if the rows are few
  int64_t prepared_size;
  Counter *counters;  // the first counts the threads that have come
  int64_t n_counters, bytes;
};
Scratch scratch_of(const ls_decode *a) {
  const int64_t rows = a->batch * a->steps, widest = a->d_inner > a->d_model ? a->d_inner : a->d_model;
  int64_t at = 0;
  auto take = [&](int64_t bytes) {
    char *where = (char *)a->workspace + at;
    at += ls_ceil(bytes, 64) * 64;
    return where;
  };
  Scratch s;
  s.n_counters = 1 + (PHASES_OF_LAYER * a->n_layers + OTHER_PHASES) * (1 + a->threads);
  s.counters = (Counter *)take((int64_t)sizeof(Counter) * s.n_counters);
  s.residual = (float *)take(4 * rows * a->d_model);
  s.normed = (float *)take(4 * rows * a->d_model * (rows <= FEW ? a->threads : 1));
  s.xz = (float *)take(8 * rows * a->d_inner);
  s.dbc = (float *)take(4 * rows * (a->dt_rank + 2 * a->d_state));
  s.dt = (float *)take(4 * rows * a->d_inner);
  s.y = (float *)take(4 * rows * a->d_inner);
  s.prepared_size = rows * prepared_bytes(widest > a->dt_rank ? widest : a->dt_rank);
  s.prepared = take(s.prepared_size * (rows <= FEW ? a->threads : 1));
  s.bytes = at;
  return s;
}

struct Decode {
  const ls_decode *a;
  Scratch s;
  int64_t rows;
};

// y may be x; without a weight it is 1.
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

// The causal convolution and SiLU of channels [begin, end) of one sequence, in place in the x half of xz.
LS_APART void convolve(const Decode *d, const ls_layer *layer, float *past, int64_t b, int64_t begin, int64_t end) {
  const ls_decode *a = d->a;
  const int64_t E = a->d_inner, K = a->d_conv;
  for (int64_t c = begin; c < end; c += W) {
    const int lanes = end - c < W ? (int)(end - c) : W;
    vec window[LS_MAX_CONV], taps[LS_MAX_CONV];
    for (int64_t k = 0; k < K; ++k) taps[k] = load_n(layer->conv_weight + k * E + c, lanes);
    for (int64_t k = 0; k + 1 < K; ++k) window[k] = load_n(past + (b * (K - 1) + k) * E + c, lanes);
    const vec bias = layer->conv_bias ? load_n(layer->conv_bias + c, lanes) : vec{};
    for (int64_t t = 0; t < a->steps; ++t) {
      float *x = d->s.xz + (b * a->steps + t) * 2 * E + c;
      window[K - 1] = load_n(x, lanes);
      vec y = bias;
      for (int64_t k = 0; k < K; ++k) y += taps[k] * window[k];
      store_n(x, y * sigmoid(y), lanes);
      for (int64_t k = 0; k + 1 < K; ++k) window[k] = window[k + 1];
    }
    for (int64_t k = 0; k + 1 < K; ++k) store_n(past + (b * (K - 1) + k) * E + c, window[k], lanes);
  }
}

// h = exp(dt A) h + dt B u and y = C h of channels [begin, end), for O of them at a time. A is in powers of 2.
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

LS_APART void scan(const Decode *d, Member *me, const ls_layer *layer, float *h, int64_t b, int64_t begin, int64_t end) {
  const ls_decode *a = d->a;
  const int64_t E = a->d_inner, N = a->d_state, width = a->dt_rank + 2 * N;
  for (int64_t t = 0; t < a->steps; ++t) {
    const int64_t row = b * a->steps + t;
    const float *B = d->s.dbc + row * width + a->dt_rank, *C = B + N;
    const float *u = d->s.xz + row * 2 * E, *z = u + E;
    float *dt = d->s.dt + row * E, *y = d->s.y + row * E;
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

// All that one thread does. Every thread goes through the same phases.
void work(const Decode *d) {
  const ls_decode *a = d->a;
  const Scratch &s = d->s;
  const int64_t rows = d->rows, D = a->d_model, E = a->d_inner, width = a->dt_rank + 2 * a->d_state;
  const int64_t id = s.counters->value.fetch_add(1, std::memory_order_relaxed) % a->threads;
  Member me = {s.counters + 1, a->threads, id, nullptr, nullptr};
  const bool few = rows <= FEW;
  char *const ready = s.prepared + (few ? id * s.prepared_size : 0);
  const Pieces channels = pieces(E, UNITS * a->threads), model = pieces(D, UNITS * a->threads);
  const Pieces narrow = pieces(width, UNITS * a->threads);
  const Pieces vocabulary = pieces(a->head.n_out, 4 * UNITS * a->threads);

  auto prepare_rows = [&](const ls_matrix *matrix, const auto &row_of) {
    const int64_t size = prepared_bytes(matrix->n_in);
    if (few)
      for (int64_t row = 0; row < rows; ++row) prepare(matrix, row_of(row), ready + row * size);
    else
      phase(&me, rows, [&](int64_t row) { prepare(matrix, row_of(row), ready + row * size); });
  };
  auto normed = [&](const float *weight) {
    return [&s, a, D, few, id, rows, weight](int64_t row) {
      float *to = s.normed + ((few ? id * rows : 0) + row) * D;
      rms_norm(s.residual + row * D, weight, (float)a->eps, D, to);
      return to;
    };
  };
  auto multiply = [&](const ls_matrix *matrix, float *y, int64_t stride, bool add, int64_t begin, int64_t end) {
    const Product product = {matrix, ready, rows, y, stride, add};
    outputs(&product, begin, end);
  };
  auto expect = [&](const ls_matrix *matrix, const Pieces &p) {  // the weights of this thread's run
    const int64_t first = run_begin(p.units, a->threads, id) * p.size;
    const int64_t last = run_begin(p.units, a->threads, id + 1) * p.size;
    me.expect(matrix, first, (last < p.n ? last : p.n) - first);
  };

  phase(&me, rows, [&](int64_t row) { dequantize_row(&a->embedding, a->ids[row], s.residual + row * D); });
  for (int64_t l = 0; l < a->n_layers; ++l) {
    const ls_layer *layer = a->layers + l;
    prepare_rows(&layer->in_proj, normed(layer->norm));
    expect(&layer->x_proj, narrow);
    phase(&me, channels.units, [&](int64_t unit) {
      const int64_t begin = unit * channels.size, end = end_of(channels, unit);
      multiply(&layer->in_proj, s.xz, 2 * E, false, begin, end);          // x
      multiply(&layer->in_proj, s.xz, 2 * E, false, E + begin, E + end);  // z
      for (int64_t b = 0; b < a->batch; ++b) convolve(d, layer, a->conv_states[l], b, begin, end);
    });
    prepare_rows(&layer->x_proj, [&](int64_t row) { return s.xz + row * 2 * E; });
    expect(&layer->dt_proj, channels);
    phase(&me, narrow.units, [&](int64_t unit) {
      multiply(&layer->x_proj, s.dbc, width, false, unit * narrow.size, end_of(narrow, unit));
    });
    if (a->inner_eps >= 0)
      phase(&me, rows, [&](int64_t row) {
        float *dt = s.dbc + row * width, *B = dt + a->dt_rank, *C = B + a->d_state;
        rms_norm(dt, layer->dt_norm, (float)a->inner_eps, a->dt_rank, dt);
        rms_norm(B, layer->B_norm, (float)a->inner_eps, a->d_state, B);
        rms_norm(C, layer->C_norm, (float)a->inner_eps, a->d_state, C);
      });
    prepare_rows(&layer->dt_proj, [&](int64_t row) { return s.dbc + row * width; });
    expect(&layer->out_proj, model);
    phase(&me, channels.units, [&](int64_t unit) {
      const int64_t begin = unit * channels.size, end = end_of(channels, unit);
      multiply(&layer->dt_proj, s.dt, E, false, begin, end);
      for (int64_t b = 0; b < a->batch; ++b) scan(d, &me, layer, a->ssm_states[l], b, begin, end);
    });
    prepare_rows(&layer->out_proj, [&](int64_t row) { return s.y + row * E; });
    if (l + 1 < a->n_layers)
      expect(&layer[1].in_proj, channels);
    else
      expect(&a->head, vocabulary);
    phase(&me, model.units, [&](int64_t unit) {
      multiply(&layer->out_proj, s.residual, D, true, unit * model.size, end_of(model, unit));
    });
  }
  prepare_rows(&a->head, normed(a->norm_f));
  phase(&me, vocabulary.units, [&](int64_t unit) {
    multiply(&a->head, a->logits, a->head.n_out, false, unit * vocabulary.size, end_of(vocabulary, unit));
  });
}

void task(int64_t, int64_t, void *context) { work((const Decode *)context); }

}  // namespace

int64_t decode_workspace(const ls_decode *a) { return scratch_of(a).bytes; }

int32_t decode(const ls_decode *a) {
  const Decode d = {a, scratch_of(a), a->batch * a->steps};
  for (int64_t i = 0; i < d.s.n_counters; ++i) d.s.counters[i].value.store(0, std::memory_order_relaxed);
  ls_run(a->threads, task, (void *)&d);
  return 0;
}

}  // namespace LS_ISA
