// Judging rows at a boundary in one call: final norm, translator, statistics over the shortlist, and a score made of
// them. The same arithmetic as the ops one by one (dyndepth/exits/heads.py, ops/exit_stats.py, exits/router.py); what
// it saves is ten steps of Python at every boundary of every pass.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "../common/rms_norm.h"
#include "../common/tensor.h"
#include "exit_stats.h"
#include "router_score.h"

namespace dyndepth {

namespace {

// In the order of dyndepth/runtime/judge.py.
enum class Kind : int64_t { router, top_probability, margin, entropy };

// Features of a router that reads statistics (dyndepth/exits/router.py, stat_features).
std::array<float, 4> features_of(const HeadStats& s) {
  const float top1 = std::exp(s.top1 - s.logsumexp), top2 = std::exp(s.top2 - s.logsumexp);
  const float p = std::min(std::max(top1, 1e-4f), 1.f - 1e-4f);
  return {std::isnan(top1) ? top1 : std::log(p / (1.f - p)), top1, top1 - top2, s.entropy};
}

template <class T>
struct Translator {
  const T *down, *up, *bias;  // [rank, width] or null, [ready, rank or width], [ready]
  int64_t rank;
  float eps;
};

// ready = norm(hidden), plus up @ down @ rms_norm(hidden) + bias if there is a translator.
template <class T>
void make_ready(const T* hidden, int64_t rows, int64_t width, const T* gain, NormStyle style, float eps,
                const Translator<T>* translator, T* ready) {
  rms_norm(hidden, ready, rows, width, gain, style, eps);
  if (translator == nullptr) return;
  std::vector<T> x(rows * width), low;
  rms_norm<T>(hidden, x.data(), rows, width, nullptr, style, translator->eps);
  Operand<T> operand;
  operand.pack(x.data(), rows, width);
  if (translator->down != nullptr) {
    low.resize(rows * translator->rank);
    multiply<T>(operand, {{.weight = translator->down, .outputs = translator->rank, .rows = rows, .out = low.data()}});
    operand.pack(low.data(), rows, translator->rank);
  }
  multiply<T>(operand, {{.weight = translator->up,
                         .outputs = width,
                         .bias = translator->bias,
                         .rows = rows,
                         .residual = ready,
                         .out = ready}});
}

// 1 (leaving) where the score reaches the threshold and the row may, else 0; 2 (away) past the judged rows. A NaN never
// reaches. Returns how many leave.
int64_t leave(const float* score, float threshold, const float* thresholds, const bool* may_leave, int64_t rows,
              int64_t total, int8_t* state) {
  int64_t left = 0;
  for (int64_t row = 0; row < total; ++row) {
    const bool leaves =
        row < rows && may_leave[row] && score[row] >= (thresholds == nullptr ? threshold : thresholds[row]);
    state[row] = row >= rows ? 2 : leaves ? 1 : 0;
    left += leaves;
  }
  return left;
}

// Scores, states of all `total` rows of the buffer for compact_rows (rows past the judged ones are away), and the
// head-ready rows of those that leave, in their order.
std::tuple<Tensor, Tensor, Tensor> judge_rows(
    const Tensor& hidden, const Tensor& norm_gain, int64_t norm_style, double norm_eps,
    const std::optional<Tensor>& down, const std::optional<Tensor>& up, const std::optional<Tensor>& translator_bias,
    double translator_eps, const Tensor& head_weight, const std::optional<Tensor>& head_bias, double softcap,
    std::vector<Tensor> router_weights, bool silu, double router_eps, int64_t kind, double threshold,
    const std::optional<Tensor>& thresholds, const Tensor& may_leave, int64_t total) {
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  STD_TORCH_CHECK(hidden.is_contiguous() && may_leave.is_contiguous() && may_leave.size(0) >= rows && total >= rows &&
                      (!thresholds.has_value() || (thresholds->is_contiguous() && thresholds->size(0) == rows)),
                  "judge_rows: wanted contiguous hidden, thresholds and may_leave of every row");
  Tensor scores = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  Tensor state = torch::stable::new_empty(hidden, {total}, ScalarType::Char);
  Tensor ready = torch::stable::new_empty(hidden, hidden.sizes());
  int64_t left = 0;
  dispatch_float(hidden.scalar_type(), "judge_rows", [&](auto element) {
    using T = decltype(element);
    if (rows == 0) return;
    const T* from = hidden.const_data_ptr<T>();
    T* to = ready.mutable_data_ptr<T>();
    Translator<T> translator{};
    if (up.has_value())
      translator = {data_or_null<T>(down), up->const_data_ptr<T>(), data_or_null<T>(translator_bias), up->size(1),
                    static_cast<float>(translator_eps)};
    make_ready(from, rows, width, norm_gain.const_data_ptr<T>(), static_cast<NormStyle>(norm_style),
               static_cast<float>(norm_eps), up.has_value() ? &translator : nullptr, to);
    Operand<T> operand;
    operand.pack(to, rows, width);
    std::vector<RowStats> stats(rows);
    absorb_head<T>(operand, head_weight.const_data_ptr<T>(), data_or_null<T>(head_bias), head_weight.size(0), 0,
                   static_cast<float>(softcap), stats);
    Router router{};
    if (static_cast<Kind>(kind) == Kind::router)
      router = {router_weights[0].const_data_ptr<float>(),
                router_weights[1].const_data_ptr<float>(),
                router_weights[2].const_data_ptr<float>(),
                router_weights[3].const_data_ptr<float>(),
                nullptr,
                router_weights[4].const_data_ptr<float>(),
                width,
                router_weights[0].size(0),
                4,
                static_cast<float>(router_eps),
                silu};
    std::vector<float> scratch(width);
    float* score = scores.mutable_data_ptr<float>();
    for (int64_t row = 0; row < rows; ++row) {
      const HeadStats found = head_stats(stats[row]);
      const std::array<float, 4> features = features_of(found);
      switch (static_cast<Kind>(kind)) {
        case Kind::router:
          score[row] = score_row<T>(router, from + row * width, nullptr, features.data(), scratch.data());
          break;
        case Kind::top_probability:
          score[row] = features[1];
          break;
        case Kind::margin:
          score[row] = features[2];
          break;
        case Kind::entropy:
          score[row] = -found.entropy;
          break;
      }
    }
    left = leave(score, static_cast<float>(threshold), data_or_null<float>(thresholds),
                 may_leave.const_data_ptr<bool>(), rows, total, state.mutable_data_ptr<int8_t>());
    int64_t at = 0;
    for (int64_t row = 0; row < rows; ++row)
      if (state.const_data_ptr<int8_t>()[row] == 1) std::copy_n(to + row * width, width, to + at++ * width);
  });
  if (rows == 0) std::fill_n(state.mutable_data_ptr<int8_t>(), total, int8_t{2});
  return {scores, state, rows_of(ready, 0, left)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "judge_rows(Tensor hidden, Tensor norm_gain, int norm_style, float norm_eps, Tensor? down, Tensor? up, "
      "Tensor? translator_bias, float translator_eps, Tensor head_weight, Tensor? head_bias, float softcap, "
      "Tensor[] router_weights, bool silu, float router_eps, int kind, float threshold, Tensor? thresholds, "
      "Tensor may_leave, int total) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) { library.impl("judge_rows", TORCH_BOX(&judge_rows)); }

}  // namespace dyndepth
