// Attention of single query rows over paged K,V; every row has its own sequence and position.
#pragma once

#include <cstdint>

#include "../common/vector.h"

namespace dyndepth {

struct AttentionProblem {
  const int32_t* block_table;  // [sequences, max_pages]
  const int32_t* seq;          // [rows]
  const int32_t* pos;          // [rows]; a row sees keys max(0, pos - window + 1) .. pos
  int64_t rows, heads, kv_heads, head_dim;
  int64_t page_size, max_pages;
  int64_t window;  // 0: the whole context
  float scale;
  float softcap;  // 0: none
};

// Streams the pages of one tile (rows [first, last) of one sequence) once for one K,V head. `scratch` holds
// attention_scratch(...) floats. q and out are [rows, heads, head_dim], keys and values [pages, page_size, kv_heads,
// head_dim].
void attend(const AttentionProblem& problem, const float* q, const float* keys, const float* values, float* out,
            int64_t first, int64_t last, int64_t kv_head, float* scratch);
void attend(const AttentionProblem& problem, const BFloat16* q, const BFloat16* keys, const BFloat16* values,
            BFloat16* out, int64_t first, int64_t last, int64_t kv_head, float* scratch);
void attend(const AttentionProblem& problem, const Half* q, const Half* keys, const Half* values, Half* out,
            int64_t first, int64_t last, int64_t kv_head, float* scratch);

// Rows of one sequence that share one walk over its pages: 8 rows reuse each K,V page 8 times from cache while the
// accumulators (8 rows x group x head_dim floats) still fit in L2.
constexpr int64_t kTileRows = 8;

inline int64_t attention_scratch(const AttentionProblem& p) {
  const int64_t queries = kTileRows * (p.heads / p.kv_heads);
  return queries * (2 * p.head_dim + 2) + p.page_size * (2 * p.head_dim) + p.page_size + kLanes;
}

}  // namespace dyndepth
