// Stable three-way partition of rows: runners first, those leaving now next, those away last.
#pragma once

#include <cstdint>

namespace dyndepth {

// order[new] = old; counts = {runners, leaving}. state[i] is 0 (run), 1 (leaving) or 2 (away).
void partition_rows(const int8_t* state, int64_t rows, int32_t* order, int32_t* counts);

// to[i] = from[order[i]] for rows of `row_bytes` bytes that lie `from_stride` bytes apart.
void gather_rows(const char* from, int64_t from_stride, const int32_t* order, int64_t rows, int64_t row_bytes,
                 char* to);

}  // namespace dyndepth
