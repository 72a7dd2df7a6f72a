// What the files that program AVX-512 by intrinsics share: targets by name, and how squares turn. Included before any
// target pragma; everything here names its own target, and whoever calls it has asked the processor.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define DYN_AVX512 1
#include <immintrin.h>

#define DYN_AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
// With AVX512_BF16: pairs of bf16 multiplied and added to fp32.
#define DYN_DOTS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace dyndepth {

// 16 x 16 floats turned: from[a][b] (rows of 16) -> to[b][a], rows `stride` apart and every four `four` apart.
DYN_AVX512_TARGET inline void transpose(const float* from, float* to, int64_t stride, int64_t four) {
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
  // r[4 g + c] holds, per 128-bit lane l, column 4 l + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 e = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), f = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * stride, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(to + 2 * four + c * stride, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(to + four + c * stride, _mm512_shuffle_f32x4(e, f, 0x88));
    _mm512_storeu_ps(to + 3 * four + c * stride, _mm512_shuffle_f32x4(e, f, 0xdd));
  }
}
DYN_AVX512_TARGET inline void transpose(const float* from, float* to, int64_t stride) {
  transpose(from, to, stride, 4 * stride);
}

}  // namespace dyndepth
#endif
