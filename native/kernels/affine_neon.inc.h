/* affine_neon.inc.h: affine products with NEON's dot product, and with its matrix product where XD_I8MM is defined.

   Theory of operation. `sdot` multiplies 16 int8 with 16 int8 and adds fours into 4 int32; codes of 2 and 4 bits are
   int8 as they are. 16 code bytes give 8 / bits such vectors: shift, mask, multiply; the digits lie in planes to match.
   With two digits the high one's sum is shifted by 8 and the low one's added: all in int32, where nothing overflows.

   Single rows (`rows`): two weight rows at a time, so that a digit is loaded once for both: for 2 bits the load units
   would be what limits, 5 loads beside 10 other instructions. Sums lie across lanes; `addp` brings a group's sum into
   its lane. 8-bit codes are multiplied as 16-bit numbers (`smlal`): memory is the limit there.

   Panels (`pack`, `tile`): 16 output rows side by side. For `sdot` a vector holds a word of four codes of each of 4
   output rows, and is multiplied by one word of a row's digits: 16 sums for 4 rows, of 32 registers. `smmla`
   multiplies 2 rows of 8 codes by 2 rows of 8 digits, twice as much: a vector holds eight codes of each of 2 output
   rows. 8-bit codes are stored less 128, as int8, and 128 times the sum of the digits is added in the end; the
   digits, 16 bits in q, are split and put in order as they are loaded. The groups of a panel lie in the order of
   private.h's lanes (0, 8, 16, ..., 1, 9, ...), so that `tile` reads it from front to back with one lane's sums in
   hand. */

#include "neon.h"
#include "simd.h"

enum { AT_ONCE = 2, PANEL_OUT = 16 };

/* Rows of x as integers. */

XD_INLINE void round_group(const xd_affine *a, const float *x, int16_t *numbers, float *d, float *da) {
  const int n = a->group_size;
  const float q_max = xd_q_max(a);
  uint32x4_t most = vdupq_n_u32(0);
  for (int i = 0; i < n; i += 4) /* as integers a NaN is above infinity, which is above all numbers */
    most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffff)));
  const uint32_t bits = vmaxvq_u32(most);
  float largest;
  memcpy(&largest, &bits, 4);
  *d = *da = bits >= 0x7f800000 ? NAN : 0;
  if (bits >= 0x7f800000 || largest < XD_TINY) {
    memset(numbers, 0, (size_t)n * 2);
    return;
  }
  const float inverse = q_max / largest;
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < n; i += 8) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4), inverse));
    const int16x8_t both = vcombine_s16(vmovn_s32(low), vmovn_s32(high));
    sum = vpadalq_s16(sum, both);
    vst1q_s16(numbers + i, both);
  }
  *d = largest / q_max;
  *da = *d * (float)vaddvq_s32(sum);
}

/* A digit of 8 numbers. The high one of two is what makes the low one, the last 8 bits, lie in -128 .. 127. */
XD_INLINE int8x8_t digit_of(int16x8_t numbers, int is_high) {
  return is_high ? vshrn_n_s16(vaddq_s16(numbers, vdupq_n_s16(128)), 8) : vmovn_s16(numbers);
}

/* A digit of 64 (4 bits) or 128 (2 bits) numbers, which meet the same 32 code bytes, into its planes. */
XD_INLINE void split(const int16_t *numbers, int planes, int is_high, int8_t *q) {
  for (int i = 0; i < 2; i++, numbers += 16 * planes, q += 16) {
    int16x8_t v[4], w[4];
    if (planes == 2) {
      const int16x8x2_t low = vld2q_s16(numbers), high = vld2q_s16(numbers + 16);
      for (int p = 0; p < 2; p++) v[p] = low.val[p], w[p] = high.val[p];
    } else {
      const int16x8x4_t low = vld4q_s16(numbers), high = vld4q_s16(numbers + 32);
      for (int p = 0; p < 4; p++) v[p] = low.val[p], w[p] = high.val[p];
    }
    for (int p = 0; p < planes; p++)
      vst1q_s8(q + 32 * p, vcombine_s8(digit_of(v[p], is_high), digit_of(w[p], is_high)));
  }
}

static void round_row(const xd_affine *a, const float *x, int16_t *numbers, int8_t *q, float *d, float *da) {
  const int64_t padded = (int64_t)a->padded_groups * a->group_size;
  for (int g = 0; g < a->groups; g++)
    round_group(a, x + (int64_t)g * a->group_size, numbers + (int64_t)g * a->group_size, d + g, da + g);
  for (int g = a->groups; g < a->padded_groups; g++) d[g] = da[g] = 0;
  memset(numbers + a->width, 0, (size_t)(padded - a->width) * 2);
  if (a->bits == 8) {
    int16_t *to = (int16_t *)q;
    for (int64_t k = 0; k < padded; k += 32)
      for (int i = 0; i < 16; i += 8) {
        const int16x8x2_t v = vld2q_s16(numbers + k + 2 * i);
        vst1q_s16(to + k + i, v.val[0]), vst1q_s16(to + k + 16 + i, v.val[1]);
      }
    return;
  }
  const int planes = 8 / a->bits;
  for (int digit = 0; digit <= a->two_digits; digit++) { /* with two, the high one first */
    int8_t *to = q + digit * (a->q_bytes / 2);
    const int is_high = a->two_digits && digit == 0;
    for (int64_t k = 0; k < padded; k += 32 * planes)
      planes == 2 ? split(numbers + k, 2, is_high, to + k) : split(numbers + k, 4, is_high, to + k);
  }
}

/* Products. */

/* The 2- or 4-bit codes of 16 bytes that meet plane `p`. */
XD_INLINE int8x16_t plane(uint8x16_t codes, int bits, int p) {
  const uint8x16_t mask = vdupq_n_u8((uint8_t)((1 << bits) - 1));
  switch (p * bits) {
    case 0: return vreinterpretq_s8_u8(vandq_u8(codes, mask));
    case 2: return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(codes, 2), mask));
    case 4: return vreinterpretq_s8_u8(bits == 4 ? vshrq_n_u8(codes, 4) : vandq_u8(vshrq_n_u8(codes, 4), mask));
    default: return vreinterpretq_s8_u8(vshrq_n_u8(codes, 6));
  }
}

/* 16 code bytes, or the 8 of one group of 2-bit codes. */
XD_INLINE uint8x16_t load_codes(const uint8_t *codes, int bytes) {
  return bytes >= 16 ? vld1q_u8(codes) : vcombine_u8(vld1_u8(codes), vdup_n_u8(0));
}

/* Add 16 code bytes of `num` weight rows, times q, to their sums. */
XD_INLINE void add_bytes(int bits, const uint8x16_t *codes, int num, const int8_t *q, int32x4_t *sums) {
  for (int p = 0; p < (bits == 8 ? 2 : 8 / bits); p++) {
    const int8x16_t digits = vld1q_s8(q + 32 * p);
    for (int r = 0; r < num; r++) {
      if (bits < 8) {
        sums[r] = vdotq_s32(sums[r], plane(codes[r], bits, p), digits);
        continue;
      }
      const uint16x8_t pairs = vreinterpretq_u16_u8(codes[r]); /* of bytes: what is even, then what is odd */
      const int16x8_t some = vreinterpretq_s16_u16(p ? vshrq_n_u16(pairs, 8) : vandq_u16(pairs, vdupq_n_u16(255)));
      const int16x8_t wide = vreinterpretq_s16_s8(digits);
      sums[r] = vmlal_s16(sums[r], vget_low_s16(some), vget_low_s16(wide));
      sums[r] = vmlal_high_s16(sums[r], some, wide);
    }
  }
}

/* Sums of one group, or of two groups of 8 bytes (the second is zero if `bytes` end before it), across lanes. */
XD_INLINE void group_sums(int bits, int group_bytes, int two_digits, const uint8_t *const *codes, int num, int64_t at,
                          int bytes, const int8_t *q, int64_t lo_at, int32x4_t *sums) {
  const int block = 32 * (bits == 8 ? 2 : 8 / bits); /* bytes of q that meet 32 code bytes */
  int32x4_t lo[2];
  for (int r = 0; r < num; r++) sums[r] = lo[r] = vdupq_n_s32(0);
  for (int64_t i = at; i < at + group_bytes; i += 16) {
    const int8_t *digits = q + i / 32 * block + i % 32;
    uint8x16_t c[2];
    for (int r = 0; r < num; r++) c[r] = load_codes(codes[r] + i, bytes);
    add_bytes(bits, c, num, digits, sums);
    if (two_digits && bits < 8) add_bytes(bits, c, num, digits + lo_at, lo);
  }
  if (two_digits && bits < 8)
    for (int r = 0; r < num; r++) sums[r] = vaddq_s32(lo[r], vshlq_n_s32(sums[r], 8));
}

/* Four sums a weight row, one a group, in order; of `count` groups only, the others are zero. */
XD_INLINE void four_groups(int bits, int group_bytes, int two_digits, const uint8_t *const *codes, int num, int64_t at,
                           int count, const int8_t *q, int64_t lo_at, int32x4_t *sums) {
  const int at_once = group_bytes < 16 ? 2 : 1;
  int32x4_t v[4][2];
  for (int i = 0; i < 4 / at_once; i++) {
    const int left = count - i * at_once;
    for (int r = 0; r < num; r++) v[i][r] = vdupq_n_s32(0);
    if (left > 0)
      group_sums(bits, group_bytes, two_digits, codes, num, at + i * at_once * group_bytes, left * group_bytes, q, lo_at,
                 v[i]);
  }
  for (int r = 0; r < num; r++)
    sums[r] = at_once == 2 ? vpaddq_s32(v[0][r], v[1][r])
                           : vpaddq_s32(vpaddq_s32(v[0][r], v[1][r]), vpaddq_s32(v[2][r], v[3][r]));
}

/* Fewer than 8 items; copies of known sizes need no call. */
XD_INLINE void copy_few(char *to, const char *from, int count, const int size) {
  for (int n = 4; n; n /= 2)
    if (count & n) memcpy(to, from, (size_t)(n * size)), to += n * size, from += n * size;
}

/* Eight scales or biases, of which `count` exist. The others are -0: it alone changes no sum, not even -0. */
XD_INLINE vf numbers_at(const void *from, int dtype, int64_t at, int count) {
  static const uint32_t signs[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1u << 31, 1u << 31, 1u << 31, 1u << 31,
                                     1u << 31, 1u << 31, 1u << 31, 1u << 31};
  if (count >= 8) return vf_load_any(from, dtype, at);
  _Alignas(16) char some[32] = {0};
  if (dtype == XD_FLOAT32)
    copy_few(some, (const char *)from + at * 4, count, 4);
  else
    copy_few(some, (const char *)from + at * 2, count, 2);
  const vf v = vf_load_any(some, dtype, 0);
  const uint32x4_t lo = vorrq_u32(vreinterpretq_u32_f32(v.lo), vld1q_u32(signs + 8 - count));
  const uint32x4_t hi = vorrq_u32(vreinterpretq_u32_f32(v.hi), vld1q_u32(signs + 12 - count));
  return (vf){vreinterpretq_f32_u32(lo), vreinterpretq_f32_u32(hi)};
}

/* Add the groups g .. g + count - 1 of two weight rows to their sums. */
XD_INLINE void add_groups(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *const *codes,
                          const void *scales, const void *biases, const int64_t *number, int g, int count,
                          const xd_row *row, vf *acc) {
  const int group_bytes = group_size * bits / 8;
  int32x4_t half[2][AT_ONCE];
  for (int i = 0; i < 2; i++)
    four_groups(bits, group_bytes, two_digits, codes, AT_ONCE, (int64_t)(g + 4 * i) * group_bytes, count - 4 * i, row->q,
                a->q_bytes / 2, half[i]);
  for (int r = 0; r < AT_ONCE; r++) {
    const int64_t at = number[r] * a->groups + g;
    const vf sums = {vcvtq_f32_s32(half[0][r]), vcvtq_f32_s32(half[1][r])};
    const vf s = numbers_at(scales, a->dtype, at, count), b = numbers_at(biases, a->dtype, at, count);
    acc[r] = vf_fma(vf_mul(s, vf_load(row->d + g)), sums, acc[r]);
    acc[r] = vf_fma(b, vf_load(row->da + g), acc[r]);
  }
}

XD_INLINE void rows(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                    const void *scales, const void *biases, int num_out, const xd_row *row, float *y) {
  for (int n = 0; n < num_out; n += AT_ONCE) {
    const int last = n + 1 < num_out ? n + 1 : n; /* of an odd number the last comes twice */
    const int64_t number[AT_ONCE] = {n, last};
    const uint8_t *c[AT_ONCE] = {codes + n * a->code_bytes, codes + last * a->code_bytes};
    vf acc[AT_ONCE] = {vf_set(0), vf_set(0)};
    int g = 0;
    for (; g + 8 <= a->groups; g += 8)
      add_groups(a, bits, group_size, two_digits, c, scales, biases, number, g, 8, row, acc);
    if (g < a->groups)
      add_groups(a, bits, group_size, two_digits, c, scales, biases, number, g, a->groups - g, row, acc);
    for (int r = 0; r < AT_ONCE; r++) y[number[r]] = vf_sum(acc[r]);
  }
}

/* Panels. Twice, for 16 output rows each: group by group, 16 code bytes by 16 (8 by 8 if a group has no more), plane by
   plane, what `store_bytes` stores: 256 bytes. Then scales and biases [groups, XD_TILE_OUT], in the groups' natural order. */

static float *panel_scales(const xd_affine *a, const void *panel) {
  return (float *)((char *)panel + (int64_t)a->groups * a->group_size * XD_TILE_OUT);
}

/* Where lane `lane` begins in the order of the groups in a panel. */
static int64_t lane_start(const xd_affine *a, int lane) {
  const int more = a->groups % XD_LANES;
  return (int64_t)a->groups / XD_LANES * lane + (lane < more ? lane : more);
}

XD_INLINE int8x16_t codes_of(uint8x16_t bytes, int bits, int p) {
  return bits == 8 ? vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128))) : plane(bytes, bits, p);
}

/* 16 (or 8) code bytes of 4 output rows, the quad-th of a panel's four. */
XD_INLINE void store_bytes(int bits, int group_bytes, const uint8x16_t v[4], int quad, int8_t *to) {
  const int planes = 8 / bits, plane_bytes = group_bytes < 16 ? 128 : 256;
  const uint64x2_t a = vreinterpretq_u64_u8(v[0]), b = vreinterpretq_u64_u8(v[1]);
  const uint64x2_t c = vreinterpretq_u64_u8(v[2]), d = vreinterpretq_u64_u8(v[3]);
#if defined(XD_I8MM) /* [half][pair of output rows][output row, 8 codes] */
  const uint64x2_t t[4] = {vzip1q_u64(a, b), vzip1q_u64(c, d), vzip2q_u64(a, b), vzip2q_u64(c, d)};
  for (int i = 0; i < (group_bytes < 16 ? 2 : 4); i++)
    for (int p = 0; p < planes; p++)
      vst1q_s8(to + p * plane_bytes + i / 2 * 128 + quad * 32 + i % 2 * 16,
               codes_of(vreinterpretq_u8_u64(t[i]), bits, p));
#else /* [word][four output rows][output row, 4 codes] */
  const uint32x4_t ac = vreinterpretq_u32_u64(vzip1q_u64(a, c)), bd = vreinterpretq_u32_u64(vzip1q_u64(b, d));
  const uint32x4_t ca = vreinterpretq_u32_u64(vzip2q_u64(a, c)), db = vreinterpretq_u32_u64(vzip2q_u64(b, d));
  /* ac: words 0 and 1 of row 0, then of row 2 */
  const uint32x4_t t[4] = {vtrn1q_u32(ac, bd), vtrn2q_u32(ac, bd), vtrn1q_u32(ca, db), vtrn2q_u32(ca, db)};
  for (int w = 0; w < (group_bytes < 16 ? 2 : 4); w++)
    for (int p = 0; p < planes; p++)
      vst1q_s8(to + p * plane_bytes + w * 64 + quad * 16, codes_of(vreinterpretq_u8_u32(t[w]), bits, p));
#endif
}

/* The codes of 16 output rows, of which `num_out` exist (the others repeat the last: nobody reads what they give). */
XD_INLINE void pack_codes(const xd_affine *a, int bits, const uint8_t *codes, int num_out, int8_t *panel) {
  const int group_bytes = a->group_size * bits / 8, at_once = group_bytes < 16 ? 8 : 16;
  for (int g = 0; g < a->groups; g++) {
    int8_t *to = panel + (lane_start(a, g % XD_LANES) + g / XD_LANES) * a->group_size * PANEL_OUT;
    const int64_t first = (int64_t)g * group_bytes;
    for (int64_t at = first; at < first + group_bytes; at += at_once, to += at_once * (8 / bits) * PANEL_OUT)
      for (int quad = 0; quad < 4; quad++) {
        uint8x16_t v[4];
        for (int i = 0; i < 4; i++) {
          const int n = quad * 4 + i;
          v[i] = load_codes(codes + (n < num_out ? n : num_out - 1) * a->code_bytes + at, at_once);
        }
        if (at_once == 8)
          store_bytes(bits, 8, v, quad, to);
        else
          store_bytes(bits, 16, v, quad, to);
      }
  }
}

/* Scales or biases of 4 output rows, of which `num_out` exist: four columns of [groups, XD_TILE_OUT]. */
static void pack_numbers(const xd_affine *a, const void *from, int num_out, float *to) {
  for (int g = 0; g < a->groups; g += 8) {
    const int count = a->groups - g < 8 ? a->groups - g : 8;
    vf v[4];
    for (int n = 0; n < 4; n++)
      v[n] = numbers_at(from, a->dtype, (int64_t)(n < num_out ? n : num_out - 1) * a->groups + g, count);
    for (int i = 0; i < count; i += 4, to += 4 * XD_TILE_OUT) {
      float32x4_t c[4];
      for (int n = 0; n < 4; n++) c[n] = i ? v[n].hi : v[n].lo;
      const float32x4_t ab = vtrn1q_f32(c[0], c[1]), ba = vtrn2q_f32(c[0], c[1]);
      const float32x4_t cd = vtrn1q_f32(c[2], c[3]), dc = vtrn2q_f32(c[2], c[3]);
      const float32x4_t t[4] = {vcombine_f32(vget_low_f32(ab), vget_low_f32(cd)),
                                vcombine_f32(vget_low_f32(ba), vget_low_f32(dc)),
                                vcombine_f32(vget_high_f32(ab), vget_high_f32(cd)),
                                vcombine_f32(vget_high_f32(ba), vget_high_f32(dc))};
      for (int k = 0; k < 4 && i + k < count; k++) vst1q_f32(to + k * XD_TILE_OUT, t[k]);
    }
  }
}

static void pack(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                 void *panel) {
  float *s = panel_scales(a, panel), *b = s + (int64_t)a->groups * XD_TILE_OUT;
  const int64_t sixteen = ((char *)s - (char *)panel) / 2, row = (int64_t)a->groups * (int64_t)xd_itemsize(a->dtype);
  for (int n = 0; n < num_out; n += PANEL_OUT) {
    int8_t *to = (int8_t *)panel + n / PANEL_OUT * sixteen;
    const uint8_t *from = codes + n * a->code_bytes;
    if (a->bits == 2) pack_codes(a, 2, from, num_out - n, to);
    if (a->bits == 4) pack_codes(a, 4, from, num_out - n, to);
    if (a->bits == 8) pack_codes(a, 8, from, num_out - n, to);
  }
  for (int n = 0; n < num_out; n += 4) {
    pack_numbers(a, (const char *)scales + n * row, num_out - n, s + n);
    pack_numbers(a, (const char *)biases + n * row, num_out - n, b + n);
  }
}

/* 16 (or 8) digits that meet plane p of the code bytes from `at` on; `digit` 0 is the high one of two. */
XD_INLINE int8x16_t load_digits(const xd_affine *a, int is_wide, const int8_t *q, int64_t at, int p, int digit, int bytes) {
  if (!is_wide) {
    const int8_t *from = q + (digit ? a->q_bytes / 2 : 0) + at / 32 * 32 * (8 / a->bits) + p * 32 + at % 32;
    return bytes >= 16 ? vld1q_s8(from) : vcombine_s8(vld1_s8(from), vdup_n_s8(0));
  }
  const int16_t *from = (const int16_t *)q + at / 32 * 32 + at % 32 / 2;
  const int is_high = a->two_digits && digit == 0;
  const int8x8_t even = digit_of(vld1q_s16(from), is_high), odd = digit_of(vld1q_s16(from + 16), is_high);
  return vcombine_s8(vzip1_s8(even, odd), vzip2_s8(even, odd));
}

#if defined(XD_I8MM)

/* Two sums for two rows in a vector: [row][output row]. */
typedef struct {
  int32x4_t of[XD_TILE_ROWS / 2][PANEL_OUT / 2];
} sums_of_tile;

XD_INLINE void add_digits(const int8_t *panel, int bytes, const int8x16_t *digits, int num, sums_of_tile *sums) {
  for (int half = 0; half < bytes / 8; half++)
    for (int o = 0; o < PANEL_OUT / 2; o++) {
      const int8x16_t codes = vld1q_s8(panel + half * 128 + o * 16);
      for (int r = 0; r < num; r += 2) {
        const int64x2_t one = vreinterpretq_s64_s8(digits[r]);
        const int64x2_t other = vreinterpretq_s64_s8(digits[r + 1 < num ? r + 1 : r]);
        const int64x2_t both = half ? vzip2q_s64(one, other) : vzip1q_s64(one, other);
        sums->of[r / 2][o] = vmmlaq_s32(sums->of[r / 2][o], vreinterpretq_s8_s64(both), codes);
      }
    }
}

/* Row r's sums of the output rows 4 o .. 4 o + 3. */
XD_INLINE int32x4_t sums_at(const sums_of_tile *sums, int r, int o) {
  const int32x4_t *pair = &sums->of[r / 2][2 * o];
  return r % 2 ? vcombine_s32(vget_high_s32(pair[0]), vget_high_s32(pair[1]))
               : vcombine_s32(vget_low_s32(pair[0]), vget_low_s32(pair[1]));
}

enum { SUM_ROWS = 2, SUM_OUT = 2 }; /* of a vector of sums */

#else

typedef struct {
  int32x4_t of[XD_TILE_ROWS][PANEL_OUT / 4];
} sums_of_tile;

/* One word of digits; the instruction wants its number as a constant. */
#define ADD_WORD(w)                                                              \
  for (int o = 0; o < PANEL_OUT / 4; o++) {                                      \
    const int8x16_t codes = vld1q_s8(panel + (w) * 64 + o * 16);                 \
    for (int r = 0; r < num; r++)                                                \
      sums->of[r][o] = vdotq_laneq_s32(sums->of[r][o], codes, digits[r], (w));   \
  }

XD_INLINE void add_digits(const int8_t *panel, int bytes, const int8x16_t *digits, int num, sums_of_tile *sums) {
  ADD_WORD(0)
  ADD_WORD(1)
  if (bytes < 16) return;
  ADD_WORD(2)
  ADD_WORD(3)
}

XD_INLINE int32x4_t sums_at(const sums_of_tile *sums, int r, int o) {
  return sums->of[r][o];
}

enum { SUM_ROWS = 1, SUM_OUT = 4 };

#endif

/* Sums of one group, whose codes begin at byte `at` of a weight row, for 16 output rows and `num` rows of x. Codes come
   `bytes` (16 or 8) at a time; `is_wide` for those of 8 bits. */
XD_INLINE void group_tile(const xd_affine *a, int is_wide, int bytes, const int8_t *panel, int64_t at,
                          const xd_row *rows, int num, int32x4_t out[XD_TILE_ROWS][PANEL_OUT / 4]) {
  const int group_bytes = a->group_size * a->bits / 8, planes = 8 / a->bits;
  sums_of_tile sums;
  int32x4_t of_digits[XD_TILE_ROWS];
  for (int r = 0; r < num; r++) of_digits[r] = vdupq_n_s32(0);
  for (int r = 0; r < num; r += SUM_ROWS)
    for (int o = 0; o < PANEL_OUT / SUM_OUT; o++) sums.of[r / SUM_ROWS][o] = vdupq_n_s32(0);
  for (int digit = 0; digit <= a->two_digits; digit++) {
    const int8_t *codes = panel;
    if (digit) { /* what the high one gave, times 256 */
      for (int r = 0; r < num; r++) of_digits[r] = vshlq_n_s32(of_digits[r], 8);
      for (int r = 0; r < num; r += SUM_ROWS)
        for (int o = 0; o < PANEL_OUT / SUM_OUT; o++)
          sums.of[r / SUM_ROWS][o] = vshlq_n_s32(sums.of[r / SUM_ROWS][o], 8);
    }
    for (int64_t i = at; i < at + group_bytes; i += bytes)
      for (int p = 0; p < planes; p++, codes += bytes * PANEL_OUT) {
        int8x16_t digits[XD_TILE_ROWS];
        for (int r = 0; r < num; r++) {
          digits[r] = load_digits(a, is_wide, rows[r].q, i, p, digit, bytes);
          if (is_wide) of_digits[r] = vdotq_s32(of_digits[r], digits[r], vdupq_n_s8(1));
        }
        add_digits(codes, bytes, digits, num, &sums);
      }
  }
  for (int r = 0; r < num; r++)
    for (int o = 0; o < PANEL_OUT / 4; o++) {
      out[r][o] = sums_at(&sums, r, o);
      if (is_wide) out[r][o] = vaddq_s32(out[r][o], vdupq_n_s32(128 * vaddvq_s32(of_digits[r])));
    }
}

/* 16 output rows against `num` rows of x: y[num][XD_TILE_OUT], from its first column on. */
XD_INLINE void tile_sixteen(const xd_affine *a, int is_wide, int bytes, const int8_t *panel, const float *scales,
                            const float *biases, const xd_row *rows, int num, float *y) {
  float32x4_t lane[XD_LANES][XD_TILE_ROWS][PANEL_OUT / 4];
  for (int j = 0; j < XD_LANES; j++) {
    for (int r = 0; r < num; r++)
      for (int o = 0; o < PANEL_OUT / 4; o++) lane[j][r][o] = vdupq_n_f32(0);
    for (int g = j; g < a->groups; g += XD_LANES, panel += a->group_size * PANEL_OUT) {
      int32x4_t sums[XD_TILE_ROWS][PANEL_OUT / 4];
      group_tile(a, is_wide, bytes, panel, (int64_t)g * a->group_size * a->bits / 8, rows, num, sums);
      for (int o = 0; o < PANEL_OUT / 4; o++) {
        const float32x4_t s = vld1q_f32(scales + (int64_t)g * XD_TILE_OUT + 4 * o);
        const float32x4_t b = vld1q_f32(biases + (int64_t)g * XD_TILE_OUT + 4 * o);
        for (int r = 0; r < num; r++) {
          float32x4_t acc = vfmaq_f32(lane[j][r][o], vmulq_n_f32(s, rows[r].d[g]), vcvtq_f32_s32(sums[r][o]));
          lane[j][r][o] = vfmaq_n_f32(acc, b, rows[r].da[g]);
        }
      }
    }
  }
  for (int r = 0; r < num; r++)
    for (int o = 0; o < PANEL_OUT / 4; o++) {
      float32x4_t l[XD_LANES];
      for (int j = 0; j < XD_LANES; j++) l[j] = lane[j][r][o];
      const float32x4_t even = vaddq_f32(vaddq_f32(l[0], l[4]), vaddq_f32(l[2], l[6]));
      const float32x4_t odd = vaddq_f32(vaddq_f32(l[1], l[5]), vaddq_f32(l[3], l[7]));
      vst1q_f32(y + r * XD_TILE_OUT + 4 * o, vaddq_f32(even, odd));
    }
}

/* One function for each kind of codes and for 2 and 4 rows. */
#define TILE(name, is_wide, bytes, num)                                                                     \
  static void name(const xd_affine *a, const int8_t *panel, const float *s, const float *b, const xd_row *rows, \
                   float *y) {                                                                              \
    tile_sixteen(a, is_wide, bytes, panel, s, b, rows, num, y);                                             \
  }
TILE(tile_two, 0, 16, 2)
TILE(tile_four, 0, 16, 4)
TILE(tile_two_narrow, 0, 8, 2)
TILE(tile_four_narrow, 0, 8, 4)
TILE(tile_two_wide, 1, 16, 2)
TILE(tile_four_wide, 1, 16, 4)

static void tile(const xd_affine *a, const void *panel, const xd_row *rows, int num_rows,
                 float y[XD_TILE_ROWS][XD_TILE_OUT]) {
  static void (*const functions[3][2])(const xd_affine *, const int8_t *, const float *, const float *, const xd_row *,
                                       float *) = {
      {tile_two, tile_four}, {tile_two_narrow, tile_four_narrow}, {tile_two_wide, tile_four_wide}};
  const float *s = panel_scales(a, panel), *b = s + (int64_t)a->groups * XD_TILE_OUT;
  const int64_t sixteen = ((const char *)s - (const char *)panel) / 2;
  const int kind = a->bits == 8 ? 2 : a->group_size * a->bits < 128;
  xd_row four[XD_TILE_ROWS]; /* of an odd number the last comes twice */
  for (int r = 0; r < XD_TILE_ROWS; r++) four[r] = rows[r < num_rows ? r : num_rows - 1];
  for (int n = 0; n < XD_TILE_OUT; n += PANEL_OUT)
    functions[kind][num_rows > 2](a, (const int8_t *)panel + n / PANEL_OUT * sixteen, s + n, b + n, four, &y[0][n]);
}
