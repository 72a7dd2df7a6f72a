// Consecutive decoder layers of the Llama kind in one call: what a pass does between two boundaries, without a Python
// step per op. The same kernels as the single ops, with epilogues (bias, SwiGLU, residual) taken while sums are in
// registers.
#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <tuple>
#include <utility>

#include "../common/normalise.h"
#include "../common/rms_norm.h"
#include "judge_rows.h"
#include "products.h"
#include "ragged_attention.h"
#include "store_kv.h"

namespace dyndepth {

namespace {

// Parts of a layer, in the order that dyndepth/runtime/stack.py lists them. `present` has a bit per part; a layer's
// tensors come densely in this order.
enum Part {
  kQuery,
  kKey,
  kValue,
  kOut,
  kGate,
  kUp,
  kDown,
  kBeforeAttention,
  kAfterAttention,
  kBeforeMlp,
  kAfterMlp,
  kQueryBias,
  kKeyBias,
  kValueBias,
  kOutBias,
  kGateBias,
  kUpBias,
  kDownBias,
  kQueryGain,
  kKeyGain,
  kParts
};

template <class T>
struct LayerWeights {
  std::array<const T*, kParts> part{};
  const float* query_gain = nullptr;  // fp32, one entry per channel of a head
  const float* key_gain = nullptr;

  // Takes this layer's tensors off the list.
  void read(const std::vector<Tensor>& weights, size_t& at, int64_t present) {
    for (int64_t i = 0; i < kParts; ++i) {
      if (!(present >> i & 1)) continue;
      const Tensor& tensor = weights[at++];
      if (i == kQueryGain)
        query_gain = tensor.const_data_ptr<float>();
      else if (i == kKeyGain)
        key_gain = tensor.const_data_ptr<float>();
      else
        part[i] = tensor.const_data_ptr<T>();
    }
  }
};

struct Shape {
  int64_t width, heads, kv_heads, head_dim, inner;
  Activation activation;
  NormStyle norm;
  float eps, head_eps;
};

// The rows of a pass: K,V are stored for all, the rest is computed for the first `live`.
struct PassRows {
  int64_t live, all;
  const int32_t *pos, *slots;
};

template <class T>
class Decoder {
 public:
  Decoder(const Shape& shape, const PassRows& rows, T* hidden)
      : shape_(shape),
        rows_(rows),
        hidden_(hidden),
        normed_(rows.all * shape.width),
        q_(rows.live * shape.heads * shape.head_dim),
        k_(rows.all * shape.kv_heads * shape.head_dim),
        v_(rows.all * shape.kv_heads * shape.head_dim),
        attended_(rows.live * shape.heads * shape.head_dim),
        inner_(rows.live * shape.inner) {}

  // `upcoming` are the weights that are read after this layer.
  void run(const LayerWeights<T>& w, const Upcoming& upcoming, AttentionProblem attention, const Rotary& rotary,
           T* keys, T* values) {
    const int64_t live = rows_.live, all = rows_.all, kv = shape_.kv_heads * shape_.head_dim;
    const T* x = normed(hidden_, all, w.part[kBeforeAttention]);
    operand_.pack(x, all, shape_.width);
    Product<T> q{.weight = w.part[kQuery],
                 .outputs = shape_.heads * shape_.head_dim,
                 .bias = w.part[kQueryBias],
                 .rows = live,
                 .out = q_.data()};
    Product<T> k{.weight = w.part[kKey], .outputs = kv, .bias = w.part[kKeyBias], .rows = all, .out = k_.data()};
    Product<T> v{.weight = w.part[kValue], .outputs = kv, .bias = w.part[kValueBias], .rows = all, .out = v_.data()};
    const int64_t attended = shape_.heads * shape_.head_dim;
    multiply<T>(operand_, {q, k, v}, Upcoming::of<T>(w.part[kOut], nullptr, shape_.width, attended));
    normalise_heads(q_.data(), live * shape_.heads, w.query_gain);
    normalise_heads(k_.data(), all * shape_.kv_heads, w.key_gain);
    rotate_and_store(view(q_.data(), shape_.heads), live, q_.data(), view(k_.data(), shape_.kv_heads),
                     view(v_.data(), shape_.kv_heads), all, rotary, rows_.pos, rows_.slots, keys, values);
    if (live == 0) return;

    attention.rows = live;
    attend_all<T>(attention, q_.data(), keys, values, attended_.data());
    add(attended_.data(), attended, w.part[kOut], w.part[kOutBias], w.part[kAfterAttention],
        Upcoming::of(w.part[kGate], w.part[kUp], shape_.inner, shape_.width));

    operand_.pack(normed(hidden_, live, w.part[kBeforeMlp]), live, shape_.width);
    Product<T> gated{.weight = w.part[kGate],
                     .outputs = shape_.inner,
                     .bias = w.part[kGateBias],
                     .weight2 = w.part[kUp],
                     .bias2 = w.part[kUpBias],
                     .activation = shape_.activation,
                     .rows = live,
                     .out = inner_.data()};
    multiply<T>(operand_, {gated}, Upcoming::of<T>(w.part[kDown], nullptr, shape_.width, shape_.inner));
    add(inner_.data(), shape_.inner, w.part[kDown], w.part[kDownBias], w.part[kAfterMlp], upcoming);
  }

  // What a layer reads first.
  Upcoming first(const LayerWeights<T>& w) const {
    return Upcoming::of<T>(w.part[kQuery], nullptr, shape_.heads * shape_.head_dim, shape_.width);
  }

 private:
  HeadsView<T> view(const T* data, int64_t heads) const {
    return {data, heads * shape_.head_dim, shape_.head_dim, heads, shape_.head_dim};
  }

  // The normed rows, or the rows themselves where the model has no norm.
  const T* normed(const T* from, int64_t rows, const T* gain) {
    if (gain == nullptr) return from;
    norm_rows(from, normed_.data(), rows, gain);
    return normed_.data();
  }

  void norm_rows(const T* from, T* to, int64_t rows, const T* gain) {
    rms_norm(from, to, rows, shape_.width, gain, shape_.norm, shape_.eps);
  }

  void normalise_heads(T* data, int64_t heads, const float* gain) const {
    if (gain != nullptr) normalise_rows(data, data, heads, shape_.head_dim, Norm::rms, shape_.head_eps, gain);
  }

  // hidden += linear(x), with a norm in between where the model has one (Gemma).
  void add(const T* x, int64_t width, const T* weight, const T* bias, const T* after, const Upcoming& upcoming) {
    const int64_t live = rows_.live;
    operand_.pack(x, live, width);
    Product<T> product{.weight = weight, .outputs = shape_.width, .bias = bias, .rows = live};
    product.residual = after == nullptr ? hidden_ : nullptr;
    product.out = after == nullptr ? hidden_ : normed_.data();
    multiply<T>(operand_, {product}, upcoming);
    if (after == nullptr) return;
    norm_rows(normed_.data(), normed_.data(), live, after);
    for (int64_t i = 0; i < live * shape_.width; ++i)
      hidden_[i] = static_cast<T>(to_float(hidden_[i]) + to_float(normed_[i]));
  }

  const Shape shape_;
  const PassRows rows_;
  T* hidden_;
  Operand<T> operand_;
  std::vector<T> normed_, q_, k_, v_, attended_, inner_;
};

// Judges between layers, as lists of what dyndepth/runtime/climb.py gives per judge. Empty for none.
struct Gates {
  std::vector<Tensor> tensors;
  std::vector<int64_t> facts;
  std::vector<double> numbers;
  const bool* may_leave = nullptr;
  int64_t total = 0;
  float* score = nullptr;
  int8_t* state = nullptr;
  void* ready = nullptr;
};

constexpr int64_t kGateFacts = 5, kGateNumbers = 5;

template <class T>
struct Gate {
  int64_t after;  // so many layers of the call
  Judge<T> judge;
  float threshold;
};

template <class T>
std::vector<Gate<T>> read_gates(const Gates& gates, int64_t width) {
  std::vector<Gate<T>> made;
  auto tensor = gates.tensors.begin();
  for (size_t at = 0; at * kGateFacts < gates.facts.size(); ++at) {
    const int64_t* fact = gates.facts.data() + at * kGateFacts;
    const double* number = gates.numbers.data() + at * kGateNumbers;
    const auto given = [&](int bit) { return fact[4] >> bit & 1 ? std::optional(*tensor++) : std::nullopt; };
    const Tensor &gain = *tensor++, &head = *tensor++;
    const std::optional<Tensor> down = given(0), up = given(1), bias = given(2), head_bias = given(3);
    std::vector<Tensor> router;
    for (int part = 0; part < 5 && (fact[4] >> 4 & 1); ++part) router.push_back(*tensor++);
    made.push_back({fact[0],
                    judge_of<T>(width, gain, fact[1], number[0], down, up, bias, number[1], head, head_bias, number[2],
                                router, fact[3] != 0, number[3], fact[2]),
                    static_cast<float>(number[4])});
  }
  return made;
}

// Order of `shape` and `numbers`, as in dyndepth/runtime/stack.py. Returns (judge at which rows left, how many), the
// layers above it not run, or (-1, 0).
std::pair<int64_t, int64_t> climb(const Tensor& hidden, const Tensor& pages, const Tensor& block_table,
                                  const Tensor& seq, const Tensor& pos, const Tensor& slots,
                                  const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                  const std::vector<Tensor>& weights, const std::vector<int64_t>& shape,
                                  const std::vector<int64_t>& windows, const std::vector<int64_t>& variants,
                                  const std::vector<double>& numbers, int64_t first_layer, int64_t live,
                                  const Gates& gates) {
  const int64_t present = shape[4], layers = static_cast<int64_t>(windows.size());
  const Shape facts{.width = hidden.size(1),
                    .heads = shape[0],
                    .kv_heads = pages.size(4),
                    .head_dim = pages.size(5),
                    .inner = shape[1],
                    .activation = static_cast<Activation>(shape[2]),
                    .norm = static_cast<NormStyle>(shape[3]),
                    .eps = static_cast<float>(numbers[0]),
                    .head_eps = static_cast<float>(numbers[1])};
  const PassRows rows{.live = live,
                      .all = hidden.size(0),
                      .pos = pos.const_data_ptr<int32_t>(),
                      .slots = slots.const_data_ptr<int32_t>()};
  AttentionProblem attention{.block_table = block_table.const_data_ptr<int32_t>(),
                             .seq = seq.const_data_ptr<int32_t>(),
                             .pos = rows.pos,
                             .rows = live,
                             .heads = facts.heads,
                             .kv_heads = facts.kv_heads,
                             .head_dim = facts.head_dim,
                             .page_size = pages.size(3),
                             .max_pages = block_table.size(1),
                             .window = 0,
                             .scale = static_cast<float>(numbers[2]),
                             .softcap = static_cast<float>(numbers[3])};
  const auto check = [](bool right, const char* wanted) { STD_TORCH_CHECK(right, "decoder_layers: wanted ", wanted); };
  check(hidden.is_contiguous() && pages.is_contiguous(), "contiguous hidden and pages");
  check(live >= 0 && live <= rows.all, "live in [0, n]");
  check(seq.size(0) >= rows.all && pos.size(0) >= rows.all && slots.size(0) >= rows.all,
        "seq, pos, slots of every row");
  check(first_layer >= 0 && first_layer + layers <= pages.size(0), "pages of every layer");
  check(static_cast<int64_t>(variants.size()) == layers, "a rotary variant per layer");
  check(static_cast<int64_t>(weights.size()) == layers * std::popcount(static_cast<uint64_t>(present)),
        "the parts that are present of every layer");
  check(facts.heads % facts.kv_heads == 0, "a multiple of kv_heads in heads");
  for (const int64_t variant : variants)
    check(!cos.has_value() || (variant >= 0 && variant < cos->size(0)), "variants that there are tables of");
  std::pair<int64_t, int64_t> stopped{-1, 0};
  if (rows.all == 0) return stopped;
  Rotary rotary{nullptr, nullptr, 0, 0};
  if (cos.has_value()) rotary = {nullptr, nullptr, cos->size(1), cos->size(2)};
  check_rows("decoder_layers", rows.pos, rows.slots, rows.all, pages.size(2) * pages.size(3), rotary);
  // With the whole context visible every page a window could show is checked.
  check_attention("decoder_layers", attention, block_table.size(0), pages.size(2));
  dispatch_float(hidden.scalar_type(), "decoder_layers", [&](auto element) {
    using T = decltype(element);
    Decoder<T> decoder(facts, rows, hidden.mutable_data_ptr<T>());
    T* all_pages = pages.mutable_data_ptr<T>();
    std::vector<LayerWeights<T>> read(layers);
    size_t at = 0;
    for (LayerWeights<T>& layer : read) layer.read(weights, at, present);
    const std::vector<Gate<T>> between = read_gates<T>(gates, facts.width);
    size_t gate = 0;
    for (int64_t layer = 0; layer < layers; ++layer) {
      T* keys = all_pages + (first_layer + layer) * pages.stride(0);
      if (cos.has_value()) {
        const int64_t offset = variants[layer] * cos->stride(0);
        rotary.cos = cos->const_data_ptr<float>() + offset;
        rotary.sin = sin->const_data_ptr<float>() + offset;
      }
      attention.window = windows[layer];
      const Upcoming next = layer + 1 < layers ? decoder.first(read[layer + 1]) : Upcoming{};
      const bool judged = gate < between.size() && between[gate].after == layer + 1;
      decoder.run(read[layer], judged ? between[gate].judge.upcoming() : next, attention, rotary, keys,
                  keys + pages.stride(1));
      if (!judged) continue;
      const Verdict verdict{between[gate].threshold, nullptr, gates.may_leave, gates.total, gates.score, gates.state};
      const int64_t left =
          judge(between[gate].judge, hidden.const_data_ptr<T>(), live, verdict, static_cast<T*>(gates.ready), next);
      if (left > 0) {
        stopped = {static_cast<int64_t>(gate), left};
        return;
      }
      ++gate;
    }
  });
  return stopped;
}

void decoder_layers(const Tensor& hidden, const Tensor& pages, const Tensor& block_table, const Tensor& seq,
                    const Tensor& pos, const Tensor& slots, const std::optional<Tensor>& cos,
                    const std::optional<Tensor>& sin, std::vector<Tensor> weights, std::vector<int64_t> shape,
                    std::vector<int64_t> windows, std::vector<int64_t> variants, std::vector<double> numbers,
                    int64_t first_layer, int64_t live) {
  climb(hidden, pages, block_table, seq, pos, slots, cos, sin, weights, shape, windows, variants, numbers, first_layer,
        live, {});
}

// The same with judges in between, up to the first one at which a row leaves: its number (-1: none), int8 [total]
// states for compact_rows, and the head-ready rows of those that leave.
std::tuple<int64_t, Tensor, Tensor> climb_layers(const Tensor& hidden, const Tensor& pages, const Tensor& block_table,
                                                 const Tensor& seq, const Tensor& pos, const Tensor& slots,
                                                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                                 std::vector<Tensor> weights, std::vector<int64_t> shape,
                                                 std::vector<int64_t> windows, std::vector<int64_t> variants,
                                                 std::vector<double> numbers, int64_t first_layer, int64_t live,
                                                 std::vector<Tensor> judge_tensors, std::vector<int64_t> judge_facts,
                                                 std::vector<double> judge_numbers, const Tensor& may_leave) {
  const int64_t total = may_leave.size(0);
  STD_TORCH_CHECK(may_leave.is_contiguous() && total >= live && hidden.size(0) >= live && live > 0,
                  "climb_layers: wanted live rows, and may_leave of every row");
  const size_t judges = judge_facts.size() / kGateFacts;
  STD_TORCH_CHECK(judge_facts.size() == judges * kGateFacts && judge_numbers.size() == judges * kGateNumbers,
                  "climb_layers: wanted facts and numbers of every judge");
  for (size_t at = 0; at < judges; ++at) {
    const int64_t after = judge_facts[at * kGateFacts], before = at == 0 ? 0 : judge_facts[(at - 1) * kGateFacts];
    STD_TORCH_CHECK(after > before && after < static_cast<int64_t>(windows.size()),
                    "climb_layers: wanted judges between layers, in their order, got one after layer ", after);
  }
  Tensor scores = torch::stable::new_empty(hidden, {live}, ScalarType::Float);
  Tensor state = torch::stable::new_empty(hidden, {total}, ScalarType::Char);
  Tensor ready = torch::stable::new_empty(hidden, {live, hidden.size(1)});
  const Gates gates{.tensors = std::move(judge_tensors),
                    .facts = std::move(judge_facts),
                    .numbers = std::move(judge_numbers),
                    .may_leave = may_leave.const_data_ptr<bool>(),
                    .total = total,
                    .score = scores.mutable_data_ptr<float>(),
                    .state = state.mutable_data_ptr<int8_t>(),
                    .ready = ready.mutable_data_ptr()};
  const auto [stopped, left] = climb(hidden, pages, block_table, seq, pos, slots, cos, sin, weights, shape, windows,
                                     variants, numbers, first_layer, live, gates);
  return {stopped, state, rows_of(ready, 0, left)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "decoder_layers(Tensor(a!) hidden, Tensor(b!) pages, Tensor block_table, Tensor seq, Tensor pos, Tensor slots, "
      "Tensor? cos, Tensor? sin, Tensor[] weights, int[] shape, int[] windows, int[] variants, float[] numbers, "
      "int first_layer, int live) -> ()");
  library.def(
      "climb_layers(Tensor(a!) hidden, Tensor(b!) pages, Tensor block_table, Tensor seq, Tensor pos, Tensor slots, "
      "Tensor? cos, Tensor? sin, Tensor[] weights, int[] shape, int[] windows, int[] variants, float[] numbers, "
      "int first_layer, int live, Tensor[] judge_tensors, int[] judge_facts, float[] judge_numbers, Tensor may_leave) "
      "-> (int, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) {
  library.impl("decoder_layers", TORCH_BOX(&decoder_layers));
  library.impl("climb_layers", TORCH_BOX(&climb_layers));
}

}  // namespace dyndepth
