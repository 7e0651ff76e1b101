/* drive.c: a connection under the sanitizers. Two threads over a socket pair: random traffic on both queues, swaps and
 * self-tests, then a peer that goes in mid-frame, over and over. Says "ok" and gives 0. */

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connection.h"

#define CHECK(what)                                                              \
    do {                                                                         \
        if (!(what)) {                                                           \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what);   \
            exit(1);                                                             \
        }                                                                        \
    } while (0)

enum { NUM_FRAMES = 600, NUM_SWAPS = 200, NUM_CUTS = 400, NUM_TESTS = 5 };
#define TIMEOUT_S 30.0

typedef struct {
    xd_connection *c;
    int side;
} end;

static uint32_t next(uint32_t *x) {
    *x ^= *x << 13, *x ^= *x >> 17, *x ^= *x << 5;
    return *x;
}

static xd_connection *opened(int fd) {
    char err[200];
    xd_connection *c = xd_tcp_open(fd, 5, err, sizeof err);
    CHECK(c);
    return c;
}

/* The size and the bytes of frame number i from one side; both ends know them. */
static size_t size_of(int side, uint32_t i, size_t most) {
    uint32_t x = i * 2654435761u + (uint32_t)side + 1;
    return next(&x) % 5 == 0 ? next(&x) % (most + 1) : next(&x) % 3000;
}

static void fill(int side, uint32_t i, uint8_t *bytes, size_t n) {
    for (size_t k = 0; k < n; k++) bytes[k] = (uint8_t)(k * 31 + i * 7 + (uint32_t)side);
}

static void traffic(end *e) {
    uint32_t sent = 0, came[XD_NUM_QUEUES] = {0}, sent_on[XD_NUM_QUEUES] = {0};
    uint64_t start = xd_now_ns();
    while (sent < NUM_FRAMES || came[0] + came[1] < NUM_FRAMES || xd_connection_flush(e->c) == XD_AGAIN) {
        int queue = (int)(sent % 3 == 0);
        CHECK(xd_now_ns() - start < (uint64_t)(TIMEOUT_S * 1e9));
        if (sent < NUM_FRAMES) {
            size_t n = size_of(e->side, sent_on[queue], xd_max_payload(e->c, queue));
            uint8_t *bytes = malloc(n ? n : 1); /* exactly as large: the sanitizer sees the byte behind it */
            CHECK(bytes);
            fill(e->side, sent_on[queue], bytes, n);
            xd_header h = {.kind = XD_TEST, .queue = (uint8_t)queue, .tag = sent_on[queue], .length = (uint32_t)n};
            int code = xd_send(e->c, &h, bytes);
            memset(bytes, 0xee, n);
            free(bytes);
            CHECK(code == XD_OK || code == XD_AGAIN);
            if (code == XD_OK) sent++, sent_on[queue]++;
        }
        xd_header h;
        const void *payload;
        int code = xd_receive(e->c, &h, &payload);
        CHECK(code == XD_OK || code == XD_AGAIN);
        if (code) continue;
        CHECK(h.tag == came[h.queue] && h.length == size_of(1 - e->side, h.tag, xd_max_payload(e->c, h.queue)));
        for (size_t k = 0; k < h.length; k++)
            CHECK(((const uint8_t *)payload)[k] == (uint8_t)(k * 31 + h.tag * 7 + (uint32_t)(1 - e->side)));
        came[h.queue]++;
    }
}

/* An end may have left while the other still has credits to take: the swaps come after a common point. */
static void swaps(end *e) {
    for (uint32_t i = 0; i < NUM_SWAPS; i++) {
        size_t mine = size_of(e->side, i, 200000), theirs = size_of(1 - e->side, i, 200000);
        uint8_t *out = malloc(mine ? mine : 1), *in = malloc(theirs ? theirs : 1);
        CHECK(out && in);
        fill(e->side, i, out, mine);
        CHECK(xd_swap(e->c, i, out, mine, in, theirs, TIMEOUT_S) == XD_OK);
        fill(1 - e->side, i, out, mine < theirs ? mine : theirs);
        CHECK(memcmp(in, out, mine < theirs ? mine : theirs) == 0);
        free(out);
        free(in);
    }
}

static void *work(void *arg) {
    end *e = arg;
    double round_trip_us[NUM_TESTS];
    CHECK(xd_warm_up(e->c, TIMEOUT_S) == XD_OK);
    for (int queue = 0; queue < XD_NUM_QUEUES; queue++)
        CHECK(xd_self_test(e->c, e->side, queue, NUM_TESTS, TIMEOUT_S, round_trip_us) == XD_OK);
    swaps(e);
    traffic(e);
    return NULL;
}

static void both_work(void) {
    int fds[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    end ends[2] = {{opened(fds[0]), 0}, {opened(fds[1]), 1}};
    pthread_t other;
    CHECK(pthread_create(&other, NULL, work, &ends[1]) == 0);
    work(&ends[0]);
    CHECK(pthread_join(other, NULL) == 0);
    xd_connection_close(ends[0].c);
    xd_connection_close(ends[1].c);
}

/* A peer sends `whole` frames and `cut` bytes of another and goes; SIGPIPE would end this program. */
static void cut_off(size_t cut, int whole) {
    int fds[2];
    char frame[XD_HEADER_BYTES + 200] = {0};
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    xd_connection *c = opened(fds[0]);
    for (int i = 1; i <= whole + 1; i++) {
        xd_header h = {.kind = XD_TEST, .sequence = (uint64_t)i, .length = 200};
        xd_frame_seal(&h, 5, frame + XD_HEADER_BYTES);
        memcpy(frame, &h, sizeof h);
        size_t n = i <= whole ? sizeof frame : cut;
        CHECK(write(fds[1], frame, n) == (ssize_t)n);
    }
    close(fds[1]);
    xd_header h = {.kind = XD_TEST};
    const void *payload;
    CHECK(xd_send(c, &h, NULL) == XD_AGAIN);
    for (int i = 0; i < whole; i++) CHECK(xd_receive(c, &h, &payload) == XD_OK);
    int code;
    while ((code = xd_receive(c, &h, &payload)) == XD_AGAIN) continue; /* the piece first, then the end */
    CHECK(code == XD_CLOSED);
    CHECK(xd_send(c, &(xd_header){.kind = XD_TEST}, NULL) == XD_CLOSED);
    xd_connection_close(c);
}

int main(void) {
    uint32_t x = 1;
    both_work();
    for (int i = 0; i < NUM_CUTS; i++) cut_off(next(&x) % (XD_HEADER_BYTES + 200), (int)(next(&x) % 9));
    xd_connection_close(NULL);
    puts("ok");
    return 0;
}
