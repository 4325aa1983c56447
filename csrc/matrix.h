// A stored matrix times a few rows: the activations are prepared once per row, then every output is one dot product
// whose sum runs in an order of its own, whoever computes it and beside whatever other rows.
#pragma once
#include "kernels.h"

namespace LS_ISA {

// Bytes of a row of n numbers in the form that a format multiplies by, a multiple of 64.
inline int64_t formatted_bytes(int64_t n) {
  const int64_t blocks = ls_ceil(n, LS_ACTIVATIONS);
  return blocks * LS_ACTIVATIONS * 4 + ls_ceil(blocks, 16) * 64;
}
// Bytes that one prepared row takes: that form, and behind it the numbers themselves, for adapters.
inline int64_t prepared_bytes(int64_t n) { return formatted_bytes(n) + ls_ceil(n, 16) * 64; }

// Bring a row of activations x (n_in) into the form the format of the matrix multiplies by.
void prepare(const ls_matrix *matrix, const float *x, char *prepared);

// y[r, o] = (add ? y[r, o] : 0) + dot(row r, weight o) + bias[o] for o in [begin, end), and what the adapter adds.
struct Product {
  const ls_matrix *matrix;
  const char *prepared;  // (rows, prepared_bytes(n_in))
  int64_t rows;
  float *y;
  int64_t stride;  // from one row of y to the next
  bool add;
};
void outputs(const Product *product, int64_t begin, int64_t end);

// The weight (n_in) that row o of a matrix stands for.
void dequantize_row(const ls_matrix *matrix, int64_t o, float *weight);

}  // namespace LS_ISA
