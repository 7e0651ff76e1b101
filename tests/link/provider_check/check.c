/* provider_check.c: the provider, asked directly for what our back end never does. Two queue pairs of one process are
 * joined; prints what came of the case that is named. Linked with the provider. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "verbs_abi.h"

struct ibv_comp_channel;
struct ibv_device **ibv_get_device_list(int *);
struct ibv_context *ibv_open_device(struct ibv_device *);
struct ibv_pd *ibv_alloc_pd(struct ibv_context *);
int ibv_dealloc_pd(struct ibv_pd *);
struct ibv_mr *ibv_reg_mr(struct ibv_pd *, void *, size_t, int);
int ibv_dereg_mr(struct ibv_mr *);
struct ibv_cq *ibv_create_cq(struct ibv_context *, int, void *, struct ibv_comp_channel *, int);
int ibv_destroy_cq(struct ibv_cq *);
struct ibv_qp *ibv_create_qp(struct ibv_pd *, struct ibv_qp_init_attr *);
int ibv_modify_qp(struct ibv_qp *, struct ibv_qp_attr *, int);
int ibv_query_gid(struct ibv_context *, uint8_t, int, union ibv_gid *);

enum { ALL = 64 * 4096 };

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_mr *mr;
static struct ibv_qp *a, *b;
static char *memory;

static struct ibv_qp *create(enum ibv_qp_type type) {
    struct ibv_qp_init_attr init = {.send_cq = cq, .recv_cq = cq, .qp_type = type};
    init.cap.max_send_wr = init.cap.max_recv_wr = 256;
    init.cap.max_send_sge = init.cap.max_recv_sge = 1;
    return ibv_create_qp(pd, &init);
}

static int move(struct ibv_qp *qp, enum ibv_qp_state to, const struct ibv_qp *peer, int gid_index) {
    struct ibv_qp_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.qp_state = to;
    attr.ah_attr.is_global = 1;
    attr.ah_attr.grh.sgid_index = (uint8_t)gid_index;
    if (ibv_query_gid(context, 1, 1, &attr.ah_attr.grh.dgid) != 0) return -1;
    if (peer) attr.dest_qp_num = peer->qp_num;
    return ibv_modify_qp(qp, &attr, IBV_QP_STATE);
}

static void join(struct ibv_qp *qp, const struct ibv_qp *peer) {
    if (move(qp, IBV_QPS_INIT, NULL, 1) || move(qp, IBV_QPS_RTR, peer, 1) || move(qp, IBV_QPS_RTS, NULL, 1)) abort();
}

static int receive(int num_frames) {
    struct ibv_sge sge = {(uintptr_t)memory + ALL / 2, (uint32_t)num_frames * 4096, mr->lkey};
    struct ibv_recv_wr wr = {.wr_id = 2, .sg_list = &sge, .num_sge = 1}, *bad;
    return context->ops.post_recv(b, &wr, &bad);
}

static int post(int num_frames, enum ibv_wr_opcode opcode) {
    struct ibv_sge sge = {(uintptr_t)memory, (uint32_t)num_frames * 4096, mr->lkey};
    struct ibv_send_wr wr = {.wr_id = 1, .sg_list = &sge, .num_sge = 1, .opcode = opcode}, *bad;
    return context->ops.post_send(a, &wr, &bad);
}

/* "kind status" of every completion there is. */
static void print_completions(void) {
    struct ibv_wc wc;
    while (context->ops.poll_cq(cq, 1, &wc) == 1)
        printf(" %s %d", wc.wr_id == 1 ? "send" : "receive", (int)wc.status);
}

static int overfill(int what) {
    int code = 0;
    for (int i = 0; i < 2000 && code == 0; i++) code = what == 0 ? receive(1) : post(1, IBV_WR_SEND);
    return code;
}

static void on_queues(const char *name) {
    join(a, b);
    join(b, a);
    if (strcmp(name, "write") == 0) {
        printf("%d ", receive(4));
        printf("%d", post(4, IBV_WR_RDMA_WRITE));
    } else if (strcmp(name, "frames") == 0) {
        printf("%d ", receive(8));
        printf("%d", post(4, IBV_WR_SEND));
    } else if (strcmp(name, "empty") == 0) {
        printf("%d ", post(1, IBV_WR_SEND));
        printf("%d ", receive(1));
        printf("%d", post(1, IBV_WR_SEND));
    } else if (strcmp(name, "error_state") == 0) {
        printf("%d", move(a, IBV_QPS_ERR, NULL, 1));
    } else {
        printf("%d", overfill(strcmp(name, "overfill_sends") == 0));
        return;
    }
    print_completions();
}

static void count(const char *name) {
    int n = 0;
    errno = 0;
    if (strcmp(name, "qps") == 0)
        while (create(IBV_QPT_UC)) n++;
    if (strcmp(name, "mrs") == 0)
        while (ibv_reg_mr(pd, memory, ALL, IBV_ACCESS_LOCAL_WRITE)) n++;
    printf("%d more, then %d", n, errno);
}

static void set_up(void) {
    int num;
    void *p;
    context = ibv_open_device(ibv_get_device_list(&num)[0]);
    pd = ibv_alloc_pd(context);
    cq = ibv_create_cq(context, 100, NULL, NULL, 0);
    if (posix_memalign(&p, ALL, ALL) != 0) abort();
    memory = p;
    mr = ibv_reg_mr(pd, memory, ALL, IBV_ACCESS_LOCAL_WRITE);
    a = create(IBV_QPT_UC);
    b = create(IBV_QPT_UC);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    const char *name = argv[1];
    set_up();
    errno = 0;
    if (strcmp(name, "qps") == 0 || strcmp(name, "mrs") == 0) {
        count(name);
    } else if (strcmp(name, "types") == 0) {
        printf("%d ", create(IBV_QPT_RC) == NULL && errno == EOPNOTSUPP);
        printf("%d", create(IBV_QPT_UD) == NULL && errno == EOPNOTSUPP);
    } else if (strcmp(name, "early_receive") == 0) {
        printf("%d ", receive(1));
        if (move(b, IBV_QPS_INIT, NULL, 1) || move(b, IBV_QPS_RTR, a, 1)) return 1;
        printf("%d", receive(1));
    } else if (strcmp(name, "gid_index") == 0) {
        if (move(a, IBV_QPS_INIT, NULL, 1)) return 1;
        printf("%d ", move(a, IBV_QPS_RTR, b, 0));
        printf("%d", move(a, IBV_QPS_RTR, b, 77));
    } else if (strcmp(name, "straddle") == 0) { /* only registered: no such memory need exist */
        printf("%d", ibv_reg_mr(pd, (void *)(uintptr_t)0x7ffffc000ull, 0x8000, IBV_ACCESS_LOCAL_WRITE) != NULL);
    } else if (strcmp(name, "teardown") == 0) {
        printf("%d ", ibv_dereg_mr(mr));
        printf("%d ", ibv_destroy_cq(cq));
        printf("%d", ibv_dealloc_pd(pd));
    } else {
        on_queues(name);
    }
    fflush(stdout);
    return 0;
}
