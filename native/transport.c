/* transport.c: what is the same over every wire; see transport.h for the contract and connection.h for the seam.
 *
 * Theory of operation. Each queue has, per direction, a sequence (every frame counts) and credits (every frame but
 * XD_CREDIT counts). A receiver lets its peer have `our_grant` frames that it has not yet taken; "taken" means that the
 * frame was released, so that behind verbs its receive is posted again. How many were taken, ever, modulo 2^32, rides in
 * every header of that queue. When half of the grant is owed and nothing rode along, a bare XD_CREDIT goes out.
 *
 * Why two reserved receives are enough for bare credits. They need no credit, so the peer must have room for all of
 * them that it has not taken: never more than two. With grant G, each bare credit tells of at least h = ceil(G / 2) more
 * frames than what was told before it. Let T be what the peer knew before the first of three consecutive ones. When the
 * third is sent we have taken at least T + 3 h > T + G frames. The peer may send a frame beyond T + G only after it learned
 * of more than T, so after it took the first bare credit or a later frame of this queue; and as a queue keeps its order,
 * in either case it has taken the first, and posted its receive again before it sent anything. So when the third goes
 * out, at most the second is still there.
 *
 * Order. Frames of one queue arrive in order. Frames of two queues do over TCP, which is one stream, but not over verbs:
 * there, both ends meet at a barrier of the side connection between the self-test and use. */

#define _GNU_SOURCE
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "connection.h"

#define SPIN_NS 50000ull
#define YIELD_NS 200000ull
#define MAX_SLEEP_NS 1000000ull
#define MAX_UNSEEN 64 /* credits and duplicates that one xd_receive works through, so that it ends whatever comes */

static const char *const QUEUE_NAMES[XD_NUM_QUEUES] = {"latency", "bulk"};

uint64_t xd_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

void xd_rest(uint64_t waited_ns) {
    if (waited_ns < SPIN_NS) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb"); /* see mailbox.c */
#endif
    } else if (waited_ns < YIELD_NS) {
        sched_yield();
    } else {
        uint64_t nap = waited_ns / 16;
        nanosleep(&(struct timespec){.tv_nsec = (long)(nap < MAX_SLEEP_NS ? nap : MAX_SLEEP_NS)}, NULL);
    }
}

/* A connection's life. */

xd_connection *xd_connection_new(uint32_t epoch) {
    xd_connection *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    c->epoch = epoch;
    c->statistics.last_heard_ns = xd_now_ns();
    return c;
}

void xd_connection_close(xd_connection *c) {
    if (!c) return;
    if (c->backend) c->backend->close(c);
    free(c);
}

int xd_connection_fail(xd_connection *c, int code, const char *format, ...) {
    if (c->failure) return c->failure;
    c->failure = code;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(c->reason, sizeof c->reason, format, arguments);
    va_end(arguments);
    return code;
}

int xd_connection_failure(const xd_connection *c, char *err, size_t errlen) {
    snprintf(err, errlen, "%s", c->reason);
    return c->failure;
}

void xd_connection_statistics(const xd_connection *c, xd_statistics *out) { *out = c->statistics; }

size_t xd_max_payload(const xd_connection *c, int queue) {
    return queue < 0 || queue >= XD_NUM_QUEUES ? 0 : c->queues[queue].max_payload;
}

/* Sending. */

/* Give a sealed frame to the back end; what it carries is counted only when it is taken. */
static int post(xd_connection *c, xd_header *header, const void *payload) {
    xd_queue *q = &c->queues[header->queue];
    header->sequence = q->sent + 1;
    header->credits = q->taken;
    xd_frame_seal(header, c->epoch, payload);
    int code = c->backend->post(c, header->queue, header, payload);
    if (code) return code;
    q->sent++;
    q->told = q->taken;
    c->statistics.sent_frames++;
    c->statistics.sent_bytes += header->length;
    return XD_OK;
}

int xd_connection_flush(xd_connection *c) {
    if (c->failure) return c->failure;
    return c->backend->flush ? c->backend->flush(c) : XD_OK;
}

/* Release the frame in the caller's hands; only now is its credit owed. */
static int let_go(xd_connection *c) {
    if (!c->holds_frame) return XD_OK;
    c->holds_frame = false;
    int code = c->backend->release(c, c->held_queue);
    if (code == XD_OK && c->held_counts) c->queues[c->held_queue].taken++;
    return code;
}

/* Send the bare credits that are due. No room is no failure: every later call tries again. */
static int send_credits(xd_connection *c) {
    for (int queue = 0; queue < XD_NUM_QUEUES; queue++) {
        xd_queue *q = &c->queues[queue];
        if (q->taken - q->told < (q->our_grant + 1) / 2 || xd_connection_flush(c) != XD_OK) continue;
        xd_header header = {.kind = XD_CREDIT, .queue = (uint8_t)queue};
        int code = post(c, &header, NULL);
        if (code && code != XD_AGAIN) return code;
    }
    return XD_OK;
}

int xd_connection_settle(xd_connection *c) {
    if (c->failure) return c->failure;
    int code = let_go(c);
    return code ? code : send_credits(c);
}

int xd_send(xd_connection *c, const xd_header *header, const void *payload) {
    if (c->failure) return c->failure;
    if (header->queue >= XD_NUM_QUEUES || header->kind < XD_ROUND || header->kind > XD_TEST ||
        header->kind == XD_CREDIT || header->length > c->queues[header->queue].max_payload)
        return xd_connection_fail(c, XD_TOO_LARGE, "cannot send a frame of kind %u with %u bytes on queue %u",
                                  header->kind, header->length, header->queue);
    int code = let_go(c);
    if (code) return code;
    xd_queue *q = &c->queues[header->queue];
    if (q->spent - q->returned >= q->grant) {
        c->statistics.starved++;
        return XD_AGAIN;
    }
    if (xd_connection_flush(c) != XD_OK) return XD_AGAIN; /* before the cost of a checksum */
    xd_header sealed = *header;
    code = post(c, &sealed, payload);
    if (code == XD_OK) q->spent++;
    return code;
}

/* Receiving. */

static int apply_credits(xd_connection *c, const xd_header *header) {
    xd_queue *q = &c->queues[header->queue];
    if (header->credits - q->returned > q->spent - q->returned)
        return xd_connection_fail(c, XD_CORRUPT, "queue %s: the peer took %u frames, of %u that were sent",
                                  QUEUE_NAMES[header->queue], header->credits, q->spent);
    q->returned = header->credits;
    return XD_OK;
}

/* Believe a frame or not: XD_OK; XD_AGAIN for a duplicate, which is to be dropped; or a recorded failure. */
static int accept_frame(xd_connection *c, int queue, const void *bytes, size_t n, xd_header *header) {
    char why[160];
    xd_queue *q = &c->queues[queue];
    int code = xd_frame_read(bytes, n, c->epoch, q->max_payload, header, why, sizeof why);
    if (code == XD_AGAIN)
        return xd_connection_fail(c, XD_CORRUPT, "queue %s: a frame of %zu bytes ends too soon", QUEUE_NAMES[queue], n);
    if (code) return xd_connection_fail(c, code, "queue %s: %s", QUEUE_NAMES[queue], why);
    if (header->queue != queue)
        return xd_connection_fail(c, XD_CORRUPT, "queue %s: a frame of queue %u came", QUEUE_NAMES[queue],
                                  header->queue);
    c->statistics.last_heard_ns = xd_now_ns();
    if (header->sequence <= q->received) {
        c->statistics.duplicates++;
        return XD_AGAIN;
    }
    if (header->sequence != q->received + 1)
        return xd_connection_fail(c, XD_LOST, "queue %s: frame %llu came, wanted %llu", QUEUE_NAMES[queue],
                                  (unsigned long long)header->sequence, (unsigned long long)q->received + 1);
    if (header->kind != XD_CREDIT && q->taken - q->told >= q->our_grant)
        return xd_connection_fail(c, XD_CORRUPT, "queue %s: the peer sends more than the %u frames granted",
                                  QUEUE_NAMES[queue], q->our_grant);
    q->received++;
    c->statistics.received_frames++;
    c->statistics.received_bytes += header->length;
    return apply_credits(c, header);
}

int xd_receive(xd_connection *c, xd_header *header, const void **payload) {
    int code = xd_connection_settle(c);
    for (int unseen = 0; code == XD_OK && unseen < MAX_UNSEEN; unseen++) {
        const void *bytes;
        size_t n;
        int queue;
        if ((code = c->backend->poll(c, &queue, &bytes, &n))) return code;
        code = accept_frame(c, queue, bytes, n, header);
        if (code && code != XD_AGAIN) return code;
        c->holds_frame = true;
        c->held_queue = queue;
        c->held_counts = code == XD_OK && header->kind != XD_CREDIT;
        if (c->held_counts) {
            *payload = (const char *)bytes + XD_HEADER_BYTES;
            return XD_OK;
        }
        code = let_go(c);
    }
    return code ? code : XD_AGAIN;
}

/* The swap. */

typedef struct {
    const char *mine;
    char *theirs;
    size_t size, their_size, sent, came;
    bool is_out, is_in; /* all of ours posted; all of theirs here. An empty side is one empty frame. */
    uint32_t tag;
} swap;

static int send_piece(xd_connection *c, swap *s) {
    size_t left = s->size - s->sent, most = c->queues[XD_LATENCY].max_payload;
    xd_header header = {.kind = XD_ROUND,
                        .queue = XD_LATENCY,
                        .tag = s->tag,
                        .offset = (uint32_t)s->sent,
                        .total = (uint32_t)s->size,
                        .length = (uint32_t)(left < most ? left : most)};
    int code = xd_send(c, &header, s->mine ? s->mine + s->sent : NULL);
    if (code) return code;
    s->sent += header.length;
    s->is_out = s->sent == s->size;
    return XD_OK;
}

static int take_piece(xd_connection *c, swap *s) {
    xd_header header;
    const void *payload;
    int code = xd_receive(c, &header, &payload);
    if (code || header.kind == XD_BEAT) return code;
    if (header.kind == XD_END)
        return xd_connection_fail(c, XD_POISONED, "the peer ended the epoch: %.*s", (int)header.length,
                                  (const char *)payload);
    if (s->is_in || header.kind != XD_ROUND || header.tag != s->tag || header.offset != s->came ||
        header.total != s->their_size)
        return xd_connection_fail(c, XD_MISMATCH,
                                  "found kind %u, exchange %u, byte %u of %u; wanted exchange %u, byte %zu of %zu",
                                  header.kind, header.tag, header.offset, header.total, s->tag, s->came,
                                  s->their_size);
    if (header.length) memcpy(s->theirs + s->came, payload, header.length);
    s->came += header.length;
    s->is_in = s->came == s->their_size;
    return XD_OK;
}

/* All of a swap on the latency queue: its order is what tells this swap's frames from the next one's, and the other end
 * can begin the next one only when it has all of ours. */
int xd_swap(xd_connection *c, uint32_t tag, const void *mine, size_t size, void *theirs, size_t their_size,
            double timeout_s) {
    if (size > UINT32_MAX || their_size > UINT32_MAX)
        return xd_connection_fail(c, XD_TOO_LARGE, "exchange %u: %zu and %zu bytes, at most 4 GiB", tag, size, their_size);
    swap s = {.mine = mine, .theirs = theirs, .size = size, .their_size = their_size, .tag = tag};
    bool is_gone = false; /* the peer, before our last bytes were out: reading will say why */
    uint64_t start = 0;
    for (;;) {
        int sending = s.is_out ? XD_AGAIN : send_piece(c, &s);
        /* No look beyond the end: once our last bytes are out, what comes may be the next swap's. */
        int taking = s.is_in && s.is_out && !is_gone ? XD_AGAIN : take_piece(c, &s);
        if (sending && sending != XD_AGAIN) return sending;
        if (taking && taking != XD_AGAIN) return taking;
        if (s.is_out && s.is_in) {
            int left = xd_connection_flush(c);
            if (left == XD_OK) return xd_connection_settle(c);
            is_gone = left == XD_CLOSED;
        }
        uint64_t now = xd_now_ns();
        if (!start) start = now;
        if ((double)(now - start) > timeout_s * 1e9) /* also when much comes, but not what was wanted */
            return xd_connection_fail(c, XD_TIMEOUT, "exchange %u: %zu of %zu bytes came in %.3f s", tag, s.came,
                                      their_size, timeout_s);
        if (sending && taking) xd_rest(now - start);
    }
}
