// K,V of layers that rows skip, from the residual they left with.
#pragma once

#include <memory>

#include "../common/normalise.h"
#include "products.h"
#include "store_kv.h"

namespace dyndepth {

// Maps of consecutive layers, stacked. Gain and bias of the norm are folded into them.
template <class T>
struct KvMaps {
  const T* weight;  // [layers, 2, kv_heads * head_dim, rank]
  const T* bias;    // [layers, 2, kv_heads * head_dim] or null
  const T* down;  // [rank, width], what all layers read of the normalised residual; null: all of it, and rank is width
  int64_t layers, width, rank;
  Norm norm;
  float eps;
  const int32_t* variant;  // [layers], which rotary table each layer uses; null: the first
};

// Where K and V of a layer are: [layers, 2, slots, kv_heads, head_dim].
template <class T>
struct KvPages {
  T* data;
  int64_t slots, kv_heads, head_dim;

  int64_t half() const { return slots * kv_heads * head_dim; }
  T* keys(int64_t layer) const { return data + 2 * layer * half(); }
  T* values(int64_t layer) const { return keys(layer) + half(); }
};

// Normalises once, multiplies by `down` and by all maps at once, rotates and scatters: K,V of layers [first_layer,
// first_layer + maps.layers) of rows of `residual` [rows, width]. `table` is the first rotary variant's; variants lie
// one after the other. `next` are the weights that are read after it.
template <class T>
void backfill(const KvMaps<T>& maps, const T* residual, int64_t rows, const Rotary& table, const int32_t* pos,
              const int32_t* slots, const KvPages<T>& pages, int64_t first_layer, const Upcoming& next = {}) {
  const int64_t kv = pages.kv_heads * pages.head_dim, outputs = maps.layers * 2 * kv;
  const auto x = std::make_unique_for_overwrite<T[]>(rows * maps.width);
  const auto y = std::make_unique_for_overwrite<T[]>(rows * outputs);
  normalise_rows(residual, x.get(), rows, maps.width, maps.norm, maps.eps, nullptr);
  Operand<T> operand;
  operand.pack(x.get(), rows, maps.width);
  std::unique_ptr<T[]> features;  // an operand may point into what it was packed from
  if (maps.down != nullptr) {
    features = std::make_unique_for_overwrite<T[]>(rows * maps.rank);
    multiply<T>(operand, {{.weight = maps.down, .outputs = maps.rank, .rows = rows, .out = features.get()}},
                Upcoming::of<T>(maps.weight, nullptr, outputs, maps.rank));
    operand.pack(features.get(), rows, maps.rank);
  }
  multiply<T>(operand, {{.weight = maps.weight, .outputs = outputs, .bias = maps.bias, .rows = rows, .out = y.get()}},
              next);
  torch::stable::parallel_for(0, rows * maps.layers, 16384 / (2 * kv + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / maps.layers, layer = i % maps.layers;
      const Rotary own = table.variant(maps.variant == nullptr ? 0 : maps.variant[layer]);
      const T* source = y.get() + (row * maps.layers + layer) * 2 * kv;
      const HeadsView<T> k{source, 0, pages.head_dim, pages.kv_heads, pages.head_dim};
      const HeadsView<T> v{source + kv, 0, pages.head_dim, pages.kv_heads, pages.head_dim};
      store_row(k, v, 0, own, pos[row], slots[row], pages.keys(first_layer + layer), pages.values(first_layer + layer));
    }
  });
}

}  // namespace dyndepth
