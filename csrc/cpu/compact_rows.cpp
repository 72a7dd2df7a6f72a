#include "compact_rows.h"

#include <cstring>
#include <tuple>

#include "../common/tensor.h"

namespace dyndepth {

void partition_rows(const int8_t* state, int64_t rows, int32_t* order, int32_t* counts) {
  int32_t size[3] = {0, 0, 0};
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(state[i] >= 0 && state[i] <= 2, "compact_rows: state must be in [0, 3), got ",
                    static_cast<int>(state[i]), " at ", i);
    ++size[state[i]];
  }
  int32_t next[3] = {0, size[0], size[0] + size[1]};
  for (int64_t i = 0; i < rows; ++i) order[next[state[i]]++] = static_cast<int32_t>(i);
  counts[0] = size[0];
  counts[1] = size[1];
}

void gather_rows(const char* from, int64_t from_stride, const int32_t* order, int64_t rows, int64_t row_bytes,
                 char* to) {
  // One thread moves 64 KiB in a few microseconds, about what waking another costs.
  const int64_t grain = row_bytes > 0 ? 65536 / row_bytes + 1 : rows;
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * row_bytes, from + order[i] * from_stride, row_bytes);
  });
}

namespace {

// Bytes of one row if rows are dense inside (any stride between them), else a contiguous copy is made first.
Tensor dense_rows(const Tensor& payload) {
  int64_t expected = 1;
  for (int64_t axis = payload.dim() - 1; axis >= 1; --axis) {
    if (payload.size(axis) != 1 && payload.stride(axis) != expected) return torch::stable::contiguous(payload);
    expected *= payload.size(axis);
  }
  return payload;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> compact_rows(const Tensor& state, std::vector<Tensor> payloads) {
  const int64_t rows = state.size(0);
  Tensor order = torch::stable::new_empty(state, {rows}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(state, {2}, ScalarType::Int);
  const Tensor dense_state = torch::stable::contiguous(state);
  partition_rows(dense_state.const_data_ptr<int8_t>(), rows, order.mutable_data_ptr<int32_t>(),
                 counts.mutable_data_ptr<int32_t>());
  std::vector<Tensor> moved;
  moved.reserve(payloads.size());
  for (const Tensor& payload : payloads) {
    STD_TORCH_CHECK(payload.dim() >= 1 && payload.size(0) == rows, "compact_rows: every payload must have ", rows,
                    " rows");
    Tensor source = dense_rows(payload);
    const auto sizes = payload.sizes();
    Tensor target = torch::stable::new_empty(payload, sizes);
    if (rows > 0 && payload.numel() > 0) {
      const int64_t item = static_cast<int64_t>(source.element_size());
      gather_rows(static_cast<const char*>(source.const_data_ptr()), source.stride(0) * item,
                  order.const_data_ptr<int32_t>(), rows, source.numel() / rows * item,
                  static_cast<char*>(target.mutable_data_ptr()));
    }
    moved.push_back(std::move(target));
  }
  return {std::move(moved), std::move(order), std::move(counts)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def("compact_rows(Tensor state, Tensor[] payloads) -> (Tensor[], Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("compact_rows", TORCH_BOX(&compact_rows)); }

}  // namespace dyndepth
