/* numbers.c: float16 and bfloat16 to float32 and back, in plain C: the same bits on every processor. */

#include "private.h"

float xd_from_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff, bits;
  if (exponent == 31) {
    bits = 0x7f800000 | mantissa << 13;
  } else if (exponent) {
    bits = (exponent + 112) << 23 | mantissa << 13;
  } else { /* 0 or subnormal: mantissa * 2^-24, exact in float32 */
    float f = (float)mantissa * 0x1p-24f;
    memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

uint16_t xd_to_f16(float f) { /* to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00; /* 65520 and more round to infinity */
  if (bits < 0x38800000) {                      /* below 2^-14: count in steps of 2^-24, which adding 0.5 rounds to */
    float a;
    memcpy(&a, &bits, 4);
    a += 0.5f;
    memcpy(&bits, &a, 4);
    return (uint16_t)(sign | (bits - 0x3f000000));
  }
  bits += 0xc8000fff + (bits >> 13 & 1); /* minus 112 exponents, plus half a step */
  return (uint16_t)(sign | bits >> 13);
}

void xd_widen(const void *from, int dtype, float *to, int64_t n) {
  if (dtype == XD_FLOAT32) {
    memcpy(to, from, (size_t)n * 4);
  } else if (dtype == XD_BFLOAT16) {
    for (int64_t i = 0; i < n; i++) to[i] = xd_from_bf16(((const uint16_t *)from)[i]);
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = xd_from_f16(((const uint16_t *)from)[i]);
  }
}

void xd_narrow(const float *from, int dtype, void *to, int64_t n) {
  if (dtype == XD_FLOAT32) {
    memcpy(to, from, (size_t)n * 4);
  } else if (dtype == XD_BFLOAT16) {
    for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = xd_to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < n; i++) ((uint16_t *)to)[i] = xd_to_f16(from[i]);
  }
}
