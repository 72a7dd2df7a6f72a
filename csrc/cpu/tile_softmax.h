// Sixteen lanes of a softmax in powers of two. Whether lanes are keys or queries, a weight has the same bits.
#pragma once

#include <limits>

#include "avx512.h"
#include "ragged_attention.h"

#ifdef DYN_AVX512
namespace dyndepth::tiles {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

// 2 ** x for x <= 0, relative error 1e-7: a polynomial for the fractional part (least maximal error with 2 ** 0 = 1),
// the rest is exponent. 0 for -inf; NaN stays.
DYN_AVX512_TARGET inline __m512 exp2_of(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
  __m512 y = _mm512_set1_ps(1.8671309653e-3f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.0170278256e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.5799915568e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4016444916e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9315131194e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, x);
}

// The weight of a score beside the largest: 1 there, however large scores are.
DYN_AVX512_TARGET inline __m512 weight_of(__m512 score, __m512 largest, __m512 by) {
  return exp2_of(_mm512_mul_ps(_mm512_sub_ps(score, largest), by));
}

// Larger caps are left to vectors: tanh below loses 1e-7 of the cap.
constexpr float kMostCap = 1000.f;

// Products of rows as scores in powers of two: product * scale, after the softcap where there is one.
struct Scale {
  float by;            // what is left to multiply
  float inner, outer;  // softcap: outer * tanh(inner * product)

  explicit Scale(const AttentionProblem& p)
      : by(p.softcap > 0.f ? kLog2E : p.scale * kLog2E),
        inner(p.softcap > 0.f ? p.scale / p.softcap : 0.f),
        outer(p.softcap) {}
  bool capped() const { return outer > 0.f; }

  // tanh(x) = (1 - e) / (1 + e) with e = exp(-2 |x|): what is lost near 0 is lost in absolute terms, as in any score.
  DYN_AVX512_TARGET __m512 cap(__m512 product) const {
    const __m512 x = _mm512_mul_ps(product, _mm512_set1_ps(inner));
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.f));
    const __m512 e = exp2_of(_mm512_mul_ps(_mm512_or_ps(x, _mm512_set1_ps(-0.f)), _mm512_set1_ps(2.f * kLog2E)));
    const __m512 one = _mm512_set1_ps(1.f);
    const __m512 size = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    return _mm512_mul_ps(_mm512_or_ps(size, sign), _mm512_set1_ps(outer));
  }
};

// Two weights as pairs of bf16: cut off, and what was cut off, rounded.
DYN_AVX512_TARGET inline void store_pairs(__m512 first, __m512 second, uint32_t* high, uint32_t* low) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), half = _mm512_set1_epi32(0x8000);
  const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  const __m512i cut_a = _mm512_and_si512(a, mask), cut_b = _mm512_and_si512(b, mask);
  _mm512_store_si512(high, _mm512_or_si512(_mm512_srli_epi32(a, 16), cut_b));
  const __m512i rest_a = _mm512_castps_si512(_mm512_sub_ps(first, _mm512_castsi512_ps(cut_a)));
  const __m512i rest_b = _mm512_castps_si512(_mm512_sub_ps(second, _mm512_castsi512_ps(cut_b)));
  const __m512i upper = _mm512_and_si512(_mm512_add_epi32(rest_b, half), mask);
  _mm512_store_si512(low, _mm512_or_si512(_mm512_srli_epi32(_mm512_add_epi32(rest_a, half), 16), upper));
}

// The sixteen parts of a mass, added as sum() of vector.simd.h adds lanes.
DYN_AVX512_TARGET inline __m512 sum_of(const __m512 (&x)[16]) {
  __m512 four[4];
  for (int i = 0; i < 4; ++i)
    four[i] = _mm512_add_ps(_mm512_add_ps(x[i], x[i + 8]), _mm512_add_ps(x[i + 4], x[i + 12]));
  return _mm512_add_ps(_mm512_add_ps(four[0], four[2]), _mm512_add_ps(four[1], four[3]));
}
DYN_AVX512_TARGET inline float sum_of(__m512 x) {
  alignas(64) float part[16], four[4];
  _mm512_store_ps(part, x);
  for (int i = 0; i < 4; ++i) four[i] = (part[i] + part[i + 8]) + (part[i + 4] + part[i + 12]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace dyndepth::tiles
#endif
