/* verbs_lint.c: Apple's rules, asserted. Linux drivers forgive nearly all of these, so tests on Linux check them
 * here. Each function gives the rule that the call would break, or NULL. Two rules need no check because one place
 * alone could break them: no queue pair is moved to ERR (verbs_setup.c knows INIT, RTR and RTS), and all are
 * destroyed before memory is deregistered (xd_verbs_close). */

#include "verbs_private.h"

#if XD_HAVE_VERBS

const char *xd_lint_slab(const void *memory, size_t bytes) {
    uintptr_t first = (uintptr_t)memory, last = first + bytes - 1;
    if (first % 16384) return "a memory region must begin on a page of 16 KiB";
    if (bytes == 0 || bytes > XD_MAX_SLAB) return "a memory region must have 1 byte to 16 MiB";
    if (first >> 32 != last >> 32) return "a memory region must not cross a 4 GiB boundary";
    return NULL;
}

static const char *lint_sge(const xd_slab *slab, const xd_verbs_queue *q, const struct ibv_sge *sge, int num_sge) {
    uintptr_t first = (uintptr_t)slab->memory;
    if (num_sge != 1) return "a message must have exactly one SGE";
    if (sge->length != xd_verbs_class_bytes(q)) return "every message of a queue must have the same number of frames";
    if (sge->addr < first || sge->addr + sge->length > first + slab->bytes) return "a message must lie in its slab";
    if (sge->lkey != slab->mr->lkey) return "a message must carry the key of its slab";
    return NULL;
}

const char *xd_lint_send(const xd_verbs *v, int queue, const struct ibv_send_wr *wr) {
    const xd_verbs_queue *q = &v->queues[queue];
    if (!v->ready) return "sends are posted only after RTS";
    if (wr->opcode != IBV_WR_SEND) return "only SEND is executed";
    if (wr->send_flags & IBV_SEND_INLINE) return "inline data are not known";
    if (wr->next) return "one message is posted at a time";
    if ((q->sends + 1) * q->frames > q->budget) return "more frames to send are in flight than were granted";
    return lint_sge(&v->tx, q, wr->sg_list, wr->num_sge);
}

const char *xd_lint_receive(const xd_verbs *v, int queue, const struct ibv_recv_wr *wr) {
    const xd_verbs_queue *q = &v->queues[queue];
    if (!v->ready) return "receives are posted only after RTS";
    if (wr->next) return "one receive is posted at a time";
    if ((q->receives + 1) * q->frames > q->budget) return "more frames to receive are in flight than were granted";
    return lint_sge(&v->rx, q, wr->sg_list, wr->num_sge);
}

const char *xd_lint_arrival(const xd_verbs *v, int queue, uint32_t bytes) {
    if (bytes != xd_verbs_class_bytes(&v->queues[queue])) return "a message with another number of frames came";
    return NULL;
}

#endif
