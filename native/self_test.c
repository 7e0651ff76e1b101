/* self_test.c: does a new connection carry full-size frames, each way, on each queue, and how fast? Over any back end. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "connection.h"

enum { PAGE = 4096, HELLO = 1, HEARD = 2, THERE = 3, BACK = 4 }; /* the last four are tags of XD_TEST frames */

static const char *const NAMES[XD_NUM_QUEUES] = {"latency", "bulk"};

typedef struct {
    xd_connection *c;
    int queue;
    uint64_t deadline_ns;
    char *payload; /* a full frame */
    size_t size;
} test;

/* XD_OK with t->payload of xd_max_payload bytes that differ from page to page and from place to place. */
static int begin(test *t, xd_connection *c, int queue, uint64_t deadline_ns) {
    *t = (test){.c = c, .queue = queue, .deadline_ns = deadline_ns, .size = xd_max_payload(c, queue)};
    t->payload = malloc(t->size ? t->size : 1);
    if (!t->payload) return xd_connection_fail(c, XD_DEVICE, "self-test: out of memory");
    uint32_t x = 2463534242u + (uint32_t)queue;
    for (size_t i = 0; i < t->size; i++) {
        x ^= x << 13, x ^= x >> 17, x ^= x << 5; /* Marsaglia's xorshift32 */
        t->payload[i] = (char)x;
    }
    return XD_OK;
}

/* Make every page of the payload that of message `number`, so that an old page cannot pass for a new one. */
static void stamp(test *t, uint64_t number) {
    for (size_t at = 0; at + sizeof number <= t->size; at += PAGE) memcpy(t->payload + at, &number, sizeof number);
}

static uint64_t after(double timeout_s) { return xd_now_ns() + (uint64_t)(timeout_s * 1e9); }

static xd_header test_header(const test *t, uint32_t tag, uint64_t number) {
    return (xd_header){.kind = XD_TEST,
                       .queue = (uint8_t)t->queue,
                       .tag = tag,
                       .round = number,
                       .total = (uint32_t)t->size,
                       .length = (uint32_t)t->size};
}

static int post(test *t, uint32_t tag, uint64_t number) {
    const xd_header header = test_header(t, tag, number);
    uint64_t start = xd_now_ns(), now = start;
    int code;
    while ((code = xd_send(t->c, &header, t->payload)) == XD_AGAIN && now < t->deadline_ns) {
        xd_rest(now - start);
        now = xd_now_ns();
    }
    return code;
}

/* Wait for one test frame and lay it over `payload`. XD_AGAIN when the deadline came first. */
static int await(test *t, uint32_t tag, uint64_t number, char *payload) {
    xd_header header;
    const void *bytes;
    uint64_t start = xd_now_ns(), now = start;
    int code;
    while ((code = xd_receive(t->c, &header, &bytes)) == XD_AGAIN && now < t->deadline_ns) {
        xd_rest(now - start);
        now = xd_now_ns();
    }
    if (code) return code;
    if (header.kind != XD_TEST || header.queue != t->queue || header.tag != tag || header.round != number ||
        header.length != t->size)
        return xd_connection_fail(t->c, XD_MISMATCH,
                                  "self-test: found kind %u, queue %u, step %u, message %llu; wanted step %u of "
                                  "queue %d, message %llu",
                                  header.kind, header.queue, header.tag, (unsigned long long)header.round, tag,
                                  t->queue, (unsigned long long)number);
    memcpy(payload, bytes, t->size);
    return XD_OK;
}

/* Wait until all is out, then free. XD_AGAIN when the deadline came first. */
static int finish(test *t, int code) {
    uint64_t start = xd_now_ns(), now = start;
    while (code == XD_OK && (code = xd_connection_flush(t->c)) != XD_OK && now < t->deadline_ns) {
        const void *bytes;
        xd_header header;
        if (code == XD_CLOSED) code = xd_receive(t->c, &header, &bytes); /* which says why */
        if (code == XD_AGAIN) code = XD_OK;
        xd_rest(now - start);
        now = xd_now_ns();
    }
    free(t->payload);
    return code;
}

/* How far the warm-up of one queue is. A direction is proven when HELLO went through it, which HEARD says. */
typedef struct {
    test t;
    bool hello_sent, heard_sent, hello_came, heard_came;
} warming;

static bool warm(const warming *w) { return w->hello_sent && w->heard_sent && w->hello_came && w->heard_came; }

static const char *missing(const warming *w) {
    if (!w->hello_sent) return "nothing can be sent to the peer";
    if (!w->hello_came) return "nothing comes from the peer";
    return w->heard_came ? "nothing more can be sent to the peer" : "the peer lives but does not hear us";
}

/* Send one step of the warm-up if it is due. XD_OK, also when there is no room for it yet, or the failure. */
static int say(warming *w, bool due, bool *sent, uint32_t tag) {
    if (!due || *sent) return XD_OK;
    const xd_header header = test_header(&w->t, tag, 0);
    int code = xd_send(w->t.c, &header, w->t.payload);
    *sent = code == XD_OK;
    return code == XD_AGAIN ? XD_OK : code;
}

/* Take one frame of the warm-up, of any queue. XD_AGAIN when there is none. */
static int hear(xd_connection *c, warming *all) {
    xd_header header;
    const void *bytes;
    int code = xd_receive(c, &header, &bytes);
    if (code) return code;
    warming *w = &all[header.queue];
    bool in_order = header.tag == HELLO ? !w->hello_came : header.tag == HEARD && w->hello_came && !w->heard_came;
    if (header.kind != XD_TEST || !in_order || header.length != w->t.size)
        return xd_connection_fail(c, XD_MISMATCH, "warm-up: found kind %u, queue %u, step %u, %u bytes", header.kind,
                                  header.queue, header.tag, header.length);
    if (header.tag == HELLO) w->hello_came = true;
    if (header.tag == HEARD) w->heard_came = true;
    return XD_OK;
}

static int warm_up(xd_connection *c, warming *all, uint64_t deadline_ns) {
    uint64_t start = xd_now_ns(), now = start;
    int code = XD_OK;
    while (code == XD_OK || code == XD_AGAIN) {
        bool done = true;
        for (int queue = XD_NUM_QUEUES - 1; queue >= 0; queue--) {
            warming *w = &all[queue];
            if ((code = say(w, true, &w->hello_sent, HELLO))) return code;
            if ((code = say(w, w->hello_came && w->hello_sent, &w->heard_sent, HEARD))) return code;
            done = done && warm(w);
            if (now >= deadline_ns && !warm(w))
                return xd_connection_fail(c, XD_TIMEOUT, "warm-up: queue %s: %s", NAMES[queue], missing(w));
        }
        if (done) return XD_OK;
        if ((code = hear(c, all)) == XD_AGAIN) xd_rest(now - start);
        now = xd_now_ns();
    }
    return code;
}

/* Each end says HELLO on each queue, and HEARD when it got the other's. All queues at once, for over verbs they do not wait
 * for each other: what was sent later on one may come earlier than what was sent before it on another. */
int xd_warm_up(xd_connection *c, double timeout_s) {
    warming all[XD_NUM_QUEUES] = {0};
    uint64_t deadline_ns = after(timeout_s);
    int code = XD_OK;
    for (int queue = 0; queue < XD_NUM_QUEUES && code == XD_OK; queue++)
        code = begin(&all[queue].t, c, queue, deadline_ns);
    if (code == XD_OK) code = warm_up(c, all, deadline_ns);
    for (int queue = 0; queue < XD_NUM_QUEUES; queue++) code = finish(&all[queue].t, code);
    return code == XD_AGAIN ? xd_connection_fail(c, XD_TIMEOUT, "warm-up: nothing more can be sent to the peer") : code;
}

static int ping(test *t, uint64_t number, char *answer, double *round_trip_us) {
    stamp(t, number);
    uint64_t start = xd_now_ns();
    int code = post(t, THERE, number);
    if (code == XD_OK) code = await(t, BACK, number, answer);
    *round_trip_us = (double)(xd_now_ns() - start) / 1e3;
    if (code == XD_OK && memcmp(answer, t->payload, t->size) != 0)
        return xd_connection_fail(t->c, XD_CORRUPT, "self-test: message %llu came back changed",
                                  (unsigned long long)number);
    return code;
}

static int answer(test *t, uint64_t number) {
    int code = await(t, THERE, number, t->payload);
    return code ? code : post(t, BACK, number);
}

int xd_self_test(xd_connection *c, int first, int queue, int num_messages, double timeout_s, double *round_trip_us) {
    test t;
    if (queue < 0 || queue >= XD_NUM_QUEUES)
        return xd_connection_fail(c, XD_TOO_LARGE, "self-test: no queue %d", queue);
    int code = begin(&t, c, queue, after(timeout_s));
    if (code) return code;
    char *back = malloc(t.size ? t.size : 1);
    if (!back) code = xd_connection_fail(c, XD_DEVICE, "self-test: out of memory");
    for (int i = 0; i < num_messages && code == XD_OK; i++)
        code = first ? ping(&t, (uint64_t)i + 1, back, &round_trip_us[i]) : answer(&t, (uint64_t)i + 1);
    free(back);
    code = finish(&t, code);
    if (code == XD_AGAIN) code = xd_connection_fail(c, XD_TIMEOUT, "self-test: no answer in %.3f s", timeout_s);
    return code;
}
