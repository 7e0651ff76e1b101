/* attention.c: attention, divided among threads (floats_attention.inc.h computes).

   A unit is up to ATTEND_ROWS rows of one kv head. Mostly each task is a unit, from its scores to its values, in
   memory of the thread's own. With fewer units than threads and many keys (one token of one sequence, 4 kv heads, 16
   threads), a unit is divided instead: scores by keys, the softmax by rows, values by dimensions, in memory of the
   unit's own. No sum is divided, so the bits are the same. */

#include "floats.h"

enum { ALIGN = 64, BLOCK_BYTES = 24576, BLOCK_KEYS = 24, MIN_KEYS = 512, MIN_DIMS = 32 };

typedef struct {
  xd_attend shape;
  const xd_floats *floats;
  char *of_threads, *of_units;
  int64_t thread_bytes, unit_bytes;
  int num_threads;
  int is_divided;
  int64_t keys_per_task, num_key_tasks, dims_per_task, num_dim_tasks;
} job;

static int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static void choose_shape(xd_attend *s, const xd_attention *a) {
  *s = (xd_attend){.a = a, .num_rows = (int64_t)(a->heads / a->kv_heads) * a->queries};
  s->unit_rows = (int)smaller(s->num_rows, ATTEND_ROWS);
  s->num_blocks = (int)((s->num_rows + s->unit_rows - 1) / s->unit_rows);
  s->num_units = (int64_t)a->batch * a->kv_heads * s->num_blocks;
  s->dim8 = (int)xd_round_up(a->dim, 8), s->value8 = (int)xd_round_up(a->value_dim, 8);
  int widest = s->dim8 > s->value8 ? s->dim8 : s->value8;
  int64_t keys = BLOCK_BYTES / 4 / (widest > 0 ? widest : 8) / BLOCK_KEYS * BLOCK_KEYS;
  s->block_keys = (int)(keys < BLOCK_KEYS ? BLOCK_KEYS : smaller(keys, 4 * BLOCK_KEYS));
  s->score_stride = xd_round_up(a->keys, 8);
}

static void choose_parts(job *j) {
  int64_t keys = j->shape.a->keys, dims = j->shape.value8, wanted = 2 * (int64_t)j->num_threads;
  j->is_divided = j->num_threads > 1 && j->shape.num_units < j->num_threads && keys >= 2 * MIN_KEYS;
  if (!j->is_divided) return;
  int64_t parts = (wanted + j->shape.num_units - 1) / j->shape.num_units;
  j->keys_per_task = xd_round_up((keys + parts - 1) / parts, 8);
  if (j->keys_per_task < MIN_KEYS) j->keys_per_task = MIN_KEYS;
  j->num_key_tasks = (keys + j->keys_per_task - 1) / j->keys_per_task;
  j->dims_per_task = xd_round_up((dims + parts - 1) / parts, MIN_DIMS);
  j->num_dim_tasks = (dims + j->dims_per_task - 1) / j->dims_per_task;
}

/* Memory of a unit, and of a thread: rows, queries, sums over values, widened keys or values. */

static int64_t rows_bytes(void) {
  return xd_round_up(ATTEND_ROWS * (int64_t)sizeof(xd_attend_row), ALIGN);
}

static int64_t floats_bytes(int64_t n) {
  return xd_round_up(n * 4, ALIGN);
}

static void choose_memory(job *j) {
  const xd_attend *s = &j->shape;
  int64_t widest = s->dim8 > s->value8 ? s->dim8 : s->value8;
  j->unit_bytes = floats_bytes(ATTEND_ROWS) + floats_bytes(s->unit_rows * s->score_stride);
  j->thread_bytes = rows_bytes() + floats_bytes((int64_t)s->unit_rows * s->dim8) +
                    floats_bytes((int64_t)s->unit_rows * s->value8) + floats_bytes(s->block_keys * widest);
}

static void plan(job *j, const xd_cpu *cpu, const xd_attention *a) {
  *j = (job){.floats = cpu->isa->floats, .num_threads = xd_pool_num_threads(cpu->pool)};
  choose_shape(&j->shape, a);
  choose_parts(j);
  choose_memory(j);
}

static int is_empty(const xd_attention *a) {
  return a->batch <= 0 || a->heads <= 0 || a->kv_heads <= 0 || a->queries <= 0 || a->value_dim <= 0;
}

size_t xd_attention_scratch(const xd_cpu *cpu, const xd_attention *attention) {
  job j;
  if (is_empty(attention)) return 0;
  plan(&j, cpu, attention);
  return (size_t)(j.num_threads * j.thread_bytes + (j.is_divided ? j.shape.num_units : j.num_threads) * j.unit_bytes);
}

/* Unit `index` in a thread's memory; `place` says whose scores it works on. */
static void open_unit(const job *j, xd_attend_unit *u, int64_t index, int thread, int64_t place) {
  const xd_attend *s = &j->shape;
  char *own = j->of_threads + thread * j->thread_bytes, *shared = j->of_units + place * j->unit_bytes;
  u->rows = (xd_attend_row *)own, own += rows_bytes();
  u->q = (float *)own, own += floats_bytes((int64_t)s->unit_rows * s->dim8);
  u->acc = (float *)own, own += floats_bytes((int64_t)s->unit_rows * s->value8);
  u->block = (float *)own;
  u->sums = (float *)shared;
  u->scores = (float *)(shared + floats_bytes(ATTEND_ROWS));
  j->floats->attend_open(s, u, index);
}

static void whole_unit(const void *context, int64_t index, int thread) {
  const job *j = context;
  xd_attend_unit u;
  open_unit(j, &u, index, thread, thread);
  j->floats->attend_scores(&j->shape, &u, 0, j->shape.a->keys);
  for (int r = 0; r < u.num_rows; r++) j->floats->attend_softmax(&j->shape, &u, r);
  j->floats->attend_values(&j->shape, &u, 0, j->shape.a->value_dim);
}

static void some_scores(const void *context, int64_t index, int thread) {
  const job *j = context;
  xd_attend_unit u;
  int64_t unit = index / j->num_key_tasks, from = index % j->num_key_tasks * j->keys_per_task;
  open_unit(j, &u, unit, thread, unit);
  j->floats->attend_scores(&j->shape, &u, from, smaller(from + j->keys_per_task, j->shape.a->keys));
}

static void some_softmax(const void *context, int64_t index, int thread) {
  const job *j = context;
  xd_attend_unit u;
  open_unit(j, &u, index / j->shape.unit_rows, thread, index / j->shape.unit_rows);
  int row = (int)(index % j->shape.unit_rows);
  if (row < u.num_rows) j->floats->attend_softmax(&j->shape, &u, row);
}

static void some_values(const void *context, int64_t index, int thread) {
  const job *j = context;
  xd_attend_unit u;
  int64_t unit = index / j->num_dim_tasks, from = index % j->num_dim_tasks * j->dims_per_task;
  open_unit(j, &u, unit, thread, unit);
  j->floats->attend_values(&j->shape, &u, (int)from, (int)smaller(from + j->dims_per_task, j->shape.a->value_dim));
}

void xd_attention_run(xd_cpu *cpu, const xd_attention *attention) {
  job j;
  if (is_empty(attention)) return;
  plan(&j, cpu, attention);
  j.of_threads = attention->scratch;
  j.of_units = j.of_threads + j.num_threads * j.thread_bytes;
  if (!j.is_divided) {
    xd_pool_run(cpu->pool, whole_unit, &j, j.shape.num_units);
    return;
  }
  xd_pool_run(cpu->pool, some_scores, &j, j.shape.num_units * j.num_key_tasks);
  xd_pool_run(cpu->pool, some_softmax, &j, j.shape.num_units * j.shape.unit_rows);
  xd_pool_run(cpu->pool, some_values, &j, j.shape.num_units * j.num_dim_tasks);
}
