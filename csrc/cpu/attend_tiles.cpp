// Scores and weighted values as products of tiles: 16 x 16 outputs and 32 channels (or keys) at a time.
//
// Keys as they lie in the pages times turned queries are scores with keys down and queries across. From there few
// queries (decode) and many (prompts) take two roads. Few: scores are turned, keys run along the lanes, weights times
// values are sums. Many: queries stay in the lanes, turned values times weights are turned sums, and turning a
// segment's values is shared by all. Both add the same pairs of products in the same order, and a key that a row does
// not see weighs exactly nothing; so a row's bits depend neither on the rows beside it nor on its road.
//
// A weight is two bf16, 16 bits of mantissa together: with one, attention would be as coarse as its rounded result.
#include "attend_tiles.h"

#include <cmath>
#include <cstring>

#include "../common/simd.h"
#include "tile_blocks.h"
#include "tile_products.h"
#include "tile_softmax.h"

namespace dyndepth {

#ifdef DYN_AVX512

using namespace tiles;

namespace {

// ---- many queries: sixteen at a time, in the lanes ----

// Values, channels down and keys across: per chunk and 16 channels a tile.
DYN_AVX512_TARGET void turn_values(const AttentionProblem& p, const Seen& seen, uint32_t* turned) {
  for (int64_t c = seen.begin / 2; c < seen.end / 2; ++c) {
    const Block &one = seen.block[2 * c], &two = seen.block[2 * c + 1];
    for (int64_t d = 0; d < p.head_dim; d += 32) {
      alignas(64) uint32_t low[256], high[256];  // of every eight channels the first four, the last four
      for (int64_t r = 0; r < kBlock; ++r) {
        const __m512i a = _mm512_loadu_si512(one.values + r * one.stride + d);
        const __m512i b = _mm512_loadu_si512(two.values + r * two.stride + d);
        _mm512_store_si512(low + r * 16, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(high + r * 16, _mm512_unpackhi_epi16(a, b));
      }
      float* to = reinterpret_cast<float*>(turned + (c * p.head_dim + d) * 16);
      transpose(reinterpret_cast<const float*>(low), to, 16, 128);
      transpose(reinterpret_cast<const float*>(high), to + 4 * 16, 16, 128);
    }
  }
}

// Queries [at, at + 16) of those that rows from `first` on have. `to` has room for all sixteen.
template <class Products>
DYN_AVX512_TARGET void attend_sixteen(const AttentionProblem& p, const Seen& seen, int64_t first, int64_t at,
                                      int64_t count, int64_t segment, const Scratch& scratch, Partial to) {
  alignas(64) int32_t begins[16] = {}, ends[16];
  Sight any{kSegment, 0}, all{0, kSegment};
  std::fill(ends, ends + 16, static_cast<int32_t>(kSegment));
  for (int64_t i = 0; i < std::min(count - at, kBlock); ++i) {
    const Sight mine = sight_of(p, first + (at + i) / p.group(), segment);
    begins[i] = static_cast<int32_t>(mine.begin);
    ends[i] = static_cast<int32_t>(mine.end);
    if (mine.begin < mine.end) any = {std::min(any.begin, mine.begin), std::max(any.end, mine.end)};
    all = {std::max(all.begin, mine.begin), std::min(all.end, mine.end)};
  }
  const int64_t begin = any.begin / kChunk * 2, end = (any.end + kChunk - 1) / kChunk * 2;
  if (begin >= end) {
    std::fill(to.sum + at * p.head_dim, to.sum + (at + kBlock) * p.head_dim, 0.f);
    std::fill(to.peak + at, to.peak + at + kBlock, kNothing);
    std::fill(to.mass + at, to.mass + at + kBlock, 0.f);
    return;
  }
  float* scores = scratch.scores;
  Products::template score<false>(p, seen, begin, end,
                                  scratch.queries + at / kBlock * (p.head_dim / kTileDepth) * kTileWords,
                                  scores + begin * kBlock * 16);

  const Scale scale(p);
  if (scale.capped())
    for (int64_t key = begin * kBlock; key < end * kBlock; ++key)
      _mm512_store_ps(scores + key * 16, scale.cap(_mm512_load_ps(scores + key * 16)));
  const __m512i from = _mm512_load_si512(begins), until = _mm512_load_si512(ends);
  for (int64_t b = begin; b < end; ++b) {
    if (all.begin <= b * kBlock && (b + 1) * kBlock <= all.end) continue;
    for (int64_t key = b * kBlock; key < (b + 1) * kBlock; ++key) {
      const __m512i k = _mm512_set1_epi32(static_cast<int>(key));
      const __mmask16 sees = _mm512_cmple_epi32_mask(from, k) & _mm512_cmplt_epi32_mask(k, until);
      _mm512_store_ps(scores + key * 16,
                      _mm512_mask_blend_ps(sees, _mm512_set1_ps(kNothing), _mm512_load_ps(scores + key * 16)));
    }
  }
  __m512 highest[4];
  for (int i = 0; i < 4; ++i) highest[i] = _mm512_set1_ps(kNothing);
  for (int64_t key = begin * kBlock; key < end * kBlock; key += 4)
    for (int i = 0; i < 4; ++i)  // the second operand wins over a NaN
      highest[i] = _mm512_max_ps(_mm512_load_ps(scores + (key + i) * 16), highest[i]);
  const __m512 best = _mm512_max_ps(_mm512_max_ps(highest[0], highest[1]), _mm512_max_ps(highest[2], highest[3]));
  const __m512 by = _mm512_set1_ps(scale.by);
  // Nothing but -inf (or NaN) so far: no weight, and no -inf - -inf.
  const __m512 level = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(best, _mm512_set1_ps(kNothing), _CMP_NEQ_UQ), best);
  __m512 mass[16];
  for (int64_t j = 0; j < kBlock; ++j) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = begin / 2; c < end / 2; ++c) {
      const float* at_key = scores + (c * kChunk + j) * 16;
      const __m512 one = weight_of(_mm512_load_ps(at_key), level, by);
      const __m512 two = weight_of(_mm512_load_ps(at_key + kBlock * 16), level, by);
      total = _mm512_add_ps(_mm512_add_ps(total, one), two);
      store_pairs(one, two, scratch.high + c * kTileWords + j * 16, scratch.low + c * kTileWords + j * 16);
    }
    mass[j] = total;
  }
  _mm512_storeu_ps(to.mass + at, sum_of(mass));
  _mm512_storeu_ps(to.peak + at, best);

  alignas(64) float squares[4 * 256];
  float* sums = to.sum + at * p.head_dim;
  int64_t channel = 0;
  for (; channel + 64 <= p.head_dim; channel += 64) {
    Products::template add_turned<4>(p, begin, end, channel, scratch, squares);
    for (int64_t t = 0; t < 4; ++t) transpose(squares + t * 256, sums + channel + t * 16, p.head_dim);
  }
  if (channel < p.head_dim) {
    Products::template add_turned<2>(p, begin, end, channel, scratch, squares);
    for (int64_t t = 0; t < 2; ++t) transpose(squares + t * 256, sums + channel + t * 16, p.head_dim);
  }
}

// ---- few queries, up to sixteen: keys in the lanes ----

template <class Products>
DYN_AVX512_TARGET void attend_few(const AttentionProblem& p, const Seen& seen, int64_t first, int64_t count,
                                  int64_t segment, const Coming& coming, const Scratch& scratch, Partial to) {
  const int64_t begin = seen.begin * kBlock, end = seen.end * kBlock;
  alignas(64) float squares[4 * 256];
  if (begin < end) {
    constexpr int64_t kAhead = Products::kAhead;
    // Two blocks at a time, turned while they are in the first-level cache.
    for (int64_t b = seen.begin; b < seen.end; b += 2) {
      for (int64_t next = b + kAhead; kAhead > 0 && next < std::min(b + kAhead + 2, seen.end); ++next)
        fetch(seen.block[next].keys, seen.block[next].stride, p.head_dim);
      Products::template score<true>(p, seen, b, b + 2, scratch.queries, squares);
      transpose(squares, scratch.scores + b * kBlock, kSegment);
      transpose(squares + 256, scratch.scores + (b + 1) * kBlock, kSegment);
    }
  }
  const Scale scale(p);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t q = 0; q < count; ++q) {
    const Sight mine = sight_of(p, first + q / p.group(), segment);
    float* scores = scratch.scores + q * kSegment;
    __m512 highest = _mm512_set1_ps(kNothing);
    for (int64_t key = begin; key < end; key += kBlock) {
      __m512 x = _mm512_load_ps(scores + key);
      if (scale.capped()) x = scale.cap(x);
      if (key < mine.begin || key + kBlock > mine.end) {
        const __m512i k = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(key)));
        const __mmask16 sees = _mm512_cmple_epi32_mask(_mm512_set1_epi32(static_cast<int>(mine.begin)), k) &
                               _mm512_cmplt_epi32_mask(k, _mm512_set1_epi32(static_cast<int>(mine.end)));
        x = _mm512_mask_blend_ps(sees, _mm512_set1_ps(kNothing), x);
      }
      _mm512_store_ps(scores + key, x);
      highest = _mm512_max_ps(x, highest);
    }
    const float best = _mm512_reduce_max_ps(highest);
    const __m512 by = _mm512_set1_ps(scale.by), level = _mm512_set1_ps(best == kNothing ? 0.f : best);
    __m512 total = _mm512_setzero_ps();
    for (int64_t key = begin; key < end; key += kChunk) {
      const __m512 one = weight_of(_mm512_load_ps(scores + key), level, by);
      const __m512 two = weight_of(_mm512_load_ps(scores + key + kBlock), level, by);
      total = _mm512_add_ps(_mm512_add_ps(total, one), two);
      const int64_t at = key / kChunk * kTileWords + q * 16;
      store_pairs(one, two, scratch.high + at, scratch.low + at);
    }
    to.peak[q] = best;
    to.mass[q] = sum_of(total);
  }
  if (begin >= end) {
    std::fill(to.sum, to.sum + count * p.head_dim, 0.f);
    return;
  }
  const __m512i order = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i after = _mm512_add_epi32(order, _mm512_set1_epi32(8));
  for (int64_t channel = 0; channel < p.head_dim; channel += 64) {
    const int64_t tiles = std::min<int64_t>(p.head_dim - channel, 64) / 16;
    if (tiles == 4)
      Products::template add_values<4>(seen, channel, count, scratch, coming, squares);
    else
      Products::template add_values<2>(seen, channel, count, scratch, coming, squares);
    for (int64_t t = 0; t < tiles; t += 2)
      for (int64_t q = 0; q < count; ++q) {
        const __m512 low = _mm512_load_ps(squares + t * 256 + q * 16);
        const __m512 high = _mm512_load_ps(squares + (t + 1) * 256 + q * 16);
        float* sums = to.sum + q * p.head_dim + channel + t * 16;
        _mm512_storeu_ps(sums, _mm512_permutex2var_ps(low, order, high));
        _mm512_storeu_ps(sums + 16, _mm512_permutex2var_ps(low, after, high));
      }
  }
}

template <class Products>
void attend_queries(const AttentionProblem& p, const Seen& seen, int64_t first, int64_t count, int64_t segment,
                    const Coming& coming, const Scratch& scratch, Partial to) {
  if (count <= kBlock) {
    attend_few<Products>(p, seen, first, count, segment, coming, scratch, to);
    return;
  }
  turn_values(p, seen, scratch.turned);
  for (int64_t at = 0; at < count; at += kBlock)
    attend_sixteen<Products>(p, seen, first, at, count, segment, scratch, to);
}

}  // namespace

bool attends_on_tiles(const AttentionProblem& p) {
  return (amx_usable() || simd_level() == 5) && p.head_dim % 32 == 0 && p.head_dim > 0 && p.scale > 0.f &&
         p.softcap <= kMostCap;
}

int64_t AttendTiles::scratch(const AttentionProblem& p) { return Scratch::words(p); }
void AttendTiles::begin() {
  if (amx_usable()) amx_begin();
}
void AttendTiles::end() {
  if (amx_usable()) amx_end();
}

void AttendTiles::segment(const AttentionProblem& p, const BFloat16* q, const BFloat16* keys, const BFloat16* values,
                          const Piece& piece, const Piece* next, Partial to, float* memory) {
  const auto [first, last, kv_head, segment] = piece;
  const Scratch scratch(p, memory);
  const int64_t group = p.group(), dim = p.head_dim, count = (last - first) * group;
  const Seen seen = look(p, keys, values, first, last, kv_head, segment, scratch.copies);
  if (!seen.finite) {  // 0 times inf is not nothing: a row at a time sees its own keys only
    for (int64_t row = first; row < last; ++row)
      AttendTiles::segment(p, q, keys, values, {row, row + 1, kv_head, segment}, nullptr,
                           to.from((row - first) * group, dim), memory);
    return;
  }
  // Queries lie together per row only: sixteen of them, then a tile.
  const int64_t tile_words = dim / kTileDepth * kTileWords;
  alignas(64) BFloat16 rows[kBlock * 256];
  for (int64_t at = 0; at < count; at += kBlock) {
    uint32_t* tile = scratch.queries + at / kBlock * tile_words;
    const int64_t width = std::min<int64_t>(dim, 256);
    for (int64_t channel = 0; channel < dim; channel += width) {
      const int64_t wide = std::min(width, dim - channel);
      std::memset(static_cast<void*>(rows), 0, kBlock * wide * sizeof(BFloat16));
      for (int64_t i = 0; i < std::min(count - at, kBlock); ++i) {
        const int64_t row = first + (at + i) / group, head = kv_head * group + (at + i) % group;
        std::memcpy(rows + i * wide, q + (row * p.heads + head) * dim + channel, wide * sizeof(BFloat16));
      }
      amx_pack(rows, kBlock, wide, wide, tile + channel / kTileDepth * kTileWords);
    }
  }
  const Coming coming = next == nullptr || count > kBlock ? Coming{} : keys_of(p, keys, *next);
  if (amx_usable())
    attend_queries<AmxProducts>(p, seen, first, count, segment, coming, scratch, to);
  else
    attend_queries<DotProducts>(p, seen, first, count, segment, coming, scratch, to);
}

DYN_AVX512_TARGET void AttendTiles::merge(const AttentionProblem& p, int64_t rows, Partial total, Partial part) {
  const float by = Scale(p).by;
  for (int64_t at = 0; at < rows * p.group(); ++at) {
    if (part.peak[at] == kNothing && part.mass[at] == 0.f) continue;  // the segment showed this query nothing
    const float best = std::max(total.peak[at], part.peak[at]);
    const float mine = total.mass[at] == 0.f ? 0.f : std::exp2((total.peak[at] - best) * by),
                its = std::exp2((part.peak[at] - best) * by);
    float* sums = total.sum + at * p.head_dim;
    const float* more = part.sum + at * p.head_dim;
    for (int64_t i = 0; i < p.head_dim; i += 16) {
      const __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(sums + i), _mm512_set1_ps(mine));
      _mm512_storeu_ps(sums + i, _mm512_fmadd_ps(_mm512_loadu_ps(more + i), _mm512_set1_ps(its), kept));
    }
    total.mass[at] = total.mass[at] * mine + part.mass[at] * its;
    total.peak[at] = best;
  }
}

DYN_AVX512_TARGET void AttendTiles::write(const AttentionProblem& p, Partial total, int64_t first, int64_t last,
                                          int64_t kv_head, BFloat16* out) {
  const int64_t group = p.group(), dim = p.head_dim;
  for (int64_t at = 0; at < (last - first) * group; ++at) {
    const float* from = total.sum + at * dim;
    BFloat16* to = out + ((first + at / group) * p.heads + kv_head * group + at % group) * dim;
    const __m512 mass = _mm512_set1_ps(total.mass[at]);
    for (int64_t i = 0; i < dim; i += 16) {
      // Sums of nothing but subnormals are -0 or 0 as neighbours have it: + 0 makes them 0.
      const __m512 x = _mm512_div_ps(_mm512_add_ps(_mm512_loadu_ps(from + i), _mm512_setzero_ps()), mass);
      const __m512i bits = _mm512_castps_si512(x);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      const __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nearest, quiet);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    }
  }
}

#else

bool attends_on_tiles(const AttentionProblem&) { return false; }
int64_t AttendTiles::scratch(const AttentionProblem&) { return 0; }
void AttendTiles::begin() {}
void AttendTiles::end() {}
void AttendTiles::segment(const AttentionProblem&, const BFloat16*, const BFloat16*, const BFloat16*, const Piece&,
                          const Piece*, Partial, float*) {}
void AttendTiles::merge(const AttentionProblem&, int64_t, Partial, Partial) {}
void AttendTiles::write(const AttentionProblem&, Partial, int64_t, int64_t, int64_t, BFloat16*) {}

#endif

}  // namespace dyndepth
