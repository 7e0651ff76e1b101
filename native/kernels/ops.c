/* ops.c: norm, rotation and activation, divided among threads (floats_*.inc.h compute). Small ones stay with the
   caller: a decode step's take a few microseconds, about what it costs to have another thread take part. */

#include "floats.h"

enum { NUMBERS_PER_TASK = 32768 };

static int64_t divided(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

static int64_t rows_per_task(int64_t width) {
  int64_t rows = NUMBERS_PER_TASK / (width > 0 ? width : 1);
  return rows > 0 ? rows : 1;
}

typedef struct {
  const void *op;
  const xd_floats *floats;
  int64_t num_rows, rows_per_task;
} rows_job;

static int64_t last_of(const rows_job *j, int64_t index) {
  int64_t last = (index + 1) * j->rows_per_task;
  return last < j->num_rows ? last : j->num_rows;
}

static void norm_rows(const void *context, int64_t index, int thread) {
  const rows_job *j = context;
  (void)thread;
  j->floats->norm(j->op, index * j->rows_per_task, last_of(j, index));
}

void xd_norm_run(xd_cpu *cpu, const xd_norm *n) {
  if (n->width <= 0) return;
  rows_job j = {n, cpu->isa->floats, n->num_rows, rows_per_task(n->width)};
  xd_pool_run(cpu->pool, norm_rows, &j, divided(j.num_rows, j.rows_per_task));
}

static void glu_rows(const void *context, int64_t index, int thread) {
  const rows_job *j = context;
  (void)thread;
  j->floats->glu(j->op, index * j->rows_per_task, last_of(j, index));
}

void xd_glu_run(xd_cpu *cpu, const xd_glu *g) {
  if (g->width <= 0) return;
  rows_job j = {g, cpu->isa->floats, g->num_rows, rows_per_task(4 * (int64_t)g->width)}; /* exp, division: 4 norms' */
  xd_pool_run(cpu->pool, glu_rows, &j, divided(j.num_rows, j.rows_per_task));
}

/* Rotation: cosines and sines of every position once, then all heads. */

typedef struct {
  const xd_rope *r;
  const xd_floats *floats;
  double *frequencies;
  float *table; /* [batch or 1, tokens, 2 * dims] */
  int64_t tokens_per_task, tasks_per_entry;
} rope_job;

static int64_t num_tables(const xd_rope *r) {
  return r->offset_stride ? r->batch : 1;
}

static int64_t frequency_bytes(const xd_rope *r) {
  return xd_round_up((int64_t)r->dims / 2 * 8, 64);
}

size_t xd_rope_scratch(const xd_cpu *cpu, const xd_rope *r) {
  (void)cpu;
  return (size_t)(frequency_bytes(r) + num_tables(r) * r->tokens * 2 * r->dims * 4);
}

static float *table_at(const rope_job *j, int64_t entry, int64_t token) {
  return j->table + (entry * j->r->tokens + token) * 2 * j->r->dims;
}

static int64_t last_token(const rope_job *j, int64_t first) {
  return first + j->tokens_per_task < j->r->tokens ? first + j->tokens_per_task : j->r->tokens;
}

static void angles(const void *context, int64_t index, int thread) {
  const rope_job *j = context;
  int64_t entry = index / j->tasks_per_entry, first = index % j->tasks_per_entry * j->tokens_per_task;
  (void)thread;
  j->floats->rope_angles(j->r, j->frequencies, entry, first, last_token(j, first), table_at(j, entry, first));
}

static void rotate(const void *context, int64_t index, int thread) {
  const rope_job *j = context;
  int64_t entry = index / j->tasks_per_entry, first = index % j->tasks_per_entry * j->tokens_per_task;
  const float *table = table_at(j, j->r->offset_stride ? entry : 0, first);
  (void)thread;
  j->floats->rope_rotate(j->r, table, entry, first, last_token(j, first));
}

static void divide_tokens(rope_job *j, int64_t width) {
  j->tokens_per_task = rows_per_task(width);
  j->tasks_per_entry = divided(j->r->tokens, j->tokens_per_task);
}

void xd_rope_run(xd_cpu *cpu, const xd_rope *r) {
  if (r->batch <= 0 || r->heads <= 0 || r->tokens <= 0) return;
  rope_job j = {.r = r, .floats = cpu->isa->floats, .frequencies = r->scratch};
  j.table = (float *)((char *)r->scratch + frequency_bytes(r));
  j.floats->rope_frequencies(r, j.frequencies);
  divide_tokens(&j, 8 * (int64_t)r->dims); /* a sine takes as long as 8 rotations */
  xd_pool_run(cpu->pool, angles, &j, num_tables(r) * j.tasks_per_entry);
  divide_tokens(&j, (int64_t)r->heads * r->width);
  xd_pool_run(cpu->pool, rotate, &j, r->batch * j.tasks_per_entry);
}
