// A router as plain pointers.
#pragma once

#include <cstdint>

namespace dyndepth {

struct Router {
  const float *weight1, *bias1, *weight2, *bias2;  // [hidden, width], [hidden], [hidden], [1]
  const float *cosine_weight, *extra_weight;       // [hidden], [hidden, extras]; null without that feature
  int64_t width, hidden, extras;
  float eps;
  bool silu;
};

// Probability for one row; `x` is scratch of `width` floats, `extra` the row's further features or null.
template <class T>
float score_row(const Router& router, const T* residual, const T* previous, const float* extra, float* x);

// The same for rows of `residual`, `previous` and `extra` (either null if missing), in parallel: out[row].
template <class T>
void score_rows(const Router& router, const T* residual, const T* previous, const float* extra, int64_t rows,
                float* out);

}  // namespace dyndepth
