// Element types and the words every CPU kernel shares.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#define DYN_INLINE inline __attribute__((always_inline))

namespace dyndepth {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

constexpr int kLanes = 16;  // floats per vector (vector.simd.h)

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return static_cast<float>(value); }
inline float to_float(Half value) { return static_cast<float>(value); }

}  // namespace dyndepth
