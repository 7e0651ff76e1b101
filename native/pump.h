/* pump.h: the heart of the link process: it carries what the ranks of this host publish in their mailbox to the other
 * hosts, and what their ranks publish into this mailbox, as if they were here. A rank notices no difference.
 *
 * It also carries the pulses, so that a rank sees a distant peer die as it sees a near one, and the end of an epoch with
 * its reason. One thread runs it. */

typedef struct xd_pump xd_pump;

/* Work on the mailbox `fd`, whose ranks in `local_ranks` (a bit per rank) run on this host. lifeline_fd as in
 * xd_mailbox_open. A host that is not heard for silence_timeout_s is gone. Asks the system for exact naps of the calling
 * thread, which should be the one that runs it. NULL and err on failure. */
xd_pump *xd_pump_open(int fd, uint32_t local_ranks, int lifeline_fd, double silence_timeout_s, char *err, size_t errlen);

/* Carry to and from host `host` with the ranks `remote_ranks`; the connection stays the caller's. XD_OK; XD_TOO_LARGE
 * when there is no room for one more; XD_MISMATCH for ranks that are not in the mailbox or taken already. */
int xd_pump_add(xd_pump *p, xd_connection *c, int host, uint32_t remote_ranks);

/* Run for at most run_s: XD_TIMEOUT when the time is over and all is well, XD_POISONED when a host ended the epoch,
 * XD_CLOSED of no host when the supervisor is gone, or the failure. After any of them but XD_TIMEOUT the mailbox is
 * poisoned, the other hosts have been told (which may take 0.1 s) and every later call gives the same. */
int xd_pump_run(xd_pump *p, double run_s);

/* The failure as one line, its code, and the host whose connection or word it came from: -1 for this one. */
int xd_pump_failure(const xd_pump *p, int *host, char *err, size_t errlen);

/* Rounds sent, once for every host, and nanoseconds from seeing a round published to having sent it, summed. */
void xd_pump_statistics(const xd_pump *p, uint64_t *num_rounds, uint64_t *carried_ns);

/* Free it; connections and the mailbox descriptor stay the caller's. Accepts NULL. */
void xd_pump_close(xd_pump *p);
