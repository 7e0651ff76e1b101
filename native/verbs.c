/* verbs.c: the data path over RDMA verbs; see verbs.h for the contract and verbs_setup.c for what was set up.
 *
 * Theory of operation. Each queue of the connection is a UC queue pair whose messages all have the same number of
 * 4 KiB frames, for on Apple a send and the receive that it lands in must cover the same number; so the whole slot is
 * always sent, whatever the frame's length. All receives of a queue are posted at the start and each is posted again
 * on release. The credits of transport.c (a frame for each receive, two more for bare credits) keep a send from ever
 * meeting an empty queue, which on Apple may stop that direction for good.
 *
 * A completed send says nothing about the peer: it only gives back the slot it left from. A peer that died shows in
 * no completion either, so while nothing comes the side socket is looked at: its end is the peer's end.
 *
 * One copy. `post` copies header and payload into the slot. A frame needs its header in front of it in memory,
 * because a message has one SGE, and one that is owned by the device until its send completes; the payload lies in a
 * mailbox that the next round overwrites. The copy of the 16 KiB of a decode step takes 0.9 us from the cache
 * (measured on a virtual x86-64 machine), beside some 7 us of wire.
 *
 * What a provider gives back is not believed more than needed: any non-zero return of a post is a failure, whatever
 * its sign and bad_wr; a completion is known by its wr_id, which we chose, not by its opcode, which is 0 in errors. */

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "verbs_private.h"

#if XD_HAVE_VERBS

#define LOOK_POLLS 64u    /* empty polls between two looks at the clock: below 1 ns for each */
#define LOOK_NS 100000ull /* between two looks at the side socket, a system call of 0.2 us */
#define BATCH 16          /* completions taken at once */
/* After this, ask for the port's state before posting: on Apple a post to a port that is gone is a segmentation
 * fault. */
#define IDLE_NS 1000000000ull

enum { SEND = 1, RECEIVE = 2 };
#define WR_MAGIC 0x78640000ull

static const char *const QUEUE_NAMES[XD_NUM_QUEUES] = {"latency", "bulk"};

static uint64_t wr_id(int kind, int queue, uint32_t slot) {
    return WR_MAGIC << 32 | (uint64_t)kind << 16 | (uint64_t)queue << 8 | slot;
}

/* What a non-zero return of a post is; -12 and 12 are the same. */
static void refusal(const xd_verbs *v, int queue, const char *what, int result, uint32_t in_flight, char *err,
                    size_t errlen) {
    int code = xd_verbs_errno(result);
    const xd_verbs_queue *q = &v->queues[queue];
    snprintf(err, errlen, "verbs: device %s, queue %s: posting a %s failed (%d, %s) with %u of %u frames in flight",
             v->name, QUEUE_NAMES[queue], what, result, code == ENOMEM ? "queue full" : strerror(code),
             in_flight * q->frames, q->budget);
}

/* Receiving. */

int xd_verbs_post_receive(xd_verbs *v, int queue, uint32_t slot, char *err, size_t errlen) {
    xd_verbs_queue *q = &v->queues[queue];
    struct ibv_sge sge = {.addr = (uintptr_t)xd_verbs_slot(&v->rx, q, slot),
                          .length = (uint32_t)xd_verbs_class_bytes(q),
                          .lkey = v->rx.mr->lkey};
    struct ibv_recv_wr wr, *bad = NULL;
    memset(&wr, 0, sizeof wr);
    wr.wr_id = wr_id(RECEIVE, queue, slot);
    wr.sg_list = &sge;
    wr.num_sge = 1;
    const char *breach = v->lint ? xd_lint_receive(v, queue, &wr) : NULL;
    if (breach) {
        snprintf(err, errlen, "lint: %s", breach);
        return XD_DEVICE;
    }
    errno = 0;
    int result = v->context->ops.post_recv(q->qp, &wr, &bad);
    if (result != 0) {
        refusal(v, queue, "receive", result, q->receives, err, errlen);
        return XD_DEVICE;
    }
    q->posted[slot] = true;
    q->receives++;
    return XD_OK;
}

static const char *status_hint(int status) {
    switch (status) {
    case IBV_WC_LOC_LEN_ERR:
        return "local length error: the ends use messages of different sizes, or the device was given more than it "
               "holds";
    case IBV_WC_LOC_QP_OP_ERR:
        return "local queue pair error: a message did not fit, or the cable was pulled";
    case IBV_WC_LOC_PROT_ERR:
        return "local protection error: the driver tore the queues down";
    case IBV_WC_WR_FLUSH_ERR:
        return "flushed: the queue pair had failed before, or the cable was pulled";
    default:
        return "see enum ibv_wc_status";
    }
}

static int taken_send(xd_connection *c, xd_verbs_queue *q, uint32_t slot) {
    if (!q->sending[slot]) return xd_connection_fail(c, XD_DEVICE, "verbs: a send completed that was not posted");
    q->sending[slot] = false;
    q->sends--;
    q->free[q->num_free++] = (uint8_t)slot;
    return XD_OK;
}

static int taken_receive(xd_connection *c, xd_verbs *v, int queue, uint32_t slot, uint32_t bytes) {
    xd_verbs_queue *q = &v->queues[queue];
    if (!q->posted[slot]) return xd_connection_fail(c, XD_DEVICE, "verbs: a receive completed that was not posted");
    q->posted[slot] = false;
    q->receives--;
    if (bytes < XD_HEADER_BYTES || bytes > xd_verbs_class_bytes(q))
        return xd_connection_fail(c, XD_CORRUPT, "verbs: queue %s: a message of %u bytes came, wanted %d to %zu",
                                  QUEUE_NAMES[queue], bytes, XD_HEADER_BYTES, xd_verbs_class_bytes(q));
    const char *breach = v->lint ? xd_lint_arrival(v, queue, bytes) : NULL;
    if (breach) return xd_connection_fail(c, XD_DEVICE, "lint: %s", breach);
    const uint32_t capacity = sizeof v->arrived / sizeof *v->arrived;
    v->arrived[(v->arrived_head + v->num_arrived++) % capacity] = (xd_arrival){(uint8_t)queue, (uint8_t)slot, bytes};
    return XD_OK;
}

static int take(xd_connection *c, const struct ibv_wc *wc) {
    xd_verbs *v = c->state;
    int kind = (int)(wc->wr_id >> 16 & 0xff), queue = (int)(wc->wr_id >> 8 & 0xff);
    uint32_t slot = wc->wr_id & 0xff;
    if (wc->wr_id >> 32 != WR_MAGIC || (kind != SEND && kind != RECEIVE) || queue >= XD_NUM_QUEUES ||
        slot >= XD_MAX_SLOTS)
        return xd_connection_fail(c, XD_DEVICE, "verbs: device %s completed work that is not ours (wr_id %llx)",
                                  v->name, (unsigned long long)wc->wr_id);
    if (wc->status != IBV_WC_SUCCESS)
        return xd_connection_fail(c, XD_DEVICE, "verbs: device %s, queue %s: a %s ended with status %d (%s)", v->name,
                                  QUEUE_NAMES[queue], kind == SEND ? "send" : "receive", (int)wc->status,
                                  status_hint((int)wc->status));
    return kind == SEND ? taken_send(c, &v->queues[queue], slot) : taken_receive(c, v, queue, slot, wc->byte_len);
}

/* Take all completions from the device; their number or a recorded failure. */
static int collect(xd_connection *c) {
    xd_verbs *v = c->state;
    struct ibv_wc wc[BATCH];
    int num, total = 0;
    do {
        num = v->context->ops.poll_cq(v->cq, BATCH, wc);
        if (num < 0 || num > BATCH)
            return xd_connection_fail(c, XD_DEVICE, "verbs: device %s: asking for completions failed (%d)", v->name,
                                      num);
        for (int i = 0; i < num; i++) {
            int code = take(c, &wc[i]);
            if (code != XD_OK) return code;
        }
        total += num;
    } while (num == BATCH);
    return total;
}

/* Nothing came: now and then see whether the peer is still there. */
static int look_aside(xd_connection *c) {
    xd_verbs *v = c->state;
    char byte;
    if (v->side_fd < 0 || ++v->empty_polls % LOOK_POLLS != 0) return XD_AGAIN;
    uint64_t now = xd_now_ns();
    if (now - v->looked_ns < LOOK_NS) return XD_AGAIN;
    v->looked_ns = now;
    ssize_t n = recv(v->side_fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))) return XD_AGAIN;
    int error = n < 0 ? errno : 0, num = collect(c); /* what came before the end, its reason among it, goes first */
    if (num != 0) return num < 0 ? num : XD_OK;
    return xd_connection_fail(c, XD_CLOSED, "the peer closed the side connection%s%s", error ? ": " : "",
                              error ? strerror(error) : "");
}

static int verbs_poll(xd_connection *c, int *queue, const void **bytes, size_t *n) {
    xd_verbs *v = c->state;
    if (v->num_arrived == 0) {
        int num = collect(c);
        if (num < 0) return num;
        if (num == 0 && (num = look_aside(c)) != XD_OK) return num;
        if (v->num_arrived == 0) return XD_AGAIN;
    }
    xd_arrival *first = &v->arrived[v->arrived_head];
    v->arrived_head = (v->arrived_head + 1) % (sizeof v->arrived / sizeof *v->arrived);
    v->num_arrived--;
    v->held = first->slot;
    *queue = first->queue;
    *bytes = xd_verbs_slot(&v->rx, &v->queues[first->queue], first->slot);
    *n = first->bytes;
    return XD_OK;
}

static int verbs_release(xd_connection *c, int queue) {
    char why[200];
    xd_verbs *v = c->state;
    int code = xd_verbs_post_receive(v, queue, v->held, why, sizeof why);
    return code == XD_OK ? XD_OK : xd_connection_fail(c, code, "%s", why);
}

/* Sending. */

/* After a while without traffic, ask whether the port is still there. That narrows the race with a pulled cable and
 * cannot close it; the process that runs this must be one that may die. */
static int check_port(xd_connection *c, xd_verbs *v) {
    uint64_t now = xd_now_ns(), heard = c->statistics.last_heard_ns;
    uint64_t last = heard > v->posted_ns ? heard : v->posted_ns;
    v->posted_ns = now;
    if (now < last + IDLE_NS) return XD_OK;
    struct ibv_port_attr port;
    int code = xd_verbs_port(&v->api, v->context, &port);
    if (code == 0 && port.state == IBV_PORT_ACTIVE) return XD_OK;
    return xd_connection_fail(c, XD_DEVICE,
                              "verbs: device %s: its port is not active any more (state %d): check the cable",
                              v->name, code == 0 ? (int)port.state : -code);
}

static int post_send(xd_connection *c, int queue, uint32_t slot) {
    xd_verbs *v = c->state;
    xd_verbs_queue *q = &v->queues[queue];
    struct ibv_sge sge = {.addr = (uintptr_t)xd_verbs_slot(&v->tx, q, slot),
                          .length = (uint32_t)xd_verbs_class_bytes(q),
                          .lkey = v->tx.mr->lkey};
    struct ibv_send_wr wr, *bad = NULL;
    memset(&wr, 0, sizeof wr);
    wr.wr_id = wr_id(SEND, queue, slot);
    wr.sg_list = &sge;
    wr.num_sge = 1;
    wr.opcode = IBV_WR_SEND;
    wr.send_flags = IBV_SEND_SIGNALED;
    const char *breach = v->lint ? xd_lint_send(v, queue, &wr) : NULL;
    if (breach) return xd_connection_fail(c, XD_DEVICE, "lint: %s", breach);
    errno = 0;
    int result = v->context->ops.post_send(q->qp, &wr, &bad);
    if (result == 0) return XD_OK;
    char why[200];
    refusal(v, queue, "send", result, q->sends, why, sizeof why);
    return xd_connection_fail(c, XD_DEVICE, "%s", why);
}

static int verbs_post(xd_connection *c, int queue, const xd_header *header, const void *payload) {
    xd_verbs *v = c->state;
    xd_verbs_queue *q = &v->queues[queue];
    if (q->num_free == 0) {
        int num = collect(c);
        if (num < 0) return num;
        if (q->num_free == 0) return XD_AGAIN;
    }
    int code = check_port(c, v);
    if (code != XD_OK) return code;
    uint32_t slot = q->free[q->num_free - 1];
    char *to = xd_verbs_slot(&v->tx, q, slot);
    memcpy(to, header, XD_HEADER_BYTES);
    if (header->length) memcpy(to + XD_HEADER_BYTES, payload, header->length);
    code = post_send(c, queue, slot);
    if (code != XD_OK) return code;
    q->num_free--;
    q->sending[slot] = true;
    q->sends++;
    return XD_OK;
}

/* Life. */

/* A queue pair that is destroyed forgets what it has not sent, the reason for the end perhaps: wait a little. */
static void drain(xd_connection *c, const xd_verbs *v) {
    const uint64_t end = xd_now_ns() + 20000000ull;
    while (!c->failure && v->queues[XD_LATENCY].sends + v->queues[XD_BULK].sends > 0 && xd_now_ns() < end)
        if (collect(c) < 0) return;
}

static void verbs_close(xd_connection *c) {
    drain(c, c->state);
    xd_verbs_close(c->state);
}

static const xd_backend BACKEND = {
    .post = verbs_post, .poll = verbs_poll, .release = verbs_release, .close = verbs_close};

xd_connection *xd_verbs_start(xd_verbs *v, uint32_t epoch, int side_fd, char *err, size_t errlen) {
    xd_connection *c = v->ready ? xd_connection_new(epoch) : NULL;
    if (!c) {
        snprintf(err, errlen, "verbs: device %s: %s", v->name, v->ready ? "out of memory" : "it was not connected");
        xd_verbs_close(v);
        return NULL;
    }
    v->side_fd = side_fd;
    v->posted_ns = v->looked_ns = xd_now_ns();
    for (int i = 0; i < XD_NUM_QUEUES; i++) {
        const xd_verbs_queue *q = &v->queues[i];
        uint32_t theirs = v->remote.depth[i], grant = theirs < q->depth ? theirs : q->depth;
        c->queues[i].max_payload = xd_verbs_class_bytes(q) - XD_HEADER_BYTES;
        /* The lower of the two both ways: each end has slots to send from for its own depth only, and the other must
         * give credits back before those are used up. */
        c->queues[i].grant = c->queues[i].our_grant = grant;
    }
    c->backend = &BACKEND;
    c->state = v;
    return c;
}

#endif
