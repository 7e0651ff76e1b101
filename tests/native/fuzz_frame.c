/* fuzz_frame.c: nothing that a stranger sends may do more than end the connection.
 *
 * The input goes to xd_frame_read, and through a socket to a connection. Checksums would stop nearly every mutation at the
 * door, so when the first byte is odd they are set right first, as a hostile peer would set them; the rest stays as it is.
 * `make fuzz` builds this with libFuzzer. Where the compiler has none, RANDOM_INPUTS gives a main() that mutates valid frames,
 * with a fixed seed, for as many seconds as its argument says. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connection.h"

enum { EPOCH = 7, MAX_INPUT = 16 << 10 }; /* bytes; a socket pair takes that at once */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(what) \
    if (!(what)) abort()

/* Set the checksums of the frames that these bytes could be; their length says where the next begins. */
static void repair(uint8_t *bytes, size_t n) {
    while (n >= XD_HEADER_BYTES) {
        xd_header h;
        memcpy(&h, bytes, sizeof h);
        size_t rest = n - XD_HEADER_BYTES, length = h.length < rest ? h.length : rest;
        h.payload_crc = xd_crc32c(0, bytes + XD_HEADER_BYTES, length);
        h.header_crc = xd_crc32c(0, &h, offsetof(xd_header, header_crc));
        memcpy(bytes, &h, sizeof h);
        bytes += XD_HEADER_BYTES + length;
        n = rest - length;
    }
}

/* Send it all, in two pieces, and go; take what is taken for frames, with frames of our own between. */
static void through_connection(const uint8_t *bytes, size_t n, size_t cut) {
    int fds[2];
    char err[256];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    xd_connection *c = xd_tcp_open(fds[0], EPOCH, err, sizeof err);
    MUST(c);
    MUST(write(fds[1], bytes, cut) == (ssize_t)cut);
    xd_header h;
    const void *payload;
    uint8_t sum = 0;
    int code;
    while ((code = xd_receive(c, &h, &payload)) == XD_OK || code == XD_AGAIN) { /* the end of the stream ends it */
        if (code == XD_OK) {
            MUST(h.length <= xd_max_payload(c, h.queue));
            for (size_t i = 0; i < h.length; i++) sum ^= ((const uint8_t *)payload)[i];
            int sent = xd_send(c, &(xd_header){.kind = XD_BEAT, .queue = sum & 1, .length = 1}, &sum);
            MUST(sent == XD_OK || sent == XD_AGAIN);
        } else if (fds[1] >= 0) {
            MUST(write(fds[1], bytes + cut, n - cut) == (ssize_t)(n - cut));
            close(fds[1]);
            fds[1] = -1;
        }
    }
    MUST(xd_connection_failure(c, err, sizeof err) == code && err[0]);
    MUST(xd_receive(c, &h, &payload) == code);
    if (fds[1] >= 0) close(fds[1]);
    xd_connection_close(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 3 || size > MAX_INPUT) return 0;
    size_t n = size - 3, cut = (data[1] | (size_t)data[2] << 8) % (n + 1);
    uint8_t *bytes = malloc(n ? n : 1); /* exactly as large: the sanitizer sees the byte behind it */
    MUST(bytes);
    memcpy(bytes, data + 3, n);
    if (data[0] & 1) repair(bytes, n);
    xd_header h;
    char err[200] = "";
    int code = xd_frame_read(bytes, n, EPOCH, 4096, &h, err, sizeof err);
    MUST(code == XD_OK || code == XD_AGAIN || (code == XD_CORRUPT && err[0]));
    MUST(code != XD_OK || (h.length <= 4096 && XD_HEADER_BYTES + h.length <= n && h.epoch == EPOCH));
    through_connection(bytes, n, cut);
    free(bytes);
    return 0;
}

#ifdef RANDOM_INPUTS

static uint32_t next(void) {
    static uint32_t x = 2463534242u;
    x ^= x << 13, x ^= x >> 17, x ^= x << 5;
    return x;
}

/* One to six frames that follow each other as they should. */
static size_t valid(uint8_t *out) {
    static uint8_t payload[1024];
    size_t n = 0;
    uint64_t sequence[XD_NUM_QUEUES] = {0};
    for (uint32_t left = 1 + next() % 6; left; left--) {
        xd_header h = {.kind = (uint8_t)(XD_ROUND + next() % 5), .queue = next() & 1, .tag = next()};
        h.length = h.kind == XD_CREDIT ? 0 : next() % sizeof payload;
        h.total = h.length;
        h.sequence = ++sequence[h.queue];
        for (uint32_t i = 0; i < h.length; i++) payload[i] = (uint8_t)next();
        xd_frame_seal(&h, EPOCH, payload);
        memcpy(out + n, &h, sizeof h);
        memcpy(out + n + sizeof h, payload, h.length);
        n += sizeof h + h.length;
    }
    return n;
}

static void mutate(uint8_t *bytes, size_t n) {
    for (uint32_t left = next() % 4; left; left--) {
        size_t at = next() % 3 ? next() % XD_HEADER_BYTES : next() % n; /* headers are where decisions are made */
        if (next() & 1)
            bytes[at] = (uint8_t)next();
        else
            bytes[at] ^= (uint8_t)(1u << next() % 8);
    }
}

int main(int argc, char **argv) {
    static uint8_t input[MAX_INPUT];
    uint64_t end_ns = xd_now_ns() + (uint64_t)((argc > 1 ? atof(argv[1]) : 2) * 1e9);
    unsigned long count = 0;
    for (; xd_now_ns() < end_ns; count++) {
        input[0] = (uint8_t)next(), input[1] = (uint8_t)next(), input[2] = (uint8_t)next();
        size_t n = valid(input + 3);
        mutate(input + 3, n);
        if (next() % 4 == 0) n = next() % (n + 1);
        LLVMFuzzerTestOneInput(input, n + 3);
    }
    printf("ok: %lu inputs\n", count);
    return 0;
}
#endif
