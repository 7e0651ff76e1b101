/* Affine products of every format in odd sizes, in buffers without a byte to spare. Each instruction set that runs
 * here must give the bits of the portable twin; a row must give the same bits alone, among others, and with three
 * threads. Prints a digest of all results, which is the same on every processor. With an argument it only names the
 * instruction sets. */

#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "private.h"

#define CHECK(condition)                                                                         \
    do {                                                                                         \
        if (!(condition)) {                                                                      \
            printf("line %d: %s (%s)\n", __LINE__, #condition, doing);                           \
            exit(1);                                                                             \
        }                                                                                        \
    } while (0)

enum { MAX_ISAS = 8, NUM_EXPERTS = 3 };

static char doing[160];
static uint64_t digest = 14695981039346656037u, state = 1;
static xd_cpu *cpus[MAX_ISAS][2]; /* with one thread, with three; the last is the portable twin */
static int num_isas;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static float uniform(void) {
    return (float)(random_bits() >> 8) / 8388608.0f - 1.0f;
}

/* `bytes` of heap that end where the block ends, and begin `offset` after an alignment of 64. */
typedef struct {
    char *block, *at;
    size_t bytes;
} buffer;

static buffer allocate(size_t bytes, size_t offset) {
    buffer b = {NULL, NULL, bytes};
    void *block = NULL;
    CHECK(posix_memalign(&block, 64, bytes + offset) == 0);
    b.block = block, b.at = b.block + offset;
    memset(b.at, 0xa5, bytes);
    return b;
}

/* Floats in a format, as aligned as one of them: MLX gives slices of arrays. */
static buffer numbers_of(const float *from, int dtype, size_t n) {
    const size_t size = xd_itemsize(dtype);
    buffer b = allocate(n * size, size);
    xd_narrow(from, dtype, b.at, (int64_t)n);
    return b;
}

static uint32_t bits_of(float f) { /* NaNs differ among processors */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return f != f ? 0x7fc00000 : bits;
}

static int are_same(const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (bits_of(a[i]) != bits_of(b[i])) {
            printf("%lld: %a %a\n", (long long)i, (double)a[i], (double)b[i]);
            return 0;
        }
    return 1;
}

/* A row of one of eight kinds, or of tiny equal numbers. Some groups of a row are small or zero beside others. */
enum { KINDS = 8, TINY = 8 };

static void fill_row(float *x, int width, int kind) {
    if (kind == TINY) {
        for (int k = 0; k < width; k++) x[k] = 1e-28f;
        return;
    }
    const float sizes[KINDS] = {1, 1, 1e-25f, 0, 1, 1e-31f, 1e30f, 1};
    for (int k = 0; k < width; k++) x[k] = uniform() * sizes[kind] * (k / 32 % 5 == 3 ? 0.001f : 1);
    if (kind == 1) memset(x, 0, (size_t)width / 2 * 4);
    if (kind == 4) x[random_bits() % (uint32_t)width] = NAN;
    if (kind == 7) x[random_bits() % (uint32_t)width] = -INFINITY;
    if (kind == 2) x[0] = -0.0f;
}

/* Scales or biases. Every eleventh row of weights is tiny, so that its products lie below what float32 holds. */
static buffer scales_of(int dtype, int64_t rows, int groups, float size) {
    float *all = malloc((size_t)(rows * groups) * 4);
    for (int64_t i = 0; i < rows * groups; i++) all[i] = uniform() * size * (i / groups % 11 == 10 ? 1e-25f : 1);
    buffer b = numbers_of(all, dtype, (size_t)(rows * groups));
    free(all);
    return b;
}

typedef struct {
    xd_affine a;
    int num_out;
    buffer codes, scales, biases;
} weight;

static weight weight_of(int bits, int group_size, int activation_bits, int groups, int dtype, int num_out, int experts) {
    const int64_t rows = (int64_t)num_out * experts;
    weight w = {.num_out = num_out};
    w.a = (xd_affine){.bits = bits, .group_size = group_size, .dtype = dtype, .two_digits = activation_bits == 16};
    w.a.groups = groups, w.a.width = groups * group_size, w.a.padded_groups = (int)xd_round_up(groups, XD_LANES);
    w.a.code_bytes = (int64_t)w.a.width * bits / 8;
    w.a.q_bytes = (int64_t)w.a.padded_groups * group_size * (bits == 8 || w.a.two_digits ? 2 : 1);
    w.codes = allocate((size_t)(rows * w.a.code_bytes), 4);
    for (size_t i = 0; i < w.codes.bytes; i++) w.codes.at[i] = (char)(i % 7 ? random_bits() : 0xff);
    w.scales = scales_of(dtype, rows, groups, 0.1f);
    w.biases = scales_of(dtype, rows, groups, 0.2f);
    return w;
}

static void free_weight(const weight *w) {
    free(w->codes.block), free(w->scales.block), free(w->biases.block);
}

/* The functions of an instruction set, one by one. */

typedef struct {
    buffer q, d, da;
} rounded;

static rounded round_one(const xd_isa *isa, const xd_affine *a, const float *x) {
    const size_t groups = (size_t)a->padded_groups;
    rounded r = {allocate((size_t)a->q_bytes, 0), allocate(groups * 4, 0), allocate(groups * 4, 0)};
    buffer numbers = allocate(groups * (size_t)a->group_size * 2, 0);
    isa->round_row(a, x, (int16_t *)numbers.at, (int8_t *)r.q.at, (float *)r.d.at, (float *)r.da.at);
    free(numbers.block);
    return r;
}

static xd_row row_of(const rounded *r) {
    return (xd_row){(const int8_t *)r->q.at, (const float *)r->d.at, (const float *)r->da.at};
}

static void check_rounding(const xd_isa *isa, const xd_affine *a, const float *x, const rounded *expected) {
    rounded r = round_one(isa, a, x);
    CHECK(memcmp(r.q.at, expected->q.at, r.q.bytes) == 0);
    CHECK(are_same((float *)r.d.at, (float *)expected->d.at, a->padded_groups));
    CHECK(are_same((float *)r.da.at, (float *)expected->da.at, a->padded_groups));
    free(r.q.block), free(r.d.block), free(r.da.block);
}

static void check_few(const xd_isa *isa, const weight *w, const xd_row rows[XD_TILE_ROWS], const float *expected) {
    const size_t num_out = (size_t)w->num_out;
    for (int out = 0; isa->affine_few && out < w->num_out; out += XD_FEW_OUT) {
        const int n = w->num_out - out < XD_FEW_OUT ? w->num_out - out : XD_FEW_OUT;
        const size_t at = (size_t)out * (size_t)w->a.groups * xd_itemsize(w->a.dtype);
        const uint8_t *codes = (uint8_t *)w->codes.at + out * w->a.code_bytes;
        for (int num = 1; num <= XD_TILE_ROWS; num++) {
            float y[XD_TILE_ROWS][XD_TILE_OUT];
            isa->affine_few(&w->a, codes, w->scales.at + at, w->biases.at + at, n, rows, num, y);
            for (int r = 0; r < num; r++) CHECK(are_same(y[r], expected + (size_t)r * num_out + out, n));
        }
    }
}

static void check_isa(const xd_isa *isa, const weight *w, const xd_row rows[XD_TILE_ROWS], const float *expected) {
    const size_t num_out = (size_t)w->num_out;
    buffer y = allocate(num_out * 4, 4), panel = allocate((size_t)xd_panel_bytes(&w->a), 0);
    for (int r = 0; r < XD_TILE_ROWS; r++) {
        isa->affine_rows(&w->a, (uint8_t *)w->codes.at, w->scales.at, w->biases.at, w->num_out, &rows[r], (float *)y.at);
        CHECK(are_same((float *)y.at, expected + (size_t)r * num_out, w->num_out));
    }
    check_few(isa, w, rows, expected);
    for (int out = 0; out < w->num_out; out += XD_TILE_OUT) {
        const int n = w->num_out - out < XD_TILE_OUT ? w->num_out - out : XD_TILE_OUT;
        const size_t at = (size_t)out * (size_t)w->a.groups * xd_itemsize(w->a.dtype);
        float tile[XD_TILE_ROWS][XD_TILE_OUT];
        isa->affine_pack(&w->a, (uint8_t *)w->codes.at + out * w->a.code_bytes, w->scales.at + at, w->biases.at + at, n,
                         panel.at);
        for (int num = 1; num <= XD_TILE_ROWS; num++) {
            isa->affine_tile(&w->a, panel.at, rows, num, tile);
            for (int r = 0; r < num; r++) CHECK(are_same(tile[r], expected + (size_t)r * num_out + out, n));
        }
    }
    free(y.block), free(panel.block);
}

/* Rows from a kind on; gives the last result of the portable twin. */
static float check_functions(const weight *w, int kind) {
    const xd_isa *twin = xd_isa_portable();
    const size_t width = (size_t)w->a.width, num_out = (size_t)w->num_out;
    float *expected = malloc(XD_TILE_ROWS * num_out * 4);
    buffer x[XD_TILE_ROWS];
    rounded r[XD_TILE_ROWS];
    xd_row rows[XD_TILE_ROWS];
    for (int i = 0; i < XD_TILE_ROWS; i++) {
        x[i] = allocate(width * 4, 0);
        fill_row((float *)x[i].at, w->a.width, kind == TINY ? TINY : (i + kind) % KINDS);
        r[i] = round_one(twin, &w->a, (float *)x[i].at);
        rows[i] = row_of(&r[i]);
        twin->affine_rows(&w->a, (uint8_t *)w->codes.at, w->scales.at, w->biases.at, w->num_out, &rows[i],
                          expected + (size_t)i * num_out);
    }
    for (int isa = 0; isa < num_isas; isa++) {
        for (int i = 0; i < XD_TILE_ROWS; i++)
            check_rounding(cpus[isa][0]->isa, &w->a, (float *)x[i].at, &r[i]);
        check_isa(cpus[isa][0]->isa, w, rows, expected);
    }
    for (int i = 0; i < XD_TILE_ROWS; i++) free(x[i].block), free(r[i].q.block), free(r[i].d.block), free(r[i].da.block);
    const float last = expected[XD_TILE_ROWS * num_out - 1];
    free(expected);
    return last;
}

static void fill_bf16(const buffer *b, float with) {
    const uint16_t number = xd_to_bf16(with);
    for (size_t i = 0; i < b->bytes; i += 2) memcpy(b->at + i, &number, 2);
}

/* Each group gives less than half of the smallest float32 below 0, which is -0; so must eight lanes of them, though of 11
   groups five lanes have one less than the others. */
static void check_negative_zero(int bits, int group_size, int activation_bits) {
    weight w = weight_of(bits, group_size, activation_bits, 11, XD_BFLOAT16, 3, 1);
    memset(w.codes.at, 0, w.codes.bytes);
    fill_bf16(&w.scales, 0.1f), fill_bf16(&w.biases, -1e-20f);
    const float y = check_functions(&w, TINY);
    CHECK(y == 0 && signbit(y));
    free_weight(&w);
}

/* Whole products. */

/* The results, as float32. */
static float *run(xd_cpu *cpu, xd_product p) {
    const int64_t n = p.num_rows * p.ids_per_row * p.weight.num_out;
    buffer scratch = allocate(xd_product_scratch(cpu, &p), 0);
    buffer y = allocate((size_t)n * xd_itemsize(p.y_dtype), xd_itemsize(p.y_dtype));
    float *all = malloc((size_t)n * 4 + 4);
    p.scratch = scratch.at, p.y = y.at;
    xd_product_run(cpu, &p);
    xd_widen(y.at, p.y_dtype, all, n);
    free(scratch.block), free(y.block);
    return all;
}

static void check_rows_alone(const xd_product *p, const float *expected) {
    for (int64_t r = 0; r < p->num_rows; r++) {
        xd_product one = *p;
        one.num_rows = 1;
        one.x = (const char *)p->x + (size_t)r * (size_t)p->weight.width * xd_itemsize(p->x_dtype);
        if (p->ids) one.ids = p->ids + r * p->ids_per_row;
        float *y = run(cpus[0][0], one);
        CHECK(are_same(y, expected + r * p->ids_per_row * p->weight.num_out, p->ids_per_row * p->weight.num_out));
        free(y);
    }
}

static void check_product(const xd_product *p) {
    const int64_t n = p->num_rows * p->ids_per_row * p->weight.num_out;
    float *expected = run(cpus[num_isas - 1][0], *p);
    for (int64_t i = 0; i < n; i++) digest = (digest ^ bits_of(expected[i])) * 1099511628211u;
    for (int isa = 0; isa < num_isas; isa++)
        for (int threads = isa == num_isas - 1; threads < 2; threads++) {
            float *y = run(cpus[isa][threads], *p);
            CHECK(are_same(y, expected, n));
            free(y);
        }
    check_rows_alone(p, expected);
    for (int64_t i = 0; p->ids && i < p->num_rows * p->ids_per_row; i++)
        CHECK(p->ids[i] < NUM_EXPERTS || expected[i * p->weight.num_out] != expected[i * p->weight.num_out]);
    free(expected);
}

/* `order` 0: no ids; 1: sorted; 2: as they come, some of no expert. */
static buffer ids_of(int64_t n, int order) {
    buffer b = allocate((size_t)n * 4, 4);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t wild = random_bits() % 2 ? NUM_EXPERTS : UINT32_MAX, drawn = random_bits() % 16;
        const uint32_t id = order == 1 ? (uint32_t)(i * NUM_EXPERTS / n) : drawn == 0 ? wild : drawn % NUM_EXPERTS;
        memcpy(b.at + 4 * i, &id, 4);
    }
    return b;
}

static void check_products(const weight *w, int activation_bits, int num_rows, int salt) {
    const int order = salt % 3, per_row = order ? 1 + salt / 3 % 2 : 1, x_dtype = salt / 6 % 3;
    float *all = malloc((size_t)num_rows * (size_t)w->a.width * 4 + 4);
    for (int r = 0; r < num_rows; r++) fill_row(all + (int64_t)r * w->a.width, w->a.width, (r + salt) % KINDS);
    buffer x = numbers_of(all, x_dtype, (size_t)num_rows * (size_t)w->a.width);
    buffer ids = ids_of((int64_t)num_rows * per_row, order);
    xd_product p = {.x = x.at, .num_rows = num_rows, .x_dtype = x_dtype, .y_dtype = salt / 18 % 3};
    p.weight = (xd_weight){w->codes.at, w->scales.at, w->biases.at, w->a.dtype, w->a.bits, w->a.group_size,
                           NUM_EXPERTS, w->num_out, w->a.width};
    p.ids = order ? (const uint32_t *)(void *)ids.at : NULL;
    p.ids_per_row = per_row, p.activation_bits = activation_bits;
    check_product(&p);
    free(all), free(x.block), free(ids.block);
}

static void check_format(int bits, int group_size, int activation_bits) {
    static const int groups[] = {1, 3, 8, 11, 12}, outs[] = {1, 7, 33}, rows[] = {0, 1, 3, 4, 5, 13};
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 3; j++) {
            const int dtype = (int)(random_bits() % 3);
            weight w = weight_of(bits, group_size, activation_bits, groups[i], dtype, outs[j], NUM_EXPERTS);
            snprintf(doing, sizeof doing, "%d bits, group %d, activations %d, %d groups, %d out, dtype %d", bits,
                     group_size, activation_bits, groups[i], outs[j], dtype);
            check_functions(&w, (int)(random_bits() % KINDS));
            for (int k = (i + j) % 2; k < 6; k += 2) /* half of them: QEMU takes five seconds for these */
                check_products(&w, activation_bits, rows[k], (int)(random_bits() >> 8));
            free_weight(&w);
        }
    check_negative_zero(bits, group_size, activation_bits);
}

/* The format that AVX2 has a loop of its own for, in sizes that this takes: 8 weight rows and more of 8 groups and more, with and
   without half of 8 groups at their end. The last are longer than it takes. */
static void check_two_bits(void) {
    static const int groups[] = {8, 12, 24, 28, 260}, outs[] = {8, 19};
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 2; j++) {
            weight w = weight_of(2, 64, 8, groups[i], XD_BFLOAT16, outs[j], 1);
            snprintf(doing, sizeof doing, "2 bits by themselves, %d groups, %d out", groups[i], outs[j]);
            for (int kind = 0; kind < KINDS; kind += XD_TILE_ROWS) check_functions(&w, kind);
            free_weight(&w);
        }
}

static void check_refusals(void) {
    char err[200] = "";
    xd_cpu *cpu;
    CHECK(xd_cpu_open(&cpu, "sse9", 1, err, sizeof err) == -1 && !cpu && strstr(err, "sse9") && strstr(err, "portable"));
    CHECK(xd_cpu_open(&cpu, "", 0, err, sizeof err) == -1 && !cpu && strstr(err, "0 threads"));
    CHECK(xd_cpu_open(&cpu, "", 257, err, sizeof err) == -1 && !cpu && strstr(err, "257 threads"));
    xd_cpu_close(NULL);
}

/* One cpu of each instruction set for one and for three threads, the portable twin last as xd_cpu_isas() has it. */
static void open_all(void) {
    char names[64], err[200];
    snprintf(names, sizeof names, "%s", xd_cpu_isas());
    for (char *name = strtok(names, " "); name; name = strtok(NULL, " "), num_isas++)
        for (int i = 0; i < 2; i++) CHECK(xd_cpu_open(&cpus[num_isas][i], name, i ? 3 : 1, err, sizeof err) == 0);
    CHECK(strcmp(xd_cpu_isa(cpus[num_isas - 1][0]), "portable") == 0);
    CHECK(xd_cpu_num_threads(cpus[0][1]) == 3);
}

int main(int argc, char **argv) {
    static const int bits[] = {2, 4, 8}, group_sizes[] = {32, 64, 128};
    (void)argv;
    puts(xd_cpu_isas());
    if (argc > 1) return 0;
    open_all();
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            for (int activation_bits = 8; activation_bits <= 16; activation_bits += 8)
                check_format(bits[i], group_sizes[j], activation_bits);
    check_two_bits();
    check_refusals();
    for (int i = 0; i < num_isas; i++) xd_cpu_close(cpus[i][0]), xd_cpu_close(cpus[i][1]);
    printf("ok %016llx\n", (unsigned long long)digest);
    return 0;
}
