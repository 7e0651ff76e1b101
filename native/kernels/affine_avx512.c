/* affine_avx512.c: affine products with AVX-512's VNNI.

   Theory of operation. `vpdpbusd` multiplies unsigned bytes (codes) with signed ones (digits) and adds fours to 32-bit
   sums: what takes AVX2 a multiplication, an addition and, later, a widening. `vpdpwssd` does the same for pairs of
   16-bit numbers, which is what 8-bit codes meet. Sums of two digits: the high one's is shifted by 8, the low one's
   added.

   Single rows: what decoding reads most has a loop of its own (affine_avx512_rows.c). All other formats go as in
   affine_avx2_rows.c, 32 bytes at a time (`rows`): q's planes are that wide. Masked loads end a row.

   Panels (`pack`, `tile`): 32 output rows lie side by side in two vectors of 16 words, of four codes each; a word of
   digits is broadcast against both. With four rows of x that is 8 sums and 8 float sums of one lane, in 32 registers.
   The groups of a panel lie in the order of private.h's lanes (0, 8, 16, ..., 1, 9, ...), so that `tile` reads it from
   front to back.

   Rows of x become integers by AVX2's function: every processor with AVX-512 has it. */

#if defined(__x86_64__)

#include "avx512.h"
#include "simd.h"
#include "affine_avx512.h"

/* Products. */

XD_INLINE __mmask32 first_bits(int64_t n) {
  return n >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << n) - 1;
}

/* 32 code bytes, of which `left` exist. */
XD_INLINE __m256i load_some(const uint8_t *codes, int64_t left) {
  if (left >= 32) return _mm256_loadu_si256((const __m256i *)(const void *)codes);
  return _mm256_maskz_loadu_epi8(first_bits(left), codes);
}

/* Codes that meet plane `p`: bytes of 2 or 4 bits, 16-bit numbers of 8. A shift by 16-bit numbers brings in bits of a
   neighbour, which the mask takes away. */
XD_INLINE __m256i plane(__m256i block, int bits, int p) {
  const __m256i mask = bits == 8 ? _mm256_set1_epi16(255) : _mm256_set1_epi8((char)((1 << bits) - 1));
  return _mm256_and_si256(_mm256_srli_epi16(block, p * bits), mask);
}

XD_INLINE __m256i add_products(__m256i sum, int bits, __m256i codes, const int8_t *q) {
  const __m256i digits = _mm256_loadu_si256((const __m256i *)(const void *)q);
  return bits == 8 ? _mm256_dpwssd_epi32(sum, codes, digits) : _mm256_dpbusd_epi32(sum, codes, digits);
}

/* Sums of `num` blocks (1, 2 or 4) of 32 code bytes which belong to the same groups; of them `left` bytes exist. */
XD_INLINE __m256i blocks_sum(const uint8_t *codes, int bits, int num, int two_digits, const int8_t *q, int64_t lo_at,
                             int64_t left) {
  const int planes = bits == 8 ? 2 : 8 / bits;
  __m256i hi = _mm256_setzero_si256(), lo = hi;
  for (int i = 0; i < num; i++, q += 32 * planes) {
    const __m256i block = load_some(codes + 32 * i, left - 32 * i);
    for (int p = 0; p < planes; p++) {
      const __m256i some = plane(block, bits, p);
      hi = add_products(hi, bits, some, q + 32 * p);
      if (two_digits) lo = add_products(lo, bits, some, q + lo_at + 32 * p);
    }
  }
  return two_digits ? _mm256_add_epi32(_mm256_slli_epi32(hi, 8), lo) : hi;
}

/* One sum a group, in order, from the sums of the blocks that hold 8 groups of `group_bytes`. */
XD_INLINE __m256i by_group(const __m256i *v, int group_bytes) {
  if (group_bytes == 8) { /* two blocks of four groups */
    const __m256i h = _mm256_hadd_epi32(v[0], v[1]);
    return _mm256_permutevar8x32_epi32(h, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
  }
  const __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  if (group_bytes == 16) /* four blocks of two groups */
    return _mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

/* The sums of 8 groups, of which `num_bytes` code bytes exist; those of the others are zero. */
XD_INLINE __m256i eight_groups(const uint8_t *codes, int bits, int group_size, int two_digits, const int8_t *q,
                               int64_t lo_at, int num_bytes) {
  const int group_bytes = group_size * bits / 8, at_once = group_bytes > 32 ? group_bytes : 32;
  const int q_step = at_once * (bits == 8 ? 2 : 8 / bits);
  __m256i v[8];
  for (int i = 0; i < 8 * group_bytes / at_once; i++) {
    v[i] = _mm256_setzero_si256();
    if (i * at_once < num_bytes)
      v[i] = blocks_sum(codes + i * at_once, bits, at_once / 32, two_digits, q + i * q_step, lo_at,
                        num_bytes - i * at_once);
  }
  return by_group(v, group_bytes);
}

/* Eight scales or biases, of which `count` exist. The others are -0: it alone changes no sum, not even -0. */
XD_INLINE vf numbers_at(const void *from, int dtype, int64_t at, int count) {
  if (count >= 8) return vf_load_any(from, dtype, at);
  const __mmask8 mask = (__mmask8)first_bits(count);
  if (dtype == XD_FLOAT32) return _mm256_mask_loadu_ps(_mm256_set1_ps(-0.0f), mask, (const float *)from + at);
  const __m128i some = _mm_mask_loadu_epi16(_mm_set1_epi16(INT16_MIN), mask, (const uint16_t *)from + at);
  return dtype == XD_BFLOAT16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(some), 16))
                              : _mm256_cvtph_ps(some);
}

XD_INLINE void rows(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                    const void *scales, const void *biases, int num_out, const xd_row *row, float *y) {
  const int code_step = group_size * bits, q_step = 8 * group_size * (bits == 8 ? 2 : 1);
  for (int n = 0; n < num_out; n++) {
    const uint8_t *c = codes + n * a->code_bytes;
    const int8_t *q = row->q;
    vf acc = vf_set(0);
    for (int g = 0; g < a->groups; g += 8, c += code_step, q += q_step) {
      const int left = a->groups - g, count = left < 8 ? left : 8;
      const int64_t at = (int64_t)n * a->groups + g;
      __m256i sums;
      if (count == 8)
        sums = eight_groups(c, bits, group_size, two_digits, q, a->q_bytes / 2, code_step);
      else
        sums = eight_groups(c, bits, group_size, two_digits, q, a->q_bytes / 2, count * group_size * bits / 8);
      const vf s = numbers_at(scales, a->dtype, at, count), b = numbers_at(biases, a->dtype, at, count);
      acc = vf_fma(vf_mul(s, vf_load(row->d + g)), _mm256_cvtepi32_ps(sums), acc);
      acc = vf_fma(b, vf_load(row->da + g), acc);
    }
    y[n] = vf_sum(acc);
  }
}

#include "affine_formats.inc.h"

static void affine_rows(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                        const xd_row *row, float *y) {
  const int done = xd_few_bits_rows_avx512(a, codes, scales, biases, num_out, row, y);
  const int64_t skip = (int64_t)done * a->groups * (int64_t)xd_itemsize(a->dtype);
  any_rows(a, codes + done * a->code_bytes, (const char *)scales + skip, (const char *)biases + skip, num_out - done, row,
           y + done);
}

/* Panels. Group by group, word by word of the codes, plane by plane: 32 output rows. Then scales and biases
   [groups, XD_TILE_OUT], in the groups' natural order. */

static float *panel_scales(const xd_affine *a, const void *panel) {
  const int64_t words = (int64_t)a->groups * a->group_size / (a->bits == 8 ? 2 : 4);
  return (float *)((char *)panel + words * 4 * XD_TILE_OUT);
}

/* Where lane `lane` begins in the order of the groups in a panel. */
static int64_t lane_start(const xd_affine *a, int lane) {
  const int more = a->groups % XD_LANES;
  return (int64_t)a->groups / XD_LANES * lane + (lane < more ? lane : more);
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

/* The codes of 16 output rows, of which `num_out` exist (the others repeat the last: nobody reads what they give): every
   second 64 bytes of a panel. */
XD_INLINE void pack_codes(const xd_affine *a, int bits, const uint8_t *codes, int num_out, char *panel) {
  const int planes = bits == 8 ? 2 : 8 / bits, num_words = a->group_size * bits / 32;
  const int step = num_words < 8 ? num_words : 8; /* words of one group in a block */
  const uint8_t *row[16];
  for (int n = 0; n < 16; n++) row[n] = codes + (n < num_out ? n : num_out - 1) * a->code_bytes;
  for (int64_t at = 0; at < a->code_bytes; at += 32) {
    __m256i v[2][8];
    for (int n = 0; n < 16; n++) v[n / 8][n % 8] = load_some(row[n] + at, a->code_bytes - at);
    transpose(v[0]), transpose(v[1]);
    for (int64_t i = 0; i < 8 && at + 4 * i < a->code_bytes; i += step) {
      const int64_t word = at / 4 + i, g = word / num_words;
      char *to = panel + ((lane_start(a, (int)(g % XD_LANES)) + g / XD_LANES) * num_words + word % num_words) * planes * 128;
      for (int64_t k = i; k < i + step; k++)
        for (int p = 0; p < planes; p++, to += 128) {
          const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(v[0][k]), v[1][k], 1);
          _mm512_store_si512((void *)to, plane512(both, bits, p));
        }
    }
  }
}

/* Scales or biases of 8 output rows, of which `num_out` exist: to [groups, XD_TILE_OUT], eight columns of it. */
static void pack_numbers(const xd_affine *a, const void *from, int num_out, float *to) {
  for (int g = 0; g < a->groups; g += 8) {
    const int count = a->groups - g < 8 ? a->groups - g : 8;
    __m256i v[8];
    for (int n = 0; n < 8; n++) {
      const int64_t row = n < num_out ? n : num_out - 1;
      v[n] = _mm256_castps_si256(numbers_at(from, a->dtype, row * a->groups + g, count));
    }
    transpose(v);
    for (int i = 0; i < count; i++) vf_store(to + (int64_t)(g + i) * XD_TILE_OUT, _mm256_castsi256_ps(v[i]));
  }
}

static void pack(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                 void *panel) {
  float *s = panel_scales(a, panel), *b = s + (int64_t)a->groups * XD_TILE_OUT;
  const int64_t row = (int64_t)a->groups * (int64_t)xd_itemsize(a->dtype);
  for (int n = 0; n < XD_TILE_OUT; n += 16) {
    const int first = n < num_out ? n : num_out - 1;
    char *to = (char *)panel + n / 16 * 64;
    const uint8_t *from = codes + first * a->code_bytes;
    if (a->bits == 2) pack_codes(a, 2, from, num_out - first, to);
    if (a->bits == 4) pack_codes(a, 4, from, num_out - first, to);
    if (a->bits == 8) pack_codes(a, 8, from, num_out - first, to);
  }
  for (int n = 0; n < XD_TILE_OUT; n += 8) {
    const int first = n < num_out ? n : num_out - 1;
    pack_numbers(a, (const char *)scales + first * row, num_out - first, s + n);
    pack_numbers(a, (const char *)biases + first * row, num_out - first, b + n);
  }
}

/* GCC would copy the sums to other registers and back for each word: it cannot look through this. */
#if defined(XD_SIMDE)
#define IN_PLACE(v) (void)(v)
#else
#define IN_PLACE(v) __asm__("" : "+v"(v))
#endif

/* Add what `num` streams of digits from `at` on give with one group's codes, for 32 output rows. */
XD_INLINE void add_group(int bits, int num_words, const char *panel, const xd_row *rows, int64_t at, int num,
                         __m512i sums[XD_TILE_ROWS][2]) {
  const int planes = bits == 8 ? 2 : 8 / bits;
  for (int i = 0; i < num_words; i++)
    for (int p = 0; p < planes; p++, panel += 128) {
      const __m512i left = _mm512_load_si512(panel), right = _mm512_load_si512(panel + 64);
      for (int r = 0; r < num; r++) {
        int32_t word;
        memcpy(&word, rows[r].q + at + i / 8 * 32 * planes + p * 32 + i % 8 * 4, 4);
        const __m512i digits = _mm512_set1_epi32(word);
        sums[r][0] = bits == 8 ? _mm512_dpwssd_epi32(sums[r][0], left, digits)
                               : _mm512_dpbusd_epi32(sums[r][0], left, digits);
        sums[r][1] = bits == 8 ? _mm512_dpwssd_epi32(sums[r][1], right, digits)
                               : _mm512_dpbusd_epi32(sums[r][1], right, digits);
        IN_PLACE(sums[r][0]);
        IN_PLACE(sums[r][1]);
      }
    }
}

/* Sums of one group, whose first digits are `at` in q, for 32 output rows and `num` rows of x. */
XD_INLINE void group_tile(const xd_affine *a, int bits, const char *panel, int64_t at, const xd_row *rows, int num,
                          __m512i sums[XD_TILE_ROWS][2]) {
  const int num_words = a->group_size * bits / 32;
  for (int r = 0; r < num; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
  add_group(bits, num_words, panel, rows, at, num, sums);
  if (bits == 8 || !a->two_digits) return;
  for (int r = 0; r < num; r++) /* what the high digit gave, times 256 */
    for (int h = 0; h < 2; h++) sums[r][h] = _mm512_slli_epi32(sums[r][h], 8);
  add_group(bits, num_words, panel, rows, at + a->q_bytes / 2, num, sums);
}

/* `num` rows of x against a panel: y[num][XD_TILE_OUT]. */
XD_INLINE void tile(const xd_affine *a, int bits, const char *panel, const xd_row *rows, int num, float *y) {
  const int planes = bits == 8 ? 2 : 8 / bits, num_words = a->group_size * bits / 32;
  const float *scales = panel_scales(a, panel), *biases = scales + (int64_t)a->groups * XD_TILE_OUT;
  __m512 lane[XD_LANES][XD_TILE_ROWS][2];
  for (int j = 0; j < XD_LANES; j++) {
    __m512 acc[XD_TILE_ROWS][2];
    for (int r = 0; r < num; r++) acc[r][0] = acc[r][1] = _mm512_set1_ps(0);
    for (int g = j; g < a->groups; g += XD_LANES, panel += (int64_t)num_words * planes * 128) {
      const int64_t word = (int64_t)g * num_words;
      __m512i sums[XD_TILE_ROWS][2];
      group_tile(a, bits, panel, word / 8 * 32 * planes + word % 8 * 4, rows, num, sums);
      for (int h = 0; h < 2; h++) {
        const __m512 s = _mm512_loadu_ps(scales + (int64_t)g * XD_TILE_OUT + 16 * h);
        const __m512 b = _mm512_loadu_ps(biases + (int64_t)g * XD_TILE_OUT + 16 * h);
        for (int r = 0; r < num; r++) {
          const __m512 sd = _mm512_mul_ps(s, _mm512_set1_ps(rows[r].d[g]));
          acc[r][h] = _mm512_fmadd_ps(sd, _mm512_cvtepi32_ps(sums[r][h]), acc[r][h]);
          acc[r][h] = _mm512_fmadd_ps(b, _mm512_set1_ps(rows[r].da[g]), acc[r][h]);
        }
      }
    }
    for (int r = 0; r < num; r++) lane[j][r][0] = acc[r][0], lane[j][r][1] = acc[r][1];
  }
  for (int r = 0; r < num; r++)
    for (int h = 0; h < 2; h++) {
      __m512 l[XD_LANES];
      for (int j = 0; j < XD_LANES; j++) l[j] = lane[j][r][h];
      const __m512 even = _mm512_add_ps(_mm512_add_ps(l[0], l[4]), _mm512_add_ps(l[2], l[6]));
      const __m512 odd = _mm512_add_ps(_mm512_add_ps(l[1], l[5]), _mm512_add_ps(l[3], l[7]));
      _mm512_storeu_ps(y + r * XD_TILE_OUT + 16 * h, _mm512_add_ps(even, odd));
    }
}

/* One function for each number of bits and of rows. */
#define TILE(bits, num)                                                                                    \
  static void tile_##bits##_##num(const xd_affine *a, const char *panel, const xd_row *rows, float *y) {   \
    tile(a, bits, panel, rows, num, y);                                                                    \
  }
#define TILES(bits) TILE(bits, 1) TILE(bits, 2) TILE(bits, 3) TILE(bits, 4)
TILES(2)
TILES(4)
TILES(8)

static void any_tile(const xd_affine *a, const void *panel, const xd_row *rows, int num_rows,
                     float y[XD_TILE_ROWS][XD_TILE_OUT]) {
  static void (*const functions[3][4])(const xd_affine *, const char *, const xd_row *, float *) = {
      {tile_2_1, tile_2_2, tile_2_3, tile_2_4},
      {tile_4_1, tile_4_2, tile_4_3, tile_4_4},
      {tile_8_1, tile_8_2, tile_8_3, tile_8_4}};
  functions[a->bits == 2 ? 0 : a->bits == 4 ? 1 : 2][num_rows - 1](a, panel, rows, &y[0][0]);
}

#include "target_end.h"

#include "floats.h"

static int is_able(void) { /* GCC and clang ask the system as well: it must save the registers */
#if defined(XD_SIMDE)
  return xd_isa_avx2() != NULL;
#else
  return xd_isa_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#endif
}

const xd_isa *xd_isa_avx512(void) {
  static const xd_isa isa = {.name = "avx512", .parts = 4,
                             .floats = &xd_floats_avx2,
                             .round_row = xd_round_row_avx2,
                             .affine_rows = affine_rows,
                             .affine_pack = pack,
                             .affine_tile = any_tile};
  return is_able() ? &isa : NULL;
}

#else
#include "private.h"
const xd_isa *xd_isa_avx512(void) {
  return NULL;
}
#endif
