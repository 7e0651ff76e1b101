/* quantize_private.h: what the quantize*.c files share. */

#ifndef XQ_PRIVATE_H
#define XQ_PRIVATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "quantize.h"

enum { LANES = 32, MAX_GROUP = 128, MAX_THREADS = 256 };

/* Compiled once for every x86-64 and once with AVX2 (and AVX-512), chosen at start-up. Both do the same arithmetic in the
 * same order; only the width differs. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__OPTIMIZE__) && !defined(__SANITIZE_THREAD__)
#define WIDE __attribute__((target_clones("default", "avx2")))
#else
#define WIDE
#endif

/* LANES rows side by side: values of one column in a row of this. */
typedef float column[LANES];

/* The scales and biases of one group, a row per lane. */
typedef struct {
    column scale, bias;
} grid;

/* What one thread does with items [0, num_items) until none is left. `scratch` is the thread's own. */
typedef void (*xq_work)(const void *job, size_t item, void *scratch);

/* Run `work` on all items with at most `threads` threads, each with `scratch_bytes` of zeroed memory. XQ_MEMORY when the
 * calling thread's own scratch cannot be had; nothing is then done. */
int xq_run(xq_work work, const void *job, size_t num_items, int threads, size_t scratch_bytes);

bool xq_is_sane(const xq_matrix *m);
size_t xq_num_tiles(const xq_matrix *m);

/* The nearest float32 that `dtype` can hold; the largest finite one for what is larger. */
float xq_round(float x, int dtype);
/* The neighbour of a float that `dtype` holds, away from zero or towards it. */
float xq_neighbour(float x, int dtype, int away);

/* Columns [first, first + n) of the rows of a tile, transposed; lanes without a row repeat the last one. */
void xq_load(const xq_matrix *m, size_t tile, size_t first, size_t n, column *out);
void xq_load_grid(const xq_matrix *m, size_t tile, size_t group, grid *out);
void xq_load_codes(const xq_matrix *m, size_t tile, size_t first, size_t n, column *out);
void xq_store_grid(const xq_matrix *m, size_t tile, size_t group, const grid *g);
void xq_store_codes(const xq_matrix *m, size_t tile, size_t first, size_t n, const column *codes);

/* The rounded grid of one group with the least weighted error, and its codes. `x` and `codes`: [group]; `weight`:
 * [group], NULL for ones. */
void xq_fit_group(const column *x, const float *weight, int group, int bits, int dtype, grid *best, column *codes);

/* The codes nearest to x: q = clip(round((x - bias) / scale)), 0 where the scale is 0. */
void xq_assign(const column *x, int n, int bits, const grid *g, column *codes);

/* sum[k] += scaled[j] * panel[j][k] over j in [from, to), k in [0, n); to - from is a multiple of 4. */
void xq_accumulate(column *sum, int n, const column *scaled, const float *panel, size_t from, size_t to);

#endif
