/* floats_attention.inc.h: one unit of attention: up to 32 rows (pairs of head and query) that share keys and values.

   Theory of operation. Keys are widened to float32 a block at a time, small enough for the L1 cache, and met by all rows in
   tiles of 2 rows and 4 keys; all scores of a row are kept. After the softmax values pass in the same way, in tiles of 4 rows and
   16 dimensions. A bfloat16 number of k or v is so read once for all rows, and widened once.

   A row's visible keys are mostly one interval, first .. last - 1. Tiles compute scores for whatever lies inside the
   unit's hull, hidden or not, since nothing else depends on them; but values of hidden keys are left out, not multiplied by zero.
   The keys that 4 rows all see go through the tile, those before and after row by row; a row with holes (has_holes) always
   goes alone, its hidden keys marked by the score HIDDEN. Each sum keeps its order by visible key in every case. */

#define HIDDEN (-1.0f) /* no weight is negative */

enum { SCORE_TILE = 8, VALUE_ROWS = 4 };

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

/* n rows of k or v, from `row` on. */
static void widen_rows(const char *from, int dtype, int64_t row_stride, int64_t row, int64_t n, int64_t width, float *to,
                       int64_t to_stride) {
  const size_t row_bytes = (size_t)row_stride * xd_itemsize(dtype);
  for (int64_t i = 0; i < n; i++) widen_row(from + (size_t)(row + i) * row_bytes, dtype, width, to + i * to_stride);
}

/* Scores. */

/* num_q rows against SCORE_TILE / num_q keys. */
XD_INLINE void score_tile(const float *q, const float *k, int64_t dim8, int num_q, vf scale, float *scores,
                          int64_t score_stride) {
  const int num_k = SCORE_TILE / num_q;
  vf sums[SCORE_TILE];
  for (int i = 0; i < SCORE_TILE; i++) sums[i] = vf_set(0);
  for (int64_t d = 0; d < dim8; d += 8) {
    vf a[2];
    for (int r = 0; r < num_q; r++) a[r] = vf_load(q + r * dim8 + d);
    for (int i = 0; i < num_k; i++) {
      vf b = vf_load(k + i * dim8 + d);
      for (int r = 0; r < num_q; r++) sums[r * num_k + i] = vf_fma(a[r], b, sums[r * num_k + i]);
    }
  }
  float all[SCORE_TILE];
  vf_store(all, vf_mul(vf_sum8(sums), scale));
  for (int r = 0; r < num_q; r++) memcpy(scores + r * score_stride, all + r * num_k, (size_t)num_k * 4);
}

/* Rows r and, if there is one, r + 1 against the block's keys key .. key + n - 1, as far as they see. */
static void score_pair(const xd_attend *j, xd_attend_unit *u, int r, int64_t key, int64_t n) {
  const vf scale = vf_set(j->a->scale);
  const float *q = u->q + (int64_t)r * j->dim8;
  float *scores = u->scores + r * j->score_stride + key;
  int num_q = r + 1 < u->num_rows ? 2 : 1;
  int64_t last = u->rows[r].last;
  if (num_q == 2 && u->rows[r + 1].last > last) last = u->rows[r + 1].last;
  if (last - key < n) n = last - key;
  if (num_q == 2)
    for (int64_t i = 0; i < n; i += SCORE_TILE / 2)
      score_tile(q, u->block + i * j->dim8, j->dim8, 2, scale, scores + i, j->score_stride);
  else
    for (int64_t i = 0; i < n; i += SCORE_TILE)
      score_tile(q, u->block + i * j->dim8, j->dim8, 1, scale, scores + i, j->score_stride);
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
  const size_t start = (size_t)(u->batch * a->k_batch_stride + u->kv_head * a->k_head_stride) * xd_itemsize(a->dtype);
  hull(u, &from, &to);
  from = from / 8 * 8; /* so that no tile reaches beyond a multiple of 8, where another thread may begin */
  for (int r = 0; r < u->num_rows; r++)
    widen_rows(u->rows[r].q, a->dtype, 0, 0, 1, a->dim, u->q + (int64_t)r * j->dim8, 0);
  for (int64_t key = from; key < to; key += j->block_keys) {
    int64_t n = to - key < j->block_keys ? to - key : j->block_keys, filled = xd_round_up(n, SCORE_TILE);
    widen_rows((const char *)a->k + start, a->dtype, a->k_row_stride, key, n, a->dim, u->block, j->dim8);
    memset(u->block + n * j->dim8, 0, (size_t)((filled - n) * j->dim8) * 4);
    for (int r = 0; r < u->num_rows; r += 2) score_pair(j, u, r, key, n);
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

/* acc[r][0 .. 8 num_v - 1] += sum over n keys of weights[r][key] v[key]. */
XD_INLINE void value_tile(const float *const *weights, const float *v, int64_t n, int64_t stride, int num_r, int num_v,
                          float *acc) {
  vf sums[8];
  for (int r = 0; r < num_r; r++)
    for (int i = 0; i < num_v; i++) sums[r * num_v + i] = vf_load(acc + r * stride + 8 * i);
  for (int64_t k = 0; k < n; k++) {
    vf value[8];
    for (int i = 0; i < num_v; i++) value[i] = vf_load(v + k * stride + 8 * i);
    for (int r = 0; r < num_r; r++) {
      const vf weight = vf_set(weights[r][k]);
      for (int i = 0; i < num_v; i++) sums[r * num_v + i] = vf_fma(weight, value[i], sums[r * num_v + i]);
    }
  }
  for (int r = 0; r < num_r; r++)
    for (int i = 0; i < num_v; i++) vf_store(acc + r * stride + 8 * i, sums[r * num_v + i]);
}

XD_INLINE void value_tiles(const float *const *weights, const float *v, int64_t n, int64_t stride, int num_r, int num_v,
                           float *acc) {
  int64_t d = 0;
  for (; d + 8 * num_v <= stride; d += 8 * num_v) value_tile(weights, v + d, n, stride, num_r, num_v, acc + d);
  for (; d < stride; d += 8) value_tile(weights, v + d, n, stride, num_r, 1, acc + d);
}

static void add_values(const float *const *weights, const float *v, int64_t n, int64_t stride, int num_r, float *acc) {
  switch (num_r) {
    case 4: value_tiles(weights, v, n, stride, 4, 2, acc); break;
    case 3: value_tiles(weights, v, n, stride, 3, 2, acc); break;
    case 2: value_tiles(weights, v, n, stride, 2, 4, acc); break;
    default: value_tiles(weights, v, n, stride, 1, 8, acc);
  }
}

/* Of one row, keys from .. to - 1 of the block that starts at `key`. */
static void add_alone(const xd_attend *j, xd_attend_unit *u, int r, int64_t key, int64_t from, int64_t to,
                      int64_t stride) {
  const xd_attend_row *row = &u->rows[r];
  const float *weights = u->scores + r * j->score_stride;
  if (from < row->first) from = row->first;
  if (to > row->last) to = row->last;
  while (from < to) {
    int64_t end = row->has_holes ? from : to;
    while (end < to && weights[end] != HIDDEN) end++;
    const float *start = weights + from;
    if (end > from) add_values(&start, u->block + (from - key) * stride, end - from, stride, 1, u->acc + r * stride);
    from = end + 1;
  }
}

/* Rows r .. r + num_r - 1, keys key .. key + n - 1. */
static void add_block(const xd_attend *j, xd_attend_unit *u, int r, int num_r, int64_t key, int64_t n, int64_t stride) {
  int64_t from = key, to = key + n;
  const float *weights[VALUE_ROWS];
  for (int i = 0; i < num_r; i++) {
    const xd_attend_row *row = &u->rows[r + i];
    if (row->first > from) from = row->first;
    if (row->last < to) to = row->last;
    if (row->has_holes) from = key + n;
  }
  if (from > to) from = to = key + n; /* nothing that all of them see */
  for (int i = 0; i < num_r; i++) {
    add_alone(j, u, r + i, key, key, from, stride);
    weights[i] = u->scores + (r + i) * j->score_stride + from;
  }
  if (from < to) add_values(weights, u->block + (from - key) * stride, to - from, stride, num_r, u->acc + r * stride);
  for (int i = 0; i < num_r; i++) add_alone(j, u, r + i, key, to, key + n, stride);
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
  const size_t size = xd_itemsize(a->dtype);
  const char *v = (const char *)a->v + (size_t)(u->batch * a->v_batch_stride + u->kv_head * a->v_head_stride + dim_from) * size;
  int64_t from = 0, to = a->keys, width = dim_to - dim_from, stride = xd_round_up(width, 8);
  hull(u, &from, &to);
  memset(u->acc, 0, (size_t)(u->num_rows * stride) * 4);
  for (int64_t key = from; key < to; key += j->block_keys) {
    int64_t n = to - key < j->block_keys ? to - key : j->block_keys;
    widen_rows(v, a->dtype, a->v_row_stride, key, n, width, u->block, stride);
    for (int r = 0; r < u->num_rows; r += VALUE_ROWS)
      add_block(j, u, r, u->num_rows - r < VALUE_ROWS ? u->num_rows - r : VALUE_ROWS, key, n, stride);
  }
  for (int r = 0; r < u->num_rows; r++) store_row(j, u, r, dim_from, width, stride);
}
