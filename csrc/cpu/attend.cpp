#include "ragged_attention.h"

#define DYN_SIMD "../cpu/attend.simd.h"
#include "../common/each_target.h"

namespace dyndepth {

template <class T>
void AttendVectors<T>::segment(const AttentionProblem& problem, const T* q, const T* keys, const T* values,
                               const Piece& piece, const Piece*, Partial to, float* scratch) {
  DYN_BEST(attend_segment, problem, q, keys, values, piece.first, piece.last, piece.kv_head, piece.segment, to,
           scratch);
}

template <class T>
void AttendVectors<T>::merge(const AttentionProblem& problem, int64_t rows, Partial total, Partial part) {
  DYN_BEST(merge_partials, problem, rows, total, part);
}

template <class T>
void AttendVectors<T>::write(const AttentionProblem& problem, Partial total, int64_t first, int64_t last,
                             int64_t kv_head, T* out) {
  DYN_BEST(write_attended, problem, total, first, last, kv_head, out);
}

template struct AttendVectors<float>;
template struct AttendVectors<BFloat16>;
template struct AttendVectors<Half>;

}  // namespace dyndepth
