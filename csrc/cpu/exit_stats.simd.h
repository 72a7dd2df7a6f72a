// Running statistics of logits, block by block.

// Largest and second largest value (equal when the maximum occurs twice).
DYN_INLINE void top_two(const float* z, int64_t count, float& first, float& second) {
  Lanes high = splat(-std::numeric_limits<float>::infinity()), low = high;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes x = load(z + i);
    low = larger(low, smaller(high, x));
    high = larger(high, x);
  }
  first = second = -std::numeric_limits<float>::infinity();
  const auto take = [&](float x) {
    if (x > first) {
      second = first;
      first = x;
    } else if (x > second) {
      second = x;
    }
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    take(high[lane]);
    take(low[lane]);
  }
  for (; i < count; ++i) take(z[i]);
}

DYN_INLINE void rescale(RowStats& stats, float peak) {
  if (stats.mass > 0) {
    const double delta = static_cast<double>(stats.peak) - peak, shrink = std::exp(delta);
    stats.slope = shrink * (stats.slope + delta * stats.mass);
    stats.mass *= shrink;
    stats.slope2 = shrink * shrink * (stats.slope2 + 2 * delta * stats.mass2);
    stats.mass2 *= shrink * shrink;
  }
  stats.peak = peak;
}

// Takes in `count` logits whose first has vocabulary position `base`; z is overwritten. softcap 0 means none.
inline void absorb_logits(RowStats& stats, float* z, int64_t count, int64_t base, float softcap) {
  if (softcap > 0.f)
    for (int64_t i = 0; i < count; ++i) z[i] = softcap * std::tanh(z[i] / softcap);
  float first, second;
  top_two(z, count, first, second);
  if (first > stats.peak) {
    stats.second = std::max(stats.peak, second);
    stats.best = base + (std::find(z, z + count, first) - z);  // the lowest position wins a tie, here and across blocks
    rescale(stats, first);
  } else {
    stats.second = std::max(stats.second, first);
  }
  // -inf - -inf is NaN: while all logits were -inf, count from 0, where they add nothing.
  const float peak = stats.peak == -std::numeric_limits<float>::infinity() ? 0.f : stats.peak;
  int64_t i = 0;
  while (i + kLanes <= count) {
    // Lanes add at most 32 numbers in fp32 before they go to double: the entropies are differences of these sums.
    Lanes mass = {}, slope = {}, mass2 = {}, slope2 = {};
    for (const int64_t stop = std::min(count - kLanes, i + 31 * kLanes); i <= stop; i += kLanes) {
      const Lanes gap = larger(load(z + i) - peak, splat(-88.f));  // -inf times exp(-inf) must be 0, not NaN
      const Lanes e = exp_nonpositive(load(z + i) - peak);
      mass += e;
      slope += gap * e;
      mass2 += e * e;
      slope2 += 2.f * gap * (e * e);
    }
    stats.mass += sum(mass);
    stats.slope += sum(slope);
    stats.mass2 += sum(mass2);
    stats.slope2 += sum(slope2);
  }
  for (; i < count; ++i) {
    const float gap = std::max(z[i] - peak, -88.f), e = std::exp(z[i] - peak);
    stats.mass += e;
    stats.slope += gap * e;
    stats.mass2 += e * e;
    stats.slope2 += 2.f * gap * (e * e);
  }
}
