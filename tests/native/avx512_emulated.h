/* avx512_emulated.h: AVX-512 in portable C by SIMDe, for affine_avx512*.c on a processor without it. Compiled for AVX2, FMA
 * and F16C. What SIMDe 0.7.4, Debian's, lacks is added here. */
#ifndef XD_AVX512_EMULATED_H
#define XD_AVX512_EMULATED_H
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <string.h>

#include <simde/x86/avx512.h>

#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps xe_cvtepi32_ps
static inline __m512 xe_cvtepi32_ps(__m512i a) {
    simde__m512i_private from = simde__m512i_to_private(a);
    simde__m512_private to;
    for (int i = 0; i < 16; i++) to.f32[i] = (float)from.i32[i];
    return simde__m512_from_private(to);
}

#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_i64x2 xe_shuffle_i64x2
static inline __m512i xe_shuffle_i64x2(__m512i a, __m512i b, int order) {
    simde__m512i_private from[2] = {simde__m512i_to_private(a), simde__m512i_to_private(b)}, to;
    for (int i = 0; i < 8; i++) to.i64[i] = from[i / 4].i64[(order >> i / 2 * 2 & 3) * 2 + i % 2];
    return simde__m512i_from_private(to);
}

#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps xe_extractf32x8_ps
static inline __m256 xe_extractf32x8_ps(__m512 a, int half) {
    simde__m512_private from = simde__m512_to_private(a);
    __m256 to;
    memcpy(&to, &from.f32[8 * half], sizeof to);
    return to;
}

/* Masked loads read what the mask names, as the instruction does: no byte beyond. */
#define XE_MASKED_LOAD(to, mask, from, size)                                          \
    for (int i = 0; i < (int)sizeof(to) / (size); i++)                                \
        if ((mask) >> i & 1) memcpy((char *)&(to) + i * (size), (const char *)(from) + i * (size), (size));

#undef _mm256_maskz_loadu_epi8
#define _mm256_maskz_loadu_epi8 xe_maskz_loadu_epi8
static inline __m256i xe_maskz_loadu_epi8(uint32_t mask, const void *from) {
    __m256i to = _mm256_setzero_si256();
    XE_MASKED_LOAD(to, mask, from, 1)
    return to;
}

#undef _mm256_mask_loadu_ps
#define _mm256_mask_loadu_ps xe_mask_loadu_ps
static inline __m256 xe_mask_loadu_ps(__m256 to, uint8_t mask, const void *from) {
    XE_MASKED_LOAD(to, mask, from, 4)
    return to;
}

#undef _mm_mask_loadu_epi16
#define _mm_mask_loadu_epi16 xe_mask_loadu_epi16
static inline __m128i xe_mask_loadu_epi16(__m128i to, uint8_t mask, const void *from) {
    XE_MASKED_LOAD(to, mask, from, 2)
    return to;
}
#endif
