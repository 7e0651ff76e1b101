/* verbs_load.c: the verbs library, its devices and their addresses.
 *
 * The library is never unloaded: drivers keep handlers of their own in the process. Every call into it may block for
 * ever (Apple's provider does when it is wedged), so all of this runs in a process that somebody may kill. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "verbs_private.h"

#if XD_HAVE_VERBS

#ifdef __APPLE__
#define LIBRARY "/usr/lib/librdma.dylib"
#define LIBRARY_HINT "it comes with macOS 26.2: update, or use TCP"
#else
#define LIBRARY "libibverbs.so.1"
#define LIBRARY_HINT "install it (Debian: apt install libibverbs1 ibverbs-providers), or use TCP"
#endif
#define MAX_GIDS 256 /* of a table, more than any device fills: rxe claims 1024, each a system call or three */

typedef struct {
    const char *name;
    size_t offset;
} symbol;

#define SYMBOL(function) {"ibv_" #function, offsetof(xd_verbs_api, function)}

static const symbol SYMBOLS[] = {
    SYMBOL(get_device_list), SYMBOL(free_device_list), SYMBOL(get_device_name), SYMBOL(open_device),
    SYMBOL(close_device),    SYMBOL(query_port),       SYMBOL(query_gid),       SYMBOL(alloc_pd),
    SYMBOL(dealloc_pd),      SYMBOL(reg_mr),           SYMBOL(dereg_mr),        SYMBOL(create_cq),
    SYMBOL(destroy_cq),      SYMBOL(create_qp),        SYMBOL(destroy_qp),      SYMBOL(modify_qp),
    SYMBOL(query_qp),
};

int xd_verbs_load(xd_verbs_api *api, const char *library, char *err, size_t errlen) {
    const char *path = library && *library ? library : LIBRARY;
    void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!handle) {
        const char *why = dlerror();
        snprintf(err, errlen, "verbs: cannot load %s (%s): %s", path, why ? why : "no reason given", LIBRARY_HINT);
        return XD_UNAVAILABLE;
    }
    for (size_t i = 0; i < sizeof SYMBOLS / sizeof *SYMBOLS; i++) {
        void *function = dlsym(handle, SYMBOLS[i].name);
        if (!function) {
            snprintf(err, errlen, "verbs: %s has no function %s: %s", path, SYMBOLS[i].name, LIBRARY_HINT);
            return XD_UNAVAILABLE;
        }
        memcpy((char *)api + SYMBOLS[i].offset, &function, sizeof function); /* ISO C has no cast for this */
    }
    return XD_OK;
}

int xd_verbs_errno(int result) {
    if (result == -1 && errno) return errno;
    return result < 0 ? -result : result;
}

int xd_verbs_mtu_bytes(enum ibv_mtu mtu) { return mtu >= IBV_MTU_256 && mtu <= IBV_MTU_4096 ? 128 << (int)mtu : 0; }

/* Zeroed first: the exported function fills only what the oldest version of the structure had. */
int xd_verbs_port(const xd_verbs_api *api, struct ibv_context *context, struct ibv_port_attr *port) {
    memset(port, 0, sizeof *port);
    return xd_verbs_errno(api->query_port(context, XD_PORT, port));
}

static const char *port_state_name(int state) {
    static const char *const names[] = {"in no state", "DOWN", "INIT", "ARMED", "ACTIVE"};
    return state >= 0 && state <= IBV_PORT_ACTIVE ? names[state] : "in an unknown state";
}

/* The IPv4 address that a GID maps (::ffff:a.b.c.d) as text; false if it maps none. */
static bool ipv4_of(const union ibv_gid *gid, char out[16]) {
    static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    return memcmp(gid->raw, mapped, sizeof mapped) == 0 && inet_ntop(AF_INET, gid->raw + 12, out, 16) != NULL;
}

/* Addresses in the GID table; gives how many, at most max_found. An unreadable entry is an empty one. */
static int list_ipv4(const xd_verbs_api *api, struct ibv_context *context, int num_gids, char (*ipv4)[16], int *index,
                     int max_found) {
    int found = 0;
    for (int i = 0; i < num_gids && i < MAX_GIDS && found < max_found; i++) {
        union ibv_gid gid;
        memset(&gid, 0, sizeof gid);
        if (api->query_gid(context, XD_PORT, i, &gid) != 0 || !ipv4_of(&gid, ipv4[found])) continue;
        index[found++] = i;
    }
    return found;
}

/* The last one that matches: where RoCE lists an address twice, the second entry is version 2. */
int xd_verbs_find_gid(const xd_verbs_api *api, struct ibv_context *context, const char *ip, union ibv_gid *out) {
    struct ibv_port_attr port;
    int found = -1;
    if (xd_verbs_port(api, context, &port) != 0) return -1;
    for (int i = 0; i < port.gid_tbl_len && i < MAX_GIDS; i++) {
        union ibv_gid gid;
        char text[16];
        memset(&gid, 0, sizeof gid);
        if (api->query_gid(context, XD_PORT, i, &gid) != 0 || !ipv4_of(&gid, text) || strcmp(text, ip) != 0) continue;
        *out = gid;
        found = i;
    }
    return found;
}

/* Listing. */

/* Fill `device` and say in device->error why it cannot be used. */
static void describe(const xd_verbs_api *api, struct ibv_context *context, xd_verbs_device *device) {
    struct ibv_port_attr port;
    int code = xd_verbs_port(api, context, &port);
    if (code != 0) {
        snprintf(device->error, sizeof device->error, "cannot ask for its port (%s)", strerror(code));
        return;
    }
    device->port_state = (int)port.state;
    device->active_mtu = xd_verbs_mtu_bytes(port.active_mtu);
    device->link_layer = port.link_layer;
    device->num_gids = port.gid_tbl_len;
    int found = list_ipv4(api, context, port.gid_tbl_len, device->ipv4, device->ipv4_index, 4);
    if (port.state != IBV_PORT_ACTIVE)
        snprintf(device->error, sizeof device->error,
                 "its port is %s: check the cable, and on Macs that the peer has RDMA enabled (rdma_ctl status)",
                 port_state_name((int)port.state));
    else if (found == 0)
        snprintf(device->error, sizeof device->error,
                 "it has no IPv4 address: give one to its own interface (on a Mac enN of rdma_enN; bridge0 does not "
                 "count)");
}

static struct ibv_device **list(const xd_verbs_api *api, int *num, char *err, size_t errlen) {
    errno = 0;
    struct ibv_device **devices = api->get_device_list(num);
    if (devices && *num > 0) return devices;
    snprintf(err, errlen,
             "verbs: no RDMA device (%s): a Mac needs Thunderbolt 5, `rdma_ctl enable` in Recovery (check: rdma_ctl "
             "status) "
             "and a restart; on Linux look at `rdma link`. Or use TCP",
             devices ? "the list is empty" : strerror(errno));
    if (devices) api->free_device_list(devices);
    return NULL;
}

int xd_verbs_devices(const char *library, xd_verbs_device *devices, int max_devices, char *err, size_t errlen) {
    xd_verbs_api api;
    int num = 0;
    if (xd_verbs_load(&api, library, err, errlen) != XD_OK) return XD_UNAVAILABLE;
    struct ibv_device **found = list(&api, &num, err, errlen);
    if (!found) return XD_UNAVAILABLE;
    for (int i = 0; i < num && i < max_devices; i++) {
        xd_verbs_device *device = &devices[i];
        memset(device, 0, sizeof *device);
        snprintf(device->name, sizeof device->name, "%s", api.get_device_name(found[i]));
        errno = 0;
        struct ibv_context *context = api.open_device(found[i]);
        if (!context) {
            snprintf(device->error, sizeof device->error, "it cannot be opened (%s)", strerror(errno));
            continue;
        }
        describe(&api, context, device);
        if (api.close_device(context) != 0)
            snprintf(device->error, sizeof device->error, "it cannot be closed (%s)", strerror(errno));
    }
    api.free_device_list(found);
    return num;
}

/* Choosing. */

/* How near a device came to being the one, for the most helpful reason of several. */
enum { NOT_NAMED, NOT_OPENED, NOT_READY, OTHER_ADDRESS, CHOSEN };

static int examine(const xd_verbs_api *api, struct ibv_context *context, const char *name, const char *ip, char *err,
                   size_t errlen) {
    xd_verbs_device device;
    union ibv_gid gid;
    memset(&device, 0, sizeof device);
    describe(api, context, &device);
    if (*device.error) {
        snprintf(err, errlen, "verbs: device %s cannot be used: %s", name, device.error);
        return NOT_READY;
    }
    if (xd_verbs_find_gid(api, context, ip, &gid) >= 0) return CHOSEN;
    snprintf(err, errlen,
             "verbs: device %s has the address %s, wanted %s: addresses change when a link comes back; connect again",
             name, device.ipv4[0], ip);
    return OTHER_ADDRESS;
}

struct ibv_context *xd_verbs_open_device(const xd_verbs_api *api, const xd_verbs_config *config, char *err,
                                         size_t errlen) {
    int num = 0, nearest = NOT_NAMED;
    struct ibv_context *chosen = NULL;
    struct ibv_device **devices = list(api, &num, err, errlen);
    if (!devices) return NULL;
    snprintf(err, errlen, "verbs: no device %s among %d: see `rdma link`, on a Mac `ibv_devices`", config->device,
             num);
    for (int i = 0; i < num && !chosen; i++) {
        char why[400];
        const char *name = api->get_device_name(devices[i]);
        if (*config->device && strcmp(config->device, name) != 0) continue;
        errno = 0;
        struct ibv_context *context = api->open_device(devices[i]);
        int how = NOT_OPENED;
        if (context)
            how = examine(api, context, name, config->local_ip, why, sizeof why);
        else
            snprintf(why, sizeof why, "verbs: device %s cannot be opened (%s)", name, strerror(errno));
        if (how == CHOSEN)
            chosen = context;
        else if (context)
            (void)api->close_device(context); /* the reason that is told is the one above */
        if (how > nearest && how != CHOSEN) {
            nearest = how;
            snprintf(err, errlen, "%s", why);
        }
    }
    api->free_device_list(devices); /* open contexts outlive the list */
    return chosen;
}

#endif
