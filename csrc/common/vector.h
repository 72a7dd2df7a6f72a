// Sixteen float lanes written once, lowered by the compiler to AVX-512, AVX2 or SSE inside a DYN_MULTIVERSION function.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// The function is compiled once per instruction set and the loader picks one at run time; -march=native would tie a
// wheel to its build machine. Only plain (non-template) functions may carry it, so templates are inlined into those.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DYN_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DYN_MULTIVERSION
#endif
#define DYN_INLINE inline __attribute__((always_inline))

namespace dyndepth {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

constexpr int kLanes = 16;
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

// Halving adds: four dependent steps instead of fifteen.
DYN_INLINE float sum(Lanes x) {
  const HalfLanes eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const QuarterLanes four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

DYN_INLINE float max(Lanes lanes) {
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
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
  IntLanes tiny = x < -87.f;
  return (Lanes)(~tiny & (IntLanes)result);
}

DYN_INLINE float to_float(float value) { return value; }
DYN_INLINE float to_float(BFloat16 value) { return static_cast<float>(value); }
DYN_INLINE float to_float(Half value) { return static_cast<float>(value); }

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

template <class T>
DYN_INLINE void to_floats(float* to, const T* from, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  for (; i < size; ++i) to[i] = to_float(from[i]);
}

}  // namespace dyndepth
