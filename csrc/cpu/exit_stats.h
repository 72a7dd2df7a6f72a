// Running statistics of one row of logits that arrive block by block.
#pragma once

#include <cstdint>
#include <limits>

#include "../common/vector.h"

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

// Takes in `count` logits whose first has vocabulary position `base`; z is overwritten. softcap 0 means none.
void absorb_logits(RowStats& stats, float* z, int64_t count, int64_t base, float softcap);

void read_logits(float* z, const float* logits, int64_t count);
void read_logits(float* z, const BFloat16* logits, int64_t count);
void read_logits(float* z, const Half* logits, int64_t count);

}  // namespace dyndepth
