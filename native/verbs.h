/* verbs.h: opening a connection over RDMA verbs. The library is loaded at run time, so that this compiles and installs
 * where there is none. Any of these calls may block for ever inside a driver: only a link process, which its supervisor
 * can kill, may make them.
 *
 * Both ends: xd_verbs_open, swap endpoints over a TCP side connection, xd_verbs_connect, meet at a barrier over the side
 * connection (all receives are posted), xd_verbs_start, then xd_warm_up and xd_self_test of transport.h. */

typedef struct xd_verbs xd_verbs;

enum { XD_FRAME_BYTES = 4096 }; /* Apple's unit: a send and its receive must cover the same number of these */

typedef struct {
    const char *library;   /* path; "" takes the platform's: /usr/lib/librdma.dylib or libibverbs.so.1 */
    const char *device;    /* name; "" takes the one whose GID is local_ip */
    const char *local_ip;  /* IPv4 address that the GID must map; also chooses the cable */
    int latency_frames;    /* 4 KiB frames per message of each queue: 4 and 32 */
    int bulk_frames;
    int latency_depth;     /* receives kept posted per queue: 16 and 8; two more of each are reserved for credits */
    int bulk_depth;
    int lint;              /* check Apple's rules on every call (tests, doctor) and fail with XD_DEVICE on a breach */
} xd_verbs_config;

/* What the other end must know; crosses as these bytes, little-endian. */
typedef struct {
    uint32_t version;
    uint32_t qp_num[2], psn[2];
    uint32_t lid, mtu;
    uint32_t frames[2], depth[2];
    uint8_t gid[16];
} xd_verbs_endpoint;

typedef struct {
    char name[64];
    int port_state;     /* IBV_PORT_ACTIVE is 4 */
    int active_mtu;     /* bytes */
    int link_layer;
    int num_gids;
    char ipv4[4][16];   /* addresses found in the GID table, "" after the last */
    int ipv4_index[4];
    char error[160];    /* why it cannot be used, "" when it can */
} xd_verbs_device;

/* List devices. Their number (at most max_devices are filled in), or XD_UNAVAILABLE with the reason. */
int xd_verbs_devices(const char *library, xd_verbs_device *devices, int max_devices, char *err, size_t errlen);

/* Open device, PD, slabs, MRs, CQs and two UC queue pairs in INIT. NULL and err on failure. */
xd_verbs *xd_verbs_open(const xd_verbs_config *config, char *err, size_t errlen);
void xd_verbs_local(const xd_verbs *v, xd_verbs_endpoint *out);
const char *xd_verbs_name(const xd_verbs *v);

/* Bring both queue pairs to RTR and RTS and post all receives. XD_OK or a failure with err. */
int xd_verbs_connect(xd_verbs *v, const xd_verbs_endpoint *remote, char *err, size_t errlen);

/* Turn it into a connection, which owns it from now on. side_fd (or -1) is the TCP side socket, which the connection
 * watches: its end is the peer's end. It is not closed here. NULL and err on failure (v is then closed). */
xd_connection *xd_verbs_start(xd_verbs *v, uint32_t epoch, int side_fd, char *err, size_t errlen);

/* For one that was never started. Accepts NULL. */
void xd_verbs_close(xd_verbs *v);
