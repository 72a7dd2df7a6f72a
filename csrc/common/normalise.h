// Row normalisation in fp32, rounded to the element type as the model's own norm modules would round.
#pragma once

#include <cmath>

#include "tensor.h"

namespace dyndepth {

enum class Norm : int64_t { none = 0, rms = 1, layer = 2 };

// to[i] = (from[i] - mean) / deviation * gain[i]; mean is 0 for rms, gain null means 1. `to` may be `from`.
template <class T>
void normalise_rows(const T* from, T* to, int64_t rows, int64_t width, Norm norm, float eps, const float* gain) {
  torch::stable::parallel_for(0, rows, 16384 / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = from + row * width;
      T* y = to + row * width;
      // Sums in double: an error here scales every output of the row, and a row has a few thousand entries at most.
      double sum = 0, square = 0;
      if (norm == Norm::layer)
        for (int64_t i = 0; i < width; ++i) sum += to_float(x[i]);
      const float mean = static_cast<float>(sum / static_cast<double>(width));
      for (int64_t i = 0; i < width; ++i) {
        const double centred = to_float(x[i]) - mean;
        square += centred * centred;
      }
      const float variance = static_cast<float>(square / static_cast<double>(width));
      const float inverse = norm == Norm::none ? 1.f : 1.f / std::sqrt(variance + eps);
      for (int64_t i = 0; i < width; ++i)
        y[i] = static_cast<T>((to_float(x[i]) - mean) * inverse * (gain == nullptr ? 1.f : gain[i]));
    }
  });
}

template <class T>
Tensor normalised(const Tensor& x, Norm norm, float eps, const float* gain) {
  Tensor y = torch::stable::new_empty(x, x.sizes());
  normalise_rows(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.size(0), x.size(1), norm, eps, gain);
  return y;
}

}  // namespace dyndepth
