/* transport.h: a connection between two hosts, over TCP or over RDMA verbs, behind one contract. cffi and the
 * compiler read the same text.
 *
 * A connection carries frames: a header of 64 bytes and at most xd_max_payload bytes. Each frame belongs to one of two
 * queues, each with its own order, sequence numbers and credits: XD_LATENCY for what a decode step swaps, XD_BULK
 * for the rest. A receiver grants its sender a number of frames; a sender without credit gets XD_AGAIN and tries
 * again. The checksum (CRC32C) of header and payload, the epoch and the sequence of every frame are checked on
 * arrival: a frame that is lost, damaged or of another epoch fails the connection, and a duplicate is dropped and
 * counted. The first failure is final and kept with its reason.
 *
 * Nothing here blocks but the functions that take a timeout. No function prints, exits or raises a signal. One thread
 * at a time may use a connection. Byte order on the wire is little-endian, as all our machines are. */

typedef struct xd_connection xd_connection;

enum { /* failures beside those of mailbox.h */
    XD_AGAIN = -7,       /* nothing has come, or there is no credit: not a failure, try again */
    XD_LOST = -8,        /* a frame is missing: the next one came first */
    XD_CORRUPT = -9,     /* not a frame of ours, or its checksum is wrong */
    XD_CLOSED = -10,     /* the peer closed the connection */
    XD_SILENT = -11,     /* nothing was heard for longer than the limit */
    XD_DEVICE = -12,     /* the device or the operating system reported an error */
    XD_UNAVAILABLE = -13 /* no library, device, port or address to use */
};

enum { XD_LATENCY = 0, XD_BULK = 1, XD_NUM_QUEUES = 2, XD_HEADER_BYTES = 64 };

enum {               /* kinds of frames */
    XD_ROUND = 1,    /* a piece of what one rank published in one round of the mailbox */
    XD_BEAT = 2,     /* the sender lives; payload: the pulses of its ranks */
    XD_CREDIT = 3,   /* carries credits alone; uses one of the reserved receives */
    XD_END = 4,      /* the sender ends this epoch; payload: the reason as text */
    XD_TEST = 5      /* warm-up and self-test */
};

/* The header as it crosses. The transport fills what is marked (t), the caller the rest. */
typedef struct {
    uint32_t magic;       /* (t) */
    uint8_t version;      /* (t) */
    uint8_t kind;
    uint8_t queue;
    uint8_t source;       /* the rank whose bytes these are */
    uint32_t epoch;       /* (t) */
    uint32_t tag;         /* of the exchange */
    uint64_t sequence;    /* (t) per queue and direction, from 1 */
    uint64_t round;
    uint64_t digest;
    uint32_t offset;      /* where in the round's bytes this piece begins */
    uint32_t total;       /* bytes of the whole round */
    uint32_t length;      /* payload bytes of this frame */
    uint32_t credits;     /* (t) frames of this queue that the sender has taken in, cumulative, modulo 2^32 */
    uint32_t payload_crc; /* (t) */
    uint32_t header_crc;  /* (t) of the 60 bytes before it */
} xd_header;

typedef struct {
    uint64_t sent_frames, sent_bytes, received_frames, received_bytes;
    uint64_t duplicates, starved; /* frames dropped as seen before; sends refused for want of credit */
    uint64_t last_heard_ns;       /* CLOCK_MONOTONIC of the last good frame */
} xd_statistics;

/* CRC32C (Castagnoli) of n bytes, continued from `crc` (0 to begin). By the processor's instruction where it has one. */
uint32_t xd_crc32c(uint32_t crc, const void *bytes, size_t n);
/* Its slow twin, a table of 256 entries; the tests compare the two. */
uint32_t xd_crc32c_table(uint32_t crc, const void *bytes, size_t n);

/* Read a frame from untrusted bytes: checks magic, version, kind, queue, epoch, lengths and both checksums. `n` is what
 * has come, `max_payload` the most this queue may carry. XD_OK with *header filled and the payload at
 * bytes + XD_HEADER_BYTES; XD_AGAIN when it is not complete; XD_CORRUPT with the reason in err. */
int xd_frame_read(const void *bytes, size_t n, uint32_t epoch, size_t max_payload, xd_header *header, char *err,
                  size_t errlen);

/* A connection over a connected, authenticated TCP socket, which it takes over (TCP_NODELAY, non-blocking; closed with
 * it). NULL and err on failure, and the socket is then still the caller's. */
xd_connection *xd_tcp_open(int fd, uint32_t epoch, char *err, size_t errlen);

/* Send one frame: header->kind, queue, source, tag, round, digest, offset, total, length, and the payload, which may be
 * re-used when this returns. XD_OK; XD_AGAIN when there is no credit or no room; else the failure. What the socket did not
 * take at once goes out with later calls of xd_send and xd_receive. */
int xd_send(xd_connection *c, const xd_header *header, const void *payload);

/* Take the next frame that has come, of either queue: XD_OK with *header and *payload, which stays valid until the next
 * call on this connection; XD_AGAIN when there is none; else the failure. Credits are returned as frames are taken;
 * XD_CREDIT frames and duplicates are never shown. */
int xd_receive(xd_connection *c, xd_header *header, const void **payload);

/* The most payload bytes of one frame of a queue. */
size_t xd_max_payload(const xd_connection *c, int queue);

/* Both ends swap `size` and `their_size` bytes (either may be 0) as frames of kind XD_ROUND: the direct use of a
 * connection, without mailbox or link process. Spins, then yields. XD_OK, XD_TIMEOUT or the failure. */
int xd_swap(xd_connection *c, uint32_t tag, const void *mine, size_t size, void *theirs, size_t their_size,
            double timeout_s);

/* Full-size frames of each queue both ways until each direction has delivered; both ends call it. XD_OK, XD_TIMEOUT
 * with the dead direction named in the failure, or the failure. Frames of different queues may overtake each other over
 * verbs, so both ends meet at a barrier of the side connection after this and the self-tests, and before other use. */
int xd_warm_up(xd_connection *c, double timeout_s);

/* `num_messages` full-size frames of one queue there and back, contents checked; both ends call it, one of them as
 * `first`. Fills round_trip_us[0..num_messages) at the first end. XD_OK or the failure. */
int xd_self_test(xd_connection *c, int first, int queue, int num_messages, double timeout_s, double *round_trip_us);

/* The first failure as one line for people ("" if none), and its code. */
int xd_connection_failure(const xd_connection *c, char *err, size_t errlen);
void xd_connection_statistics(const xd_connection *c, xd_statistics *out);

/* End the connection and free it; for verbs in the order QP, MR, CQ, PD, context, memory. Accepts NULL. */
void xd_connection_close(xd_connection *c);
