/* The quantizer's kernels on odd numbers of rows, checked for order of error, equal bytes for one thread and for
 * three, and refusals. Prints a digest of all they wrote, which is the same on every processor. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantize_private.h"

#define CHECK(condition)                                        \
    do {                                                        \
        if (!(condition)) {                                     \
            printf("line %d: %s\n", __LINE__, #condition);      \
            exit(1);                                            \
        }                                                       \
    } while (0)

enum { NUM_ROWS = 37, NUM_COLS = 256 };

static float w[NUM_ROWS * NUM_COLS], hessian[NUM_COLS * NUM_COLS], feedback[NUM_COLS * NUM_COLS], weight[NUM_COLS];
static double reversed[NUM_COLS * NUM_COLS];
static uint64_t digest = 14695981039346656037u;

static void add(const void *bytes, size_t n) {
    const uint8_t *p = bytes;
    for (size_t i = 0; i < n; i++) digest = (digest ^ p[i]) * 1099511628211u;
}

/* About normal: the sum of four uniform numbers. */
static float draw(void) {
    static uint64_t state = 1;
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(state >> 40) / 16777216.0f - 0.5f;
    }
    return sum;
}

/* Second moments of 600 inputs, each entry correlated with the one before it. */
static void fill(void) {
    static float x[NUM_COLS];
    for (int i = 0; i < NUM_ROWS * NUM_COLS; i++) w[i] = 0.05f * draw();
    for (int n = 0; n < 600; n++) {
        for (int k = 0; k < NUM_COLS; k++) x[k] = draw() + (k ? 0.8f * x[k - 1] : 0.0f);
        for (int k = 0; k < NUM_COLS; k++)
            for (int i = 0; i < NUM_COLS; i++) hessian[k * NUM_COLS + i] += x[k] * x[i] / 600.0f;
    }
    for (int k = 0; k < NUM_COLS; k++) {
        for (int i = 0; i < NUM_COLS; i++)
            reversed[k * NUM_COLS + i] = hessian[(NUM_COLS - 1 - k) * NUM_COLS + (NUM_COLS - 1 - i)];
        reversed[k * NUM_COLS + k] += 0.01;
    }
}

/* Panels of a matrix, one group's columns after the other. */
static const float *panels_of(const float *matrix, int group) {
    static float panels[NUM_COLS * NUM_COLS];
    float *out = panels;
    for (int first = 0; first < NUM_COLS; first += group)
        for (int j = 0; j < NUM_COLS; j++, out += group)
            memcpy(out, matrix + j * NUM_COLS + first, (size_t)group * sizeof *out);
    return panels;
}

static double error_of(const xq_matrix *m) {
    double moments[NUM_ROWS][3], sum = 0;
    CHECK(xq_moments(m, panels_of(hessian, m->group), moments[0]) == XQ_OK);
    for (int row = 0; row < NUM_ROWS; row++) sum += moments[row][2];
    return sum;
}

static void add_matrix(const xq_matrix *m) {
    const size_t num_groups = m->rows * m->cols / (size_t)m->group;
    add(m->codes, m->rows * m->cols);
    add(m->scales, num_groups * sizeof(float));
    add(m->biases, num_groups * sizeof(float));
}

static void run(int bits, int group, int dtype, int threads) {
    static uint8_t codes[NUM_ROWS * NUM_COLS];
    static float scales[NUM_ROWS * NUM_COLS / 32], biases[NUM_ROWS * NUM_COLS / 32], gain[NUM_ROWS];
    static uint32_t packed[NUM_ROWS * NUM_COLS / 4];
    const xq_matrix m = {w, NUM_ROWS, NUM_COLS, bits, group, dtype, threads, codes, scales, biases};
    for (int row = 0; row < NUM_ROWS; row++) gain[row] = 1.0f + 0.01f * (float)row;
    CHECK(xq_fit(&m, NULL) == XQ_OK);
    add_matrix(&m);
    const double fitted = error_of(&m);
    CHECK(xq_gptq(&m, panels_of(feedback, group), weight) == XQ_OK);
    add_matrix(&m);
    const double fed_back = error_of(&m);
    CHECK(fed_back < fitted);
    CHECK(xq_refine(&m, panels_of(hessian, group), 4) == XQ_OK);
    CHECK(error_of(&m) < fed_back);
    CHECK(xq_rescale(&m, gain, 0) == XQ_OK);
    CHECK(xq_pack(codes, NUM_ROWS, NUM_COLS, bits, threads, packed) == XQ_OK);
    add_matrix(&m);
    add(packed, (size_t)(NUM_ROWS * NUM_COLS / 32 * bits) * sizeof *packed);
}

static void check_refusals(void) {
    uint8_t codes[64];
    float grid[2];
    size_t index = 0;
    const xq_matrix good = {w, 1, 64, 2, 64, XQ_BF16, 1, codes, grid, grid + 1};
    xq_matrix bad[6] = {good, good, good, good, good, good};
    bad[0].bits = 7;
    bad[1].group = 48;
    bad[2].cols = 65;
    bad[3].threads = 0;
    bad[4].w = NULL;
    bad[5].dtype = XQ_F8_E4M3;
    CHECK(xq_fit(&good, NULL) == XQ_OK);
    for (int i = 0; i < 6; i++) CHECK(xq_fit(&bad[i], NULL) == XQ_ARGUMENT);
    CHECK(xq_gptq(&good, NULL, weight) == XQ_ARGUMENT);
    CHECK(xq_refine(&good, hessian, -1) == XQ_ARGUMENT);
    CHECK(xq_pack(codes, 1, 33, 2, 1, (uint32_t *)grid) == XQ_ARGUMENT);
    CHECK(xq_first_not_finite(w, 1, 9, 1, &index) == XQ_ARGUMENT);
    double not_positive[4] = {1, 2, 2, 1};
    CHECK(xq_factor(not_positive, 2, 1, feedback, weight) == XQ_NOT_POSITIVE);
}

static void check_numbers(void) {
    static uint16_t numbers[70001];
    size_t index = 0;
    CHECK(xq_first_not_finite(numbers, 70001, XQ_BF16, 2, &index) == XQ_OK && index == 70001);
    numbers[70000] = 0xff80u;
    CHECK(xq_first_not_finite(numbers, 70001, XQ_BF16, 2, &index) == XQ_OK && index == 70000);
    CHECK(xq_first_not_finite((const uint8_t *)numbers + 1, 69999, XQ_BF16, 2, &index) == XQ_OK && index == 69999);
}

int main(void) {
    static const int formats[][3] = {{2, 64, XQ_BF16}, {2, 128, XQ_F16}, {3, 32, XQ_F32}, {8, 64, XQ_BF16}};
    uint64_t digests[2];
    fill();
    CHECK(xq_factor(reversed, NUM_COLS, 3, feedback, weight) == XQ_OK);
    const uint64_t empty = digest;
    for (int which = 0; which < 2; which++) {
        digest = empty;
        add(feedback, sizeof feedback);
        for (int i = 0; i < 4; i++) run(formats[i][0], formats[i][1], formats[i][2], which ? 3 : 1);
        digests[which] = digest;
    }
    CHECK(digests[0] == digests[1]);
    check_refusals();
    check_numbers();
    printf("ok %016llx\n", (unsigned long long)digest);
    return 0;
}
