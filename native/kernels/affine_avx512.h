/* affine_avx512.h: what the files of affine products with AVX-512 share; include it after avx512.h and simd.h. */
#ifndef XD_KERNELS_AFFINE_AVX512_H
#define XD_KERNELS_AFFINE_AVX512_H

/* Codes that meet plane `p`: bytes of 2 or 4 bits, 16-bit numbers of 8. A shift by 16-bit numbers brings in bits of a
   neighbour, which the mask takes away. */
XD_INLINE __m512i plane512(__m512i block, int bits, int p) {
  const __m512i mask = _mm512_set1_epi32(bits == 8 ? 0x00ff00ff : bits == 4 ? 0x0f0f0f0f : 0x03030303);
  return _mm512_and_si512(_mm512_srli_epi16(block, (unsigned)(p * bits)), mask);
}

#endif
