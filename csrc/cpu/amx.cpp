#include "amx.h"

#include <cstring>

#include "../common/simd.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define DYN_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dyndepth {

#ifdef DYN_AMX

#define DYN_AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace {

bool ask_for_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool amx = (d & (1u << 22)) && (d & (1u << 24));  // AMX-BF16, AMX-TILE
  if (!amx || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq")) return false;
  // Linux keeps the 8 KiB of tile state from a process until it asks (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 16 x 16 floats, [output][row] as a tile holds them -> [row][output].
DYN_AMX_TARGET inline void transpose(const float* from, float* to) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_ps(from + i * 16);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(t[4 * i + j]), high = _mm512_castps_pd(t[4 * i + 2 + j]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  // r[4 g + c] holds, per 128-bit lane l, row 4 l + c of outputs 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 e = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), f = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_ps(to + (0 + c) * 16, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(to + (8 + c) * 16, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(to + (4 + c) * 16, _mm512_shuffle_f32x4(e, f, 0x88));
    _mm512_storeu_ps(to + (12 + c) * 16, _mm512_shuffle_f32x4(e, f, 0xdd));
  }
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
  transpose(square, sums);
  if constexpr (kTiles == 2) {
    _tile_stored(1, square, 64);
    transpose(square, sums + 256);
  }
  if constexpr (kPanels == 2) {
    _tile_stored(2, square, 64);
    transpose(square, sums + panel_sums);
  }
  if constexpr (kPanels == 2 && kTiles == 2) {
    _tile_stored(3, square, 64);
    transpose(square, sums + panel_sums + 256);
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
  static const bool usable = simd_wish() > 4 && ask_for_amx();
  return usable;
}

DYN_AMX_TARGET void amx_pack(const BFloat16* x, int64_t count, int64_t width, int64_t stride, uint32_t* tiles) {
  if (count <= 2) {  // a transposition moves sixteen rows for the price of these
    for (int64_t row = 0; row < count; ++row)
      for (int64_t pair = 0; pair < width / 2; ++pair)
        std::memcpy(tiles + pair * kTileRows16 + row, x + row * stride + 2 * pair, 4);
    return;
  }
  alignas(64) float square[256] = {};
  for (int64_t k = 0; k < width; k += kTileDepth) {
    for (int64_t row = 0; row < count; ++row) std::memcpy(square + row * 16, x + row * stride + k, 64);
    transpose(square, reinterpret_cast<float*>(tiles + k / kTileDepth * kTileWords));
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
