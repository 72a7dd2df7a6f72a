#include "amx.h"

#include <cstring>

#include "../common/simd.h"
#include "amx_tiles.h"

#ifdef DYN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dyndepth {

#ifdef DYN_AMX

namespace {

bool ask_for_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool amx = (d & (1u << 22)) && (d & (1u << 24));  // AMX-BF16, AMX-TILE
  if (!amx || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq")) return false;
  // Linux keeps the 8 KiB of tile state from a process until it asks (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

// Tile registers are named at compile time: 0..3 sums [panel][row tile], 4..5 weights, 6..7 rows.
template <int kPanels, int kTiles>
DYN_AMX_TARGET inline void multiply(const uint32_t* tiles, int64_t tile_stride, int64_t depth,
                                    const BFloat16* const* panels, int64_t stride, Ahead& ahead, float* sums,
                                    int64_t panel_sums) {
  _tile_zero(0);
  if constexpr (kTiles == 2) _tile_zero(1);
  if constexpr (kPanels == 2) _tile_zero(2);
  if constexpr (kPanels == 2 && kTiles == 2) _tile_zero(3);
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t at = k * kTileDepth;
    _tile_loadd(4, panels[0] + at, stride * 2);
    if constexpr (kPanels == 2) _tile_loadd(5, panels[1] + at, stride * 2);
    _tile_loadd(6, tiles + k * kTileWords, 64);
    if constexpr (kTiles == 2) _tile_loadd(7, tiles + tile_stride + k * kTileWords, 64);
    // A part of the next panels, so that they are there when these are done.
    for (int stretch = 0; stretch < 2; ++stretch)
      if (ahead.at[stretch] < ahead.end[stretch]) {
        for (int64_t line = 0; line < ahead.pace; ++line) _mm_prefetch(ahead.at[stretch] + line * 64, _MM_HINT_T1);
        ahead.at[stretch] += ahead.pace * 64;
      }
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTiles == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kPanels == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kPanels == 2 && kTiles == 2) _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float square[256];
  _tile_stored(0, square, 64);
  transpose(square, sums, 16);
  if constexpr (kTiles == 2) {
    _tile_stored(1, square, 64);
    transpose(square, sums + 256, 16);
  }
  if constexpr (kPanels == 2) {
    _tile_stored(2, square, 64);
    transpose(square, sums + panel_sums, 16);
  }
  if constexpr (kPanels == 2 && kTiles == 2) {
    _tile_stored(3, square, 64);
    transpose(square, sums + panel_sums + 256, 16);
  }
}

template <int kPanels>
DYN_AMX_TARGET void all_rows(const uint32_t* tiles, int64_t row_tiles, int64_t width, const BFloat16* const* panels,
                             int64_t stride, Ahead& ahead, float* sums) {
  const int64_t depth = width / kTileDepth, tile_stride = depth * kTileWords, panel_sums = row_tiles * 256;
  for (int64_t tile = 0; tile < row_tiles; tile += 2) {
    const uint32_t* x = tiles + tile * tile_stride;
    if (tile + 1 < row_tiles)
      multiply<kPanels, 2>(x, tile_stride, depth, panels, stride, ahead, sums + tile * 256, panel_sums);
    else
      multiply<kPanels, 1>(x, tile_stride, depth, panels, stride, ahead, sums + tile * 256, panel_sums);
  }
}

}  // namespace

bool amx_usable() {
  static const bool usable = simd_wish() > 5 && ask_for_amx();
  return usable;
}

DYN_AVX512_TARGET void amx_pack(const BFloat16* x, int64_t count, int64_t width, int64_t stride, uint32_t* tiles) {
  if (count <= 2) {  // a transposition moves sixteen rows for the price of these
    for (int64_t row = 0; row < count; ++row)
      for (int64_t pair = 0; pair < width / 2; ++pair)
        std::memcpy(tiles + pair * kTileRows16 + row, x + row * stride + 2 * pair, 4);
    return;
  }
  alignas(64) float square[256] = {};
  for (int64_t k = 0; k < width; k += kTileDepth) {
    for (int64_t row = 0; row < count; ++row) std::memcpy(square + row * 16, x + row * stride + k, 64);
    transpose(square, reinterpret_cast<float*>(tiles + k / kTileDepth * kTileWords), 16);
  }
}

DYN_AMX_TARGET void amx_begin() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

DYN_AMX_TARGET void amx_end() { _tile_release(); }

void amx_panels(const uint32_t* tiles, int64_t row_tiles, int64_t width, const BFloat16* const* panels,
                int64_t panel_count, int64_t stride, Ahead& ahead, float* sums) {
  if (panel_count == 2)
    all_rows<2>(tiles, row_tiles, width, panels, stride, ahead, sums);
  else
    all_rows<1>(tiles, row_tiles, width, panels, stride, ahead, sums);
}

#else

bool amx_usable() { return false; }
void amx_pack(const BFloat16*, int64_t, int64_t, int64_t, uint32_t*) {}
void amx_begin() {}
void amx_end() {}
void amx_panels(const uint32_t*, int64_t, int64_t, const BFloat16* const*, int64_t, int64_t, Ahead&, float*) {}

#endif

}  // namespace dyndepth
