/* simd.h: eight float32 side by side, `vf`, for the operations whose sums have 8 lanes.

   Define XD_SIMD_AVX2 before including it in a file compiled for AVX2 and FMA (avx2.h does); NEON is taken on arm64, plain
   C elsewhere. All give the same bits: each operation rounds once, fma included. */
#ifndef XD_KERNELS_SIMD_H
#define XD_KERNELS_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "private.h"

#define XD_INLINE static inline __attribute__((always_inline, unused))

#if defined(XD_SIMD_AVX2)

typedef __m256 vf;
XD_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
XD_INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
XD_INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
XD_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
XD_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
XD_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
XD_INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
XD_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); } /* a * b + c */
XD_INLINE vf vf_load_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
XD_INLINE vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

#elif defined(__aarch64__) && !defined(XD_SIMD_PORTABLE)

#include <arm_neon.h>
typedef struct {
  float32x4_t lo, hi;
} vf;
XD_INLINE vf vf_load(const float *p) { return (vf){vld1q_f32(p), vld1q_f32(p + 4)}; }
XD_INLINE void vf_store(float *p, vf a) { vst1q_f32(p, a.lo), vst1q_f32(p + 4, a.hi); }
XD_INLINE vf vf_set(float x) { return (vf){vdupq_n_f32(x), vdupq_n_f32(x)}; }
XD_INLINE vf vf_add(vf a, vf b) { return (vf){vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
XD_INLINE vf vf_sub(vf a, vf b) { return (vf){vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
XD_INLINE vf vf_mul(vf a, vf b) { return (vf){vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
XD_INLINE vf vf_div(vf a, vf b) { return (vf){vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
XD_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf){vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)}; }
XD_INLINE vf vf_load_bf16(const uint16_t *p) {
  uint16x8_t h = vld1q_u16(p);
  return (vf){vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)),
              vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(h), 16))};
}
XD_INLINE vf vf_load_f16(const uint16_t *p) {
  float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
  return (vf){vcvt_f32_f16(vget_low_f16(h)), vcvt_f32_f16(vget_high_f16(h))};
}

#else

typedef struct {
  float v[8];
} vf;
#define XD_EACH(expression)              \
  do {                                   \
    vf r;                                \
    for (int i = 0; i < 8; i++) r.v[i] = (expression); \
    return r;                            \
  } while (0)
XD_INLINE vf vf_load(const float *p) { XD_EACH(p[i]); }
XD_INLINE void vf_store(float *p, vf a) { memcpy(p, a.v, sizeof a.v); }
XD_INLINE vf vf_set(float x) { XD_EACH(x); }
XD_INLINE vf vf_add(vf a, vf b) { XD_EACH(a.v[i] + b.v[i]); }
XD_INLINE vf vf_sub(vf a, vf b) { XD_EACH(a.v[i] - b.v[i]); }
XD_INLINE vf vf_mul(vf a, vf b) { XD_EACH(a.v[i] * b.v[i]); }
XD_INLINE vf vf_div(vf a, vf b) { XD_EACH(a.v[i] / b.v[i]); }
XD_INLINE vf vf_fma(vf a, vf b, vf c) { XD_EACH(fmaf(a.v[i], b.v[i], c.v[i])); }
XD_INLINE vf vf_load_bf16(const uint16_t *p) { XD_EACH(xd_from_bf16(p[i])); }
XD_INLINE vf vf_load_f16(const uint16_t *p) { XD_EACH(xd_from_f16(p[i])); }

#endif

XD_INLINE vf vf_load_any(const void *p, int dtype, int64_t at) {
  if (dtype == XD_FLOAT32) return vf_load((const float *)p + at);
  if (dtype == XD_BFLOAT16) return vf_load_bf16((const uint16_t *)p + at);
  return vf_load_f16((const uint16_t *)p + at);
}

/* ((l0 + l4) + (l2 + l6)) + ((l1 + l5) + (l3 + l7)): the one order in which lanes are added up. */
XD_INLINE float vf_sum(vf a) {
  float l[8];
  vf_store(l, a);
  return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}

#endif
