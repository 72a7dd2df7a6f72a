// Mass of a stretch of tokens, of p or of what p has more than q: mass_units() of csrc/cpu/accept_drafts.cpp in lanes.

typedef int64_t LongLanes __attribute__((vector_size(kLanes * 8)));

// Floats become integers of 64 bits one by one below AVX-512, so each is split into two numbers of 30 bits, both exact.
DYN_INLINE LongLanes units(Lanes probability) {
  const Lanes positive = probability > Lanes{} ? probability : Lanes{};
  const Lanes scaled = (positive < splat(1.f) ? positive : splat(1.f)) * 0x1p30f;
  const IntLanes high = __builtin_convertvector(scaled, IntLanes);
  const Lanes rest = (scaled - __builtin_convertvector(high, Lanes)) * 0x1p30f;
  const IntLanes low = __builtin_convertvector(rest, IntLanes);
  return (__builtin_convertvector(high, LongLanes) << 30) + __builtin_convertvector(low, LongLanes);
}

inline uint64_t mass_of(const float* p, const float* q, int64_t count) {
  LongLanes sums = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += units(q == nullptr ? load(p + i) : load(p + i) - load(q + i));
  uint64_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<uint64_t>(sums[lane]);
  for (; i < count; ++i) sum += mass_units(q == nullptr ? p[i] : p[i] - q[i]);
  return sum;
}
