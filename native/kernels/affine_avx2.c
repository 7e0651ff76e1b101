/* affine_avx2.c: affine products with AVX2.

   Theory of operation. `vpmaddubsw` multiplies 32 unsigned bytes (codes) with 32 signed ones (the row's digits) and adds
   pairs. A block of 32 code bytes gives 8 / bits such vectors: shift, mask, multiply; the digits lie in planes to match. Sums
   stay in 16 bits within a group, where they cannot overflow: a pair is at most 2 * 15 * 128 = 3840, and a group adds 4
   of them in a lane when bits are 4, or 4 of 768 when they are 2. `vpmaddwd` then widens them to 32 bits, the high digit
   by 256.

   Single rows (`rows`): 8 groups of one weight row at a time. Their sums lie across lanes; three to seven `vphaddd` bring
   one group's sum into each lane, which is the order that private.h asks for.

   Panels (`pack`, `tile`): a transposed panel holds, for 8 output rows side by side, the codes that share one 32-bit word
   of digits, so that a word is broadcast against it and lane = output row: nothing is summed across. The 8 partial sums that
   private.h calls lanes are then 8 phases over the groups. */

#if defined(__x86_64__)

#include "avx2.h"
#include "simd.h"

/* Codes of a block of 32 bytes that meet plane `p`. */
XD_INLINE __m256i plane(__m256i block, int bits, int p) {
  return _mm256_and_si256(_mm256_srli_epi16(block, p * bits), _mm256_set1_epi8((char)((1 << bits) - 1)));
}

XD_INLINE __m256i load(const void *p) {
  return _mm256_loadu_si256(p);
}

/* 16-bit sums of codes times digits, for one block of 32 bytes of 2- or 4-bit codes. */
XD_INLINE __m256i block_sum(__m256i block, int bits, const int8_t *q) {
  __m256i sum = _mm256_maddubs_epi16(plane(block, bits, 0), load(q));
  for (int p = 1; p < 8 / bits; p++)
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(plane(block, bits, p), load(q + 32 * p)));
  return sum;
}

/* 32-bit sums of `num` blocks (1, 2 or 4) of 32 code bytes which belong to the same groups. */
XD_INLINE __m256i blocks_sum(const uint8_t *codes, int bits, int num, int two_digits, const int8_t *q,
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
  __m256i one = _mm256_madd_epi16(two_digits ? lo : hi, _mm256_set1_epi16(1));
  return two_digits ? _mm256_add_epi32(one, _mm256_madd_epi16(hi, _mm256_set1_epi16(256))) : one;
}

/* One sum a group, in order, from the sums of the blocks that hold 8 groups of `group_bytes`. */
XD_INLINE __m256i by_group(const __m256i *v, int group_bytes) {
  if (group_bytes == 8) { /* two blocks of four groups */
    __m256i h = _mm256_hadd_epi32(v[0], v[1]);
    return _mm256_permutevar8x32_epi32(h, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
  }
  __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  if (group_bytes == 16) /* four blocks of two groups */
    return _mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

/* The sums of 8 groups; of `num_bytes` code bytes only, the other groups are zero. */
XD_INLINE __m256i eight_groups(const uint8_t *codes, int bits, int group_size, int two_digits, const int8_t *q,
                               int64_t lo_at, int num_bytes) {
  const int group_bytes = group_size * bits / 8, at_once = group_bytes > 32 ? group_bytes : 32;
  const int q_step = at_once * (bits == 8 ? 2 : 8 / bits);
  __m256i v[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8 * group_bytes / at_once; i++)
    v[i] = i * at_once < num_bytes
               ? blocks_sum(codes + i * at_once, bits, at_once / 32, two_digits, q + i * q_step, lo_at)
               : _mm256_setzero_si256();
  return by_group(v, group_bytes);
}

XD_INLINE vf accumulate(vf acc, __m256i sums, const void *scales, const void *biases, int dtype, int64_t at,
                        const float *d, const float *da) {
  acc = vf_fma(vf_mul(vf_load_any(scales, dtype, at), vf_load(d)), _mm256_cvtepi32_ps(sums), acc);
  return vf_fma(vf_load_any(biases, dtype, at), vf_load(da), acc);
}

/* The groups after the last full eight, copied so that nothing beyond the row is read. */
XD_INLINE vf last_groups(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                         const void *scales, const void *biases, int64_t at, int g, const xd_row *row, vf acc) {
  const int left = a->groups - g, num_bytes = left * group_size * bits / 8, size = a->dtype == XD_FLOAT32 ? 4 : 2;
  _Alignas(32) uint8_t padded[1024];
  _Alignas(32) char s[32] = {0}, b[32] = {0};
  memcpy(padded, codes, (size_t)num_bytes);
  memset(padded + num_bytes, 0, 32);
  memcpy(s, (const char *)scales + (at + g) * size, (size_t)(left * size));
  memcpy(b, (const char *)biases + (at + g) * size, (size_t)(left * size));
  const int8_t *q = row->q + (int64_t)g * group_size * (bits == 8 ? 2 : 1);
  __m256i sums = eight_groups(padded, bits, group_size, two_digits, q, a->q_bytes / 2, num_bytes);
  return accumulate(acc, sums, s, b, a->dtype, 0, row->d + g, row->da + g);
}

XD_INLINE void rows(const xd_affine *a, int bits, int group_size, int two_digits, const uint8_t *codes,
                    const void *scales, const void *biases, int num_out, const xd_row *row, float *y) {
  const int code_step = group_size * bits, q_step = 8 * group_size * (bits == 8 ? 2 : 1);
  for (int n = 0; n < num_out; n++) {
    const uint8_t *c = codes + n * a->code_bytes;
    const int8_t *q = row->q;
    const int64_t at = (int64_t)n * a->groups;
    vf acc = vf_set(0);
    int g = 0;
    for (; g + 8 <= a->groups; g += 8, c += code_step, q += q_step) {
      __m256i sums = eight_groups(c, bits, group_size, two_digits, q, a->q_bytes / 2, code_step);
      acc = accumulate(acc, sums, scales, biases, a->dtype, at + g, row->d + g, row->da + g);
    }
    if (g < a->groups) acc = last_groups(a, bits, group_size, two_digits, c, scales, biases, at, g, row, acc);
    y[n] = vf_sum(acc);
  }
}

/* Panels. For each 8 output rows: the planes of each code word, 32 bytes each; then scales and biases [groups, 32]. */

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

XD_INLINE void pack_eight(const xd_affine *a, int bits, const uint8_t *codes, int num_out, char *panel) {
  const int planes = bits == 8 ? 2 : 8 / bits;
  for (int64_t at = 0; at < a->code_bytes; at += 32) {
    __m256i v[8];
    int64_t left = a->code_bytes - at;
    for (int n = 0; n < 8; n++) {
      _Alignas(32) uint8_t last[32] = {0};
      const uint8_t *from = codes + n * a->code_bytes + at;
      if (n < num_out && left < 32) memcpy(last, from, (size_t)left);
      v[n] = load(n < num_out && left >= 32 ? from : last);
    }
    transpose(v);
    for (int i = 0; i < 8; i++)
      for (int p = 0; p < planes; p++, panel += 32) {
        __m256i codes_of_plane = bits < 8 ? plane(v[i], bits, p)
                                 : p      ? _mm256_srli_epi16(v[i], 8)
                                          : _mm256_and_si256(v[i], _mm256_set1_epi16(255));
        _mm256_store_si256((__m256i *)panel, codes_of_plane);
      }
  }
}

static void pack(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                 void *panel) {
  float *s = panel_scales(a, panel), *b = s + (int64_t)a->groups * XD_TILE_OUT;
  const int64_t eight = ((char *)s - (char *)panel) / 4;
  for (int n = 0; n < XD_TILE_OUT; n += 8) {
    char *to = (char *)panel + n / 8 * eight;
    const uint8_t *from = codes + (n < num_out ? n : 0) * a->code_bytes;
    if (a->bits == 2) pack_eight(a, 2, from, num_out - n, to);
    if (a->bits == 4) pack_eight(a, 4, from, num_out - n, to);
    if (a->bits == 8) pack_eight(a, 8, from, num_out - n, to);
  }
  for (int n = 0; n < XD_TILE_OUT; n++)
    for (int g = 0; g < a->groups; g++) {
      float pair[2] = {0, 0};
      size_t size = xd_itemsize(a->dtype), at = ((size_t)n * (size_t)a->groups + (size_t)g) * size;
      if (n < num_out) xd_widen((const char *)scales + at, a->dtype, pair, 1);
      if (n < num_out) xd_widen((const char *)biases + at, a->dtype, pair + 1, 1);
      s[(int64_t)g * XD_TILE_OUT + n] = pair[0], b[(int64_t)g * XD_TILE_OUT + n] = pair[1];
    }
}

/* Sums of one group for 8 output rows and `num` rows of x. */
XD_INLINE void group_tile(int bits, int two_digits, int num_words, const char *panel, const int8_t *const *q, int num,
                          int64_t lo_at, __m256i *sums) {
  const int planes = bits == 8 ? 2 : 8 / bits; /* a group is whole blocks, or lies in one */
  /* 16-bit sums of 4-bit codes hold 8 steps (30720), of 2-bit codes a whole group (24576). */
  const int words_at_once = bits == 4 && num_words > 4 ? 4 : num_words;
  for (int r = 0; r < num; r++) sums[r] = _mm256_setzero_si256();
  for (int first = 0; first < num_words; first += words_at_once) {
    __m256i hi[XD_TILE_ROWS], lo[XD_TILE_ROWS];
    for (int r = 0; r < num; r++) hi[r] = lo[r] = _mm256_setzero_si256();
    for (int i = first; i < first + words_at_once; i++)
      for (int p = 0; p < planes; p++) {
        __m256i codes = _mm256_load_si256((const __m256i *)(panel + (i * planes + p) * 32));
        const int at = i / 8 * 32 * planes + p * 32 + i % 8 * 4;
        for (int r = 0; r < num; r++) {
          int32_t word, low = 0;
          memcpy(&word, q[r] + at, 4);
          if (two_digits && bits < 8) memcpy(&low, q[r] + lo_at + at, 4);
          if (bits == 8) {
            hi[r] = _mm256_add_epi32(hi[r], _mm256_madd_epi16(codes, _mm256_set1_epi32(word)));
            continue;
          }
          hi[r] = _mm256_add_epi16(hi[r], _mm256_maddubs_epi16(codes, _mm256_set1_epi32(word)));
          if (two_digits) lo[r] = _mm256_add_epi16(lo[r], _mm256_maddubs_epi16(codes, _mm256_set1_epi32(low)));
        }
      }
    for (int r = 0; r < num; r++) {
      if (bits == 8) {
        sums[r] = _mm256_add_epi32(sums[r], hi[r]);
        continue;
      }
      const __m256i one = _mm256_set1_epi16(1), high = _mm256_set1_epi16(256);
      sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(two_digits ? lo[r] : hi[r], one));
      if (two_digits) sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(hi[r], high));
    }
  }
}

/* 8 output rows against `num` rows of x: y[num][XD_TILE_OUT], from its first column on. */
XD_INLINE void tile_eight(const xd_affine *a, int bits, int group_size, int two_digits, const char *panel,
                          const float *scales, const float *biases, const xd_row *rows, int num, float *y) {
  const int num_words = group_size * bits / 32, planes = bits == 8 ? 2 : 8 / bits;
  vf lane[XD_LANES][XD_TILE_ROWS];
  for (int j = 0; j < XD_LANES; j++) {
    vf acc[XD_TILE_ROWS];
    for (int r = 0; r < num; r++) acc[r] = vf_set(0);
    for (int g = j; g < a->groups; g += XD_LANES) {
      const int word = g * num_words;
      const int64_t at = word / 8 * 32 * planes + word % 8 * 4;
      const int8_t *q[XD_TILE_ROWS];
      __m256i sums[XD_TILE_ROWS];
      for (int r = 0; r < num; r++) q[r] = rows[r].q + at;
      group_tile(bits, two_digits, num_words, panel + (int64_t)word * planes * 32, q, num, a->q_bytes / 2, sums);
      const vf s = vf_load(scales + (int64_t)g * XD_TILE_OUT), b = vf_load(biases + (int64_t)g * XD_TILE_OUT);
      for (int r = 0; r < num; r++) {
        acc[r] = vf_fma(vf_mul(s, vf_set(rows[r].d[g])), _mm256_cvtepi32_ps(sums[r]), acc[r]);
        acc[r] = vf_fma(b, vf_set(rows[r].da[g]), acc[r]);
      }
    }
    for (int r = 0; r < num; r++) lane[j][r] = acc[r];
  }
  for (int r = 0; r < num; r++) {
    vf even = vf_add(vf_add(lane[0][r], lane[4][r]), vf_add(lane[2][r], lane[6][r]));
    vf odd = vf_add(vf_add(lane[1][r], lane[5][r]), vf_add(lane[3][r], lane[7][r]));
    vf_store(y + r * XD_TILE_OUT, vf_add(even, odd));
  }
}

XD_INLINE void tile(const xd_affine *a, int bits, int group_size, int two_digits, const void *panel,
                    const xd_row *rows, int num, float *y) {
  const float *s = panel_scales(a, panel), *b = s + (int64_t)a->groups * XD_TILE_OUT;
  const int64_t eight = ((const char *)s - (const char *)panel) / 4;
  for (int n = 0; n < XD_TILE_OUT; n += 8) {
    const char *codes = (const char *)panel + n / 8 * eight;
    switch (num) {
      case 4: tile_eight(a, bits, group_size, two_digits, codes, s + n, b + n, rows, 4, y + n); break;
      case 3: tile_eight(a, bits, group_size, two_digits, codes, s + n, b + n, rows, 3, y + n); break;
      case 2: tile_eight(a, bits, group_size, two_digits, codes, s + n, b + n, rows, 2, y + n); break;
      default: tile_eight(a, bits, group_size, two_digits, codes, s + n, b + n, rows, 1, y + n);
    }
  }
}

/* One function for each format, so that all its loops have known lengths. */
#define FORMAT(bits, group, digits)                                                                              \
  static void rows_##bits##_##group##_##digits(const xd_affine *a, const uint8_t *c, const void *s, const void *b, \
                                               int n, const xd_row *row, float *y) {                             \
    rows(a, bits, group, digits, c, s, b, n, row, y);                                                            \
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

static void any_tile(const xd_affine *a, const void *panel, const xd_row *rows, int num_rows,
                     float y[XD_TILE_ROWS][XD_TILE_OUT]) {
  static const tile_function functions[5][3] = {NAMES(tile, 2, 0), NAMES(tile, 4, 0), NAMES(tile, 2, 1),
                                                NAMES(tile, 4, 1), NAMES(tile, 8, 0)};
  functions[format_of(a)][size_of(a)](a, panel, rows, num_rows, &y[0][0]);
}

const xd_isa *xd_isa_avx2(void) {
  static const xd_isa isa = {.name = "avx2", .affine_rows = any_rows, .affine_pack = pack, .affine_tile = any_tile};
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &isa
                                                                                                           : NULL;
}

#else
#include "private.h"
const xd_isa *xd_isa_avx2(void) {
  return NULL;
}
#endif
