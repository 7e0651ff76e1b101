/* quantize.h: choosing codes, scales and biases of MLX's affine format. cffi and the compiler read the same text.
 *
 * The format. A row of weights is cut into groups of 32, 64 or 128 consecutive entries. A group has one scale s and one
 * bias b, stored in the model's dtype, and each entry a code q of `bits` bits; the weight that a kernel computes with is
 * q s + b. Any sign of s and any b are allowed, so all quality lies in the choice. Codes are stored as one stream of bits,
 * least significant first, read as 32-bit little-endian words.
 *
 * The theory. Let e = w - (q s + b) be the error of a row, and H = X'X/n the second moments of the inputs that
 * the row is multiplied with. The mean squared error of the output is e H e'. Without inputs, H = I. Everything here
 * lowers that one number:
 *
 *   fit     H diagonal. Groups are independent: from several starts, alternate nearest codes and least squares for
 *           (s, b); round both; choose codes against what was rounded.
 *   gptq    H = (I + L)' D (I + L), L strictly lower triangular. Then e H e' = sum_k D_k (t_k - q_k s - b)^2 where
 *           t_k = w_k + sum_{j<k} e_j L_kj: column by column, each target takes over what the columns before it left.
 *           (The same codes as GPTQ's with the inverse of H, without the inverse; Chee et al. 2023, appendix.)
 *   refine  Coordinate descent. With P = e H, moving s and b of a group is a problem of two unknowns, moving one code of
 *           one. s and b are rounded when they move, and a move that does not lower the error is not made.
 *   gain    Least squares shrinks: w.(q s + b) < w.w by the relative error, 10 % at 2 bits. A common factor is no noise
 *           that averages out, and costs all that least squares has won (the model's KL divergence, bench/LOG.md). One
 *           factor per row, folded into its scales and biases, makes the product exact again.
 *
 * Rows do not depend on each other. They are worked on in tiles of lanes, one row per lane, so that loops over lanes
 * need no shuffles and each row's arithmetic is the same for any vector width, tile and number of threads: the same
 * input gives the same bytes. (No contraction to fused multiply-add; see build_quantize.py.)
 *
 * No function prints, exits or keeps anything between calls. All return XQ_OK or a failure. */

enum {
    XQ_OK = 0,
    XQ_ARGUMENT = -1, /* bits, group, dtype, shape or a null pointer that cannot be */
    XQ_MEMORY = -2,   /* no memory for the scratch of one thread */
    XQ_NOT_POSITIVE = -3 /* a Hessian that no sum of squares can be */
};

enum { XQ_F32 = 0, XQ_BF16 = 1, XQ_F16 = 2, XQ_F8_E4M3 = 3 };

/* One weight matrix and its codes; the caller owns all memory. */
typedef struct {
    const float *w;         /* [rows][cols], finite */
    size_t rows, cols;      /* cols is a multiple of group */
    int bits;               /* 2, 3, 4, 5, 6 or 8 */
    int group;              /* 32, 64 or 128 */
    int dtype;              /* of scales and biases: XQ_F32, XQ_BF16 or XQ_F16; values are kept as float32 */
    int threads;            /* at most; 1 to 256 */
    uint8_t *codes;         /* [rows][cols] */
    float *scales, *biases; /* [rows][cols / group] */
} xq_matrix;

/* Writes codes, scales and biases. `weight` [cols], at least 0: the diagonal of H; NULL for I. */
int xq_fit(const xq_matrix *m, const float *weight);

/* L and D of H: row j of feedback[cols][cols] gets L_kj for k > j (the rest below is not written), weight[cols] the
 * diagonal of D. `reversed` [cols][cols] is H with rows and columns in reverse order, and is destroyed; its lower
 * triangle is read. */
int xq_factor(double *reversed, size_t cols, int threads, float *feedback, float *weight);

/* Below, `panels` is a matrix [cols][cols] cut into panels of one group's columns: [cols / group][cols][group]. */

/* Writes codes, scales and biases, from what xq_factor gave, feedback as panels; grids are fitted with `weight`. */
int xq_gptq(const xq_matrix *m, const float *panels, const float *weight);

/* Improves codes, scales and biases in place under the H of `panels`, at most `sweeps` times over all groups. */
int xq_refine(const xq_matrix *m, const float *panels, int sweeps);

/* Multiplies each row's scales and biases by gain[row], rounds them, and takes the codes nearest to gain[row] w. */
int xq_rescale(const xq_matrix *m, const float *gain, int keep_codes);

/* Per row: w H w', w H (q s + b)' and e H e', into moments[rows][3]. `panels`: of H; NULL for I. */
int xq_moments(const xq_matrix *m, const float *panels, double *moments);

/* codes[rows][cols] as MLX stores them, into packed[rows][cols * bits / 32]; cols is a multiple of 32. */
int xq_pack(const uint8_t *codes, size_t rows, size_t cols, int bits, int threads, uint32_t *packed);

/* The index of the first of n numbers that is NaN or infinite, n if there is none, into *index. */
int xq_first_not_finite(const void *numbers, size_t n, int dtype, int threads, size_t *index);
