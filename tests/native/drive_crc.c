/* drive_crc.c: the processor's CRC32C beside the table's, for sizes and alignments around every length of its lanes. */

#include <stdint.h>
#include <stdio.h>

#include "connection.h"

enum { LARGEST = 40000, NUM_SMALL = 800, STRIDE = 331, NUM_ALIGNMENTS = 17 };

static unsigned char bytes[LARGEST + NUM_ALIGNMENTS];

static int differs(uint32_t start, size_t size) {
    const unsigned char *at = bytes + size % NUM_ALIGNMENTS;
    return xd_crc32c(start, at, size) != xd_crc32c_table(start, at, size);
}

int main(void) {
    uint32_t x = 1;
    for (size_t i = 0; i < sizeof bytes; i++) {
        x = x * 1664525u + 1013904223u;
        bytes[i] = (unsigned char)(x >> 24);
    }
    int num_different = 0;
    for (size_t size = 0; size < NUM_SMALL; size++) num_different += differs((uint32_t)size, size);
    for (size_t size = NUM_SMALL; size <= LARGEST; size += STRIDE) num_different += differs((uint32_t)size, size);
    /* The check value of the catalogue of parametrised CRC algorithms. */
    if (num_different || xd_crc32c(0, "123456789", 9) != 0xe3069283u) {
        fprintf(stderr, "%d sizes differ\n", num_different);
        return 1;
    }
    puts("ok");
    return 0;
}
