/* verbs_none.c: what verbs.h promises, on a Mac whose SDK had no verbs header when this was compiled. */

#include <stdint.h>
#include <stdio.h>

#include "transport.h"
#include "verbs.h"
#include "verbs_abi.h"

#if !XD_HAVE_VERBS

static int unavailable(char *err, size_t errlen) {
    snprintf(err, errlen,
             "verbs: expertd was built without Apple's verbs header: install Xcode 26.2 or later, then "
             "pip install --force-reinstall --no-binary expertd expertd. Or use TCP");
    return XD_UNAVAILABLE;
}

int xd_verbs_devices(const char *library, xd_verbs_device *devices, int max_devices, char *err, size_t errlen) {
    (void)library, (void)devices, (void)max_devices;
    return unavailable(err, errlen);
}

xd_verbs *xd_verbs_open(const xd_verbs_config *config, char *err, size_t errlen) {
    (void)config, (void)unavailable(err, errlen);
    return NULL;
}

/* There is no xd_verbs, so the others are never reached. */

void xd_verbs_local(const xd_verbs *v, xd_verbs_endpoint *out) { (void)v, (void)out; }

const char *xd_verbs_name(const xd_verbs *v) {
    (void)v;
    return "";
}

int xd_verbs_connect(xd_verbs *v, const xd_verbs_endpoint *remote, char *err, size_t errlen) {
    (void)v, (void)remote;
    return unavailable(err, errlen);
}

xd_connection *xd_verbs_start(xd_verbs *v, uint32_t epoch, int side_fd, char *err, size_t errlen) {
    (void)v, (void)epoch, (void)side_fd, (void)unavailable(err, errlen);
    return NULL;
}

void xd_verbs_close(xd_verbs *v) { (void)v; }

#endif
