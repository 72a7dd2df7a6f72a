#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/tensor.h"

namespace dyndepth {

// A probability as a whole number of 2^-60: sums are exact, so their order does not matter
// (dyndepth/ops/accept_drafts.py). The difference of two floats and this product are rounded apart: a fused operation
// cannot join them, for the product comes last.
DYN_INLINE uint64_t mass_units(float probability) {
  const float positive = probability > 0.f ? probability : 0.f;  // NaN has none
  return static_cast<uint64_t>(static_cast<int64_t>((positive < 1.f ? positive : 1.f) * 0x1p60f));
}

}  // namespace dyndepth

#define DYN_SIMD "../cpu/accept_drafts.simd.h"
#include "../common/each_target.h"

namespace dyndepth {

namespace {

constexpr int64_t kStretch = 1024;  // tokens whose mass is summed first, so that only one stretch is walked through

// Distribution to draw from: p, or max(p - q, 0), or p without one token.
struct Residual {
  const float* p;
  const float* q;
  int64_t without;  // -1: none

  uint64_t mass(int64_t token) const {
    if (token == without) return 0;
    return mass_units(q == nullptr ? p[token] : p[token] - q[token]);
  }
};

// The first token whose running mass exceeds uniform * total; -1 where there is no mass. `sums` holds a stretch each.
int64_t draw(const Residual& from, int64_t vocabulary, float uniform, std::vector<uint64_t>& sums) {
  uint64_t total = 0;
  for (int64_t first = 0; first < vocabulary; first += kStretch) {
    const int64_t count = std::min(kStretch, vocabulary - first);
    uint64_t sum = DYN_BEST(mass_of, from.p + first, from.q == nullptr ? nullptr : from.q + first, count);
    if (from.without >= first && from.without < first + count) sum -= mass_units(from.p[from.without]);
    sums[first / kStretch] = sum;
    total += sum;
  }
  if (total == 0) return -1;
  // Below the total, for uniform is below 1: so both walks end inside, even if a sum has overflowed.
  const auto threshold = static_cast<uint64_t>(static_cast<double>(uniform) * static_cast<double>(total));
  uint64_t running = 0;
  int64_t token = 0;
  for (; running + sums[token / kStretch] <= threshold; token += kStretch) running += sums[token / kStretch];
  while ((running += from.mass(token)) <= threshold) ++token;
  return token;
}

struct Row {
  const int64_t* drafts;
  int64_t length;
  int64_t* token;
  int32_t* accepted;
};

void accept_greedy(const Row& row, const int64_t* choices) {
  int64_t at = 0;
  while (at < row.length && row.drafts[at] == choices[at]) ++at;
  *row.accepted = static_cast<int32_t>(at);
  *row.token = choices[at];
}

// Probabilities of one row: positions lie `stride` apart.
struct Positions {
  const float* data;
  int64_t stride;

  const float* at(int64_t position) const { return data == nullptr ? nullptr : data + position * stride; }
};

void accept_sampled(const Row& row, const Positions& p, const Positions& q, int64_t vocabulary, const float* uniforms,
                    float last, std::vector<uint64_t>& sums) {
  int64_t at = 0;
  for (; at < row.length; ++at) {
    const int64_t draft = row.drafts[at];
    const double certain = q.data == nullptr ? 1. : q.at(at)[draft];
    if (!(static_cast<double>(uniforms[at]) * certain < static_cast<double>(p.at(at)[draft]))) break;
  }
  *row.accepted = static_cast<int32_t>(at);
  int64_t token = -1;
  if (at < row.length)
    token = draw({p.at(at), q.at(at), q.data == nullptr ? row.drafts[at] : -1}, vocabulary, last, sums);
  // Everything was kept, or rounding left nothing of the difference.
  if (token < 0) token = draw({p.at(at), nullptr, -1}, vocabulary, last, sums);
  *row.token = token;
}

void check_values(const Tensor& drafts, const int32_t* lengths, int64_t vocabulary, const Tensor& uniforms) {
  const int64_t rows = drafts.size(0), most = drafts.size(1);
  const int64_t* word = drafts.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = row * most; i < row * most + lengths[row]; ++i)
      STD_TORCH_CHECK(word[i] >= 0 && word[i] < vocabulary, "accept_drafts: drafts must be in [0, ", vocabulary,
                      ") below lengths, got ", word[i], " at ", i);
  const float* uniform = uniforms.const_data_ptr<float>();
  for (int64_t i = 0; i < rows * (most + 1); ++i)
    STD_TORCH_CHECK(uniform[i] >= 0.f && uniform[i] < 1.f, "accept_drafts: uniforms must be in [0, 1), got ",
                    uniform[i], " at ", i);
}

std::tuple<Tensor, Tensor> accept_drafts(const Tensor& drafts, const Tensor& lengths, const Tensor& target,
                                         const std::optional<Tensor>& draft_probs,
                                         const std::optional<Tensor>& uniforms) {
  const int64_t rows = drafts.size(0), most = drafts.size(1);
  const Tensor words = torch::stable::contiguous(drafts), ends = torch::stable::contiguous(lengths);
  const int32_t* end = ends.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < rows; ++row)
    STD_TORCH_CHECK(end[row] >= 0 && end[row] <= most, "accept_drafts: lengths must be in [0, ", most + 1, "), got ",
                    end[row], " at ", row);
  Tensor accepted = torch::stable::new_empty(drafts, {rows}, ScalarType::Int);
  Tensor token = torch::stable::new_empty(drafts, {rows}, ScalarType::Long);
  const auto row_of = [&, word = words.const_data_ptr<int64_t>(), out = token.mutable_data_ptr<int64_t>(),
                       kept = accepted.mutable_data_ptr<int32_t>()](int64_t row) {
    return Row{word + row * most, end[row], out + row, kept + row};
  };
  if (!uniforms.has_value()) {
    const Tensor choices = torch::stable::contiguous(target);
    const int64_t* choice = choices.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < rows; ++row) accept_greedy(row_of(row), choice + row * (most + 1));
    return {accepted, token};
  }
  const int64_t vocabulary = target.size(2);
  const Tensor random = torch::stable::contiguous(*uniforms);
  check_values(words, end, vocabulary, random);
  const float* uniform = random.const_data_ptr<float>();
  const float* p = target.const_data_ptr<float>();
  const float* q = data_or_null<float>(draft_probs);
  // About the work that pays for waking a thread.
  torch::stable::parallel_for(0, rows, 16384 / vocabulary + 1, [&](int64_t begin, int64_t finish) {
    std::vector<uint64_t> sums((vocabulary + kStretch - 1) / kStretch);
    for (int64_t row = begin; row < finish; ++row) {
      const float* own = uniform + row * (most + 1);
      const Positions ps{p + row * target.stride(0), target.stride(1)};
      const Positions qs =
          q == nullptr ? Positions{nullptr, 0} : Positions{q + row * draft_probs->stride(0), draft_probs->stride(1)};
      accept_sampled(row_of(row), ps, qs, vocabulary, own, own[most], sums);
    }
  });
  return {accepted, token};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "accept_drafts(Tensor drafts, Tensor lengths, Tensor target, Tensor? draft_probs, Tensor? uniforms) -> (Tensor, "
      "Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("accept_drafts", TORCH_BOX(&accept_drafts)); }

}  // namespace dyndepth
