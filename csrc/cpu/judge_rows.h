// Judging rows at a boundary: final norm, translator, statistics over the shortlist, and a score made of them.
#pragma once

#include <vector>

#include "../common/rms_norm.h"
#include "../common/tensor.h"
#include "products.h"
#include "router_score.h"

namespace dyndepth {

// In the order of dyndepth/runtime/judge.py. The last two read no head: `residual` is a router that sees the residual
// alone, `known` has been decided before the pass.
enum class JudgeKind : int64_t { router, top_probability, margin, entropy, residual, known };

// A boundary's judge as plain pointers.
template <class T>
struct Judge {
  int64_t width;
  const T* gain;  // of the final norm
  NormStyle style;
  float eps;
  const T *down, *up, *bias;  // translator: [rank, width] or null, [width, rank or width] or null, [width] or null
  int64_t rank;
  float translator_eps;
  const T *head, *head_bias;  // [vocabulary, width] (null where it is not read), [vocabulary] or null
  int64_t vocabulary;
  float softcap;
  Router router;
  JudgeKind kind;

  bool reads_head() const { return kind != JudgeKind::residual && kind != JudgeKind::known; }

  // The weights that it reads first, where it reads the head.
  Upcoming upcoming() const {
    if (up == nullptr) return Upcoming::of<T>(head, nullptr, vocabulary, width);
    return down == nullptr ? Upcoming::of<T>(up, nullptr, width, rank) : Upcoming::of<T>(down, nullptr, rank, width);
  }
};

template <class T>
Judge<T> judge_of(int64_t width, const Tensor& gain, int64_t style, double eps, const std::optional<Tensor>& down,
                  const std::optional<Tensor>& up, const std::optional<Tensor>& bias, double translator_eps,
                  const std::optional<Tensor>& head, const std::optional<Tensor>& head_bias, double softcap,
                  const std::vector<Tensor>& router_weights, bool silu, double router_eps, int64_t kind);

// Which rows leave, and by what.
struct Verdict {
  float threshold;
  const float* thresholds;  // one per row, or null: `threshold` for all
  const bool* may_leave;    // per row
  const int64_t* known;     // per row, bits of what has been decided, of which `bit` is this judge's; or null
  int64_t bit;
  int64_t total;  // rows of the buffer; those past the judged ones are away
  float* score;   // [rows]
  int8_t* state;  // [total], for compact_rows
};

// Judges rows of `hidden` [rows, width]; `ready` [rows, width] gets the head-ready rows of those that leave, in their
// order (null: nobody wants them, as of a judge that reads no head). Returns how many leave. `next` are the weights
// that are read after it.
template <class T>
int64_t judge(const Judge<T>& judge, const T* hidden, int64_t rows, const Verdict& verdict, T* ready,
              const Upcoming& next = {});

}  // namespace dyndepth
