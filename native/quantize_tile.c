/* quantize_tile.c: tiles of rows, rounding to the stored dtype, and threads that share out items of work.
 *
 * Threads take the next item by a counter. An item's result depends on nothing but the item, so neither their number
 * nor their order shows. A thread that cannot be started or finds no memory is missed by nobody: the others take its
 * items, and the caller's own is always among them. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "quantize_private.h"

bool xq_is_sane(const xq_matrix *m) {
    if (!m || !m->w || !m->codes || !m->scales || !m->biases) return false;
    if (m->bits < 2 || m->bits > 8 || m->bits == 7) return false;
    if (m->group != 32 && m->group != 64 && m->group != 128) return false;
    if (m->dtype != XQ_F32 && m->dtype != XQ_BF16 && m->dtype != XQ_F16) return false;
    return m->cols % (size_t)m->group == 0 && m->threads >= 1 && m->threads <= MAX_THREADS;
}

size_t xq_num_tiles(const xq_matrix *m) { return (m->rows + LANES - 1) / LANES; }

typedef struct {
    xq_work work;
    const void *job;
    size_t num_items, scratch_bytes;
    atomic_size_t next;
} shared;

static int take_items(shared *s) {
    void *scratch = calloc(1, s->scratch_bytes ? s->scratch_bytes : 1);
    if (!scratch) return XQ_MEMORY;
    for (;;) {
        size_t item = atomic_fetch_add(&s->next, 1);
        if (item >= s->num_items) break;
        s->work(s->job, item, scratch);
    }
    free(scratch);
    return XQ_OK;
}

static void *thread_main(void *argument) {
    (void)take_items(argument);
    return NULL;
}

int xq_run(xq_work work, const void *job, size_t num_items, int threads, size_t scratch_bytes) {
    shared s = {work, job, num_items, scratch_bytes, 0};
    pthread_t others[MAX_THREADS];
    int num_others = 0, result;
    while (num_others < threads - 1 && (size_t)num_others + 1 < num_items) {
        if (pthread_create(&others[num_others], NULL, thread_main, &s)) break;
        num_others++;
    }
    result = take_items(&s);
    for (int i = 0; i < num_others; i++) (void)pthread_join(others[i], NULL);
    /* Without the caller's own scratch the others may still have done it all. */
    return atomic_load(&s.next) >= num_items ? XQ_OK : result;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float round_bf16(float x) {
    const uint32_t largest = 0x7f7f0000u;
    uint32_t bits = bits_of(x), sign = bits & 0x80000000u;
    bits &= 0x7fffffffu;
    bits = (bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u;
    return of_bits(sign | (bits > largest ? largest : bits));
}

static float round_f16(float x) {
    const float largest = 65504.0f, smallest_normal = 0x1p-14f;
    float size = x < 0 ? -x : x;
    if (size < smallest_normal) {
        size = (size + 0.75f) - 0.75f; /* floats from 0.5 to 1 are 2^-24 apart, as subnormal halves are */
    } else {
        uint32_t bits = bits_of(size);
        size = of_bits((bits + 0xfffu + ((bits >> 13) & 1)) & 0xffffe000u);
    }
    if (size > largest) size = largest;
    return x < 0 ? -size : size;
}

float xq_round(float x, int dtype) {
    if (dtype == XQ_BF16) return round_bf16(x);
    return dtype == XQ_F16 ? round_f16(x) : x;
}

float xq_neighbour(float x, int dtype, int away) {
    if (dtype == XQ_F32 || x == 0) return x;
    uint32_t step = dtype == XQ_BF16 ? 0x10000u : 0x2000u;
    return xq_round(of_bits(away ? bits_of(x) + step : bits_of(x) - step), dtype);
}

/* The row of a lane; the last row for the lanes beyond it. */
static size_t row_of(const xq_matrix *m, size_t tile, int lane) {
    size_t row = tile * LANES + (size_t)lane;
    return row < m->rows ? row : m->rows - 1;
}

static int num_rows(const xq_matrix *m, size_t tile) {
    size_t left = m->rows - tile * LANES;
    return left < LANES ? (int)left : LANES;
}

void xq_load(const xq_matrix *m, size_t tile, size_t first, size_t n, column *out) {
    for (int lane = 0; lane < LANES; lane++) {
        const float *row = m->w + row_of(m, tile, lane) * m->cols + first;
        for (size_t k = 0; k < n; k++) out[k][lane] = row[k];
    }
}

void xq_load_codes(const xq_matrix *m, size_t tile, size_t first, size_t n, column *out) {
    for (int lane = 0; lane < LANES; lane++) {
        const uint8_t *row = m->codes + row_of(m, tile, lane) * m->cols + first;
        for (size_t k = 0; k < n; k++) out[k][lane] = row[k];
    }
}

void xq_load_grid(const xq_matrix *m, size_t tile, size_t group, grid *out) {
    size_t num_groups = m->cols / (size_t)m->group;
    for (int lane = 0; lane < LANES; lane++) {
        size_t at = row_of(m, tile, lane) * num_groups + group;
        out->scale[lane] = m->scales[at];
        out->bias[lane] = m->biases[at];
    }
}

void xq_store_grid(const xq_matrix *m, size_t tile, size_t group, const grid *g) {
    size_t num_groups = m->cols / (size_t)m->group;
    for (int lane = 0; lane < num_rows(m, tile); lane++) {
        size_t at = (tile * LANES + (size_t)lane) * num_groups + group;
        m->scales[at] = g->scale[lane];
        m->biases[at] = g->bias[lane];
    }
}

void xq_store_codes(const xq_matrix *m, size_t tile, size_t first, size_t n, const column *codes) {
    for (int lane = 0; lane < num_rows(m, tile); lane++) {
        uint8_t *row = m->codes + (tile * LANES + (size_t)lane) * m->cols + first;
        for (size_t k = 0; k < n; k++) row[k] = (uint8_t)codes[k][lane];
    }
}
