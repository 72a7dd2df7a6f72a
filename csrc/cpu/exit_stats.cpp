#include "exit_stats.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/linear.h"
#include "../common/normalise.h"

namespace dyndepth {

namespace {

DYN_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
DYN_INLINE Lanes smaller(Lanes a, Lanes b) { return a > b ? b : a; }

// Largest and second largest value (equal when the maximum occurs twice).
DYN_INLINE void top_two(const float* z, int64_t count, float& first, float& second) {
  Lanes high = splat(-std::numeric_limits<float>::infinity()), low = high;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes x = load(z + i);
    low = larger(low, smaller(high, x));
    high = larger(high, x);
  }
  first = second = -std::numeric_limits<float>::infinity();
  const auto take = [&](float x) {
    if (x > first) {
      second = first;
      first = x;
    } else if (x > second) {
      second = x;
    }
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    take(high[lane]);
    take(low[lane]);
  }
  for (; i < count; ++i) take(z[i]);
}

DYN_INLINE void rescale(RowStats& stats, float peak) {
  if (stats.mass > 0) {
    const double delta = static_cast<double>(stats.peak) - peak, shrink = std::exp(delta);
    stats.slope = shrink * (stats.slope + delta * stats.mass);
    stats.mass *= shrink;
    stats.slope2 = shrink * shrink * (stats.slope2 + 2 * delta * stats.mass2);
    stats.mass2 *= shrink * shrink;
  }
  stats.peak = peak;
}

DYN_INLINE void absorb_body(RowStats& stats, float* z, int64_t count, int64_t base, float softcap) {
  if (softcap > 0.f)
    for (int64_t i = 0; i < count; ++i) z[i] = softcap * std::tanh(z[i] / softcap);
  float first, second;
  top_two(z, count, first, second);
  if (first > stats.peak) {
    stats.second = std::max(stats.peak, second);
    stats.best = base + (std::find(z, z + count, first) - z);  // the lowest position wins a tie, here and across blocks
    rescale(stats, first);
  } else {
    stats.second = std::max(stats.second, first);
  }
  // -inf - -inf is NaN: while all logits were -inf, count from 0, where they add nothing.
  const float peak = stats.peak == -std::numeric_limits<float>::infinity() ? 0.f : stats.peak;
  int64_t i = 0;
  while (i + kLanes <= count) {
    // Lanes add at most 32 numbers in fp32 before they go to double: the entropies are differences of these sums.
    Lanes mass = {}, slope = {}, mass2 = {}, slope2 = {};
    for (const int64_t stop = std::min(count - kLanes, i + 31 * kLanes); i <= stop; i += kLanes) {
      const Lanes gap = larger(load(z + i) - peak, splat(-88.f));  // -inf times exp(-inf) must be 0, not NaN
      const Lanes e = exp_nonpositive(load(z + i) - peak);
      mass += e;
      slope += gap * e;
      mass2 += e * e;
      slope2 += 2.f * gap * (e * e);
    }
    stats.mass += sum(mass);
    stats.slope += sum(slope);
    stats.mass2 += sum(mass2);
    stats.slope2 += sum(slope2);
  }
  for (; i < count; ++i) {
    const float gap = std::max(z[i] - peak, -88.f), e = std::exp(z[i] - peak);
    stats.mass += e;
    stats.slope += gap * e;
    stats.mass2 += e * e;
    stats.slope2 += 2.f * gap * (e * e);
  }
}

}  // namespace

DYN_MULTIVERSION void absorb_logits(RowStats& stats, float* z, int64_t count, int64_t base, float softcap) {
  absorb_body(stats, z, count, base, softcap);
}
DYN_MULTIVERSION void read_logits(float* z, const float* logits, int64_t count) { to_floats(z, logits, count); }
DYN_MULTIVERSION void read_logits(float* z, const BFloat16* logits, int64_t count) { to_floats(z, logits, count); }
DYN_MULTIVERSION void read_logits(float* z, const Half* logits, int64_t count) { to_floats(z, logits, count); }

namespace {

// Columns per block: the block of logits stays in cache between the product and the pass over it, and the whole [n, V]
// never exists. Fewer than 1024 columns would starve the product.
int64_t block_columns(int64_t rows, int64_t vocabulary) {
  return std::min<int64_t>(vocabulary, std::clamp<int64_t>(262144 / std::max<int64_t>(rows, 1), 1024, 8192));
}

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Stats exit_stats(const Tensor& hidden, const Tensor& head_weight, const std::optional<Tensor>& head_bias,
                 const std::optional<Tensor>& norm_gain, double eps, const std::optional<Tensor>& vocab_ids,
                 double softcap, const std::optional<Tensor>& live) {
  const int64_t total = hidden.size(0), rows = live_rows(live, total);
  const int64_t vocabulary = vocab_ids.has_value() ? vocab_ids->size(0) : head_weight.size(0);
  const int64_t* ids = data_or_null<int64_t>(vocab_ids);
  for (int64_t i = 0; ids != nullptr && i < vocabulary; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < head_weight.size(0), "exit_stats: vocab_ids must be in [0, ",
                    head_weight.size(0), "), got ", ids[i], " at ", i);
  Tensor argmax = torch::stable::new_empty(hidden, {total}, ScalarType::Long);
  std::vector<Tensor> out;
  for (int i = 0; i < 5; ++i) out.push_back(torch::stable::new_empty(hidden, {total}, ScalarType::Float));
  std::vector<RowStats> stats(rows);
  dispatch_float(hidden.scalar_type(), "exit_stats", [&](auto element) {
    using T = decltype(element);
    if (rows == 0) return;
    Tensor x = rows_of(hidden, 0, rows);
    if (norm_gain.has_value())
      x = normalised<T>(x, Norm::rms, static_cast<float>(eps), norm_gain->const_data_ptr<float>());
    const int64_t columns = block_columns(rows, vocabulary);
    for (int64_t base = 0; base < vocabulary; base += columns) {
      const int64_t count = std::min(columns, vocabulary - base);
      const Tensor weight =
          ids ? index_rows(head_weight, rows_of(*vocab_ids, base, count)) : rows_of(head_weight, base, count);
      std::optional<Tensor> bias;
      if (head_bias.has_value())
        bias = ids ? index_rows(*head_bias, rows_of(*vocab_ids, base, count)) : rows_of(*head_bias, base, count);
      const Tensor logits = linear(x, weight, bias);
      const T* from = logits.const_data_ptr<T>();
      torch::stable::parallel_for(0, rows, 1 + 16384 / count, [&](int64_t begin, int64_t end) {
        std::vector<float> z(count);
        for (int64_t row = begin; row < end; ++row) {
          read_logits(z.data(), from + row * count, count);
          absorb_logits(stats[row], z.data(), count, base, static_cast<float>(softcap));
        }
      });
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    const RowStats& s = stats[row];
    const double log_mass = std::log(s.mass), log_mass2 = std::log(s.mass2);
    const bool broken = std::isnan(log_mass);  // a NaN logit spoils the whole row, visibly
    const float nan = std::numeric_limits<float>::quiet_NaN();
    argmax.mutable_data_ptr<int64_t>()[row] = ids ? ids[s.best] : s.best;
    out[0].mutable_data_ptr<float>()[row] = broken ? nan : s.peak;
    out[1].mutable_data_ptr<float>()[row] = broken ? nan : s.second;
    out[2].mutable_data_ptr<float>()[row] = static_cast<float>(s.peak + log_mass);
    out[3].mutable_data_ptr<float>()[row] = static_cast<float>(log_mass - s.slope / s.mass);
    out[4].mutable_data_ptr<float>()[row] = static_cast<float>(log_mass2 - s.slope2 / s.mass2);
  }
  return {argmax, out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "exit_stats(Tensor hidden, Tensor head_weight, Tensor? head_bias, Tensor? norm_gain, float eps, Tensor? "
      "vocab_ids, "
      "float softcap, Tensor? live) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("exit_stats", TORCH_BOX(&exit_stats)); }

}  // namespace dyndepth
