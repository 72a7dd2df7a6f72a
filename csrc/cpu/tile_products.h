// What multiplies tiles for attend_tiles.cpp: Intel AMX, or vectors of dot products (AVX512_BF16) where there is none.
//
// Both offer the same three, on scratch memory of one layout:
//   score       keys times queries: scores [keys of blocks begin .. end][16 queries], from block `begin` on.
//   add_turned  turned values times weights: kTiles tiles [16 channels][16 queries] of sums, from `channel` on.
//   add_values  weights times values: kTiles tiles [16 queries][16 channels], of which each pair holds the first four
//               and the last four of every eight channels. Rows from `queries` on are unspecified.
// The last two add, for one query and channel, the same products in the same order.
#pragma once

#include "amx.h"
#include "amx_tiles.h"
#include "tile_blocks.h"

#ifdef DYN_AVX512
namespace dyndepth::tiles {

struct AmxProducts {
  // Blocks of keys that are asked for before they are multiplied, whether or not they were Coming.
  static constexpr int64_t kAhead = 6;

  // Tiles 0 .. kTiles - 1 are the sums of weights times values, whichever of the two is the left operand.
  template <int kTiles>
  DYN_AMX_TARGET static void zero_sums() {
    static_assert(kTiles == 2 || kTiles == 4);
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles == 4) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  template <int kTiles>
  DYN_AMX_TARGET static void store_sums(float* squares) {
    _tile_stored(0, squares, 64);
    _tile_stored(1, squares + 256, 64);
    if constexpr (kTiles == 4) {
      _tile_stored(2, squares + 512, 64);
      _tile_stored(3, squares + 768, 64);
    }
  }

  template <bool kFetchValues>
  DYN_AMX_TARGET static void score(const AttentionProblem& p, const Seen& seen, int64_t begin, int64_t end,
                                   const uint32_t* queries, float* scores) {
    for (int64_t b = begin; b < end; b += 2) {
      const Block &one = seen.block[b], &two = seen.block[b + 1];
      if constexpr (kFetchValues) {
        fetch(one.values, one.stride, p.head_dim);
        fetch(two.values, two.stride, p.head_dim);
      }
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t k = 0; k < p.head_dim / kTileDepth; ++k) {
        _tile_loadd(6, queries + k * kTileWords, 64);
        _tile_loadd(4, one.keys + k * kTileDepth, one.stride * 2);
        _tile_loadd(5, two.keys + k * kTileDepth, two.stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
      }
      _tile_stored(0, scores, 64);
      _tile_stored(1, scores + 256, 64);
      scores += 512;
    }
  }

  template <int kTiles>
  DYN_AMX_TARGET static void add_turned(const AttentionProblem& p, int64_t begin, int64_t end, int64_t channel,
                                        const Scratch& scratch, float* squares) {
    zero_sums<kTiles>();
    tiles_see_memory();
    for (int64_t c = begin / 2; c < end / 2; ++c) {
      const uint32_t* values = scratch.turned + (c * p.head_dim + channel) * 16;
      _tile_loadd(6, scratch.high + c * kTileWords, 64);
      _tile_loadd(7, scratch.low + c * kTileWords, 64);
      _tile_loadd(4, values, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, values + kTileWords, 64);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(0, 4, 7);
      _tile_dpbf16ps(1, 5, 7);
      if constexpr (kTiles == 4) {
        _tile_loadd(4, values + 2 * kTileWords, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, values + 3 * kTileWords, 64);
        _tile_dpbf16ps(3, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    store_sums<kTiles>(squares);
  }

  template <int kTiles>
  DYN_AMX_TARGET static void add_values(const Seen& seen, int64_t channel, int64_t, const Scratch& scratch,
                                        const Coming& coming, float* squares) {
    zero_sums<kTiles>();
    for (int64_t c = seen.begin / 2; c < seen.end / 2; ++c) {
      const Block &one = seen.block[2 * c], &two = seen.block[2 * c + 1];
      uint32_t* pairs = scratch.turned + (c & 1) * 4 * kTileWords;
      for (int64_t r = 0; r < kBlock; ++r) {
        if (channel == 0) coming.fetch(c - seen.begin / 2, r);
        for (int64_t part = 0; part < kTiles / 2; ++part) {
          const __m512i a = _mm512_loadu_si512(one.values + r * one.stride + channel + part * 32);
          const __m512i b = _mm512_loadu_si512(two.values + r * two.stride + channel + part * 32);
          _mm512_store_si512(pairs + (2 * part) * kTileWords + r * 16, _mm512_unpacklo_epi16(a, b));
          _mm512_store_si512(pairs + (2 * part + 1) * kTileWords + r * 16, _mm512_unpackhi_epi16(a, b));
        }
      }
      tiles_see_memory();
      _tile_loadd(4, scratch.high + c * kTileWords, 64);
      _tile_loadd(5, scratch.low + c * kTileWords, 64);
      _tile_loadd(6, pairs, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, pairs + kTileWords, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
      if constexpr (kTiles == 4) {
        _tile_loadd(6, pairs + 2 * kTileWords, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, pairs + 3 * kTileWords, 64);
        _tile_dpbf16ps(3, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    store_sums<kTiles>(squares);
  }
};

struct DotProducts {
  static constexpr int64_t kAhead = 0;

  template <bool kFetchValues>
  DYN_DOTS_TARGET static void score(const AttentionProblem& p, const Seen& seen, int64_t begin, int64_t end,
                                    const uint32_t* queries, float* scores) {
    for (int64_t b = begin; b < end; ++b, scores += 256) {
      const Block& block = seen.block[b];
      __m512 sums[16] = {};
      for (int64_t k = 0; k < p.head_dim / kTileDepth; ++k)
        for (int64_t r = 0; r < 16; ++r) {
          const __m512bh query = pairs_at(queries + k * kTileWords + r * 16);
          const BFloat16* keys = block.keys + k * kTileDepth + 2 * r;
          if constexpr (kFetchValues) fetch(block.values + r * block.stride + k * kTileDepth);
#pragma GCC unroll 16
          for (int64_t key = 0; key < 16; ++key)
            sums[key] = _mm512_dpbf16_ps(sums[key], pair_everywhere(keys + key * block.stride), query);
        }
      for (int64_t key = 0; key < 16; ++key) _mm512_store_ps(scores + key * 16, sums[key]);
    }
  }

  template <int kTiles>
  DYN_DOTS_TARGET static void add_turned(const AttentionProblem& p, int64_t begin, int64_t end, int64_t channel,
                                         const Scratch& scratch, float* squares) {
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      __m512 sums[16] = {};
      for (int64_t c = begin / 2; c < end / 2; ++c) {
        const uint32_t* values = scratch.turned + (c * p.head_dim + channel) * 16 + tile * kTileWords;
        for (int64_t r = 0; r < 16; ++r) {
          const __m512bh high = pairs_at(scratch.high + c * kTileWords + r * 16);
          const __m512bh low = pairs_at(scratch.low + c * kTileWords + r * 16);
#pragma GCC unroll 16
          for (int64_t i = 0; i < 16; ++i) {
            const __m512bh value = pair_everywhere(values + i * 16 + r);
            sums[i] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(sums[i], value, high), value, low);
          }
        }
      }
      for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(squares + tile * 256 + i * 16, sums[i]);
    }
  }

  template <int kTiles>
  DYN_DOTS_TARGET static void add_values(const Seen& seen, int64_t channel, int64_t queries, const Scratch& scratch,
                                         const Coming& coming, float* squares) {
    constexpr int64_t kQueries = 4;  // whose sums of four tiles fit the registers
    for (int64_t first = 0; first < queries; first += kQueries) {
      __m512 sums[kQueries][kTiles] = {};
      for (int64_t c = seen.begin / 2; c < seen.end / 2; ++c) {
        const Block &one = seen.block[2 * c], &two = seen.block[2 * c + 1];
        const uint32_t* high = scratch.high + c * kTileWords + first * 16;
        const uint32_t* low = scratch.low + c * kTileWords + first * 16;
        for (int64_t r = 0; r < kBlock; ++r) {
          if (channel == 0 && first == 0) coming.fetch(c - seen.begin / 2, r);
          __m512bh values[kTiles];
          for (int64_t part = 0; part < kTiles / 2; ++part) {
            const __m512i a = _mm512_loadu_si512(one.values + r * one.stride + channel + part * 32);
            const __m512i b = _mm512_loadu_si512(two.values + r * two.stride + channel + part * 32);
            values[2 * part] = (__m512bh)_mm512_unpacklo_epi16(a, b);
            values[2 * part + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
          }
#pragma GCC unroll 4
          for (int64_t q = 0; q < kQueries; ++q) {
            const __m512bh weight = pair_everywhere(high + q * 16 + r), rest = pair_everywhere(low + q * 16 + r);
            for (int64_t tile = 0; tile < kTiles; ++tile)
              sums[q][tile] =
                  _mm512_dpbf16_ps(_mm512_dpbf16_ps(sums[q][tile], values[tile], weight), values[tile], rest);
          }
        }
      }
      for (int64_t q = 0; q < kQueries; ++q)
        for (int64_t tile = 0; tile < kTiles; ++tile)
          _mm512_store_ps(squares + tile * 256 + (first + q) * 16, sums[q][tile]);
    }
  }

 private:
  DYN_DOTS_TARGET static __m512bh pairs_at(const uint32_t* from) { return (__m512bh)_mm512_load_si512(from); }
  DYN_DOTS_TARGET static __m512bh pair_everywhere(const void* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
};

}  // namespace dyndepth::tiles
#endif
