/* provider.c: a verbs library with the temper of Apple's, for two processes on any machine.
 *
 * It exports what a verbs library exports and puts its own post and poll into context->ops, so that the back end
 * under test is the one that is shipped; its path goes where the platform's library would. It is stricter than
 * Linux's libraries wherever Apple's is known or feared to be: frame counts must match, 10 queue pairs and 100 memory
 * regions, UC alone, WRITE accepted and never executed, receives refused before RTS, a send without a receive ends
 * the direction. What a provider need not check and we must never do is written to XDP_FABRIC.breach, for the tests
 * to find.
 *
 * XDP_FABRIC: file that the processes share. XDP_IP: addresses of this process's devices rdma_en2, rdma_en3, ... by
 * commas. XDP_TEMPER: by commas, per process (counts begin at 1): no_device, pd_null, port_down, port_down_after:N
 * (query_port calls), no_ipv4, gid:INDEX, gid_moves (1, 3, 1, ...) mr_three_refused, mr_local_refused,
 * init_flags_refused, mrs_taken:N, qps_taken:N, no_uc, rtr:ERRNO grant:N (frames granted and true), truth:N (taken,
 * whatever was granted; send_truth:N for sends alone), over:-12 | over:+12 | over:accept (and breaks), dead:N (the
 * first N queue pairs hear nothing), any_frames (as Linux), empty:drop (as Linux), wc_error:K (completion) loss:K,
 * duplicate:K, corrupt:K, short:K, tiny:K (sent messages), corrupt_at:BYTE, loss_rate:PERMILLE, corrupt_rate:PERMILLE,
 *   duplicate_rate:PERMILLE, seed:N, silent:K (nothing after K), hang:FUNCTION, segv:FUNCTION, segv_call:N */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "provider.h"
#include "verbs_abi.h"

struct ibv_comp_channel;

enum {
    MAX_DEVICES = 4,
    MAX_QPS = 10,
    MAX_MRS = 100,
    NUM_GIDS = 5,
    QUEUE = 4096,
    LOWEST_GRANT = 1023,
    HIGHEST_GRANT = 4095
};

typedef struct {
    char name[32], ip[16];
} device;

typedef struct {
    struct ibv_context v;
    device *of;
    int gid_index, num_pds, num_cqs;
} context;

typedef struct {
    struct ibv_pd v;
    int num_mrs, num_qps;
} pd;

typedef struct {
    struct ibv_mr v;
    int index;
} mr;

typedef struct {
    uint64_t wr_id;
    char *address;
    uint32_t bytes;
    int status; /* of the completion it becomes */
} work;

typedef struct qp {
    struct ibv_qp v;
    struct qp *next; /* of the same CQ */
    fabric_qp *place;
    int number;      /* in order of creation in this process */
    bool tried_rtr, overfull;
    uint32_t grant, truth, send_truth, dest, sq_psn;
    uint32_t send_frames, receive_frames; /* in flight */
    work sends[QUEUE], receives[QUEUE];   /* rings; sends are done at once and wait to be polled */
    uint32_t send_head, num_sends, receive_head, num_receives;
} qp;

typedef struct {
    struct ibv_cq v;
    qp *qps;
} cq;

static device devices[MAX_DEVICES];
static struct ibv_mr *regions[MAX_MRS];
static int num_left; /* contexts, PDs, CQs, QPs and MRs that are not given back */

static uint32_t frames(uint32_t bytes) { return (bytes + FRAME - 1) / FRAME; }

static int refuse(int code) {
    errno = code;
    return code;
}

static void *refused(int code) {
    errno = code;
    return NULL;
}

__attribute__((destructor)) static void count_what_is_left(void) {
    if (num_left) breach("exit: %d objects were not given back", num_left);
}

/* Devices. */

struct ibv_device **ibv_get_device_list(int *num) {
    act_up("get_device_list");
    struct ibv_device **list = calloc(MAX_DEVICES + 1, sizeof *list);
    char all[128], *rest = all, *ip;
    const char *given = getenv("XDP_IP");
    snprintf(all, sizeof all, "%s", given ? given : "10.0.0.1");
    *num = 0;
    if (!list) return refused(ENOMEM);
    while (!temper("no_device", 0) && *num < MAX_DEVICES && (ip = strtok_r(rest, ",", &rest))) {
        device *d = &devices[*num];
        snprintf(d->name, sizeof d->name, "rdma_en%d", *num + 2);
        snprintf(d->ip, sizeof d->ip, "%s", ip);
        list[(*num)++] = (struct ibv_device *)d;
    }
    return list;
}

void ibv_free_device_list(struct ibv_device **list) {
    act_up("free_device_list");
    free(list);
}

const char *ibv_get_device_name(struct ibv_device *d) {
    act_up("get_device_name");
    return ((device *)d)->name;
}

static int poll_cq(struct ibv_cq *, int, struct ibv_wc *);
static int post_send(struct ibv_qp *, struct ibv_send_wr *, struct ibv_send_wr **);
static int post_recv(struct ibv_qp *, struct ibv_recv_wr *, struct ibv_recv_wr **);

struct ibv_context *ibv_open_device(struct ibv_device *d) {
    static int opens;
    act_up("open_device");
    context *c = calloc(1, sizeof *c);
    if (!c) return refused(ENOMEM);
    opens++;
    c->v.device = d;
    c->of = (device *)d;
    c->gid_index = temper("gid_moves", 0) ? (opens % 2 ? 1 : 3) : (int)temper("gid", 1);
    c->v.ops.poll_cq = poll_cq;
    c->v.ops.post_send = post_send;
    c->v.ops.post_recv = post_recv;
    num_left++;
    return &c->v;
}

int ibv_close_device(struct ibv_context *v) {
    context *c = (context *)v;
    act_up("close_device");
    if (c->num_pds || c->num_cqs) {
        breach("close_device: %d PDs and %d CQs are left", c->num_pds, c->num_cqs);
        return refuse(EBUSY);
    }
    num_left--;
    free(c);
    return 0;
}

/* As the exported function of libibverbs: what a later version appended to the structure stays as it was. */
int ibv_query_port(struct ibv_context *v, uint8_t port, struct ibv_port_attr *attr) {
    static int queries;
    (void)v;
    act_up("query_port");
    if (port != 1) return refuse(EINVAL);
    bool down = temper("port_down", 0) || ++queries > temper("port_down_after", 1 << 30);
    attr->state = down ? IBV_PORT_DOWN : IBV_PORT_ACTIVE;
    attr->max_mtu = attr->active_mtu = IBV_MTU_4096;
    attr->gid_tbl_len = NUM_GIDS;
    attr->max_msg_sz = HIGHEST_GRANT * FRAME;
    attr->lid = 0;
    attr->link_layer = 0;
    return 0;
}

int ibv_query_gid(struct ibv_context *v, uint8_t port, int index, union ibv_gid *gid) {
    context *c = (context *)v;
    act_up("query_gid");
    if (port != 1 || index < 0 || index >= NUM_GIDS) return refuse(EINVAL);
    memset(gid, 0, sizeof *gid);
    if (index == c->gid_index && !temper("no_ipv4", 0)) {
        gid->raw[10] = gid->raw[11] = 0xff;
        if (inet_pton(AF_INET, c->of->ip, gid->raw + 12) != 1) return refuse(EINVAL);
    } else {
        gid->raw[0] = 0xfe;
        gid->raw[1] = 0x80;
        gid->raw[15] = (uint8_t)(index + 1);
    }
    return 0;
}

/* Memory. */

struct ibv_pd *ibv_alloc_pd(struct ibv_context *v) {
    act_up("alloc_pd");
    pd *p = temper("pd_null", 0) ? NULL : calloc(1, sizeof *p);
    if (!p) return refused(ENOMEM);
    p->v.context = v;
    ((context *)v)->num_pds++;
    num_left++;
    return &p->v;
}

int ibv_dealloc_pd(struct ibv_pd *v) {
    pd *p = (pd *)v;
    act_up("dealloc_pd");
    if (p->num_mrs || p->num_qps) {
        breach("dealloc_pd: %d MRs and %d QPs are left", p->num_mrs, p->num_qps);
        return refuse(EBUSY);
    }
    ((context *)v->context)->num_pds--;
    num_left--;
    free(p);
    return 0;
}

static void look_at_region(const void *address, size_t length) {
    uintptr_t first = (uintptr_t)address, last = first + length - 1;
    if (first % 16384) breach("reg_mr: %p is not the beginning of a page", address);
    if (first >> 32 != last >> 32) breach("reg_mr: %p and %zu bytes cross a 4 GiB boundary", address, length);
}

struct ibv_mr *ibv_reg_mr(struct ibv_pd *v, void *address, size_t length, int access) {
    act_up("reg_mr");
    bool three = (access & (IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE)) != 0;
    if (temper(three ? "mr_three_refused" : "mr_local_refused", 0)) return refused(EINVAL);
    int index = 0, taken = (int)temper("mrs_taken", 0);
    while (index < MAX_MRS - taken && regions[index]) index++;
    mr *m = index < MAX_MRS - taken ? calloc(1, sizeof *m) : NULL;
    if (!m) return refused(ENOMEM);
    look_at_region(address, length);
    m->v = (struct ibv_mr){
        .context = v->context, .pd = v, .addr = address, .length = length, .lkey = (uint32_t)index + 7};
    m->index = index;
    regions[index] = &m->v;
    ((pd *)v)->num_mrs++;
    num_left++;
    return &m->v;
}

int ibv_dereg_mr(struct ibv_mr *v) {
    pd *p = (pd *)v->pd;
    act_up("dereg_mr");
    if (p->num_qps) {
        breach("dereg_mr: %d QPs may still use the memory", p->num_qps);
        return refuse(EBUSY);
    }
    regions[((mr *)v)->index] = NULL;
    p->num_mrs--;
    num_left--;
    free(v);
    return 0;
}

/* Queues. */

struct ibv_cq *ibv_create_cq(struct ibv_context *v, int cqe, void *cq_context, struct ibv_comp_channel *channel,
                             int vector) {
    act_up("create_cq");
    cq *c = cqe > 0 && !channel && vector == 0 ? calloc(1, sizeof *c) : NULL;
    if (!c) return refused(EINVAL);
    c->v.context = v;
    c->v.cq_context = cq_context;
    c->v.cqe = cqe;
    ((context *)v)->num_cqs++;
    num_left++;
    return &c->v;
}

int ibv_destroy_cq(struct ibv_cq *v) {
    act_up("destroy_cq");
    if (((cq *)v)->qps) {
        breach("destroy_cq: QPs are left");
        return refuse(EBUSY);
    }
    ((context *)v->context)->num_cqs--;
    num_left--;
    free(v);
    return 0;
}

struct ibv_qp *ibv_create_qp(struct ibv_pd *v, struct ibv_qp_init_attr *init) {
    static int created;
    act_up("create_qp");
    uint32_t number;
    context *c = (context *)v->context;
    if (init->qp_type != IBV_QPT_UC || temper("no_uc", 0)) return refused(EOPNOTSUPP);
    if (init->cap.max_send_sge != 1 || init->cap.max_recv_sge != 1 || init->cap.max_inline_data || init->srq)
        breach("create_qp: %u and %u SGEs, %u bytes inline", init->cap.max_send_sge, init->cap.max_recv_sge,
               init->cap.max_inline_data);
    if (init->cap.max_send_wr > HIGHEST_GRANT || init->cap.max_recv_wr > HIGHEST_GRANT) return refused(EINVAL);
    fabric_qp *place = fabric_enter(c->of->ip, MAX_QPS - (int)temper("qps_taken", 0), &number);
    qp *q = place ? calloc(1, sizeof *q) : NULL;
    if (!q) return NULL;
    q->v = (struct ibv_qp){.context = v->context,
                           .pd = v,
                           .send_cq = init->send_cq,
                           .recv_cq = init->recv_cq,
                           .qp_num = number,
                           .qp_type = init->qp_type};
    q->place = place;
    q->number = ++created;
    q->grant = (uint32_t)temper("grant", init->cap.max_send_wr <= LOWEST_GRANT ? LOWEST_GRANT : HIGHEST_GRANT);
    q->truth = (uint32_t)temper("truth", q->grant);
    q->send_truth = (uint32_t)temper("send_truth", q->truth);
    q->next = ((cq *)init->recv_cq)->qps;
    ((cq *)init->recv_cq)->qps = q;
    init->cap.max_send_wr = init->cap.max_recv_wr = 2 * HIGHEST_GRANT; /* more than is accepted, as was seen */
    ((pd *)v)->num_qps++;
    num_left++;
    return &q->v;
}

int ibv_destroy_qp(struct ibv_qp *v) {
    act_up("destroy_qp");
    qp *q = (qp *)v, **link = &((cq *)v->recv_cq)->qps;
    while (*link != q) link = &(*link)->next;
    *link = q->next;
    fabric_leave(q->place);
    ((pd *)v->pd)->num_qps--;
    num_left--;
    free(q);
    return 0;
}

int ibv_query_qp(struct ibv_qp *v, struct ibv_qp_attr *attr, int mask, struct ibv_qp_init_attr *init) {
    act_up("query_qp");
    (void)mask, (void)init;
    attr->qp_state = v->state;
    attr->cap.max_send_wr = attr->cap.max_recv_wr = ((qp *)v)->grant;
    return 0;
}

/* An address of index 0 is a link-local one: "operation timed out", as when the peer's address is not on this cable.
 */
static int to_rtr(qp *q, const struct ibv_qp_attr *attr) {
    const context *c = (context *)q->v.context;
    char ip[16];
    if (q->tried_rtr) breach("modify_qp: RTR was tried again on the same QP");
    q->tried_rtr = true;
    if (temper("rtr", 0)) return (int)temper("rtr", 0);
    if (!attr->ah_attr.is_global || attr->ah_attr.grh.sgid_index >= NUM_GIDS || temper("no_ipv4", 0)) return EINVAL;
    if (attr->ah_attr.grh.sgid_index != c->gid_index) return ETIMEDOUT;
    const char *owner = fabric_owner(attr->dest_qp_num);
    if (!inet_ntop(AF_INET, attr->ah_attr.grh.dgid.raw + 12, ip, sizeof ip)) return EINVAL;
    if (!owner || strcmp(owner, ip) != 0) return ETIMEDOUT;
    q->dest = attr->dest_qp_num;
    fabric_listen(q->place, attr->rq_psn, q->number <= temper("dead", 0));
    return 0;
}

int ibv_modify_qp(struct ibv_qp *v, struct ibv_qp_attr *attr, int mask) {
    act_up("modify_qp");
    qp *q = (qp *)v;
    if (attr->qp_state == IBV_QPS_ERR) breach("modify_qp: a QP was moved to ERR");
    if (!(mask & IBV_QP_STATE) || (int)attr->qp_state != (int)v->state + 1) return refuse(EINVAL);
    int code = 0;
    if (attr->qp_state == IBV_QPS_INIT && attr->qp_access_flags && temper("init_flags_refused", 0)) code = EINVAL;
    if (attr->qp_state == IBV_QPS_RTR) code = to_rtr(q, attr);
    if (attr->qp_state == IBV_QPS_RTS) q->sq_psn = attr->sq_psn;
    if (code == 0) v->state = attr->qp_state;
    return refuse(code);
}

/* Posting. bad_wr is not filled, as on Apple. */

static const struct ibv_mr *region_of(const struct ibv_sge *sge, int num_sge, const char *what) {
    const struct ibv_mr *m = sge->lkey >= 7 && sge->lkey < 7 + MAX_MRS ? regions[sge->lkey - 7] : NULL;
    if (num_sge != 1) breach("%s: %d SGEs", what, num_sge);
    if (!m || sge->addr < (uintptr_t)m->addr || sge->addr + sge->length > (uintptr_t)m->addr + m->length) {
        breach("%s: %u bytes outside of any memory region", what, sge->length);
        return NULL;
    }
    return m;
}

/* What comes of a post that no longer fits: 0 when it is taken nevertheless, to break later. */
static int over(qp *q) {
    if (temper_is("over", "accept")) {
        q->overfull = true;
        return 0;
    }
    return temper("over", -12) > 0 ? ENOMEM : -ENOMEM;
}

static int post_send(struct ibv_qp *v, struct ibv_send_wr *wr, struct ibv_send_wr **bad) {
    (void)bad;
    qp *q = (qp *)v;
    act_up("post_send");
    if (v->state != IBV_QPS_RTS || !region_of(wr->sg_list, wr->num_sge, "post_send")) return EINVAL;
    uint32_t more = frames(wr->sg_list->length);
    if (q->num_sends == QUEUE || q->send_frames + more > q->send_truth) {
        int code = over(q);
        if (code) return code;
    }
    if (wr->opcode == IBV_WR_SEND)
        fabric_send(q->dest, q->sq_psn, (const void *)(uintptr_t)wr->sg_list->addr, wr->sg_list->length);
    q->send_frames += more;
    work done = {.wr_id = wr->wr_id, .bytes = wr->sg_list->length};
    q->sends[(q->send_head + q->num_sends++) % QUEUE] = done;
    return 0;
}

static int post_recv(struct ibv_qp *v, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad) {
    (void)bad;
    qp *q = (qp *)v;
    act_up("post_recv");
    if (v->state != IBV_QPS_RTS) {
        breach("post_recv: before RTS");
        return EINVAL;
    }
    if (!region_of(wr->sg_list, wr->num_sge, "post_recv")) return EINVAL;
    uint32_t more = frames(wr->sg_list->length);
    if (q->num_receives == QUEUE || q->receive_frames + more > q->truth) {
        int code = over(q);
        if (code) return code;
    }
    q->receive_frames += more;
    work r = {.wr_id = wr->wr_id, .address = (char *)(uintptr_t)wr->sg_list->addr, .bytes = wr->sg_list->length};
    q->receives[(q->receive_head + q->num_receives++) % QUEUE] = r;
    fabric_receive_posted(q->place);
    return 0;
}

/* Polling. */

static bool poll_send(qp *q, struct ibv_wc *wc) {
    if (q->num_sends == 0) return false;
    const work *done = &q->sends[q->send_head];
    *wc =
        (struct ibv_wc){.wr_id = done->wr_id, .status = IBV_WC_SUCCESS, .opcode = IBV_WC_SEND, .qp_num = q->v.qp_num};
    q->send_frames -= frames(done->bytes);
    q->send_head = (q->send_head + 1) % QUEUE;
    q->num_sends--;
    return true;
}

static enum ibv_wc_status status_of(const qp *q, const work *r, uint32_t n) {
    static int completed;
    if (++completed == temper("wc_error", 0)) return IBV_WC_LOC_PROT_ERR;
    bool fits = temper("any_frames", 0) ? n <= r->bytes : frames(n) == frames(r->bytes);
    return fits && !q->overfull ? IBV_WC_SUCCESS : IBV_WC_LOC_LEN_ERR;
}

static bool poll_receive(qp *q, struct ibv_wc *wc) {
    uint32_t n;
    const void *bytes = q->num_receives ? fabric_arrived(q->place, &n) : NULL;
    if (!bytes) return false;
    const work *r = &q->receives[q->receive_head];
    *wc = (struct ibv_wc){.wr_id = r->wr_id, .status = status_of(q, r, n), .qp_num = q->v.qp_num};
    if (wc->status == IBV_WC_SUCCESS) { /* in errors opcode and length mean nothing */
        wc->opcode = IBV_WC_RECV;
        wc->byte_len = n;
        memcpy(r->address, bytes, n);
    }
    fabric_taken(q->place);
    q->receive_frames -= frames(r->bytes);
    q->receive_head = (q->receive_head + 1) % QUEUE;
    q->num_receives--;
    return true;
}

static int poll_cq(struct ibv_cq *v, int most, struct ibv_wc *wc) {
    int n = 0;
    act_up("poll_cq");
    for (qp *q = ((cq *)v)->qps; q; q = q->next) {
        while (n < most && poll_send(q, &wc[n])) n++;
        while (n < most && poll_receive(q, &wc[n])) n++;
    }
    return n;
}
