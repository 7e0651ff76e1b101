/* kernels.h: what a model computes on a CPU, at the speed of its memory. The contract of native/kernels/.

   Three rules hold for every function here.

   Same bits. A row of a result depends on that row's own numbers and on the weights alone: not on the number of
   threads, on the rows beside it, on how many there are (so decode and prefill agree), on the slice of experts that is
   asked for, nor on the processor: AVX2, AVX-512, NEON and portable C give the same bits. Every sum has one order,
   written at its definition, and every path keeps it.

   No failure while computing. Arguments are checked where the graph is built (kernel_ops.cpp). Memory comes from
   the caller. An expert id out of range, or a row with an infinity or NaN, gives NaN in its own rows.

   No errno, no exit, no print: xd_cpu_open alone can fail; it returns a code and fills `err`. */

/* The number format of an array. */
enum { XD_FLOAT32 = 0, XD_FLOAT16 = 1, XD_BFLOAT16 = 2 };

/* Threads and the instruction set, shared by all calls of a process. One thread calls at a time. */
typedef struct xd_cpu xd_cpu;

/* Open `*cpu` with `num_threads` threads, the caller counted in. `isa` is "" for the best that runs here, or one of
   xd_cpu_isas(). 0, or -1 with the reason in err. */
int xd_cpu_open(xd_cpu **cpu, const char *isa, int num_threads, char *err, size_t err_bytes);
/* Ends the threads. NULL is nothing. */
void xd_cpu_close(xd_cpu *cpu);
const char *xd_cpu_isa(const xd_cpu *cpu);
int xd_cpu_num_threads(const xd_cpu *cpu);
/* The instruction sets that run on this processor, best first, with spaces between. */
const char *xd_cpu_isas(void);

/* Weights [num_experts, num_out, width], row after row.
   Affine (bits 2, 4 or 8; group_size 32, 64 or 128): `data` holds MLX's packed codes, the first of a uint32 in its lowest bits,
   scales and biases [num_experts, num_out, width / group_size] are of `dtype`: w = scale * code + bias.
   Plain (bits 0): `data` is of `dtype`; scales and biases are NULL. */
typedef struct {
  const void *data;
  const void *scales;
  const void *biases;
  int32_t dtype;
  int32_t bits;
  int32_t group_size;
  int32_t num_experts;
  int32_t num_out;
  int32_t width;
} xd_weight;

/* y[i, :] = w[ids[i]] @ x[i / ids_per_row, :], for i < num_rows * ids_per_row.

   x [num_rows, width] and y [num_rows * ids_per_row, num_out] lie row after row. `ids` NULL is expert 0 for all.
   `activation_bits` is for affine weights: a row of x is rounded, group by group, to integers of 8 or 16 bits
   (relative error of a product about 6e-3 and 2e-5); sums within a group are then exact. Plain weights take x as float32.
   `scratch` has xd_product_scratch() bytes, aligned to 64. */
typedef struct {
  xd_weight weight;
  const void *x;
  const uint32_t *ids;
  void *y;
  void *scratch;
  int64_t num_rows;
  int32_t x_dtype;
  int32_t y_dtype;
  int32_t ids_per_row;
  int32_t activation_bits;
} xd_product;

size_t xd_product_scratch(const xd_cpu *cpu, const xd_product *product);
void xd_product_run(xd_cpu *cpu, const xd_product *product);
