// Small helpers over torch::stable::Tensor shared by every op. Shapes, dtypes and strides were checked in Python
// (dyndepth/ops/<op>.py): torch.ops.dyndepth_cpp is not for calling directly. Values of indices are checked here.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "types.h"

// torch 2.10 and 2.11 have this check without the prefix.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define DYN_ERROR_CODE_CHECK STABLE_TORCH_ERROR_CODE_CHECK
#else
#define DYN_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace dyndepth {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A buffer of n rows may name only its first `live`; the counter lives where the rows live, here in plain memory.
inline int64_t live_rows(const std::optional<Tensor>& live, int64_t rows) {
  if (!live.has_value()) return rows;
  int64_t value = *live->const_data_ptr<int32_t>();
  return value < 0 ? 0 : (value < rows ? value : rows);
}

// View of rows [begin, begin + count).
inline Tensor rows_of(Tensor tensor, int64_t begin, int64_t count) {
  return torch::stable::narrow(tensor, 0, begin, count);
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// Calls run(T{}) with the element type of a float32, bfloat16 or float16 tensor.
template <class F>
void dispatch_float(ScalarType type, const char* op, F&& run) {
  switch (type) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace dyndepth
