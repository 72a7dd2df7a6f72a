// What the files that program Intel AMX share: when there is such a thing, how tiles are laid out.
// Included before any target pragma; everything here names its own target.
#pragma once

#include <cstdint>

#include "avx512.h"

#ifdef DYN_AVX512
#define DYN_AMX 1

#define DYN_AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace dyndepth {

// Before tile loads of what was stored since: the intrinsic does not tell the compiler that it reads.
inline void tiles_see_memory() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace dyndepth
#endif
