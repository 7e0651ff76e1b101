/* product.c: y[i] = w[ids[i]] @ x[i / ids_per_row], divided among threads.

   Theory of operation. First every row of x becomes integers once, however many experts it meets. Then each task takes one
   expert and a block of its output rows. An expert with few rows streams its weights past each of them (`affine_rows`):
   that is decoding, where memory is the limit; from FEW_FROM rows on it unpacks the codes once for four of them on the way
   (`affine_few`). One with PANEL_FROM rows or more unpacks 32 output rows at a time into a panel that stays in the L2 cache
   and multiplies it with all its rows, four at a time (`affine_tile`): prefill, where arithmetic is the limit. All add in
   the same order, so that nobody can tell from the bits which one it was. */

#include <math.h>

#include "private.h"

/* From how many rows on unpacking on the way pays, and from how many a panel, where there is `affine_few` and where not
   (bench/LOG.md). */
enum { FEW_FROM = 4, PANEL_FROM = 13, PANEL_ALONE_FROM = 4 };
_Static_assert(PANEL_ALONE_FROM <= FEW_FROM, "few_rows calls affine_few from FEW_FROM on");
enum { BLOCK_OUT = 2048, LEAST_BYTES = 256 << 10, ALIGN = 64, ROWS_PER_TASK = 8 };
enum { FIRST_CODES = 4096, FIRST_NUMBERS = 512 }; /* bytes: as far as affine_avx2_rows.c asks ahead, and their share */

typedef struct {
  const xd_product *p;
  const xd_cpu *cpu;
  xd_affine a;
  int64_t num_pairs;
  int8_t *q;
  float *d, *da;
  int64_t *order, *starts;
  int32_t *active; /* experts that have pairs */
  int num_active;
  int block_out, num_blocks;
  float *widened;   /* [num_threads, width] */
  int16_t *numbers; /* [num_threads, padded width] */
  char *panels;   /* [num_threads, panel_bytes] */
  int64_t panel_bytes;
} job;

static xd_affine affine_of(const xd_product *p) {
  const xd_weight *w = &p->weight;
  xd_affine a = {.bits = w->bits, .group_size = w->group_size, .dtype = w->dtype, .width = w->width};
  a.two_digits = p->activation_bits == 16;
  a.groups = w->width / w->group_size;
  a.padded_groups = (int)xd_round_up(a.groups, XD_LANES);
  a.code_bytes = (int64_t)w->width * w->bits / 8;
  a.q_bytes = (int64_t)a.padded_groups * w->group_size * (w->bits == 8 || a.two_digits ? 2 : 1);
  return a;
}

int64_t xd_panel_bytes(const xd_affine *a) {
  int64_t codes = xd_round_up(a->code_bytes, 32) * (8 / a->bits) * (a->bits == 8 ? 2 : 1);
  return codes * XD_TILE_OUT + 2 * (int64_t)a->groups * XD_TILE_OUT * 4;
}

/* The next `bytes` of the scratch; nothing to point to yet while its size is asked for. */
static void *take(char *scratch, int64_t *at, int64_t bytes) {
  void *taken = scratch ? scratch + *at : NULL;
  *at += xd_round_up(bytes, ALIGN);
  return taken;
}

static int64_t padded_width(const xd_affine *a) {
  return (int64_t)a->padded_groups * a->group_size;
}

/* From how many rows on an expert gets a panel. */
static int panel_from(const xd_cpu *cpu) {
  return cpu->isa->affine_few ? PANEL_FROM : PANEL_ALONE_FROM;
}

/* Lay a job out in its scratch; gives the bytes it takes. With scratch NULL only the bytes mean anything. */
static int64_t lay_out(job *j, const xd_cpu *cpu, const xd_product *p) {
  char *scratch = p->scratch;
  int64_t at = 0;
  int threads = xd_pool_num_threads(cpu->pool), experts = p->weight.num_experts;
  j->p = p, j->cpu = cpu, j->a = affine_of(p);
  j->num_pairs = p->num_rows * p->ids_per_row;
  j->panel_bytes = xd_round_up(xd_panel_bytes(&j->a), ALIGN);
  j->q = take(scratch, &at, p->num_rows * j->a.q_bytes);
  j->d = take(scratch, &at, p->num_rows * j->a.padded_groups * 4);
  j->da = take(scratch, &at, p->num_rows * j->a.padded_groups * 4);
  j->order = take(scratch, &at, j->num_pairs * 8);
  j->starts = take(scratch, &at, ((int64_t)experts + 1) * 8);
  j->active = take(scratch, &at, (int64_t)experts * 4);
  j->widened = take(scratch, &at, (int64_t)threads * p->weight.width * 4);
  j->numbers = take(scratch, &at, threads * padded_width(&j->a) * 2);
  /* Decoding does without: hundreds of KB less to ask malloc for, at each product. */
  j->panels = take(scratch, &at, j->num_pairs < panel_from(cpu) ? 0 : threads * j->panel_bytes);
  return at;
}

size_t xd_product_scratch(const xd_cpu *cpu, const xd_product *product) {
  if (product->weight.bits == 0) return xd_plain_scratch(cpu, product);
  job j;
  xd_product sized = *product;
  sized.scratch = NULL;
  return (size_t)lay_out(&j, cpu, &sized);
}

static uint32_t expert_of(const xd_product *p, int64_t pair) {
  return p->ids ? p->ids[pair] : 0;
}

void xd_sort_pairs(const xd_product *p, int64_t *order, int64_t *starts) {
  int64_t num_pairs = p->num_rows * p->ids_per_row;
  uint32_t num_experts = (uint32_t)p->weight.num_experts;
  memset(starts, 0, ((size_t)num_experts + 1) * 8);
  for (int64_t i = 0; i < num_pairs; i++) {
    uint32_t e = expert_of(p, i);
    if (e < num_experts)
      starts[e + 1]++;
    else
      xd_fill_nan(p, i);
  }
  for (uint32_t e = 0; e < num_experts; e++) starts[e + 1] += starts[e];
  for (int64_t i = 0; i < num_pairs; i++) { /* starts[e] becomes the end of e ... */
    uint32_t e = expert_of(p, i);
    if (e < num_experts) order[starts[e]++] = i;
  }
  for (uint32_t e = num_experts; e > 0; e--) starts[e] = starts[e - 1]; /* ... which is the start of e + 1 */
  starts[0] = 0;
}

void xd_fill_nan(const xd_product *p, int64_t pair) {
  const float nan = NAN;
  size_t size = xd_itemsize(p->y_dtype);
  char *row = (char *)p->y + (size_t)pair * (size_t)p->weight.num_out * size;
  for (int n = 0; n < p->weight.num_out; n++) xd_narrow(&nan, p->y_dtype, row + (size_t)n * size, 1);
}

static void round_rows(const void *context, int64_t index, int thread) {
  const job *j = context;
  const xd_product *p = j->p;
  int64_t width = p->weight.width, groups = j->a.padded_groups;
  float *x = j->widened + thread * width;
  int16_t *numbers = j->numbers + thread * padded_width(&j->a);
  int64_t first = index * ROWS_PER_TASK, last = first + ROWS_PER_TASK;
  for (int64_t r = first; r < last && r < p->num_rows; r++) {
    xd_widen((const char *)p->x + (size_t)(r * width) * xd_itemsize(p->x_dtype), p->x_dtype, x, width);
    j->cpu->isa->round_row(&j->a, x, numbers, j->q + r * j->a.q_bytes, j->d + r * groups, j->da + r * groups);
  }
}

static xd_row row_of(const job *j, int64_t pair) {
  int64_t r = pair / j->p->ids_per_row, groups = j->a.padded_groups;
  return (xd_row){j->q + r * j->a.q_bytes, j->d + r * groups, j->da + r * groups};
}

/* Weight rows from one on. */
typedef struct {
  const uint8_t *codes;
  const char *scales, *biases;
} weight_rows;

static weight_rows weight_at(const job *j, int64_t expert, int64_t out) {
  const xd_weight *w = &j->p->weight;
  int64_t row = expert * w->num_out + out;
  size_t at = (size_t)(row * j->a.groups) * xd_itemsize(w->dtype);
  return (weight_rows){(const uint8_t *)w->data + row * j->a.code_bytes, (const char *)w->scales + at,
                       (const char *)w->biases + at};
}

static void store(const job *j, int64_t pair, int64_t out, const float *y, int n) {
  const xd_product *p = j->p;
  xd_narrow(y, p->y_dtype, (char *)p->y + (size_t)(pair * p->weight.num_out + out) * xd_itemsize(p->y_dtype), n);
}

/* One row against the weight rows of a block. */
static void one_row(const job *j, int64_t pair, weight_rows w, int64_t out, int n) {
  float y[BLOCK_OUT];
  xd_row row = row_of(j, pair);
  j->cpu->isa->affine_rows(&j->a, w.codes, w.scales, w.biases, n, &row, y);
  store(j, pair, out, y, n);
}

/* Several rows: all meet a few weight rows before the next ones come, so that memory gives these once. */
static void few_rows(const job *j, int32_t expert, int64_t out, int64_t end) {
  float y[XD_TILE_ROWS][XD_TILE_OUT];
  const int64_t *pairs = j->order + j->starts[expert];
  const int64_t num_pairs = j->starts[expert + 1] - j->starts[expert];
  const int at_once = num_pairs < FEW_FROM ? 1 : XD_TILE_ROWS;
  for (; out < end; out += XD_FEW_OUT) {
    const int n = (int)(end - out < XD_FEW_OUT ? end - out : XD_FEW_OUT);
    const weight_rows w = weight_at(j, expert, out);
    for (int64_t i = 0; i < num_pairs; i += at_once) {
      if (at_once == 1) {
        one_row(j, pairs[i], w, out, n);
        continue;
      }
      xd_row rows[XD_TILE_ROWS];
      const int count = (int)(num_pairs - i < XD_TILE_ROWS ? num_pairs - i : XD_TILE_ROWS);
      for (int r = 0; r < count; r++) rows[r] = row_of(j, pairs[i + r]);
      j->cpu->isa->affine_few(&j->a, w.codes, w.scales, w.biases, n, rows, count, y);
      for (int r = 0; r < count; r++) store(j, pairs[i + r], out, y[r], n);
    }
  }
}

static void many_rows(const job *j, int32_t expert, int64_t out, int64_t end, void *panel) {
  float y[XD_TILE_ROWS][XD_TILE_OUT];
  const int64_t *pairs = j->order + j->starts[expert];
  int64_t num_pairs = j->starts[expert + 1] - j->starts[expert];
  for (; out < end; out += XD_TILE_OUT) {
    int n = (int)(end - out < XD_TILE_OUT ? end - out : XD_TILE_OUT);
    weight_rows w = weight_at(j, expert, out);
    j->cpu->isa->affine_pack(&j->a, w.codes, w.scales, w.biases, n, panel);
    for (int64_t i = 0; i < num_pairs; i += XD_TILE_ROWS) {
      int count = (int)(num_pairs - i < XD_TILE_ROWS ? num_pairs - i : XD_TILE_ROWS);
      xd_row rows[XD_TILE_ROWS];
      for (int r = 0; r < count; r++) rows[r] = row_of(j, pairs[i + r]);
      j->cpu->isa->affine_tile(&j->a, panel, rows, count, y);
      for (int r = 0; r < count; r++) store(j, pairs[i + r], out, y[r], n);
    }
  }
}

/* Ask for `num_bytes` from `first` on. They wait in the L2 cache. */
static void ask(const void *first, int64_t num_bytes) {
  for (int64_t at = 0; at < num_bytes; at += 64) __builtin_prefetch((const void *)((uintptr_t)first + (uintptr_t)at), 0, 2);
}

/* Ask for the first codes, scales and biases of a task while the one before is computed: nothing leads to them, for its expert
   lies anywhere. */
static void ask_for(const job *j, int64_t index) {
  if (index >= (int64_t)j->num_active * j->num_blocks) return;
  const int64_t out = index % j->num_blocks * j->block_out, left = j->p->weight.num_out - out;
  const int64_t num = left < j->block_out ? left : j->block_out, parts = j->cpu->isa->parts;
  for (int64_t i = 0; i < parts; i++) {
    const weight_rows w = weight_at(j, j->active[index / j->num_blocks], out + i * num / parts);
    ask(w.codes, FIRST_CODES / parts);
    ask(w.scales, FIRST_NUMBERS / parts);
    ask(w.biases, FIRST_NUMBERS / parts);
  }
}

static void multiply(const void *context, int64_t index, int thread) {
  const job *j = context;
  int32_t expert = j->active[index / j->num_blocks];
  int64_t out = index % j->num_blocks * j->block_out, num_out = j->p->weight.num_out;
  ask_for(j, index + 1);
  int64_t end = out + j->block_out < num_out ? out + j->block_out : num_out;
  const int64_t num_pairs = j->starts[expert + 1] - j->starts[expert];
  if (num_pairs == 1)
    one_row(j, j->order[j->starts[expert]], weight_at(j, expert, out), out, (int)(end - out));
  else if (num_pairs < panel_from(j->cpu))
    few_rows(j, expert, out, end);
  else
    many_rows(j, expert, out, end, j->panels + thread * j->panel_bytes);
}

/* Blocks of whole panels: two tasks for each thread, so that none waits long for the last; one where reading would begin
   anew too often (512 rows of 2048 at 4 bits on two threads: 0.97 of the time of two each). */
static void choose_blocks(job *j) {
  const int64_t threads = xd_pool_num_threads(j->cpu->pool), num_out = j->p->weight.num_out;
  const int64_t bytes = num_out * j->num_active * j->a.code_bytes;
  int64_t tasks = threads == 1 ? 1 : 2 * threads;
  if (tasks > bytes / LEAST_BYTES) tasks = threads;
  int64_t per_expert = (tasks + j->num_active - 1) / j->num_active;
  int64_t block = xd_round_up((num_out + per_expert - 1) / per_expert, XD_TILE_OUT);
  j->block_out = (int)(block < BLOCK_OUT ? block : BLOCK_OUT);
  j->num_blocks = (int)((num_out + j->block_out - 1) / j->block_out);
}

void xd_product_run(xd_cpu *cpu, const xd_product *product) {
  if (product->num_rows * product->ids_per_row == 0 || product->weight.num_out == 0) return;
  if (product->weight.bits == 0) {
    xd_plain_run(cpu, product);
    return;
  }
  job j;
  lay_out(&j, cpu, product);
  xd_sort_pairs(product, j.order, j.starts);
  j.num_active = 0;
  for (int32_t e = 0; e < product->weight.num_experts; e++)
    if (j.starts[e + 1] > j.starts[e]) j.active[j.num_active++] = e;
  if (j.num_active == 0) return;
  choose_blocks(&j);
  ask_for(&j, 0); /* these come while rows are rounded */
  xd_pool_run(cpu->pool, round_rows, &j, (product->num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
  xd_pool_run(cpu->pool, multiply, &j, (int64_t)j.num_active * j.num_blocks);
}
