#include "ragged_attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "../common/tensor.h"
#include "attend_tiles.h"

namespace dyndepth {

void check_attention(const char* op, const AttentionProblem& p, int64_t sequences, int64_t pages) {
  int64_t first = 0, beyond = 0;  // pages [first, beyond) of the sequence of the row before are known to be good
  for (int64_t row = 0; row < p.rows; ++row) {
    STD_TORCH_CHECK(p.seq[row] >= 0 && p.seq[row] < sequences, op, ": seq must be in [0, ", sequences, "), got ",
                    p.seq[row], " at ", row);
    STD_TORCH_CHECK(p.pos[row] >= 0 && p.pos[row] / p.page_size < p.max_pages, op, ": pos must be in [0, ",
                    p.max_pages * p.page_size, ") (the block table's reach), got ", p.pos[row], " at ", row);
    const int32_t* table = p.block_table + p.seq[row] * p.max_pages;
    const int64_t begin = p.oldest_key(row) / p.page_size, end = p.pos[row] / p.page_size + 1;
    const bool follows = row > 0 && p.seq[row] == p.seq[row - 1] && begin >= first && begin <= beyond;
    if (!follows) first = beyond = begin;
    for (int64_t page = beyond; page < end; ++page)
      STD_TORCH_CHECK(table[page] >= 0 && table[page] < pages, op, ": block_table must be in [0, ", pages,
                      ") for visible positions, got ", table[page], " for sequence ", p.seq[row], ", page ", page);
    beyond = std::max(beyond, end);
  }
}

namespace {

// Tiles: runs of consecutive rows of one sequence, at most tile_rows each. tiles[i] .. tiles[i + 1] are one tile.
std::vector<int64_t> tile_bounds(const AttentionProblem& p) {
  std::vector<int64_t> bounds{0};
  for (int64_t row = 1; row < p.rows; ++row)
    if (p.seq[row] != p.seq[row - 1] || row - bounds.back() == p.tile_rows) bounds.push_back(row);
  bounds.push_back(p.rows);
  return bounds;
}

// One task after the other from the last, for whoever is free: the last tiles of a long prompt see the most keys. A
// task is told which one its thread will probably get next, or -1.
template <class Kernel, class Task>
void for_each_task(int64_t tasks, int64_t floats, const Task& task) {
  std::atomic<int64_t> left{tasks};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local std::vector<float> memory;
    memory.resize(floats);
    Kernel::begin();
    for (int64_t at; (at = left.fetch_sub(1, std::memory_order_relaxed) - 1) >= 0;)
      task(at, std::max<int64_t>(at - threads, -1), memory.data());
    Kernel::end();
  });
}

template <class Kernel, class T>
void attend_tiles(AttentionProblem p, const T* q, const T* keys, const T* values, T* out) {
  p.tile_rows = Kernel::rows(p);
  const std::vector<int64_t> bounds = tile_bounds(p);
  const int64_t tiles = static_cast<int64_t>(bounds.size()) - 1, items = tiles * p.kv_heads;
  const int64_t size = Partial::floats(p);
  // A tile's segments are those that its oldest and newest visible keys lie in.
  std::vector<int64_t> begin_of(tiles), starts(tiles + 1, 0);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    int64_t oldest = p.oldest_key(bounds[tile]), newest = 0;
    for (int64_t row = bounds[tile]; row < bounds[tile + 1]; ++row) {
      oldest = std::min(oldest, p.oldest_key(row));
      newest = std::max<int64_t>(newest, p.pos[row]);
    }
    begin_of[tile] = oldest / kSegment;
    starts[tile + 1] = starts[tile] + newest / kSegment + 1 - begin_of[tile];
  }
  const auto piece_of = [&](int64_t tile, int64_t head, int64_t segment) {
    return Piece{bounds[tile], bounds[tile + 1], head, begin_of[tile] + segment};
  };
  // The rest of a tile's segments one after the other, merged in their order.
  const auto finish = [&](int64_t tile, int64_t head, Partial total, auto&& next) {
    for (int64_t segment = 1; segment < starts[tile + 1] - starts[tile]; ++segment)
      Kernel::merge(p, bounds[tile + 1] - bounds[tile], total, next(segment));
    Kernel::write(p, total, bounds[tile], bounds[tile + 1], head, out);
  };
  // Fewer items than four per thread leave threads waiting: then segments are items of their own.
  const bool split = items < 4 * static_cast<int64_t>(torch::stable::get_num_threads()) && starts[tiles] > tiles;
  if (!split) {
    for_each_task<Kernel>(items, 2 * size + Kernel::scratch(p), [&](int64_t i, int64_t next, float* memory) {
      const Partial total(memory, p), part(memory + size, p);
      const int64_t tile = i / p.kv_heads, head = i % p.kv_heads;
      const auto attend = [&](int64_t segment, Partial to) {
        const bool last = segment + 1 == starts[tile + 1] - starts[tile];
        const Piece after = !last      ? piece_of(tile, head, segment + 1)
                            : next < 0 ? Piece{}
                                       : piece_of(next / p.kv_heads, next % p.kv_heads, 0);
        Kernel::segment(p, q, keys, values, piece_of(tile, head, segment), last && next < 0 ? nullptr : &after, to,
                        memory + 2 * size);
        return to;
      };
      attend(0, total);
      finish(tile, head, total, [&](int64_t segment) { return attend(segment, part); });
    });
    return;
  }
  // Not zeroed: every part is filled by who computes it.
  const std::unique_ptr<float[]> parts(new float[starts[tiles] * p.kv_heads * size]);
  const auto part_of = [&](int64_t tile, int64_t head, int64_t segment) {
    return Partial(parts.get() + ((starts[tile] + segment) * p.kv_heads + head) * size, p);
  };
  std::vector<Piece> pieces;  // in the order of their parts
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t segment = 0; segment < starts[tile + 1] - starts[tile]; ++segment)
      for (int64_t head = 0; head < p.kv_heads; ++head) pieces.push_back(piece_of(tile, head, segment));
  for_each_task<Kernel>(pieces.size(), Kernel::scratch(p), [&](int64_t i, int64_t next, float* scratch) {
    Kernel::segment(p, q, keys, values, pieces[i], next < 0 ? nullptr : &pieces[next],
                    Partial(parts.get() + i * size, p), scratch);
  });
  for (int64_t i = 0; i < items; ++i) {
    const int64_t tile = i / p.kv_heads, head = i % p.kv_heads;
    finish(tile, head, part_of(tile, head, 0), [&](int64_t segment) { return part_of(tile, head, segment); });
  }
}

}  // namespace

template <class T>
void attend_all(const AttentionProblem& p, const T* q, const T* keys, const T* values, T* out) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (attends_on_tiles(p)) return attend_tiles<AttendTiles>(p, q, keys, values, out);
  attend_tiles<AttendVectors<T>>(p, q, keys, values, out);
}

template void attend_all(const AttentionProblem&, const float*, const float*, const float*, float*);
template void attend_all(const AttentionProblem&, const BFloat16*, const BFloat16*, const BFloat16*, BFloat16*);
template void attend_all(const AttentionProblem&, const Half*, const Half*, const Half*, Half*);

namespace {

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
  check_attention("ragged_attention", p, block_table.size(0), pages.size(1));
  dispatch_float(q.scalar_type(), "ragged_attention", [&](auto element) {
    using T = decltype(element);
    const T* keys = pages.const_data_ptr<T>();
    const T* values = keys + pages.stride(0);
    attend_all(p, q.const_data_ptr<T>(), keys, values, out.mutable_data_ptr<T>());
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
