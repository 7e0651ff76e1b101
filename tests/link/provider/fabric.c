/* fabric.c: the cable of the provider, a file that processes share, and what can happen to a message on it.
 *
 * XDP_FABRIC names the file; all zeros is a fabric without queue pairs. Places are given under a file lock, which the
 * kernel takes back from the dead, and the places of the dead are given anew. Messages cross without a lock: `tail`
 * belongs to the one sender, `head` and `posted` to the owner. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include "provider.h"

typedef struct {
    uint32_t bytes;
    char data[MAX_MESSAGE];
} message;

struct fabric_qp {
    _Atomic uint32_t used, listening, dead;
    uint32_t generation, psn;
    pid_t owner;
    char ip[16];
    _Atomic uint32_t posted, tail, head; /* receives posted, messages that came, messages taken: ever */
    message ring[FABRIC_RING];
};

static fabric_qp *fabric;
static int fabric_fd = -1;

/* Temper. */

static const char *find(const char *name) {
    static const char *all;
    if (!all && !(all = getenv("XDP_TEMPER"))) all = "";
    const char *rest = all;
    size_t n = strlen(name);
    while (rest && *rest) {
        if (strncmp(rest, name, n) == 0 && (rest[n] == ':' || rest[n] == ',' || rest[n] == 0)) return rest + n;
        rest = strchr(rest, ',');
        if (rest) rest++;
    }
    return NULL;
}

long temper(const char *name, long missing) {
    const char *found = find(name);
    if (!found) return missing;
    return *found == ':' ? strtol(found + 1, NULL, 10) : 1;
}

bool temper_is(const char *name, const char *word) {
    const char *found = find(name);
    size_t n = strlen(word);
    return found && *found == ':' && strncmp(found + 1, word, n) == 0 && strchr(",:", found[1 + n]);
}

/* Append a line to the file XDP_FABRIC.SUFFIX. */
static void note(const char *suffix, const char *line) {
    char path[1024], text[256];
    const char *fabric_path = getenv("XDP_FABRIC");
    snprintf(path, sizeof path, "%s.%s", fabric_path ? fabric_path : "provider", suffix);
    int n = snprintf(text, sizeof text, "%s\n", line);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd < 0 || write(fd, text, (size_t)n) != n) abort();
    close(fd);
}

void breach(const char *format, ...) {
    char line[200];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    note("breach", line);
}

void act_up(const char *function) {
    static _Atomic int calls;
    if (temper_is("hang", function)) {
        note("hang", function);
        for (;;) pause();
    }
    if (!temper_is("segv", function)) return;
    if (++calls >= temper("segv_call", 1)) raise(SIGSEGV); /* as when the driver took the doorbell away */
}

/* Places. */

static bool map(void) {
    if (fabric) return true;
    const char *path = getenv("XDP_FABRIC");
    size_t bytes = sizeof(fabric_qp) * FABRIC_QPS;
    fabric_fd = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fabric_fd < 0 || ftruncate(fabric_fd, (off_t)bytes) != 0) return false;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fabric_fd, 0);
    fabric = memory == MAP_FAILED ? NULL : memory;
    return fabric != NULL;
}

static bool is_used(const fabric_qp *qp) {
    return atomic_load(&qp->used) && (kill(qp->owner, 0) == 0 || errno != ESRCH);
}

static void occupy(fabric_qp *qp, const char *ip) {
    atomic_store(&qp->listening, 0);
    atomic_store(&qp->dead, 0);
    atomic_store(&qp->posted, 0);
    atomic_store(&qp->tail, 0);
    atomic_store(&qp->head, 0);
    qp->generation++;
    qp->owner = getpid();
    snprintf(qp->ip, sizeof qp->ip, "%s", ip);
    atomic_store(&qp->used, 1);
}

fabric_qp *fabric_enter(const char *ip, int max_of_device, uint32_t *qp_num) {
    int of_device = 0, place = -1;
    if (!map() || flock(fabric_fd, LOCK_EX) != 0) {
        errno = ENOMEM;
        return NULL;
    }
    for (int i = 0; i < FABRIC_QPS; i++) {
        if (!is_used(&fabric[i]))
            place = place < 0 ? i : place;
        else if (strcmp(fabric[i].ip, ip) == 0)
            of_device++;
    }
    bool granted = place >= 0 && of_device < max_of_device;
    if (granted) {
        occupy(&fabric[place], ip);
        *qp_num = (fabric[place].generation & 0xffff) << 8 | (uint32_t)place;
    }
    flock(fabric_fd, LOCK_UN);
    errno = EBUSY;
    return granted ? &fabric[place] : NULL;
}

void fabric_leave(fabric_qp *qp) {
    atomic_store(&qp->listening, 0);
    atomic_store(&qp->used, 0);
}

void fabric_listen(fabric_qp *qp, uint32_t psn, bool dead) {
    qp->psn = psn;
    atomic_store(&qp->dead, dead);
    atomic_store(&qp->listening, 1);
}

void fabric_receive_posted(fabric_qp *qp) { atomic_fetch_add(&qp->posted, 1); }

static fabric_qp *of_number(uint32_t qp_num) {
    uint32_t place = qp_num & 0xff;
    if (!map() || place >= FABRIC_QPS || (fabric[place].generation & 0xffff) != qp_num >> 8) return NULL;
    return is_used(&fabric[place]) ? &fabric[place] : NULL;
}

const char *fabric_owner(uint32_t qp_num) {
    fabric_qp *qp = of_number(qp_num);
    return qp ? qp->ip : NULL;
}

/* Messages. */

static void deliver(fabric_qp *qp, const void *bytes, uint32_t n, bool damaged) {
    uint32_t tail = atomic_load(&qp->tail);
    if (atomic_load(&qp->dead)) return;
    if (tail == atomic_load(&qp->posted)) { /* no receive: on Apple that may end this direction for good */
        if (!temper_is("empty", "drop")) atomic_store(&qp->dead, 1);
        return;
    }
    if (tail - atomic_load(&qp->head) >= FABRIC_RING || n > MAX_MESSAGE) abort();
    message *m = &qp->ring[tail % FABRIC_RING];
    memcpy(m->data, bytes, n);
    m->bytes = n;
    if (damaged) m->data[temper("corrupt_at", 70)] ^= 0x10;
    atomic_store(&qp->tail, tail + 1);
}

/* A reproducible die. */
static bool happens(long permille) {
    static uint64_t state;
    if (!state) state = (uint64_t)temper("seed", 1) * 0x9e3779b97f4a7c15ull | 1;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (long)(state % 1000) < permille;
}

void fabric_send(uint32_t qp_num, uint32_t psn, const void *bytes, uint32_t n) {
    static long count; /* messages that this process sent, ever */
    fabric_qp *qp = of_number(qp_num);
    count++;
    if (!qp || !atomic_load(&qp->listening) || qp->psn != psn) return;
    if (count > temper("silent", count) || count == temper("loss", 0) || happens(temper("loss_rate", 0))) return;
    if (count == temper("short", 0)) n -= FRAME;
    if (count == temper("tiny", 0)) n = 12;
    deliver(qp, bytes, n, count == temper("corrupt", 0) || happens(temper("corrupt_rate", 0)));
    if (count == temper("duplicate", 0) || happens(temper("duplicate_rate", 0))) deliver(qp, bytes, n, false);
}

const void *fabric_arrived(fabric_qp *qp, uint32_t *n) {
    uint32_t head = atomic_load(&qp->head);
    if (head == atomic_load(&qp->tail)) return NULL;
    *n = qp->ring[head % FABRIC_RING].bytes;
    return qp->ring[head % FABRIC_RING].data;
}

void fabric_taken(fabric_qp *qp) { atomic_fetch_add(&qp->head, 1); }
