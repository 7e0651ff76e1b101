/* quantize_bytes.c: codes to MLX's stream of bits, and the search for NaN and infinity in raw tensors. */

#include <stdatomic.h>
#include <string.h>

#include "quantize_private.h"

typedef struct {
    const uint8_t *codes;
    size_t cols;
    int bits;
    uint32_t *packed;
} stream;

static void pack_row(const void *argument, size_t row, void *scratch) {
    const stream *s = argument;
    const uint8_t *codes = s->codes + row * s->cols;
    uint32_t *out = s->packed + row * (s->cols / 32 * (size_t)s->bits);
    uint64_t word = 0;
    int filled = 0;
    (void)scratch;
    for (size_t k = 0; k < s->cols; k++) {
        word |= (uint64_t)codes[k] << filled;
        filled += s->bits;
        if (filled < 32) continue;
        *out++ = (uint32_t)word;
        word >>= 32;
        filled -= 32;
    }
}

int xq_pack(const uint8_t *codes, size_t rows, size_t cols, int bits, int threads, uint32_t *packed) {
    if (!codes || !packed || cols % 32 || bits < 1 || bits > 8) return XQ_ARGUMENT;
    if (threads < 1 || threads > MAX_THREADS) return XQ_ARGUMENT;
    const stream s = {codes, cols, bits, packed};
    return xq_run(pack_row, &s, rows, threads, 0);
}

enum { PIECE = 1 << 16 }; /* numbers looked at together */

typedef struct {
    const uint8_t *numbers;
    size_t n;
    int dtype;
    atomic_size_t *found; /* the least index so far */
} search;

/* The first of n numbers whose exponent is all ones (of E4M3: all other bits too), or n. */
#define FIRST(name, type, mask)                                                    \
    WIDE static size_t name(const uint8_t *bytes, size_t n) {                      \
        type any = 0, numbers[256];                                                \
        for (size_t at = 0; at < n; at += 256) {                                   \
            const size_t m = n - at < 256 ? n - at : 256;                          \
            memcpy(numbers, bytes + at * sizeof(type), m * sizeof(type));          \
            for (size_t i = 0; i < m; i++) any |= (type)((numbers[i] & (mask)) == (mask)); \
            if (!any) continue;                                                    \
            for (size_t i = 0; i < m; i++)                                         \
                if ((numbers[i] & (mask)) == (mask)) return at + i;                \
        }                                                                          \
        return n;                                                                  \
    }

FIRST(first_f32, uint32_t, 0x7f800000u)
FIRST(first_bf16, uint16_t, 0x7f80u)
FIRST(first_f16, uint16_t, 0x7c00u)
FIRST(first_e4m3, uint8_t, 0x7fu)

static size_t bytes_of(int dtype) { return dtype == XQ_F32 ? 4 : dtype == XQ_F8_E4M3 ? 1 : 2; }

static void search_piece(const void *argument, size_t piece, void *scratch) {
    const search *s = argument;
    const size_t first = piece * PIECE, n = s->n - first < PIECE ? s->n - first : PIECE;
    const uint8_t *bytes = s->numbers + first * bytes_of(s->dtype);
    size_t at, least = atomic_load(s->found);
    (void)scratch;
    if (least < first) return;
    switch (s->dtype) {
    case XQ_F32: at = first_f32(bytes, n); break;
    case XQ_BF16: at = first_bf16(bytes, n); break;
    case XQ_F16: at = first_f16(bytes, n); break;
    default: at = first_e4m3(bytes, n); break;
    }
    if (at == n) return;
    while (first + at < least && !atomic_compare_exchange_weak(s->found, &least, first + at)) continue;
}

int xq_first_not_finite(const void *numbers, size_t n, int dtype, int threads, size_t *index) {
    if (!numbers || !index || threads < 1 || threads > MAX_THREADS) return XQ_ARGUMENT;
    if (dtype < XQ_F32 || dtype > XQ_F8_E4M3) return XQ_ARGUMENT;
    atomic_size_t found = n;
    const search s = {numbers, n, dtype, &found};
    const int result = xq_run(search_piece, &s, (n + PIECE - 1) / PIECE, threads, 0);
    *index = atomic_load(&found);
    return result;
}
