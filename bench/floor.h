/* floor.h: the loops of `expertd bench link`, and the floors beside which our links are measured. cffi and the
 * compiler read the same text. Ours come as addresses of functions, so that what is measured is the library
 * that is installed; the loops around them and the floors are compiled when the benchmark starts. */

typedef struct xb_link xb_link;

enum {
    XB_SWAP = 0, /* both sides send and receive at once: one sample is one exchange */
    XB_PING = 1, /* this side sends and then receives, the other answers: one sample is one round trip */
    XB_PONG = 2, /* the other side of XB_PING */
    XB_WRONG_BYTES = -100,
    XB_LATE = -101,
    XB_SOCKET = -102
};

/* Ours: xd_mailbox_exchange on a mailbox of two ranks, and xd_swap on a connection. NULL when out of memory. */
xb_link *xb_mailbox(uintptr_t exchange, uintptr_t box, int side, double timeout_s);
xb_link *xb_connection(uintptr_t swap, uintptr_t connection, int side, double timeout_s);

/* The floors. Memory: two slots per side in the shared memory `fd` (which a mailbox of two ranks with slots of
 * slot_bytes fits); copy in, set a flag, spin on the peer's flag, copy out. Socket: a connected TCP socket,
 * by spinning on receives that do not block, or by blocking. NULL when it cannot be mapped. */
xb_link *xb_memory(int fd, size_t slot_bytes, int side, double timeout_s);
xb_link *xb_socket(int fd, int spin, int side, double timeout_s);

/* Bare CRC32C of `size` bytes twice, once as the sender's and once as the receiver's share of an exchange. */
xb_link *xb_checksum(uintptr_t crc32c, int side);

/* num_warm untimed and num_timed timed operations with `size` bytes each way; nanoseconds of each into ns.
 * Both sides make the same calls, one of them with XB_PONG where the other has XB_PING. 0, XB_WRONG_BYTES, XB_LATE,
 * XB_SOCKET, or the code that ours gave. */
int xb_run(xb_link *link, int pattern, size_t size, int num_warm, int num_timed, uint64_t *ns);

void xb_close(xb_link *link);
