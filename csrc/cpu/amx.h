// Matrix tiles of Intel AMX (bf16): sums of products of 16 outputs x 16 rows x 32 channels per instruction.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/types.h"

namespace dyndepth {

// The processor has AMX-BF16 and the operating system let this process use it (asked once).
bool amx_usable();

constexpr int64_t kTileRows16 = 16;  // rows of x per tile; the last tile of a product may be partly unused
constexpr int64_t kTileDepth = 32;   // bf16 channels per tile

// One tile of packed x: [16 pairs of channels][16 rows] pairs of bf16, 1 KiB.
constexpr int64_t kTileWords = 256;

// Packs rows [0, count) of a tile's 16, `width` channels (a multiple of 32), rows `stride` elements apart, into
// width / 32 tiles. Unused rows keep what was there: they only ever reach unused columns of the sums.
void amx_pack(const BFloat16* x, int64_t count, int64_t width, int64_t stride, uint32_t* tiles);

// Around any number of amx_panels calls of one thread.
void amx_begin();
void amx_end();

// Memory that will be wanted soon: up to two stretches, fetched into the second-level cache bit by bit while tiles
// multiply.
struct Ahead {
  const char* at[2] = {nullptr, nullptr};
  const char* end[2] = {nullptr, nullptr};
  // Cache lines of each stretch that a step of tiles (32 channels of two panels and two row tiles) asks for.
  int64_t pace = 16;

  // Spreads the stretches over so many steps: asked for at once, they would take the places of what is wanted now.
  void spread(int64_t steps) {
    const int64_t lines = std::max(end[0] - at[0], end[1] - at[1]) / 64 + 1;
    pace = std::clamp<int64_t>((lines + steps - 1) / std::max<int64_t>(steps, 1), 1, 16);
  }

  // For those who ask for one stretch after the other: so many bytes per step, evenly to the last line. 16 rows take a
  // third longer where twice as much is asked for in half of the steps.
  int64_t rate = 0, owed = 0;
  void spread_in_turn(int64_t steps) {
    rate = std::min<int64_t>((end[0] - at[0] + end[1] - at[1]) / std::max<int64_t>(steps, 1) + 1, 16 * 64);
  }

  struct Lines {
    const char* at;
    int64_t count;
  };
  // What the next `steps` steps ask for.
  Lines take(int64_t steps) {
    if (at[0] >= end[0]) {
      at[0] = at[1];
      end[0] = end[1];
      at[1] = end[1] = nullptr;
      if (at[0] >= end[0]) return {nullptr, 0};
    }
    owed += rate * steps;
    const Lines lines{at[0], std::min<int64_t>(owed / 64, (end[0] - at[0] + 63) / 64)};
    at[0] += lines.count * 64;
    owed -= lines.count * 64;
    return lines;
  }

  void set(int stretch, const void* from, int64_t bytes) {
    at[stretch] = static_cast<const char*>(from);
    end[stretch] = at[stretch] + bytes;
  }
};

// sums[panel][row][16] = dot products of panels[panel]'s 16 weight rows (`stride` elements apart, read as they lie)
// with rows [0, 16 * row_tiles) of x. `panel_count` is 1 or 2. Every sum adds its channels in the same order whatever
// the other rows are.
void amx_panels(const uint32_t* tiles, int64_t row_tiles, int64_t width, const BFloat16* const* panels,
                int64_t panel_count, int64_t stride, Ahead& ahead, float* sums);

}  // namespace dyndepth
