/* affine_avx2_rows.c: single rows of x against weight rows, with AVX2.

   8 groups of one weight row at a time. Their sums lie across lanes; one to six additions of two vectors'
   halves bring one group's sum into each lane, which is the order that private.h asks for. In 16 bits where a whole group's sum
   fits, which saves widening each block. Where rows end with half of 8 groups, two of them share the last step.

   Codes of 4 bits are computed faster than memory gives them, and memory gives more where two parts of it are read at once: a
   row of the first half and one of the second are taken in turn, 8 groups of each.

   The format that decoding reads most has a loop of its own (affine_avx2_two_bits.c). */

#if defined(__x86_64__)

#include "avx2.h"
#include "floats.h"
#include "simd.h"
#include "affine_avx2.h"

/* 16-bit sums of codes times digits, for one block of 32 bytes of 2- or 4-bit codes. */
XD_INLINE __m256i block_sum(__m256i block, int bits, const int8_t *q) {
  if (bits == 4)
    return _mm256_add_epi16(_mm256_maddubs_epi16(plane(block, 4, 0), load(q)),
                            _mm256_maddubs_epi16(plane(block, 4, 1), load(q + 32)));
  return two_bits_sum(block, q);
}

/* Does a group's sum fit 16 bits? At 4 bits 64 * 15 * 127 would not, but by_group ends with two numbers, each of half. */
XD_INLINE int is_narrow(int bits, int group_size, int two_digits) {
  return !two_digits && (bits == 2 || (bits == 4 && group_size <= 64));
}

/* Sums of `num` blocks (1, 2 or 4) of 32 code bytes which belong to the same groups; of 16 bits if `narrow`, else of 32. */
XD_INLINE __m256i blocks_sum(const uint8_t *codes, int bits, int num, int two_digits, int narrow, const int8_t *q,
                             int64_t lo_at) {
  const int plane_bytes = 32 * 8 / bits;
  if (bits == 8) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < num; i++) {
      __m256i block = load(codes + 32 * i), even = _mm256_and_si256(block, _mm256_set1_epi16(255));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, load(q + 64 * i)));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srli_epi16(block, 8), load(q + 64 * i + 32)));
    }
    return sum;
  }
  __m256i block = load(codes), hi = block_sum(block, bits, q), lo = hi;
  if (two_digits) lo = block_sum(block, bits, q + lo_at);
  for (int i = 1; i < num; i++) {
    block = load(codes + 32 * i);
    hi = _mm256_add_epi16(hi, block_sum(block, bits, q + plane_bytes * i));
    if (two_digits) lo = _mm256_add_epi16(lo, block_sum(block, bits, q + lo_at + plane_bytes * i));
  }
  if (narrow) return hi;
  __m256i one = _mm256_madd_epi16(two_digits ? lo : hi, _mm256_set1_epi16(1));
  return two_digits ? _mm256_add_epi32(one, _mm256_madd_epi16(hi, _mm256_set1_epi16(256))) : one;
}

/* Two vectors of sums, of 32 bits or, if `narrow`, of 16: of each one's numbers in 16 bytes, which belong to one group, half
   are left, in turn. `vphaddw` does it in fewer instructions, of which Zen 3 begins 0.7 a cycle: 4 to 7 % slower at 4 bits. */
XD_INLINE __m256i two_in_one(__m256i a, __m256i b, int narrow) {
  return narrow ? _mm256_add_epi16(_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b))
                : _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
}

/* As of two times two vectors a to d: one sum of 32 bits of each in 16 bytes, in order. */
XD_INLINE __m256i four_in_one(__m256i ab, __m256i cd, int narrow) {
  if (!narrow) return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  const __m256i twice = _mm256_add_epi16(_mm256_unpacklo_epi32(ab, cd), _mm256_unpackhi_epi32(ab, cd)); /* a b c d a b c d */
  const __m256i side_by_side = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  return _mm256_madd_epi16(_mm256_shuffle_epi8(twice, side_by_side), _mm256_set1_epi16(1));
}

/* Sums of the 1, 2 or 4 blocks that hold 4 groups of `group_bytes`, in one vector. */
XD_INLINE __m256i in_one(const __m256i *v, int group_bytes, int narrow) {
  if (group_bytes == 8) return v[0];
  const __m256i ab = two_in_one(v[0], v[1], narrow);
  return group_bytes == 16 ? ab : four_in_one(ab, two_in_one(v[2], v[3], narrow), narrow);
}

/* One sum of 32 bits a group, in order, from what in_one makes of the first and the other four. */
XD_INLINE __m256i by_group(__m256i first, __m256i other, int group_bytes, int narrow) {
  if (group_bytes == 8) {
    const __m256i sums = narrow ? _mm256_madd_epi16(_mm256_hadd_epi16(first, other), _mm256_set1_epi16(1))
                                : _mm256_hadd_epi32(first, other);
    return _mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
  }
  if (group_bytes == 16)
    return _mm256_permutevar8x32_epi32(four_in_one(first, other, narrow), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return _mm256_add_epi32(_mm256_permute2x128_si256(first, other, 0x20), _mm256_permute2x128_si256(first, other, 0x31));
}

/* The blocks of 4 groups, of which `num_bytes` exist; the others are zero. */
XD_INLINE void four_groups(const uint8_t *codes, int bits, int group_size, int two_digits, const int8_t *q,
                          int64_t lo_at, int num_bytes, __m256i *v) {
  const int group_bytes = group_size * bits / 8, at_once = group_bytes > 32 ? group_bytes : 32;
  const int q_step = at_once * (bits == 8 ? 2 : 8 / bits), count = 4 * group_bytes / at_once;
  const int narrow = is_narrow(bits, group_size, two_digits);
#pragma GCC unroll 4
  for (int i = 0; i < count; i++)
    v[i] = i * at_once < num_bytes
               ? blocks_sum(codes + i * at_once, bits, at_once / 32, two_digits, narrow, q + i * q_step, lo_at)
               : _mm256_setzero_si256();
}

/* The sums of 8 groups: four at `codes`, whose digits lie at `q`, and four at `others`, `others_q`; of these
   `num_bytes` and `others_bytes` exist. */
XD_INLINE __m256i eight_groups(const uint8_t *codes, const uint8_t *others, int bits, int group_size, int two_digits,
                               const int8_t *q, const int8_t *others_q, int64_t lo_at, int num_bytes, int others_bytes) {
  const int group_bytes = group_size * bits / 8, narrow = is_narrow(bits, group_size, two_digits);
  __m256i first[4], other[4];
  four_groups(codes, bits, group_size, two_digits, q, lo_at, num_bytes, first);
  four_groups(others, bits, group_size, two_digits, others_q, lo_at, others_bytes, other);
  return by_group(in_one(first, group_bytes, narrow), in_one(other, group_bytes, narrow), group_bytes, narrow);
}

XD_INLINE vf accumulate(vf acc, __m256i sums, vf scales, vf biases, const float *d, const float *da) {
  acc = vf_fma(vf_mul(scales, vf_load(d)), _mm256_cvtepi32_ps(sums), acc);
  return vf_fma(biases, vf_load(da), acc);
}

/* The groups after the last full eight: read to the end of the row, never beyond. */
XD_INLINE vf last_groups(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                         const void *scales, const void *biases, int64_t at, int g, const xd_row *row, vf acc) {
  const int left = a->groups - g, num_bytes = left * group_size * bits / 8, half = group_size * bits / 2;
  _Alignas(32) uint8_t padded[1024];
  prefetch(codes + AHEAD, num_bytes);
  if (num_bytes % 32) {
    memcpy(padded, codes, (size_t)num_bytes);
    memset(padded + num_bytes, 0, 32);
    codes = padded;
  }
  const int64_t q_group = group_size * (bits == 8 ? 2 : 1), lo_at = a->q_bytes / 2;
  const int8_t *q = row->q + g * q_group, *later = q + 4 * q_group;
  __m256i sums =
      left > 4 ? eight_groups(codes, codes + half, bits, group_size, two_digits, q, later, lo_at, half, num_bytes - half)
               : eight_groups(codes, codes, bits, group_size, two_digits, q, q, lo_at, num_bytes, 0);
  const vf s = numbers_at(scales, a->dtype, at + g, left), b = numbers_at(biases, a->dtype, at + g, left);
  return accumulate(acc, sums, s, b, row->d + g, row->da + g);
}

/* Four scales or biases of one weight row, then four of another. */
XD_INLINE vf two_fours(const void *from, int dtype, int64_t first, int64_t second) {
  if (dtype == XD_FLOAT32) {
    const float *p = from;
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + first)), _mm_loadu_ps(p + second), 1);
  }
  const uint16_t *p = from;
  const __m128i halves = _mm_unpacklo_epi64(_mm_loadu_si64(p + first), _mm_loadu_si64(p + second));
  return dtype == XD_BFLOAT16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))
                              : _mm256_cvtph_ps(halves);
}

/* The last four groups of two weight rows in one step: one row's in lanes 0 to 3, where they belong, the other's in 4 to 7. */
XD_INLINE void last_fours(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *const *codes,
                          const void *scales, const void *biases, const int64_t *at, const xd_row *row, vf *lanes) {
  const int num_bytes = group_size * bits / 2, g = a->groups - 4;
  const int8_t *q = row->q + (int64_t)g * group_size * (bits == 8 ? 2 : 1);
  prefetch(codes[0] + AHEAD, num_bytes);
  prefetch(codes[1] + AHEAD, num_bytes);
  __m256i sums =
      eight_groups(codes[0], codes[1], bits, group_size, two_digits, q, q, a->q_bytes / 2, num_bytes, num_bytes);
  const vf s = two_fours(scales, a->dtype, at[0], at[1]), b = two_fours(biases, a->dtype, at[0], at[1]);
  const vf d = _mm256_broadcast_ps((const __m128 *)(row->d + g)), da = _mm256_broadcast_ps((const __m128 *)(row->da + g));
  vf acc = _mm256_permute2f128_ps(lanes[0], lanes[1], 0x20);
  acc = vf_fma(vf_mul(s, d), _mm256_cvtepi32_ps(sums), acc);
  acc = vf_fma(b, da, acc);
  lanes[0] = _mm256_blend_ps(lanes[0], acc, 0x0f);
  lanes[1] = _mm256_permute2f128_ps(acc, lanes[1], 0x31);
}

/* The lanes of one weight row, all but the groups after the last full eight. */
XD_INLINE vf row_lanes(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                       const void *scales, const void *biases, int64_t at, const xd_row *row) {
  const int code_step = group_size * bits, half = code_step / 2, q_step = 8 * group_size * (bits == 8 ? 2 : 1);
  const int64_t lo_at = a->q_bytes / 2;
  const int8_t *q = row->q;
  vf acc = vf_set(0);
  for (int g = 0; g + 8 <= a->groups; g += 8, codes += code_step, q += q_step) {
    prefetch(codes + AHEAD, code_step);
    const int8_t *later = q + q_step / 2;
    __m256i sums = eight_groups(codes, codes + half, bits, group_size, two_digits, q, later, lo_at, half, half);
    const vf s = vf_load_any(scales, a->dtype, at + g), b = vf_load_any(biases, a->dtype, at + g);
    acc = accumulate(acc, sums, s, b, row->d + g, row->da + g);
  }
  return acc;
}

/* Add the groups after the last full eight to the lanes of `num` <= 8 weight rows. */
XD_INLINE void add_last(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                        const void *scales, const void *biases, int64_t first, int num, const xd_row *row, vf lanes[8]) {
  const int left = a->groups % 8, g = a->groups - left;
  const int64_t skip = (int64_t)g * group_size * bits / 8;
  if (left == 4)
    for (int i = 0; i < num; i += 2) { /* without a partner it is its own: lanes[num] is nobody's */
      const int64_t n = first + i, other = i + 1 < num ? n + 1 : n;
      const uint8_t *both[2] = {codes + n * a->code_bytes + skip, codes + other * a->code_bytes + skip};
      const int64_t at[2] = {n * a->groups + g, other * a->groups + g};
      last_fours(a, bits, group_size, two_digits, both, scales, biases, at, row, lanes + i);
    }
  else if (left)
    for (int i = 0; i < num; i++) {
      const int64_t n = first + i;
      lanes[i] = last_groups(a, bits, group_size, two_digits, codes + n * a->code_bytes + skip, scales, biases,
                             n * a->groups, g, row, lanes[i]);
    }
}

/* The lanes of 8 weight rows are added up at once. */
XD_INLINE void all_rows(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                        const void *scales, const void *biases, int num_out, const xd_row *row, float *y) {
  for (int first = 0; first < num_out; first += 8) {
    const int num = num_out - first < 8 ? num_out - first : 8;
    vf lanes[8], sums;
    float all[8];
    for (int i = 0; i < 8; i++) lanes[i] = vf_set(0);
    for (int i = 0; i < num; i++) {
      const int64_t n = first + i;
      lanes[i] = row_lanes(a, bits, group_size, two_digits, codes + n * a->code_bytes, scales, biases, n * a->groups, row);
    }
    add_last(a, bits, group_size, two_digits, codes, scales, biases, first, num, row, lanes);
    sums = vf_sum8(lanes);
    vf_store(num == 8 ? y + first : all, sums);
    for (int i = 0; i < num && num < 8; i++) y[first + i] = all[i];
  }
}

/* 8 groups of a weight row whose codes are multiplied, but not yet added up and scaled. */
typedef struct {
  __m256i first, other[4]; /* of the first four groups in_one, of the other four as they come */
  int64_t at, g;           /* where scales and biases begin, and d and da */
  vf *lanes;
} unfinished;

XD_INLINE void finish(const xd_affine *a, int bits, int group_size, int two_digits, const void *scales,
                      const void *biases, const xd_row *row, const unfinished *u) {
  const int group_bytes = group_size * bits / 8, narrow = is_narrow(bits, group_size, two_digits);
  const __m256i sums = by_group(u->first, in_one(u->other, group_bytes, narrow), group_bytes, narrow);
  const vf s = vf_load_any(scales, a->dtype, u->at), b = vf_load_any(biases, a->dtype, u->at);
  *u->lanes = accumulate(*u->lanes, sums, s, b, row->d + u->g, row->da + u->g);
}

/* GCC would keep one row's digits for the other, for which there are not enough registers: it cannot look through this. */
#define FORGET(g) __asm__ volatile("" : "+r"(g))
enum { AHEAD_OF_TWO = 1024, AHEAD_NUMBERS = 256 }; /* bytes: of each of two rows in turn; of its scales and biases */

/* Multiply groups g to g + 7 of the weight row at `codes`, whose scales begin at `at`; amid that finish those of the step before,
   so that an instruction hardly waits for another: 5 % less time. */
XD_INLINE void step(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes, const void *scales,
                    const void *biases, int64_t at, int64_t g, const xd_row *row, vf *lanes, unfinished *u) {
  const int group_bytes = group_size * bits / 8, half = 4 * group_bytes, q_group = group_size * (bits == 8 ? 2 : 1);
  const int64_t lo_at = a->q_bytes / 2;
  __m256i first[4];
  FORGET(g);
  const int8_t *q = row->q + g * q_group;
  codes += g * group_bytes;
  prefetch(codes + AHEAD_OF_TWO, 2 * half);
  four_groups(codes, bits, group_size, two_digits, q, lo_at, half, first);
  finish(a, bits, group_size, two_digits, scales, biases, row, u);
  u->first = in_one(first, group_bytes, is_narrow(bits, group_size, two_digits));
  four_groups(codes + half, bits, group_size, two_digits, q + 4 * q_group, lo_at, half, u->other);
  u->at = at + g, u->g = g, u->lanes = lanes;
}

/* The lanes of weight rows n[0] to n[1] + 3, in turn one from n[0] and one from n[1] on: lanes[0] to [3], [4] to [7]. Without the
   groups after the last full eight. The first step has nothing to finish: what it adds to lanes[8] nobody reads. */
XD_INLINE void lanes_in_turn(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                             const void *scales, const void *biases, const int64_t *n, const xd_row *row, vf lanes[9]) {
  const __m256i none = _mm256_setzero_si256();
  const int64_t numbers = a->groups * (int64_t)xd_itemsize(a->dtype);
  unfinished u = {none, {none, none, none, none}, 0, 0, lanes + 8};
  for (int i = 0; i < 9; i++) lanes[i] = vf_set(0);
  if (a->groups < 8) return;
  for (int i = 0; i < 4; i++) {
    const int64_t one = n[0] + i, two = n[1] + i;
    for (int j = 0; j < 2; j++) {
      prefetch((const uint8_t *)scales + (n[j] + i) * numbers + AHEAD_NUMBERS, numbers);
      prefetch((const uint8_t *)biases + (n[j] + i) * numbers + AHEAD_NUMBERS, numbers);
    }
    for (int64_t g = 0; g + 8 <= a->groups; g += 8) {
      step(a, bits, group_size, two_digits, codes + one * a->code_bytes, scales, biases, one * a->groups, g, row,
           lanes + i, &u);
      step(a, bits, group_size, two_digits, codes + two * a->code_bytes, scales, biases, two * a->groups, g, row,
           lanes + 4 + i, &u);
    }
  }
  finish(a, bits, group_size, two_digits, scales, biases, row, &u);
}

/* 2 * half weight rows, half a multiple of 4, in turn one of the first and one of the second half. */
XD_INLINE void rows_in_turn(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                            const void *scales, const void *biases, int64_t half, const xd_row *row, float *y) {
  for (int64_t first = 0; first < half; first += 4) {
    const int64_t n[2] = {first, half + first};
    vf lanes[9];
    lanes_in_turn(a, bits, group_size, two_digits, codes, scales, biases, n, row, lanes);
    for (int i = 0; i < 2; i++)
      add_last(a, bits, group_size, two_digits, codes, scales, biases, n[i], 4, row, lanes + 4 * i);
    const vf sums = vf_sum8(lanes);
    _mm_storeu_ps(y + n[0], _mm256_castps256_ps128(sums));
    _mm_storeu_ps(y + n[1], _mm256_extractf128_ps(sums, 1));
  }
}

XD_INLINE void rows_of(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                       const void *scales, const void *biases, int num_out, const xd_row *row, float *y) {
  const int in_turn = bits == 4 ? num_out / 8 * 8 : 0;
  const int64_t skip = (int64_t)in_turn * a->groups * (int64_t)xd_itemsize(a->dtype);
  rows_in_turn(a, bits, group_size, two_digits, codes, scales, biases, in_turn / 2, row, y);
  all_rows(a, bits, group_size, two_digits, codes + in_turn * a->code_bytes, (const char *)scales + skip,
           (const char *)biases + skip, num_out - in_turn, row, y + in_turn);
}

/* Twice, as in a loop that knows the numbers' format nobody asks for it at each step: 3 to 8 % less time (bench/LOG.md). */
XD_INLINE void rows(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                    const void *scales, const void *biases, int num_out, const xd_row *row, float *y) {
  xd_affine known = *a;
  const xd_row of_x = *row; /* a copy whose pointers no store of lanes can change */
  if (bits <= 4 && a->dtype == XD_BFLOAT16) {
    known.dtype = XD_BFLOAT16;
    rows_of(&known, bits, group_size, two_digits, codes, scales, biases, num_out, &of_x, y);
  } else {
    rows_of(&known, bits, group_size, two_digits, codes, scales, biases, num_out, &of_x, y);
  }
}

#include "affine_formats.inc.h"

void xd_affine_rows_avx2(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                         const xd_row *row, float *y) {
  const int done = xd_two_bits_rows_avx2(a, codes, scales, biases, num_out, row, y);
  const int64_t skip = (int64_t)done * a->groups * (int64_t)xd_itemsize(a->dtype);
  any_rows(a, codes + done * a->code_bytes, (const char *)scales + skip, (const char *)biases + skip, num_out - done, row,
           y + done);
}

#include "target_end.h"
#endif
