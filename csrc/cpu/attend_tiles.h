// ragged_attention of bf16 rows on matrix tiles: Intel AMX, or vectors of dot products in their place.
#pragma once

#include <algorithm>

#include "ragged_attention.h"

namespace dyndepth {

// Head sizes of whole tiles (multiples of 32 channels), on a machine that has AMX or AVX512_BF16.
bool attends_on_tiles(const AttentionProblem& problem);

// What attend_all asks of a way to attend (attend_vectors is the other). Sums lie in the order of channels,
// peaks are scores before the scale. A V that is not finite makes results not finite; whether inf or NaN is open, as a
// weight is two numbers and one of them may be 0.
struct AttendTiles {
  // Rows of one sequence that share a walk over its pages.
  static int64_t rows(const AttentionProblem& problem) { return std::max<int64_t>(kQueries / problem.group(), 1); }
  static int64_t scratch(const AttentionProblem& problem);
  static void begin();
  static void end();
  static void segment(const AttentionProblem& problem, const BFloat16* q, const BFloat16* keys, const BFloat16* values,
                      const Piece& piece, const Piece* next, Partial to, float* scratch);
  static void merge(const AttentionProblem& problem, int64_t rows, Partial total, Partial part);
  static void write(const AttentionProblem& problem, Partial total, int64_t first, int64_t last, int64_t kv_head,
                    BFloat16* out);

 private:
  // Six tiles of queries: turning a segment's values costs an eighth of what these do with them.
  static constexpr int64_t kQueries = 96;
};

}  // namespace dyndepth
