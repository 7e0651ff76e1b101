/* self_test.c: does a new connection carry full-size frames, each way, on each queue, and how fast? Over any back end. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "connection.h"

enum { PAGE = 4096, HELLO = 1, HEARD = 2, THERE = 3, BACK = 4 }; /* the last four are tags of XD_TEST frames */

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

static int post(test *t, uint32_t tag, uint64_t number) {
    xd_header header = {.kind = XD_TEST,
                        .queue = (uint8_t)t->queue,
                        .tag = tag,
                        .round = number,
                        .total = (uint32_t)t->size,
                        .length = (uint32_t)t->size};
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

static int dead(test *t, int code, const char *which) {
    static const char *const NAMES[XD_NUM_QUEUES] = {"latency", "bulk"};
    if (code != XD_AGAIN) return code;
    return xd_connection_fail(t->c, XD_TIMEOUT, "warm-up: queue %s: %s", NAMES[t->queue], which);
}

static int warm_up_queue(test *t) {
    int code = dead(t, post(t, HELLO, 0), "nothing can be sent to the peer");
    if (!code) code = dead(t, await(t, HELLO, 0, t->payload), "nothing comes from the peer");
    if (!code) code = dead(t, post(t, HEARD, 0), "nothing can be sent to the peer");
    if (!code) code = dead(t, await(t, HEARD, 0, t->payload), "the peer lives but does not hear us");
    return code;
}

/* Each end says HELLO on a queue, and HEARD when it got the other's. The latency queue comes last: what follows a warm-up
 * begins there, behind the last of these frames. */
int xd_warm_up(xd_connection *c, double timeout_s) {
    uint64_t deadline_ns = after(timeout_s);
    int code = XD_OK;
    for (int queue = XD_NUM_QUEUES - 1; queue >= 0 && code == XD_OK; queue--) {
        test t;
        if ((code = begin(&t, c, queue, deadline_ns))) return code;
        code = dead(&t, finish(&t, warm_up_queue(&t)), "nothing can be sent to the peer");
    }
    return code;
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
