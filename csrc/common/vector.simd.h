// Sixteen float lanes written once, lowered by the compiler to AVX-512, AVX2 or SSE. Included once per instruction set
// by each_target.h, inside a namespace of its own: no guard, no includes. (A function that is only inlined into code
// for another instruction set would have its comparisons of vectors taken apart lane by lane before that.)

typedef float Lanes __attribute__((vector_size(kLanes * 4)));
typedef float HalfLanes __attribute__((vector_size(kLanes * 2)));
typedef float QuarterLanes __attribute__((vector_size(kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintLanes __attribute__((vector_size(kLanes * 4)));
typedef uint16_t ShortLanes __attribute__((vector_size(kLanes * 2)));

DYN_INLINE Lanes splat(float value) { return value - Lanes{}; }

DYN_INLINE Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

DYN_INLINE UintLanes load_bits16(const void* from) {
  ShortLanes bits;
  std::memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, UintLanes);
}

DYN_INLINE Lanes load(const BFloat16* from) { return (Lanes)(load_bits16(from) << 16); }

// fp16 -> fp32 with integer and float operations only (no F16C needed): the exponent is rebased by a multiplication,
// which also makes subnormals exact (unless torch.set_flush_denormal is on: then they read as 0); what had all exponent
// bits set (inf, NaN) keeps them set.
DYN_INLINE Lanes load(const Half* from) {
  UintLanes bits = load_bits16(from);
  UintLanes magnitude = (bits & 0x7fffu) << 13;
  UintLanes sign = (bits & 0x8000u) << 16;
  UintLanes special = (UintLanes)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  UintLanes scaled = (UintLanes)((Lanes)magnitude * 0x1p112f);
  return (Lanes)(scaled | special | sign);
}

DYN_INLINE void store(float* to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

// fp32 -> bf16 in the upper half of each lane, nearest even; a NaN stays one.
DYN_INLINE UintLanes bf16_bits(Lanes lanes) {
  const UintLanes bits = (UintLanes)lanes;
  const UintLanes nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  return lanes == lanes ? nearest : bits | 0x400000u;
}

// fp32 -> fp16, nearest even, in the lower half of each lane: subnormals by adding a float whose last place is theirs.
DYN_INLINE UintLanes fp16_bits(Lanes lanes) {
  const UintLanes sign = (UintLanes)lanes & 0x80000000u, size = (UintLanes)lanes ^ sign;
  const UintLanes normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const UintLanes tiny = (UintLanes)((Lanes)size + 0.5f) - 0x3f000000u;
  const UintLanes huge = size > UintLanes{} + 0x7f800000u ? UintLanes{} + 0x7e00u : UintLanes{} + 0x7c00u;
  const UintLanes finite = size < UintLanes{} + (113u << 23) ? tiny : normal;
  return (size >= UintLanes{} + (143u << 23) ? huge : finite) | (sign >> 16);
}

DYN_INLINE void store(BFloat16* to, Lanes lanes) {
  const ShortLanes low = __builtin_convertvector(bf16_bits(lanes) >> 16, ShortLanes);
  std::memcpy(to, &low, sizeof low);
}

DYN_INLINE void store(Half* to, Lanes lanes) {
  const ShortLanes low = __builtin_convertvector(fp16_bits(lanes), ShortLanes);
  std::memcpy(to, &low, sizeof low);
}

// What storing as T and loading again would give.
template <class T>
DYN_INLINE Lanes rounded(Lanes lanes) {
  T kept[kLanes];
  store(kept, lanes);
  return load(kept);
}
template <>
DYN_INLINE Lanes rounded<float>(Lanes lanes) {
  return lanes;
}
template <>
DYN_INLINE Lanes rounded<BFloat16>(Lanes lanes) {
  return (Lanes)(bf16_bits(lanes) & 0xffff0000u);
}

// Halving adds: four dependent steps instead of fifteen.
DYN_INLINE float sum(Lanes x) {
  const HalfLanes eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const QuarterLanes four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// sum() of sixteen vectors at once, one result per lane, each added in sum()'s order: a blend, a shuffle and an
// addition per pair halve the lanes that belong to a vector, four times. Which half of a vector is added to which
// changes no bit but those of a NaN that meets another, so the upper half of the second one may stay where it is: a
// blend is cheaper than a shuffle.
DYN_INLINE Lanes sums(const Lanes (&x)[kLanes]) {
  Lanes a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)
    a[i] = __builtin_shufflevector(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) +
           __builtin_shufflevector(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
  for (int i = 0; i < 4; ++i)
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  for (int i = 0; i < 2; ++i)
    c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +
           __builtin_shufflevector(b[i], b[i + 2], 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
  return __builtin_shufflevector(c[0], c[1], 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +
         __builtin_shufflevector(c[0], c[1], 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
}

DYN_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
DYN_INLINE Lanes smaller(Lanes a, Lanes b) { return a > b ? b : a; }

// The largest lane; a NaN wins.
DYN_INLINE float max(Lanes x) {
  const HalfLanes a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7);
  const HalfLanes b = __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const HalfLanes eight = ((a > b) | (a != a)) ? a : b;
  const QuarterLanes c = __builtin_shufflevector(eight, eight, 0, 1, 2, 3);
  const QuarterLanes d = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  const QuarterLanes four = ((c > d) | (c != c)) ? c : d;
  float best = four[0];
  for (int i = 1; i < 4; ++i) best = four[i] > best || four[i] != four[i] ? four[i] : best;
  return best;
}

// exp(x) for x <= 0, within 2 ulp; anything below -87 becomes 0 (exact enough under a softmax whose maximum is 1).
// Cody-Waite reduction x = k ln2 + r, |r| <= ln2/2, then the degree-6 polynomial of Cephes' expf. NaN stays NaN.
DYN_INLINE Lanes exp_nonpositive(Lanes x) {
  Lanes shifted = x * 1.44269504088896341f + 12582912.f;  // 1.5 * 2^23: the sum rounds k into the low mantissa bits
  Lanes k = shifted - 12582912.f;
  Lanes r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  Lanes p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  IntLanes exponent = ((IntLanes)shifted - 0x4b400000 + 127) << 23;
  Lanes result = p * (Lanes)exponent;
  return x < -87.f ? Lanes{} : result;
}

// sum over i of a[i] * b[i]; four accumulators hide the latency of the multiply-adds.
template <class T>
DYN_INLINE float dot(const T* a, const float* b, int64_t size) {
  Lanes total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes)
    for (int part = 0; part < 4; ++part) total[part] += load(a + i + part * kLanes) * load(b + i + part * kLanes);
  for (; i + kLanes <= size; i += kLanes) total[0] += load(a + i) * load(b + i);
  float result = sum((total[0] + total[1]) + (total[2] + total[3]));
  for (; i < size; ++i) result += to_float(a[i]) * b[i];
  return result;
}

// y += sum over k of weights[k] * x[k * size ...]; y stays in registers while the rows of x stream by.
DYN_INLINE void add_weighted_rows(float* y, const float* x, const float* weights, int64_t rows, int64_t size) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    Lanes total[4];
    for (int part = 0; part < 4; ++part) total[part] = load(y + i + part * kLanes);
    for (int64_t k = 0; k < rows; ++k)
      for (int part = 0; part < 4; ++part) total[part] += load(x + k * size + i + part * kLanes) * weights[k];
    for (int part = 0; part < 4; ++part) store(y + i + part * kLanes, total[part]);
  }
  for (; i + kLanes <= size; i += kLanes) {
    Lanes total = load(y + i);
    for (int64_t k = 0; k < rows; ++k) total += load(x + k * size + i) * weights[k];
    store(y + i, total);
  }
  for (; i < size; ++i)
    for (int64_t k = 0; k < rows; ++k) y[i] += weights[k] * x[k * size + i];
}

// Two vectors in whatever order of channels is cheapest for T: pairs of bf16 split into the even and the odd ones by a
// shift and a mask. Dot products may take them as they come; store_paired puts channels back in order.
template <class T>
DYN_INLINE void load_paired(const T* from, Lanes& first, Lanes& second) {
  first = load(from);
  second = load(from + kLanes);
}
template <>
DYN_INLINE void load_paired(const BFloat16* from, Lanes& first, Lanes& second) {
  UintLanes pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  first = (Lanes)(pairs << 16);
  second = (Lanes)(pairs & 0xffff0000u);
}
template <class T>
DYN_INLINE void store_paired(T* to, Lanes first, Lanes second) {
  store(to, first);
  store(to + kLanes, second);
}
template <>
DYN_INLINE void store_paired(BFloat16* to, Lanes first, Lanes second) {
  const UintLanes pairs = (bf16_bits(first) >> 16) | (bf16_bits(second) & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof pairs);
}

// `size` channels as floats, whole pairs of vectors in load_paired's order.
template <class T>
DYN_INLINE void to_paired_floats(float* to, const T* from, int64_t size) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    Lanes first, second;
    load_paired(from + i, first, second);
    store(to + i, first);
    store(to + i + kLanes, second);
  }
  for (; i < size; ++i) to[i] = to_float(from[i]);
}

template <class T>
DYN_INLINE void to_floats(float* to, const T* from, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  for (; i < size; ++i) to[i] = to_float(from[i]);
}
