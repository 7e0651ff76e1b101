/* quantize_hessian.c: error feedback (gptq), coordinate descent (refine), gain and error under full second moments.
 *
 * Nearly all time goes into products of a tile's errors with columns of a square matrix of the input's width: `width`
 * multiplications per weight and pass. The matrix lies in panels of one group's columns, which are read from begin to
 * end. xq_accumulate takes 64 rows of a panel at a time, so that they, the errors and the sums stay in the first-level
 * cache, and four rows in one go, so that sums are loaded and stored once in four. Measured (2.5 GHz, AVX2, load of 9
 * on 2 cores): 10 to 18 thousand million products a second; without panels 6.7 at a width of 2048. Within a group a change of one column is told to the others at once; the other groups
 * see it when their turn comes, from the errors themselves. So nothing drifts. */

#include <string.h>

#include "quantize_private.h"

enum { BLOCK = 64, NUM_INNER = 2 }; /* a group's grid and codes settle in about two turns */

WIDE void xq_accumulate(column *restrict sum, int n, const column *restrict scaled, const float *restrict panel,
                        size_t from, size_t to) {
    for (size_t block = from; block < to; block += BLOCK) {
        const size_t end = block + BLOCK < to ? block + BLOCK : to;
        for (int k = 0; k < n; k++) {
            float *restrict s = sum[k];
            for (size_t j = block; j < end; j += 4) {
                const float *a = panel + j * (size_t)n + k;
                const float a0 = a[0], a1 = a[n], a2 = a[2 * n], a3 = a[3 * n];
                const float *e0 = scaled[j], *e1 = scaled[j + 1], *e2 = scaled[j + 2], *e3 = scaled[j + 3];
                for (int l = 0; l < LANES; l++) s[l] += (e0[l] * a0 + e1[l] * a1) + (e2[l] * a2 + e3[l] * a3);
            }
        }
    }
}

typedef struct {
    const xq_matrix *m;
    const float *panels; /* of the feedback or of H */
    const float *weight;
    int sweeps;
    double *moments;
} job;

/* sum[k] -= step * row[k]: what a change of one column by `step` does to columns [from, n). */
static inline __attribute__((always_inline)) void spread_out(column *restrict sum, const float *restrict row, int from,
                                                             int n, const float *restrict step) {
    for (int k = from; k < n; k++)
        for (int l = 0; l < LANES; l++) sum[k][l] += step[l] * row[k];
}

/* Codes for the columns of a group from left to right; `t` holds the targets, `e` becomes the errors. */
WIDE static void feed_back(const column *x, column *t, column *codes, column *e, const float *feedback, int n, int bits,
                           const grid *g) {
    for (int k = 0; k < n; k++) {
        xq_assign(&t[k], 1, bits, g, &codes[k]);
        for (int l = 0; l < LANES; l++) e[k][l] = x[k][l] - (codes[k][l] * g->scale[l] + g->bias[l]);
        spread_out(t, feedback + k * n, k + 1, n, e[k]);
    }
}

static void gptq_item(const void *argument, size_t tile, void *scratch) {
    const job *j = argument;
    const xq_matrix *m = j->m;
    const size_t n = (size_t)m->group;
    column *e = scratch, *x = e + m->cols, *t = x + n, *codes = t + n;
    for (size_t first = 0; first < m->cols; first += n) {
        const float *panel = j->panels + first * m->cols;
        grid g;
        xq_load(m, tile, first, n, x);
        memcpy(t, x, n * sizeof *x);
        xq_accumulate(t, m->group, e, panel, 0, first);
        xq_fit_group(t, j->weight + first, m->group, m->bits, m->dtype, &g, codes);
        feed_back(x, t, codes, e + first, panel + first * n, m->group, m->bits, &g);
        xq_store_grid(m, tile, first / n, &g);
        xq_store_codes(m, tile, first, n, codes);
    }
}

int xq_gptq(const xq_matrix *m, const float *panels, const float *weight) {
    if (!xq_is_sane(m) || !panels || !weight) return XQ_ARGUMENT;
    const job j = {.m = m, .panels = panels, .weight = weight};
    return xq_run(gptq_item, &j, xq_num_tiles(m), m->threads, (m->cols + 3 * (size_t)m->group) * sizeof(column));
}

/* One group under descent: errors, codes, P = e H of its columns, and its own block of H. */
typedef struct {
    column *e, *codes, *p;
    const float *h; /* [n][n] */
    int n, bits, dtype;
    grid g;
} turn;

/* Least squares for (s, b) with the codes as they are; true if any lane moved. `v` is scratch for the codes times the
 * block of H. */
WIDE static bool move_grid(turn *t, column *restrict v) {
    column a11, a12, p1, p2;
    float row_sum[MAX_GROUP], a22 = 0.0f;
    bool has_moved = false;
    memset(v, 0, (size_t)t->n * sizeof *v);
    xq_accumulate(v, t->n, t->codes, t->h, 0, (size_t)t->n);
    memset(a11, 0, sizeof a11);
    memset(a12, 0, sizeof a12);
    memset(p1, 0, sizeof p1);
    memset(p2, 0, sizeof p2);
    for (int k = 0; k < t->n; k++) {
        row_sum[k] = 0.0f;
        for (int i = 0; i < t->n; i++) row_sum[k] += t->h[k * t->n + i];
        a22 += row_sum[k];
        for (int l = 0; l < LANES; l++) {
            a11[l] += t->codes[k][l] * v[k][l];
            a12[l] += v[k][l];
            p1[l] += t->codes[k][l] * t->p[k][l];
            p2[l] += t->p[k][l];
        }
    }
    column ds, db;
    for (int l = 0; l < LANES; l++) {
        const float scale = t->g.scale[l], bias = t->g.bias[l];
        float determinant = a11[l] * a22 - a12[l] * a12[l], slope = 0.0f;
        if (determinant > 1e-5f * a11[l] * a22) slope = (a22 * p1[l] - a12[l] * p2[l]) / determinant;
        const float new_scale = xq_round(scale + slope, t->dtype);
        ds[l] = new_scale - scale;
        const float shift = a22 > 0.0f ? (p2[l] - a12[l] * ds[l]) / a22 : 0.0f;
        const float new_bias = xq_round(bias + shift, t->dtype);
        db[l] = new_bias - bias;
        const float change = ds[l] * (ds[l] * a11[l] + 2.0f * db[l] * a12[l] - 2.0f * p1[l]) +
                             db[l] * (db[l] * a22 - 2.0f * p2[l]);
        const bool is_better = change < 0.0f;
        has_moved |= is_better;
        ds[l] = is_better ? ds[l] : 0.0f;
        db[l] = is_better ? db[l] : 0.0f;
        t->g.scale[l] = is_better ? new_scale : scale;
        t->g.bias[l] = is_better ? new_bias : bias;
    }
    for (int k = 0; k < t->n; k++) {
        for (int l = 0; l < LANES; l++) {
            t->e[k][l] -= ds[l] * t->codes[k][l] + db[l];
            t->p[k][l] -= ds[l] * v[k][l] + db[l] * row_sum[k];
        }
    }
    return has_moved;
}

/* Each code in turn to where the error is least; true if any moved. */
WIDE static bool move_codes(turn *t) {
    bool has_moved = false;
    for (int k = 0; k < t->n; k++) {
        const float *row = t->h + k * t->n;
        column wanted, step;
        grid unit; /* the code that P asks for, as a weight on the grid (1, 0) */
        if (row[k] <= 0.0f) continue;
        for (int l = 0; l < LANES; l++) {
            float curvature = row[k] * t->g.scale[l];
            wanted[l] = t->codes[k][l] + (curvature != 0.0f ? t->p[k][l] / curvature : 0.0f);
            unit.scale[l] = 1.0f;
            unit.bias[l] = 0.0f;
        }
        xq_assign(&wanted, 1, t->bits, &unit, &wanted);
        float moved = 0.0f;
        for (int l = 0; l < LANES; l++) {
            float by = wanted[l] - t->codes[k][l];
            moved += by * by;
            step[l] = -by * t->g.scale[l];
        }
        if (moved == 0.0f) continue;
        has_moved = true;
        for (int l = 0; l < LANES; l++) {
            t->codes[k][l] = wanted[l];
            t->e[k][l] += step[l];
        }
        spread_out(t->p, row, 0, t->n, step);
    }
    return has_moved;
}

static void set_errors(const column *x, const column *codes, const grid *g, int n, column *e) {
    for (int k = 0; k < n; k++)
        for (int l = 0; l < LANES; l++) e[k][l] = x[k][l] - (codes[k][l] * g->scale[l] + g->bias[l]);
}

static bool refine_group(const job *j, size_t tile, size_t first, column *e, column *scratch) {
    const xq_matrix *m = j->m;
    const size_t n = (size_t)m->group;
    column *x = scratch, *v = x + n;
    bool has_moved = false;
    const float *panel = j->panels + first * m->cols;
    turn t = {.e = e + first, .codes = v + n, .p = v + 2 * n, .h = panel + first * n,
              .n = m->group, .bits = m->bits, .dtype = m->dtype};
    xq_load_grid(m, tile, first / n, &t.g);
    xq_load_codes(m, tile, first, n, t.codes);
    memset(t.p, 0, n * sizeof *t.p);
    xq_accumulate(t.p, m->group, e, panel, 0, m->cols);
    for (int inner = 0; inner < NUM_INNER; inner++) {
        bool grid_moved = move_grid(&t, v), codes_moved = move_codes(&t);
        has_moved |= grid_moved | codes_moved;
        if (!codes_moved) break;
    }
    if (!has_moved) return false;
    xq_load(m, tile, first, n, x);
    set_errors(x, t.codes, &t.g, m->group, t.e);
    xq_store_grid(m, tile, first / n, &t.g);
    xq_store_codes(m, tile, first, n, t.codes);
    return true;
}

static void load_errors(const xq_matrix *m, size_t tile, column *e, column *scratch) {
    const size_t n = (size_t)m->group;
    column *x = scratch, *codes = x + n;
    for (size_t first = 0; first < m->cols; first += n) {
        grid g;
        xq_load(m, tile, first, n, x);
        xq_load_codes(m, tile, first, n, codes);
        xq_load_grid(m, tile, first / n, &g);
        set_errors(x, codes, &g, m->group, e + first);
    }
}

static void refine_item(const void *argument, size_t tile, void *scratch) {
    const job *j = argument;
    const xq_matrix *m = j->m;
    column *e = scratch;
    load_errors(m, tile, e, e + m->cols);
    for (int sweep = 0; sweep < j->sweeps; sweep++) {
        bool has_moved = false;
        for (size_t first = 0; first < m->cols; first += (size_t)m->group)
            has_moved |= refine_group(j, tile, first, e, e + m->cols);
        if (!has_moved) break;
    }
}

int xq_refine(const xq_matrix *m, const float *panels, int sweeps) {
    if (!xq_is_sane(m) || !panels || sweeps < 0) return XQ_ARGUMENT;
    const job j = {.m = m, .panels = panels, .sweeps = sweeps};
    return xq_run(refine_item, &j, xq_num_tiles(m), m->threads, (m->cols + 4 * (size_t)m->group) * sizeof(column));
}

typedef struct {
    const xq_matrix *m;
    const float *gain;
    int keep_codes;
} rescale_job;

static void rescale_item(const void *argument, size_t tile, void *scratch) {
    const rescale_job *j = argument;
    const xq_matrix *m = j->m;
    const size_t n = (size_t)m->group;
    column *x = scratch, *codes = x + n, gain;
    for (int l = 0; l < LANES; l++) {
        size_t row = tile * LANES + (size_t)l;
        gain[l] = j->gain[row < m->rows ? row : m->rows - 1];
    }
    for (size_t first = 0; first < m->cols; first += n) {
        grid g;
        xq_load_grid(m, tile, first / n, &g);
        for (int l = 0; l < LANES; l++) {
            g.scale[l] = xq_round(gain[l] * g.scale[l], m->dtype);
            g.bias[l] = xq_round(gain[l] * g.bias[l], m->dtype);
        }
        xq_store_grid(m, tile, first / n, &g);
        if (j->keep_codes) continue;
        xq_load(m, tile, first, n, x);
        for (size_t k = 0; k < n; k++)
            for (int l = 0; l < LANES; l++) x[k][l] *= gain[l];
        xq_assign(x, m->group, m->bits, &g, codes);
        xq_store_codes(m, tile, first, n, codes);
    }
}

int xq_rescale(const xq_matrix *m, const float *gain, int keep_codes) {
    if (!xq_is_sane(m) || !gain) return XQ_ARGUMENT;
    const rescale_job j = {m, gain, keep_codes};
    return xq_run(rescale_item, &j, xq_num_tiles(m), m->threads, 2 * (size_t)m->group * sizeof(column));
}

/* Columns [first, first + n) of a H, or of a itself where H is I. */
static void times_h(const job *j, const column *a, size_t first, column *out) {
    const size_t n = (size_t)j->m->group;
    if (!j->panels) {
        memcpy(out, a + first, n * sizeof *a);
        return;
    }
    memset(out, 0, n * sizeof *out);
    xq_accumulate(out, j->m->group, a, j->panels + first * j->m->cols, 0, j->m->cols);
}

static void moments_item(const void *argument, size_t tile, void *scratch) {
    const job *j = argument;
    const xq_matrix *m = j->m;
    const size_t n = (size_t)m->group;
    column *w = scratch, *e = w + m->cols, *wh = e + m->cols, *eh = wh + n;
    double total[LANES][3];
    memset(total, 0, sizeof total);
    xq_load(m, tile, 0, m->cols, w);
    load_errors(m, tile, e, wh);
    for (size_t first = 0; first < m->cols; first += n) {
        times_h(j, w, first, wh);
        times_h(j, e, first, eh);
        for (size_t k = 0; k < n; k++) {
            for (int l = 0; l < LANES; l++) {
                const double weight = w[first + k][l], error = e[first + k][l];
                total[l][0] += wh[k][l] * weight;
                total[l][1] += wh[k][l] * (weight - error);
                total[l][2] += eh[k][l] * error;
            }
        }
    }
    for (int l = 0; l < LANES && tile * LANES + (size_t)l < m->rows; l++)
        memcpy(j->moments + 3 * (tile * LANES + (size_t)l), total[l], sizeof total[l]);
}

int xq_moments(const xq_matrix *m, const float *panels, double *moments) {
    if (!xq_is_sane(m) || !moments) return XQ_ARGUMENT;
    const job j = {.m = m, .panels = panels, .moments = moments};
    return xq_run(moments_item, &j, xq_num_tiles(m), m->threads,
                  (2 * m->cols + 2 * (size_t)m->group) * sizeof(column));
}
