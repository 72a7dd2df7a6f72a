// Boundaries inside a climb: judges between layers, and rows that leave there for good.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "backfill_kv.h"
#include "compact_rows.h"
#include "judge_rows.h"

namespace dyndepth {

// Per judge, numbers that dyndepth/runtime/climb.py gives: facts (layers of the call below it, layers of the call below
// the boundary where its rows come back or 0 if they leave for good, its bit of what has been decided, norm style, kind
// of score, silu, bits of what is there) and numbers (eps, that of fitted maps, soft cap, the router's eps, threshold).
constexpr int64_t kGateFacts = 7, kGateNumbers = 5;

// Bits of the last fact: optional parts, in the order in which their tensors come after the norm's gain. A router has
// four tensors, a jump two.
enum class GateBit {
  down,
  up,
  translator_bias,
  head,
  head_bias,
  router,
  router_stats,
  maps,
  maps_bias,
  maps_variant,
  maps_down,
  jump
};

// The linear jump: h + weight rms_norm(h) + bias.
template <class T>
struct Jump {
  const T *weight, *bias;  // [width, width], [width]
  float eps;

  void run(T* stream, int64_t rows, int64_t width) const {
    const auto x = std::make_unique_for_overwrite<T[]>(rows * width);
    rms_norm<T>(stream, x.get(), rows, width, nullptr, NormStyle::llama, eps);
    Operand<T> operand;
    operand.pack(x.get(), rows, width);
    multiply<T>(operand,
                {{.weight = weight, .outputs = width, .bias = bias, .rows = rows, .residual = stream, .out = stream}});
  }
};

template <class T>
struct Gate {
  int64_t after;   // so many layers of the call
  int64_t resume;  // of the call's layers, those below the boundary where its rows come back; 0: they leave for good
  int64_t bit;     // of what has been decided
  Judge<T> judge;
  float threshold;
  std::optional<KvMaps<T>> maps;  // what rows that leave get their K,V above from
  std::optional<Jump<T>> jump;    // what rows that come back run; none: the identity
};

// `kv` is the width of a layer's keys.
template <class T>
std::vector<Gate<T>> read_gates(const std::vector<Tensor>& tensors, const std::vector<int64_t>& facts,
                                const std::vector<double>& numbers, int64_t width, int64_t kv) {
  std::vector<Gate<T>> made;
  auto tensor = tensors.begin();
  for (size_t at = 0; at * kGateFacts < facts.size(); ++at) {
    const int64_t* fact = facts.data() + at * kGateFacts;
    const double* number = numbers.data() + at * kGateNumbers;
    const auto has = [&](GateBit bit) { return (fact[6] >> static_cast<int>(bit) & 1) != 0; };
    const auto given = [&](GateBit bit) { return has(bit) ? std::optional(*tensor++) : std::nullopt; };
    const Tensor& gain = *tensor++;
    const std::optional<Tensor> down = given(GateBit::down), up = given(GateBit::up),
                                bias = given(GateBit::translator_bias);
    const std::optional<Tensor> head = given(GateBit::head), head_bias = given(GateBit::head_bias);
    std::vector<Tensor> router;
    for (int part = 0; part < 4 && has(GateBit::router); ++part) router.push_back(*tensor++);
    if (const std::optional<Tensor> stats = given(GateBit::router_stats)) router.push_back(*stats);
    Gate<T> gate{.after = fact[0],
                 .resume = fact[1],
                 .bit = fact[2],
                 .judge = judge_of<T>(width, gain, fact[3], number[0], down, up, bias, number[1], head, head_bias,
                                      number[2], router, fact[5] != 0, number[3], fact[4]),
                 .threshold = static_cast<float>(number[4]),
                 .maps = std::nullopt,
                 .jump = std::nullopt};
    if (const std::optional<Tensor> weight = given(GateBit::maps)) {
      const std::optional<Tensor> maps_bias = given(GateBit::maps_bias), variant = given(GateBit::maps_variant),
                                  maps_down = given(GateBit::maps_down);
      const int64_t rank = maps_down ? maps_down->size(0) : width;
      STD_TORCH_CHECK(
          weight->is_contiguous() && weight->dim() == 4 && weight->size(1) == 2 && weight->size(2) == kv &&
              weight->size(3) == rank &&
              (!maps_down || (maps_down->is_contiguous() && maps_down->dim() == 2 && maps_down->size(1) == width)) &&
              (!maps_bias || (maps_bias->is_contiguous() && maps_bias->dim() == 3 &&
                              maps_bias->numel() == weight->size(0) * 2 * kv)) &&
              (!variant || (variant->is_contiguous() && variant->numel() == weight->size(0))),
          "climb_layers: wanted contiguous K,V maps [layers, 2, ", kv, ", ", rank,
          "], bias and variant of as many layers, and `down` [rank, ", width, "]");
      gate.maps = KvMaps<T>{.weight = weight->const_data_ptr<T>(),
                            .bias = data_or_null<T>(maps_bias),
                            .down = data_or_null<T>(maps_down),
                            .layers = weight->size(0),
                            .width = width,
                            .rank = rank,
                            .norm = Norm::rms,
                            .eps = static_cast<float>(number[1]),
                            .variant = data_or_null<int32_t>(variant)};
    }
    if (const std::optional<Tensor> weight = given(GateBit::jump)) {
      const Tensor& bias_of = *tensor++;
      STD_TORCH_CHECK(weight->is_contiguous() && weight->dim() == 2 && weight->size(0) == width &&
                          weight->size(1) == width && bias_of.is_contiguous() && bias_of.numel() == width,
                      "climb_layers: wanted a jump of contiguous [", width, ", ", width, "] and [", width, "]");
      gate.jump = Jump<T>{weight->const_data_ptr<T>(), bias_of.const_data_ptr<T>(), static_cast<float>(number[1])};
    }
    made.push_back(std::move(gate));
  }
  return made;
}

// Everything that moves with a row of a pass. At first the caller's tensors, which are only read; copies from when rows
// leave. Residuals move in place. Those that go on stay a prefix, in their order; those that leave lie right behind
// it, the latest first; rows behind the first prefix stay where they are.
class MovingRows {
 public:
  // Order of the tensors: seq, pos, slots, may_leave, index (places in the caller's order), then whatever else the
  // caller wants to be moved.
  MovingRows(std::vector<Tensor> tensors, bool has_known) : has_known_(has_known), tensors_(std::move(tensors)) {}

  const int32_t* seq() const { return tensors_[0].const_data_ptr<int32_t>(); }
  const int32_t* pos() const { return tensors_[1].const_data_ptr<int32_t>(); }
  const int32_t* slots() const { return tensors_[2].const_data_ptr<int32_t>(); }
  const bool* may_leave() const { return tensors_[3].const_data_ptr<bool>(); }
  const int32_t* index() const { return tensors_[4].const_data_ptr<int32_t>(); }
  // Bits of what has been decided before, where the caller has that: the last tensor.
  const int64_t* known() const { return has_known_ ? tensors_.back().const_data_ptr<int64_t>() : nullptr; }
  int64_t size() const { return tensors_[0].size(0); }
  // The moved tensors; none where everybody lies where they lay.
  std::vector<Tensor> moved() const { return moved_ ? tensors_ : std::vector<Tensor>{}; }

  // state[i] of the first `live` rows: 0 goes on, 1 leaves. Returns how many go on.
  template <class T>
  int64_t leave(const int8_t* state, int64_t live, T* hidden, int64_t width) {
    std::vector<int32_t> order(live);
    int32_t counts[2];
    partition_rows(state, live, order.data(), counts);
    // Where those that leave are the last ones (one row, or all of them), everybody lies there already.
    if (!std::is_sorted(order.begin(), order.end())) reorder(order, hidden, width);
    return counts[0];
  }

  // The first rows in another order: row i becomes what row order[i] was.
  template <class T>
  void reorder(const std::vector<int32_t>& order, T* hidden, int64_t width) {
    const int64_t count = static_cast<int64_t>(order.size()), row_bytes = width * static_cast<int64_t>(sizeof(T));
    const auto moved = std::make_unique_for_overwrite<T[]>(count * width);
    gather_rows(reinterpret_cast<const char*>(hidden), row_bytes, order.data(), count, row_bytes,
                reinterpret_cast<char*>(moved.get()));
    std::copy_n(moved.get(), count * width, hidden);
    for (Tensor& tensor : tensors_) {
      Tensor target = torch::stable::new_empty(tensor, tensor.sizes());
      const int64_t item = static_cast<int64_t>(tensor.element_size()), rows = tensor.size(0);
      const char* from = static_cast<const char*>(tensor.const_data_ptr());
      char* to = static_cast<char*>(target.mutable_data_ptr());
      gather_rows(from, item, order.data(), count, item, to);
      std::copy(from + count * item, from + rows * item, to + count * item);
      tensor = std::move(target);
    }
    moved_ = true;
  }

 private:
  bool moved_ = false;
  bool has_known_ = false;
  std::vector<Tensor> tensors_;
};

// home[index[row]] = from[row].
template <class T>
void send_home(const T* from, const int32_t* index, int64_t rows, int64_t width, T* home) {
  for (int64_t row = 0; row < rows; ++row) std::copy_n(from + row * width, width, home + index[row] * width);
}

// Rows that are away: groups lie behind the live prefix, the latest first, as dyndepth/runtime/forward.py has them.
template <class T>
class AwayRows {
 public:
  void leave(const Gate<T>& gate, int64_t count) { groups_.insert(groups_.begin(), {&gate, count}); }

  bool comes_back_below(int64_t boundary) const {
    return std::any_of(groups_.begin(), groups_.end(),
                       [&](const Group& group) { return group.gate->resume != 0 && group.gate->resume < boundary; });
  }

  // Those whose boundary this is go behind the `live` rows, and through their jumps. Returns how many came.
  int64_t come_back(int64_t boundary, int64_t live, MovingRows& moving, T* hidden, int64_t width) {
    const auto back = [&](const Group& group) { return group.gate->resume == boundary; };
    if (std::none_of(groups_.begin(), groups_.end(), back)) return 0;
    if (!std::is_partitioned(groups_.begin(), groups_.end(), back)) {
      std::vector<int32_t> order(live), others;
      std::iota(order.begin(), order.end(), 0);
      int32_t at = static_cast<int32_t>(live);
      for (const Group& group : groups_)
        for (int64_t i = 0; i < group.count; ++i) (back(group) ? order : others).push_back(at++);
      order.insert(order.end(), others.begin(), others.end());
      moving.reorder(order, hidden, width);
    }
    int64_t came = 0;
    for (const Group& group : groups_) {
      if (!back(group)) continue;
      if (group.gate->jump) group.gate->jump->run(hidden + (live + came) * width, group.count, width);
      came += group.count;
    }
    std::erase_if(groups_, back);
    return came;
  }

 private:
  struct Group {
    const Gate<T>* gate;
    int64_t count;
  };
  std::vector<Group> groups_;
};

// Judges between layers and what is to become of rows that leave. Empty for none.
struct Boundaries {
  std::vector<Tensor> tensors;  // of the gates, as read_gates takes them
  std::vector<int64_t> facts;
  std::vector<double> numbers;
  // Rows that leave are moved here and the others go on; else the climb ends where a row wants to leave.
  bool goes_on = false;
  // Rows that are away get their K,V from the layers they skip.
  bool propagates = false;
  MovingRows* rows = nullptr;
  float* score = nullptr;     // [live]
  int8_t* state = nullptr;    // [n], for compact_rows
  int32_t* counts = nullptr;  // [judges], rows that left at each
  void* ready = nullptr;  // [live, width], head-ready rows of those that leave for good, in the order in which they do
  std::vector<int32_t>* skipped = nullptr;  // places in the caller's order of those that leave and come back, likewise
  // The final norm, for rows that reach the end of the call; none where the caller makes them head-ready.
  std::optional<Tensor> final_gain;
  NormStyle final_style{};
  float final_eps = 0;
  void* home = nullptr;  // [n, width], head-ready rows of everybody in the caller's order; null without a final norm
};

}  // namespace dyndepth
