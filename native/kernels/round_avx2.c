/* round_avx2.c: a row of x as integers (private.h), with AVX2: numbers group by group, then their digits into planes. */

#if defined(__x86_64__)

#include "avx2.h"
#include "simd.h"

XD_INLINE void round_group(const xd_affine *a, const float *x, int16_t *numbers, float *d, float *da) {
  const int n = a->group_size;
  const float q_max = xd_q_max(a);
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 8) /* as integers a NaN is above infinity, which is above all numbers */
    most = _mm256_max_epu32(
        most, _mm256_and_si256(_mm256_castps_si256(vf_load(x + i)), _mm256_set1_epi32(0x7fffffff)));
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  const uint32_t bits = (uint32_t)_mm_cvtsi128_si32(m);
  const float largest = _mm_cvtss_f32(_mm_castsi128_ps(m));
  *d = *da = bits >= 0x7f800000 ? NAN : 0;
  if (bits >= 0x7f800000 || largest < XD_TINY) {
    memset(numbers, 0, (size_t)n * 2);
    return;
  }
  const vf inverse = vf_set(q_max / largest);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 16) {
    __m256i low = _mm256_cvtps_epi32(vf_mul(vf_load(x + i), inverse));
    __m256i high = _mm256_cvtps_epi32(vf_mul(vf_load(x + i + 8), inverse));
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
    _mm256_store_si256((__m256i *)(numbers + i), both);
  }
  int32_t s[8];
  _mm256_storeu_si256((__m256i *)s, sum);
  *d = largest / q_max;
  *da = *d * (float)(s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7]);
}

/* 32 bytes: a digit of 32 numbers in order. `digit` 0 is the high one of two, 1 the low one, 2 the only one. */
XD_INLINE __m256i digits(const int16_t *numbers, int digit) {
  __m256i n[2];
  for (int i = 0; i < 2; i++) {
    n[i] = _mm256_load_si256((const __m256i *)(numbers + 16 * i));
    const __m256i hi = _mm256_srai_epi16(_mm256_add_epi16(n[i], _mm256_set1_epi16(128)), 8);
    if (digit == 0) n[i] = hi;
    if (digit == 1) n[i] = _mm256_sub_epi16(n[i], _mm256_slli_epi16(hi, 8));
  }
  return _mm256_permute4x64_epi64(_mm256_packs_epi16(n[0], n[1]), 0xd8);
}

/* Two vectors of pairs into what is even and what is odd; `order` brings the evens of each 16 bytes to the front. */
XD_INLINE void split_pairs(__m256i a, __m256i b, __m256i order, int8_t *q) {
  a = _mm256_shuffle_epi8(a, order), b = _mm256_shuffle_epi8(b, order);
  _mm256_store_si256((__m256i *)q, _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(a, b), 0xd8));
  _mm256_store_si256((__m256i *)(q + 32), _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(a, b), 0xd8));
}

/* Four vectors of bytes into planes: byte j of plane p was byte 4 j + p. */
XD_INLINE void split_quads(const int16_t *numbers, int digit, int8_t *q) {
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                         13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m256i v[4];
  for (int i = 0; i < 4; i++) v[i] = _mm256_shuffle_epi8(digits(numbers + 32 * i, digit), order);
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  const __m256i planes[4] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b), _mm256_unpacklo_epi64(c, d),
                             _mm256_unpackhi_epi64(c, d)};
  for (int p = 0; p < 4; p++)
    _mm256_store_si256((__m256i *)(q + 32 * p),
                       _mm256_permutevar8x32_epi32(planes[p], _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

void xd_round_row_avx2(const xd_affine *a, const float *x, int16_t *numbers, int8_t *q, float *d, float *da) {
  const __m256i bytes = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12,
                                         14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m256i words = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12,
                                         13, 2, 3, 6, 7, 10, 11, 14, 15);
  const int64_t padded = (int64_t)a->padded_groups * a->group_size;
  for (int g = 0; g < a->groups; g++)
    round_group(a, x + (int64_t)g * a->group_size, numbers + (int64_t)g * a->group_size, d + g, da + g);
  for (int g = a->groups; g < a->padded_groups; g++) d[g] = da[g] = 0;
  memset(numbers + a->width, 0, (size_t)(padded - a->width) * 2);
  if (a->bits == 8) {
    for (int64_t k = 0; k < padded; k += 32)
      split_pairs(_mm256_load_si256((const __m256i *)(numbers + k)),
                  _mm256_load_si256((const __m256i *)(numbers + k + 16)), words, q + 2 * k);
    return;
  }
  for (int digit = a->two_digits ? 0 : 2; digit < (a->two_digits ? 2 : 3); digit++) {
    int8_t *to = digit == 1 ? q + a->q_bytes / 2 : q;
    if (a->bits == 4)
      for (int64_t k = 0; k < padded; k += 64)
        split_pairs(digits(numbers + k, digit), digits(numbers + k + 32, digit), bytes, to + k);
    else
      for (int64_t k = 0; k < padded; k += 128) split_quads(numbers + k, digit, to + k);
  }
}

#include "target_end.h"
#endif
