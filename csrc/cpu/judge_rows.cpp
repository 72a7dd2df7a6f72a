// Judging rows at a boundary in one call: final norm, translator, statistics over the shortlist, and a score made of
// them. The same arithmetic as the ops one by one (dyndepth/exits/heads.py, ops/exit_stats.py, exits/router.py); what
// it saves is ten steps of Python at every boundary of every pass.
#include "judge_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <tuple>

#include "exit_stats.h"

namespace dyndepth {

namespace {

// Features of a router that reads statistics (dyndepth/exits/router.py, stat_features).
std::array<float, 4> features_of(const HeadStats& s) {
  const float top1 = std::exp(s.top1 - s.logsumexp), top2 = std::exp(s.top2 - s.logsumexp);
  const float p = std::min(std::max(top1, 1e-4f), 1.f - 1e-4f);
  return {std::isnan(top1) ? top1 : std::log(p / (1.f - p)), top1, top1 - top2, s.entropy};
}

// ready = norm(hidden), plus up @ down @ rms_norm(hidden) + bias if there is a translator.
template <class T>
void make_ready(const Judge<T>& j, const T* hidden, int64_t rows, T* ready) {
  rms_norm(hidden, ready, rows, j.width, j.gain, j.style, j.eps);
  if (j.up == nullptr) return;
  std::vector<T> x(rows * j.width), low;
  rms_norm<T>(hidden, x.data(), rows, j.width, nullptr, j.style, j.translator_eps);
  Operand<T> operand;
  operand.pack(x.data(), rows, j.width);
  if (j.down != nullptr) {
    low.resize(rows * j.rank);
    multiply<T>(operand, {{.weight = j.down, .outputs = j.rank, .rows = rows, .out = low.data()}},
                Upcoming::of<T>(j.up, nullptr, j.width, j.rank));
    operand.pack(low.data(), rows, j.rank);
  }
  multiply<T>(operand,
              {{.weight = j.up, .outputs = j.width, .bias = j.bias, .rows = rows, .residual = ready, .out = ready}},
              Upcoming::of<T>(j.head, nullptr, j.vocabulary, j.width));
}

// 1 (leaving) where the score reaches the threshold and the row may, else 0; 2 (away) past the judged rows. A NaN never
// reaches. Returns how many leave.
int64_t leave(const Verdict& verdict, int64_t rows) {
  int64_t left = 0;
  for (int64_t row = 0; row < verdict.total; ++row) {
    const bool leaves = row < rows && verdict.may_leave[row] &&
                        verdict.score[row] >= (verdict.thresholds ? verdict.thresholds[row] : verdict.threshold);
    verdict.state[row] = row >= rows ? 2 : leaves ? 1 : 0;
    left += leaves;
  }
  return left;
}

}  // namespace

template <class T>
Judge<T> judge_of(int64_t width, const Tensor& gain, int64_t style, double eps, const std::optional<Tensor>& down,
                  const std::optional<Tensor>& up, const std::optional<Tensor>& bias, double translator_eps,
                  const std::optional<Tensor>& head, const std::optional<Tensor>& head_bias, double softcap,
                  const std::vector<Tensor>& router_weights, bool silu, double router_eps, int64_t kind) {
  Judge<T> made{.width = width,
                .gain = gain.const_data_ptr<T>(),
                .style = static_cast<NormStyle>(style),
                .eps = static_cast<float>(eps),
                .down = data_or_null<T>(down),
                .up = data_or_null<T>(up),
                .bias = data_or_null<T>(bias),
                .rank = up.has_value() ? up->size(1) : 0,
                .translator_eps = static_cast<float>(translator_eps),
                .head = data_or_null<T>(head),
                .head_bias = data_or_null<T>(head_bias),
                .vocabulary = head.has_value() ? head->size(0) : 0,
                .softcap = static_cast<float>(softcap),
                .router = {},
                .kind = static_cast<JudgeKind>(kind)};
  if (made.kind == JudgeKind::router || made.kind == JudgeKind::residual)
    made.router = {router_weights[0].const_data_ptr<float>(),
                   router_weights[1].const_data_ptr<float>(),
                   router_weights[2].const_data_ptr<float>(),
                   router_weights[3].const_data_ptr<float>(),
                   nullptr,
                   router_weights.size() > 4 ? router_weights[4].const_data_ptr<float>() : nullptr,
                   width,
                   router_weights[0].size(0),
                   router_weights.size() > 4 ? 4 : 0,
                   static_cast<float>(router_eps),
                   silu};
  return made;
}

namespace {

// Scores that need no head: what a router makes of residuals, or what has been decided.
template <class T>
void score_without_head(const Judge<T>& j, const T* hidden, int64_t rows, const Verdict& verdict) {
  if (j.kind == JudgeKind::known) {
    for (int64_t row = 0; row < rows; ++row)
      verdict.score[row] = static_cast<float>(verdict.known[row] >> verdict.bit & 1);
    return;
  }
  score_rows<T>(j.router, hidden, nullptr, nullptr, rows, verdict.score);
}

// Head-ready rows of those that leave, where judging did not need them.
template <class T>
void ready_of_leavers(const Judge<T>& j, const T* hidden, int64_t rows, int64_t left, const int8_t* state, T* ready) {
  const auto leavers = std::make_unique_for_overwrite<T[]>(left * j.width);
  T* to = leavers.get();
  for (int64_t row = 0; row < rows; ++row)
    if (state[row] == 1) to = std::copy_n(hidden + row * j.width, j.width, to);
  make_ready(j, leavers.get(), left, ready);
}

}  // namespace

template <class T>
int64_t judge(const Judge<T>& j, const T* hidden, int64_t rows, const Verdict& verdict, T* ready,
              const Upcoming& next) {
  if (!j.reads_head()) {
    score_without_head(j, hidden, rows, verdict);
    const int64_t left = leave(verdict, rows);
    if (ready != nullptr && left > 0) ready_of_leavers(j, hidden, rows, left, verdict.state, ready);
    return left;
  }
  if (rows > 0) {
    make_ready(j, hidden, rows, ready);
    Operand<T> operand;
    operand.pack(ready, rows, j.width);
    std::vector<RowStats> stats(rows);
    absorb_head<T>(operand, j.head, j.head_bias, j.vocabulary, 0, j.softcap, stats, next);
    std::vector<float> scratch(j.width);
    for (int64_t row = 0; row < rows; ++row) {
      const HeadStats found = head_stats(stats[row]);
      const std::array<float, 4> features = features_of(found);
      float& score = verdict.score[row];
      switch (j.kind) {
        case JudgeKind::router:
          score = score_row<T>(j.router, hidden + row * j.width, nullptr, features.data(), scratch.data());
          break;
        case JudgeKind::top_probability:
          score = features[1];
          break;
        case JudgeKind::margin:
          score = features[2];
          break;
        case JudgeKind::entropy:
          score = -found.entropy;
          break;
        default:  // reads no head
          break;
      }
    }
  }
  const int64_t left = leave(verdict, rows);
  int64_t at = 0;
  for (int64_t row = 0; row < rows; ++row)
    if (verdict.state[row] == 1) std::copy_n(ready + row * j.width, j.width, ready + at++ * j.width);
  return left;
}

#define DYN_JUDGE(T)                                                                                \
  template Judge<T> judge_of(int64_t, const Tensor&, int64_t, double, const std::optional<Tensor>&, \
                             const std::optional<Tensor>&, const std::optional<Tensor>&, double,    \
                             const std::optional<Tensor>&, const std::optional<Tensor>&, double,    \
                             const std::vector<Tensor>&, bool, double, int64_t);                    \
  template int64_t judge(const Judge<T>&, const T*, int64_t, const Verdict&, T*, const Upcoming&);
DYN_JUDGE(float)
DYN_JUDGE(BFloat16)
DYN_JUDGE(Half)
#undef DYN_JUDGE

namespace {

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
  STD_TORCH_CHECK(kind <= static_cast<int64_t>(JudgeKind::entropy), "judge_rows: wanted a judge that reads the head");
  Tensor scores = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  Tensor state = torch::stable::new_empty(hidden, {total}, ScalarType::Char);
  Tensor ready = torch::stable::new_empty(hidden, hidden.sizes());
  int64_t left = 0;
  dispatch_float(hidden.scalar_type(), "judge_rows", [&](auto element) {
    using T = decltype(element);
    const Judge<T> made = judge_of<T>(width, norm_gain, norm_style, norm_eps, down, up, translator_bias, translator_eps,
                                      head_weight, head_bias, softcap, router_weights, silu, router_eps, kind);
    const Verdict verdict{.threshold = static_cast<float>(threshold),
                          .thresholds = data_or_null<float>(thresholds),
                          .may_leave = may_leave.const_data_ptr<bool>(),
                          .known = nullptr,
                          .bit = 0,
                          .total = total,
                          .score = scores.mutable_data_ptr<float>(),
                          .state = state.mutable_data_ptr<int8_t>()};
    left = judge(made, hidden.const_data_ptr<T>(), rows, verdict, ready.mutable_data_ptr<T>());
  });
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
