/* quantize_factor.c: a symmetric matrix as C C' (Cholesky), in double precision and with the same bits for any number of
 * threads, which libraries do not promise.
 *
 * Right-looking, in panels of 64 columns: solve the panel's rows one after the other against the rows of its own
 * block, then take the panel's share off everything to its right. That last step is nearly all of the work, n^3 / 6
 * products, and runs along rows with the panel transposed, so that no loop sums across lanes. */

#include <math.h>
#include <stdlib.h>

#include "quantize_private.h"

enum { PANEL = 64, ROWS = 16, CHUNK = 64 };

typedef struct {
    double *a; /* [n][n]; the lower triangle becomes C */
    size_t n, first, width; /* the panel's columns */
    double *panel; /* [PANEL][n]: the panel, transposed */
} factoring;

/* Solve x C' = a for columns [0, width) of one row; `c`: the rows of the transposed panel, from its own block. */
WIDE static void solve(double *restrict x, const double *restrict c, size_t stride, size_t width) {
    for (size_t k = 0; k < width; k++) {
        x[k] /= c[k * stride + k];
        for (size_t j = k + 1; j < width; j++) x[j] -= x[k] * c[k * stride + j];
    }
}

/* The panel's own block, whose rows are solved against those above them; false if a pivot is not positive. */
static bool solve_block(factoring *f) {
    for (size_t r = 0; r < f->width; r++) {
        double *x = f->a + (f->first + r) * f->n + f->first, pivot = x[r];
        solve(x, f->panel + f->first, f->n, r);
        for (size_t k = 0; k < r; k++) pivot -= x[k] * x[k];
        if (!(pivot > 0.0)) return false;
        x[r] = sqrt(pivot);
        for (size_t k = 0; k <= r; k++) f->panel[k * f->n + f->first + r] = x[k];
    }
    return true;
}

static void solve_rows(const void *argument, size_t item, void *scratch) {
    const factoring *f = argument;
    const size_t begin = f->first + f->width + item * ROWS, end = begin + ROWS < f->n ? begin + ROWS : f->n;
    (void)scratch;
    for (size_t row = begin; row < end; row++) {
        double *x = f->a + row * f->n + f->first;
        solve(x, f->panel + f->first, f->n, f->width);
        for (size_t k = 0; k < f->width; k++) f->panel[k * f->n + row] = x[k];
    }
}

/* a[j] -= sum over k of x[k] panel[k][j], for j in [0, num). */
WIDE static void subtract(double *restrict a, const double *restrict x, const double *restrict panel, size_t stride,
                          size_t num) {
    for (size_t k = 0; k < PANEL; k += 4) {
        const double *p0 = panel + k * stride, *p1 = p0 + stride, *p2 = p1 + stride, *p3 = p2 + stride;
        for (size_t j = 0; j < num; j++) a[j] -= (x[k] * p0[j] + x[k + 1] * p1[j]) + (x[k + 2] * p2[j] + x[k + 3] * p3[j]);
    }
}

/* Rows in turn for each chunk of columns: the chunk of the panel stays in the cache. Only whole panels have columns to
 * their right. */
static void subtract_rows(const void *argument, size_t item, void *scratch) {
    const factoring *f = argument;
    const size_t right = f->first + PANEL;
    const size_t begin = right + item * ROWS, end = begin + ROWS < f->n ? begin + ROWS : f->n;
    (void)scratch;
    for (size_t from = right; from < end; from += CHUNK) {
        for (size_t row = begin > from ? begin : from; row < end; row++) {
            const size_t to = from + CHUNK <= row ? from + CHUNK : row + 1;
            subtract(f->a + row * f->n + from, f->a + row * f->n + f->first, f->panel + from, f->n, to - from);
        }
    }
}

/* C of the lower triangle of a[n][n], in place. */
static int factor(double *a, size_t n, int threads) {
    factoring f = {.a = a, .n = n, .panel = malloc((PANEL * n + 1) * sizeof(double))};
    int result = f.panel ? XQ_OK : XQ_MEMORY;
    for (f.first = 0; f.first < n && result == XQ_OK; f.first += PANEL) {
        f.width = n - f.first < PANEL ? n - f.first : PANEL;
        const size_t num_items = (n - f.first - f.width + ROWS - 1) / ROWS;
        if (!solve_block(&f)) result = XQ_NOT_POSITIVE;
        if (result == XQ_OK) result = xq_run(solve_rows, &f, num_items, threads, 0);
        if (result == XQ_OK) result = xq_run(subtract_rows, &f, num_items, threads, 0);
    }
    free(f.panel);
    return result;
}

/* With the order of columns reversed, C is the upper triangular R with R R' = H, and L_kj = R_jk / R_kk. */
int xq_factor(double *reversed, size_t cols, int threads, float *feedback, float *weight) {
    if (!reversed || !feedback || !weight || threads < 1 || threads > MAX_THREADS) return XQ_ARGUMENT;
    const int result = factor(reversed, cols, threads);
    if (result != XQ_OK) return result;
    for (size_t j = 0; j < cols; j++) {
        const double *row = reversed + (cols - 1 - j) * cols;
        for (size_t k = j; k < cols; k++) {
            const size_t at = cols - 1 - k;
            feedback[j * cols + k] = (float)(row[at] / reversed[at * cols + at]);
        }
        weight[j] = (float)(row[cols - 1 - j] * row[cols - 1 - j]);
    }
    return XQ_OK;
}
