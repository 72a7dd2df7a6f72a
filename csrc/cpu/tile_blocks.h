// The keys that a tile of rows sees, as matrix tiles want them, and the memory that attend_tiles.cpp works in.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "amx.h"
#include "avx512.h"
#include "ragged_attention.h"

#ifdef DYN_AVX512
namespace dyndepth::tiles {

constexpr int64_t kBlock = 16;  // keys of a tile
constexpr int64_t kChunk = 32;  // keys of a step of weights times values: key r is paired with key r + 16
constexpr int64_t kBlocks = kSegment / kBlock, kChunks = kSegment / kChunk;

// Sixteen keys and values that lie evenly in memory, `stride` elements apart.
struct Block {
  const BFloat16* keys;
  const BFloat16* values;
  int64_t stride;
};

// What rows see of a segment. Blocks [begin, end) hold all of it, in whole chunks; keys that nobody sees are zeros.
struct Seen {
  int64_t begin, end;
  Block block[kBlocks];
  // Values that some row sees and another does not are finite: their weight of 0 makes them nothing.
  bool finite = true;
};

struct Scratch {
  BFloat16* copies;      // [2][kSegment, head_dim], for blocks that lie unevenly
  uint32_t* queries;     // [tiles][head_dim / 32] tiles
  uint32_t* turned;      // [kChunks][head_dim / 16] tiles: values, channels down and keys across
  float* scores;         // [kSegment][16 queries] or [16 queries][kSegment]
  uint32_t *high, *low;  // [kChunks] tiles of weights

  static constexpr int64_t kScores = kSegment * kBlock, kWeights = kChunks * kTileWords;
  static int64_t query_words(const AttentionProblem& p) { return p.queries() * p.head_dim / 2; }
  static int64_t words(const AttentionProblem& p) {
    return 16 + kSegment * p.head_dim + query_words(p) + kSegment / 2 * p.head_dim + kScores + 2 * kWeights;
  }

  Scratch(const AttentionProblem& p, float* memory) {
    float* at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
    const auto take = [&](int64_t words) { return std::exchange(at, at + words); };
    copies = reinterpret_cast<BFloat16*>(take(kSegment * p.head_dim));
    queries = reinterpret_cast<uint32_t*>(take(query_words(p)));
    turned = reinterpret_cast<uint32_t*>(take(kSegment / 2 * p.head_dim));
    scores = take(kScores);
    high = reinterpret_cast<uint32_t*>(take(kWeights));
    low = reinterpret_cast<uint32_t*>(take(kWeights));
  }
};

// The keys of a row, counted from the segment's first.
struct Sight {
  int64_t begin, end;
};

inline Sight sight_of(const AttentionProblem& p, int64_t row, int64_t segment) {
  const int64_t base = segment * kSegment;
  return {std::max<int64_t>(p.oldest_key(row) - base, 0), std::min<int64_t>(p.pos[row] + 1 - base, kSegment)};
}

DYN_AVX512_TARGET inline bool finite(const BFloat16* values, int64_t dim) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 bad = 0;
  for (int64_t i = 0; i < dim; i += 32)
    bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(values + i), exponent), exponent);
  return bad == 0;
}

inline Seen look(const AttentionProblem& p, const BFloat16* keys, const BFloat16* values, int64_t first, int64_t last,
                 int64_t kv_head, int64_t segment, BFloat16* copies) {
  const int64_t dim = p.head_dim, base = segment * kSegment, stride = p.kv_heads * dim;
  Sight any{kSegment, 0}, all{0, kSegment};
  for (int64_t row = first; row < last; ++row) {
    const Sight mine = sight_of(p, row, segment);
    if (mine.begin < mine.end) any = {std::min(any.begin, mine.begin), std::max(any.end, mine.end)};
    all = {std::max(all.begin, mine.begin), std::min(all.end, mine.end)};
  }
  Seen seen;
  seen.begin = any.begin / kChunk * 2;
  seen.end = (any.end + kChunk - 1) / kChunk * 2;
  const int32_t* table = p.block_table + p.seq[first] * p.max_pages;
  const auto offset_of = [&](int64_t key) {
    return (static_cast<int64_t>(table[key / p.page_size]) * p.page_size + key % p.page_size) * stride + kv_head * dim;
  };
  for (int64_t b = seen.begin; b < seen.end; ++b) {
    const int64_t from = b * kBlock, to = from + kBlock;
    const bool whole = all.begin <= from && to <= all.end;
    uint32_t bits = whole ? 0xffff : 0;
    for (int64_t row = first; row < last && bits != 0xffff; ++row) {
      const Sight mine = sight_of(p, row, segment);
      const int64_t begin = std::max(from, mine.begin), end = std::min(to, mine.end);
      if (begin < end) bits |= (0xffffu >> (kBlock - (end - begin))) << (begin - from);
    }
    const int64_t in_page = (base + from) % p.page_size;
    if (bits == 0xffff && in_page + kBlock <= p.page_size) {
      const int64_t at = offset_of(base + from);
      seen.block[b] = {keys + at, values + at, stride};
    } else {
      BFloat16 *key_copy = copies + from * dim, *value_copy = key_copy + kSegment * dim;
      for (int64_t i = 0; i < kBlock; ++i) {
        BFloat16 *key_at = key_copy + i * dim, *value_at = value_copy + i * dim;
        if (bits >> i & 1) {
          const int64_t at = offset_of(base + from + i);
          std::memcpy(key_at, keys + at, dim * sizeof(BFloat16));
          std::memcpy(value_at, values + at, dim * sizeof(BFloat16));
        } else {
          std::memset(static_cast<void*>(key_at), 0, dim * sizeof(BFloat16));
          std::memset(static_cast<void*>(value_at), 0, dim * sizeof(BFloat16));
        }
      }
      seen.block[b] = {key_copy, value_copy, dim};
    }
    if (!whole && last - first > 1)
      for (int64_t i = 0; i < kBlock; ++i)
        seen.finite = seen.finite && finite(seen.block[b].values + i * seen.block[b].stride, dim);
  }
  return seen;
}

// A cache line into the second level. In assembler: GCC takes a function of nothing but __builtin_prefetch for one
// without effects, and drops its calls.
inline void fetch(const BFloat16* line) { asm volatile("prefetcht1 %0" : : "m"(*line)); }

// One row, sixteen rows.
inline void fetch(const BFloat16* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 32) fetch(row + i);
}
inline void fetch(const BFloat16* rows, int64_t stride, int64_t dim) {
  for (int64_t r = 0; r < kBlock; ++r) fetch(rows + r * stride, dim);
}

// Keys that will be wanted next, while nothing else comes from memory.
struct Coming {
  int64_t count = 0, stride = 0, dim = 0;
  const BFloat16* block[kBlocks];

  // Row r of both blocks of a chunk.
  void fetch(int64_t chunk, int64_t r) const {
    for (int64_t at = 2 * chunk; at < std::min(2 * chunk + 2, count); ++at) tiles::fetch(block[at] + r * stride, dim);
  }
};

// Of the last row of a piece; blocks that cross a page are left out.
inline Coming keys_of(const AttentionProblem& p, const BFloat16* keys, const Piece& piece) {
  Coming coming;
  coming.dim = p.head_dim;
  coming.stride = p.kv_heads * p.head_dim;
  const int64_t row = piece.last - 1, base = piece.segment * kSegment;
  const int32_t* table = p.block_table + p.seq[row] * p.max_pages;
  const Sight sight = sight_of(p, row, piece.segment);
  for (int64_t from = sight.begin / kBlock * kBlock; from < sight.end; from += kBlock) {
    const int64_t key = base + std::max(from, sight.begin), in_page = key % p.page_size;
    if (in_page + kBlock > p.page_size) continue;
    coming.block[coming.count++] =
        keys + (static_cast<int64_t>(table[key / p.page_size]) * p.page_size + in_page) * coming.stride +
        piece.kv_head * p.head_dim;
  }
  return coming;
}

}  // namespace dyndepth::tiles
#endif
