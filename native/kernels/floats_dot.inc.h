/* floats_dot.inc.h: plain products.

   Theory of operation. y = sum over k of w[k] x[k], in 8 lanes (k mod 8), each ascending by fma, added by vf_sum; a width that
   is no multiple of 8 is padded with zeros. A tile of 4 weight rows and 1 to 3 rows of x has 4 to 12 such sums in registers:
   enough to hide an fma's latency, and with 12 each number loaded, and widened on its way, serves 3 or 4 of them. With up
   to 3 rows of x the weights are streamed once from memory: decoding. With more, the width is cut into chunks whose rows of x stay
   in the L2 cache while all weight rows pass, and sums wait in `state`: prefill. Either way a sum is the same chain. */

enum { TILE_W = 4, TILE_X = 3, DOT_CHUNK = 512 };

typedef struct {
  const char *w[TILE_W];
  const float *const *x;
  vf *state;
  float (*y)[DOT_OUT]; /* from the first row and output of the tile */
  int64_t from, to, width;
  int num_out;
} dot_part;

XD_INLINE void dot_steps(const dot_part *p, int dtype, int num_x, vf *sums) {
  int64_t k = p->from;
  for (; k + 8 <= p->to; k += 8) {
    vf x[TILE_X];
    for (int r = 0; r < num_x; r++) x[r] = vf_load(p->x[r] + k);
    for (int i = 0; i < TILE_W; i++) {
      vf w = vf_load_any(p->w[i], dtype, k);
      for (int r = 0; r < num_x; r++) sums[i * num_x + r] = vf_fma(w, x[r], sums[i * num_x + r]);
    }
  }
  if (k >= p->to) return;
  for (int i = 0; i < TILE_W; i++) {
    vf w = vf_load_some(p->w[i], dtype, k, p->to - k);
    for (int r = 0; r < num_x; r++) sums[i * num_x + r] = vf_fma(w, vf_load(p->x[r] + k), sums[i * num_x + r]);
  }
}

XD_INLINE void dot_finish(const dot_part *p, int num_x, const vf *sums) {
  float y[16] = {0};
  vf_store(y, vf_sum8(sums));
  if (num_x == 3) vf_store(y + 8, vf_sum8(sums + 8));
  for (int i = 0; i < p->num_out; i++)
    for (int r = 0; r < num_x; r++) p->y[r][i] = y[i * num_x + r];
}

XD_INLINE void dot_tile(const dot_part *p, int dtype, int num_x) {
  vf sums[16];
  for (int i = 0; i < 16; i++) sums[i] = vf_set(0);
  if (p->from > 0)
    for (int i = 0; i < TILE_W * num_x; i++) sums[i] = p->state[i];
  dot_steps(p, dtype, num_x, sums);
  if (p->to == p->width)
    dot_finish(p, num_x, sums);
  else
    for (int i = 0; i < TILE_W * num_x; i++) p->state[i] = sums[i];
}

static void dot_f32_1(const dot_part *p) { dot_tile(p, XD_FLOAT32, 1); }
static void dot_f32_2(const dot_part *p) { dot_tile(p, XD_FLOAT32, 2); }
static void dot_f32_3(const dot_part *p) { dot_tile(p, XD_FLOAT32, 3); }
static void dot_f16_1(const dot_part *p) { dot_tile(p, XD_FLOAT16, 1); }
static void dot_f16_2(const dot_part *p) { dot_tile(p, XD_FLOAT16, 2); }
static void dot_f16_3(const dot_part *p) { dot_tile(p, XD_FLOAT16, 3); }
static void dot_bf16_1(const dot_part *p) { dot_tile(p, XD_BFLOAT16, 1); }
static void dot_bf16_2(const dot_part *p) { dot_tile(p, XD_BFLOAT16, 2); }
static void dot_bf16_3(const dot_part *p) { dot_tile(p, XD_BFLOAT16, 3); }

static void dot(const xd_dot *d) {
  static void (*const tiles[3][TILE_X])(const dot_part *) = {
      [XD_FLOAT32] = {dot_f32_1, dot_f32_2, dot_f32_3},
      [XD_FLOAT16] = {dot_f16_1, dot_f16_2, dot_f16_3},
      [XD_BFLOAT16] = {dot_bf16_1, dot_bf16_2, dot_bf16_3},
  };
  int64_t chunk = d->num_rows <= TILE_X || d->width == 0 ? d->width : DOT_CHUNK;
  size_t row_bytes = (size_t)d->width * xd_itemsize(d->dtype);
  dot_part p = {.to = 0, .width = d->width};
  do {
    p.from = p.to;
    p.to = p.from + chunk < d->width ? p.from + chunk : d->width;
    p.state = d->state;
    for (int n = 0; n < d->num_out; n += TILE_W) {
      p.num_out = d->num_out - n < TILE_W ? d->num_out - n : TILE_W;
      for (int i = 0; i < TILE_W; i++) /* beyond the last row, the last once more */
        p.w[i] = (const char *)d->w + (size_t)(n + (i < p.num_out ? i : p.num_out - 1)) * row_bytes;
      for (int r = 0; r < d->num_rows; r += TILE_X, p.state += TILE_W * TILE_X) {
        int num_x = d->num_rows - r < TILE_X ? d->num_rows - r : TILE_X;
        p.x = d->x + r;
        p.y = (float(*)[DOT_OUT])&d->y[r][n];
        tiles[d->dtype][num_x - 1](&p);
      }
    }
  } while (p.to < d->width);
}
