/* floats_dot.inc.h: plain products.

   Theory of operation. y = sum over k of w[k] x[k], in 8 lanes (k mod 8), each ascending by fma, added by vf_sum; a
   width that is no multiple of 8 is padded with zeros. A tile of 4 weight rows and 1 to 3 rows of x has 4 to 12 such
   sums in registers: enough to hide an fma's latency, and with 12 each number loaded serves 3 or 4 of them.

   4 weight rows go from end to end past a block of rows of x that stays in the L2 cache (plain.c chooses it), in
   chunks of 512 columns, so that what a tile reads stays in L1; sums wait in `state` from one chunk to the next.
   Weights are widened on their way into a tile. Widening them once for all tiles, into a panel, was no faster even
   with 96 rows. */

enum { TILE_W = 4, TILE_X = 3 };

typedef struct {
  const char *w[TILE_W]; /* from the chunk on, like x */
  const float *x[TILE_X];
  vf *state;
  float (*y)[DOT_OUT]; /* from the first row and output of the tile */
  int64_t length;      /* of the chunk */
  int64_t ahead;       /* bytes to the next 4 rows, which are asked for on the way; 0: not */
  int num_out, is_first, is_last;
} dot_part;

XD_TILE void dot_steps(const dot_part *p, int dtype, int num_x, vf *sums) {
  const int64_t line = 64 / (int64_t)xd_itemsize(dtype);
  int64_t k = 0;
  for (; k + 8 <= p->length; k += 8) {
    if (p->ahead && k % line == 0)
      for (int i = 0; i < TILE_W; i++)
        __builtin_prefetch((const char *)((uintptr_t)(p->w[i] + k * (int64_t)xd_itemsize(dtype)) + (uintptr_t)p->ahead));
    vf x[TILE_X];
    for (int r = 0; r < num_x; r++) x[r] = vf_load(p->x[r] + k);
    for (int i = 0; i < TILE_W; i++) {
      vf w = vf_load_any(p->w[i], dtype, k);
      for (int r = 0; r < num_x; r++) sums[i * num_x + r] = vf_fma(w, x[r], sums[i * num_x + r]);
    }
  }
  if (k == p->length) return;
  for (int i = 0; i < TILE_W; i++) {
    vf w = vf_load_some(p->w[i], dtype, k, p->length - k);
    for (int r = 0; r < num_x; r++) sums[i * num_x + r] = vf_fma(w, vf_load(p->x[r] + k), sums[i * num_x + r]);
  }
}

XD_TILE void dot_finish(const dot_part *p, int num_x, const vf *sums) {
  float y[16] = {0};
  vf all[16];
  for (int i = 0; i < 16; i++) all[i] = i < TILE_W * num_x ? sums[i] : sums[0];
  vf_store(y, vf_sum8(all));
  if (num_x == 3) vf_store(y + 8, vf_sum8(all + 8));
  for (int i = 0; i < p->num_out; i++)
    for (int r = 0; r < num_x; r++) p->y[r][i] = y[i * num_x + r];
}

XD_TILE void dot_tile(const dot_part *p, int dtype, int num_x) {
  vf sums[TILE_W * TILE_X];
  if (p->is_first)
    for (int i = 0; i < TILE_W * num_x; i++) sums[i] = vf_set(0);
  else
    for (int i = 0; i < TILE_W * num_x; i++) sums[i] = p->state[i];
  dot_steps(p, dtype, num_x, sums);
  if (p->is_last)
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

typedef void (*dot_function)(const dot_part *);

static const dot_function DOT_TILES[3][TILE_X] = {
    [XD_FLOAT32] = {dot_f32_1, dot_f32_2, dot_f32_3},
    [XD_FLOAT16] = {dot_f16_1, dot_f16_2, dot_f16_3},
    [XD_BFLOAT16] = {dot_bf16_1, dot_bf16_2, dot_bf16_3},
};

/* All rows of x against the weight rows of `part`, in tiles as equal as may be: 4 rows are 2 and 2. */
static void dot_rows(const xd_dot *d, dot_part part, int64_t from, int n) {
  int num_tiles = (d->num_rows + TILE_X - 1) / TILE_X;
  for (int t = 0; t < num_tiles; t++, part.state += TILE_W * TILE_X) {
    int r = d->num_rows * t / num_tiles, end = d->num_rows * (t + 1) / num_tiles;
    for (int i = 0; i < end - r; i++) part.x[i] = d->x[r + i] + from / DOT_CHUNK * d->x_chunk_stride;
    part.y = (float(*)[DOT_OUT])&d->y[r][n];
    if (t) part.ahead = 0;
    DOT_TILES[d->dtype][end - r - 1](&part);
  }
}

/* The chunk at `from` of weight rows n .. n + 3. */
static dot_part dot_part_at(const xd_dot *d, int64_t from, int n) {
  const size_t size = xd_itemsize(d->dtype);
  dot_part part = {.is_first = from == 0, .is_last = from + DOT_CHUNK >= d->width};
  part.num_out = d->num_out - n < TILE_W ? d->num_out - n : TILE_W;
  part.length = part.is_last ? d->width - from : DOT_CHUNK;
  part.ahead = TILE_W * d->width * (int64_t)size;
  for (int i = 0; i < TILE_W; i++) { /* beyond the last row, the last once more */
    int64_t row = n + (i < part.num_out ? i : part.num_out - 1);
    part.w[i] = (const char *)d->w + (size_t)(row * d->width + from) * size;
  }
  return part;
}

static void dot(const xd_dot *d) {
  vf state[DOT_ROWS * TILE_W];
  for (int n = 0; n < d->num_out; n += TILE_W) {
    int64_t from = 0;
    do {
      dot_part part = dot_part_at(d, from, n);
      part.state = state;
      dot_rows(d, part, from, n);
      from += DOT_CHUNK;
    } while (from < d->width);
  }
}
