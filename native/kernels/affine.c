/* affine.c: rows of x as integers, and the slow twin: affine products in plain C, for every processor and for the tests. */

#include <math.h>

#include "floats.h"

#define MAGIC 0x1.8p23f /* adding it rounds to an integer, ties to even, found in the low bits */

static int32_t round_to_int(float x) {
  float shifted = x + MAGIC;
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

static uint32_t largest_bits(const float *x, int n) {
  uint32_t largest = 0;
  for (int i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    if (bits > largest) largest = bits; /* as integers a NaN is above infinity, which is above all numbers */
  }
  return largest;
}

static void round_group(const xd_affine *a, const float *x, int16_t *numbers, float *d, float *da) {
  const float q_max = xd_q_max(a);
  const uint32_t bits = largest_bits(x, a->group_size);
  float largest;
  memcpy(&largest, &bits, 4);
  memset(numbers, 0, (size_t)a->group_size * 2);
  *d = *da = bits >= 0x7f800000 ? NAN : 0;
  if (bits >= 0x7f800000 || largest < XD_TINY) return;
  const float inverse = q_max / largest;
  int32_t sum = 0;
  for (int i = 0; i < a->group_size; i++) {
    numbers[i] = (int16_t)round_to_int(x[i] * inverse);
    sum += numbers[i];
  }
  *d = largest / q_max;
  *da = *d * (float)sum;
}

static void round_row(const xd_affine *a, const float *x, int16_t *numbers, int8_t *q, float *d, float *da) {
  memset(q, 0, (size_t)a->q_bytes);
  for (int g = 0; g < a->padded_groups; g++) {
    d[g] = da[g] = 0;
    if (g < a->groups) round_group(a, x + (int64_t)g * a->group_size, numbers + (int64_t)g * a->group_size, d + g, da + g);
  }
  for (int64_t k = 0; k < a->width; k++) {
    const int64_t at = xd_q_index(a->bits, k);
    if (a->bits == 8) {
      ((int16_t *)q)[at] = numbers[k];
    } else if (a->two_digits) {
      const int hi = (numbers[k] + 128) >> 8;
      q[at] = (int8_t)hi;
      q[a->q_bytes / 2 + at] = (int8_t)(numbers[k] - hi * 256);
    } else {
      q[at] = (int8_t)numbers[k];
    }
  }
}

/* The slow twin. */

static float number_at(const void *p, int dtype, int64_t at) {
  if (dtype == XD_FLOAT32) return ((const float *)p)[at];
  uint16_t h = ((const uint16_t *)p)[at];
  return dtype == XD_BFLOAT16 ? xd_from_bf16(h) : xd_from_f16(h);
}

static int code_at(const uint8_t *codes, int bits, int64_t k) {
  int64_t bit = k * bits;
  return codes[bit / 8] >> bit % 8 & ((1 << bits) - 1);
}

static int32_t q_at(const xd_affine *a, const int8_t *q, int64_t k) {
  int64_t at = xd_q_index(a->bits, k);
  if (a->bits == 8) return ((const int16_t *)q)[at];
  return a->two_digits ? q[at] * 256 + q[a->q_bytes / 2 + at] : q[at];
}

/* One output of one row: `scales` and `biases` are the weight row's, from index `first` on. */
static float output(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int64_t first,
                    const xd_row *row) {
  float lane[XD_LANES] = {0};
  for (int g = 0; g < a->groups; g++) {
    int32_t sum = 0;
    for (int64_t k = (int64_t)g * a->group_size; k < (int64_t)(g + 1) * a->group_size; k++)
      sum += code_at(codes, a->bits, k) * q_at(a, row->q, k);
    float *acc = &lane[g % XD_LANES];
    *acc = fmaf(number_at(scales, a->dtype, first + g) * row->d[g], (float)sum, *acc);
    *acc = fmaf(number_at(biases, a->dtype, first + g), row->da[g], *acc);
  }
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

static void rows(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                 const xd_row *row, float *y) {
  for (int n = 0; n < num_out; n++)
    y[n] = output(a, codes + n * a->code_bytes, scales, biases, (int64_t)n * a->groups, row);
}

/* The twin's panel is the weight rows as they are. */
typedef struct {
  const uint8_t *codes;
  const void *scales, *biases;
  int num_out;
} panel;

static void pack(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                 void *to) {
  (void)a;
  *(panel *)to = (panel){codes, scales, biases, num_out};
}

static void tile(const xd_affine *a, const void *from, const xd_row *given, int num_rows,
                 float y[XD_TILE_ROWS][XD_TILE_OUT]) {
  const panel *p = from;
  for (int r = 0; r < num_rows; r++) rows(a, p->codes, p->scales, p->biases, p->num_out, &given[r], y[r]);
}

const xd_isa *xd_isa_portable(void) {
  static const xd_isa isa = {.name = "portable", .parts = 1, .floats = &xd_floats_portable, .round_row = round_row, .affine_rows = rows, .affine_pack = pack, .affine_tile = tile};
  return &isa;
}
