/* floats.h: what is computed in float32, once per instruction set: plain products and the operations of ops.h.

   floats.inc.h holds the code, in terms of simd.h's eight lanes; floats_avx2.c, floats_neon.c and floats_portable.c
   compile it. plain.c, ops.c and attention.c check nothing and compute nothing: they divide the work among threads
   and the scratch among its uses. */
#ifndef XD_KERNELS_FLOATS_H
#define XD_KERNELS_FLOATS_H

#include "private.h"

#include "ops.h"

/* Plain products. Up to DOT_OUT weight rows times up to DOT_ROWS rows of x. */
enum { DOT_OUT = 32, DOT_ROWS = 48, DOT_CHUNK = 512 };

typedef struct {
  const void *w; /* rows of `dtype`, width apart */
  const float *const *x; /* [num_rows]: where each row's first DOT_CHUNK numbers are, padded with zeros to a multiple of 8 */
  int64_t x_chunk_stride; /* from there to the next ones */
  float (*y)[DOT_OUT];   /* [num_rows] */
  int64_t width;
  int dtype, num_out, num_rows;
} xd_dot;

/* Attention (attention.c, floats_attention.inc.h). */
typedef struct {
  int64_t first, last; /* no key outside of first .. last - 1 is visible */
  int has_holes;       /* some in between is hidden */
  const char *mask;
  const char *q;
  char *y;
  int32_t head;
} xd_attend_row;

enum { ATTEND_ROWS = 32 };

/* What computes one unit: up to ATTEND_ROWS rows, pairs of (head, query), that share a kv head. */
typedef struct {
  xd_attend_row *rows;  /* [ATTEND_ROWS] */
  float *q;             /* [ATTEND_ROWS, dim8] */
  float *block;         /* [block_keys, max(dim8, value8)] */
  float *acc;           /* [ATTEND_ROWS, value8] */
  float *scores;        /* [ATTEND_ROWS, score_stride] */
  float *sums;          /* [ATTEND_ROWS] */
  int num_rows;
  int64_t batch, kv_head;
} xd_attend_unit;

typedef struct {
  const xd_attention *a;
  int64_t num_rows; /* of a kv head */
  int unit_rows, num_blocks;
  int64_t num_units;
  int dim8, value8, block_keys;
  int64_t score_stride;
} xd_attend;

struct xd_floats {
  void (*dot)(const xd_dot *d);
  /* Rows first .. last - 1. */
  void (*norm)(const xd_norm *n, int64_t first, int64_t last);
  void (*glu)(const xd_glu *g, int64_t first, int64_t last);
  /* Frequencies [dims / 2]; then cosines and sines [dims] each, for tokens first .. last - 1 of a batch entry; then the
     rotation of these tokens of entry b. */
  void (*rope_frequencies)(const xd_rope *r, double *frequencies);
  void (*rope_angles)(const xd_rope *r, const double *frequencies, int64_t b, int64_t first, int64_t last, float *table);
  void (*rope_rotate)(const xd_rope *r, const float *table, int64_t b, int64_t first, int64_t last);
  /* Set up unit `index`: rows and what they see. Then scores of keys from .. to - 1, the softmax of one row, and the
     values' dimensions from .. to - 1. */
  void (*attend_open)(const xd_attend *j, xd_attend_unit *u, int64_t index);
  void (*attend_scores)(const xd_attend *j, xd_attend_unit *u, int64_t from, int64_t to);
  void (*attend_softmax)(const xd_attend *j, xd_attend_unit *u, int row);
  void (*attend_values)(const xd_attend *j, xd_attend_unit *u, int from, int to);
};

extern const xd_floats xd_floats_portable;
#if defined(__x86_64__)
extern const xd_floats xd_floats_avx2;
#endif
#if defined(__aarch64__)
extern const xd_floats xd_floats_neon;
#endif

#endif
