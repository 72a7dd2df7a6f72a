// Attention within whole samples that lie one after the other (encoders): ragged_attention's kernel, where every token
// sees its sample to its end.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../common/tensor.h"
#include "ragged_attention.h"

namespace dyndepth {

namespace {

// q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], contiguous and of one dtype; lengths int64
// [samples], at least 1 each. Returns [tokens, heads, head_dim].
Tensor packed_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths, double scale) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && lengths.dim() == 1 && q.is_contiguous() &&
                      k.is_contiguous() && v.is_contiguous() && lengths.is_contiguous() && k.size(1) > 0 &&
                      lengths.scalar_type() == ScalarType::Long,
                  "packed_attention: wanted contiguous q, k, v [tokens, heads, head_dim] and int64 lengths");
  const int64_t tokens = q.size(0), samples = lengths.size(0);
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(std::accumulate(length, length + samples, int64_t{0}) == tokens &&
                      std::all_of(length, length + samples, [](int64_t count) { return count > 0; }),
                  "packed_attention: wanted lengths of at least 1 whose sum is ", tokens);
  STD_TORCH_CHECK(k.size(0) == tokens && v.size(0) == tokens && v.size(1) == k.size(1) && k.size(2) == q.size(2) &&
                      v.size(2) == q.size(2) && q.size(1) > 0 && q.size(1) % k.size(1) == 0 &&
                      k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "packed_attention: wanted q, k, v of the same tokens, head size and dtype, heads a multiple of k's");
  // Pages of one position, in order; a sequence is named by its first token, so its table begins there.
  std::vector<int32_t> table(tokens), seq(tokens), pos(tokens);
  std::iota(table.begin(), table.end(), 0);
  for (int64_t sample = 0, start = 0; sample < samples; start += length[sample++]) {
    std::fill_n(seq.begin() + start, length[sample], static_cast<int32_t>(start));
    std::fill_n(pos.begin() + start, length[sample], static_cast<int32_t>(length[sample] - 1));
  }
  const AttentionProblem p{.block_table = table.data(),
                           .seq = seq.data(),
                           .pos = pos.data(),
                           .rows = tokens,
                           .heads = q.size(1),
                           .kv_heads = k.size(1),
                           .head_dim = q.size(2),
                           .page_size = 1,
                           .max_pages = 1,
                           .window = 0,
                           .scale = static_cast<float>(scale),
                           .softcap = 0.f};
  Tensor out = torch::stable::new_empty(q, q.sizes());
  if (tokens == 0) return out;
  dispatch_float(q.scalar_type(), "packed_attention", [&](auto element) {
    using T = decltype(element);
    attend_all(p, q.const_data_ptr<T>(), k.const_data_ptr<T>(), v.const_data_ptr<T>(), out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def("packed_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) {
  library.impl("packed_attention", TORCH_BOX(&packed_attention));
}

}  // namespace dyndepth
