/* affine_avx2.c: affine products with AVX2.

   Theory of operation. `vpmaddubsw` multiplies 32 unsigned bytes (codes) with 32 signed ones (the row's digits) and adds
   pairs. A block of 32 code bytes gives 8 / bits such vectors: shift, mask, multiply; the digits lie in planes to match. Sums
   stay in 16 bits within a group, where they cannot overflow: a pair is at most 2 * 15 * 128 = 3840, and a group adds 4
   of them in a lane when bits are 4, or 4 of 768 when they are 2. `vpmaddwd` then widens them to 32 bits, the high digit
   by 256.

   Single rows are in affine_avx2_rows.c.

   A few rows (`few`) and panels (`pack`, `tile`): a transposed panel holds, for 16 output rows side by side, the codes that
   share one 32-bit word of digits, so that a word is broadcast against it and lane = output row: nothing is summed across.
   The 8 partial sums that private.h calls lanes are then 8 phases over the groups. */

#if defined(__x86_64__)

#include "avx2.h"
#include "floats.h"
#include "simd.h"
#include "affine_avx2.h"

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
  static const xd_isa isa = {.name = "avx2", .parts = 1, .floats = &xd_floats_avx2,
                             .round_row = xd_round_row_avx2,
                             .affine_rows = xd_affine_rows_avx2,
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
