/* mailbox_layout.h: how a mailbox lies in memory, for the two that read and write it: mailbox.c for the ranks of this
 * host, pump.c for the ranks of others. Not for cffi. The order of a round's writes is told in mailbox.c. */

#ifndef XD_MAILBOX_LAYOUT_H
#define XD_MAILBOX_LAYOUT_H

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#define XD_LINE 128 /* bytes: Apple's cache line, and two of x86's, which its prefetcher pairs */
#define XD_PAGE 16384 /* bytes: Apple's page; the slots start on one */
#define XD_REASON_BYTES 200
#ifdef __APPLE__
#define XD_SPIN_NS 50000ull
#else
#define XD_SPIN_NS 2000ull
#endif
#define XD_YIELD_NS 200000ull
#define XD_MAX_NAP_NS 1000000ull

typedef struct {
    _Atomic uint64_t round;
    uint64_t digest;
    uint64_t bytes;
    uint32_t tag;
} slot_head;

typedef struct {
    _Alignas(XD_LINE) _Atomic uint64_t beat; /* 0 until the rank has opened the mailbox */
} rank_line;

enum { REASON_NONE = 0, REASON_CLAIMED = 1, REASON_WRITTEN = 2 };

typedef struct {
    uint64_t magic;
    uint64_t slot_bytes;
    int num_ranks;
    _Alignas(XD_LINE) _Atomic int poisoned;
    _Atomic int reason_state; /* whoever moves it from REASON_NONE writes the reason */
    char reason[XD_REASON_BYTES];
    rank_line ranks[XD_MAX_RANKS];
    _Alignas(XD_LINE) _Atomic uint64_t link_beat; /* 0 until a link process pumps this mailbox */
} mailbox_header;

static inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static inline size_t slot_stride(size_t slot_bytes) { return round_up(XD_LINE + slot_bytes, XD_PAGE); }

static inline slot_head *slot_of(mailbox_header *shared, int rank, uint64_t round) {
    size_t index = 2 * (size_t)rank + (round & 1);
    return (slot_head *)((char *)shared + round_up(sizeof(mailbox_header), XD_PAGE) +
                         index * slot_stride(shared->slot_bytes));
}

static inline char *slot_payload(slot_head *slot) { return (char *)slot + XD_LINE; }

static inline uint64_t slot_round(const slot_head *slot) {
    return atomic_load_explicit(&slot->round, memory_order_acquire);
}

/* Map all of a mailbox after checking that it is one; NULL and err otherwise. */
mailbox_header *xd_mailbox_map(int fd, size_t *bytes, char *err, size_t errlen);

/* End the epoch. The first reason that is not empty stays; it is written before the flag, so that who sees the flag
 * finds it (but for another one that poisons in the same microsecond). */
void xd_poison(mailbox_header *shared, const char *reason);

/* The reason of the epoch's end, "" when none was given. */
const char *xd_poison_reason(mailbox_header *shared);

/* Waiting: mailbox.c says why these times. */

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* `yield` is a no-op on Apple's cores, `isb` waits about 10 ns */
#endif
}

static inline void rest(uint64_t waited_ns) {
    if (waited_ns < XD_YIELD_NS) {
        sched_yield();
        return;
    }
    uint64_t nap = waited_ns / 16;
    if (nap > XD_MAX_NAP_NS) nap = XD_MAX_NAP_NS;
    nanosleep(&(struct timespec){.tv_nsec = (long)nap}, NULL);
}

#endif
