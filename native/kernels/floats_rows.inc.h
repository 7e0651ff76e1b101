/* floats_rows.inc.h: what is computed row by row: widening, exp, norms and activations. */

/* n numbers to float32, and zeros up to a multiple of 8. */
XD_INLINE void widen_any(const char *from, int dtype, int64_t n, float *to) {
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) vf_store(to + k, vf_load_any(from, dtype, k));
  if (k < n) vf_store(to + k, vf_load_some(from, dtype, k, n - k));
}

static void widen_row(const char *from, int dtype, int64_t n, float *to) {
  if (dtype == XD_BFLOAT16)
    widen_any(from, XD_BFLOAT16, n, to);
  else if (dtype == XD_FLOAT16)
    widen_any(from, XD_FLOAT16, n, to);
  else
    widen_any(from, XD_FLOAT32, n, to);
}

/* exp(x), at most 1 unit in the last place off (all floats were tried); inf from 88.38 on, and 0 below
   -87.69. x = m ln 2 + r, |r| <= ln 2 / 2; ln 2 is in two parts, the first of so few bits that m times it is exact.
   2^m is made of m's bits: m is clipped to -127 .. 128, whose powers so come out as 0 and inf, and a NaN survives
   the product. */
XD_INLINE vf vf_exp(vf x) {
  const vf magic = vf_set(0x1.8p23f + 127);
  x = vf_max(vf_set(-88), vf_min(vf_set(89), x)); /* in this order of operands a NaN stays */
  vf shifted = vf_fma(x, vf_set(0x1.715476p0f), magic), m = vf_sub(shifted, magic);
  vf r = vf_fma(m, vf_set(-0x1.62e4p-1f), x);
  r = vf_fma(m, vf_set(-0x1.7f7d1cp-20f), r);
  vf p = vf_set(0x1.a0d2cep-13f);
  p = vf_fma(p, r, vf_set(0x1.6e879cp-10f));
  p = vf_fma(p, r, vf_set(0x1.11121p-7f));
  p = vf_fma(p, r, vf_set(0x1.555382p-5f));
  p = vf_fma(p, r, vf_set(0x1.555554p-3f));
  p = vf_fma(p, r, vf_set(0x1p-1f));
  p = vf_fma(p, vf_mul(r, r), r);
  return vf_mul(vf_add(p, vf_set(1)), vf_power2(shifted));
}

/* Norm. */

XD_INLINE vf square_sums(const void *x, int dtype, int64_t width) {
  vf sums = vf_set(0);
  int64_t k = 0;
  for (; k + 8 <= width; k += 8) {
    vf v = vf_load_any(x, dtype, k);
    sums = vf_fma(v, v, sums);
  }
  if (k == width) return sums;
  vf v = vf_load_some(x, dtype, k, width - k);
  return vf_fma(v, v, sums);
}

static void norm(const xd_norm *n, int64_t first, int64_t last) {
  size_t x_size = xd_itemsize(n->x_dtype), y_size = xd_itemsize(n->y_dtype);
  for (int64_t row = first; row < last; row++) {
    const char *x = (const char *)n->x + (size_t)(row * n->x_stride) * x_size;
    char *y = (char *)n->y + (size_t)(row * n->y_stride) * y_size;
    float mean = vf_sum(square_sums(x, n->x_dtype, n->width)) / (float)n->width;
    const vf scale = vf_set(1.0f / sqrtf(mean + n->eps));
    int64_t k = 0;
    for (; k + 8 <= n->width; k += 8) {
      vf v = vf_mul(vf_load_any(x, n->x_dtype, k), scale);
      if (n->weight) v = vf_mul(v, vf_load_any(n->weight, n->weight_dtype, k));
      vf_store_any(y, n->y_dtype, k, v);
    }
    if (k == n->width) continue;
    vf v = vf_mul(vf_load_some(x, n->x_dtype, k, n->width - k), scale);
    if (n->weight) v = vf_mul(v, vf_load_some(n->weight, n->weight_dtype, k, n->width - k));
    vf_store_some(y, n->y_dtype, k, v, n->width - k);
  }
}

/* Activations. */

XD_INLINE vf sigmoid_times(vf g, vf minus_z) { /* g / (1 + exp(-z)) */
  return vf_div(g, vf_add(vf_set(1), vf_exp(minus_z)));
}

XD_INLINE vf silu(vf g) {
  return sigmoid_times(g, vf_sub(vf_set(0), g));
}

/* g (1 + tanh z) / 2 with z = sqrt(2 / pi) (g + 0.044715 g^3) is g / (1 + exp(-2 z)). */
XD_INLINE vf gelu_tanh(vf g) {
  vf cube = vf_mul(vf_mul(g, g), g);
  return sigmoid_times(g, vf_mul(vf_set(-0x1.988454p0f), vf_fma(cube, vf_set(0.044715f), g)));
}

XD_INLINE vf activate(int activation, vf g, vf up, vf alpha, vf limit) {
  const vf minus = vf_sub(vf_set(0), limit);
  if (activation == XD_GELU_TANH) return vf_mul(gelu_tanh(g), up);
  if (activation == XD_RELU2) {
    vf positive = vf_max(vf_set(0), g);
    return vf_mul(vf_mul(positive, positive), up);
  }
  up = vf_max(minus, vf_min(limit, up));
  if (activation == XD_CLIPPED_SILU) return vf_mul(vf_min(limit, silu(g)), up);
  g = vf_min(limit, g);
  if (activation == XD_SILU) return vf_mul(silu(g), up);
  return vf_mul(sigmoid_times(g, vf_mul(vf_sub(vf_set(0), alpha), g)), vf_add(up, vf_set(1)));
}

XD_TILE void glu_rows(const xd_glu *g, int64_t first, int64_t last, int activation, int dtype) {
  const vf alpha = vf_set(g->alpha), limit = vf_set(g->limit > 0 ? g->limit : INFINITY), one = vf_set(1);
  size_t size = xd_itemsize(dtype);
  for (int64_t row = first; row < last; row++) {
    const char *gate = (const char *)g->gate + (size_t)(row * g->gate_stride) * size;
    const char *up = g->up ? (const char *)g->up + (size_t)(row * g->up_stride) * size : NULL;
    char *y = (char *)g->y + (size_t)(row * g->y_stride) * size;
    int64_t k = 0, rest = g->width % 8;
    for (; k + 8 <= g->width; k += 8) {
      vf u = up ? vf_load_any(up, dtype, k) : one;
      vf_store_any(y, dtype, k, activate(activation, vf_load_any(gate, dtype, k), u, alpha, limit));
    }
    if (!rest) continue;
    vf u = up ? vf_load_some(up, dtype, k, rest) : one;
    vf_store_some(y, dtype, k, activate(activation, vf_load_some(gate, dtype, k, rest), u, alpha, limit), rest);
  }
}

static void glu(const xd_glu *g, int64_t first, int64_t last) {
#define GLU_CASE(activation)                                                                            \
  case activation:                                                                                      \
    if (g->dtype == XD_FLOAT32) glu_rows(g, first, last, activation, XD_FLOAT32);                       \
    if (g->dtype == XD_FLOAT16) glu_rows(g, first, last, activation, XD_FLOAT16);                       \
    if (g->dtype == XD_BFLOAT16) glu_rows(g, first, last, activation, XD_BFLOAT16);                     \
    break;
  switch (g->activation) {
    GLU_CASE(XD_SILU)
    GLU_CASE(XD_SWIGLU_OAI)
    GLU_CASE(XD_CLIPPED_SILU)
    GLU_CASE(XD_GELU_TANH)
    GLU_CASE(XD_RELU2)
  }
#undef GLU_CASE
}
