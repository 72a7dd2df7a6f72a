// K,V of every skipped layer from one residual: normalise once, one product with the stacked maps, rotate, scatter.
#include "backfill_kv.h"

#include <algorithm>

#include "../common/tensor.h"

namespace dyndepth {

namespace {

void backfill_kv(const Tensor& residual, const Tensor& weight, const std::optional<Tensor>& bias, int64_t norm,
                 double eps, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& variant, const Tensor& pos, const Tensor& slots, const Tensor& pages,
                 int64_t first_layer, const std::optional<Tensor>& section, const std::optional<Tensor>& down) {
  int64_t begin = 0, rows = residual.size(0);
  if (section.has_value()) {
    // The part of [begin, begin + count) that exists; the counters come from a device, unread by anybody.
    const int64_t first = section->const_data_ptr<int32_t>()[0], count = section->const_data_ptr<int32_t>()[1];
    const int64_t last = std::clamp<int64_t>(first + std::max<int64_t>(count, 0), 0, rows);
    begin = std::clamp<int64_t>(first, 0, last);
    rows = last - begin;
  }
  if (rows == 0) return;
  const int64_t layers = weight.size(0), kv_heads = pages.size(4), head_dim = pages.size(5);
  const int32_t* at = pos.const_data_ptr<int32_t>() + begin;
  const int32_t* slot = slots.const_data_ptr<int32_t>() + begin;
  Rotary whole{nullptr, nullptr, 0, 0};
  if (cos.has_value()) whole = {cos->const_data_ptr<float>(), sin->const_data_ptr<float>(), cos->size(1), cos->size(2)};
  const int32_t* table_of = data_or_null<int32_t>(variant);
  for (int64_t layer = 0; table_of != nullptr && cos.has_value() && layer < layers; ++layer)
    STD_TORCH_CHECK(table_of[layer] >= 0 && table_of[layer] < cos->size(0), "backfill_kv: variant must be in [0, ",
                    cos->size(0), "), got ", table_of[layer], " at ", layer);
  check_rows("backfill_kv", at, slot, rows, pages.size(2) * pages.size(3), whole);
  dispatch_float(residual.scalar_type(), "backfill_kv", [&](auto element) {
    using T = decltype(element);
    const KvMaps<T> maps{.weight = weight.const_data_ptr<T>(),
                         .bias = data_or_null<T>(bias),
                         .down = data_or_null<T>(down),
                         .layers = layers,
                         .width = residual.size(1),
                         .rank = weight.size(3),
                         .norm = static_cast<Norm>(norm),
                         .eps = static_cast<float>(eps),
                         .variant = table_of};
    const KvPages<T> into{pages.mutable_data_ptr<T>(), pages.size(2) * pages.size(3), kv_heads, head_dim};
    backfill(maps, residual.const_data_ptr<T>() + begin * maps.width, rows, whole, at, slot, into, first_layer);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "backfill_kv(Tensor residual, Tensor weight, Tensor? bias, int norm, float eps, Tensor? cos, Tensor? sin, "
      "Tensor? variant, Tensor pos, Tensor slots, Tensor(a!) pages, int first_layer, Tensor? section, Tensor? down) -> "
      "()");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("backfill_kv", TORCH_BOX(&backfill_kv)); }

}  // namespace dyndepth
