/* pump.c: see pump.h for the contract.
 *
 * Theory of operation. On every host of the group lies a mailbox for all its ranks. The ranks of a host use their own
 * as they always do; the pump plays the others. It reads the slots of the local ranks and sends each round to every
 * other host, and what comes from there it writes into the slots of the distant ranks, `round` last, with release
 * order. So mailbox.c's rule must hold for two mailboxes: who overwrites the slot of round n, in round n + 2, must know
 * that nobody reads it any more.
 *
 *   Sending. A local rank A publishes n + 2 when it has seen every rank publish n + 1. A distant rank publishes n + 1
 *   only after it has taken A's n, so all pieces of A's n have come there, so this pump has sent them all. It never
 *   reads a slot that A may write.
 *
 *   Receiving. A distant rank A publishes n when it has seen every rank publish n - 1, those of this host too, and they
 *   published n - 1 only after they had taken A's n - 2. So when the first piece of A's n comes, its slot is free. The
 *   pump looks whether that is so: every local rank must have published n - 1. The look has acquire order, which also
 *   puts their last reads of the slot before our writes.
 *
 * A rank may be one round ahead (it publishes n + 1 after seeing our n, not after we took its n), and the two rounds
 * may travel in different queues; hence one arrival per slot and not per rank. Everything else that does not follow is
 * a failure: UC loses frames silently, and a wrong byte must never reach a rank.
 *
 * Pulses. Every 50 ms a beat with the pulses of the local ranks goes out on each queue in use. Frames are numbered, so
 * one that was lost with nothing after it is missed at the next beat. The beats that come go into the distant ranks'
 * lines of this mailbox, where ranks and supervisor watch them as they watch near ones.
 *
 * The end. The first failure, local poison or word of the end is final: it poisons the mailbox, and the hosts that do
 * not know are told with the reason. Then we listen until they hang up, at most 100 ms: closing a TCP socket with
 * unread bytes would throw away what we told. */

#define _GNU_SOURCE
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include "mailbox.h"
#include "mailbox_layout.h"
#include "transport.h"
#include "pump.h"

#define BEAT_NS 50000000ull
#define LIFELINE_NS 20000000ull
#define GOODBYE_NS 100000000ull
#define LATENCY_MESSAGES 4 /* a round of more than these goes to the bulk queue */
#define BATCH 64           /* frames taken from one connection before the others get their turn */

typedef struct { /* a local rank's way to one host */
    uint64_t round;   /* the next to send */
    uint32_t sent;    /* bytes of it that are on their way */
    uint64_t seen_ns; /* when it was first seen published, 0 before */
} lane;

typedef struct {
    xd_connection *connection;
    int host;
    uint32_t ranks;
    lane lanes[XD_MAX_RANKS];
    bool bulk_used;
    bool gone; /* it has failed or ended: nothing to tell it */
    uint64_t heard_ns;
    uint64_t beat_due_ns[XD_NUM_QUEUES];
} distant;

typedef struct { /* what has come of the round that goes into one slot of a distant rank */
    uint64_t round;
    bool begun;
    uint32_t filled, total;
} arrival;

struct xd_pump {
    mailbox_header *shared;
    size_t mapped_bytes;
    uint32_t local_ranks;
    int lifeline_fd;
    uint64_t silence_ns;
    distant hosts[XD_MAX_RANKS];
    int num_hosts;
    arrival arrivals[XD_MAX_RANKS][2];
    uint64_t busy_ns;          /* when something was last carried */
    uint64_t turned_ns;        /* when the loop last came round */
    uint64_t lifeline_due_ns;
    uint64_t num_rounds, carried_ns;
    int failure;
    int failed_host;
    char reason[2 * XD_REASON_BYTES];
};

static bool is_in(uint32_t ranks, int rank) { return ranks >> rank & 1; }

xd_pump *xd_pump_open(int fd, uint32_t local_ranks, int lifeline_fd, double silence_timeout_s, char *err,
                      size_t errlen) {
    xd_pump *p = calloc(1, sizeof *p);
    if (!p) {
        snprintf(err, errlen, "pump: out of memory");
        return NULL;
    }
    p->shared = xd_mailbox_map(fd, &p->mapped_bytes, err, errlen);
    if (!p->shared) {
        free(p);
        return NULL;
    }
    if (!local_ranks || local_ranks >> p->shared->num_ranks || p->shared->slot_bytes > UINT32_MAX) {
        snprintf(err, errlen, "pump: local ranks %#x of %d, slots of %llu bytes", local_ranks, p->shared->num_ranks,
                 (unsigned long long)p->shared->slot_bytes);
        xd_pump_close(p);
        return NULL;
    }
    p->local_ranks = local_ranks;
    p->lifeline_fd = lifeline_fd;
    p->silence_ns = (uint64_t)(silence_timeout_s * 1e9);
    p->failed_host = -1;
    for (int r = 0; r < XD_MAX_RANKS; r++)
        for (uint64_t round = 1; round <= 2; round++) p->arrivals[r][round & 1].round = round;
#ifdef __linux__
    /* A nap may else last 50 us longer than asked for. Refused, it does. */
    (void)prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);
#endif
    return p;
}

int xd_pump_add(xd_pump *p, xd_connection *c, int host, uint32_t remote_ranks) {
    if (p->num_hosts == XD_MAX_RANKS) return XD_TOO_LARGE;
    uint32_t taken = p->local_ranks;
    for (int i = 0; i < p->num_hosts; i++) taken |= p->hosts[i].ranks;
    if (!remote_ranks || remote_ranks >> p->shared->num_ranks || (remote_ranks & taken)) return XD_MISMATCH;
    distant *d = &p->hosts[p->num_hosts++];
    *d = (distant){.connection = c, .host = host, .ranks = remote_ranks};
    for (int r = 0; r < XD_MAX_RANKS; r++) d->lanes[r].round = 1;
    return XD_OK;
}

void xd_pump_close(xd_pump *p) {
    if (!p) return;
    munmap(p->shared, p->mapped_bytes);
    free(p);
}

int xd_pump_failure(const xd_pump *p, int *host, char *err, size_t errlen) {
    snprintf(err, errlen, "%s", p->reason);
    *host = p->failed_host;
    return p->failure;
}

void xd_pump_statistics(const xd_pump *p, uint64_t *num_rounds, uint64_t *carried_ns) {
    *num_rounds = p->num_rounds;
    *carried_ns = p->carried_ns;
}

/* Failure: the first is kept here and told at the end of the run. */

static int fail(xd_pump *p, int code, distant *from, const char *format, ...) __attribute__((format(printf, 4, 5)));

static int fail(xd_pump *p, int code, distant *from, const char *format, ...) {
    va_list arguments;
    if (from) from->gone = true;
    if (p->failure) return code;
    va_start(arguments, format);
    vsnprintf(p->reason, sizeof p->reason, format, arguments);
    va_end(arguments);
    p->failure = code;
    if (from) p->failed_host = from->host;
    return code;
}

static int connection_failed(xd_pump *p, distant *d) {
    char reason[XD_REASON_BYTES];
    int code = xd_connection_failure(d->connection, reason, sizeof reason);
    return fail(p, code, d, "host %d: %s", d->host, reason);
}

/* Tell every host that does not know why the epoch ends, and listen until it hangs up. */
static void say_goodbye(xd_pump *p, const char *reason) {
    uint64_t start = now_ns(), now = start;
    xd_header end = {.kind = XD_END, .queue = XD_LATENCY, .length = (uint32_t)strlen(reason)}, header;
    bool told[XD_MAX_RANKS] = {false};
    const void *payload;
    for (int left = 1; left && now - start < GOODBYE_NS; now = now_ns()) {
        left = 0;
        for (int i = 0; i < p->num_hosts; i++) {
            distant *d = &p->hosts[i];
            if (d->gone) continue;
            int sent = told[i] ? XD_OK : xd_send(d->connection, &end, reason);
            int came = XD_OK;
            if (sent == XD_OK) told[i] = true;
            while (came == XD_OK && !d->gone) {
                came = xd_receive(d->connection, &header, &payload);
                if (came == XD_OK && header.kind == XD_END && told[i]) d->gone = true; /* it ends as we do */
            }
            if ((sent != XD_OK && sent != XD_AGAIN) || (came != XD_OK && came != XD_AGAIN)) d->gone = true;
            left += !d->gone;
        }
        if (left) rest(now - start);
    }
}

/* Sending. */

/* The round that a local rank published, if it is the lane's next one. */
static int next_round(xd_pump *p, int rank, lane *way, slot_head **slot) {
    *slot = slot_of(p->shared, rank, way->round);
    uint64_t found = slot_round(*slot);
    if (found == way->round) {
        if ((*slot)->bytes <= p->shared->slot_bytes) return XD_OK;
        return fail(p, XD_CORRUPT, NULL, "rank %d published %llu bytes in a slot of %llu", rank,
                    (unsigned long long)(*slot)->bytes, (unsigned long long)p->shared->slot_bytes);
    }
    if (found == (way->round > 2 ? way->round - 2 : 0)) return XD_AGAIN;
    return fail(p, XD_CORRUPT, NULL, "rank %d published round %llu before its round %llu was carried", rank,
                (unsigned long long)found, (unsigned long long)way->round);
}

/* Send what is left of a round, as far as the connection takes it: XD_OK when all of it is sent. */
static int send_round(xd_pump *p, distant *d, int rank, lane *way, slot_head *slot, bool *worked) {
    uint32_t total = (uint32_t)slot->bytes;
    bool bulk = total > LATENCY_MESSAGES * xd_max_payload(d->connection, XD_LATENCY);
    int queue = bulk ? XD_BULK : XD_LATENCY;
    size_t most = xd_max_payload(d->connection, queue);
    do {
        uint32_t left = total - way->sent, length = left < most ? left : (uint32_t)most;
        xd_header header = {
            .kind = XD_ROUND, .queue = (uint8_t)queue, .source = (uint8_t)rank, .tag = slot->tag,
            .round = way->round, .digest = slot->digest, .offset = way->sent, .total = total, .length = length,
        };
        int code = xd_send(d->connection, &header, slot_payload(slot) + way->sent);
        if (code == XD_AGAIN) return code;
        if (code) return connection_failed(p, d);
        if (bulk) d->bulk_used = true;
        way->sent += length;
        *worked = true;
    } while (way->sent < total);
    return XD_OK;
}

static int send_rounds(xd_pump *p, distant *d, uint64_t now, bool *worked) {
    for (int rank = 0; rank < p->shared->num_ranks; rank++) {
        lane *way = &d->lanes[rank];
        slot_head *slot;
        if (!is_in(p->local_ranks, rank)) continue;
        int code = next_round(p, rank, way, &slot);
        if (code == XD_OK) {
            if (!way->seen_ns) way->seen_ns = now;
            code = send_round(p, d, rank, way, slot, worked);
        }
        if (code == XD_AGAIN) continue;
        if (code) return code;
        p->num_rounds++;
        p->carried_ns += now_ns() - way->seen_ns;
        *way = (lane){.round = way->round + 1};
    }
    return XD_OK;
}

static int send_beats(xd_pump *p, distant *d, uint64_t now) {
    uint64_t beats[XD_MAX_RANKS];
    uint32_t num_beats = 0;
    for (int queue = 0; queue < XD_NUM_QUEUES; queue++) {
        if (now < d->beat_due_ns[queue] || (queue == XD_BULK && !d->bulk_used)) continue;
        num_beats = 0;
        for (int r = 0; r < p->shared->num_ranks; r++) {
            if (!is_in(p->local_ranks, r)) continue;
            beats[num_beats++] = atomic_load_explicit(&p->shared->ranks[r].beat, memory_order_relaxed);
        }
        xd_header header = {.kind = XD_BEAT, .queue = (uint8_t)queue, .length = num_beats * 8};
        int code = xd_send(d->connection, &header, beats);
        if (code == XD_AGAIN) continue; /* no credit: it goes out as soon as there is some */
        if (code) return connection_failed(p, d);
        d->beat_due_ns[queue] = now + BEAT_NS;
    }
    return XD_OK;
}

/* Receiving. */

static int corrupt(xd_pump *p, distant *d, const xd_header *header, const char *what) {
    return fail(p, XD_CORRUPT, d, "host %d: a piece of rank %d's round %llu, bytes %u to %llu of %u: %s", d->host,
                header->source, (unsigned long long)header->round, header->offset,
                (unsigned long long)header->offset + header->length, header->total, what);
}

/* Has every local rank published `round`? Then none of them reads what was published before it. */
static bool all_published(xd_pump *p, uint64_t round) {
    for (int r = 0; r < p->shared->num_ranks; r++) {
        if (!is_in(p->local_ranks, r)) continue;
        if (slot_round(slot_of(p->shared, r, round)) < round && slot_round(slot_of(p->shared, r, round + 1)) < round)
            return false;
    }
    return true;
}

static int take_piece(xd_pump *p, distant *d, const xd_header *header, const void *payload) {
    if (header->source >= p->shared->num_ranks || !is_in(d->ranks, header->source))
        return corrupt(p, d, header, "that rank is not there");
    arrival *a = &p->arrivals[header->source][header->round & 1];
    slot_head *slot = slot_of(p->shared, header->source, header->round);
    if (header->round != a->round) return corrupt(p, d, header, "out of order");
    if (!a->begun) {
        if (header->total > p->shared->slot_bytes) return corrupt(p, d, header, "larger than a slot");
        if (!all_published(p, header->round - 1)) return corrupt(p, d, header, "its slot is not free yet");
        *a = (arrival){.round = a->round, .begun = true, .total = header->total};
        slot->tag = header->tag;
        slot->digest = header->digest;
        slot->bytes = header->total;
    } else if (header->total != a->total || header->tag != slot->tag || header->digest != slot->digest) {
        return corrupt(p, d, header, "not of the round that its first piece began");
    }
    if (header->offset != a->filled || header->length > a->total - a->filled || (a->total && !header->length))
        return corrupt(p, d, header, "does not follow the piece before");
    if (header->length) memcpy(slot_payload(slot) + a->filled, payload, header->length);
    a->filled += header->length;
    if (a->filled < a->total) return XD_OK;
    atomic_store_explicit(&slot->round, a->round, memory_order_release);
    *a = (arrival){.round = a->round + 2};
    return XD_OK;
}

/* A rank's beat stays 0 until it has opened its mailbox, here as there. */
static int take_beats(xd_pump *p, distant *d, const xd_header *header, const void *payload) {
    uint32_t taken = 0;
    for (int r = 0; r < p->shared->num_ranks; r++) {
        uint64_t beat;
        if (!is_in(d->ranks, r)) continue;
        if (header->length < taken + sizeof beat) return corrupt(p, d, header, "pulses of too few ranks");
        memcpy(&beat, (const char *)payload + taken, sizeof beat);
        taken += sizeof beat;
        atomic_store_explicit(&p->shared->ranks[r].beat, beat, memory_order_relaxed);
    }
    return taken == header->length ? XD_OK : corrupt(p, d, header, "pulses of too many ranks");
}

static int take_end(xd_pump *p, distant *d, const xd_header *header, const void *payload) {
    char reason[XD_REASON_BYTES] = "";
    size_t n = header->length < sizeof reason ? header->length : sizeof reason - 1;
    memcpy(reason, payload, n);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)reason[i] < ' ' || reason[i] == 127) reason[i] = '?'; /* it is shown on a terminal */
    return fail(p, XD_POISONED, d, "host %d: %s", d->host, reason);
}

static int receive(xd_pump *p, distant *d, uint64_t now, bool *worked) {
    xd_header header;
    const void *payload;
    for (int i = 0; i < BATCH; i++) {
        int code = xd_receive(d->connection, &header, &payload);
        if (code == XD_AGAIN) return XD_OK;
        if (code) return connection_failed(p, d);
        d->heard_ns = now;
        switch (header.kind) {
        case XD_ROUND:
            code = take_piece(p, d, &header, payload);
            *worked = true;
            break;
        case XD_BEAT: code = take_beats(p, d, &header, payload); break;
        case XD_END: code = take_end(p, d, &header, payload); break;
        case XD_TEST: break; /* the last of the warm-up */
        default: code = corrupt(p, d, &header, "of a kind that ends at a connection");
        }
        if (code) return code;
    }
    *worked = true;
    return XD_OK;
}

/* The loop. */

/* After a pause of our own (a suspended laptop stops both ends) the peers' silence is ours: start afresh. */
static void notice_pause(xd_pump *p, uint64_t now) {
    if (now - p->turned_ns > p->silence_ns / 2) {
        for (int i = 0; i < p->num_hosts; i++) p->hosts[i].heard_ns = now;
    }
    p->turned_ns = now;
    uint64_t beat = atomic_load_explicit(&p->shared->link_beat, memory_order_relaxed);
    atomic_store_explicit(&p->shared->link_beat, beat + 1, memory_order_relaxed);
}

static int watch_host(xd_pump *p, uint64_t now) {
    if (now >= p->lifeline_due_ns) {
        struct pollfd lifeline = {.fd = p->lifeline_fd, .events = POLLIN}; /* poll skips negative descriptors */
        p->lifeline_due_ns = now + LIFELINE_NS;
        if (poll(&lifeline, 1, 0) > 0) return fail(p, XD_CLOSED, NULL, "the supervisor is gone");
    }
    if (!atomic_load_explicit(&p->shared->poisoned, memory_order_acquire)) return XD_OK;
    const char *reason = xd_poison_reason(p->shared);
    return fail(p, XD_POISONED, NULL, "%s", *reason ? reason : "a rank or the supervisor ended this epoch");
}

static int turn(xd_pump *p, uint64_t now, bool *worked) {
    notice_pause(p, now);
    /* Asked before the sending: what a rank published before it poisoned the epoch goes out ahead of the end, and
     * lets a distant rank find the same mistake as the near one. */
    int end = watch_host(p, now), code = XD_OK;
    for (int i = 0; i < p->num_hosts && !code; i++) code = send_rounds(p, &p->hosts[i], now, worked);
    if (end || code) return end ? end : code;
    for (int i = 0; i < p->num_hosts; i++) {
        distant *d = &p->hosts[i];
        if ((code = receive(p, d, now, worked))) return code;
        if (now - d->heard_ns > p->silence_ns)
            return fail(p, XD_SILENT, d, "nothing heard from host %d for %.1f s", d->host, (double)p->silence_ns * 1e-9);
        if ((code = send_beats(p, d, now))) return code;
    }
    return XD_OK;
}

int xd_pump_run(xd_pump *p, double run_s) {
    if (p->failure) return p->failure;
    uint64_t now = now_ns(), end = now + (uint64_t)(run_s * 1e9);
    for (;;) {
        bool worked = false;
        if (turn(p, now, &worked)) break;
        if (worked) p->busy_ns = now;
        else if (now - p->busy_ns < XD_SPIN_NS) spin_pause();
        else rest(now - p->busy_ns);
        now = now_ns();
        if (now >= end) return XD_TIMEOUT;
    }
    xd_poison(p->shared, p->reason);
    say_goodbye(p, xd_poison_reason(p->shared));
    return p->failure;
}
