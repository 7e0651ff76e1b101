/* floor.c: see floor.h.
 *
 * Every way of moving bytes is one function `move`: send `size` bytes and take `their_size`, in that order where it has
 * a choice. The loop times each call. A floor does nothing that its medium does not demand: no sequence, checksum, tag or
 * failure report, and it looks at the clock only after thousands of fruitless spins. */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>

#include "floor.h"

#define LINE 128
#define SPINS_PER_LOOK 65536
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

typedef int (*exchange_function)(void *box, uint32_t tag, uint64_t digest, const void *mine, const size_t *sizes,
                                 void *all);
typedef int (*swap_function)(void *connection, uint32_t tag, const void *mine, size_t size, void *theirs,
                             size_t their_size, double timeout_s);
typedef uint32_t (*crc_function)(uint32_t crc, const void *bytes, size_t n);

struct xb_link {
    int (*move)(xb_link *link, const void *mine, size_t size, void *theirs, size_t their_size);
    int side;
    double timeout_s;
    uint32_t tag;
    exchange_function exchange;
    swap_function swap;
    crc_function crc32c;
    void *context; /* the mailbox or connection */
    int fd;
    char *shared; /* bare memory */
    size_t shared_bytes, slot_bytes;
    uint64_t round;
    _Atomic uint32_t checksum; /* keeps the bare checksum from being optimised away */
    char *mine, *theirs;       /* of the loop */
    size_t room;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static uint64_t deadline_of(const xb_link *link) { return now_ns() + (uint64_t)(link->timeout_s * 1e9); }

/* Ours. */

static int move_mailbox(xb_link *link, const void *mine, size_t size, void *theirs, size_t their_size) {
    size_t sizes[2] = {link->side == 0 ? size : their_size, link->side == 0 ? their_size : size};
    /* Both ranks' bytes come, in rank order. Where the peer sends nothing, ours must not cover what it sent before. */
    void *all = their_size ? theirs : (char *)theirs + size;
    return link->exchange(link->context, ++link->tag, 0, mine, sizes, all);
}

static int move_connection(xb_link *link, const void *mine, size_t size, void *theirs, size_t their_size) {
    return link->swap(link->context, ++link->tag, mine, size, theirs, their_size, link->timeout_s);
}

/* Bare shared memory. */

static char *slot_of(const xb_link *link, int side, uint64_t round) {
    return link->shared + (2 * (size_t)side + (round & 1)) * (LINE + link->slot_bytes);
}

static int move_memory(xb_link *link, const void *mine, size_t size, void *theirs, size_t their_size) {
    uint64_t round = ++link->round, deadline = 0;
    char *own = slot_of(link, link->side, round), *peer = slot_of(link, 1 - link->side, round);
    if (size) memcpy(own + LINE, mine, size);
    atomic_store_explicit((_Atomic uint64_t *)own, round, memory_order_release);
    for (int spins = 0; atomic_load_explicit((_Atomic uint64_t *)peer, memory_order_acquire) != round; spins++) {
        spin_pause();
        if (spins < SPINS_PER_LOOK) continue;
        spins = 0;
        if (!deadline) deadline = deadline_of(link);
        else if (now_ns() > deadline) return XB_LATE;
    }
    if (their_size) memcpy(theirs, peer + LINE, their_size);
    return 0;
}

/* A bare socket. */

static bool is_trouble(ssize_t n) {
    return n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

static int move_socket_spinning(xb_link *link, const void *mine, size_t size, void *theirs, size_t their_size) {
    size_t sent = 0, got = 0;
    uint64_t deadline = 0;
    for (int spins = 0; sent < size || got < their_size; spins++) {
        ssize_t n;
        if (sent < size) {
            n = send(link->fd, (const char *)mine + sent, size - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (is_trouble(n)) return XB_SOCKET;
            if (n > 0) sent += (size_t)n;
        }
        if (got < their_size) {
            n = recv(link->fd, (char *)theirs + got, their_size - got, MSG_DONTWAIT);
            if (is_trouble(n)) return XB_SOCKET;
            if (n > 0) got += (size_t)n;
        }
        if (spins < SPINS_PER_LOOK) continue;
        spins = 0;
        if (!deadline) deadline = deadline_of(link);
        else if (now_ns() > deadline) return XB_LATE;
    }
    return 0;
}

/* Blocks in recv once all is sent; before that, when neither way moves, in poll: two sides that both block in send with
 * full buffers would wait for ever. */
static int move_socket_blocking(xb_link *link, const void *mine, size_t size, void *theirs, size_t their_size) {
    size_t sent = 0, got = 0;
    while (sent < size || got < their_size) {
        ssize_t in = -1, out = -1;
        if (sent < size) {
            out = send(link->fd, (const char *)mine + sent, size - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (is_trouble(out)) return XB_SOCKET;
            if (out > 0) sent += (size_t)out;
        }
        bool all_sent = sent == size;
        if (got < their_size) {
            in = recv(link->fd, (char *)theirs + got, their_size - got, all_sent ? 0 : MSG_DONTWAIT);
            if (is_trouble(in)) return XB_SOCKET;
            if (in < 0 && all_sent && errno != EINTR) return XB_LATE; /* SO_RCVTIMEO */
            if (in > 0) got += (size_t)in;
        }
        if (!all_sent && in < 0 && out < 0) {
            struct pollfd wait = {.fd = link->fd, .events = (short)(got < their_size ? POLLIN | POLLOUT : POLLOUT)};
            if (poll(&wait, 1, (int)(link->timeout_s * 1000)) == 0) return XB_LATE;
        }
    }
    return 0;
}

static int move_checksum(xb_link *link, const void *mine, size_t size, void *theirs, size_t their_size) {
    (void)theirs;
    uint32_t sum = link->crc32c(0, mine, size) ^ link->crc32c(1, mine, their_size);
    atomic_store_explicit(&link->checksum, sum, memory_order_relaxed);
    return 0;
}

/* Making them. */

static xb_link *new_link(int side, double timeout_s) {
    xb_link *link = calloc(1, sizeof *link);
    if (!link) return NULL;
    link->side = side;
    link->timeout_s = timeout_s;
    link->fd = -1;
    return link;
}

xb_link *xb_mailbox(uintptr_t exchange, uintptr_t box, int side, double timeout_s) {
    xb_link *link = new_link(side, timeout_s);
    if (!link) return NULL;
    link->move = move_mailbox;
    link->exchange = (exchange_function)exchange;
    link->context = (void *)box;
    return link;
}

xb_link *xb_connection(uintptr_t swap, uintptr_t connection, int side, double timeout_s) {
    xb_link *link = new_link(side, timeout_s);
    if (!link) return NULL;
    link->move = move_connection;
    link->swap = (swap_function)swap;
    link->context = (void *)connection;
    return link;
}

xb_link *xb_memory(int fd, size_t slot_bytes, int side, double timeout_s) {
    xb_link *link = new_link(side, timeout_s);
    if (!link) return NULL;
    link->move = move_memory;
    link->slot_bytes = slot_bytes;
    link->shared_bytes = 4 * (LINE + slot_bytes);
    link->shared = mmap(NULL, link->shared_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (link->shared != MAP_FAILED) return link;
    link->shared = NULL;
    xb_close(link);
    return NULL;
}

xb_link *xb_socket(int fd, int spin, int side, double timeout_s) {
    xb_link *link = new_link(side, timeout_s);
    if (!link) return NULL;
    link->move = spin ? move_socket_spinning : move_socket_blocking;
    link->fd = fd;
    struct timeval wait = {.tv_sec = (time_t)timeout_s + 1};
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) == 0) return link;
    xb_close(link);
    return NULL;
}

xb_link *xb_checksum(uintptr_t crc32c, int side) {
    xb_link *link = new_link(side, 1);
    if (!link) return NULL;
    link->move = move_checksum;
    link->crc32c = (crc_function)crc32c;
    return link;
}

void xb_close(xb_link *link) {
    if (!link) return;
    if (link->shared) munmap(link->shared, link->shared_bytes);
    free(link->mine);
    free(link->theirs);
    free(link);
}

/* The loop. */

static void fill(char *bytes, size_t size, int side) {
    for (size_t i = 0; i < size; i++) bytes[i] = (char)((i * 31 + i / 251 + (size_t)side * 101 + size) & 0xff);
}

/* Room for `size` bytes to send and for both sides' bytes to come, in pages that exist already. */
static int prepare(xb_link *link, size_t size) {
    if (size > link->room) {
        free(link->mine);
        free(link->theirs);
        link->room = 0;
        link->mine = malloc(size);
        link->theirs = malloc(2 * size);
        if (!link->mine || !link->theirs) return XB_SOCKET;
        link->room = size;
    }
    fill(link->mine, size, link->side);
    memset(link->theirs, 0, 2 * size);
    return 0;
}

static int step(xb_link *link, int pattern, size_t size) {
    if (pattern == XB_SWAP) return link->move(link, link->mine, size, link->theirs, size);
    size_t first = pattern == XB_PING ? size : 0, second = size - first;
    int code = link->move(link, link->mine, first, link->theirs, second);
    return code ? code : link->move(link, link->mine, second, link->theirs, first);
}

/* Is what has come what the peer sends? In a swap over the mailbox side 0 finds it behind its own bytes. */
static int check(xb_link *link, int pattern, size_t size) {
    if (link->crc32c) return 0;
    size_t behind = pattern == XB_SWAP && link->exchange && link->side == 0 ? size : 0;
    char *wanted = malloc(size);
    if (!wanted) return XB_SOCKET;
    fill(wanted, size, 1 - link->side);
    int code = memcmp(wanted, link->theirs + behind, size) == 0 ? 0 : XB_WRONG_BYTES;
    free(wanted);
    return code;
}

int xb_run(xb_link *link, int pattern, size_t size, int num_warm, int num_timed, uint64_t *ns) {
    int code = prepare(link, size);
    for (int i = 0; i < num_warm && !code; i++) code = step(link, pattern, size);
    uint64_t before = now_ns();
    for (int i = 0; i < num_timed && !code; i++) {
        code = step(link, pattern, size);
        uint64_t after = now_ns();
        ns[i] = after - before;
        before = after;
    }
    return code ? code : check(link, pattern, size);
}
