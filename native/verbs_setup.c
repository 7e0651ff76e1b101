/* verbs_setup.c: from a device to two connected UC queue pairs, and back.
 *
 * Both queues use one context, PD and completion queue, and two slabs: all messages leave from one and arrive in the
 * other, each with one memory region, of the 100 that an Apple device has. Apple's provider keeps only the low 32
 * bits of an address: a slab is aligned to its own size, a power of two, so it cannot cross a 4 GiB boundary.
 *
 * A queue pair is used once. After a failure, or if one direction stays dead, everything is closed and opened anew,
 * with a new random PSN, so that late packets of the old pair are not taken for new ones. RTR is never tried twice on
 * a queue pair: on Apple that leaves the port half initialised. Nor is one moved to ERR before it is destroyed: on
 * Apple no memory can be deregistered after that. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __APPLE__
#include <sys/random.h>
#endif

#include "verbs_private.h"

#if XD_HAVE_VERBS

#define THREE_FLAGS (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE)
/* Frames to ask for: what a production system on Macs asks for. We use 72 and 320 of them: some grants are larger
 * than what the device then takes. */
#define REQUEST_FRAMES 1024u
#define MIN_SLAB 16384u /* bytes: Apple's page */

char *xd_verbs_slot(const xd_slab *slab, const xd_verbs_queue *q, uint32_t slot) {
    return slab->memory + q->offset + slot * xd_verbs_class_bytes(q);
}

static int failed(char *err, size_t errlen, const xd_verbs *v, const char *what, int code, const char *hint) {
    snprintf(err, errlen, "verbs: device %s: %s failed (%d, %s): %s", v->name, what, code, strerror(code), hint);
    return XD_DEVICE;
}

/* Memory. */

static int allocate(const xd_verbs *v, xd_slab *slab, size_t needed, char *err, size_t errlen) {
    void *memory = NULL;
    slab->bytes = MIN_SLAB;
    while (slab->bytes < needed) slab->bytes *= 2;
    if (slab->bytes > XD_MAX_SLAB || posix_memalign(&memory, slab->bytes, slab->bytes) != 0) {
        snprintf(err, errlen,
                 "verbs: cannot get a slab of %zu bytes, at most %d are allowed: lower the depth or the frames",
                 slab->bytes, XD_MAX_SLAB);
        return XD_DEVICE;
    }
    slab->memory = memory;
    memset(memory, 0, slab->bytes);
    const char *breach = v->lint ? xd_lint_slab(memory, slab->bytes) : NULL;
    if (!breach) return XD_OK;
    snprintf(err, errlen, "lint: %s", breach);
    return XD_DEVICE;
}

/* Apple's providers differ: some take local write alone, some take only all three. */
static int register_slab(xd_verbs *v, xd_slab *slab, char *err, size_t errlen) {
    errno = 0;
    slab->mr = v->api.reg_mr(v->pd, slab->memory, slab->bytes, v->access);
    if (!slab->mr && v->access != IBV_ACCESS_LOCAL_WRITE) {
        v->access = IBV_ACCESS_LOCAL_WRITE;
        slab->mr = v->api.reg_mr(v->pd, slab->memory, slab->bytes, v->access);
    }
    if (slab->mr) return XD_OK;
    int code = xd_verbs_errno(errno);
    return failed(err, errlen, v, "registering memory", code,
                  code == ENOMEM
                      ? "an Apple device has 100 memory regions: end other programs that use RDMA, then try again"
                      : "restart the machine if it stays");
}

static int open_slabs(xd_verbs *v, char *err, size_t errlen) {
    size_t needed = 0;
    for (int i = 0; i < XD_NUM_QUEUES; i++) {
        v->queues[i].offset = needed;
        needed += (v->queues[i].depth + XD_RESERVED) * xd_verbs_class_bytes(&v->queues[i]);
    }
    v->access = THREE_FLAGS;
    xd_slab *slabs[] = {&v->tx, &v->rx};
    for (int i = 0; i < 2; i++) {
        int code = allocate(v, slabs[i], needed, err, errlen);
        if (code == XD_OK) code = register_slab(v, slabs[i], err, errlen);
        if (code != XD_OK) return code;
    }
    return XD_OK;
}

/* Queues. */

static int modify(xd_verbs *v, struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask) {
    errno = 0;
    return xd_verbs_errno(v->api.modify_qp(qp, attr, mask));
}

static int to_init(xd_verbs *v, struct ibv_qp *qp, char *err, size_t errlen) {
    struct ibv_qp_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.qp_state = IBV_QPS_INIT;
    attr.port_num = XD_PORT;
    attr.qp_access_flags = THREE_FLAGS;
    int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
    int code = modify(v, qp, &attr, mask);
    if (code != 0) {
        attr.qp_access_flags = 0;
        code = modify(v, qp, &attr, mask);
    }
    return code == 0
               ? XD_OK
               : failed(err, errlen, v, "preparing a queue pair (INIT)", code, "restart the machine if it stays");
}

static struct ibv_qp *create_qp(xd_verbs *v, uint32_t request, char *err, size_t errlen) {
    struct ibv_qp_init_attr init;
    memset(&init, 0, sizeof init);
    init.send_cq = init.recv_cq = v->cq;
    init.cap.max_send_wr = init.cap.max_recv_wr = request;
    init.cap.max_send_sge = init.cap.max_recv_sge = 1;
    init.qp_type = IBV_QPT_UC;
    errno = 0;
    struct ibv_qp *qp = v->api.create_qp(v->pd, &init);
    if (qp) return qp;
    int code = xd_verbs_errno(errno);
    failed(err, errlen, v, "creating a queue pair", code,
           code == EBUSY        ? "an Apple device has 10: end other programs that use RDMA, then try again"
           : code == EOPNOTSUPP ? "it knows no UC queue pairs: use TCP"
                                : "restart the machine if it stays");
    return NULL;
}

/* The depth that the device granted, less one message: at the limit itself providers refuse, or accept and break. */
static int learn_depth(const xd_verbs *v, xd_verbs_queue *q, uint32_t request, char *err, size_t errlen) {
    struct ibv_qp_attr attr;
    struct ibv_qp_init_attr init;
    memset(&attr, 0, sizeof attr);
    memset(&init, 0, sizeof init);
    errno = 0;
    int code = xd_verbs_errno(v->api.query_qp(q->qp, &attr, IBV_QP_CAP, &init));
    if (code != 0)
        return failed(err, errlen, v, "asking what a queue pair may hold", code, "restart the machine if it stays");
    uint32_t granted = request;
    if (attr.cap.max_send_wr < granted) granted = attr.cap.max_send_wr;
    if (attr.cap.max_recv_wr < granted) granted = attr.cap.max_recv_wr;
    q->budget = granted > q->frames ? granted - q->frames : 0;
    uint32_t messages = q->budget / q->frames;
    if (messages < 2 + XD_RESERVED) {
        snprintf(err, errlen,
                 "verbs: device %s grants %u frames in flight, wanted %u for messages of %u: use smaller bulk "
                 "messages, or TCP",
                 v->name, granted, (3 + XD_RESERVED) * q->frames, q->frames);
        return XD_DEVICE;
    }
    if (q->depth + XD_RESERVED > messages) q->depth = messages - XD_RESERVED;
    return XD_OK;
}

static int open_queue(xd_verbs *v, xd_verbs_queue *q, char *err, size_t errlen) {
    uint32_t needed = (q->depth + XD_RESERVED + 1) * q->frames;
    uint32_t request = needed > REQUEST_FRAMES ? needed : REQUEST_FRAMES;
    q->qp = create_qp(v, request, err, errlen);
    if (!q->qp) return XD_DEVICE;
    int code = learn_depth(v, q, request, err, errlen);
    if (code != XD_OK) return code;
    q->num_free = q->depth + XD_RESERVED;
    for (uint32_t i = 0; i < q->num_free; i++) q->free[i] = (uint8_t)i;
    return to_init(v, q->qp, err, errlen);
}

/* A completion for every message that can be in flight, counted in frames in case the device counts so. */
static int open_cq(xd_verbs *v, char *err, size_t errlen) {
    uint32_t frames = 0;
    for (int i = 0; i < XD_NUM_QUEUES; i++) frames += 2 * (v->queues[i].depth + XD_RESERVED) * v->queues[i].frames;
    errno = 0;
    v->cq = v->api.create_cq(v->context, (int)frames, NULL, NULL, 0);
    if (v->cq) return XD_OK;
    return failed(err, errlen, v, "creating a completion queue", xd_verbs_errno(errno),
                  "restart the machine if it stays");
}

static int describe_ourselves(xd_verbs *v, char *err, size_t errlen) {
    struct ibv_port_attr port;
    union ibv_gid gid;
    uint32_t random[XD_NUM_QUEUES];
    int code = xd_verbs_port(&v->api, v->context, &port);
    if (code != 0) return failed(err, errlen, v, "asking for the port", code, "check the cable");
    v->gid_index = xd_verbs_find_gid(&v->api, v->context, v->ip, &gid);
    if (v->gid_index < 0) {
        snprintf(err, errlen, "verbs: device %s lost the address %s while it was opened: connect again", v->name,
                 v->ip);
        return XD_DEVICE;
    }
    if (getentropy(random, sizeof random) != 0)
        return failed(err, errlen, v, "getting random bytes", errno, "try again");
    v->local.version = XD_VERBS_VERSION;
    v->local.lid = port.lid;
    v->local.mtu = (uint32_t)xd_verbs_mtu_bytes(port.active_mtu);
    memcpy(v->local.gid, gid.raw, sizeof v->local.gid);
    for (int i = 0; i < XD_NUM_QUEUES; i++) {
        v->local.qp_num[i] = v->queues[i].qp->qp_num;
        v->local.psn[i] = random[i] & 0xffffff;
        v->local.frames[i] = v->queues[i].frames;
        v->local.depth[i] = v->queues[i].depth;
    }
    return XD_OK;
}

static int open_all(xd_verbs *v, const xd_verbs_config *config, char *err, size_t errlen) {
    int code = xd_verbs_load(&v->api, config->library, err, errlen);
    if (code != XD_OK) return code;
    v->context = xd_verbs_open_device(&v->api, config, err, errlen);
    if (!v->context) return XD_UNAVAILABLE;
    snprintf(v->name, sizeof v->name, "%s", v->api.get_device_name(v->context->device));
    errno = 0;
    v->pd = v->api.alloc_pd(v->context);
    if (!v->pd)
        return failed(err, errlen, v, "getting a protection domain", xd_verbs_errno(errno),
                      "its port is down, or earlier runs used everything up: pull the cable and put it back; if that "
                      "does not help, restart the machine");
    code = open_slabs(v, err, errlen);
    if (code == XD_OK) code = open_cq(v, err, errlen);
    for (int i = 0; code == XD_OK && i < XD_NUM_QUEUES; i++) code = open_queue(v, &v->queues[i], err, errlen);
    return code == XD_OK ? describe_ourselves(v, err, errlen) : code;
}

static bool in_range(int value, int lowest, int highest) { return value >= lowest && value <= highest; }

xd_verbs *xd_verbs_open(const xd_verbs_config *config, char *err, size_t errlen) {
    if (!in_range(config->latency_frames, 1, XD_MAX_CLASS) || !in_range(config->bulk_frames, 1, XD_MAX_CLASS) ||
        !in_range(config->latency_depth, 2, XD_MAX_DEPTH) || !in_range(config->bulk_depth, 2, XD_MAX_DEPTH)) {
        snprintf(err, errlen,
                 "verbs: %d and %d frames, depths %d and %d; wanted 1 to %d frames and depths of 2 to %d",
                 config->latency_frames, config->bulk_frames, config->latency_depth, config->bulk_depth, XD_MAX_CLASS,
                 XD_MAX_DEPTH);
        return NULL;
    }
    xd_verbs *v = calloc(1, sizeof *v);
    if (!v) {
        snprintf(err, errlen, "verbs: out of memory");
        return NULL;
    }
    v->lint = config->lint != 0;
    v->side_fd = -1;
    snprintf(v->ip, sizeof v->ip, "%s", config->local_ip);
    v->queues[XD_LATENCY].frames = (uint32_t)config->latency_frames;
    v->queues[XD_LATENCY].depth = (uint32_t)config->latency_depth;
    v->queues[XD_BULK].frames = (uint32_t)config->bulk_frames;
    v->queues[XD_BULK].depth = (uint32_t)config->bulk_depth;
    if (open_all(v, config, err, errlen) == XD_OK) return v;
    xd_verbs_close(v);
    return NULL;
}

void xd_verbs_local(const xd_verbs *v, xd_verbs_endpoint *out) { *out = v->local; }

const char *xd_verbs_name(const xd_verbs *v) { return v->name; }

/* Connecting. */

static enum ibv_mtu mtu_of(uint32_t bytes) {
    enum ibv_mtu mtu = IBV_MTU_4096;
    while (mtu > IBV_MTU_256 && (uint32_t)xd_verbs_mtu_bytes(mtu) > bytes) mtu = (enum ibv_mtu)((int)mtu - 1);
    return mtu;
}

static const char *rtr_hint(int code) {
    switch (code) {
    case EINVAL:
        return "no IPv4 address on the port itself, or the bridge owns it: give enN of rdma_enN (not bridge0) an "
               "address";
    case ETIMEDOUT:
        return "the peer's address is not at the other end of this cable: check which ports the cable joins, and the "
               "addresses";
    case EBUSY:
        return "the driver has no queue left, as after an earlier crash: restart this machine";
    case ENODATA:
        return "the port is stale after a long idle time: pull the cable and put it back; if that does not help, "
               "restart";
    default:
        return "pull the cable and put it back; if that does not help, restart this machine";
    }
}

/* The lower MTU of the two ends: above its own, rxe accepts, and then loses everything in silence. */
static int to_rtr(xd_verbs *v, int queue, char *err, size_t errlen) {
    const xd_verbs_endpoint *remote = &v->remote;
    struct ibv_qp_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.qp_state = IBV_QPS_RTR;
    attr.path_mtu = mtu_of(remote->mtu < v->local.mtu ? remote->mtu : v->local.mtu);
    attr.dest_qp_num = remote->qp_num[queue];
    attr.rq_psn = remote->psn[queue];
    attr.ah_attr.dlid = (uint16_t)remote->lid;
    attr.ah_attr.port_num = XD_PORT;
    attr.ah_attr.is_global = 1;
    attr.ah_attr.grh.hop_limit = 1;
    attr.ah_attr.grh.sgid_index = (uint8_t)v->gid_index;
    memcpy(attr.ah_attr.grh.dgid.raw, remote->gid, sizeof remote->gid);
    int code = modify(v, v->queues[queue].qp, &attr,
                      IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN);
    return code == 0 ? XD_OK : failed(err, errlen, v, "reaching the peer (RTR)", code, rtr_hint(code));
}

static int to_rts(xd_verbs *v, int queue, char *err, size_t errlen) {
    struct ibv_qp_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.qp_state = IBV_QPS_RTS;
    attr.sq_psn = v->local.psn[queue];
    int code = modify(v, v->queues[queue].qp, &attr, IBV_QP_STATE | IBV_QP_SQ_PSN);
    return code == 0 ? XD_OK : failed(err, errlen, v, "starting to send (RTS)", code, rtr_hint(code));
}

static int check_remote(const xd_verbs *v, char *err, size_t errlen) {
    const xd_verbs_endpoint *mine = &v->local, *theirs = &v->remote;
    bool same = theirs->version == mine->version && theirs->mtu >= 256;
    for (int i = 0; i < XD_NUM_QUEUES; i++)
        same = same && theirs->frames[i] == mine->frames[i] && in_range((int)theirs->depth[i], 2, XD_MAX_DEPTH);
    if (same) return XD_OK;
    snprintf(err, errlen,
             "verbs: the peer speaks version %u with messages of %u and %u frames, wanted version %u with %u and %u: "
             "install "
             "the same expertd on both hosts and give both the same settings",
             theirs->version, theirs->frames[XD_LATENCY], theirs->frames[XD_BULK], mine->version,
             mine->frames[XD_LATENCY], mine->frames[XD_BULK]);
    return XD_MISMATCH;
}

int xd_verbs_connect(xd_verbs *v, const xd_verbs_endpoint *remote, char *err, size_t errlen) {
    if (v->remote.version) {
        snprintf(err, errlen, "verbs: device %s: these queue pairs were connected before: open new ones", v->name);
        return XD_DEVICE;
    }
    v->remote = *remote;
    int code = check_remote(v, err, errlen);
    v->remote.version = XD_VERBS_VERSION; /* used up, whatever it was */
    for (int i = 0; code == XD_OK && i < XD_NUM_QUEUES; i++) {
        code = to_rtr(v, i, err, errlen);
        if (code == XD_OK) code = to_rts(v, i, err, errlen);
    }
    v->ready = code == XD_OK;
    for (int i = 0; i < XD_NUM_QUEUES; i++)
        for (uint32_t slot = 0; code == XD_OK && slot < v->queues[i].depth + XD_RESERVED; slot++)
            code = xd_verbs_post_receive(v, i, slot, err, errlen);
    return code;
}

/* If a queue pair cannot be destroyed the device may still write to the slab: then nothing more is freed. The process
 * ends soon after, and with it all that it holds. */
void xd_verbs_close(xd_verbs *v) {
    if (!v) return;
    int code = 0;
    for (int i = 0; i < XD_NUM_QUEUES; i++) {
        struct ibv_qp *qp = v->queues[i].qp;
        v->queues[i].qp = NULL;
        if (qp) code |= v->api.destroy_qp(qp);
    }
    if (code == 0 && v->tx.mr) code |= v->api.dereg_mr(v->tx.mr);
    if (code == 0 && v->rx.mr) code |= v->api.dereg_mr(v->rx.mr);
    if (code != 0) return;
    if (v->cq) code |= v->api.destroy_cq(v->cq);
    if (v->pd && code == 0) code |= v->api.dealloc_pd(v->pd);
    if (v->context && code == 0) code |= v->api.close_device(v->context);
    free(v->tx.memory);
    free(v->rx.memory);
    free(v);
}

#endif
