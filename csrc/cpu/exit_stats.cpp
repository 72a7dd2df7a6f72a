#include "exit_stats.h"

#include <array>
#include <tuple>
#include <vector>

#include "../common/normalise.h"

#define DYN_SIMD "../cpu/exit_stats.simd.h"
#include "../common/each_target.h"

namespace dyndepth {

namespace {

// rows[i] = table[ids[i]] along the first axis: aten::index_select.
Tensor index_rows(const Tensor& table, const Tensor& ids) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(table), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(ids)};
  DYN_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Columns per block: its logits stay in cache between the product and the pass over them, and the whole [n, V] never
// exists. The same for any number of rows, so that a row adds up in the same order in any batch.
constexpr int64_t kColumns = 2048;

}  // namespace

template <class T>
void absorb_head(const Operand<T>& x, const T* weight, const T* bias, int64_t outputs, int64_t base, float softcap,
                 std::vector<RowStats>& stats, const Upcoming& next) {
  const int64_t rows = x.rows(), width = x.width();
  std::vector<float> logits(rows * std::min(kColumns, outputs));
  for (int64_t first = 0; first < outputs; first += kColumns) {
    const int64_t count = std::min(kColumns, outputs - first), rest = outputs - first - count;
    const T* block = weight + first * width;
    multiply<T>(x,
                {{.weight = block,
                  .outputs = count,
                  .bias = bias == nullptr ? nullptr : bias + first,
                  .rows = rows,
                  .wide = logits.data()}},
                rest == 0 ? next : Upcoming::of<T>(block + count * width, nullptr, rest, width));
    torch::stable::parallel_for(0, rows, 1 + 4096 / count, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        DYN_BEST(absorb_logits, stats[row], logits.data() + row * count, count, base + first, softcap);
    });
  }
}

template void absorb_head(const Operand<float>&, const float*, const float*, int64_t, int64_t, float,
                          std::vector<RowStats>&, const Upcoming&);
template void absorb_head(const Operand<BFloat16>&, const BFloat16*, const BFloat16*, int64_t, int64_t, float,
                          std::vector<RowStats>&, const Upcoming&);
template void absorb_head(const Operand<Half>&, const Half*, const Half*, int64_t, int64_t, float,
                          std::vector<RowStats>&, const Upcoming&);

HeadStats head_stats(const RowStats& s) {
  const double log_mass = std::log(s.mass), log_mass2 = std::log(s.mass2);
  const bool broken = std::isnan(log_mass);  // a NaN logit spoils the whole row, visibly
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return {.argmax = s.best,
          .top1 = broken ? nan : s.peak,
          .top2 = broken ? nan : s.second,
          .logsumexp = static_cast<float>(s.peak + log_mass),
          .entropy = static_cast<float>(log_mass - s.slope / s.mass),
          .entropy_half = static_cast<float>(log_mass2 - s.slope2 / s.mass2)};
}

namespace {

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
    Operand<T> operand;
    operand.pack(x.const_data_ptr<T>(), rows, x.size(1));
    std::optional<Tensor> bias;
    if (head_bias.has_value()) bias = torch::stable::contiguous(*head_bias);
    // A shortlist is gathered block by block: never more of the weights than a block at a time.
    const int64_t step = ids == nullptr ? vocabulary : kColumns;
    for (int64_t base = 0; base < vocabulary; base += step) {
      const int64_t count = std::min(step, vocabulary - base);
      Tensor weight = head_weight;
      std::optional<Tensor> block_bias = bias;
      if (ids != nullptr) {
        weight = index_rows(head_weight, rows_of(*vocab_ids, base, count));
        if (bias.has_value()) block_bias = index_rows(*bias, rows_of(*vocab_ids, base, count));
      }
      absorb_head<T>(operand, weight.const_data_ptr<T>(), data_or_null<T>(block_bias), count, base,
                     static_cast<float>(softcap), stats);
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    const HeadStats found = head_stats(stats[row]);
    argmax.mutable_data_ptr<int64_t>()[row] = ids ? ids[found.argmax] : found.argmax;
    const float values[5] = {found.top1, found.top2, found.logsumexp, found.entropy, found.entropy_half};
    for (int i = 0; i < 5; ++i) out[i].mutable_data_ptr<float>()[row] = values[i];
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
