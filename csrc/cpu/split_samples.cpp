// Whole samples that leave an encoder: those that run on move together, in one pass over what the batch holds. Between
// layers the code of everything else has been pushed out of the caches, so a dozen small calls cost more than the move.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/tensor.h"

namespace dyndepth {

namespace {

// Rows of `hidden` that stand together and run on together.
struct Run {
  int64_t from, to, rows;
};

// hidden: packed, [tokens, ...], samples one after the other; or padded, [n, ...]. lengths and ids int64 [n]; leaves
// bool [n]. Of those that run on: hidden, lengths, ids. Of those that leave: places among the n, lengths, ids (int64).
// Everybody in the order they had. If nobody leaves nothing moves: the first result is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> split_samples(const Tensor& hidden, const Tensor& lengths,
                                                                         const Tensor& ids, const Tensor& leaves,
                                                                         bool packed) {
  const int64_t n = lengths.dim() == 1 ? lengths.size(0) : -1;
  STD_TORCH_CHECK(n >= 0 && ids.dim() == 1 && ids.size(0) == n && leaves.dim() == 1 && leaves.size(0) == n &&
                      lengths.scalar_type() == ScalarType::Long && ids.scalar_type() == ScalarType::Long &&
                      leaves.scalar_type() == ScalarType::Bool,
                  "split_samples: wanted lengths int64 [n], ids int64 [n], leaves bool [n]");
  STD_TORCH_CHECK(hidden.dim() >= 1 && hidden.is_contiguous(), "split_samples: wanted contiguous hidden [rows, ...]");
  const Tensor dense[] = {torch::stable::contiguous(lengths), torch::stable::contiguous(ids),
                          torch::stable::contiguous(leaves)};
  const int64_t* length = dense[0].const_data_ptr<int64_t>();
  const int64_t* id = dense[1].const_data_ptr<int64_t>();
  const bool* gone = dense[2].const_data_ptr<bool>();

  std::vector<Run> runs;
  int64_t left = 0, rows = 0, kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(length[i] >= 0, "split_samples: lengths must not be negative, got ", length[i], " at ", i);
    const int64_t size = packed ? length[i] : 1;
    STD_TORCH_CHECK(size <= hidden.size(0) - rows, "split_samples: samples must make up hidden's ", hidden.size(0),
                    " rows, got more");
    if (!gone[i]) {
      if (runs.empty() || runs.back().from + runs.back().rows != rows) runs.push_back({rows, kept, 0});
      runs.back().rows += size;
      kept += size;
      ++left;
    }
    rows += size;
  }
  STD_TORCH_CHECK(rows == hidden.size(0), "split_samples: samples must make up hidden's ", hidden.size(0),
                  " rows, got ", rows);

  if (left == n) kept = 0;  // nobody leaves
  std::vector<int64_t> sizes(hidden.sizes().begin(), hidden.sizes().end());
  sizes[0] = kept;
  Tensor moved = torch::stable::new_empty(hidden, sizes);
  const int64_t row_bytes = rows > 0 ? hidden.numel() / rows * static_cast<int64_t>(hidden.element_size()) : 0;
  const char* source = static_cast<const char*>(hidden.const_data_ptr());
  char* target = static_cast<char*>(moved.mutable_data_ptr());
  if (kept > 0 && row_bytes > 0) {
    // Threads share the bytes evenly, however few runs there are; a quarter of a MiB is worth another thread.
    torch::stable::parallel_for(0, kept, (int64_t{1} << 18) / row_bytes + 1, [&](int64_t begin, int64_t end) {
      for (const Run& run : runs) {
        const int64_t first = std::max(begin, run.to), last = std::min(end, run.to + run.rows);
        if (first < last)
          std::memcpy(target + first * row_bytes, source + (run.from + first - run.to) * row_bytes,
                      (last - first) * row_bytes);
      }
    });
  }

  const auto numbers = [&](int64_t count) { return torch::stable::new_empty(lengths, {count}); };
  Tensor stay_length = numbers(left), stay_id = numbers(left);
  Tensor gone_at = numbers(n - left), gone_length = numbers(n - left), gone_id = numbers(n - left);
  int64_t* stays[2] = {stay_length.mutable_data_ptr<int64_t>(), stay_id.mutable_data_ptr<int64_t>()};
  int64_t* leavers[3] = {gone_at.mutable_data_ptr<int64_t>(), gone_length.mutable_data_ptr<int64_t>(),
                         gone_id.mutable_data_ptr<int64_t>()};
  for (int64_t i = 0; i < n; ++i) {
    if (gone[i]) {
      *leavers[0]++ = i;
      *leavers[1]++ = length[i];
      *leavers[2]++ = id[i];
    } else {
      *stays[0]++ = length[i];
      *stays[1]++ = id[i];
    }
  }
  return {std::move(moved),   std::move(stay_length), std::move(stay_id),
          std::move(gone_at), std::move(gone_length), std::move(gone_id)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "split_samples(Tensor hidden, Tensor lengths, Tensor ids, Tensor leaves, bool packed) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("split_samples", TORCH_BOX(&split_samples)); }

}  // namespace dyndepth
