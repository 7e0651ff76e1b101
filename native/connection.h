/* connection.h: inside a connection. transport.c owns sequence, credits, checksums and the first failure, the same for
 * every back end; a back end (tcp.c, verbs.c) moves whole frames and knows nothing of what is in them. Not for cffi. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "mailbox.h"
#include "transport.h"

#define XD_MAGIC 0x31746478u /* "xdt1" */
#define XD_VERSION 1

typedef struct {
    /* Take one frame for sending; header and payload may be re-used at once. XD_OK; XD_AGAIN when there is no room;
     * else a failure, already recorded with xd_connection_fail. */
    int (*post)(xd_connection *c, int queue, const xd_header *header, const void *payload);
    /* The oldest frame that has come, of any queue, as raw bytes that stay valid until `release`. XD_OK, XD_AGAIN,
     * or a recorded failure. Also moves forward what `post` could not finish. */
    int (*poll)(xd_connection *c, int *queue, const void **bytes, size_t *n);
    /* The frame given by the last poll has been used: its receive may be posted again. XD_OK or a recorded failure. */
    int (*release)(xd_connection *c, int queue);
    /* Move forward what `post` could not finish: XD_OK when all is out and `post` would find room, else XD_AGAIN;
     * XD_CLOSED when nothing goes out any more. Never records a failure: that is left to `poll`, which first gives what had
     * come. NULL where post always finishes. */
    int (*flush)(xd_connection *c);
    /* Free all that the back end owns, but not the connection itself. */
    void (*close)(xd_connection *c);
} xd_backend;

typedef struct {
    size_t max_payload;
    uint32_t grant;     /* frames that the peer lets us have under way, reserved ones for credits not counted */
    uint32_t our_grant; /* the same of what we let the peer have: half of it owed sends a bare credit */
    uint64_t sent, received; /* sequence of the last frame */
    uint32_t spent, returned; /* frames sent that use credit, and how many of them the peer has taken (modulo 2^32) */
    uint32_t taken, told; /* frames with credit that we took, and how many the peer has been told of */
} xd_queue;

struct xd_connection {
    const xd_backend *backend;
    void *state; /* the back end's */
    uint32_t epoch;
    xd_queue queues[XD_NUM_QUEUES];
    bool holds_frame; /* the last poll's frame is not released yet */
    bool held_counts; /* and it used credit, which is given back with it */
    int held_queue;
    xd_statistics statistics;
    int failure;
    char reason[240];
};

/* A new connection without a back end; NULL when out of memory. */
xd_connection *xd_connection_new(uint32_t epoch);

/* Keep the first failure with its reason; gives the code back. */
int xd_connection_fail(xd_connection *c, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Release the frame that the last xd_receive gave, and send the credits that are owed; XD_OK or the failure. */
int xd_connection_settle(xd_connection *c);

/* The back end's flush, or the failure. Who returns to a caller that may not touch the connection for a while brings this to
 * XD_OK first: the peer waits for those bytes. It does not read meanwhile: once they are out, what comes is the next one's. */
int xd_connection_flush(xd_connection *c);

uint64_t xd_now_ns(void);

/* What a wait does between two looks, by how long it has lasted: spin for 50 us, then as the mailbox does. */
void xd_rest(uint64_t waited_ns);

/* Fill in what the transport owes to a header whose sequence and credits are set: magic, version, epoch, checksums. */
void xd_frame_seal(xd_header *header, uint32_t epoch, const void *payload);

/* As xd_frame_read, but without a look at the payload, which need not have come. */
int xd_header_read(const void *bytes, size_t n, uint32_t epoch, size_t max_payload, xd_header *header, char *err,
                   size_t errlen);
