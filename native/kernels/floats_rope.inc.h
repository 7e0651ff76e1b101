/* floats_rope.inc.h: rotary positions.

   Angles need float64: a float32 at position 1e6 is known to 0.06. libm's exp, log, sin and cos differ in their last
   bits from one machine to the next, hence our own: Taylor sums of plain products and sums in float64, a few units
   in the last place off, which float32 does not see; branch-free, so that the compiler may take several at once. */

/* ln(x) = 2 atanh(s) + e ln 2 for x = m 2^e, s = (m - 1) / (m + 1), |s| <= 0.172: s^23 / 23 is below 1e-18. */
static double rope_log(double x) {
  int e;
  double m = frexp(x, &e);
  if (m < 0.70710678118654752) m *= 2, e--;
  double s = (m - 1) / (m + 1), square = s * s, sum = 0;
  for (int n = 21; n >= 1; n -= 2) sum = sum * square + 1.0 / n;
  return (double)e * 0x1.9ef35793c7673p-41 + (2 * s * sum + (double)e * 0x1.62e42fefa2p-1);
}

/* For |x| < 700. r^14 / 14! is below 1e-17. */
XD_INLINE double rope_exp(double x) {
  const double magic = 0x1.8p52;
  double shifted = x * 0x1.71547652b82fep0 + magic, m = shifted - magic;
  double r = (x - m * 0x1.62e42fefa2p-1) - m * 0x1.9ef35793c7673p-41;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r * r + r + 1;
  uint64_t bits, power;
  memcpy(&bits, &p, 8), memcpy(&power, &shifted, 8);
  bits += power << 52;
  memcpy(&p, &bits, 8);
  return p;
}

/* a = n pi / 2 + r, |r| <= pi / 4; pi / 2 in three parts, the first two of 30 bits: exact up to angles of 1e7. */
XD_INLINE void rope_cos_sin(double a, float *cosine, float *sine) {
  const double magic = 0x1.8p52;
  double shifted = a * 0x1.45f306dc9c883p-1 + magic, n = shifted - magic;
  double r = ((a - n * 0x1.921fb54p0) - n * 0x1.10b46118p-30) - n * 0x1.313198a2e037p-61, rr = r * r;
  double s = -1.0 / 1307674368000, c = 1.0 / 20922789888000;
  s = s * rr + 1.0 / 6227020800, c = c * rr - 1.0 / 87178291200;
  s = s * rr - 1.0 / 39916800, c = c * rr + 1.0 / 479001600;
  s = s * rr + 1.0 / 362880, c = c * rr - 1.0 / 3628800;
  s = s * rr - 1.0 / 5040, c = c * rr + 1.0 / 40320;
  s = s * rr + 1.0 / 120, c = c * rr - 1.0 / 720;
  s = s * rr - 1.0 / 6, c = c * rr + 1.0 / 24;
  c = c * rr - 0.5;
  s = s * rr * r + r, c = c * rr + 1;
  uint64_t quarter;
  memcpy(&quarter, &shifted, 8);
  double x = quarter & 1 ? s : c, y = quarter & 1 ? c : s; /* quarter turns: (c, s), (-s, c), (-c, -s), (s, -c) */
  *cosine = (float)((quarter + 1) & 2 ? -x : x);
  *sine = (float)(quarter & 2 ? -y : y);
}

static void rope_frequencies(const xd_rope *r, double *frequencies) {
  int64_t half = r->dims / 2;
  if (r->freqs) {
    for (int64_t i = 0; i < half; i++) frequencies[i] = 1.0 / (double)r->freqs[i];
    return;
  }
  const double step = -rope_log((double)r->base) / (double)half;
  for (int64_t i = 0; i < half; i++) frequencies[i] = rope_exp((double)i * step);
}

/* Traditional pairs are neighbours: each cosine twice, and sines once negative. */
static void rope_angles(const xd_rope *r, const double *frequencies, int64_t b, int64_t first, int64_t last,
                        float *table) {
  int64_t dims = r->dims, half = dims / 2;
  int32_t offset = r->offsets[b * r->offset_stride];
  for (int64_t t = first; t < last; t++) {
    float *cosines = table + (t - first) * 2 * dims, *sines = cosines + dims;
    double position = (double)(t + offset) * (double)r->scale;
    for (int64_t i = 0; i < half; i++) rope_cos_sin(position * frequencies[i], &cosines[i], &sines[i]);
    if (!r->traditional) continue;
    for (int64_t i = half - 1; i >= 0; i--) {
      float c = cosines[i], s = sines[i];
      cosines[2 * i] = cosines[2 * i + 1] = c;
      sines[2 * i] = -s, sines[2 * i + 1] = s;
    }
  }
}

XD_INLINE void rope_halves(const char *x, char *y, const float *table, int dtype, int64_t dims) {
  int64_t half = dims / 2, i = 0, rest = half % 8;
  for (; i + 8 <= half; i += 8) {
    vf c = vf_load(table + i), s = vf_load(table + dims + i);
    vf a = vf_load_any(x, dtype, i), b = vf_load_any(x, dtype, half + i);
    vf_store_any(y, dtype, i, vf_sub(vf_mul(a, c), vf_mul(b, s)));
    vf_store_any(y, dtype, half + i, vf_add(vf_mul(a, s), vf_mul(b, c)));
  }
  if (!rest) return;
  vf c = vf_load_some(table, XD_FLOAT32, i, rest), s = vf_load_some(table, XD_FLOAT32, dims + i, rest);
  vf a = vf_load_some(x, dtype, i, rest), b = vf_load_some(x, dtype, half + i, rest);
  vf_store_some(y, dtype, i, vf_sub(vf_mul(a, c), vf_mul(b, s)), rest);
  vf_store_some(y, dtype, half + i, vf_add(vf_mul(a, s), vf_mul(b, c)), rest);
}

XD_INLINE void rope_neighbours(const char *x, char *y, const float *table, int dtype, int64_t dims) {
  int64_t i = 0, rest = dims % 8;
  for (; i + 8 <= dims; i += 8) {
    vf a = vf_load_any(x, dtype, i);
    vf turned = vf_mul(vf_swap_pairs(a), vf_load(table + dims + i));
    vf_store_any(y, dtype, i, vf_add(vf_mul(a, vf_load(table + i)), turned));
  }
  if (!rest) return;
  vf a = vf_load_some(x, dtype, i, rest);
  vf turned = vf_mul(vf_swap_pairs(a), vf_load_some(table, XD_FLOAT32, dims + i, rest));
  vf_store_some(y, dtype, i, vf_add(vf_mul(a, vf_load_some(table, XD_FLOAT32, i, rest)), turned), rest);
}

static void rope_rotate(const xd_rope *r, const float *table, int64_t b, int64_t first, int64_t last) {
  const size_t size = xd_itemsize(r->dtype);
  const size_t turned = (size_t)r->dims * size, kept = (size_t)r->width * size - turned;
  for (int64_t t = first; t < last; t++, table += 2 * r->dims) {
    for (int64_t h = 0; h < r->heads; h++) {
      const char *x = (const char *)r->x +
                      (size_t)(b * r->x_batch_stride + h * r->x_head_stride + t * r->x_token_stride) * size;
      char *y = (char *)r->y + (size_t)(b * r->y_batch_stride + h * r->y_head_stride + t * r->y_token_stride) * size;
      if (kept && y != x) memmove(y + turned, x + turned, kept);
      if (r->traditional)
        rope_neighbours(x, y, table, r->dtype, r->dims);
      else
        rope_halves(x, y, table, r->dtype, r->dims);
    }
  }
}
