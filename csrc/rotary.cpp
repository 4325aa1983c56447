// Rotation of q and k by angles that are running sums over time. A unit of parallel work is a run of tokens of one row:
// first every unit adds up its own turns, then the angles before each unit follow, then all tokens are rotated. The
// backward pass does the same from the end, since a turn moves all later angles of its sequence.
#include "kernels.h"
#include "simd.h"

namespace LS_ISA {
namespace {

struct Shape {
  int64_t angles, vectors, groups;  // numbers of a token: n_heads n_angles, rank n_heads d_state, rank n_groups d_state
  int64_t units, length;            // of a row, and tokens of each
  explicit Shape(const ls_rotary *a)
      : angles(a->n_heads * a->n_angles), vectors(a->rank * a->n_heads * a->d_state),
        groups(a->rank * a->n_groups * a->d_state), units(ls_rotary_units(a)), length(ls_ceil(a->seq_len, units)) {}
};

struct Unit {
  int64_t index, b, first, last;
  Unit(const ls_rotary *a, const Shape &s, int64_t i) : index(i), b(i / s.units), first(i % s.units * s.length) {
    last = first + s.length < a->seq_len ? first + s.length : a->seq_len;
    if (first > last) first = last;
  }
};

struct Job {
  const ls_rotary *a;
  Shape s;
  double *angle;      // (units, angles): the sum of a unit's turns, then the angle before it; later of its gradients
  char *restarts;     // (units): whether a sequence starts in it
  float *dangle;      // (batch, seq_len, angles)
  float *partial;     // (units, 2, vectors): sums of the gradients of the biases
  explicit Job(const ls_rotary *args) : a(args), s(args) {
    const int64_t n = a->batch * s.units;
    angle = (double *)a->workspace;
    dangle = (float *)(angle + n * s.angles);
    partial = dangle + a->batch * a->seq_len * s.angles;
    restarts = (char *)(a->dq ? partial + n * 2 * s.vectors : dangle);
  }
};

LS_INLINE int mark(const ls_rotary *a, int64_t token) { return a->marks ? a->marks[token] : 0; }

// angle += rate dt of every head, after zero if a sequence starts here.
LS_INLINE void advance(const ls_rotary *a, int64_t token, double *angle) {
  const float *rate = a->rate + token * a->n_angles, *dt = a->dt + token * a->n_heads;
  if (mark(a, token) & LS_STARTS) memset(angle, 0, sizeof(double) * (size_t)(a->n_heads * a->n_angles));
  for (int64_t h = 0; h < a->n_heads; ++h)
    for (int64_t i = 0; i < a->n_angles; ++i) angle[h * a->n_angles + i] += (double)(rate[i] * dt[h]);
}

// cosine and sine: quarters of a turn are taken off in double, and the rest is at most pi / 4.
LS_INLINE void cosines_of(const double *angle, int64_t n, float *cosine, float *sine) {
  const double quarter = 1.5707963267948966, shift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds
  for (int64_t i = 0; i < n; ++i) {
    const double count = angle[i] * (1.0 / quarter) + shift - shift;
    const float r = (float)(angle[i] - quarter * count), q = r * r;
    const float turns = (float)(count - 4.0 * (count * 0.25 + shift - shift));  // -2, -1, 0, 1 or 2
    const float s = r * (1.0f + q * (-1.0f / 6 + q * (1.0f / 120 + q * (-1.0f / 5040 + q * (1.0f / 362880)))));
    const float c = 1.0f + q * (-0.5f + q * (1.0f / 24 + q * (-1.0f / 720 + q * (1.0f / 40320))));
    const bool odd = turns * turns == 1.0f, back = turns * turns == 4.0f;
    const float co = odd ? -turns * s : c, si = odd ? turns * c : s;
    cosine[i] = back ? -co : co, sine[i] = back ? -si : si;
  }
}

// Rotate pairs of x (d_state) by the angles, or back; step and other say where a pair lies.
template <bool HALVES>
LS_INLINE void rotate(const float *__restrict x, const float *__restrict c, const float *__restrict s, float sign,
                      int64_t n_angles, int64_t d_state, float *__restrict y) {
  const int64_t step = HALVES ? 1 : 2, other = HALVES ? d_state / 2 : 1;
  for (int64_t i = 0; i < n_angles; ++i) {
    const float p = x[i * step], q = x[i * step + other], si = sign * s[i];
    y[i * step] = p * c[i] - q * si;
    y[i * step + other] = p * si + q * c[i];
  }
  const int64_t rest = HALVES ? d_state / 2 : d_state;
  for (int64_t i = HALVES ? n_angles : 2 * n_angles; i < rest; ++i) y[i] = x[i];
  for (int64_t i = d_state / 2 + n_angles; HALVES && i < d_state; ++i) y[i] = x[i];
}
LS_INLINE void rotate(const ls_rotary *a, const float *x, const float *c, const float *s, float sign, float *y) {
  if (a->halves)
    rotate<true>(x, c, s, sign, a->n_angles, a->d_state, y);
  else
    rotate<false>(x, c, s, sign, a->n_angles, a->d_state, y);
}

// dangle += p dq - q dp of every pair (p, q) of x, with its gradient turned back.
template <bool HALVES>
LS_INLINE void add_turn(const float *__restrict x, const float *__restrict d, int64_t n_angles, int64_t d_state,
                        float *__restrict dangle) {
  const int64_t step = HALVES ? 1 : 2, other = HALVES ? d_state / 2 : 1;
  for (int64_t i = 0; i < n_angles; ++i)
    dangle[i] += x[i * step] * d[i * step + other] - x[i * step + other] * d[i * step];
}

LS_INLINE void add_turn(const ls_rotary *a, const float *x, const float *d, float *dangle) {
  if (a->halves)
    add_turn<true>(x, d, a->n_angles, a->d_state, dangle);
  else
    add_turn<false>(x, d, a->n_angles, a->d_state, dangle);
}

LS_INLINE void add(const float *__restrict x, const float *__restrict y, int64_t n, float *__restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] + y[i];
}
LS_INLINE void add_scaled(const float *__restrict x, float by, int64_t n, float *__restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] += by * x[i];
}
LS_INLINE float dot(const float *x, const float *y, int64_t n) {
  vec total = vec{};
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = n - i < W ? (int)(n - i) : W;
    total += load_n(x + i, lanes) * load_n(y + i, lanes);
  }
  return sum(total);
}

// The vectors of a head at a token before they turn: (rank, d_state), from those of the groups and the biases.
LS_INLINE void vectors_of(const ls_rotary *a, const float *groups, const float *bias, int64_t head, float *to) {
  const int64_t N = a->d_state, group = head / (a->n_heads / a->n_groups);
  for (int64_t r = 0; r < a->rank; ++r)
    add(groups + (r * a->n_groups + group) * N, bias + (r * a->n_heads + head) * N, N, to + r * N);
}

void sum_unit(const Job *job, int64_t index) {
  const ls_rotary *a = job->a;
  const Unit unit(a, job->s, index);
  double *angle = job->angle + index * job->s.angles;
  memset(angle, 0, sizeof(double) * (size_t)job->s.angles);
  job->restarts[index] = 0;
  for (int64_t t = unit.first; t < unit.last; ++t) {
    const int64_t token = unit.b * a->seq_len + t;
    if (mark(a, token) & LS_PADDING) continue;
    if (mark(a, token) & LS_STARTS) job->restarts[index] = 1;
    advance(a, token, angle);
  }
}

// Turn the sums of the units into the angles before each; the last one goes to `final`, less whole turns.
void join(const Job *job) {
  const ls_rotary *a = job->a;
  const int64_t n = job->s.angles, units = job->s.units;
  const double whole = 6.283185307179586, shift = 6755399441055744.0;
  for (int64_t b = 0; b < a->batch; ++b)
    for (int64_t i = 0; i < n; ++i) {
      double before = a->initial[b * n + i];
      for (int64_t u = 0; u < units; ++u) {
        double *of = job->angle + (b * units + u) * n + i;
        const double after = job->restarts[b * units + u] ? *of : before + *of;
        *of = before;
        before = after;
      }
      if (a->final) a->final[b * n + i] = (float)(before - whole * (before * (1.0 / whole) + shift - shift));
    }
}

LS_APART void rotate_unit(const Job *job, int64_t index) {
  const ls_rotary *a = job->a;
  const Unit unit(a, job->s, index);
  const int64_t N = a->d_state, R = a->rank, H = a->n_heads, S = a->n_angles;
  double *angle = job->angle + index * job->s.angles;
  float *c = LS_STACK(float, 2 * job->s.angles), *s = c + job->s.angles;
  float *u = LS_STACK(float, 2 * R * N), *v = u + R * N;
  for (int64_t t = unit.first; t < unit.last; ++t) {
    const int64_t token = unit.b * a->seq_len + t;
    float *q = a->q + token * job->s.vectors, *k = a->k + token * job->s.vectors;
    float *products = a->products + token * R * R * H;
    if (mark(a, token) & LS_PADDING) {
      memset(q, 0, sizeof(float) * (size_t)job->s.vectors);
      memset(k, 0, sizeof(float) * (size_t)job->s.vectors);
      memset(products, 0, sizeof(float) * (size_t)(R * R * H));
      continue;
    }
    advance(a, token, angle);
    cosines_of(angle, job->s.angles, c, s);
    for (int64_t h = 0; h < H; ++h) {
      vectors_of(a, a->C + token * job->s.groups, a->C_bias, h, u);
      vectors_of(a, a->B + token * job->s.groups, a->B_bias, h, v);
      for (int64_t r = 0; r < R; ++r) {
        rotate(a, u + r * N, c + h * S, s + h * S, 1.0f, q + (r * H + h) * N);
        rotate(a, v + r * N, c + h * S, s + h * S, 1.0f, k + (r * H + h) * N);
        for (int64_t o = 0; o < R; ++o) products[(r * R + o) * H + h] = dot(u + r * N, v + o * N, N);
      }
    }
  }
}

// The gradients of everything but the turns; those of the angles go to `dangle`.
LS_APART void backward_unit(const Job *job, int64_t index) {
  const ls_rotary *a = job->a;
  const Unit unit(a, job->s, index);
  const int64_t N = a->d_state, R = a->rank, H = a->n_heads, S = a->n_angles, per_group = H / a->n_groups;
  double *angle = job->angle + index * job->s.angles;
  float *c = LS_STACK(float, 2 * job->s.angles), *s = c + job->s.angles;
  float *u = LS_STACK(float, 4 * R * N), *v = u + R * N, *du = v + R * N, *dv = du + R * N;
  float *dC_bias = job->partial + index * 2 * job->s.vectors, *dB_bias = dC_bias + job->s.vectors;
  memset(dC_bias, 0, sizeof(float) * (size_t)(2 * job->s.vectors));
  for (int64_t t = unit.first; t < unit.last; ++t) {
    const int64_t token = unit.b * a->seq_len + t;
    float *dC = a->dC + token * job->s.groups, *dB = a->dB + token * job->s.groups;
    float *dangle = job->dangle + token * job->s.angles;
    memset(dC, 0, sizeof(float) * (size_t)job->s.groups);
    memset(dB, 0, sizeof(float) * (size_t)job->s.groups);
    memset(dangle, 0, sizeof(float) * (size_t)job->s.angles);
    if (mark(a, token) & LS_PADDING) continue;
    const float *dq = a->dq + token * job->s.vectors, *dk = a->dk + token * job->s.vectors;
    const float *dproducts = a->dproducts + token * R * R * H;
    advance(a, token, angle);
    cosines_of(angle, job->s.angles, c, s);
    for (int64_t h = 0; h < H; ++h) {
      vectors_of(a, a->C + token * job->s.groups, a->C_bias, h, u);
      vectors_of(a, a->B + token * job->s.groups, a->B_bias, h, v);
      for (int64_t r = 0; r < R; ++r) {
        rotate(a, dq + (r * H + h) * N, c + h * S, s + h * S, -1.0f, du + r * N);
        rotate(a, dk + (r * H + h) * N, c + h * S, s + h * S, -1.0f, dv + r * N);
        add_turn(a, u + r * N, du + r * N, dangle + h * S);
        add_turn(a, v + r * N, dv + r * N, dangle + h * S);
      }
      for (int64_t r = 0; r < R; ++r)
        for (int64_t o = 0; o < R; ++o) {
          const float d = dproducts[(r * R + o) * H + h];
          add_scaled(v + o * N, d, N, du + r * N);
          add_scaled(u + r * N, d, N, dv + o * N);
        }
      for (int64_t r = 0; r < R; ++r) {
        const int64_t group = (r * a->n_groups + h / per_group) * N, head = (r * H + h) * N;
        add_scaled(du + r * N, 1.0f, N, dC + group);
        add_scaled(dv + r * N, 1.0f, N, dB + group);
        add_scaled(du + r * N, 1.0f, N, dC_bias + head);
        add_scaled(dv + r * N, 1.0f, N, dB_bias + head);
      }
    }
  }
}

// The sum of a unit's gradients of angles that reach the tokens before it: those up to the first start.
void sum_back(const Job *job, int64_t index) {
  const ls_rotary *a = job->a;
  const Unit unit(a, job->s, index);
  const int64_t n = job->s.angles;
  double *total = job->angle + index * n;
  memset(total, 0, sizeof(double) * (size_t)n);
  for (int64_t t = unit.first; t < unit.last; ++t) {
    const int64_t token = unit.b * a->seq_len + t;
    if (mark(a, token) & LS_STARTS) break;
    for (int64_t i = 0; i < n; ++i) total[i] += job->dangle[token * n + i];
  }
}

void join_back(const Job *job) {
  const ls_rotary *a = job->a;
  const int64_t n = job->s.angles, units = job->s.units;
  for (int64_t b = 0; b < a->batch; ++b)
    for (int64_t i = 0; i < n; ++i) {
      double after = a->dfinal ? a->dfinal[b * n + i] : 0.0;
      for (int64_t u = units - 1; u >= 0; --u) {
        double *of = job->angle + (b * units + u) * n + i;
        const double before = job->restarts[b * units + u] ? *of : after + *of;
        *of = after;
        after = before;
      }
      a->dinitial[b * n + i] = (float)after;
    }
}

// drate_i = sum_h dturn_hi dt_h and ddt_h = sum_i dturn_hi rate_i, where dturn is the sum of all later dangle.
LS_APART void turns_unit(const Job *job, int64_t index) {
  const ls_rotary *a = job->a;
  const Unit unit(a, job->s, index);
  const int64_t n = job->s.angles, S = a->n_angles;
  double *total = job->angle + index * n;
  for (int64_t t = unit.last - 1; t >= unit.first; --t) {
    const int64_t token = unit.b * a->seq_len + t;
    float *drate = a->drate + token * S, *ddt = a->ddt + token * a->n_heads, *d = job->dangle + token * n;
    memset(drate, 0, sizeof(float) * (size_t)S);
    memset(ddt, 0, sizeof(float) * (size_t)a->n_heads);
    if (mark(a, token) & LS_PADDING) continue;
    for (int64_t i = 0; i < n; ++i) d[i] = (float)(total[i] += d[i]);
    for (int64_t h = 0; h < a->n_heads; ++h) {
      add_scaled(d + h * S, a->dt[token * a->n_heads + h], S, drate);
      ddt[h] = dot(d + h * S, a->rate + token * S, S);
    }
    if (mark(a, token) & LS_STARTS) memset(total, 0, sizeof(double) * (size_t)n);
  }
}

// The sums over the units of n numbers each, which lie two times n apart.
void sum_partial(const float *partial, int64_t n, int64_t units, float *to) {
  memcpy(to, partial, sizeof(float) * (size_t)n);
  for (int64_t u = 1; u < units; ++u) add_scaled(partial + u * 2 * n, 1.0f, n, to);
}

template <void (*UNIT)(const Job *, int64_t)>
void each_unit(int64_t begin, int64_t end, void *context) {
  for (int64_t i = begin; i < end; ++i) UNIT((const Job *)context, i);
}
template <void (*UNIT)(const Job *, int64_t)>
void run(const Job *job) {
  ls_run(job->a->batch * job->s.units, each_unit<UNIT>, (void *)job);
}

}  // namespace

int32_t rotary_forward(const ls_rotary *a) {
  const Job job(a);
  run<sum_unit>(&job);
  join(&job);
  run<rotate_unit>(&job);
  return 0;
}

int32_t rotary_backward(const ls_rotary *a) {
  const Job job(a);
  run<sum_unit>(&job);
  join(&job);
  run<backward_unit>(&job);
  run<sum_back>(&job);
  join_back(&job);
  run<turns_unit>(&job);
  const int64_t n = job.s.vectors, units = a->batch * job.s.units;
  sum_partial(job.partial, n, units, a->dC_bias);
  sum_partial(job.partial + n, n, units, a->dB_bias);
  return 0;
}

}  // namespace LS_ISA
