/* mailbox.h: the link between ranks of one host; for those of others the link process acts (pump.h). This header is the contract; cffi and the compiler
 * read the same text.
 *
 * A mailbox is one piece of anonymous shared memory. Every rank owns two slots in it, which only that
 * rank writes. An exchange is one symmetric round in which every rank publishes its bytes and takes
 * everybody else's, so all ranks must make the same calls in the same order. Nothing is locked and
 * nothing waits for ever: a wait ends with the peer's bytes, with the step's deadline, with the peer's
 * death (its pulse stops) or with poison. The first failure poisons the epoch for all ranks, every later
 * call then returns XD_POISONED at once, and the mailbox is of no further use.
 *
 * No function prints, exits or raises a signal, but for the lifeline of xd_mailbox_open.
 * One thread at a time may use a handle; handles of different ranks are independent. */

typedef struct xd_mailbox xd_mailbox;

enum {
    XD_MAX_RANKS = 4,
    XD_WAIT_BUCKETS = 40,
    XD_OK = 0,
    XD_TIMEOUT = -1,   /* the peer lives but did not come before the deadline */
    XD_PEER_DEAD = -2, /* the peer's pulse has stopped */
    XD_POISONED = -3,  /* someone ended this epoch */
    XD_MISMATCH = -4,  /* the peer is at another exchange, or sends another size */
    XD_DIVERGED = -5,  /* the peer routed these tokens to other experts */
    XD_TOO_LARGE = -6, /* a frame does not fit a slot */
};

/* Create shared memory for num_ranks (1..XD_MAX_RANKS) ranks with slots of slot_bytes, and give its
 * descriptor (close-on-exec, already unlinked: it vanishes with its last holder). -1 on failure. */
int xd_mailbox_create(int num_ranks, size_t slot_bytes, char *err, size_t errlen);

/* Poison the epoch from outside, as the supervisor does when a rank dies. The first reason (at most 199 bytes, "" for
 * none) stays, and every rank that ends because of it tells it. 0, or -1 if fd is no mailbox. */
int xd_mailbox_poison(int fd, const char *reason);

/* The pulses, for one who watches from outside: beats[XD_MAX_RANKS] of the ranks (0: not opened yet), distant ones
 * included, and of the link process (0: there is none). The number of ranks, or -1 if fd is no mailbox. */
int xd_mailbox_pulses(int fd, uint64_t *beats, uint64_t *link_beat);

/* Map the mailbox as `rank` and start this rank's pulse. Waits inside one step may add up to step_timeout_s;
 * a peer silent for pulse_timeout_s is dead. NULL on failure.
 *
 * lifeline_fd (or -1) is the read end of a pipe that only the supervisor holds open for writing. When it
 * ends, the pulse thread poisons the epoch and ends the process with status 3: a rank without a
 * supervisor has nobody left to report to, and no Python thread can be relied on to notice. */
xd_mailbox *xd_mailbox_open(int fd, int rank, int lifeline_fd, double step_timeout_s, double pulse_timeout_s,
                            char *err, size_t errlen);

/* Stop the pulse and unmap. Accepts NULL. */
void xd_mailbox_close(xd_mailbox *box);

/* Swap rows: publish sizes[own rank] bytes of `mine`, and lay every rank's bytes into `all` in rank order
 * (the sum of sizes). All ranks pass the same sizes and tag; payloads beyond a slot go in several rounds.
 * `digest` identifies what the router chose (0: nothing to compare). XD_OK or the reason. */
int xd_mailbox_exchange(xd_mailbox *box, uint32_t tag, uint64_t digest, const void *mine, const size_t *sizes,
                        void *all);

/* Rank 0: give `size` bytes (at most a slot) to every rank; this starts a new step, with a fresh deadline. */
int xd_mailbox_send_frame(xd_mailbox *box, const void *frame, size_t size);

/* Ranks above 0: wait for rank 0's next frame for at most idle_s. Gives its size, having copied it to `frame`
 * (room for a slot); XD_TIMEOUT means none came yet, call again; other negative values as above. */
int64_t xd_mailbox_wait_frame(xd_mailbox *box, double idle_s, void *frame);

/* The first failure as one line for people ("" if none), and its code. */
int xd_mailbox_failure(xd_mailbox *box, char *err, size_t errlen);

/* Ranks of the group; bytes of a slot; counters since opening: exchanges done, seconds spent waiting in them. */
int xd_mailbox_num_ranks(xd_mailbox *box);
size_t xd_mailbox_slot_bytes(xd_mailbox *box);
void xd_mailbox_stats(xd_mailbox *box, uint64_t *num_exchanges, double *waited_s);

/* How long the waits for peers inside exchanges were, since opening: counts[0] found the peer's bytes there, counts[i]
 * took at least 2^(i-1) ns and less than 2^i, the last one 275 s and more. counts[XD_WAIT_BUCKETS]; all in seconds. */
void xd_mailbox_waits(xd_mailbox *box, uint64_t *counts, double *waited_s);
