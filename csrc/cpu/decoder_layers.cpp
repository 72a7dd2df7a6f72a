// Consecutive decoder layers of the Llama kind in one call, with judgements between them and rows that leave there: a
// pass without a step of Python per op.
#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>
#include <utility>

#include "decoder.h"
#include "gates.h"

namespace dyndepth {

namespace {

// Where a climb ended: layers run, how many rows want to leave there that are not moved yet, live rows but for these,
// and how many head-ready rows were made of those that left or want to.
struct Reached {
  int64_t layers, waiting, live, ready;
};

// Order of `shape` and `numbers`, as in dyndepth/runtime/stack.py.
Reached climb(const Tensor& hidden, const Tensor& pages, const Tensor& block_table, const Tensor& seq,
              const Tensor& pos, const Tensor& slots, const std::optional<Tensor>& cos,
              const std::optional<Tensor>& sin, const std::vector<Tensor>& weights, const std::vector<int64_t>& shape,
              const std::vector<int64_t>& windows, const std::vector<int64_t>& variants,
              const std::vector<double>& numbers, int64_t first_layer, int64_t live, const Boundaries& boundaries) {
  const int64_t present = shape[4], layers = static_cast<int64_t>(windows.size());
  const DecoderShape facts{.width = hidden.size(1),
                           .heads = shape[0],
                           .kv_heads = pages.size(4),
                           .head_dim = pages.size(5),
                           .inner = shape[1],
                           .activation = static_cast<Activation>(shape[2]),
                           .norm = static_cast<NormStyle>(shape[3]),
                           .eps = static_cast<float>(numbers[0]),
                           .head_eps = static_cast<float>(numbers[1])};
  PassRows rows{.live = live,
                .all = hidden.size(0),
                .seq = seq.const_data_ptr<int32_t>(),
                .pos = pos.const_data_ptr<int32_t>(),
                .slots = slots.const_data_ptr<int32_t>()};
  AttentionProblem attention{.block_table = block_table.const_data_ptr<int32_t>(),
                             .seq = rows.seq,
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
  Reached reached{layers, 0, live, 0};
  if (rows.all == 0) return reached;
  Rotary first_table{nullptr, nullptr, 0, 0};
  if (cos.has_value())
    first_table = {cos->const_data_ptr<float>(), sin->const_data_ptr<float>(), cos->size(1), cos->size(2)};
  const int64_t slot_count = pages.size(2) * pages.size(3);
  check_rows("decoder_layers", rows.pos, rows.slots, rows.all, slot_count, first_table);
  // With the whole context visible every page a window could show is checked.
  check_attention("decoder_layers", attention, block_table.size(0), pages.size(2));
  dispatch_float(hidden.scalar_type(), "decoder_layers", [&](auto element) {
    using T = decltype(element);
    T* stream = hidden.mutable_data_ptr<T>();
    Decoder<T> decoder(facts, rows, stream);
    const KvPages<T> kv{pages.mutable_data_ptr<T>(), slot_count, facts.kv_heads, facts.head_dim};
    std::vector<LayerWeights<T>> read(layers);
    size_t at = 0;
    for (LayerWeights<T>& layer : read) layer.read(weights, at, present);
    const std::vector<Gate<T>> between = read_gates<T>(boundaries.tensors, boundaries.facts, boundaries.numbers,
                                                       facts.width, facts.kv_heads * facts.head_dim);
    for (const Gate<T>& one : between) {
      if (!one.maps) continue;
      check(first_layer + one.after + one.maps->layers <= pages.size(0), "pages of every layer that K,V maps are of");
      for (int64_t i = 0; one.maps->variant != nullptr && cos.has_value() && i < one.maps->layers; ++i)
        check(one.maps->variant[i] >= 0 && one.maps->variant[i] < cos->size(0), "variants that there are tables of");
    }
    size_t number = 0;
    T* ready = static_cast<T*>(boundaries.ready);
    AwayRows<T> away;
    const auto look_up = [&] {  // where rows lie now
      if (!boundaries.propagates) rows.all = rows.live;
      rows.seq = boundaries.rows->seq();
      rows.pos = boundaries.rows->pos();
      rows.slots = boundaries.rows->slots();
      decoder.set_rows(rows);
    };
    for (int64_t layer = 0; layer < layers; ++layer) {
      const Rotary table = first_table.variant(variants[layer]);
      attention.window = windows[layer];
      const Upcoming next = layer + 1 < layers ? decoder.first(read[layer + 1]) : Upcoming{};
      const Gate<T>* gate = number < between.size() && between[number].after == layer + 1 ? &between[number] : nullptr;
      const bool judged_by_head = gate != nullptr && gate->judge.reads_head();
      if (rows.all > 0)
        decoder.run(read[layer], judged_by_head ? gate->judge.upcoming() : next, attention, table,
                    kv.keys(first_layer + layer), kv.values(first_layer + layer));
      if (boundaries.rows != nullptr && layer + 1 < layers) {
        const int64_t came = away.come_back(layer + 1, rows.live, *boundaries.rows, stream, facts.width);
        rows.live += came;
        if (came > 0) look_up();
      }
      if (gate == nullptr) continue;
      int32_t& count = boundaries.counts[number++];
      if (rows.live == 0) continue;  // nobody is there to be judged
      const bool for_good = gate->resume == 0;
      const Verdict verdict{.threshold = gate->threshold,
                            .thresholds = nullptr,
                            .may_leave = boundaries.rows->may_leave(),
                            .known = boundaries.rows->known(),
                            .bit = gate->bit,
                            .total = boundaries.rows->size(),
                            .score = boundaries.score,
                            .state = boundaries.state};
      const int64_t left = judge(gate->judge, stream, rows.live, verdict, for_good ? ready : nullptr, next);
      if (left == 0) continue;
      if (for_good) reached.ready += left;
      if (!boundaries.goes_on) {
        reached = {layer + 1, left, rows.live - left, reached.ready};
        return;
      }
      MovingRows& moving = *boundaries.rows;
      count = static_cast<int32_t>(left);
      rows.live = moving.leave(boundaries.state, rows.live, stream, facts.width);
      away.leave(*gate, left);
      look_up();
      const int32_t* who = moving.index() + rows.live;
      if (!for_good) boundaries.skipped->insert(boundaries.skipped->end(), who, who + left);
      if (for_good && boundaries.home != nullptr)
        send_home(ready, who, left, facts.width, static_cast<T*>(boundaries.home));
      if (for_good) ready += left * facts.width;
      if (gate->maps)
        backfill(*gate->maps, stream + rows.live * facts.width, left, first_table, rows.pos + rows.live,
                 rows.slots + rows.live, kv, first_layer + gate->after, rows.live > 0 ? next : Upcoming{});
      // Nobody is live. Rows that come back in this call are waited for; but K,V of rows that ride along are made for
      // all the layers at once, and that is the caller's to do.
      if (rows.live == 0 && (boundaries.propagates || !away.comes_back_below(layers))) {
        reached = {layer + 1, 0, 0, reached.ready};
        return;
      }
    }
    reached.live = rows.live;
    if (boundaries.home == nullptr) return;
    std::vector<T> normed(rows.live * facts.width);
    rms_norm(stream, normed.data(), rows.live, facts.width, boundaries.final_gain->const_data_ptr<T>(),
             boundaries.final_style, boundaries.final_eps);
    send_home(normed.data(), boundaries.rows->index(), rows.live, facts.width, static_cast<T*>(boundaries.home));
  });
  return reached;
}

void decoder_layers(const Tensor& hidden, const Tensor& pages, const Tensor& block_table, const Tensor& seq,
                    const Tensor& pos, const Tensor& slots, const std::optional<Tensor>& cos,
                    const std::optional<Tensor>& sin, std::vector<Tensor> weights, std::vector<int64_t> shape,
                    std::vector<int64_t> windows, std::vector<int64_t> variants, std::vector<double> numbers,
                    int64_t first_layer, int64_t live) {
  climb(hidden, pages, block_table, seq, pos, slots, cos, sin, weights, shape, windows, variants, numbers, first_layer,
        live, {});
}

// The same with judges in between. Where rows leave, they are moved and the others go on (`goes_on`), or the climb ends
// and the caller moves them. `index` int32 [n] has every row's place in the caller's order; `more` are other tensors of
// all rows that move with them. With a final norm all rows must be live, and those that reach the end pass it.
//
// Rows of a judge with a boundary to come back at lie behind the live ones until then, and go through its jump; at the
// end of the call, and where nobody is live, those that are away yet are the caller's to bring back. Where `known` says
// so, the last of `more` has int64 bits of what was decided before the pass.
//
// Returns (layers run, rows that want to leave there and are not moved, live rows, int8 [n] states of those that want
// to leave for compact_rows, head-ready rows of all that left for good or want to, int32 [judges] rows that were moved
// at each, places in the caller's order of those that left to come back, where any moved seq, pos, slots, may_leave,
// index and `more`, head-ready rows [n, width] of everybody in the caller's order, where there is a final norm;
// unspecified where rows are waiting or away to come back).
std::tuple<int64_t, int64_t, int64_t, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>, Tensor> climb_layers(
    const Tensor& hidden, const Tensor& pages, const Tensor& block_table, const Tensor& seq, const Tensor& pos,
    const Tensor& slots, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    std::vector<Tensor> weights, std::vector<int64_t> shape, std::vector<int64_t> windows,
    std::vector<int64_t> variants, std::vector<double> numbers, int64_t first_layer, int64_t live,
    std::vector<Tensor> judge_tensors, std::vector<int64_t> judge_facts, std::vector<double> judge_numbers,
    const Tensor& may_leave, const Tensor& index, std::vector<Tensor> more, bool known, bool goes_on, bool propagates,
    const std::optional<Tensor>& final_gain, int64_t final_style, double final_eps) {
  const int64_t total = may_leave.size(0), width = hidden.size(1);
  STD_TORCH_CHECK(total >= live && hidden.size(0) >= live && live > 0,
                  "climb_layers: wanted live rows, and may_leave of every row");
  std::vector<Tensor> moving{seq, pos, slots, may_leave, index};
  moving.insert(moving.end(), more.begin(), more.end());
  for (const Tensor& tensor : moving)
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.dim() == 1 && tensor.size(0) == total,
                    "climb_layers: wanted contiguous seq, pos, slots, may_leave, index and more of the same rows");
  STD_TORCH_CHECK(!final_gain || (live == total && final_gain->is_contiguous() && final_gain->numel() == width),
                  "climb_layers: wanted all rows live, and a gain per channel, where there is a final norm");
  const size_t judges = judge_facts.size() / kGateFacts;
  STD_TORCH_CHECK(judge_facts.size() == judges * kGateFacts && judge_numbers.size() == judges * kGateNumbers,
                  "climb_layers: wanted facts and numbers of every judge");
  for (size_t at = 0; at < judges; ++at) {
    const int64_t after = judge_facts[at * kGateFacts], before = at == 0 ? 0 : judge_facts[(at - 1) * kGateFacts];
    STD_TORCH_CHECK(after > before && after < static_cast<int64_t>(windows.size()),
                    "climb_layers: wanted judges between layers, in their order, got one after layer ", after);
    const int64_t resume = judge_facts[at * kGateFacts + 1], bit = judge_facts[at * kGateFacts + 2];
    const auto kind = static_cast<JudgeKind>(judge_facts[at * kGateFacts + 4]);
    STD_TORCH_CHECK(resume == 0 || resume > after, "climb_layers: wanted rows to come back above layer ", after,
                    ", got ", resume);
    STD_TORCH_CHECK(resume == 0 || kind == JudgeKind::residual || kind == JudgeKind::known,
                    "climb_layers: wanted judges without a head of rows that come back");
    STD_TORCH_CHECK(kind != JudgeKind::known || (known && bit >= 0 && bit < 63),
                    "climb_layers: wanted bits of what is known, got bit ", bit);
  }
  Tensor scores = torch::stable::new_empty(hidden, {live}, ScalarType::Float);
  Tensor state = torch::stable::new_empty(hidden, {total}, ScalarType::Char);
  Tensor ready = torch::stable::new_empty(hidden, {judges == 0 ? 0 : live, width});
  Tensor home = torch::stable::new_empty(hidden, {final_gain ? total : 0, width});
  Tensor counts = torch::stable::new_empty(hidden, {static_cast<int64_t>(judges)}, ScalarType::Int);
  std::fill_n(counts.mutable_data_ptr<int32_t>(), judges, 0);
  STD_TORCH_CHECK(!known || (!more.empty() && more.back().scalar_type() == ScalarType::Long),
                  "climb_layers: wanted int64 bits of what is known");
  MovingRows rows(std::move(moving), known);
  std::vector<int32_t> skipped;
  const Boundaries boundaries{.tensors = std::move(judge_tensors),
                              .facts = std::move(judge_facts),
                              .numbers = std::move(judge_numbers),
                              .goes_on = goes_on,
                              .propagates = propagates,
                              .rows = &rows,
                              .score = scores.mutable_data_ptr<float>(),
                              .state = state.mutable_data_ptr<int8_t>(),
                              .counts = counts.mutable_data_ptr<int32_t>(),
                              .ready = ready.mutable_data_ptr(),
                              .skipped = &skipped,
                              .final_gain = final_gain,
                              .final_style = static_cast<NormStyle>(final_style),
                              .final_eps = static_cast<float>(final_eps),
                              .home = final_gain ? home.mutable_data_ptr() : nullptr};
  const Reached reached = climb(hidden, pages, block_table, seq, pos, slots, cos, sin, weights, shape, windows,
                                variants, numbers, first_layer, live, boundaries);
  Tensor who = torch::stable::new_empty(hidden, {static_cast<int64_t>(skipped.size())}, ScalarType::Int);
  std::copy(skipped.begin(), skipped.end(), who.mutable_data_ptr<int32_t>());
  return {reached.layers,
          reached.waiting,
          reached.live,
          state,
          rows_of(ready, 0, reached.ready),
          counts,
          who,
          rows.moved(),
          home};
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
      "int first_layer, int live, Tensor[] judge_tensors, int[] judge_facts, float[] judge_numbers, Tensor may_leave, "
      "Tensor index, Tensor[] more, bool known, bool goes_on, bool propagates, Tensor? final_gain, int final_style, "
      "float final_eps) -> (int, int, int, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) {
  library.impl("decoder_layers", TORCH_BOX(&decoder_layers));
  library.impl("climb_layers", TORCH_BOX(&climb_layers));
}

}  // namespace dyndepth
