#include "ragged_attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/tensor.h"

namespace dyndepth {

namespace {

// The first position that a row sees.
DYN_INLINE int64_t oldest_key(const AttentionProblem& p, int64_t row) {
  return p.window > 0 ? std::max<int64_t>(0, static_cast<int64_t>(p.pos[row]) - p.window + 1) : 0;
}

// Scores of one query against keys [begin, end) of a page, then their exponentials, kept running (online softmax,
// Milakov & Gimelshein 2018): `peak` is the maximum so far, `mass` the sum of exp(score - peak), `acc` the weighted V.
// What a row computes depends on its own pages only, never on the tile it shares: batch invariance starts here.
DYN_INLINE void absorb_page(const AttentionProblem& p, const float* q, const float* keys, const float* values,
                            int64_t begin, int64_t end, float* acc, float* peak, float* mass, float* scores) {
  const int64_t dim = p.head_dim;
  float best = *peak;
  for (int64_t k = begin; k < end; ++k) {
    float score = dot(keys + k * dim, q, dim);
    if (p.softcap > 0.f) score = p.softcap * std::tanh(score / p.softcap);
    scores[k - begin] = score;
    best = score > best ? score : best;
  }
  if (best == -std::numeric_limits<float>::infinity())
    return;  // nothing but -inf so far: no weight, and no -inf - -inf
  if (best > *peak) {
    const float shrink = std::exp(*peak - best);
    for (int64_t i = 0; i < dim; ++i) acc[i] *= shrink;
    *mass *= shrink;
    *peak = best;
  }
  const int64_t count = end - begin;
  for (int64_t i = count; i % kLanes; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes weights = exp_nonpositive(load(scores + i) - *peak);
    store(scores + i, weights);
    *mass += sum(weights);
  }
  add_weighted_rows(acc, values + begin * dim, scores, count, dim);
}

template <class T>
DYN_INLINE void attend_tile(const AttentionProblem& p, const T* q, const T* keys, const T* values, T* out,
                            int64_t first, int64_t last, int64_t kv_head, float* scratch) {
  const int64_t dim = p.head_dim, group = p.heads / p.kv_heads, queries = (last - first) * group;
  float* query = scratch;
  float* acc = query + kTileRows * group * dim;
  float* peak = acc + kTileRows * group * dim;
  float* mass = peak + kTileRows * group;
  float* page_keys = mass + kTileRows * group;
  float* page_values = page_keys + p.page_size * dim;
  float* scores = page_values + p.page_size * dim;

  int64_t oldest = std::numeric_limits<int64_t>::max(), newest = 0;
  for (int64_t row = first; row < last; ++row) {
    newest = std::max<int64_t>(newest, p.pos[row]);
    oldest = std::min(oldest, oldest_key(p, row));
    for (int64_t g = 0; g < group; ++g) {
      const int64_t at = (row - first) * group + g;
      to_floats(query + at * dim, q + (row * p.heads + kv_head * group + g) * dim, dim);
      for (int64_t i = 0; i < dim; ++i) query[at * dim + i] *= p.scale;
    }
  }
  std::fill(acc, acc + queries * dim, 0.f);
  std::fill(peak, peak + queries, -std::numeric_limits<float>::infinity());
  std::fill(mass, mass + queries, 0.f);

  const int32_t* table = p.block_table + p.seq[first] * p.max_pages;
  for (int64_t page = oldest / p.page_size; page <= newest / p.page_size; ++page) {
    const int64_t base = page * p.page_size;
    // Between the windows of a tile's rows may lie pages that no row sees: their table entries mean nothing.
    int64_t used = 0;
    for (int64_t row = first; row < last; ++row)
      if (oldest_key(p, row) < base + p.page_size)
        used = std::max(used, std::min(p.page_size, static_cast<int64_t>(p.pos[row]) + 1 - base));
    for (int64_t k = 0; k < used; ++k) {
      const int64_t at = ((table[page] * p.page_size + k) * p.kv_heads + kv_head) * dim;
      to_floats(page_keys + k * dim, keys + at, dim);
      to_floats(page_values + k * dim, values + at, dim);
    }
    for (int64_t row = first; row < last; ++row) {
      const int64_t begin = std::max<int64_t>(0, oldest_key(p, row) - base);
      const int64_t end = std::min<int64_t>(p.page_size, static_cast<int64_t>(p.pos[row]) + 1 - base);
      if (begin >= end) continue;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t at = (row - first) * group + g;
        absorb_page(p, query + at * dim, page_keys, page_values, begin, end, acc + at * dim, peak + at, mass + at,
                    scores);
      }
    }
  }
  for (int64_t row = first; row < last; ++row)
    for (int64_t g = 0; g < group; ++g) {
      const int64_t at = (row - first) * group + g;
      T* target = out + (row * p.heads + kv_head * group + g) * dim;
      for (int64_t i = 0; i < dim; ++i) target[i] = static_cast<T>(acc[at * dim + i] / mass[at]);
    }
}

}  // namespace

DYN_MULTIVERSION void attend(const AttentionProblem& problem, const float* q, const float* keys, const float* values,
                             float* out, int64_t first, int64_t last, int64_t kv_head, float* scratch) {
  attend_tile(problem, q, keys, values, out, first, last, kv_head, scratch);
}
DYN_MULTIVERSION void attend(const AttentionProblem& problem, const BFloat16* q, const BFloat16* keys,
                             const BFloat16* values, BFloat16* out, int64_t first, int64_t last, int64_t kv_head,
                             float* scratch) {
  attend_tile(problem, q, keys, values, out, first, last, kv_head, scratch);
}
DYN_MULTIVERSION void attend(const AttentionProblem& problem, const Half* q, const Half* keys, const Half* values,
                             Half* out, int64_t first, int64_t last, int64_t kv_head, float* scratch) {
  attend_tile(problem, q, keys, values, out, first, last, kv_head, scratch);
}

namespace {

void check_indices(const AttentionProblem& p, int64_t sequences, int64_t pages) {
  for (int64_t row = 0; row < p.rows; ++row) {
    STD_TORCH_CHECK(p.seq[row] >= 0 && p.seq[row] < sequences, "ragged_attention: seq must be in [0, ", sequences,
                    "), got ", p.seq[row], " at ", row);
    STD_TORCH_CHECK(p.pos[row] >= 0 && p.pos[row] / p.page_size < p.max_pages, "ragged_attention: pos must be in [0, ",
                    p.max_pages * p.page_size, ") (the block table's reach), got ", p.pos[row], " at ", row);
    const int32_t* table = p.block_table + p.seq[row] * p.max_pages;
    for (int64_t page = oldest_key(p, row) / p.page_size; page <= p.pos[row] / p.page_size; ++page)
      STD_TORCH_CHECK(table[page] >= 0 && table[page] < pages, "ragged_attention: block_table must be in [0, ", pages,
                      ") for visible positions, got ", table[page], " for sequence ", p.seq[row], ", page ", page);
  }
}

// Tiles: runs of consecutive rows of one sequence, at most kTileRows each. tiles[i] .. tiles[i + 1] are one tile.
std::vector<int64_t> tile_bounds(const AttentionProblem& p) {
  std::vector<int64_t> bounds{0};
  for (int64_t row = 1; row < p.rows; ++row)
    if (p.seq[row] != p.seq[row - 1] || row - bounds.back() == kTileRows) bounds.push_back(row);
  bounds.push_back(p.rows);
  return bounds;
}

Tensor ragged_attention(const Tensor& q, const Tensor& pages, const Tensor& block_table, const Tensor& seq,
                        const Tensor& pos, const std::optional<Tensor>& live, double scale, double softcap,
                        int64_t window) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  AttentionProblem p{.block_table = block_table.const_data_ptr<int32_t>(),
                     .seq = seq.const_data_ptr<int32_t>(),
                     .pos = pos.const_data_ptr<int32_t>(),
                     .rows = live_rows(live, q.size(0)),
                     .heads = q.size(1),
                     .kv_heads = pages.size(3),
                     .head_dim = q.size(2),
                     .page_size = pages.size(2),
                     .max_pages = block_table.size(1),
                     .window = window,
                     .scale = static_cast<float>(scale),
                     .softcap = static_cast<float>(softcap)};
  if (p.rows == 0) return out;
  check_indices(p, block_table.size(0), pages.size(1));
  const std::vector<int64_t> tiles = tile_bounds(p);
  const int64_t work = (static_cast<int64_t>(tiles.size()) - 1) * p.kv_heads;
  dispatch_float(q.scalar_type(), "ragged_attention", [&](auto element) {
    using T = decltype(element);
    const T* keys = pages.const_data_ptr<T>();
    const T* values = keys + pages.stride(0);
    torch::stable::parallel_for(0, work, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(attention_scratch(p));
      for (int64_t i = begin; i < end; ++i)
        attend(p, q.const_data_ptr<T>(), keys, values, out.mutable_data_ptr<T>(), tiles[i / p.kv_heads],
               tiles[i / p.kv_heads + 1], i % p.kv_heads, scratch.data());
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dyndepth_cpp, library) {
  library.def(
      "ragged_attention(Tensor q, Tensor pages, Tensor block_table, Tensor seq, Tensor pos, Tensor? live, float scale, "
      "float softcap, int window) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dyndepth_cpp, CPU, library) {
  library.impl("ragged_attention", TORCH_BOX(&ragged_attention));
}

}  // namespace dyndepth
