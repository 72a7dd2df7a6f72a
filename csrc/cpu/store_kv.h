// Rotary embedding in fp32, then K and V of every row into its page slot: the epilogue of project_qkv and backfill_kv.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/tensor.h"

namespace dyndepth {

// Angle tables of one rotary variant; `rotary` is half the number of rotated channels (0: no rotary embedding).
struct Rotary {
  const float* cos;  // [positions, rotary]
  const float* sin;
  int64_t positions, rotary;

  // Another variant's, where variants lie one after the other.
  Rotary variant(int64_t number) const {
    if (cos == nullptr) return *this;
    const int64_t offset = number * positions * rotary;
    return {cos + offset, sin + offset, positions, rotary};
  }
};

inline Rotary rotary_table(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  if (!cos.has_value()) return {nullptr, nullptr, 0, 0};
  return {cos->const_data_ptr<float>(), sin->const_data_ptr<float>(), cos->size(0), cos->size(1)};
}

// Half-split rotation (GPT-NeoX, Llama): channels i and i + rotary form a pair; channels past 2 * rotary pass through.
// `to` may be `from`. T is float, BFloat16 or Half.
template <class T>
void rotate_head(const T* from, T* to, int64_t head_dim, const Rotary& table, int64_t pos);

// [rows, heads, head_dim] with any strides between rows and heads: a view into a fused projection works as it is.
template <class T>
struct HeadsView {
  const T* data;
  int64_t row_stride, head_stride, heads, head_dim;

  const T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};

template <class T>
HeadsView<T> heads_view(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.size(1), t.size(2)};
}

// K (rotated) and V of one row to `slot`; -1 is skipped: such a row is padding.
template <class T>
inline void store_row(const HeadsView<T>& k, const HeadsView<T>& v, int64_t row, const Rotary& table, int64_t pos,
                      int64_t slot, T* key_pages, T* value_pages) {
  if (slot < 0) return;
  const int64_t target = slot * k.heads * k.head_dim;
  for (int64_t head = 0; head < k.heads; ++head) {
    rotate_head(k.at(row, head), key_pages + target + head * k.head_dim, k.head_dim, table, pos);
    std::memcpy(value_pages + target + head * k.head_dim, v.at(row, head), k.head_dim * sizeof(T));
  }
}

// Rejects slots and positions that would reach outside the pages or the rotary table.
void check_rows(const char* op, const int32_t* pos, const int32_t* slots, int64_t rows, int64_t slot_count,
                const Rotary& table);

// Rotated copy of q's first q_rows rows; k and v of all kv_rows rows into pages [2, pages, page_size, kv_heads,
// head_dim].
template <class T>
void rotate_and_store(const HeadsView<T>& q, int64_t q_rows, T* rotated, const HeadsView<T>& k, const HeadsView<T>& v,
                      int64_t kv_rows, const Rotary& table, const int32_t* pos, const int32_t* slots, T* key_pages,
                      T* value_pages) {
  const int64_t grain = 16384 / (q.heads * q.head_dim + 1) + 1;  // about the work that pays for waking a thread
  torch::stable::parallel_for(0, std::max(q_rows, kv_rows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (row < q_rows)
        for (int64_t head = 0; head < q.heads; ++head)
          rotate_head(q.at(row, head), rotated + (row * q.heads + head) * q.head_dim, q.head_dim, table, pos[row]);
      if (row < kv_rows) store_row(k, v, row, table, pos[row], slots[row], key_pages, value_pages);
    }
  });
}

}  // namespace dyndepth
