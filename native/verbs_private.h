/* verbs_private.h: between verbs_load.c (library, devices), verbs_setup.c (open, connect, close), verbs_lint.c
 * (Apple's rules) and verbs.c (the data path). Not for cffi. */

#ifndef XD_VERBS_PRIVATE_H
#define XD_VERBS_PRIVATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "connection.h"
#include "verbs.h"
#include "verbs_abi.h"

#if XD_HAVE_VERBS

enum {
    XD_PORT = 1,            /* every device that we know of has one port, or uses its first */
    XD_RESERVED = 2,        /* receives, and slots to send from, kept for bare credits */
    XD_MAX_DEPTH = 64,      /* of a queue, reserved ones not counted */
    XD_MAX_CLASS = 128,     /* frames of a message */
    XD_MAX_SLOTS = XD_MAX_DEPTH + XD_RESERVED,
    XD_VERBS_VERSION = 1,   /* of xd_verbs_endpoint */
    XD_MAX_SLAB = 1 << 24,  /* bytes: just below Apple's max_mr_size of 16.4 MB */
};

/* The 17 functions that the library exports and we use; see verbs_load.c. */
typedef struct {
    struct ibv_device **(*get_device_list)(int *);
    void (*free_device_list)(struct ibv_device **);
    const char *(*get_device_name)(struct ibv_device *);
    struct ibv_context *(*open_device)(struct ibv_device *);
    int (*close_device)(struct ibv_context *);
    int (*query_port)(struct ibv_context *, uint8_t, struct ibv_port_attr *);
    int (*query_gid)(struct ibv_context *, uint8_t, int, union ibv_gid *);
    struct ibv_pd *(*alloc_pd)(struct ibv_context *);
    int (*dealloc_pd)(struct ibv_pd *);
    struct ibv_mr *(*reg_mr)(struct ibv_pd *, void *, size_t, int);
    int (*dereg_mr)(struct ibv_mr *);
    struct ibv_cq *(*create_cq)(struct ibv_context *, int, void *, void *, int);
    int (*destroy_cq)(struct ibv_cq *);
    struct ibv_qp *(*create_qp)(struct ibv_pd *, struct ibv_qp_init_attr *);
    int (*destroy_qp)(struct ibv_qp *);
    int (*modify_qp)(struct ibv_qp *, struct ibv_qp_attr *, int);
    int (*query_qp)(struct ibv_qp *, struct ibv_qp_attr *, int, struct ibv_qp_init_attr *);
} xd_verbs_api;

typedef struct {
    char *memory;
    size_t bytes; /* a power of two, and its own alignment */
    struct ibv_mr *mr;
} xd_slab;

typedef struct {
    struct ibv_qp *qp;
    uint32_t frames;              /* of every message of this queue */
    uint32_t depth;               /* reserved ones not counted */
    uint32_t budget;              /* frames that we may have in flight in each direction */
    size_t offset;                /* of slot 0 in both slabs */
    uint32_t sends, receives;     /* messages in flight */
    uint8_t free[XD_MAX_SLOTS];   /* slots to send from: a stack of num_free */
    uint32_t num_free;
    bool posted[XD_MAX_SLOTS];    /* the receive of this slot is with the device */
    bool sending[XD_MAX_SLOTS];   /* the send of this slot is */
} xd_verbs_queue;

static inline size_t xd_verbs_class_bytes(const xd_verbs_queue *q) { return (size_t)q->frames * XD_FRAME_BYTES; }

typedef struct {
    uint8_t queue, slot;
    uint32_t bytes;
} xd_arrival;

struct xd_verbs {
    xd_verbs_api api;
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_cq *cq;
    xd_slab tx, rx;
    xd_verbs_queue queues[XD_NUM_QUEUES];
    xd_verbs_endpoint local, remote;
    int gid_index;
    int access; /* flags with which the device let us register memory */
    bool lint, ready;
    char name[64], ip[16];
    /* The data path. */
    int side_fd;
    uint64_t empty_polls, looked_ns, posted_ns; /* at the side socket; a message to the device */
    xd_arrival arrived[XD_NUM_QUEUES * XD_MAX_SLOTS]; /* a ring: taken from the device, not yet given to the caller */
    uint32_t arrived_head, num_arrived;
    uint8_t held; /* slot of the frame given by the last poll */
};

/* verbs_load.c. Failures as of verbs.h. */
int xd_verbs_load(xd_verbs_api *api, const char *library, char *err, size_t errlen);
int xd_verbs_port(const xd_verbs_api *api, struct ibv_context *context, struct ibv_port_attr *port);
/* Index of the entry that maps `ip`, -1 if there is none; fills *gid. */
int xd_verbs_find_gid(const xd_verbs_api *api, struct ibv_context *context, const char *ip, union ibv_gid *gid);
/* Open the device that is named, or else has local_ip. */
struct ibv_context *xd_verbs_open_device(const xd_verbs_api *api, const xd_verbs_config *config, char *err,
                                         size_t errlen);
int xd_verbs_mtu_bytes(enum ibv_mtu mtu);
/* The errno behind what a verbs call gave back: providers differ in its sign, and some set errno instead. */
int xd_verbs_errno(int result);

/* verbs_setup.c */
char *xd_verbs_slot(const xd_slab *slab, const xd_verbs_queue *q, uint32_t slot);

/* verbs.c: post the receive of a slot. XD_OK or XD_DEVICE with err. */
int xd_verbs_post_receive(xd_verbs *v, int queue, uint32_t slot, char *err, size_t errlen);

/* verbs_lint.c: the rule that a call would break, NULL when it keeps them all. */
const char *xd_lint_slab(const void *memory, size_t bytes);
const char *xd_lint_send(const xd_verbs *v, int queue, const struct ibv_send_wr *wr);
const char *xd_lint_receive(const xd_verbs *v, int queue, const struct ibv_recv_wr *wr);
const char *xd_lint_arrival(const xd_verbs *v, int queue, uint32_t bytes);

#endif
#endif
