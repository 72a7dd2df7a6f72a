// Compiles the file DYN_SIMD once per instruction set, with vector.simd.h before it, in namespaces simd_v4, simd_v3 and
// simd_v1; DYN_LEVEL is 4, 3 or 1 there. Where DYN_BFLOAT16_DOTS is defined, once more for AVX512_BF16: simd_v5, with
// DYN_LEVEL 5; elsewhere that is simd_v4. Headers that DYN_SIMD needs are included before this one, never inside: what
// is first seen under a target pragma is compiled for that target, and the linker would share it with everybody.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "simd.h"
#include "types.h"

#ifdef DYN_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define DYN_LEVEL 4
namespace dyndepth::simd_v4 {
#include "vector.simd.h"
#include DYN_SIMD
}  // namespace dyndepth::simd_v4
#undef DYN_LEVEL
#pragma GCC pop_options

#ifdef DYN_BFLOAT16_DOTS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define DYN_LEVEL 5
namespace dyndepth::simd_v5 {
#include "vector.simd.h"
#include DYN_SIMD
}  // namespace dyndepth::simd_v5
#undef DYN_LEVEL
#pragma GCC pop_options
#else
namespace dyndepth::simd_v5 {
using namespace simd_v4;
}
#endif

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define DYN_LEVEL 3
namespace dyndepth::simd_v3 {
#include "vector.simd.h"
#include DYN_SIMD
}  // namespace dyndepth::simd_v3
#undef DYN_LEVEL
#pragma GCC pop_options
#endif

#define DYN_LEVEL 1
namespace dyndepth::simd_v1 {
#include "vector.simd.h"
#include DYN_SIMD
}  // namespace dyndepth::simd_v1
#undef DYN_LEVEL
