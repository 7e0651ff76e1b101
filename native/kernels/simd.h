/* simd.h: eight float32 side by side, `vf`, for the operations whose sums have 8 lanes.

   Define XD_SIMD_AVX2 before including it in a file compiled for AVX2 and FMA (avx2.h does); NEON is taken on arm64,
   plain C elsewhere. All give the same bits: each operation rounds once, fma included. */
#ifndef XD_KERNELS_SIMD_H
#define XD_KERNELS_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "private.h"

/* Always inlined, for most are one instruction; plain C is left to the compiler, or it would take minutes. So do the
   tests with all of it, under the sanitizers: they define XD_INLINE. */
#if defined(XD_INLINE)
#elif defined(XD_SIMD_AVX2) || (defined(__aarch64__) && !defined(XD_SIMD_PORTABLE))
#define XD_INLINE static inline __attribute__((always_inline, unused))
#else
#define XD_INLINE static __attribute__((unused))
#endif

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
  /* Both halves are loaded with all eight, so that one shuffle places them: widening and shifting are three steps. */
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
  const __m256i upper = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10,
                                         11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, upper));
}
XD_INLINE vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
XD_INLINE void vf_store_bf16(uint16_t *p, vf a) {
  const __m256i upper_halves = _mm256_broadcastsi128_si256(_mm_set_epi64x(-1, 0x0f0e0b0a07060302));
  __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i nan = _mm256_castps_si256(_mm256_and_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q), _mm256_set1_ps(NAN)));
  __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  up = _mm256_shuffle_epi8(_mm256_or_si256(up, nan), upper_halves);
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(up, 8)));
}
XD_INLINE void vf_store_f16(uint16_t *p, vf a) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, 0)); }
XD_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
XD_INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
XD_INLINE vf vf_if_above(vf a, vf b, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
XD_INLINE vf vf_power2(vf n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n), 23)); }
XD_INLINE vf vf_swap_pairs(vf a) { return _mm256_permute_ps(a, 0xb1); }
XD_INLINE vf vf_fold(vf a, vf b) { /* halves of a, then of b, added; addition commutes */
  return _mm256_add_ps(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
}
XD_INLINE vf vf_sum8(const vf *a) {
  vf f0 = vf_fold(a[0], a[4]), f1 = vf_fold(a[1], a[5]), f2 = vf_fold(a[2], a[6]), f3 = vf_fold(a[3], a[7]);
  vf g0 = _mm256_add_ps(_mm256_shuffle_ps(f0, f1, 0x44), _mm256_shuffle_ps(f0, f1, 0xee));
  vf g1 = _mm256_add_ps(_mm256_shuffle_ps(f2, f3, 0x44), _mm256_shuffle_ps(f2, f3, 0xee));
  return _mm256_add_ps(_mm256_shuffle_ps(g0, g1, 0x88), _mm256_shuffle_ps(g0, g1, 0xdd));
}

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
XD_INLINE uint16x4_t vf_half_bf16(float32x4_t a) {
  uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), up, vorrq_u32(bits, vdupq_n_u32(0x400000))), 16);
}
XD_INLINE void vf_store_bf16(uint16_t *p, vf a) { vst1q_u16(p, vcombine_u16(vf_half_bf16(a.lo), vf_half_bf16(a.hi))); }
XD_INLINE void vf_store_f16(uint16_t *p, vf a) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(a.lo), vcvt_f16_f32(a.hi))));
}
XD_INLINE vf vf_if_above(vf a, vf b, vf yes, vf no) {
  return (vf){vbslq_f32(vcgtq_f32(a.lo, b.lo), yes.lo, no.lo), vbslq_f32(vcgtq_f32(a.hi, b.hi), yes.hi, no.hi)};
}
XD_INLINE vf vf_max(vf a, vf b) { return vf_if_above(a, b, a, b); } /* vmaxq treats NaN otherwise */
XD_INLINE vf vf_min(vf a, vf b) { return vf_if_above(b, a, a, b); }
XD_INLINE vf vf_power2(vf n) {
  return (vf){vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(n.lo), 23)),
              vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(n.hi), 23))};
}
XD_INLINE vf vf_swap_pairs(vf a) { return (vf){vrev64q_f32(a.lo), vrev64q_f32(a.hi)}; }
XD_INLINE float32x4_t vf_fold(vf a, vf b) { /* of each: l0 + l4 + (l2 + l6), l1 + l5 + (l3 + l7) */
  float64x2_t f = vreinterpretq_f64_f32(vaddq_f32(a.lo, a.hi)), g = vreinterpretq_f64_f32(vaddq_f32(b.lo, b.hi));
  return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(f, g)), vreinterpretq_f32_f64(vzip2q_f64(f, g)));
}
XD_INLINE vf vf_sum8(const vf *a) {
  return (vf){vpaddq_f32(vf_fold(a[0], a[1]), vf_fold(a[2], a[3])),
              vpaddq_f32(vf_fold(a[4], a[5]), vf_fold(a[6], a[7]))};
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
XD_INLINE void vf_store_bf16(uint16_t *p, vf a) {
  for (int i = 0; i < 8; i++) p[i] = xd_to_bf16(a.v[i]);
}
XD_INLINE void vf_store_f16(uint16_t *p, vf a) {
  for (int i = 0; i < 8; i++) p[i] = xd_to_f16(a.v[i]);
}
XD_INLINE vf vf_if_above(vf a, vf b, vf yes, vf no) { XD_EACH(a.v[i] > b.v[i] ? yes.v[i] : no.v[i]); }
XD_INLINE vf vf_max(vf a, vf b) { XD_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
XD_INLINE vf vf_min(vf a, vf b) { XD_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
XD_INLINE float vf_lane_power2(float n) {
  uint32_t bits;
  memcpy(&bits, &n, 4);
  bits <<= 23;
  memcpy(&n, &bits, 4);
  return n;
}
XD_INLINE vf vf_power2(vf n) { XD_EACH(vf_lane_power2(n.v[i])); }
XD_INLINE vf vf_swap_pairs(vf a) { XD_EACH(a.v[i ^ 1]); }
XD_INLINE float vf_lane_sum(const float *l) { return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])); }
XD_INLINE vf vf_sum8(const vf *a) { XD_EACH(vf_lane_sum(a[i].v)); }

#endif

/* What is the same for all, in words:
   vf_max, vf_min       the second if either is NaN
   vf_if_above          a > b ? yes : no
   vf_power2(n)         2^m for n = 1.5 * 2^23 + 127 + m: 0 for m = -127, inf for 128, anything for a NaN
   vf_sum8              lane i is vf_sum(a[i]) */

XD_INLINE vf vf_load_any(const void *p, int dtype, int64_t at) {
  if (dtype == XD_FLOAT32) return vf_load((const float *)p + at);
  if (dtype == XD_BFLOAT16) return vf_load_bf16((const uint16_t *)p + at);
  return vf_load_f16((const uint16_t *)p + at);
}

XD_INLINE void vf_store_any(void *p, int dtype, int64_t at, vf a) {
  if (dtype == XD_FLOAT32)
    vf_store((float *)p + at, a);
  else if (dtype == XD_BFLOAT16)
    vf_store_bf16((uint16_t *)p + at, a);
  else
    vf_store_f16((uint16_t *)p + at, a);
}

/* Fewer than 8 numbers: the other lanes are read as 0 and not written. */
XD_INLINE vf vf_load_some(const void *p, int dtype, int64_t at, int64_t n) {
  float lanes[8] = {0};
  xd_widen((const char *)p + (size_t)at * xd_itemsize(dtype), dtype, lanes, n);
  return vf_load(lanes);
}
XD_INLINE void vf_store_some(void *p, int dtype, int64_t at, vf a, int64_t n) {
  float lanes[8];
  vf_store(lanes, a);
  xd_narrow(lanes, dtype, (char *)p + (size_t)at * xd_itemsize(dtype), n);
}

/* ((l0 + l4) + (l2 + l6)) + ((l1 + l5) + (l3 + l7)): the one order in which lanes are added up. */
XD_INLINE float vf_sum(vf a) {
  float l[8];
  vf_store(l, a);
  return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}

#endif
