// Bookkeeping of a pass's rows in one call: their numbers as int32, and the slots that their K,V go to.
#include <algorithm>
#include <tuple>

#include "../common/tensor.h"

namespace dyndepth {

namespace {

// Rows at (seq, pos), int64 [n], of sequences with `room` positions in pages and `length` of them in use, int64
// [sequences]; the block table is int32 [sequences, columns]. Where every position has room, `length` grows to hold
// them all.
//
// Returns (int32 [3, n] sequences, positions and slots; the largest position + 1, at least 1; true). False where there
// is no such sequence or its pages do not reach a position: nothing is changed then, and the rest is unspecified.
std::tuple<Tensor, int64_t, bool> place_rows(const Tensor& seq, const Tensor& pos, const Tensor& table,
                                             const Tensor& room, const Tensor& length, int64_t page_size) {
  const int64_t rows = seq.size(0), sequences = room.size(0), columns = table.size(1);
  STD_TORCH_CHECK(seq.is_contiguous() && pos.is_contiguous() && pos.size(0) == rows && table.is_contiguous() &&
                      table.size(0) == sequences && length.size(0) == sequences && page_size > 0,
                  "place_rows: wanted contiguous seq and pos of the same rows, and a table of every sequence");
  Tensor placed = torch::stable::new_empty(seq, {3, rows}, ScalarType::Int);
  int32_t* out = placed.mutable_data_ptr<int32_t>();
  const int64_t *of = seq.const_data_ptr<int64_t>(), *at = pos.const_data_ptr<int64_t>();
  const int64_t* has = room.const_data_ptr<int64_t>();
  const int32_t* pages = table.const_data_ptr<int32_t>();
  int64_t reach = 1;
  bool fits = true;
  for (int64_t row = 0; row < rows; ++row) {
    if (of[row] < 0 || of[row] >= sequences || at[row] < 0) return {placed, reach, false};
    reach = std::max(reach, at[row] + 1);
    out[row] = static_cast<int32_t>(of[row]);
    out[rows + row] = static_cast<int32_t>(at[row]);
    fits = fits && at[row] < has[of[row]] && at[row] / page_size < columns;
  }
  if (!fits) return {placed, reach, false};
  int64_t* used = length.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t page = pages[of[row] * columns + at[row] / page_size];
    out[2 * rows + row] = static_cast<int32_t>(page * page_size + at[row] % page_size);
    used[of[row]] = std::max(used[of[row]], at[row] + 1);
  }
  return {placed, reach, true};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "place_rows(Tensor seq, Tensor pos, Tensor table, Tensor room, Tensor(a!) length, int page_size) -> "
      "(Tensor, int, bool)");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("place_rows", TORCH_BOX(&place_rows)); }

}  // namespace dyndepth
