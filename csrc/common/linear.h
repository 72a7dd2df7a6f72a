// What the library does better than we would, called through the stable dispatcher: we write epilogues, never dense
// products.
#pragma once

#include <array>

#include "tensor.h"

namespace dyndepth {

// x [n, k] times weight [m, k] transposed, plus bias [m]: aten::linear, contiguous result [n, m].
inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  DYN_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

// rows[i] = table[ids[i]] along the first axis: aten::index_select.
inline Tensor index_rows(const Tensor& table, const Tensor& ids) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(table), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(ids)};
  DYN_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dyndepth
