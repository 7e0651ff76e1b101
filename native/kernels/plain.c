/* plain.c: products with weights of float32, float16 or bfloat16, divided among threads (floats_dot.inc.h computes).

   Rows of x are widened to float32 once, into chunks: [chunk, row, DOT_CHUNK]. So what is used together lies
   together; rows a power of two apart, as widths like to be, would share a few sets of the caches. A task is one
   expert and a block of its output rows. As many rows of x as stay in the L2 cache go past all of these before the
   next ones do. */

#include "floats.h"

/* X_BYTES of x go past the weights at a time: half of a small L2 cache. */
enum { BLOCK_OUT = 512, ALIGN = 64, ROWS_PER_TASK = 8, X_BYTES = 320 * 1024, MIN_ROWS = 6 };

typedef struct {
  const xd_product *p;
  const xd_cpu *cpu;
  float *x;              /* [num_chunks, num_rows, x_stride] */
  int64_t x_stride, num_pairs;
  int64_t *order, *starts;
  int32_t *active; /* experts that have pairs */
  int num_active, num_blocks, block_out, rows_at_once;
} job;

static void *take(char *scratch, int64_t *at, int64_t bytes) {
  void *taken = scratch ? scratch + *at : NULL;
  *at += xd_round_up(bytes, ALIGN);
  return taken;
}

/* Gives the bytes of scratch that a job takes; with scratch NULL only these mean anything. */
static int64_t lay_out(job *j, const xd_cpu *cpu, const xd_product *p, char *scratch) {
  int64_t at = 0, experts = p->weight.num_experts;
  *j = (job){.p = p, .cpu = cpu, .num_pairs = p->num_rows * p->ids_per_row};
  int64_t width = p->weight.width, num_chunks = (width + DOT_CHUNK - 1) / DOT_CHUNK;
  j->x_stride = num_chunks > 1 ? DOT_CHUNK : xd_round_up(width, 8);
  j->x = take(scratch, &at, num_chunks * p->num_rows * j->x_stride * 4);
  int64_t rows = X_BYTES / 4 / (num_chunks * j->x_stride + 1) / 3 * 3;
  j->rows_at_once = (int)(rows < MIN_ROWS ? MIN_ROWS : rows > DOT_ROWS ? DOT_ROWS : rows);
  j->order = take(scratch, &at, j->num_pairs * 8);
  j->starts = take(scratch, &at, (experts + 1) * 8);
  j->active = take(scratch, &at, experts * 4);
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
    const char *row = (const char *)p->x + (size_t)(r * width) * xd_itemsize(p->x_dtype);
    for (int64_t k = 0; k < width; k += DOT_CHUNK) {
      float *to = j->x + (k / DOT_CHUNK * p->num_rows + r) * j->x_stride;
      int64_t n = width - k < DOT_CHUNK ? width - k : DOT_CHUNK;
      xd_widen(row + (size_t)k * xd_itemsize(p->x_dtype), p->x_dtype, to, n);
      for (; n % 8 != 0; n++) to[n] = 0;
    }
  }
}

/* num_out <= DOT_OUT outputs from `out` on, for num_pairs <= DOT_ROWS pairs of an expert. */
static void multiply_some(const job *j, int32_t expert, int64_t out, int num_out, const int64_t *pairs, int num_pairs) {
  const xd_product *p = j->p;
  const xd_weight *w = &p->weight;
  const float *x[DOT_ROWS];
  float y[DOT_ROWS][DOT_OUT];
  size_t at = (size_t)(((int64_t)expert * w->num_out + out) * w->width) * xd_itemsize(w->dtype);
  for (int i = 0; i < num_pairs; i++) x[i] = j->x + pairs[i] / p->ids_per_row * j->x_stride;
  xd_dot d = {.w = (const char *)w->data + at, .x = x, .y = y, .width = w->width, .dtype = w->dtype};
  d.x_chunk_stride = p->num_rows * j->x_stride;
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
  int64_t out = index % j->num_blocks * j->block_out, end = out + j->block_out, step = j->rows_at_once;
  (void)thread;
  if (end > j->p->weight.num_out) end = j->p->weight.num_out;
  for (int64_t i = j->starts[expert], last = j->starts[expert + 1]; i < last; i += step) {
    int num_pairs = (int)(last - i < step ? last - i : step);
    for (int64_t n = out; n < end; n += DOT_OUT)
      multiply_some(j, expert, n, (int)(end - n < DOT_OUT ? end - n : DOT_OUT), j->order + i, num_pairs);
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
  xd_pool_run(cpu->pool, widen_rows, &j, (product->num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
  xd_sort_pairs(product, j.order, j.starts);
  for (int32_t e = 0; e < product->weight.num_experts; e++)
    if (j.starts[e + 1] > j.starts[e]) j.active[j.num_active++] = e;
  if (j.num_active == 0) return;
  choose_blocks(&j);
  xd_pool_run(cpu->pool, multiply, &j, (int64_t)j.num_active * j.num_blocks);
}
