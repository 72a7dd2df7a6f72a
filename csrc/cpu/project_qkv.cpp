// The L-shaped projection: Q of live rows only and K, V of all rows, all from one packing of x, then the epilogue.
#include "../common/normalise.h"
#include "products.h"
#include "store_kv.h"

namespace dyndepth {

namespace {

Tensor project_qkv(const Tensor& x, const Tensor& q_weight, const Tensor& k_weight, const Tensor& v_weight,
                   const std::optional<Tensor>& q_bias, const std::optional<Tensor>& k_bias,
                   const std::optional<Tensor>& v_bias, const std::optional<Tensor>& q_gain,
                   const std::optional<Tensor>& k_gain, double eps, const std::optional<Tensor>& cos,
                   const std::optional<Tensor>& sin, const Tensor& pos, const Tensor& slots, const Tensor& pages,
                   const std::optional<Tensor>& live) {
  const Rotary table = rotary_table(cos, sin);
  const int64_t rows = x.size(0), q_rows = live_rows(live, rows);
  const int64_t kv_heads = pages.size(3), head_dim = pages.size(4), heads = q_weight.size(0) / head_dim;
  const int32_t* at = pos.const_data_ptr<int32_t>();
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  check_rows("project_qkv", at, slot, rows, pages.size(1) * pages.size(2), table);
  Tensor rotated = torch::stable::new_empty(x, {rows, heads, head_dim});
  if (rows == 0) return rotated;
  dispatch_float(x.scalar_type(), "project_qkv", [&](auto element) {
    using T = decltype(element);
    const Tensor q = torch::stable::new_empty(x, {q_rows, heads * head_dim});
    const Tensor k = torch::stable::new_empty(x, {rows, kv_heads * head_dim}),
                 v = torch::stable::new_empty(k, k.sizes());
    Operand<T> operand;
    operand.pack(x.const_data_ptr<T>(), rows, x.size(1));
    std::vector<Tensor> dense;  // strided weights and biases are copied; a model's own are not
    dense.reserve(6);
    const auto data = [&](const Tensor& tensor) {
      return dense.emplace_back(torch::stable::contiguous(tensor)).const_data_ptr<T>();
    };
    const auto product = [&](const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
      return Product<T>{.weight = data(weight),
                        .outputs = weight.size(0),
                        .bias = bias.has_value() ? data(*bias) : nullptr,
                        .rows = out.size(0),
                        .out = out.mutable_data_ptr<T>()};
    };
    multiply<T>(operand, {product(q_weight, q_bias, q), product(k_weight, k_bias, k), product(v_weight, v_bias, v)});
    // Per-head norms of Qwen3 and Gemma 3, in place: every head is one row of head_dim channels.
    const auto normalise_heads = [&](const Tensor& t, int64_t count, const std::optional<Tensor>& gain) {
      if (!gain.has_value()) return;
      T* data = t.mutable_data_ptr<T>();
      normalise_rows(data, data, count, head_dim, Norm::rms, static_cast<float>(eps), gain->const_data_ptr<float>());
    };
    normalise_heads(q, q_rows * heads, q_gain);
    normalise_heads(k, rows * kv_heads, k_gain);
    const auto view = [head_dim](const Tensor& t, int64_t count) {
      return HeadsView<T>{t.const_data_ptr<T>(), count * head_dim, head_dim, count, head_dim};
    };
    T* key_pages = pages.mutable_data_ptr<T>();
    rotate_and_store(view(q, heads), q_rows, rotated.mutable_data_ptr<T>(), view(k, kv_heads), view(v, kv_heads), rows,
                     table, at, slot, key_pages, key_pages + pages.stride(0));
  });
  return rotated;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "project_qkv(Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor? q_bias, Tensor? k_bias, "
      "Tensor? v_bias, Tensor? q_gain, Tensor? k_gain, float eps, Tensor? cos, Tensor? sin, Tensor pos, "
      "Tensor slots, Tensor(a!) pages, Tensor? live) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("project_qkv", TORCH_BOX(&project_qkv)); }

}  // namespace dyndepth
