#include "store_kv.h"

#define DYN_SIMD "../cpu/store_kv.simd.h"
#include "../common/each_target.h"

namespace dyndepth {

template <class T>
void rotate_head(const T* from, T* to, int64_t head_dim, const Rotary& table, int64_t pos) {
  DYN_BEST(rotate_head, from, to, head_dim, table, pos);
}

template void rotate_head(const float*, float*, int64_t, const Rotary&, int64_t);
template void rotate_head(const BFloat16*, BFloat16*, int64_t, const Rotary&, int64_t);
template void rotate_head(const Half*, Half*, int64_t, const Rotary&, int64_t);

void check_rows(const char* op, const int32_t* pos, const int32_t* slots, int64_t rows, int64_t slot_count,
                const Rotary& table) {
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(slots[row] >= -1 && slots[row] < slot_count, op, ": slots must be in [-1, ", slot_count, "), got ",
                    slots[row], " at ", row);
    STD_TORCH_CHECK(table.rotary == 0 || (pos[row] >= 0 && pos[row] < table.positions), op, ": pos must be in [0, ",
                    table.positions, ") (the rotary table's reach), got ", pos[row], " at ", row);
  }
}

namespace {

Tensor store_kv(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cos,
                const std::optional<Tensor>& sin, const Tensor& pos, const Tensor& slots, const Tensor& pages,
                const std::optional<Tensor>& live) {
  const Rotary table = rotary_table(cos, sin);
  const int64_t kv_rows = k.size(0);
  const int32_t* at = pos.const_data_ptr<int32_t>();
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  check_rows("store_kv", at, slot, kv_rows, pages.size(1) * pages.size(2), table);
  Tensor rotated = torch::stable::new_empty(q, q.sizes());
  dispatch_float(q.scalar_type(), "store_kv", [&](auto element) {
    using T = decltype(element);
    T* key_pages = pages.mutable_data_ptr<T>();
    rotate_and_store(heads_view<T>(q), live_rows(live, q.size(0)), rotated.mutable_data_ptr<T>(), heads_view<T>(k),
                     heads_view<T>(v), kv_rows, table, at, slot, key_pages, key_pages + pages.stride(0));
  });
  return rotated;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "store_kv(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor pos, Tensor slots, Tensor(a!) pages, "
      "Tensor? live) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("store_kv", TORCH_BOX(&store_kv)); }

}  // namespace dyndepth
