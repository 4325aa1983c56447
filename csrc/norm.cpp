// RMSNorm with or without a gate. A unit of parallel work is a run of rows; each is read once more than memory asks,
// from the nearest cache.
#include "kernels.h"
#include "simd.h"

namespace LS_ISA {
namespace {

struct Row {
  const float *x, *z, *weight;  // of one group; z and weight null: there is none
  int64_t n;
  bool norm_first;
};

LS_INLINE int lanes_at(const Row &row, int64_t i) { return row.n - i < W ? (int)(row.n - i) : W; }
LS_INLINE vec gate_at(const Row &row, int64_t i, int lanes) {
  const vec z = load_n(row.z + i, lanes);
  return z * sigmoid(z);
}

// What is normalised: x, or x silu(z).
LS_INLINE vec input_at(const Row &row, int64_t i, int lanes) {
  const vec x = load_n(row.x + i, lanes);
  return row.z && !row.norm_first ? x * gate_at(row, i, lanes) : x;
}

LS_INLINE float scale_of(float squares, const Row &row, float eps) {
  return 1.0f / __builtin_sqrtf(squares / (float)row.n + eps);
}

LS_INLINE void forward_row(const Row &row, float eps, float *y) {
  vec squares = vec{};
  for (int64_t i = 0; i < row.n; i += W) {
    const int lanes = lanes_at(row, i);
    const vec u = input_at(row, i, lanes);
    squares += u * u;
    store_n(y + i, u, lanes);
  }
  const vec scale = splat(scale_of(sum(squares), row, eps));
  for (int64_t i = 0; i < row.n; i += W) {
    const int lanes = lanes_at(row, i);
    vec out = load_n(y + i, lanes) * scale;
    if (row.weight) out = out * load_n(row.weight + i, lanes);
    if (row.z && row.norm_first) out = out * gate_at(row, i, lanes);
    store_n(y + i, out, lanes);
  }
}

// With u the input, n = u scale and g = dn, the gradient of n: du = scale (g - n mean(g n)).
LS_INLINE void backward_row(const Row &row, float eps, const float *dy, float *dx, float *dz, float *dweight) {
  vec squares = vec{}, products = vec{};
  for (int64_t i = 0; i < row.n; i += W) {
    const int lanes = lanes_at(row, i);
    const vec u = input_at(row, i, lanes);
    vec g = load_n(dy + i, lanes);
    if (row.weight) g = g * load_n(row.weight + i, lanes);
    if (row.z && row.norm_first) g = g * gate_at(row, i, lanes);
    squares += u * u;
    products += g * u;
    store_n(dx + i, g, lanes);
  }
  const float scale_ = scale_of(sum(squares), row, eps);
  const vec scale = splat(scale_), mean = splat(sum(products) * scale_ / (float)row.n);
  for (int64_t i = 0; i < row.n; i += W) {
    const int lanes = lanes_at(row, i);
    const vec x = load_n(row.x + i, lanes), one = splat(1.0f);
    vec gate = one, slope = one;
    if (row.z) {
      const vec z = load_n(row.z + i, lanes), s = sigmoid(z);
      gate = z * s, slope = s * (one + z * (one - s));
    }
    const vec u = row.z && !row.norm_first ? x * gate : x, normed = u * scale, d = load_n(dy + i, lanes);
    vec du = scale * (load_n(dx + i, lanes) - normed * mean);
    if (dweight) {
      const vec gated = row.z && row.norm_first ? d * gate : d;
      store_n(dweight + i, load_n(dweight + i, lanes) + gated * normed, lanes);
    }
    if (row.z && row.norm_first) {
      const vec out = row.weight ? normed * load_n(row.weight + i, lanes) : normed;
      store_n(dz + i, d * out * slope, lanes);
    } else if (row.z) {
      store_n(dz + i, du * x * slope, lanes);
      du = du * gate;
    }
    store_n(dx + i, du, lanes);
  }
}

// Rows of a unit: a function of their number alone, so that sums always run in one order.
int64_t unit_rows(const ls_rms_norm *a) {
  const int64_t even = ls_ceil(a->rows, LS_NORM_UNITS);
  return even < 16 ? 16 : even;
}

// forward_row or backward_row of each group of the rows of a unit; what they ask of a row is known outside the loops.
template <class Each>
LS_INLINE void each_group(const ls_rms_norm *a, int64_t unit, Each each) {
  const int64_t width = a->n_groups * a->d_group, first = unit * unit_rows(a);
  const int64_t last = first + unit_rows(a) < a->rows ? first + unit_rows(a) : a->rows;
  for (int64_t r = first; r < last; ++r)
    for (int64_t at = 0; at < width; at += a->d_group)
      each(Row{a->x + r * a->x_stride + at, a->z ? a->z + r * a->z_stride + at : nullptr,
               a->weight ? a->weight + at : nullptr, a->d_group, a->norm_first != 0},
           r, at);
}

void forward_task(int64_t begin, int64_t end, void *context) {
  const ls_rms_norm *a = (const ls_rms_norm *)context;
  const int64_t width = a->n_groups * a->d_group;
  for (int64_t unit = begin; unit < end; ++unit)
    each_group(a, unit, [&](const Row &row, int64_t r, int64_t at) {
      forward_row(row, (float)a->eps, a->y + r * width + at);
    });
}

void backward_task(int64_t begin, int64_t end, void *context) {
  const ls_rms_norm *a = (const ls_rms_norm *)context;
  const int64_t width = a->n_groups * a->d_group;
  for (int64_t unit = begin; unit < end; ++unit) {
    float *dweight = a->weight ? a->workspace + unit * width : nullptr;
    if (dweight) memset(dweight, 0, sizeof(float) * (size_t)width);
    each_group(a, unit, [&](const Row &row, int64_t r, int64_t at) {
      backward_row(row, (float)a->eps, a->dy + r * a->dy_stride + at, a->dx + r * width + at,
                   a->z ? a->dz + r * width + at : nullptr, dweight ? dweight + at : nullptr);
    });
  }
}

}  // namespace

int32_t rms_norm_forward(const ls_rms_norm *a) {
  ls_run(ls_ceil(a->rows, unit_rows(a)), forward_task, (void *)a);
  return 0;
}

int32_t rms_norm_backward(const ls_rms_norm *a) {
  const int64_t units = ls_ceil(a->rows, unit_rows(a)), width = a->n_groups * a->d_group;
  ls_run(units, backward_task, (void *)a);
  for (int64_t i = 0; a->weight && i < width; ++i) {
    float total = 0;
    for (int64_t unit = 0; unit < units; ++unit) total += a->workspace[unit * width + i];
    a->dweight[i] = total;
  }
  return 0;
}

}  // namespace LS_ISA
