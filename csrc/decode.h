// How the threads of one decoding call work together, and what they share.
//
// The work is a sequence of phases, each cut into units that do not depend on each other. All threads enter once. In
// a phase each has a run of neighbouring units, takes over what others have left when its own are done, and then
// waits until the last one is finished; any number of threads will do, also one. No unit splits a sum: the
// results do not depend on the number of threads, nor on which rows share a call.
//
// Memory is what limits decoding, so it must never idle: who computes a recurrence or waits asks for the weights
// of its next units meanwhile.
#pragma once
#include <atomic>

#include "matrix.h"
#include "simd.h"

namespace LS_ISA {

struct alignas(64) Counter {
  std::atomic<int64_t> value;
};

constexpr int64_t FAR = 3 << 16;  // bytes of the next weights to ask for: they fit the second-level cache
constexpr int64_t UNITS = 4;      // of a thread in a phase
constexpr int64_t FEW = 4;        // so many rows every thread prepares for itself, which is quicker than to wait

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

// [begin, end) of the units of a thread's run.
LS_INLINE int64_t run_begin(int64_t units, int64_t threads, int64_t id) { return units * id / threads; }

// An expert that a token passes through, and its weight.
struct Choice {
  int64_t expert, row;
  float weight;
};

// Where a call keeps what is between the phases.
struct Scratch {
  float *residual;         // (rows, d_model)
  float *embedded, *side;  // likewise, if a sublayer needs them
  float *normed, *gated;   // (rows, n_normed), (rows, widest): for every thread if the rows are few
  float *wide, *narrow;    // of a sublayer: (rows, n_wide), (rows, n_narrow)
  float *dt, *y;           // (rows, widest)
  float *partials;         // of attention over spans of a cache
  char *prepared;          // (rows, widest), for every thread if the rows are few
  Choice *chosen, *sorted;  // (rows, n_choices) by token and by expert
  int64_t *groups;          // of one expert in `sorted`: how many, where each begins, where the last one ends
  Counter *counters;       // the first counts the threads that have come
  int64_t widest, n_normed, n_wide, n_narrow, n_choices, prepared_size, n_counters, bytes;
};

// x / sqrt(mean(x^2) + eps) * weight; y may be x; without a weight it is 1.
void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y);

// One thread's view of the call.
struct Member {
  const ls_decode *a;
  const Scratch *s;
  int64_t rows, id;
  bool few;
  Counter *counters;       // of each phase: units done, and units taken of every thread's run
  char *ready;             // prepared rows, the thread's own if the rows are few
  const char *next, *end;  // weights worth asking for
  bool together;           // whether all threads have the same normed rows

  Pieces cut(int64_t n) const { return pieces(n, UNITS * a->threads); }
  int64_t mine(int64_t row) const { return (few ? id * rows : 0) + row; }
  float *normed_row(int64_t row) const {
    return s->normed + (together ? a->threads * rows + row : mine(row)) * s->n_normed;  // behind those of the threads
  }
  float *gated_row(int64_t row) const { return s->gated + mine(row) * s->widest; }

  // The first weights of this thread's run, if they are multiplied by in pieces like these.
  void expect(const ls_matrix *m, const Pieces &p) {
    const int64_t first = run_begin(p.units, a->threads, id) * p.size;
    const int64_t last = run_begin(p.units, a->threads, id + 1) * p.size;
    const int64_t row = m->format == LS_F32    ? 4 * m->n_in
                        : m->format == LS_BF16 ? 2 * m->n_in
                        : m->format == LS_INT4 ? m->n_in / 2
                                               : m->n_in;
    const int64_t length = ((last < p.n ? last : p.n) - first) * row;
    next = (const char *)m->data + first * row;
    end = next + (length < FAR ? length : FAR);
  }
  void expect(const ls_matrix *m) { expect(m, cut(m->n_out)); }
  void prefetch(int lines) {
    for (; lines > 0 && next < end; --lines, next += 64) __builtin_prefetch(next);
  }

  template <typename Body>
  void phase(int64_t units, const Body &body) {
    const int64_t threads = a->threads;
    Counter *done = counters, *taken = done + 1;
    counters += 1 + threads;
    int64_t worked = 0;
    for (int64_t turn = 0; turn < threads; ++turn) {
      const int64_t whose = (id + turn) % threads;
      const int64_t first = run_begin(units, threads, whose), last = run_begin(units, threads, whose + 1);
      while (taken[whose].value.load(std::memory_order_relaxed) < last - first) {
        const int64_t unit = first + taken[whose].value.fetch_add(1, std::memory_order_relaxed);
        if (unit >= last) break;
        body(unit);
        ++worked;
      }
    }
    if (worked) done->value.fetch_add(worked, std::memory_order_acq_rel);
    for (int64_t turn = 0; done->value.load(std::memory_order_acquire) < units; ++turn) {
      prefetch(2);
#if defined(__SSE2__)
      _mm_pause();
#endif
      if (turn > 4000) ls_yield();  // the others may need this processor
    }
  }

  template <typename RowOf>
  void prepare_rows(const ls_matrix *matrix, const RowOf &row_of) {
    prepare_each(rows, [&](int64_t) { return matrix; }, row_of);
  }
  // The same for n rows, each of a matrix of its own, with as many inputs.
  template <typename MatrixOf, typename RowOf>
  void prepare_each(int64_t n, const MatrixOf &matrix_of, const RowOf &row_of) {
    const int64_t size = prepared_bytes(matrix_of(0)->n_in);
    if (few)
      for (int64_t row = 0; row < n; ++row) prepare(matrix_of(row), row_of(row), ready + row * size);
    else
      phase(n, [&](int64_t row) { prepare(matrix_of(row), row_of(row), ready + row * size); });
  }

  void multiply(const ls_matrix *matrix, float *y, int64_t stride, bool add, int64_t first, int64_t last) const {
    const Product product = {matrix, ready, rows, y, stride, add};
    outputs(&product, first, last);
  }
  // Of one prepared row alone.
  void multiply_row(const ls_matrix *matrix, int64_t row, float *y, bool add, int64_t first, int64_t last) const {
    const Product product = {matrix, ready + row * prepared_bytes(matrix->n_in), 1, y, 0, add};
    outputs(&product, first, last);
  }

  // Every sublayer begins with in_scale norm(residual), prepared for a matrix. Threads that each normalise a few rows for
  // themselves may do it so late that the others have changed the residual stream; they have nothing left to do in
  // that sublayer then, but they would in the next one of the same input: it gets rows that are normalised once ...
  void begin(const ls_sublayer *layer, const ls_matrix *matrix) {
    const bool again = layer->weights && layer + 1 < a->layers + a->n_layers && !layer[1].norm;
    if (layer->norm) together = few && again;
    if (layer->norm && together) phase(rows, [&](int64_t row) { normalize(layer, row); });
    prepare_rows(matrix, [&](int64_t row) -> const float * {
      if (layer->norm && !together) normalize(layer, row);
      return scaled(normed_row(row), layer->in_scale, layer->reads == LS_JOINED ? 2 * a->d_model : a->d_model, row);
    });
  }

  void normalize(const ls_sublayer *layer, int64_t row) {
    const int64_t D = a->d_model, width = layer->reads == LS_JOINED ? 2 * D : D;
    float *x = normed_row(row);
    const float *from = (layer->reads == LS_SIDE ? s->side : s->residual) + row * D;
    if (layer->reads == LS_JOINED) {
      memcpy(x, from, sizeof(float) * (size_t)D);
      memcpy(x + D, s->embedded + row * D, sizeof(float) * (size_t)D);
      from = x;
    }
    rms_norm(from, layer->norm, (float)a->eps, width, x);
  }

  // ... which is still there while the sublayer scales nothing else ...
  const float *input_row(const ls_sublayer *layer, int64_t row) const {
    return layer->in_scale == 1.0 ? normed_row(row) : gated_row(row);
  }

  // ... and ends with residual += out_proj (out_scale row), or writes to the side. `then` is the matrix that comes next.
  template <typename RowOf>
  void finish(const ls_sublayer *layer, const ls_matrix *out_proj, const ls_matrix *then, const RowOf &row_of) {
    prepare_rows(out_proj, [&](int64_t row) { return scaled(row_of(row), layer->out_scale, out_proj->n_in, row); });
    expect(then);
    const Pieces p = cut(a->d_model);
    phase(p.units, [&](int64_t unit) {
      const int64_t begin = unit * p.size, end = end_of(p, unit), D = a->d_model;
      const size_t bytes = sizeof(float) * (size_t)(end - begin);
      for (int64_t row = 0; layer->writes != LS_RESIDUAL && row < rows; ++row) {
        float *side = s->side + row * D + begin;
        if (layer->writes == LS_SUM)
          memcpy(side, s->residual + row * D + begin, bytes);
        else
          memset(side, 0, bytes);
      }
      multiply(out_proj, layer->writes == LS_RESIDUAL ? s->residual : s->side, D, true, begin, end);
    });
  }

 private:
  const float *scaled(const float *x, double factor, int64_t n, int64_t row) const {
    if (factor == 1.0) return x;
    float *to = gated_row(row);  // which may be x
    for (int64_t i = 0; i < n; ++i) to[i] = (float)factor * x[i];
    return to;
  }
};

// The sublayers; each in decode_<kind>.cpp, with the floats of a row that it needs, its choices of experts and the
// bytes of prepared rows, if they are more than one that is as wide as the widest.
struct Needs {
  int64_t wide, narrow, widest, n_choices = 0, prepared = 0;
};
Needs needs_of(const ls_mamba *);
Needs needs_of(const ls_mamba2 *);
Needs needs_of(const ls_attention *);
Needs needs_of(const ls_mlp *);
Needs needs_of(const ls_mamba3 *);
Needs needs_of(const ls_experts *);
int64_t n_partials(const ls_decode *, const ls_attention *, const ls_state *);  // floats, for all rows
void advance(Member *, const ls_sublayer *, const ls_mamba *, const ls_matrix *then);
void advance(Member *, const ls_sublayer *, const ls_mamba2 *, const ls_matrix *then);
void advance(Member *, const ls_sublayer *, const ls_attention *, const ls_matrix *then);
void advance(Member *, const ls_sublayer *, const ls_mlp *, const ls_matrix *then);
void advance(Member *, const ls_sublayer *, const ls_mamba3 *, const ls_matrix *then);
void advance(Member *, const ls_sublayer *, const ls_experts *, const ls_matrix *then);

// up = scale act(gate) up of an MLP's hidden channels [begin, end), or scale act(up) without a gate.
void activate(const ls_mlp *mlp, float *up, const float *gate, float scale, int64_t begin, int64_t end);
// The experts' MLPs, behind the struct itself.
inline const ls_mlp *experts_of(const ls_experts *l) { return (const ls_mlp *)(l + 1); }

// The causal convolution of channels [begin, end) of one sequence, in place, with SiLU or without: x (steps, stride)
// with `channels` numbers a row, past (d_conv - 1, channels), weight (d_conv, channels).
struct Convolution {
  const float *weight, *bias;
  int64_t channels, d_conv;
  bool silu;
};
void convolve(const Convolution *c, float *x, int64_t stride, int64_t steps, float *past, int64_t begin, int64_t end);

}  // namespace LS_ISA
