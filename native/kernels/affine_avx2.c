/* affine_avx2.c: affine products with AVX2.

   Theory of operation. `vpmaddubsw` multiplies 32 unsigned bytes (codes) with 32 signed ones (the row's digits) and adds
   pairs. A block of 32 code bytes gives 8 / bits such vectors: shift, mask, multiply; the digits lie in planes to match. Sums
   stay in 16 bits within a group, where they cannot overflow: a pair is at most 2 * 15 * 128 = 3840, and a group adds 4
   of them in a lane when bits are 4, or 4 of 768 when they are 2. `vpmaddwd` then widens them to 32 bits, the high digit
   by 256.

   Single rows (`rows`): 8 groups of one weight row at a time. Their sums lie across lanes; one to six horizontal additions
   bring one group's sum into each lane, which is the order that private.h asks for. In 16 bits where a whole group's sum
   fits, which saves widening each block. Where rows end with half of 8 groups, two of them share the last step.

   A few rows (`few`) and panels (`pack`, `tile`): a transposed panel holds, for 16 output rows side by side, the codes that
   share one 32-bit word of digits, so that a word is broadcast against it and lane = output row: nothing is summed across.
   The 8 partial sums that private.h calls lanes are then 8 phases over the groups. */

#if defined(__x86_64__)

#include "avx2.h"
#include "floats.h"
#include "simd.h"

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

/* 16-bit sums of codes times digits, for one block of 32 bytes of 2- or 4-bit codes. */
XD_INLINE __m256i block_sum(__m256i block, int bits, const int8_t *q) {
  if (bits == 4)
    return _mm256_add_epi16(_mm256_maddubs_epi16(plane(block, 4, 0), load(q)),
                            _mm256_maddubs_epi16(plane(block, 4, 1), load(q + 32)));
  /* The odd planes stay where they are, four times as large, and are shifted once, as sums: one shift instead of three. */
  const __m256i four_times = _mm256_set1_epi8(12), upper = _mm256_srli_epi16(block, 4);
  __m256i even = _mm256_add_epi16(_mm256_maddubs_epi16(plane(block, 2, 0), load(q)),
                                  _mm256_maddubs_epi16(plane(upper, 2, 0), load(q + 64)));
  __m256i odd = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(block, four_times), load(q + 32)),
                                 _mm256_maddubs_epi16(_mm256_and_si256(upper, four_times), load(q + 96)));
  return _mm256_add_epi16(even, _mm256_srai_epi16(odd, 2));
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

XD_INLINE __m256i add_pairs(__m256i a, __m256i b, int narrow) {
  return narrow ? _mm256_hadd_epi16(a, b) : _mm256_hadd_epi32(a, b);
}

XD_INLINE __m256i widened(__m256i sums, int narrow) {
  return narrow ? _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) : sums;
}

/* One sum of 32 bits a group, in order, from the sums of the blocks that hold 8 groups of `group_bytes`. */
XD_INLINE __m256i by_group(const __m256i *v, int group_bytes, int narrow) {
  __m256i low = add_pairs(v[0], v[1], narrow);
  if (group_bytes == 8) /* two blocks of four groups */
    return _mm256_permutevar8x32_epi32(widened(low, narrow), _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
  low = widened(add_pairs(low, add_pairs(v[2], v[3], narrow), narrow), narrow);
  if (group_bytes == 16) /* four blocks of two groups */
    return _mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  __m256i high = add_pairs(add_pairs(v[4], v[5], narrow), add_pairs(v[6], v[7], narrow), narrow);
  high = widened(high, narrow);
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

/* The blocks of 4 groups, of which `num_bytes` exist; the others are zero. Gives their number: 1, 2 or 4. */
XD_INLINE int four_groups(const uint8_t *codes, int bits, int group_size, int two_digits, const int8_t *q,
                          int64_t lo_at, int num_bytes, __m256i *v) {
  const int group_bytes = group_size * bits / 8, at_once = group_bytes > 32 ? group_bytes : 32;
  const int q_step = at_once * (bits == 8 ? 2 : 8 / bits), count = 4 * group_bytes / at_once;
  const int narrow = is_narrow(bits, group_size, two_digits);
#pragma GCC unroll 4
  for (int i = 0; i < count; i++)
    v[i] = i * at_once < num_bytes
               ? blocks_sum(codes + i * at_once, bits, at_once / 32, two_digits, narrow, q + i * q_step, lo_at)
               : _mm256_setzero_si256();
  return count;
}

/* The sums of 8 groups: four at `codes`, whose digits lie at `q`, and four at `others`, `others_q`; of these
   `num_bytes` and `others_bytes` exist. */
XD_INLINE __m256i eight_groups(const uint8_t *codes, const uint8_t *others, int bits, int group_size, int two_digits,
                               const int8_t *q, const int8_t *others_q, int64_t lo_at, int num_bytes, int others_bytes) {
  __m256i v[8];
  const int half = four_groups(codes, bits, group_size, two_digits, q, lo_at, num_bytes, v);
  four_groups(others, bits, group_size, two_digits, others_q, lo_at, others_bytes, v + half);
  return by_group(v, group_size * bits / 8, is_narrow(bits, group_size, two_digits));
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
XD_INLINE void rows(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
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

/* Panels. For each 16 output rows: the planes of each code word, twice 32 bytes each; then scales and biases
   [groups, 32]. */

static float *panel_scales(const xd_affine *a, const void *panel) {
  int64_t bytes = xd_round_up(a->code_bytes, 32) * (8 / a->bits) * (a->bits == 8 ? 2 : 1) * XD_TILE_OUT;
  return (float *)((char *)panel + bytes);
}

/* Eight rows of eight 32-bit words: v[i] becomes word i of every row. */
XD_INLINE void transpose(__m256i v[8]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

/* 32 bytes of a weight row's codes, of which `left` are its own. */
XD_INLINE __m256i load_some(const uint8_t *codes, int64_t left) {
  if (left >= 32) return load(codes);
  _Alignas(32) uint8_t last[32] = {0};
  memcpy(last, codes, (size_t)left);
  return load(last);
}

/* `num_bytes` of the codes of 16 output rows, of which `num_out` exist (the others repeat the last: nobody reads what
   they give). */
XD_INLINE void pack_codes(const xd_affine *a, int bits, const uint8_t *codes, int64_t num_bytes, int num_out,
                          char *panel) {
  const int planes = bits == 8 ? 2 : 8 / bits;
  const uint8_t *row[16];
  for (int n = 0; n < 16; n++) row[n] = codes + (n < num_out ? n : num_out - 1) * a->code_bytes;
  for (int64_t at = 0; at < num_bytes; at += 32, panel += 8 * planes * 64)
    for (int half = 0; half < 2; half++) {
      __m256i v[8];
      for (int n = 0; n < 8; n++) v[n] = load_some(row[8 * half + n] + at, num_bytes - at);
      transpose(v);
      for (int i = 0; i < 8; i++)
        for (int p = 0; p < planes; p++) {
          __m256i part = bits < 8 ? plane(v[i], bits, p)
                         : p      ? _mm256_srli_epi16(v[i], 8)
                                  : _mm256_and_si256(v[i], _mm256_set1_epi16(255));
          _mm256_store_si256((__m256i *)(panel + (i * planes + p) * 64 + 32 * half), part);
        }
    }
}

/* `num_groups` scales or biases of each of 8 output rows, of which `num_out` exist: to[num_groups][stride]. */
static inline void pack_numbers(const xd_affine *a, const void *from, int num_groups, int num_out, float *to,
                                int stride) {
  for (int g = 0; g < num_groups; g += 8) {
    const int count = num_groups - g < 8 ? num_groups - g : 8;
    __m256i v[8];
    for (int n = 0; n < 8; n++) {
      const int64_t row = n < num_out ? n : num_out - 1;
      v[n] = _mm256_castps_si256(numbers_at(from, a->dtype, row * a->groups + g, count));
    }
    transpose(v);
    for (int i = 0; i < count; i++) vf_store(to + (int64_t)(g + i) * stride, _mm256_castsi256_ps(v[i]));
  }
}

static void pack(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                 void *panel) {
  float *s = panel_scales(a, panel), *b = s + (int64_t)a->groups * XD_TILE_OUT;
  const int64_t sixteen = ((char *)s - (char *)panel) / 2, row = (int64_t)a->groups * (int64_t)xd_itemsize(a->dtype);
  for (int n = 0; n < num_out; n += 16) {
    char *to = (char *)panel + n / 16 * sixteen;
    const uint8_t *from = codes + n * a->code_bytes;
    if (a->bits == 2) pack_codes(a, 2, from, a->code_bytes, num_out - n, to);
    if (a->bits == 4) pack_codes(a, 4, from, a->code_bytes, num_out - n, to);
    if (a->bits == 8) pack_codes(a, 8, from, a->code_bytes, num_out - n, to);
  }
  prefetch(codes + num_out * a->code_bytes, num_out * a->code_bytes);
  for (int n = 0; n < num_out; n += 8) {
    pack_numbers(a, (const char *)scales + n * row, a->groups, num_out - n, s + n, XD_TILE_OUT);
    pack_numbers(a, (const char *)biases + n * row, a->groups, num_out - n, b + n, XD_TILE_OUT);
  }
}

/* GCC would add up in trees, for which there are not enough registers: it cannot look through this. */
#define IN_ORDER(v) __asm__("" : "+x"(v))

XD_INLINE __m256i add_products(__m256i sum, int bits, __m256i codes, __m256i word) {
  sum = bits == 8 ? _mm256_add_epi32(sum, _mm256_madd_epi16(codes, word))
                  : _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, word));
  IN_ORDER(sum);
  return sum;
}

/* Sums of one group for 16 output rows and `num` streams of digits. */
XD_INLINE void group_tile(int bits, int num_words, const char *panel, const int8_t *const *q, int num,
                          __m256i sums[][2]) {
  const int planes = bits == 8 ? 2 : 8 / bits; /* a group is whole blocks of 8 words, or lies in one */
  /* 16-bit sums of 4-bit codes hold 8 steps (30720), of 2-bit codes 32, a whole group (24576). */
  const int most = bits == 4 ? 4 : 8, at_once = num_words < most ? num_words : most;
  for (int r = 0; r < num; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int first = 0; first < num_words; first += at_once) {
    const int64_t block = first / 8 * 32 * planes + first % 8 * 4;
    __m256i part[XD_TILE_ROWS][2];
    for (int r = 0; r < num; r++) part[r][0] = part[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int i = 0; i < at_once; i++)
#pragma GCC unroll 4
      for (int p = 0; p < planes; p++) {
        const char *codes = panel + ((first + i) * planes + p) * 64;
        const __m256i left = _mm256_load_si256((const __m256i *)codes);
        const __m256i right = _mm256_load_si256((const __m256i *)(codes + 32));
#pragma GCC unroll 4
        for (int r = 0; r < num; r++) {
          int32_t digits;
          memcpy(&digits, q[r] + block + p * 32 + i * 4, 4);
          const __m256i word = _mm256_set1_epi32(digits);
          part[r][0] = add_products(part[r][0], bits, left, word);
          part[r][1] = add_products(part[r][1], bits, right, word);
        }
      }
    for (int r = 0; r < num; r++)
      for (int h = 0; h < 2; h++) {
        __m256i sum = bits == 8 ? part[r][h] : _mm256_madd_epi16(part[r][h], _mm256_set1_epi16(1));
        sums[r][h] = _mm256_add_epi32(sums[r][h], sum);
      }
  }
}

/* What group g adds to the sums of 16 output rows for each of `num` rows of x. */
XD_INLINE void add_group(int two_digits, const float *scales, const float *biases, const xd_row *rows, int g, int num,
                         __m256i sums[][2], vf acc[][2]) {
  for (int h = 0; h < 2; h++) {
    const vf s = vf_load(scales + 8 * h), b = vf_load(biases + 8 * h);
    for (int r = 0; r < num; r++) {
      __m256i sum = sums[r][h];
      if (two_digits) sum = _mm256_add_epi32(_mm256_slli_epi32(sums[2 * r][h], 8), sums[2 * r + 1][h]);
      acc[r][h] = vf_fma(vf_mul(s, vf_set(rows[r].d[g])), _mm256_cvtepi32_ps(sum), acc[r][h]);
      acc[r][h] = vf_fma(b, vf_set(rows[r].da[g]), acc[r][h]);
    }
  }
}

XD_INLINE void add_lanes(vf lane[XD_LANES][XD_TILE_ROWS][2], int num, float *y) {
  for (int r = 0; r < num; r++)
    for (int h = 0; h < 2; h++) {
      vf even = vf_add(vf_add(lane[0][r][h], lane[4][r][h]), vf_add(lane[2][r][h], lane[6][r][h]));
      vf odd = vf_add(vf_add(lane[1][r][h], lane[5][r][h]), vf_add(lane[3][r][h], lane[7][r][h]));
      vf_store(y + r * XD_TILE_OUT + 8 * h, vf_add(even, odd));
    }
}

/* 16 output rows against `num` rows of x: y[num][XD_TILE_OUT], from its first column on. */
XD_INLINE void tile_sixteen(const xd_affine *a, int bits, int group_size, int two_digits, const char *panel,
                            const float *scales, const float *biases, const xd_row *rows, int num, float *y) {
  const int num_words = group_size * bits / 32, planes = bits == 8 ? 2 : 8 / bits;
  const int streams = two_digits ? 2 * num : num;
  vf lane[XD_LANES][XD_TILE_ROWS][2];
  for (int j = 0; j < XD_LANES; j++) {
    vf acc[XD_TILE_ROWS][2];
    for (int r = 0; r < num; r++) acc[r][0] = acc[r][1] = vf_set(0);
    for (int g = j; g < a->groups; g += XD_LANES) {
      const int word = g * num_words;
      const int64_t at = word / 8 * 32 * planes + word % 8 * 4, column = (int64_t)g * XD_TILE_OUT;
      const int8_t *q[XD_TILE_ROWS];
      __m256i sums[XD_TILE_ROWS][2];
      for (int r = 0; r < streams; r++)
        q[r] = two_digits ? rows[r / 2].q + at + r % 2 * (a->q_bytes / 2) : rows[r].q + at;
      group_tile(bits, num_words, panel + (int64_t)word * planes * 64, q, streams, sums);
      add_group(two_digits, scales + column, biases + column, rows, g, num, sums, acc);
    }
    for (int r = 0; r < num; r++) lane[j][r][0] = acc[r][0], lane[j][r][1] = acc[r][1];
  }
  add_lanes(lane, num, y);
}

/* 16 output rows, of which `num_out` exist, against `num` rows of x without a panel: eight groups at a time are packed to where the
   L1 cache holds them. For rows that are too few to pay for a panel's way to the L2 cache and back. */
XD_INLINE void stream_sixteen(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                              const void *scales, const void *biases, int num_out, const xd_row *rows, int num,
                              float *y) {
  const int num_words = group_size * bits / 32, planes = bits == 8 ? 2 : 8 / bits, streams = two_digits ? 2 * num : num;
  const int64_t size = (int64_t)xd_itemsize(a->dtype), step = (int64_t)group_size * bits;
  _Alignas(64) char packed[8 * 32 * 64 * 2];
  _Alignas(32) float s[XD_LANES * 16], b[XD_LANES * 16];
  vf lane[XD_LANES][XD_TILE_ROWS][2];
  for (int j = 0; j < XD_LANES; j++)
    for (int r = 0; r < num; r++) lane[j][r][0] = lane[j][r][1] = vf_set(0);
  for (int first = 0; first < a->groups; first += XD_LANES) {
    const int count = a->groups - first < XD_LANES ? a->groups - first : XD_LANES;
    const int64_t at = first / XD_LANES * step, q_at = (int64_t)first * group_size * (bits == 8 ? 2 : 1);
    prefetch(codes + 16 * (a->code_bytes + at), 16 * step);
    pack_codes(a, bits, codes + at, count * step / XD_LANES, num_out, packed);
    for (int n = 0; n < 16; n += 8) {
      const int from = n < num_out ? n : 0;
      const int64_t skip = ((int64_t)from * a->groups + first) * size;
      pack_numbers(a, (const char *)scales + skip, count, num_out - from, s + n, 16);
      pack_numbers(a, (const char *)biases + skip, count, num_out - from, b + n, 16);
    }
    for (int j = 0; j < count; j++) {
      const int word = j * num_words;
      const int64_t in_q = q_at + word / 8 * 32 * planes + word % 8 * 4;
      const int8_t *q[XD_TILE_ROWS];
      __m256i sums[XD_TILE_ROWS][2];
      for (int r = 0; r < streams; r++)
        q[r] = two_digits ? rows[r / 2].q + in_q + r % 2 * (a->q_bytes / 2) : rows[r].q + in_q;
      group_tile(bits, num_words, packed + (int64_t)word * planes * 64, q, streams, sums);
      add_group(two_digits, s + 16 * j, b + 16 * j, rows, first + j, num, sums, lane[j]);
    }
  }
  add_lanes(lane, num, y);
}

/* Four streams of digits are what the registers hold: four rows of one digit, or two rows of two. Where rows are
   missing, the last one is computed again: nobody reads that. */
XD_INLINE void tile(const xd_affine *a, int bits, int group_size, int two_digits, const void *panel,
                    const xd_row *given, int num, float *y) {
  const float *s = panel_scales(a, panel), *b = s + (int64_t)a->groups * XD_TILE_OUT;
  const int64_t sixteen = ((const char *)s - (const char *)panel) / 2;
  xd_row rows[XD_TILE_ROWS];
  for (int r = 0; r < XD_TILE_ROWS; r++) rows[r] = given[r < num ? r : num - 1];
  const int at_once = two_digits || num <= 2 ? 2 : 4;
  for (int first = 0; first < num; first += at_once)
    for (int n = 0; n < XD_TILE_OUT; n += 16) {
      const char *codes = (const char *)panel + n / 16 * sixteen;
      float *to = y + first * XD_TILE_OUT + n;
      if (at_once == 4 && !two_digits)
        tile_sixteen(a, bits, group_size, 0, codes, s + n, b + n, rows + first, 4, to);
      else
        tile_sixteen(a, bits, group_size, two_digits, codes, s + n, b + n, rows + first, 2, to);
    }
}

/* Up to four rows of x, two at a time if these have two digits. Where rows are missing, the last is computed again. */
XD_INLINE void few(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                   const void *scales, const void *biases, int num_out, const xd_row *given, int num, float *y) {
  xd_row rows[XD_TILE_ROWS];
  for (int r = 0; r < XD_TILE_ROWS; r++) rows[r] = given[r < num ? r : num - 1];
  if (num > 2 && !two_digits) {
    stream_sixteen(a, bits, group_size, 0, codes, scales, biases, num_out, rows, 4, y);
    return;
  }
  for (int r = 0; r < num; r += 2)
    stream_sixteen(a, bits, group_size, two_digits, codes, scales, biases, num_out, rows + r, 2, y + r * XD_TILE_OUT);
}

/* One function for each format, so that all its loops have known lengths. */
#define FORMAT(bits, group, digits)                                                                              \
  static void rows_##bits##_##group##_##digits(const xd_affine *a, const uint8_t *c, const void *s, const void *b, \
                                               int n, const xd_row *row, float *y) {                             \
    rows(a, bits, group, digits, c, s, b, n, row, y);                                                            \
  }                                                                                                              \
  static void few_##bits##_##group##_##digits(const xd_affine *a, const uint8_t *c, const void *s, const void *b,  \
                                              int n, const xd_row *r, int num, float *y) {                       \
    few(a, bits, group, digits, c, s, b, n, r, num, y);                                                          \
  }                                                                                                              \
  static void tile_##bits##_##group##_##digits(const xd_affine *a, const void *panel, const xd_row *r, int num,   \
                                               float *y) {                                                       \
    tile(a, bits, group, digits, panel, r, num, y);                                                              \
  }
#define FORMATS(bits, digits) FORMAT(bits, 32, digits) FORMAT(bits, 64, digits) FORMAT(bits, 128, digits)
FORMATS(2, 0)
FORMATS(2, 1)
FORMATS(4, 0)
FORMATS(4, 1)
FORMATS(8, 0) /* one kernel for both: its digits are 16 bits wide anyway */

typedef void (*rows_function)(const xd_affine *, const uint8_t *, const void *, const void *, int, const xd_row *,
                              float *);
typedef void (*few_function)(const xd_affine *, const uint8_t *, const void *, const void *, int, const xd_row *, int,
                             float *);
typedef void (*tile_function)(const xd_affine *, const void *, const xd_row *, int, float *);
#define NAMES(kind, bits, digits) \
  { kind##_##bits##_32_##digits, kind##_##bits##_64_##digits, kind##_##bits##_128_##digits }

static int format_of(const xd_affine *a) {
  return a->bits == 8 ? 4 : a->bits / 2 - 1 + 2 * a->two_digits;
}

static int size_of(const xd_affine *a) {
  return a->group_size == 32 ? 0 : a->group_size == 64 ? 1 : 2;
}

static void any_rows(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                     const xd_row *row, float *y) {
  static const rows_function functions[5][3] = {NAMES(rows, 2, 0), NAMES(rows, 4, 0), NAMES(rows, 2, 1),
                                                NAMES(rows, 4, 1), NAMES(rows, 8, 0)};
  functions[format_of(a)][size_of(a)](a, codes, scales, biases, num_out, row, y);
}

static void any_few(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                    const xd_row *rows, int num_rows, float y[XD_TILE_ROWS][XD_TILE_OUT]) {
  static const few_function functions[5][3] = {NAMES(few, 2, 0), NAMES(few, 4, 0), NAMES(few, 2, 1), NAMES(few, 4, 1),
                                               NAMES(few, 8, 0)};
  functions[format_of(a)][size_of(a)](a, codes, scales, biases, num_out, rows, num_rows, &y[0][0]);
}

static void any_tile(const xd_affine *a, const void *panel, const xd_row *rows, int num_rows,
                     float y[XD_TILE_ROWS][XD_TILE_OUT]) {
  static const tile_function functions[5][3] = {NAMES(tile, 2, 0), NAMES(tile, 4, 0), NAMES(tile, 2, 1),
                                                NAMES(tile, 4, 1), NAMES(tile, 8, 0)};
  functions[format_of(a)][size_of(a)](a, panel, rows, num_rows, &y[0][0]);
}

#include "target_end.h"

const xd_isa *xd_isa_avx2(void) {
  static const xd_isa isa = {.name = "avx2", .floats = &xd_floats_avx2,
                             .round_row = xd_round_row_avx2,
                             .affine_rows = any_rows,
                             .affine_few = any_few,
                             .affine_pack = pack,
                             .affine_tile = any_tile};
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &isa
                                                                                                           : NULL;
}

#else
#include "private.h"
const xd_isa *xd_isa_avx2(void) {
  return NULL;
}
#endif
