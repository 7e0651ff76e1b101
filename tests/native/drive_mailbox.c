/* drive_mailbox.c: the mailbox under the sanitizers: three ranks swap random sizes, frames go out, then one goes. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "mailbox.h"

#define CHECK(what)                                                            \
    do {                                                                       \
        if (!(what)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

enum { NUM_RANKS = 3, NUM_ROUNDS = 300, SLOT_BYTES = 1000 };

static int fd;

static size_t size_of(int rank, int round) { return (size_t)((rank * 7919 + round * 104729) % 3500); }

static void round_of(xd_mailbox *box, int rank, int round) {
    size_t sizes[NUM_RANKS], total = 0;
    for (int r = 0; r < NUM_RANKS; r++) total += sizes[r] = size_of(r, round);
    uint8_t *mine = malloc(sizes[rank] ? sizes[rank] : 1), *all = malloc(total ? total : 1), *at = all;
    CHECK(mine && all);
    memset(mine, rank * 50 + round % 50, sizes[rank]);
    CHECK(xd_mailbox_exchange(box, (uint32_t)round + 1, 0, mine, sizes, all) == XD_OK);
    for (int r = 0; r < NUM_RANKS; r++)
        for (size_t i = 0; i < sizes[r]; i++) CHECK(*at++ == (uint8_t)(r * 50 + round % 50));
    free(mine);
    free(all);
}

static void *work(void *arg) {
    int rank = (int)(intptr_t)arg;
    char err[200], frame[SLOT_BYTES];
    xd_mailbox *box = xd_mailbox_open(fd, rank, -1, 60, 30, err, sizeof err);
    CHECK(box);
    memset(frame, 7, sizeof frame);
    if (rank == 0) CHECK(xd_mailbox_send_frame(box, frame, sizeof frame) == XD_OK);
    if (rank > 0) CHECK(xd_mailbox_wait_frame(box, 60, frame) == SLOT_BYTES && frame[SLOT_BYTES - 1] == 7);
    for (int round = 0; round < NUM_ROUNDS; round++) round_of(box, rank, round);
    if (rank == 0) CHECK(xd_mailbox_poison(fd, "over") == 0);
    if (rank == 1) { /* the others have left or leave: this ends with poison */
        size_t sizes[NUM_RANKS] = {1, 1, 1};
        char all[NUM_RANKS];
        CHECK(xd_mailbox_exchange(box, 1, 0, "x", sizes, all) == XD_POISONED);
        CHECK(xd_mailbox_failure(box, err, sizeof err) == XD_POISONED && err[0]);
    }
    xd_mailbox_close(box);
    return NULL;
}

int main(void) {
    char err[200];
    pthread_t threads[NUM_RANKS];
    fd = xd_mailbox_create(NUM_RANKS, SLOT_BYTES, err, sizeof err);
    CHECK(fd >= 0);
    for (intptr_t r = 0; r < NUM_RANKS; r++) CHECK(pthread_create(&threads[r], NULL, work, (void *)r) == 0);
    for (int r = 0; r < NUM_RANKS; r++) CHECK(pthread_join(threads[r], NULL) == 0);
    close(fd);
    puts("ok");
    return 0;
}
