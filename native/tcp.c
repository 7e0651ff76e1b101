/* tcp.c: frames over a TCP socket.
 *
 * Both queues share the stream, in which frames follow each other without anything between. A frame leaves with one
 * sendmsg of header and payload; what the socket does not take is kept, and goes first in later calls. What has come is
 * taken with one recv, as much as there is, into one linear buffer, and frames are handed out where they lie. The rest of
 * a frame that no longer fits behind its beginning makes that beginning move to the front: at most once for each
 * CAPACITY - MAX_FRAME bytes.
 *
 * An error while sending is left to the reader: what the peer sent before it went, its reason among it, is in our receive
 * buffer, and is delivered first. */

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "connection.h"

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS: SO_NOSIGPIPE instead */
#endif

enum {
    LATENCY_PAYLOAD = 64 << 10, /* one frame for all that a decode step swaps */
    BULK_PAYLOAD = 256 << 10,
    LATENCY_GRANT = 16,
    BULK_GRANT = 8,
    MAX_FRAME = XD_HEADER_BYTES + BULK_PAYLOAD,
    CAPACITY = 1 << 20
};

typedef struct {
    int fd;
    int send_errno;             /* why nothing can be sent any more, or 0 */
    size_t start, end;          /* of what has come and was not released, in `come` */
    size_t held;                /* bytes of the frame given by the last poll */
    size_t sent, kept;          /* of `unsent`: how much is out, how much there is */
    char *come;                 /* CAPACITY */
    char unsent[MAX_FRAME];
} tcp;

/* Sending. */

static bool is_full(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

/* Bytes that the socket took; 0 when it is full or broken, which is then remembered. */
static size_t write_out(tcp *t, const struct iovec *pieces, int num_pieces) {
    struct msghdr message = {.msg_iov = (struct iovec *)pieces, .msg_iovlen = num_pieces};
    ssize_t n = sendmsg(t->fd, &message, MSG_NOSIGNAL);
    if (n >= 0) return (size_t)n;
    if (!is_full(errno)) t->send_errno = errno;
    return 0;
}

static int tcp_flush(xd_connection *c) {
    tcp *t = c->state;
    if (t->sent < t->kept && !t->send_errno) {
        struct iovec rest = {t->unsent + t->sent, t->kept - t->sent};
        t->sent += write_out(t, &rest, 1);
    }
    if (t->send_errno) return XD_CLOSED;
    return t->sent == t->kept ? XD_OK : XD_AGAIN;
}

/* Keep what the socket did not take of header and payload. */
static void keep(tcp *t, const xd_header *header, const void *payload, size_t taken) {
    size_t of_header = taken < XD_HEADER_BYTES ? XD_HEADER_BYTES - taken : 0;
    size_t from = taken > XD_HEADER_BYTES ? taken - XD_HEADER_BYTES : 0;
    if (of_header) memcpy(t->unsent, (const char *)header + taken, of_header);
    if (header->length > from) memcpy(t->unsent + of_header, (const char *)payload + from, header->length - from);
    t->sent = 0;
    t->kept = of_header + header->length - from;
}

static int tcp_post(xd_connection *c, int queue, const xd_header *header, const void *payload) {
    (void)queue;
    tcp *t = c->state;
    if (tcp_flush(c) != XD_OK) return XD_AGAIN;
    struct iovec pieces[2] = {{(void *)header, XD_HEADER_BYTES}, {(void *)payload, header->length}};
    size_t taken = write_out(t, pieces, header->length ? 2 : 1);
    if (taken == 0) return XD_AGAIN;
    if (taken < XD_HEADER_BYTES + (size_t)header->length) keep(t, header, payload, taken);
    return XD_OK;
}

/* Receiving. */

/* Bytes of the frame at `start`, from its header alone; 0 when even that has not all come. What is no frame of ours counts
 * as a whole one, for the reader to refuse. */
static size_t frame_bytes(const xd_connection *c, const tcp *t) {
    xd_header header;
    char why[160];
    const uint8_t *bytes = (const uint8_t *)t->come + t->start;
    size_t n = t->end - t->start;
    int queue = n >= XD_HEADER_BYTES ? bytes[offsetof(xd_header, queue)] : 0;
    int code = xd_header_read(bytes, n, c->epoch, xd_max_payload(c, queue), &header, why, sizeof why);
    if (code == XD_AGAIN) return 0;
    return code ? n : XD_HEADER_BYTES + (size_t)header.length;
}

static int ended(xd_connection *c, const tcp *t, int error) {
    size_t rest = t->end - t->start;
    if (!error) error = t->send_errno;
    if (error && error != EPIPE && error != ECONNRESET)
        return xd_connection_fail(c, XD_DEVICE, "TCP: %s", strerror(error));
    if (rest) return xd_connection_fail(c, XD_CLOSED, "the peer closed the connection %zu bytes into a frame", rest);
    return xd_connection_fail(c, XD_CLOSED, "the peer closed the connection");
}

/* Take what has come, making room for `wanted` bytes at `start` first. */
static int read_in(xd_connection *c, tcp *t, size_t wanted) {
    if (t->start == t->end) t->start = t->end = 0; /* begin at the front, whose lines are in the cache */
    if (t->start + wanted > CAPACITY) {
        memmove(t->come, t->come + t->start, t->end - t->start);
        t->end -= t->start;
        t->start = 0;
    }
    ssize_t n = recv(t->fd, t->come + t->end, CAPACITY - t->end, 0);
    if (n > 0) {
        t->end += (size_t)n;
        return XD_OK;
    }
    if (n < 0 && is_full(errno)) return XD_AGAIN;
    return ended(c, t, n < 0 ? errno : 0);
}

static int tcp_poll(xd_connection *c, int *queue, const void **bytes, size_t *n) {
    tcp *t = c->state;
    if (t->sent < t->kept) tcp_flush(c);
    size_t whole = frame_bytes(c, t);
    if (whole == 0 || t->end - t->start < whole) {
        int code = read_in(c, t, whole ? whole : XD_HEADER_BYTES);
        if (code) return code;
        whole = frame_bytes(c, t);
        if (whole == 0 || t->end - t->start < whole) return XD_AGAIN;
    }
    uint8_t named = (uint8_t)t->come[t->start + offsetof(xd_header, queue)];
    *queue = whole >= XD_HEADER_BYTES && named < XD_NUM_QUEUES ? named : XD_LATENCY;
    *bytes = t->come + t->start;
    *n = t->held = whole;
    return XD_OK;
}

static int tcp_release(xd_connection *c, int queue) {
    (void)queue;
    tcp *t = c->state;
    t->start += t->held;
    t->held = 0;
    return XD_OK;
}

static void tcp_close(xd_connection *c) {
    tcp *t = c->state;
    close(t->fd);
    free(t->come);
    free(t);
}

static const xd_backend BACKEND = {
    .post = tcp_post, .poll = tcp_poll, .release = tcp_release, .flush = tcp_flush, .close = tcp_close};

/* Opening. */

static int prepare(int fd) {
    int type = 0, on = 1;
    socklen_t size = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0) return -1;
    if (type != SOCK_STREAM) {
        errno = EPROTOTYPE;
        return -1;
    }
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return -1;
#ifdef SO_NOSIGPIPE
    if (setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on) != 0) return -1;
#endif
    struct sockaddr_storage own;
    size = sizeof own;
    if (getsockname(fd, (struct sockaddr *)&own, &size) != 0) return -1;
    if (own.ss_family != AF_INET && own.ss_family != AF_INET6) return 0; /* a socket pair delays nothing */
    return setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

xd_connection *xd_tcp_open(int fd, uint32_t epoch, char *err, size_t errlen) {
    if (prepare(fd) != 0) {
        snprintf(err, errlen, "TCP: descriptor %d cannot be used: %s", fd, strerror(errno));
        return NULL;
    }
    xd_connection *c = xd_connection_new(epoch);
    tcp *t = calloc(1, sizeof *t);
    char *come = malloc(CAPACITY);
    if (!c || !t || !come) {
        free(come);
        free(t);
        xd_connection_close(c);
        snprintf(err, errlen, "TCP: out of memory");
        return NULL;
    }
    t->fd = fd;
    t->come = come;
    c->state = t;
    c->backend = &BACKEND;
    c->queues[XD_LATENCY] =
        (xd_queue){.max_payload = LATENCY_PAYLOAD, .grant = LATENCY_GRANT, .our_grant = LATENCY_GRANT};
    c->queues[XD_BULK] = (xd_queue){.max_payload = BULK_PAYLOAD, .grant = BULK_GRANT, .our_grant = BULK_GRANT};
    return c;
}
