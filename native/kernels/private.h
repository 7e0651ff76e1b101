/* private.h: what the files of native/kernels/ share: threads, number formats, and the table of an instruction set. */
#ifndef XD_KERNELS_PRIVATE_H
#define XD_KERNELS_PRIVATE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

/* Threads (pool.c). */

typedef struct xd_pool xd_pool;
/* A task of a job. `thread` is below the pool's number of threads: for memory of its own. */
typedef void (*xd_task)(const void *job, int64_t index, int thread);

xd_pool *xd_pool_open(int num_threads, char *err, size_t err_bytes);
void xd_pool_close(xd_pool *pool);
int xd_pool_num_threads(const xd_pool *pool);
/* Run task(job, 0 .. num_tasks - 1) on all threads, the caller's too; returns when all are done. */
void xd_pool_run(xd_pool *pool, xd_task task, const void *job, int64_t num_tasks);

/* Numbers. */

static inline float xd_from_bf16(uint16_t b) {
  uint32_t bits = (uint32_t)b << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline uint16_t xd_to_bf16(float f) { /* to nearest, ties to even; a NaN stays one */
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float xd_from_f16(uint16_t h);
uint16_t xd_to_f16(float f);
/* n numbers of a format to float32 and back, the same for every instruction set. */
void xd_widen(const void *from, int dtype, float *to, int64_t n);
void xd_narrow(const float *from, int dtype, void *to, int64_t n);
static inline size_t xd_itemsize(int dtype) {
  return dtype == XD_FLOAT32 ? 4 : 2;
}
static inline int64_t xd_round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

/* Affine products (product.c drives, affine_*.c compute).

   A row of x becomes integers: per group a scale d = max|x| / q_max and numbers q = round(x / d), |q| <= q_max (127 for 8
   bits, 32639 for 16, which is hi * 256 + lo with both in -128..127). With I = sum code * q and A = sum q, both exact in int32,

       y = sum over groups of (s d) I + b (d A)

   in this order: lane l of 8 takes the groups l, l + 8, ...: acc = fma(s * d, (float)I, acc), then acc = fma(b, d * A, acc).
   At the end ((l0 + l4) + (l2 + l6)) + ((l1 + l5) + (l3 + l7)). */

enum { XD_LANES = 8, XD_TILE_OUT = 32, XD_FEW_OUT = 16, XD_TILE_ROWS = 4 };

typedef struct {
  int bits, group_size, dtype;
  int two_digits;     /* activations of 16 bits */
  int width, groups;  /* groups of a weight row */
  int padded_groups;  /* a multiple of XD_LANES */
  int64_t code_bytes; /* of a weight row */
  int64_t q_bytes;    /* of a row of q */
} xd_affine;

/* A row of x as integers. Codes lie 8 / bits in a byte, so q lies in planes: of each block of 32 code bytes, first what
   meets the lowest codes of the bytes, then the next (`hi` at 0, `lo` at q_bytes / 2 if there are two digits). For 8-bit
   codes q is int16, first what meets the even bytes of the block, then the odd. Padded with zeros to padded_groups. */
typedef struct {
  const int8_t *q;
  const float *d, *da; /* [padded_groups]: scales, and scales times sums */
} xd_row;

/* Everything in float32: plain products and the operations of ops.h (floats.h, compiled once per instruction set). */
typedef struct xd_floats xd_floats;

#define XD_TINY 1e-30f /* a group that is nowhere larger counts as zeros: q_max / max would overflow */
static inline float xd_q_max(const xd_affine *a) {
  return a->two_digits ? 32639.0f : 127.0f;
}

typedef struct {
  const char *name;
  int parts; /* in how many parts affine_rows reads a block, all at once */
  const xd_floats *floats;
  /* A row of x to integers; `numbers` is room for padded_groups * group_size of them, aligned to 32 bytes as is q. */
  void (*round_row)(const xd_affine *a, const float *x, int16_t *numbers, int8_t *q, float *d, float *da);
  /* One row against num_out weight rows: y[num_out]. */
  void (*affine_rows)(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                      const xd_row *row, float *y);
  /* 1 to XD_TILE_ROWS rows against num_out <= XD_FEW_OUT weight rows, which are unpacked on the way. NULL: take affine_rows
     for each. */
  void (*affine_few)(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                     const xd_row *rows, int num_rows, float y[XD_TILE_ROWS][XD_TILE_OUT]);
  /* Unpack num_out <= XD_TILE_OUT weight rows into `panel` (xd_panel_bytes), so that 8 output rows lie side by side. */
  void (*affine_pack)(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                      void *panel);
  /* 1 to XD_TILE_ROWS rows against a panel. */
  void (*affine_tile)(const xd_affine *a, const void *panel, const xd_row *rows, int num_rows,
                      float y[XD_TILE_ROWS][XD_TILE_OUT]);
} xd_isa;

/* The pairs (row, expert) of a product, by expert: those of expert e are order[starts[e] .. starts[e + 1] - 1], ascending.
   Pairs whose id is out of range are left out: their rows of y are set to NaN. starts[num_experts + 1]. */
void xd_sort_pairs(const xd_product *product, int64_t *order, int64_t *starts);
void xd_fill_nan(const xd_product *product, int64_t pair);

/* Plain products (plain.c), called by xd_product_scratch and xd_product_run. */
size_t xd_plain_scratch(const xd_cpu *cpu, const xd_product *product);
void xd_plain_run(xd_cpu *cpu, const xd_product *product);

int64_t xd_panel_bytes(const xd_affine *a);
/* Where element k of a row lies in q: int8 for 2 and 4 bits, int16 for 8. */
static inline int64_t xd_q_index(int bits, int64_t k) {
  int64_t planes = bits == 8 ? 2 : 8 / bits, block = bits == 8 ? 32 : 32 * planes;
  return k / block * block + k % planes * (block / planes) + k % block / planes;
}


struct xd_cpu {
  const xd_isa *isa;
  xd_pool *pool;
};

/* As xd_isa's round_row; AVX-512 has no better way (round_avx2.c). */
void xd_round_row_avx2(const xd_affine *a, const float *x, int16_t *numbers, int8_t *q, float *d, float *da);
/* AVX2's affine_rows (affine_avx2_rows.c). */
void xd_affine_rows_avx2(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                         const xd_row *row, float *y);
/* The same for codes of 2 bits in groups of 64 with bfloat16 scales and one digit (affine_avx2_two_bits.c). Gives how many weight
   rows it has computed, the first of them; the others, or all of a format that it does not know, are left. */
int xd_two_bits_rows_avx2(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                          const xd_row *row, float *y);
/* The same for codes of 2 and 4 bits in groups of 16 or 32 bytes (affine_avx512_rows.c). */
int xd_few_bits_rows_avx512(const xd_affine *a, const uint8_t *codes, const void *scales, const void *biases, int num_out,
                            const xd_row *row, float *y);

/* NULL where the compiler or this processor lacks it. */
const xd_isa *xd_isa_portable(void);
const xd_isa *xd_isa_avx2(void);
const xd_isa *xd_isa_avx512(void);
const xd_isa *xd_isa_neon(void);
const xd_isa *xd_isa_neon_i8mm(void);

#endif
