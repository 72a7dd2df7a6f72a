// Attention of single query rows over paged K,V; every row has its own sequence and position.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace dyndepth {

struct AttentionProblem {
  const int32_t* block_table;  // [sequences, max_pages]
  const int32_t* seq;          // [rows]
  const int32_t* pos;          // [rows]; a row sees keys max(0, pos - window + 1) .. pos
  int64_t rows, heads, kv_heads, head_dim;
  int64_t page_size, max_pages;
  int64_t window;  // 0: the whole context
  float scale;
  float softcap;          // 0: none
  int64_t tile_rows = 0;  // rows of one sequence that share one walk over its pages; attend_all chooses

  // Queries of a tile and one K,V head, and room for a step of sixteen that ends beyond them.
  int64_t queries() const { return (tile_rows * group() + 31) / 16 * 16; }

  int64_t group() const { return heads / kv_heads; }

  // The first position that a row sees.
  int64_t oldest_key(int64_t row) const {
    const int64_t oldest = static_cast<int64_t>(pos[row]) - window + 1;
    return window > 0 && oldest > 0 ? oldest : 0;
  }
};

// Keys between two looks at the running maximum: 64 keys and values of 64 channels, as fp32, fit the first-level cache.
constexpr int64_t kStrip = 64;
// Keys that one thread takes at least. A row's softmax is always merged from segments that begin at multiples of this,
// whoever computes them: neither threads nor neighbours change a bit of it.
constexpr int64_t kSegment = 4 * kStrip;

// What part of a softmax leaves, per query of a tile: sum of exp(score - peak) V, the largest score, sum of the
// weights.
struct Partial {
  float* sum;   // [queries, head_dim]
  float* peak;  // [queries]
  float* mass;  // [queries]

  Partial(float* memory, const AttentionProblem& p)
      : sum(memory), peak(memory + p.queries() * p.head_dim), mass(peak + p.queries()) {}
  Partial(float* sums, float* peaks, float* masses) : sum(sums), peak(peaks), mass(masses) {}
  static int64_t floats(const AttentionProblem& p) { return p.queries() * (p.head_dim + 2); }
  Partial from(int64_t query, int64_t dim) const { return {sum + query * dim, peak + query, mass + query}; }
};

// A piece of work: rows [first, last) of one sequence, one K,V head, keys [segment * kSegment, ... + kSegment).
struct Piece {
  int64_t first, last, kv_head, segment;
};

// How attend_all attends: on vectors here, on matrix tiles in attend_tiles.h.
template <class T>
struct AttendVectors {
  // 8 rows reuse every key 8 times from the first-level cache.
  static int64_t rows(const AttentionProblem&) { return 8; }
  // Floats that `segment` wants: queries, keys and values as fp32, weights of a strip.
  static int64_t scratch(const AttentionProblem& p) {
    return p.queries() * p.head_dim + 2 * kStrip * p.head_dim + kStrip;
  }
  static void begin() {}
  static void end() {}
  // Partial softmax of a piece. `next` is the piece that this thread will probably get next, or null. q is
  // [rows, heads, head_dim], keys and values [pages, page_size, kv_heads, head_dim].
  static void segment(const AttentionProblem& problem, const T* q, const T* keys, const T* values, const Piece& piece,
                      const Piece* next, Partial to, float* scratch);
  // total := total and part together.
  static void merge(const AttentionProblem& problem, int64_t rows, Partial total, Partial part);
  // out [rows, heads, head_dim] of rows [first, last) for one K,V head.
  static void write(const AttentionProblem& problem, Partial total, int64_t first, int64_t last, int64_t kv_head,
                    T* out);
};

// All rows of a problem, in parallel over tiles, K,V heads and, where those are few, segments. T is float, BFloat16 or
// Half.
template <class T>
void attend_all(const AttentionProblem& problem, const T* q, const T* keys, const T* values, T* out);

// Rejects sequences, positions and pages that would reach outside the table or the pages.
void check_attention(const char* op, const AttentionProblem& problem, int64_t sequences, int64_t pages);

}  // namespace dyndepth
