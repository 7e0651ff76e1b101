/* plain.c: products with weights of float32, float16 or bfloat16, divided among threads (floats_dot.inc.h computes).

   Rows of x are widened to float32 once. A task is one expert and a block of its output rows; it takes DOT_OUT of them at a
   time, all rows of x past each. */

#include "floats.h"

enum { BLOCK_OUT = 512, ALIGN = 64, ROWS_PER_TASK = 8 };

typedef struct {
  const xd_product *p;
  const xd_cpu *cpu;
  const float *x; /* [num_rows, width8] */
  float *widened; /* the same, or NULL if x can stay as it is */
  int64_t width8, num_pairs;
  int64_t *order, *starts;
  int32_t *active; /* experts that have pairs */
  int num_active, num_blocks, block_out;
  char *state; /* [num_threads, DOT_STATE_BYTES] */
} job;

static void *take(char *scratch, int64_t *at, int64_t bytes) {
  void *taken = scratch ? scratch + *at : NULL;
  *at += xd_round_up(bytes, ALIGN);
  return taken;
}

/* Gives the bytes of scratch that a job takes; with scratch NULL only these mean anything. */
static int64_t lay_out(job *j, const xd_cpu *cpu, const xd_product *p, char *scratch) {
  int64_t at = 0, experts = p->weight.num_experts;
  *j = (job){.p = p, .cpu = cpu, .width8 = xd_round_up(p->weight.width, 8), .num_pairs = p->num_rows * p->ids_per_row};
  j->x = p->x;
  if (p->x_dtype != XD_FLOAT32 || j->width8 != p->weight.width)
    j->x = j->widened = take(scratch, &at, p->num_rows * j->width8 * 4);
  j->order = take(scratch, &at, j->num_pairs * 8);
  j->starts = take(scratch, &at, (experts + 1) * 8);
  j->active = take(scratch, &at, experts * 4);
  j->state = take(scratch, &at, (int64_t)xd_pool_num_threads(cpu->pool) * DOT_STATE_BYTES);
  return at;
}

size_t xd_plain_scratch(const xd_cpu *cpu, const xd_product *product) {
  job j;
  return (size_t)lay_out(&j, cpu, product, NULL);
}

static void widen_rows(const void *context, int64_t index, int thread) {
  const job *j = context;
  const xd_product *p = j->p;
  int64_t width = p->weight.width, first = index * ROWS_PER_TASK, last = first + ROWS_PER_TASK;
  (void)thread;
  for (int64_t r = first; r < last && r < p->num_rows; r++) {
    float *row = j->widened + r * j->width8;
    xd_widen((const char *)p->x + (size_t)(r * width) * xd_itemsize(p->x_dtype), p->x_dtype, row, width);
    for (int64_t k = width; k < j->width8; k++) row[k] = 0;
  }
}

/* num_out <= DOT_OUT outputs from `out` on, for num_pairs <= DOT_ROWS pairs of an expert. */
static void multiply_some(const job *j, int32_t expert, int64_t out, int num_out, const int64_t *pairs, int num_pairs,
                          int thread) {
  const xd_product *p = j->p;
  const xd_weight *w = &p->weight;
  const float *x[DOT_ROWS];
  float y[DOT_ROWS][DOT_OUT];
  size_t at = (size_t)(((int64_t)expert * w->num_out + out) * w->width) * xd_itemsize(w->dtype);
  for (int i = 0; i < num_pairs; i++) x[i] = j->x + pairs[i] / p->ids_per_row * j->width8;
  xd_dot d = {.w = (const char *)w->data + at, .x = x, .y = y, .width = w->width, .dtype = w->dtype};
  d.state = j->state + (int64_t)thread * DOT_STATE_BYTES;
  d.num_out = num_out, d.num_rows = num_pairs;
  j->cpu->isa->floats->dot(&d);
  for (int i = 0; i < num_pairs; i++) {
    size_t to = (size_t)(pairs[i] * w->num_out + out) * xd_itemsize(p->y_dtype);
    xd_narrow(y[i], p->y_dtype, (char *)p->y + to, num_out);
  }
}

static void multiply(const void *context, int64_t index, int thread) {
  const job *j = context;
  int32_t expert = j->active[index / j->num_blocks];
  int64_t out = index % j->num_blocks * j->block_out, end = out + j->block_out;
  int64_t first = j->starts[expert], last = j->starts[expert + 1];
  if (end > j->p->weight.num_out) end = j->p->weight.num_out;
  for (; out < end; out += DOT_OUT) {
    int n = (int)(end - out < DOT_OUT ? end - out : DOT_OUT);
    for (int64_t i = first; i < last; i += DOT_ROWS)
      multiply_some(j, expert, out, n, j->order + i, (int)(last - i < DOT_ROWS ? last - i : DOT_ROWS), thread);
  }
}

/* At least four blocks for each thread, so that none waits long for the last. */
static void choose_blocks(job *j) {
  int64_t tasks = 4 * (int64_t)xd_pool_num_threads(j->cpu->pool), num_out = j->p->weight.num_out;
  int64_t per_expert = (tasks + j->num_active - 1) / j->num_active;
  int64_t block = xd_round_up((num_out + per_expert - 1) / per_expert, DOT_OUT);
  j->block_out = (int)(block < BLOCK_OUT ? block : BLOCK_OUT);
  j->num_blocks = (int)((num_out + j->block_out - 1) / j->block_out);
}

void xd_plain_run(xd_cpu *cpu, const xd_product *product) {
  job j;
  lay_out(&j, cpu, product, product->scratch);
  if (j.num_pairs == 0 || product->weight.num_out == 0) return;
  if (j.widened) xd_pool_run(cpu->pool, widen_rows, &j, (product->num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
  xd_sort_pairs(product, j.order, j.starts);
  for (int32_t e = 0; e < product->weight.num_experts; e++)
    if (j.starts[e + 1] > j.starts[e]) j.active[j.num_active++] = e;
  if (j.num_active == 0) return;
  choose_blocks(&j);
  xd_pool_run(cpu->pool, multiply, &j, (int64_t)j.num_active * j.num_blocks);
}
