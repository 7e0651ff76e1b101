/* The float operations on odd sizes, in memory of exactly their size: the same bits from every instruction set that runs
 * here, for one thread and for three. Prints a digest of all results, which is the same on every processor. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "floats.h"

#define CHECK(condition)                                   \
  do {                                                     \
    if (!(condition)) {                                    \
      printf("line %d: %s\n", __LINE__, #condition);       \
      exit(1);                                             \
    }                                                      \
  } while (0)

enum { MAX_CPUS = 4 };
static xd_cpu cpus[MAX_CPUS];
static int num_cpus;
static uint64_t digest = 14695981039346656037u;

static void add_cpu(const xd_floats *floats, int num_threads) {
  static xd_isa isas[MAX_CPUS];
  char err[200];
  isas[num_cpus].floats = floats;
  xd_pool *pool = xd_pool_open(num_threads, err, sizeof err);
  CHECK(pool);
  cpus[num_cpus] = (xd_cpu){&isas[num_cpus], pool};
  num_cpus++;
}

static void open_cpus(void) {
  add_cpu(&xd_floats_portable, 1);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    add_cpu(&xd_floats_avx2, 1), add_cpu(&xd_floats_avx2, 3);
#elif defined(__aarch64__)
  add_cpu(&xd_floats_neon, 1), add_cpu(&xd_floats_neon, 3);
#endif
}

static void *claim(size_t bytes) {
  void *p = malloc(bytes);
  CHECK(p);
  memset(p, 0xff, bytes);
  return p;
}

/* As scratch: aligned, and not a multiple of 64 longer than asked for. */
static void *scratch_of(size_t bytes, void **block) {
  *block = claim(bytes + 64);
  return (char *)*block + (64 - (uintptr_t)*block % 64) % 64;
}

static float draw(void) { /* about normal */
  static uint64_t state = 1;
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    sum += (float)(state >> 40) / 16777216.0f - 0.5f;
  }
  return 2 * sum;
}

static void *numbers(int dtype, int64_t n) {
  char *p = claim((size_t)n * xd_itemsize(dtype) + (n == 0));
  for (int64_t i = 0; i < n; i++) {
    float f = draw();
    xd_narrow(&f, dtype, p + (size_t)i * xd_itemsize(dtype), 1);
  }
  return p;
}

/* The results of all cpus, which have to be equal. */
typedef struct {
  size_t bytes;
  void *y[MAX_CPUS];
} results;

static results results_of(size_t bytes) {
  results r = {.bytes = bytes};
  for (int i = 0; i < num_cpus; i++) r.y[i] = claim(bytes + (bytes == 0));
  return r;
}

static void compare(results *r, const char *what, int dtype) {
  const uint8_t *p = r->y[0];
  for (int i = 1; i < num_cpus; i++) {
    if (memcmp(r->y[0], r->y[i], r->bytes) == 0) continue;
    printf("%s, dtype %d: cpu %d differs from the portable one\n", what, dtype, i);
    exit(1);
  }
  for (size_t i = 0; i < r->bytes; i++) digest = (digest ^ p[i]) * 1099511628211u;
  for (int i = 0; i < num_cpus; i++) free(r->y[i]);
}

static void products(int dtype, int experts, int num_out, int width, int rows, int ids_per_row) {
  int64_t pairs = (int64_t)rows * ids_per_row;
  void *w = numbers(dtype, (int64_t)experts * num_out * width), *x = numbers(dtype, (int64_t)rows * width), *block;
  uint32_t *ids = claim((size_t)pairs * 4 + 4);
  for (int64_t i = 0; i < pairs; i++) ids[i] = (uint32_t)((i * 7 + i / 5) % experts);
  results r = results_of((size_t)(pairs * num_out) * xd_itemsize(dtype));
  for (int i = 0; i < num_cpus; i++) {
    xd_product p = {.weight = {.data = w, .dtype = dtype, .num_experts = experts, .num_out = num_out, .width = width}};
    p.x = x, p.x_dtype = dtype, p.y = r.y[i], p.y_dtype = dtype, p.ids = experts > 1 ? ids : NULL;
    p.num_rows = rows, p.ids_per_row = ids_per_row;
    p.scratch = scratch_of(xd_plain_scratch(&cpus[i], &p), &block);
    xd_plain_run(&cpus[i], &p);
    free(block);
  }
  compare(&r, "product", dtype);
  free(w), free(x), free(ids);
}

static void norms(int dtype, int rows, int width) {
  void *x = numbers(dtype, (int64_t)rows * (width + 1)), *weight = numbers(dtype, width);
  results r = results_of((size_t)rows * (size_t)width * xd_itemsize(dtype));
  for (int i = 0; i < num_cpus; i++) {
    xd_norm n = {.x = x, .weight = rows % 2 ? weight : NULL, .y = r.y[i], .num_rows = rows, .x_stride = width + 1};
    n.y_stride = width, n.width = width, n.x_dtype = n.weight_dtype = n.y_dtype = dtype, n.eps = 1e-5f;
    xd_norm_run(&cpus[i], &n);
  }
  compare(&r, "norm", dtype);
  free(x), free(weight);
}

static void activations(int dtype, int activation, int rows, int width, float limit) {
  void *both = numbers(dtype, (int64_t)rows * 2 * width);
  results r = results_of((size_t)rows * (size_t)width * xd_itemsize(dtype));
  for (int i = 0; i < num_cpus; i++) {
    xd_glu g = {.gate = both, .up = (char *)both + (size_t)width * xd_itemsize(dtype), .y = r.y[i], .num_rows = rows};
    g.gate_stride = g.up_stride = 2 * width, g.y_stride = g.width = width;
    g.activation = activation, g.dtype = dtype, g.alpha = 1.702f, g.limit = limit;
    xd_glu_run(&cpus[i], &g);
  }
  compare(&r, "activation", dtype);
  free(both);
}

static void rotations(int dtype, int traditional, int heads, int tokens, int width, int dims, int by_base) {
  enum { BATCH = 2 };
  const int32_t offsets[BATCH] = {1000003, 5};
  int64_t row = (int64_t)heads * width;
  void *x = numbers(dtype, BATCH * tokens * row), *block;
  float *freqs = numbers(XD_FLOAT32, dims / 2);
  results r = results_of((size_t)(BATCH * tokens * row) * xd_itemsize(dtype));
  for (int i = 0; i < num_cpus; i++) {
    xd_rope p = {.x = x, .y = r.y[i], .freqs = by_base ? NULL : freqs, .offsets = offsets, .offset_stride = 1};
    p.x_batch_stride = p.y_batch_stride = tokens * row;
    p.x_head_stride = width, p.x_token_stride = row; /* as queries come: a transposed view */
    p.y_head_stride = (int64_t)tokens * width, p.y_token_stride = width;
    p.batch = BATCH, p.heads = heads, p.tokens = tokens, p.width = width, p.dims = dims;
    p.traditional = traditional, p.dtype = dtype, p.base = 150000.0f, p.scale = 0.25f;
    p.scratch = scratch_of(xd_rope_scratch(&cpus[i], &p), &block);
    xd_rope_run(&cpus[i], &p);
    free(block);
  }
  compare(&r, "rotation", dtype);
  free(x), free(freqs);
}

typedef struct {
  int batch, heads, kv_heads, queries, keys, dim, value_dim;
} sizes;

static void *mask_of(int kind, int dtype, int64_t n) {
  if (kind == XD_MASK_ADD) {
    float *m = numbers(XD_FLOAT32, n);
    void *narrowed = claim((size_t)n * xd_itemsize(dtype) + 1);
    for (int64_t i = 0; i < n; i++) m[i] = m[i] > 0.7f ? -INFINITY : m[i];
    xd_narrow(m, dtype, narrowed, n);
    free(m);
    return narrowed;
  }
  uint8_t *m = claim((size_t)n + 1);
  for (int64_t i = 0; i < n; i++) m[i] = draw() > -0.5f;
  return m;
}

static void fill(xd_attention *a, const sizes *s, int dtype, int kind) {
  *a = (xd_attention){.batch = s->batch, .heads = s->heads, .kv_heads = s->kv_heads, .queries = s->queries};
  a->keys = s->keys, a->dim = s->dim, a->value_dim = s->value_dim;
  a->dtype = a->mask_dtype = a->sinks_dtype = dtype, a->mask_kind = kind, a->scale = 0.3f;
  a->q_row_stride = (int64_t)s->heads * s->dim, a->q_head_stride = s->dim;
  a->q_batch_stride = s->queries * a->q_row_stride;
  a->k_row_stride = s->dim, a->k_head_stride = (int64_t)s->keys * s->dim;
  a->k_batch_stride = s->kv_heads * a->k_head_stride;
  a->v_row_stride = s->value_dim, a->v_head_stride = (int64_t)s->keys * s->value_dim;
  a->v_batch_stride = s->kv_heads * a->v_head_stride;
  a->y_row_stride = (int64_t)s->heads * s->value_dim, a->y_head_stride = s->value_dim;
  a->y_batch_stride = s->queries * a->y_row_stride;
  a->mask_key_stride = 1, a->mask_row_stride = s->keys, a->mask_batch_stride = (int64_t)s->queries * s->keys;
}

static void attentions(int dtype, int kind, sizes s) {
  xd_attention a;
  fill(&a, &s, dtype, kind);
  void *q = numbers(dtype, s.batch * a.q_batch_stride), *k = numbers(dtype, s.batch * a.k_batch_stride), *block;
  void *v = numbers(dtype, s.batch * a.v_batch_stride), *sinks = numbers(dtype, s.heads);
  void *mask = mask_of(kind, dtype, s.batch * a.mask_batch_stride);
  results r = results_of((size_t)(s.batch * a.y_batch_stride) * xd_itemsize(dtype));
  for (int i = 0; i < num_cpus; i++) {
    a.q = q, a.k = k, a.v = v, a.y = r.y[i], a.mask = mask, a.sinks = s.heads % 2 ? NULL : sinks;
    a.scratch = scratch_of(xd_attention_scratch(&cpus[i], &a), &block);
    xd_attention_run(&cpus[i], &a);
    free(block);
  }
  compare(&r, "attention", dtype);
  free(q), free(k), free(v), free(sinks), free(mask);
}

static void check_attention(int dtype) {
  static const sizes all[] = {
      {1, 8, 2, 1, 65, 16, 16},  {2, 6, 2, 1, 37, 20, 12}, {1, 3, 3, 1, 1, 8, 8},    {2, 9, 3, 5, 50, 24, 41},
      {1, 1, 1, 33, 70, 16, 40}, {1, 4, 4, 3, 2, 1, 1},    {1, 2, 1, 1, 1100, 9, 33}, {1, 16, 1, 1, 130, 36, 32},
      {1, 2, 2, 4, 0, 8, 8},     {0, 2, 2, 4, 5, 8, 8},    {1, 2, 1, 0, 5, 8, 8},
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    for (int kind = XD_MASK_NONE; kind <= XD_MASK_ADD; kind++) attentions(dtype, kind, all[i]);
}

int main(void) {
  open_cpus();
  for (int dtype = XD_FLOAT32; dtype <= XD_BFLOAT16; dtype++) {
    products(dtype, 1, 1, 1, 1, 1), products(dtype, 1, 37, 515, 7, 1), products(dtype, 1, 5, 1030, 53, 1);
    products(dtype, 4, 34, 40, 20, 3), products(dtype, 3, 9, 0, 2, 2), products(dtype, 2, 8, 16, 0, 2);
    norms(dtype, 1, 1), norms(dtype, 3, 13), norms(dtype, 2, 128), norms(dtype, 300, 160), norms(dtype, 0, 8);
    for (int activation = XD_SILU; activation <= XD_RELU2; activation++)
      activations(dtype, activation, 3, 13, INFINITY), activations(dtype, activation, 100, 120, 0.7f);
    for (int traditional = 0; traditional < 2; traditional++) {
      rotations(dtype, traditional, 2, 1, 64, 64, 1), rotations(dtype, traditional, 3, 4, 10, 6, 0);
      rotations(dtype, traditional, 4, 50, 40, 20, 1), rotations(dtype, traditional, 1, 0, 8, 8, 1);
    }
    check_attention(dtype);
  }
  for (int i = 0; i < num_cpus; i++) xd_pool_close(cpus[i].pool);
  printf("ok %016llx\n", (unsigned long long)digest);
  return 0;
}
