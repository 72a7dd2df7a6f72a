// Running statistics of one row of logits that arrive block by block.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "products.h"

namespace dyndepth {

// Sums are relative to `peak`, the largest logit so far, and rescaled when it grows:
//   mass = sum e, slope = sum (z - peak) e, with e = exp(z - peak); mass2, slope2 the same for 2 (z - peak) and e^2.
// Then logsumexp = peak + log mass, entropy = log mass - slope / mass, and with index 2 the entropy of softmax(2 z).
struct RowStats {
  float peak = -std::numeric_limits<float>::infinity();
  float second = -std::numeric_limits<float>::infinity();
  int64_t best = 0;
  double mass = 0, slope = 0, mass2 = 0, slope2 = 0;
};

// Takes in the logits of head rows weight [outputs, width] whose first has vocabulary position `base`, block by block.
// `next` are the weights that are read after them.
template <class T>
void absorb_head(const Operand<T>& x, const T* weight, const T* bias, int64_t outputs, int64_t base, float softcap,
                 std::vector<RowStats>& stats, const Upcoming& next = {});

// What ops.exit_stats returns, of one row.
struct HeadStats {
  int64_t argmax;
  float top1, top2, logsumexp, entropy, entropy_half;
};

HeadStats head_stats(const RowStats& stats);

}  // namespace dyndepth
