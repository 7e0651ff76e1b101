/* affine_avx512_rows.c: single rows of x against weight rows of 2- and 4-bit codes with bfloat16 scales, with AVX-512's VNNI.

   Most of what decoding reads has such a format: groups of 16 or 32 code bytes (2 bits in groups of 64 or 128, 4 bits in groups
   of 64). Others are left to affine_avx512.c.

   Four weight rows a to d are taken at once, 8 groups of each a step, so that digits are loaded once for four. `vpdpbusd` leaves
   each group's sum in parts; additions of vectors' halves bring them together, of two rows in one vector: in its j-th quarter
   group j and group j + 4 of one row, then of the other. These are the lanes of private.h; scales are brought into that order as
   they are widened. Where rows end with half of 8 groups, those of all four rows are one step, and lie where the first addition
   of lanes (l0 + l4, ...) wants them. */

#if defined(__x86_64__)

#include "avx512.h"
#include "simd.h"
#include "affine_avx512.h"

typedef struct {
  const uint8_t *codes;
  const uint16_t *scales, *biases;
} weight_row;

enum { ROWS = 4, MOST_VECTORS = 4 }; /* rows at once; vectors of codes in 8 groups of one */

XD_INLINE __m256i load(const void *p) {
  return _mm256_loadu_si256(p);
}

/* What meets plane `p` of 64 code bytes, which are two blocks of q. */
XD_INLINE __m512i digits(const int8_t *q, int bits, int p) {
  const int8_t *first = q + 32 * p, *second = first + 32 * (8 / bits);
  return _mm512_inserti64x4(_mm512_castsi256_si512(load(first)), load(second), 1);
}

/* Sums of `num` times 64 code bytes of each row, from `at` on. Codes are asked for `ahead` bytes early; beyond the end of a
   tensor that does nothing. */
XD_INLINE void multiply(int bits, int num, const weight_row *w, int64_t at, int ahead, const int8_t *q,
                        __m512i sums[ROWS][MOST_VECTORS]) {
  for (int i = 0; i < num; i++, at += 64, q += 64 * 8 / bits) {
    __m512i codes[ROWS];
    for (int r = 0; r < ROWS; r++) {
      _mm_prefetch((const char *)((uintptr_t)w[r].codes + (uintptr_t)(at + ahead)), _MM_HINT_T0);
      codes[r] = _mm512_loadu_si512(w[r].codes + at);
      sums[r][i] = _mm512_setzero_si512();
    }
    for (int p = 0; p < 8 / bits; p++) {
      const __m512i some = digits(q, bits, p);
      for (int r = 0; r < ROWS; r++) sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], plane512(codes[r], bits, p), some);
    }
  }
}

/* Of four vectors: in each quarter one sum of each, in order. */
XD_INLINE __m512i two_in_one(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
XD_INLINE __m512i four_in_one(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = two_in_one(a, b), cd = two_in_one(c, d);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
/* Where a group takes two quarters: the first two groups' sums, then the others'. */
XD_INLINE __m512i halves_in_one(__m512i first, __m512i second) {
  return _mm512_add_epi32(_mm512_shuffle_i64x2(first, second, 0x88), _mm512_shuffle_i64x2(first, second, 0xdd));
}

/* The sums of 8 groups of two rows. */
XD_INLINE __m512i eight_and_eight(const __m512i *a, const __m512i *b, int group_bytes) {
  if (group_bytes == 16) return four_in_one(a[0], a[1], b[0], b[1]);
  return halves_in_one(four_in_one(a[0], a[2], b[0], b[2]), four_in_one(a[1], a[3], b[1], b[3]));
}

/* The sums of 4 groups of four rows. */
XD_INLINE __m512i four_times_four(__m512i sums[ROWS][MOST_VECTORS], int group_bytes) {
  const __m512i first = four_in_one(sums[0][0], sums[1][0], sums[2][0], sums[3][0]);
  if (group_bytes == 16) return first;
  return halves_in_one(first, four_in_one(sums[0][1], sums[1][1], sums[2][1], sums[3][1]));
}

/* 16 bfloat16 numbers, widened: in the j-th quarter those from j, j + `step`, j + 2 * `step` and j + 3 * `step`. */
XD_INLINE __m512 in_quarters(__m256i numbers, int step) {
  short of[32];
  for (int i = 0; i < 32; i++) of[i] = (short)(i / 2 / 4 + i / 2 % 4 * step);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_loadu_si512(of), _mm512_castsi256_si512(numbers)));
}

XD_INLINE __m512 of_two(const uint16_t *a, const uint16_t *b) {
  const __m128i first = _mm_loadu_si128((const __m128i *)a), second = _mm_loadu_si128((const __m128i *)b);
  return in_quarters(_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1), 4);
}

XD_INLINE int64_t four_at(const uint16_t *p) {
  int64_t four;
  memcpy(&four, p, 8);
  return four;
}

/* Eight numbers of x, once for each of two rows, in the order of their sums. */
XD_INLINE __m512 for_two(const float *p) {
  const __m512i order = _mm512_setr_epi32(0, 4, 0, 4, 1, 5, 1, 5, 2, 6, 2, 6, 3, 7, 3, 7);
  return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(vf_load(p)));
}

/* Four numbers of x, each for all rows. */
XD_INLINE __m512 for_four(const float *p) {
  const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(order, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

XD_INLINE __m512 accumulate(__m512 acc, __m512i sums, __m512 scales, __m512 biases, __m512 d, __m512 da) {
  acc = _mm512_fmadd_ps(_mm512_mul_ps(scales, d), _mm512_cvtepi32_ps(sums), acc);
  return _mm512_fmadd_ps(biases, da, acc);
}

/* y of four weight rows. */
XD_INLINE __m128 four_rows(const xd_affine *a, int bits, int group_bytes, const weight_row *w, int ahead,
                           const xd_row *row) {
  const int vectors = 8 * group_bytes / 64, q_step = 8 * group_bytes * 8 / bits;
  const int8_t *q = row->q;
  __m512i sums[ROWS][MOST_VECTORS];
  __m512 ab = _mm512_set1_ps(0), cd = ab;
  int64_t g = 0, at = 0;
  for (; g + 8 <= a->groups; g += 8, at += 8 * group_bytes, q += q_step) {
    multiply(bits, vectors, w, at, ahead, q, sums);
    const __m512 d = for_two(row->d + g), da = for_two(row->da + g);
    ab = accumulate(ab, eight_and_eight(sums[0], sums[1], group_bytes), of_two(w[0].scales + g, w[1].scales + g),
                    of_two(w[0].biases + g, w[1].biases + g), d, da);
    cd = accumulate(cd, eight_and_eight(sums[2], sums[3], group_bytes), of_two(w[2].scales + g, w[3].scales + g),
                    of_two(w[2].biases + g, w[3].biases + g), d, da);
  }
  __m512 low = _mm512_shuffle_ps(ab, cd, 0x88); /* lanes 0 to 3, of all rows */
  const __m512 high = _mm512_shuffle_ps(ab, cd, 0xdd);
  if (g < a->groups) {
    multiply(bits, vectors / 2, w, at, ahead, q, sums);
    const __m256i s = _mm256_setr_epi64x(four_at(w[0].scales + g), four_at(w[1].scales + g), four_at(w[2].scales + g),
                                         four_at(w[3].scales + g));
    const __m256i b = _mm256_setr_epi64x(four_at(w[0].biases + g), four_at(w[1].biases + g), four_at(w[2].biases + g),
                                         four_at(w[3].biases + g));
    low = accumulate(low, four_times_four(sums, group_bytes), in_quarters(s, 4), in_quarters(b, 4), for_four(row->d + g),
                     for_four(row->da + g));
  }
  const __m512 pairs = _mm512_add_ps(low, high);
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(pairs), _mm512_extractf32x8_ps(pairs, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

/* `num` weight rows, a multiple of four. Memory gives more where several parts of it are read at once: one row of each quarter is
   taken in turn, 2 KiB early. In quarters of a few rows (product.c's few_rows) reading begins anew too often. */
XD_INLINE void rows(const xd_affine *a, int bits, int group_bytes, const weight_row *first, int64_t num, const xd_row *row,
                    float *y) {
  const int64_t apart = num > XD_FEW_OUT ? num / ROWS : 1, step = apart == 1 ? ROWS : 1;
  const int ahead = apart == 1 ? 3072 : 2048;
  for (int64_t i = 0; i < num / ROWS; i++) {
    weight_row w[ROWS];
    float four[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const int64_t n = i * step + r * apart;
      w[r] = (weight_row){first->codes + n * a->code_bytes, first->scales + n * a->groups, first->biases + n * a->groups};
    }
    _mm_storeu_ps(four, four_rows(a, bits, group_bytes, w, ahead, row));
    for (int r = 0; r < ROWS; r++) y[i * step + r * apart] = four[r];
  }
}

int xd_few_bits_rows_avx512(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                            const xd_row *row, float *y) {
  const weight_row first = {codes, scales, biases};
  const int group_bytes = a->group_size * a->bits / 8, num = num_out / ROWS * ROWS;
  if (a->two_digits || a->dtype != XD_BFLOAT16 || a->groups % 4) return 0;
  if (a->bits == 2 && group_bytes == 16)
    rows(a, 2, 16, &first, num, row, y);
  else if (a->bits == 2 && group_bytes == 32)
    rows(a, 2, 32, &first, num, row, y);
  else if (a->bits == 4 && group_bytes == 32)
    rows(a, 4, 32, &first, num, row, y);
  else
    return 0;
  return num;
}

#include "target_end.h"
#endif
