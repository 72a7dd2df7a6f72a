// Linear layers inside other ops.
#pragma once

#include "../cpu/products.h"
#include "tensor.h"

namespace dyndepth {

// x [n, k] times weight [m, k] transposed, plus bias [m]: contiguous result [n, m].
template <class T>
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  Operand<T> operand;
  operand.pack(x.const_data_ptr<T>(), x.size(0), x.size(1));
  const Tensor dense = torch::stable::contiguous(weight);
  const std::optional<Tensor> dense_bias = bias.has_value() ? std::optional(torch::stable::contiguous(*bias)) : bias;
  multiply<T>(operand, {{.weight = dense.const_data_ptr<T>(),
                         .outputs = weight.size(0),
                         .bias = data_or_null<T>(dense_bias),
                         .rows = x.size(0),
                         .out = out.mutable_data_ptr<T>()}});
  return out;
}

// rows[i] = table[ids[i]] along the first axis: aten::index_select.
inline Tensor index_rows(const Tensor& table, const Tensor& ids) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(table), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(ids)};
  DYN_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dyndepth
