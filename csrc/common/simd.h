// One source, several instruction sets, chosen at run time: -march=native would tie a wheel to its build machine.
#pragma once

#include <algorithm>
#include <cstdlib>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DYN_X86_TARGETS 1
#endif

namespace dyndepth {

// DYNDEPTH_SIMD lowers the choice, to run the other versions' tests on a machine that has everything: 6 (matrix tiles
// too, the default), 5, 4, 3 or 1.
inline int simd_wish() {
  const char* wish = std::getenv("DYNDEPTH_SIMD");
  return wish != nullptr && *wish >= '1' && *wish <= '6' ? *wish - '0' : 6;
}

// 5: AVX512_BF16 on top of 4: x86-64-v4 (AVX-512), 3: x86-64-v3 (AVX2, FMA), 1: whatever the build targets.
inline int simd_level() {
#ifdef DYN_X86_TARGETS
  static const int level = [] {
    __builtin_cpu_init();
    const int most = !__builtin_cpu_supports("x86-64-v4")   ? __builtin_cpu_supports("x86-64-v3") ? 3 : 1
                     : __builtin_cpu_supports("avx512bf16") ? 5
                                                            : 4;
    return std::min(most, simd_wish());
  }();
  return level;
#else
  return 1;
#endif
}

}  // namespace dyndepth

// Calls a function of the file that each_target.h included, in the best version this machine can run.
#ifdef DYN_X86_TARGETS
#define DYN_BEST(function, ...)                         \
  (simd_level() == 5   ? simd_v5::function(__VA_ARGS__) \
   : simd_level() == 4 ? simd_v4::function(__VA_ARGS__) \
   : simd_level() == 3 ? simd_v3::function(__VA_ARGS__) \
                       : simd_v1::function(__VA_ARGS__))
#else
#define DYN_BEST(function, ...) simd_v1::function(__VA_ARGS__)
#endif
