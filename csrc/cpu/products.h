// Products of few rows with many weights, where reading the weights once is the whole cost: rows are packed once and
// stay in cache, every weight is read once, in place and in the model's own layout, and epilogues see fp32 sums.
//
// An output is summed in the same order whatever rows are computed beside it: a row's result is the same bits alone and
// in any batch. That is what library products do not promise, and batch invariance needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../common/types.h"
#include "amx.h"

namespace dyndepth {

constexpr int64_t kPanel = 16;  // outputs that are summed together: the lanes of one vector, the rows of one tile

enum class Activation : int64_t { silu = 0, gelu_tanh = 1, gelu = 2 };

// What happens to the sums of a product before they are stored, each step rounded to T as the modules round:
//   y = sums + bias;  gated: y = activation(y) * (sums of weight2 + bias2);  residual: y = residual + y
template <class T>
struct Product {
  const T* weight;  // [outputs, width], rows dense
  int64_t outputs;
  const T* bias = nullptr;
  const T* weight2 = nullptr;  // same shape: a gated product (SwiGLU, GeGLU)
  const T* bias2 = nullptr;
  Activation activation = Activation::silu;
  int64_t rows;                 // the first rows of the operand
  const T* residual = nullptr;  // [rows, outputs]; may be `out`
  T* out = nullptr;             // [rows, outputs]
  float* wide = nullptr;        // instead of `out`: rounded to T, stored as float
};

// A thread takes two panels of a plain product at a time, one of both weights of a gated one.
inline int64_t panels_per_chunk(const void* weight2) { return weight2 == nullptr ? 2 : 1; }

// Weights that are read after a product: their first part is fetched while threads wait for each other.
struct Upcoming {
  const char* weight = nullptr;
  const char* weight2 = nullptr;  // of a gated product
  int64_t chunk = 0, bytes = 0;   // what a worker takes at a time of each, and all of each

  // The weights [outputs, width] of the next product, or nothing.
  template <class T>
  static Upcoming of(const T* weight, const T* weight2, int64_t outputs, int64_t width) {
    if (weight == nullptr) return {};
    const int64_t row = width * static_cast<int64_t>(sizeof(T));
    return {reinterpret_cast<const char*>(weight), reinterpret_cast<const char*>(weight2),
            panels_per_chunk(weight2) * kPanel * row, outputs * row};
  }

  // The chunk that the given worker will take first: the one of its number.
  void fetch(Ahead& ahead, int64_t worker) const {
    const int64_t from = worker * chunk, size = std::min(chunk, bytes - from);
    if (size <= 0) return;
    const int64_t half = weight2 == nullptr ? size / 2 : size;
    ahead.set(0, weight + from, half);
    ahead.set(1, weight2 == nullptr ? weight + from + half : weight2 + from, weight2 == nullptr ? size - half : size);
  }
};

// The rows of a product in the layouts the kernels want. Reusable: buffers only grow.
template <class T>
class Operand {
 public:
  // Takes rows [0, rows) of x, `width` channels, dense.
  void pack(const T* x, int64_t rows, int64_t width);

  int64_t width() const { return width_; }
  int64_t rows() const { return rows_; }
  const T* x() const { return x_; }                       // [rows, width], as taken
  const uint32_t* tiles() const { return tiles_.get(); }  // null: no AMX for this type or width
  const float* floats() const { return floats_; }         // [rows, width]

 private:
  void widen() const;
  template <class U>
  friend void multiply(const Operand<U>&, const std::vector<Product<U>>&, const Upcoming&);

  int64_t rows_ = 0, width_ = 0;
  const T* x_ = nullptr;
  std::unique_ptr<uint32_t[], void (*)(void*)> tiles_{nullptr, std::free};
  int64_t tile_capacity_ = 0;
  mutable std::vector<float> widened_;
  mutable const float* floats_ = nullptr;
};

// All products of one operand in one parallel region.
template <class T>
void multiply(const Operand<T>& x, const std::vector<Product<T>>& products, const Upcoming& upcoming = {});

}  // namespace dyndepth
