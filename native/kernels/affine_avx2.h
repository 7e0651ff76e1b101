/* affine_avx2.h: what the files of affine products with AVX2 share; include it after avx2.h and simd.h. */
#ifndef XD_KERNELS_AFFINE_AVX2_H
#define XD_KERNELS_AFFINE_AVX2_H

/* Ask for codes that come later; beyond the end of a tensor it does nothing. By itself the processor follows one stream to
   the end of its page, which gave 9.7 GB/s of 2-bit and 12.2 of 4-bit weights where memory gives 15.7; asked AHEAD bytes
   early, 12.9 and 15 (bench/LOG.md). Sixteen rows side by side it does not follow at all. */
enum { AHEAD = 4096 };
XD_INLINE void prefetch(const uint8_t *codes, int64_t num_bytes) {
  for (int64_t at = 0; at < num_bytes; at += 64)
    _mm_prefetch((const char *)((uintptr_t)codes + (uintptr_t)at), _MM_HINT_T0);
}

/* Codes of a block of 32 bytes that meet plane `p`. */
XD_INLINE __m256i plane(__m256i block, int bits, int p) {
  return _mm256_and_si256(_mm256_srli_epi16(block, p * bits), _mm256_set1_epi8((char)((1 << bits) - 1)));
}

XD_INLINE __m256i load(const void *p) {
  return _mm256_loadu_si256(p);
}

/* 16-bit sums of codes times digits, for one block of 32 bytes of 2-bit codes. */
XD_INLINE __m256i two_bits_sum(__m256i block, const int8_t *q) {
  /* The odd planes stay where they are, four times as large, and are shifted once, as sums: one shift instead of three. */
  const __m256i four_times = _mm256_set1_epi8(12), upper = _mm256_srli_epi16(block, 4);
  __m256i even = _mm256_add_epi16(_mm256_maddubs_epi16(plane(block, 2, 0), load(q)),
                                  _mm256_maddubs_epi16(plane(upper, 2, 0), load(q + 64)));
  __m256i odd = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(block, four_times), load(q + 32)),
                                 _mm256_maddubs_epi16(_mm256_and_si256(upper, four_times), load(q + 96)));
  return _mm256_add_epi16(even, _mm256_srai_epi16(odd, 2));
}

/* `count` < 8 numbers of 16 bits; in registers alone, as a load right after smaller stores waits for them. */
XD_INLINE __m128i load_halves(const uint16_t *p, int count) {
  uint64_t four = 0, rest = 0;
  uint32_t two = 0;
  const int has_four = count & 4;
  if (has_four) memcpy(&four, p, 8), p += 4;
  if (count & 2) memcpy(&two, p, 4), p += 2;
  rest = count & 1 ? two | (uint64_t)*p << (count & 2 ? 32 : 0) : two;
  return has_four ? _mm_set_epi64x((int64_t)rest, (int64_t)four) : _mm_set_epi64x(0, (int64_t)rest);
}

/* Eight scales or biases, of which `count` are the row's own. The others are -0: it alone changes no sum, not even -0. */
XD_INLINE vf numbers_at(const void *from, int dtype, int64_t at, int count) {
  static const float signs[16] = {0, 0, 0, 0, 0, 0, 0, 0, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};
  static const int32_t own[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  if (count == 8) return vf_load_any(from, dtype, at);
  vf some;
  if (dtype == XD_FLOAT32) {
    some = _mm256_maskload_ps((const float *)from + at, load(own + 8 - count));
  } else {
    const __m128i halves = load_halves((const uint16_t *)from + at, count);
    some = dtype == XD_BFLOAT16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))
                                : _mm256_cvtph_ps(halves);
  }
  return _mm256_or_ps(some, vf_load(signs + 8 - count));
}

#endif
