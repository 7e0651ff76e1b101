/* mailbox.c: see mailbox.h for the contract.
 *
 * Theory of operation. Rounds are numbered from 1 and counted by every rank for itself. In round n a rank
 * writes its slot n & 1 and then stores n into the slot's `round` with release order; a peer that reads n
 * with acquire order therefore sees the payload. Two slots are enough, without acknowledgements: before a
 * rank overwrites the slot of round n in round n + 2 it has seen every peer publish round n + 1, and a
 * peer publishes n + 1 only after it has taken everything of round n.
 *
 * Waiting. A peer on another core answers within a few µs, so a wait begins with spinning: for 50 µs on a Mac,
 * whose cores outnumber our threads, for 2 µs elsewhere, where a rank may have a single core and a spinner keeps
 * MLX's main thread from encoding the next operations (6.4 against 12 µs per exchange at 4 KiB, two cores). Then the
 * processor is offered to others (sched_yield); after 200 µs the wait is for computation or for work to arrive,
 * and sleeping a 16th of the time already waited, at most 1 ms, costs little of either. Pulse, poison and
 * deadline are looked at only after the spin. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "mailbox.h"
#include "mailbox_layout.h"

#define MAGIC 0x6578706572746402ull /* "expertd", layout 2 */
#define PULSE_MS 20

struct xd_mailbox {
    mailbox_header *shared;
    size_t mapped_bytes;
    int rank;
    int lifeline_fd;
    uint64_t round;            /* the last round that this rank published */
    bool frame_published;      /* our half of a frame's round is out, the leader's has not come yet */
    uint64_t step_waited_ns;   /* spent waiting since the last frame */
    uint64_t total_waited_ns;
    uint64_t num_exchanges;
    uint64_t waits[XD_WAIT_BUCKETS]; /* see xd_mailbox_waits; total_waited_ns has the frames as well */
    uint64_t exchanges_waited_ns;
    uint64_t step_timeout_ns;
    uint64_t pulse_timeout_ns;
    _Atomic bool stop;
    pthread_t pulse;
    bool pulse_started;
    int failure;
    char reason[2 * XD_REASON_BYTES];
};

static size_t total_bytes(int num_ranks, size_t slot_bytes) {
    return round_up(sizeof(mailbox_header), XD_PAGE) + 2 * (size_t)num_ranks * slot_stride(slot_bytes);
}

/* Creation, by the supervisor. */

static int anonymous_memory(void) {
#ifdef __linux__
    return memfd_create("expertd-mailbox", MFD_CLOEXEC);
#else
    char name[32];
    static _Atomic unsigned counter;
    snprintf(name, sizeof name, "/xd-%d-%u", (int)getpid(), atomic_fetch_add(&counter, 1));
    int fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd >= 0) shm_unlink(name);
    return fd; /* POSIX: shm_open sets close-on-exec */
#endif
}

int xd_mailbox_create(int num_ranks, size_t slot_bytes, char *err, size_t errlen) {
    mailbox_header *shared = NULL;
    int fd = -1;
    if (num_ranks < 1 || num_ranks > XD_MAX_RANKS || slot_bytes < 1 || slot_bytes > (1ull << 32)) {
        snprintf(err, errlen, "mailbox: %d ranks with slots of %zu bytes, wanted 1 to %d ranks and at most 4 GiB",
                 num_ranks, slot_bytes, XD_MAX_RANKS);
        return -1;
    }
    size_t bytes = total_bytes(num_ranks, slot_bytes);
    fd = anonymous_memory();
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) goto failed;
    shared = mmap(NULL, sizeof(mailbox_header), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared == MAP_FAILED) goto failed;
    shared->slot_bytes = slot_bytes;
    shared->num_ranks = num_ranks;
    shared->magic = MAGIC;
    munmap(shared, sizeof(mailbox_header));
    return fd;
failed:
    snprintf(err, errlen, "mailbox: cannot get %zu bytes of shared memory: %s", bytes, strerror(errno));
    if (fd >= 0) close(fd);
    return -1;
}

mailbox_header *xd_mailbox_map(int fd, size_t *bytes, char *err, size_t errlen) {
    struct stat st;
    if (fstat(fd, &st) != 0 || (size_t)st.st_size < sizeof(mailbox_header)) {
        snprintf(err, errlen, "mailbox: descriptor %d is not a mailbox", fd);
        return NULL;
    }
    mailbox_header *shared = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared == MAP_FAILED) {
        snprintf(err, errlen, "mailbox: cannot map descriptor %d: %s", fd, strerror(errno));
        return NULL;
    }
    *bytes = (size_t)st.st_size;
    if (shared->magic != MAGIC || shared->num_ranks < 1 || shared->num_ranks > XD_MAX_RANKS ||
        (size_t)st.st_size < total_bytes(shared->num_ranks, shared->slot_bytes)) {
        snprintf(err, errlen, "mailbox: descriptor %d holds no mailbox of this version", fd);
        munmap(shared, *bytes);
        return NULL;
    }
    return shared;
}

/* Poison, and what a supervisor sees from outside. */

void xd_poison(mailbox_header *shared, const char *reason) {
    int none = REASON_NONE;
    if (*reason && atomic_compare_exchange_strong(&shared->reason_state, &none, REASON_CLAIMED)) {
        snprintf(shared->reason, sizeof shared->reason, "%s", reason);
        atomic_store(&shared->reason_state, REASON_WRITTEN);
    }
    atomic_store(&shared->poisoned, 1);
}

const char *xd_poison_reason(mailbox_header *shared) {
    return atomic_load(&shared->reason_state) == REASON_WRITTEN ? shared->reason : "";
}

int xd_mailbox_poison(int fd, const char *reason) {
    char err[200];
    size_t bytes;
    mailbox_header *shared = xd_mailbox_map(fd, &bytes, err, sizeof err);
    if (!shared) return -1;
    xd_poison(shared, reason);
    munmap(shared, bytes);
    return 0;
}

int xd_mailbox_pulses(int fd, uint64_t *beats, uint64_t *link_beat) {
    char err[200];
    size_t bytes;
    mailbox_header *shared = xd_mailbox_map(fd, &bytes, err, sizeof err);
    if (!shared) return -1;
    int num_ranks = shared->num_ranks;
    for (int r = 0; r < num_ranks; r++) beats[r] = atomic_load(&shared->ranks[r].beat);
    *link_beat = atomic_load(&shared->link_beat);
    munmap(shared, bytes);
    return num_ranks;
}

/* Opening, and the pulse. */

static void *pulse_main(void *arg) {
    xd_mailbox *box = arg;
#ifdef __linux__
    /* A rank is batch-scheduled, and a batch thread that wakes pushes no other off its core: beats came late. Without
     * the right to change it the pulse is late under load, no worse. */
    (void)pthread_setschedparam(pthread_self(), SCHED_OTHER, &(struct sched_param){.sched_priority = 0});
#endif
    struct pollfd lifeline = {.fd = box->lifeline_fd, .events = POLLIN}; /* poll skips negative descriptors */
    while (!atomic_load_explicit(&box->stop, memory_order_relaxed)) {
        atomic_fetch_add_explicit(&box->shared->ranks[box->rank].beat, 1, memory_order_relaxed);
        if (poll(&lifeline, 1, PULSE_MS) > 0) { /* nobody ever writes to it: this is its end */
            xd_poison(box->shared, "the supervisor of a rank is gone");
            _exit(3);
        }
    }
    return NULL;
}

xd_mailbox *xd_mailbox_open(int fd, int rank, int lifeline_fd, double step_timeout_s, double pulse_timeout_s,
                            char *err, size_t errlen) {
    xd_mailbox *box = calloc(1, sizeof *box);
    if (!box) {
        snprintf(err, errlen, "mailbox: out of memory");
        return NULL;
    }
    box->shared = xd_mailbox_map(fd, &box->mapped_bytes, err, errlen);
    if (!box->shared) goto failed;
    if (rank < 0 || rank >= box->shared->num_ranks) {
        snprintf(err, errlen, "mailbox: rank %d of %d", rank, box->shared->num_ranks);
        goto failed;
    }
    box->rank = rank;
    box->lifeline_fd = lifeline_fd;
    box->step_timeout_ns = (uint64_t)(step_timeout_s * 1e9);
    box->pulse_timeout_ns = (uint64_t)(pulse_timeout_s * 1e9);
    atomic_fetch_add(&box->shared->ranks[rank].beat, 1);
    if (pthread_create(&box->pulse, NULL, pulse_main, box) != 0) {
        snprintf(err, errlen, "mailbox: cannot start the pulse thread");
        goto failed;
    }
    box->pulse_started = true;
    return box;
failed:
    xd_mailbox_close(box);
    return NULL;
}

void xd_mailbox_close(xd_mailbox *box) {
    if (!box) return;
    atomic_store(&box->stop, true);
    if (box->pulse_started) pthread_join(box->pulse, NULL);
    if (box->shared) munmap(box->shared, box->mapped_bytes);
    free(box);
}

/* Rounds. */

/* Keep the first failure, poison the epoch, give the code back. A rank that failed because the epoch was ended has
 * nothing to add to its reason, but tells it. */
static int fail(xd_mailbox *box, int code, int peer, uint32_t tag, const char *what) {
    const char *cause = code == XD_POISONED ? xd_poison_reason(box->shared) : "";
    if (!box->failure) {
        box->failure = code;
        snprintf(box->reason, sizeof box->reason, "rank %d, exchange %u with rank %d: %s%s%s", box->rank, tag, peer,
                 what, *cause ? ": " : "", cause);
    }
    xd_poison(box->shared, code == XD_POISONED ? "" : box->reason);
    return code;
}

static void publish(xd_mailbox *box, uint32_t tag, uint64_t digest, const void *bytes, size_t size) {
    slot_head *slot = slot_of(box->shared, box->rank, ++box->round);
    slot->digest = digest;
    slot->bytes = size;
    slot->tag = tag;
    if (size) memcpy(slot_payload(slot), bytes, size);
    atomic_store_explicit(&slot->round, box->round, memory_order_release);
}

static bool has_come(const slot_head *slot, uint64_t round) { return slot_round(slot) == round; }

typedef struct {
    uint64_t beat, beat_seen_ns, looked_ns;
} pulse_view;

/* Has the peer's pulse been silent too long? A rank that has not opened the mailbox yet (beat 0) is not dead.
 * If we did not look for 100 ms we were stopped ourselves (a suspended laptop stops both): start afresh. */
static bool is_silent(const xd_mailbox *box, int peer, pulse_view *view, uint64_t now) {
    uint64_t beat = atomic_load_explicit(&box->shared->ranks[peer].beat, memory_order_relaxed);
    if (beat != view->beat || beat == 0 || now - view->looked_ns > 100000000ull) {
        view->beat = beat;
        view->beat_seen_ns = now;
    }
    view->looked_ns = now;
    return now - view->beat_seen_ns > box->pulse_timeout_ns;
}

/* Wait until `peer` has published the current round, for at most timeout_ns. Adds the time to *waited_ns. */
static int wait_round(xd_mailbox *box, int peer, uint64_t timeout_ns, uint64_t *waited_ns) {
    const slot_head *slot = slot_of(box->shared, peer, box->round);
    if (has_come(slot, box->round)) return XD_OK;
    uint64_t start = now_ns(), now = start;
    pulse_view view = {0, start, start};
    int code = XD_OK;
    while (!has_come(slot, box->round)) {
        now = now_ns();
        if (now - start < XD_SPIN_NS) {
            for (int i = 0; i < 16 && !has_come(slot, box->round); i++) spin_pause();
            continue;
        }
        if (atomic_load_explicit(&box->shared->poisoned, memory_order_acquire)) code = XD_POISONED;
        else if (is_silent(box, peer, &view, now)) code = XD_PEER_DEAD;
        else if (now - start > timeout_ns) code = XD_TIMEOUT;
        if (code) break;
        rest(now - start);
    }
    /* A peer that comes, finds another exchange than its own and poisons the epoch, all between our two looks:
     * its slot tells us the same. */
    if (code == XD_POISONED && has_come(slot, box->round)) code = XD_OK;
    *waited_ns += now - start;
    return code;
}

static const char *explain(int code) {
    switch (code) {
    case XD_TIMEOUT: return "it lives but did not come before the step's deadline";
    case XD_PEER_DEAD: return "it is dead: its pulse has stopped";
    case XD_POISONED: return "another rank or the supervisor ended this epoch";
    default: return "unknown failure";
    }
}

/* No clock is read for this: what was waited is known, and a peer that was there first cost nothing. */
static void count_wait(xd_mailbox *box, uint64_t waited_ns) {
    int bucket = waited_ns ? 64 - __builtin_clzll(waited_ns) : 0;
    box->exchanges_waited_ns += waited_ns;
    box->waits[bucket < XD_WAIT_BUCKETS ? bucket : XD_WAIT_BUCKETS - 1]++;
}

/* Wait for a peer inside a step and check that it is at the same exchange. */
static int meet(xd_mailbox *box, int peer, uint32_t tag, uint64_t digest, uint64_t bytes) {
    uint64_t waited = 0, left = box->step_timeout_ns > box->step_waited_ns
                                    ? box->step_timeout_ns - box->step_waited_ns : 0;
    int code = wait_round(box, peer, left, &waited);
    box->step_waited_ns += waited;
    box->total_waited_ns += waited;
    if (code) return fail(box, code, peer, tag, explain(code));
    if (tag) count_wait(box, waited);
    const slot_head *slot = slot_of(box->shared, peer, box->round);
    char what[120];
    if (slot->tag != tag || slot->bytes != bytes) {
        snprintf(what, sizeof what, "found exchange %u of %llu bytes, wanted exchange %u of %llu", slot->tag,
                 (unsigned long long)slot->bytes, tag, (unsigned long long)bytes);
        return fail(box, XD_MISMATCH, peer, tag, what);
    }
    if (slot->digest != digest) return fail(box, XD_DIVERGED, peer, tag, "its router chose other experts than ours");
    return XD_OK;
}

static size_t piece(size_t size, size_t from, size_t slot_bytes) {
    if (size <= from) return 0;
    return size - from < slot_bytes ? size - from : slot_bytes;
}

int xd_mailbox_exchange(xd_mailbox *box, uint32_t tag, uint64_t digest, const void *mine, const size_t *sizes,
                        void *all) {
    mailbox_header *h = box->shared;
    if (atomic_load_explicit(&h->poisoned, memory_order_relaxed))
        return fail(box, XD_POISONED, box->rank, tag, explain(XD_POISONED));
    size_t offsets[XD_MAX_RANKS], total = 0, largest = 1;
    for (int r = 0; r < h->num_ranks; r++) {
        offsets[r] = total;
        total += sizes[r];
        if (sizes[r] > largest) largest = sizes[r];
    }
    for (size_t from = 0; from < largest; from += h->slot_bytes) {
        const char *source = (const char *)mine + from;
        size_t own = piece(sizes[box->rank], from, h->slot_bytes);
        publish(box, tag, digest, source, own);
        if (own) memcpy((char *)all + offsets[box->rank] + from, source, own); /* while the others publish */
        for (int r = 0; r < h->num_ranks; r++) {
            if (r == box->rank) continue;
            size_t bytes = piece(sizes[r], from, h->slot_bytes);
            int code = meet(box, r, tag, digest, bytes);
            if (code) return code;
            if (bytes) memcpy((char *)all + offsets[r] + from, slot_payload(slot_of(box->shared, r, box->round)), bytes);
        }
    }
    box->num_exchanges++;
    return XD_OK;
}

/* Frames travel with tag 0; the exchanges of a step are numbered from 1. */

int xd_mailbox_send_frame(xd_mailbox *box, const void *frame, size_t size) {
    if (size > box->shared->slot_bytes) return fail(box, XD_TOO_LARGE, box->rank, 0, "frame larger than a slot");
    if (atomic_load(&box->shared->poisoned)) return fail(box, XD_POISONED, box->rank, 0, explain(XD_POISONED));
    box->step_waited_ns = 0;
    publish(box, 0, 0, frame, size);
    for (int r = 1; r < box->shared->num_ranks; r++) {
        int code = meet(box, r, 0, 0, 0);
        if (code) return code;
    }
    return XD_OK;
}

int64_t xd_mailbox_wait_frame(xd_mailbox *box, double idle_s, void *frame) {
    uint64_t waited = 0;
    if (atomic_load(&box->shared->poisoned)) return fail(box, XD_POISONED, 0, 0, explain(XD_POISONED));
    if (!box->frame_published) publish(box, 0, 0, NULL, 0);
    box->frame_published = true;
    int code = wait_round(box, 0, (uint64_t)(idle_s * 1e9), &waited);
    if (code == XD_TIMEOUT) return XD_TIMEOUT;
    if (code) return fail(box, code, 0, 0, explain(code));
    box->frame_published = false;
    box->step_waited_ns = 0;
    for (int r = 1; r < box->shared->num_ranks; r++) {
        if (r != box->rank && (code = meet(box, r, 0, 0, 0))) return code;
    }
    slot_head *slot = slot_of(box->shared, 0, box->round);
    if (slot->tag != 0) return fail(box, XD_MISMATCH, 0, 0, "found an exchange, wanted a frame");
    if (slot->bytes > box->shared->slot_bytes) return fail(box, XD_TOO_LARGE, 0, 0, "frame larger than a slot");
    memcpy(frame, slot_payload(slot), slot->bytes);
    return (int64_t)slot->bytes;
}

int xd_mailbox_failure(xd_mailbox *box, char *err, size_t errlen) {
    snprintf(err, errlen, "%s", box->reason);
    return box->failure;
}

int xd_mailbox_num_ranks(xd_mailbox *box) { return box->shared->num_ranks; }

size_t xd_mailbox_slot_bytes(xd_mailbox *box) { return box->shared->slot_bytes; }

void xd_mailbox_stats(xd_mailbox *box, uint64_t *num_exchanges, double *waited_s) {
    *num_exchanges = box->num_exchanges;
    *waited_s = (double)box->total_waited_ns * 1e-9;
}

void xd_mailbox_waits(xd_mailbox *box, uint64_t *counts, double *waited_s) {
    memcpy(counts, box->waits, sizeof box->waits);
    *waited_s = (double)box->exchanges_waited_ns * 1e-9;
}
