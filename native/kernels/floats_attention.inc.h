/* floats_attention.inc.h: one unit of attention: up to 32 rows (pairs of head and query) that share keys and values.

   Theory of operation. Keys pass a block at a time, small enough for the L1 cache, and meet all rows in tiles of 4
   rows and 3 keys; all scores of a row are kept. After the softmax values pass in the same way, in tiles of 4 rows
   and 24 dimensions. So a number of k or v comes from memory once for all rows. Up to WIDEN_ABOVE rows it is widened
   on its way into each tile, for more once into a block of float32: per 8 rows of dimension 128 and 32 keys, tiles
   of bfloat16 take 1.11 us for scores and 0.89 for values, tiles of float32 0.98 and 0.78, widening 0.18 each (Zen
   3, 2.85 GHz; 0.72 would be the peak).

   A row's visible keys are mostly one interval, first .. last - 1. Tiles compute scores for whatever lies inside the
   unit's hull, hidden or not, since nothing else depends on them; but values of hidden keys are left out, not
   multiplied by zero. The keys that 4 rows all see go through the tile, those before and after row by row; a row
   with holes (has_holes) always goes alone, its hidden keys marked by the score HIDDEN. Each sum keeps its order by
   visible key in every case. */

#define HIDDEN (-1.0f) /* no weight is negative */

enum { TILE_ROWS = 4, WIDEN_ABOVE = 8 };

/* What each row sees. */

static int is_hidden(const xd_attention *a, const char *mask, int64_t key) {
  int64_t at = key * a->mask_key_stride;
  if (a->mask_kind == XD_MASK_BOOL) return mask[at] == 0;
  if (a->mask_dtype == XD_FLOAT32) return ((const float *)mask)[at] <= -0x1.fffffep127f;
  uint16_t h = ((const uint16_t *)mask)[at]; /* by bits: the lowest finite number and -inf are the two largest that are no NaN */
  return a->mask_dtype == XD_BFLOAT16 ? h == 0xff7f || h == 0xff80 : h == 0xfbff || h == 0xfc00;
}

static void look_at_mask(const xd_attention *a, xd_attend_row *row) {
  int64_t hidden = 0;
  while (row->first < row->last && is_hidden(a, row->mask, row->first)) row->first++;
  while (row->first < row->last && is_hidden(a, row->mask, row->last - 1)) row->last--;
  for (int64_t k = row->first; k < row->last; k++) hidden += is_hidden(a, row->mask, k);
  row->has_holes = hidden > 0;
}

static void open_row(const xd_attend *j, xd_attend_unit *u, int64_t index, xd_attend_row *row) {
  const xd_attention *a = j->a;
  const size_t size = xd_itemsize(a->dtype), mask_size = a->mask_kind == XD_MASK_BOOL ? 1 : xd_itemsize(a->mask_dtype);
  int64_t b = u->batch, query = index % a->queries, head = u->kv_head * (a->heads / a->kv_heads) + index / a->queries;
  *row = (xd_attend_row){.last = a->keys, .head = (int32_t)head};
  row->q = (const char *)a->q + (size_t)(b * a->q_batch_stride + head * a->q_head_stride + query * a->q_row_stride) * size;
  row->y = (char *)a->y + (size_t)(b * a->y_batch_stride + head * a->y_head_stride + query * a->y_row_stride) * size;
  if (a->mask_kind == XD_MASK_CAUSAL) {
    int64_t last = (int64_t)a->keys - a->queries + query + 1;
    row->last = last < 0 ? 0 : last;
  } else if (a->mask_kind != XD_MASK_NONE) {
    int64_t at = b * a->mask_batch_stride + head * a->mask_head_stride + query * a->mask_row_stride;
    row->mask = (const char *)a->mask + (size_t)at * mask_size;
    look_at_mask(a, row);
  }
}

static void attend_open(const xd_attend *j, xd_attend_unit *u, int64_t index) {
  const xd_attention *a = j->a;
  int64_t first = index % j->num_blocks * j->unit_rows;
  u->batch = index / j->num_blocks / a->kv_heads, u->kv_head = index / j->num_blocks % a->kv_heads;
  u->num_rows = (int)(j->num_rows - first < j->unit_rows ? j->num_rows - first : j->unit_rows);
  for (int r = 0; r < u->num_rows; r++) open_row(j, u, first + r, &u->rows[r]);
}

/* Where a tile finds keys or values: as they are, or widened. */
typedef struct {
  const char *rows; /* the first key's */
  int64_t row_bytes;
  int dtype;
} key_rows;

/* Keys key .. key + n - 1 of k or v, whose key 0 is at `at`; `width` numbers of each. */
static key_rows rows_of(const xd_attend *j, xd_attend_unit *u, const char *at, int64_t row_stride, int64_t key, int64_t n,
                        int64_t width) {
  const int dtype = j->a->dtype;
  key_rows found = {.row_bytes = row_stride * (int64_t)xd_itemsize(dtype), .dtype = dtype};
  found.rows = at + key * found.row_bytes;
  if (dtype == XD_FLOAT32 || u->num_rows <= WIDEN_ABOVE) return found;
  int64_t stride = xd_round_up(width, 8);
  for (int64_t i = 0; i < n; i++) widen_row(found.rows + i * found.row_bytes, dtype, width, u->block + i * stride);
  return (key_rows){(const char *)u->block, stride * 4, XD_FLOAT32};
}

/* Scores. */

typedef struct {
  key_rows k;
  const float *q; /* rows dim8 apart */
  float *scores;
  int64_t n, dim, dim8, score_stride;
  float scale;
} score_part;

/* num_q rows against num_k keys, at most 12 pairs. */
XD_TILE void score_tile(const score_part *p, int dtype, int num_q, int num_k, int64_t first) {
  vf sums[16];
  const char *keys = p->k.rows + first * p->k.row_bytes;
  int64_t d = 0;
  for (int i = 0; i < 16; i++) sums[i] = vf_set(0);
  for (; d + 8 <= p->dim; d += 8) {
    vf q[TILE_ROWS];
    for (int r = 0; r < num_q; r++) q[r] = vf_load(p->q + r * p->dim8 + d);
    for (int i = 0; i < num_k; i++) {
      vf k = vf_load_any(keys + i * p->k.row_bytes, dtype, d);
      for (int r = 0; r < num_q; r++) sums[r * num_k + i] = vf_fma(q[r], k, sums[r * num_k + i]);
    }
  }
  for (int i = 0; d < p->dim && i < num_k; i++) {
    vf k = vf_load_some(keys + i * p->k.row_bytes, dtype, d, p->dim - d);
    for (int r = 0; r < num_q; r++) sums[r * num_k + i] = vf_fma(vf_load(p->q + r * p->dim8 + d), k, sums[r * num_k + i]);
  }
  float all[16];
  vf_store(all, vf_mul(vf_sum8(sums), vf_set(p->scale)));
  if (num_q * num_k > 8) vf_store(all + 8, vf_mul(vf_sum8(sums + 8), vf_set(p->scale)));
  for (int r = 0; r < num_q; r++) memcpy(p->scores + r * p->score_stride + first, all + r * num_k, (size_t)num_k * 4);
}

XD_TILE void score_tiles(const score_part *p, int dtype, int num_q, int num_k) {
  int64_t i = 0;
  for (; i + num_k <= p->n; i += num_k) score_tile(p, dtype, num_q, num_k, i);
  for (; i < p->n; i++) score_tile(p, dtype, num_q, 1, i);
}

typedef void (*score_function)(const score_part *);
#define SCORE_TILES(name, dtype)                                                     \
  static void score_##name##_1(const score_part *p) { score_tiles(p, dtype, 1, 8); } \
  static void score_##name##_2(const score_part *p) { score_tiles(p, dtype, 2, 4); } \
  static void score_##name##_3(const score_part *p) { score_tiles(p, dtype, 3, 4); } \
  static void score_##name##_4(const score_part *p) { score_tiles(p, dtype, 4, 3); }
SCORE_TILES(f32, XD_FLOAT32)
SCORE_TILES(f16, XD_FLOAT16)
SCORE_TILES(bf16, XD_BFLOAT16)

/* num_q rows from r on against the keys from `key` on, as far as one of them sees. */
static void score_rows(const xd_attend *j, xd_attend_unit *u, int r, int num_q, key_rows k, int64_t key, int64_t n) {
  static const score_function tiles[3][TILE_ROWS] = {
      [XD_FLOAT32] = {score_f32_1, score_f32_2, score_f32_3, score_f32_4},
      [XD_FLOAT16] = {score_f16_1, score_f16_2, score_f16_3, score_f16_4},
      [XD_BFLOAT16] = {score_bf16_1, score_bf16_2, score_bf16_3, score_bf16_4},
  };
  score_part part = {.k = k, .q = u->q + (int64_t)r * j->dim8, .dim = j->a->dim, .dim8 = j->dim8};
  part.scores = u->scores + r * j->score_stride + key, part.score_stride = j->score_stride;
  part.scale = j->a->scale;
  for (int i = 0; i < num_q; i++)
    if (u->rows[r + i].last - key > part.n) part.n = u->rows[r + i].last - key;
  if (part.n > n) part.n = n;
  tiles[k.dtype][num_q - 1](&part);
}

/* The keys that any row may see, cut to from .. to - 1. */
static void hull(const xd_attend_unit *u, int64_t *from, int64_t *to) {
  int64_t first = *to, last = *from;
  for (int r = 0; r < u->num_rows; r++) {
    if (u->rows[r].first >= u->rows[r].last) continue;
    if (u->rows[r].first < first) first = u->rows[r].first;
    if (u->rows[r].last > last) last = u->rows[r].last;
  }
  if (first > *from) *from = first;
  if (last < *to) *to = last;
}

static void attend_scores(const xd_attend *j, xd_attend_unit *u, int64_t from, int64_t to) {
  const xd_attention *a = j->a;
  int64_t start = u->batch * a->k_batch_stride + u->kv_head * a->k_head_stride;
  const char *k = (const char *)a->k + start * (int64_t)xd_itemsize(a->dtype);
  hull(u, &from, &to);
  for (int r = 0; r < u->num_rows; r++) widen_row(u->rows[r].q, a->dtype, a->dim, u->q + (int64_t)r * j->dim8);
  for (int64_t key = from; key < to; key += j->block_keys) {
    int64_t n = to - key < j->block_keys ? to - key : j->block_keys;
    key_rows rows = rows_of(j, u, k, a->k_row_stride, key, n, a->dim);
    for (int r = 0; r < u->num_rows; r += TILE_ROWS)
      score_rows(j, u, r, u->num_rows - r < TILE_ROWS ? u->num_rows - r : TILE_ROWS, rows, key, n);
  }
}

/* Softmax. */

static void add_mask(const xd_attention *a, const xd_attend_row *row, float *scores) {
  const size_t size = xd_itemsize(a->mask_dtype);
  int64_t k = row->first;
  if (a->mask_key_stride == 1)
    for (; k + 8 <= row->last; k += 8)
      vf_store(scores + k, vf_add(vf_load(scores + k), vf_load_any(row->mask, a->mask_dtype, k)));
  for (; k < row->last; k++) {
    float number;
    xd_widen(row->mask + (size_t)(k * a->mask_key_stride) * size, a->mask_dtype, &number, 1);
    scores[k] += number;
  }
}

static float largest(const float *x, int64_t n) {
  vf most = vf_set(-INFINITY);
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) most = vf_max(vf_load(x + k), most);
  float lanes[8], found = -INFINITY;
  vf_store(lanes, most);
  for (int i = 0; i < 8; i++)
    if (lanes[i] > found) found = lanes[i];
  for (; k < n; k++)
    if (x[k] > found) found = x[k];
  return found;
}

/* x = exp(x - most); gives their sum by lanes. */
static float exponentials(float *x, int64_t n, float most) {
  vf sums = vf_set(0), shift = vf_set(most);
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    vf e = vf_exp(vf_sub(vf_load(x + k), shift));
    vf_store(x + k, e);
    sums = vf_add(sums, e);
  }
  if (k < n) {
    float lanes[8] = {0};
    vf e = vf_exp(vf_sub(vf_load_some(x, XD_FLOAT32, k, n - k), shift));
    vf_store_some(lanes, XD_FLOAT32, 0, e, n - k);
    memcpy(x + k, lanes, (size_t)(n - k) * 4);
    sums = vf_add(sums, vf_load(lanes));
  }
  return vf_sum(sums);
}

/* The same with holes: lanes are counted over visible keys. */
static float exponentials_between(const xd_attention *a, const xd_attend_row *row, float *x, float most) {
  float lanes[8] = {0};
  int64_t rank = 0, n = row->last - row->first;
  exponentials(x, n, most);
  for (int64_t k = 0; k < n; k++) {
    if (is_hidden(a, row->mask, row->first + k))
      x[k] = HIDDEN;
    else
      lanes[rank++ % 8] += x[k];
  }
  return vf_sum(vf_load(lanes));
}

static void attend_softmax(const xd_attend *j, xd_attend_unit *u, int r) {
  const xd_attention *a = j->a;
  const xd_attend_row *row = &u->rows[r];
  float *scores = u->scores + r * j->score_stride, *x = scores + row->first, sink = -INFINITY, one[8] = {0};
  int64_t n = row->last - row->first;
  if (n <= 0) return;
  if (a->mask_kind == XD_MASK_ADD) add_mask(a, row, scores);
  for (int64_t k = 0; row->has_holes && k < n; k++)
    if (is_hidden(a, row->mask, row->first + k)) x[k] = -INFINITY;
  if (a->sinks)
    xd_widen((const char *)a->sinks + (size_t)row->head * xd_itemsize(a->sinks_dtype), a->sinks_dtype, &sink, 1);
  float most = largest(x, n);
  if (sink > most) most = sink;
  float sum = row->has_holes ? exponentials_between(a, row, x, most) : exponentials(x, n, most);
  vf_store(one, vf_exp(vf_set(sink - most)));
  u->sums[r] = a->sinks ? sum + one[0] : sum;
}

/* Values. */

typedef struct {
  const float *weights[TILE_ROWS];
  key_rows v;
  float *acc; /* rows `stride` apart */
  int64_t n, width, stride;
} value_part;

/* acc[r][d .. d + 8 num_v - 1] += sum over n keys of weights[r][key] v[key]. If `rest` is not 0, num_v is 1 and only
   so many of the 8 dimensions are left. */
XD_TILE void value_tile(const value_part *p, int dtype, int num_r, int num_v, int64_t d, int64_t rest) {
  vf sums[12];
  for (int r = 0; r < num_r; r++)
    for (int i = 0; i < num_v; i++) sums[r * num_v + i] = vf_load(p->acc + r * p->stride + d + 8 * i);
  const char *v = p->v.rows;
  for (int64_t k = 0; k < p->n; k++, v += p->v.row_bytes) {
    vf value[8];
    for (int i = 0; i < num_v; i++) value[i] = rest ? vf_load_some(v, dtype, d, rest) : vf_load_any(v, dtype, d + 8 * i);
    for (int r = 0; r < num_r; r++) {
      const vf weight = vf_set(p->weights[r][k]);
      for (int i = 0; i < num_v; i++) sums[r * num_v + i] = vf_fma(weight, value[i], sums[r * num_v + i]);
    }
  }
  for (int r = 0; r < num_r; r++)
    for (int i = 0; i < num_v; i++) vf_store(p->acc + r * p->stride + d + 8 * i, sums[r * num_v + i]);
}

/* 8 num_v dimensions at a time. A tile of 4 x 1 waits for its fma: 128 dimensions are 4 times 24 and twice 16. */
XD_TILE void value_tiles(const value_part *p, int dtype, int num_r, int num_v) {
  int64_t d = 0, left = p->width;
  for (; left >= 8 * num_v && (num_v != 3 || left / 8 != 4); d += 8 * num_v, left -= 8 * num_v)
    value_tile(p, dtype, num_r, num_v, d, 0);
  for (; left >= 16; d += 16, left -= 16) value_tile(p, dtype, num_r, 2, d, 0);
  for (; left >= 8; d += 8, left -= 8) value_tile(p, dtype, num_r, 1, d, 0);
  if (left > 0) value_tile(p, dtype, num_r, 1, d, left);
}

typedef void (*value_function)(const value_part *);
#define VALUE_TILES(name, dtype)                                                     \
  static void value_##name##_1(const value_part *p) { value_tiles(p, dtype, 1, 8); } \
  static void value_##name##_2(const value_part *p) { value_tiles(p, dtype, 2, 4); } \
  static void value_##name##_3(const value_part *p) { value_tiles(p, dtype, 3, 3); } \
  static void value_##name##_4(const value_part *p) { value_tiles(p, dtype, 4, 3); }
VALUE_TILES(f32, XD_FLOAT32)
VALUE_TILES(f16, XD_FLOAT16)
VALUE_TILES(bf16, XD_BFLOAT16)

/* Keys key .. end - 1 and their values. */
typedef struct {
  key_rows v;
  int64_t key, end, width;
} value_block;

/* Rows r .. r + num_r - 1, keys from .. to - 1 of a block, which all of them see. */
static void add_values(const xd_attend *j, xd_attend_unit *u, int r, int num_r, const value_block *b, int64_t from,
                       int64_t to) {
  static const value_function tiles[3][TILE_ROWS] = {
      [XD_FLOAT32] = {value_f32_1, value_f32_2, value_f32_3, value_f32_4},
      [XD_FLOAT16] = {value_f16_1, value_f16_2, value_f16_3, value_f16_4},
      [XD_BFLOAT16] = {value_bf16_1, value_bf16_2, value_bf16_3, value_bf16_4},
  };
  value_part part = {.v = b->v, .n = to - from, .width = b->width, .stride = xd_round_up(b->width, 8)};
  if (part.n <= 0) return;
  part.v.rows += (from - b->key) * b->v.row_bytes;
  part.acc = u->acc + r * part.stride;
  for (int i = 0; i < num_r; i++) part.weights[i] = u->scores + (r + i) * j->score_stride + from;
  tiles[b->v.dtype][num_r - 1](&part);
}

/* Row r alone, of keys from .. to - 1 those that it sees. */
static void add_alone(const xd_attend *j, xd_attend_unit *u, int r, const value_block *b, int64_t from, int64_t to) {
  const xd_attend_row *row = &u->rows[r];
  const float *weights = u->scores + r * j->score_stride;
  if (from < row->first) from = row->first;
  if (to > row->last) to = row->last;
  while (from < to) {
    int64_t end = row->has_holes ? from : to;
    while (end < to && weights[end] != HIDDEN) end++;
    add_values(j, u, r, 1, b, from, end);
    from = end + 1;
  }
}

static void add_block(const xd_attend *j, xd_attend_unit *u, int r, int num_r, const value_block *b) {
  int64_t from = b->key, to = b->end;
  for (int i = 0; i < num_r; i++) {
    const xd_attend_row *row = &u->rows[r + i];
    if (row->first > from) from = row->first;
    if (row->last < to) to = row->last;
    if (row->has_holes) from = b->end;
  }
  if (from >= to) from = to = b->end; /* nothing that all of them see */
  for (int i = 0; i < num_r; i++) add_alone(j, u, r + i, b, b->key, from);
  add_values(j, u, r, num_r, b, from, to);
  for (int i = 0; i < num_r; i++) add_alone(j, u, r + i, b, to, b->end);
}

static void store_row(const xd_attend *j, const xd_attend_unit *u, int r, int64_t from, int64_t n, int64_t stride) {
  const xd_attention *a = j->a;
  const xd_attend_row *row = &u->rows[r];
  const vf sum = vf_set(row->first < row->last ? u->sums[r] : 1);
  const float *acc = u->acc + r * stride;
  int64_t d = 0;
  for (; d + 8 <= n; d += 8) vf_store_any(row->y, a->dtype, from + d, vf_div(vf_load(acc + d), sum));
  if (d < n) vf_store_some(row->y, a->dtype, from + d, vf_div(vf_load(acc + d), sum), n - d);
}

static void attend_values(const xd_attend *j, xd_attend_unit *u, int dim_from, int dim_to) {
  const xd_attention *a = j->a;
  int64_t from = 0, to = a->keys, width = dim_to - dim_from, stride = xd_round_up(width, 8);
  int64_t start = u->batch * a->v_batch_stride + u->kv_head * a->v_head_stride + dim_from;
  const char *v = (const char *)a->v + start * (int64_t)xd_itemsize(a->dtype);
  hull(u, &from, &to);
  memset(u->acc, 0, (size_t)(u->num_rows * stride) * 4);
  for (int64_t key = from; key < to; key += j->block_keys) {
    value_block block = {.key = key, .end = to - key < j->block_keys ? to : key + j->block_keys, .width = width};
    block.v = rows_of(j, u, v, a->v_row_stride, key, block.end - key, width);
    for (int r = 0; r < u->num_rows; r += TILE_ROWS)
      add_block(j, u, r, u->num_rows - r < TILE_ROWS ? u->num_rows - r : TILE_ROWS, &block);
  }
  for (int r = 0; r < u->num_rows; r++) store_row(j, u, r, dim_from, width, stride);
}
