#include "products.h"

#include <atomic>
#include <cstdlib>
#include <type_traits>

#include "../common/tensor.h"
#include "amx.h"
#include "avx512.h"

#define DYN_BFLOAT16_DOTS
#define DYN_SIMD "../cpu/products.simd.h"
#include "../common/each_target.h"

namespace dyndepth {

namespace {

template <class T>
void finish(const Product<T>& p, const float* sums, const float* sums2, int64_t begin, int64_t end, int64_t first,
            int64_t count) {
  DYN_BEST(finish_panel, p, sums, sums2, begin, end, first, count);
}

template <class T>
constexpr bool kTiled = std::is_same_v<T, BFloat16>;

// Rows whose sums are finished together: those of two panels take 16 KiB, and are in the first-level cache then.
constexpr int64_t kBlockRows = 128;

// What a thread takes at a time: two panels of a plain product, which share the rows that a tile instruction loads, or
// one of both weights of a gated one.
template <class T>
struct Chunk {
  const Product<T>* product = nullptr;
  int64_t first = 0, outputs = 0, number = 0;  // of the product's chunks

  const T* weight(int64_t width) const { return product->weight + first * width; }
  const T* weight2(int64_t width) const { return product->weight2 + first * width; }
};

template <class T>
int64_t chunk_outputs(const Product<T>& product) {
  return panels_per_chunk(product.weight2) * kPanel;
}

template <class T>
int64_t chunks_of(const Product<T>& product) {
  return product.rows == 0 ? 0 : (product.outputs + chunk_outputs(product) - 1) / chunk_outputs(product);
}

template <class T>
Chunk<T> chunk_at(const std::vector<Product<T>>& products, int64_t at) {
  for (const Product<T>& product : products) {
    if (const int64_t chunks = chunks_of(product); at >= chunks) {
      at -= chunks;
      continue;
    }
    const int64_t first = at * chunk_outputs(product);
    return {&product, first, std::min(chunk_outputs(product), product.outputs - first), at};
  }
  return {};
}

template <class T>
void upcoming_chunk(const Chunk<T>& chunk, int64_t width, Ahead& ahead) {
  const Product<T>& p = *chunk.product;
  Upcoming::of(p.weight, p.weight2, p.outputs, width).fetch(ahead, chunk.number);
}

// A chunk whose panels are all full, on tiles.
void tiled_chunk(const Operand<BFloat16>& x, const Chunk<BFloat16>& chunk, Ahead& ahead) {
  alignas(64) float sums[2 * kBlockRows * kPanel];
  const Product<BFloat16>& p = *chunk.product;
  const int64_t width = x.width();
  const bool gated = p.weight2 != nullptr;
  const BFloat16* here = chunk.weight(width);
  const BFloat16* panels[2] = {here, gated ? chunk.weight2(width) : here + kPanel * width};
  const int64_t count = gated || chunk.outputs > kPanel ? 2 : 1;
  ahead.spread((p.rows + 2 * kTileRows16 - 1) / (2 * kTileRows16) * (width / kTileDepth));
  for (int64_t row = 0; row < p.rows; row += kBlockRows) {
    const int64_t end = std::min(row + kBlockRows, p.rows), tiles = (end - row + kTileRows16 - 1) / kTileRows16;
    const uint32_t* packed = x.tiles() + row * width / 2;
    amx_panels(packed, tiles, width, panels, count, width, ahead, sums);
    finish(p, sums, sums + tiles * 256, row, end, chunk.first, gated ? kPanel : chunk.outputs);
  }
}

// Any chunk, on vectors: X is float, or bf16 where the processor has dot products of that.
template <class T, class X>
void vector_chunk(const X* x, int64_t width, const Chunk<T>& chunk, Ahead& ahead) {
  alignas(64) float sums[kBlockRows * kPanel], sums2[kBlockRows * kPanel];
  const Product<T>& p = *chunk.product;
  const bool gated = p.weight2 != nullptr;
  const T* here = chunk.weight(width);
  // Steps of so many rows and outputs, and a vector of channels; what is left of the rows goes one by one.
  const int64_t block = DYN_BEST(block_of_dots), panels = gated || chunk.outputs > kPanel ? 2 : 1;
  const int64_t vectors = width * static_cast<int64_t>(sizeof(X)) / 64;
  // One row waits for its weights anyway.
  if (p.rows > 1) ahead.spread_in_turn((p.rows / block + p.rows % block) * (panels * kPanel / block) * vectors);
  for (int64_t row = 0; row < p.rows; row += kBlockRows) {
    const int64_t end = std::min(row + kBlockRows, p.rows);
    const auto panel = [&](const T* weight, int64_t outputs, float* to) {
      DYN_BEST(vector_panel, x + row * width, end - row, weight, outputs, width, ahead, to);
    };
    const int64_t outputs = std::min(kPanel, chunk.outputs), rest = chunk.outputs - outputs;
    panel(here, outputs, sums);
    if (gated) panel(chunk.weight2(width), outputs, sums2);
    if (rest > 0) panel(here + kPanel * width, rest, sums2);
    if (rest == kPanel) {
      finish(p, sums, sums2, row, end, chunk.first, chunk.outputs);
    } else {
      finish(p, sums, sums2, row, end, chunk.first, outputs);
      if (rest > 0) finish(p, sums2, sums2, row, end, chunk.first + kPanel, rest);
    }
  }
}

}  // namespace

template <class T>
void Operand<T>::pack(const T* x, int64_t rows, int64_t width) {
  rows_ = rows;
  width_ = width;
  x_ = x;
  floats_ = nullptr;
  if constexpr (kTiled<T>) {
    if (!amx_usable() || width % kTileDepth != 0 || width == 0) {
      tiles_.reset();
      tile_capacity_ = 0;
      return;
    }
    const int64_t row_tiles = (rows + kTileRows16 - 1) / kTileRows16, words = row_tiles * kTileRows16 * width / 2;
    if (words > tile_capacity_) {
      tiles_.reset(static_cast<uint32_t*>(std::aligned_alloc(64, words * 4)));
      STD_TORCH_CHECK(tiles_ != nullptr, "out of memory for ", words * 4, " bytes of packed rows");
      tile_capacity_ = words;
    }
    // Packing 16 rows takes about as long as waking a thread.
    torch::stable::parallel_for(0, row_tiles, 4, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile)
        amx_pack(x + tile * kTileRows16 * width, std::min(kTileRows16, rows - tile * kTileRows16), width, width,
                 tiles_.get() + tile * kTileRows16 * width / 2);
    });
  }
}

template <class T>
void Operand<T>::widen() const {
  if (floats_ != nullptr) return;
  if constexpr (std::is_same_v<T, float>) {
    floats_ = x_;
  } else {
    widened_.resize(rows_ * width_);
    torch::stable::parallel_for(0, rows_, 65536 / (width_ + 1) + 1, [&](int64_t begin, int64_t end) {
      DYN_BEST(widen_rows, x_ + begin * width_, widened_.data() + begin * width_, (end - begin) * width_);
    });
    floats_ = widened_.data();
  }
}

template <class T>
void multiply(const Operand<T>& x, const std::vector<Product<T>>& products, const Upcoming& upcoming) {
  int64_t chunks = 0;
  bool vectors = x.tiles() == nullptr;
  for (const Product<T>& product : products) {
    chunks += chunks_of(product);
    vectors = vectors || product.outputs % kPanel != 0;
  }
  if (chunks == 0) return;
  const bool pairs = kTiled<T> && simd_level() == 5;
  if (vectors && !pairs) x.widen();
  // Chunks are taken as threads get to them: a core that is slower for a while does not hold up the others. Each knows
  // its next one while it works on one, and has it fetched meanwhile; the last one has what comes next fetched.
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), chunks);
  std::atomic<int64_t> taken{workers};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const bool tiled = kTiled<T> && x.tiles() != nullptr;
    if (tiled) amx_begin();
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t at = worker, next; at < chunks; at = next) {
        next = taken.fetch_add(1, std::memory_order_relaxed);
        const Chunk<T> chunk = chunk_at(products, at);
        Ahead ahead;
        if (next < chunks)
          upcoming_chunk(chunk_at(products, next), x.width(), ahead);
        else
          upcoming.fetch(ahead, worker);
        if constexpr (kTiled<T>) {
          if (tiled && chunk.outputs % kPanel == 0) {
            tiled_chunk(x, chunk, ahead);
            continue;
          }
          if (pairs) {
            vector_chunk(x.x(), x.width(), chunk, ahead);
            continue;
          }
        }
        vector_chunk(x.floats(), x.width(), chunk, ahead);
      }
    }
    if (tiled) amx_end();
  });
}

template class Operand<float>;
template class Operand<BFloat16>;
template class Operand<Half>;
template void multiply(const Operand<float>&, const std::vector<Product<float>>&, const Upcoming&);
template void multiply(const Operand<BFloat16>&, const std::vector<Product<BFloat16>>&, const Upcoming&);
template void multiply(const Operand<Half>&, const std::vector<Product<Half>>&, const Upcoming&);

}  // namespace dyndepth
