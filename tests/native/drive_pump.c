/* drive_pump.c: two hosts in one process: a rank and a pump each, joined by a socket pair. Swaps of random sizes, frames,
 * then one rank ends the epoch and both pumps must end with that. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connection.h"
#include "pump.h"

#define CHECK(what)                                                            \
    do {                                                                       \
        if (!(what)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

enum { NUM_HOSTS = 2, NUM_ROUNDS = 60, SLOT_BYTES = 9000, FRAME_BYTES = 700 };
#define TIMEOUT_S 60.0

typedef struct {
    int host, mailbox_fd, socket_fd;
} place;

static size_t size_of(int rank, int round) { return (size_t)((rank * 7919 + round * 104729) % 30000); }

static void *carry(void *arg) {
    const place *p = arg;
    char err[200] = "";
    xd_connection *c = xd_tcp_open(p->socket_fd, 1, err, sizeof err);
    CHECK(c);
    xd_pump *pump = xd_pump_open(p->mailbox_fd, 1u << p->host, -1, TIMEOUT_S, err, sizeof err);
    CHECK(pump);
    CHECK(xd_pump_add(pump, c, 1 - p->host, 1u << (1 - p->host)) == XD_OK);
    int code = xd_pump_run(pump, TIMEOUT_S), host = 0;
    xd_pump_failure(pump, &host, err, sizeof err);
    if (code != XD_POISONED) fprintf(stderr, "pump %d: %d %s\n", p->host, code, err);
    CHECK(code == XD_POISONED);
    xd_pump_close(pump);
    xd_connection_close(c);
    return NULL;
}

static void round_of(xd_mailbox *box, int rank, int round) {
    size_t sizes[NUM_HOSTS], total = 0;
    for (int r = 0; r < NUM_HOSTS; r++) total += sizes[r] = size_of(r, round);
    uint8_t *mine = malloc(sizes[rank] ? sizes[rank] : 1), *all = malloc(total ? total : 1), *at = all;
    CHECK(mine && all);
    memset(mine, rank * 50 + round % 50, sizes[rank]);
    CHECK(xd_mailbox_exchange(box, (uint32_t)round + 1, 0, mine, sizes, all) == XD_OK);
    for (int r = 0; r < NUM_HOSTS; r++)
        for (size_t i = 0; i < sizes[r]; i++) CHECK(*at++ == (uint8_t)(r * 50 + round % 50));
    free(mine);
    free(all);
}

static void *compute(void *arg) {
    const place *p = arg;
    char err[200];
    uint8_t frame[SLOT_BYTES];
    xd_mailbox *box = xd_mailbox_open(p->mailbox_fd, p->host, -1, TIMEOUT_S, TIMEOUT_S, err, sizeof err);
    CHECK(box);
    memset(frame, 7, FRAME_BYTES);
    if (p->host == 0) CHECK(xd_mailbox_send_frame(box, frame, FRAME_BYTES) == XD_OK);
    if (p->host == 1) CHECK(xd_mailbox_wait_frame(box, TIMEOUT_S, frame) == FRAME_BYTES && frame[FRAME_BYTES - 1] == 7);
    for (int round = 0; round < NUM_ROUNDS; round++) round_of(box, p->host, round);
    if (p->host == 0) CHECK(xd_mailbox_poison(p->mailbox_fd, "over") == 0);
    xd_mailbox_close(box);
    return NULL;
}

int main(void) {
    char err[200];
    int sockets[NUM_HOSTS];
    place places[NUM_HOSTS];
    pthread_t threads[NUM_HOSTS][2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    for (int h = 0; h < NUM_HOSTS; h++) {
        places[h] = (place){h, xd_mailbox_create(NUM_HOSTS, SLOT_BYTES, err, sizeof err), sockets[h]};
        CHECK(places[h].mailbox_fd >= 0);
        CHECK(pthread_create(&threads[h][0], NULL, carry, &places[h]) == 0);
        CHECK(pthread_create(&threads[h][1], NULL, compute, &places[h]) == 0);
    }
    for (int h = 0; h < NUM_HOSTS; h++)
        for (int t = 0; t < 2; t++) CHECK(pthread_join(threads[h][t], NULL) == 0);
    for (int h = 0; h < NUM_HOSTS; h++) close(places[h].mailbox_fd);
    puts("ok");
    return 0;
}
