/* affine_avx2_two_bits.c: single rows of x against weight rows of 2-bit codes in groups of 64 with bfloat16 scales, with AVX2.

   Most of what decoding reads has this format. In the general code of affine_avx2_rows.c 8 groups take 27 cycles, of rows of 768
   even 33, which is more than memory takes to give them; here 21 and 23 (bench/LOG.md).

   Two weight rows are taken in turn, 8 groups of each a step. The sums of a step are added up amid the products of the next,
   so that an instruction hardly waits for another. They stay in the order in which additions bring them, groups 0 2 4 6 1 3 5 7;
   scales, biases, d and da are brought into that order instead, these two once a call. Where rows end with half of 8
   groups, those of both are one step, whose sums lie where the first addition of lanes wants them. */

#if defined(__x86_64__)

#include "avx2.h"
#include "floats.h"
#include "simd.h"
#include "affine_avx2.h"

enum { GROUP = 64, GROUP_BYTES = GROUP / 4, MOST_GROUPS = 256 };

/* What belongs to the 8 groups of a step, in the order of their sums: of x, of the weights. */
typedef struct {
  vf d, da;
} factors;
typedef struct {
  vf scales, biases;
} numbers;

typedef struct {
  const uint8_t *codes;
  const uint16_t *scales, *biases;
} weight_row;

/* Where the codes of four groups and of other four lie, and the digits that they meet. */
typedef struct {
  const uint8_t *codes, *others;
  const int8_t *q, *others_q;
} place;

/* Sums of 16 bits, of two groups in each vector. */
typedef struct {
  __m256i of[4];
} products;

XD_INLINE weight_row row_at(const weight_row *first, int64_t groups, int64_t n) {
  return (weight_row){first->codes + n * groups * GROUP_BYTES, first->scales + n * groups, first->biases + n * groups};
}

/* The i-th 8 groups of a weight row. */
XD_INLINE place eight_at(const uint8_t *codes, const int8_t *q, int64_t i) {
  codes += 8 * i * GROUP_BYTES, q += 8 * i * GROUP;
  return (place){codes, codes + 4 * GROUP_BYTES, q, q + 4 * GROUP};
}

/* Those of which both rows have half. */
XD_INLINE place fours_at(const weight_row *one, const weight_row *two, const int8_t *q, int64_t i) {
  const int64_t at = 8 * i * GROUP_BYTES;
  q += 8 * i * GROUP;
  return (place){one->codes + at, two->codes + at, q, q};
}

/* Eight bfloat16 numbers, all of them in both halves of `twice`, in the order of sums. */
XD_INLINE vf in_order(__m256i twice) {
  const __m256i even_first = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13, -1, -1, 2, 3, -1, -1, 6,
                                              7, -1, -1, 10, 11, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, even_first));
}

XD_INLINE vf eight_numbers(const uint16_t *p) {
  return in_order(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)));
}

XD_INLINE vf four_and_four(const uint16_t *one, const uint16_t *two) {
  int64_t first, second;
  memcpy(&first, one, 8), memcpy(&second, two, 8);
  return in_order(_mm256_blend_epi32(_mm256_set1_epi64x(first), _mm256_set1_epi64x(second), 0xcc));
}

XD_INLINE numbers eight_of(const weight_row *w, int64_t i) {
  return (numbers){eight_numbers(w->scales + 8 * i), eight_numbers(w->biases + 8 * i)};
}

XD_INLINE numbers fours_of(const weight_row *one, const weight_row *two, int64_t i) {
  return (numbers){four_and_four(one->scales + 8 * i, two->scales + 8 * i),
                   four_and_four(one->biases + 8 * i, two->biases + 8 * i)};
}

XD_INLINE void order_factors(const xd_affine *a, const xd_row *row, factors *f) {
  const __m256i eight = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), four_twice = _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3);
  for (int g = 0; g < a->groups; g += 8, f++) {
    const __m256i order = g + 8 <= a->groups ? eight : four_twice;
    f->d = _mm256_permutevar8x32_ps(vf_load(row->d + g), order);
    f->da = _mm256_permutevar8x32_ps(vf_load(row->da + g), order);
  }
}

/* Two vectors of sums in one: of each 16 bytes of a and b half as many. Even a whole group's fits 16 bits: 64 * 3 * 127. */
XD_INLINE __m256i two_in_one(__m256i a, __m256i b) {
  const __m256i ones = _mm256_set1_epi16(1);
  return _mm256_packs_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
}

/* GCC would put additions off until registers run out, and keep one row's digits for the other: it cannot look through these.
   Without them 1.4 cycles a step more. */
#define NOW(v) __asm__ volatile("" : "+x"(v))
#define FORGET(p) __asm__ volatile("" : "+r"(p))
enum { AHEAD_OF_TWO = 2048 }; /* bytes, of each of the two rows in turn */

/* Add the step whose products are `p` to its lanes; amid that multiply what lies at `next`. */
XD_INLINE vf step(products *p, place next, numbers n, const factors *f, vf lanes) {
  FORGET(next.q);
  prefetch(next.codes + AHEAD_OF_TWO, 64);
  prefetch(next.others + AHEAD_OF_TWO, 64);
  const __m256i first = two_in_one(p->of[0], p->of[1]);
  p->of[0] = two_bits_sum(load(next.codes), next.q);
  NOW(p->of[0]);
  const __m256i all = two_in_one(first, two_in_one(p->of[2], p->of[3]));
  p->of[1] = two_bits_sum(load(next.codes + 32), next.q + 128);
  NOW(p->of[1]);
  const vf sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(all, _mm256_set1_epi16(1)));
  p->of[2] = two_bits_sum(load(next.others), next.others_q);
  NOW(p->of[2]);
  lanes = vf_fma(vf_mul(n.scales, f->d), sums, lanes);
  p->of[3] = two_bits_sum(load(next.others + 32), next.others_q + 128);
  NOW(p->of[3]);
  return vf_fma(n.biases, f->da, lanes);
}

/* Two weight rows, of whose first step `p` holds the products; it is left with those of `next`, where the next two begin. Of
   their lanes the first additions: l0 + l4 and l2 + l6 of one and of two, then l1 + l5 and l3 + l7. */
XD_INLINE vf two_rows(int64_t num_eights, int has_four, const weight_row *one, const weight_row *two, const uint8_t *next,
                      const int8_t *q, const factors *f, products *p) {
  vf a = vf_set(0), b = vf_set(0);
  int64_t i = 0;
  for (; i + 1 < num_eights; i++) {
    a = step(p, eight_at(two->codes, q, i), eight_of(one, i), f + i, a);
    b = step(p, eight_at(one->codes, q, i + 1), eight_of(two, i), f + i, b);
  }
  a = step(p, eight_at(two->codes, q, i), eight_of(one, i), f + i, a);
  b = step(p, has_four ? fours_at(one, two, q, i + 1) : eight_at(next, q, 0), eight_of(two, i), f + i, b);
  vf left = _mm256_shuffle_ps(a, b, 0x44);
  if (has_four) left = step(p, eight_at(next, q, 0), fours_of(one, two, i + 1), f + i + 1, left);
  return vf_add(left, _mm256_shuffle_ps(a, b, 0xee));
}

/* The other additions of four times two rows, which stay in turn. */
XD_INLINE vf add_up(const vf *two) {
  const vf a = vf_add(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xdd));
  const vf b = vf_add(_mm256_shuffle_ps(two[2], two[3], 0x88), _mm256_shuffle_ps(two[2], two[3], 0xdd));
  return vf_add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

/* y of four pairs of weight rows from the n-th pair on. */
XD_INLINE void store_pairs(vf in_turn, int64_t n, int64_t apart, float *y) {
  if (apart == 1) {
    vf_store(y + 2 * n, in_turn);
    return;
  }
  const vf sums = _mm256_permutevar8x32_ps(in_turn, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  _mm_storeu_ps(y + n, _mm256_castps256_ps128(sums));
  _mm_storeu_ps(y + apart + n, _mm256_extractf128_ps(sums, 1));
}

/* `num` weight rows, a multiple of 8, in turn two that lie `apart`: 1, neighbours, or num / 2. */
XD_INLINE void rows(const xd_affine *a, int has_four, const weight_row *first, int64_t num, int64_t apart, const xd_row *row,
                    float *y) {
  factors f[MOST_GROUPS / XD_LANES];
  order_factors(a, row, f);
  const int8_t *q = row->q;
  const int64_t groups = a->groups;
  const place start = eight_at(first->codes, q, 0);
  products p = {{two_bits_sum(load(start.codes), q), two_bits_sum(load(start.codes + 32), q + 128),
                 two_bits_sum(load(start.others), q + 256), two_bits_sum(load(start.others + 32), q + 384)}};
  const int64_t pairs = num / 2, between = apart == 1 ? 2 : 1;
  for (int64_t n = 0; n < pairs; n += 4) {
    vf two[4];
    for (int64_t i = n; i < n + 4; i++) {
      const weight_row w[2] = {row_at(first, groups, i * between), row_at(first, groups, i * between + apart)};
      const weight_row next = row_at(first, groups, (i + 1 < pairs ? i + 1 : i) * between); /* any after the last */
      two[i - n] = two_rows(groups / 8, has_four, &w[0], &w[1], next.codes, q, f, &p);
    }
    store_pairs(add_up(two), n, apart, y);
  }
}

/* One function for each kind, so that a step need not ask. Memory gives more where two parts of it are read at once: rows of 2048
   as neighbours take a quarter more time. Rows of 768 do not, and a few rows (product.c's few_rows) begin anew too often. */
static void rows_of_eights(const xd_affine *a, const weight_row *first, int64_t num, const xd_row *row, float *y) {
  rows(a, 0, first, num, num > XD_FEW_OUT ? num / 2 : 1, row, y);
}

static void rows_with_four(const xd_affine *a, const weight_row *first, int64_t num, const xd_row *row, float *y) {
  rows(a, 1, first, num, 1, row, y);
}

int xd_two_bits_rows_avx2(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                          const xd_row *row, float *y) {
  const weight_row first = {codes, scales, biases};
  const int num = num_out / 8 * 8;
  if (a->bits != 2 || a->group_size != GROUP || a->two_digits || a->dtype != XD_BFLOAT16) return 0;
  if (num == 0 || a->groups % 4 || a->groups < 8 || a->groups > MOST_GROUPS) return 0;
  if (a->groups % 8)
    rows_with_four(a, &first, num, row, y);
  else
    rows_of_eights(a, &first, num, row, y);
  return num;
}

#include "target_end.h"
#endif
