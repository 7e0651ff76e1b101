/* lint.c: Apple's rules of verbs_lint.c, each broken once; prints what it says. Linked with verbs_lint.c alone. */

#include <stdio.h>
#include <string.h>

#include "verbs_private.h"

static char slab[1 << 16];
static struct ibv_mr mr = {.lkey = 7};
static struct xd_verbs v;
static struct ibv_sge sge;
static struct ibv_send_wr send;
static struct ibv_recv_wr receive;

static void fresh(void) {
    memset(&v, 0, sizeof v);
    v.ready = true;
    v.tx = v.rx = (xd_slab){slab, sizeof slab, &mr};
    v.queues[XD_LATENCY].frames = 4;
    v.queues[XD_LATENCY].budget = 12;
    v.queues[XD_LATENCY].sends = v.queues[XD_LATENCY].receives = 2;
    sge = (struct ibv_sge){(uintptr_t)slab, 16384, 7};
    send = (struct ibv_send_wr){.sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND};
    receive = (struct ibv_recv_wr){.sg_list = &sge, .num_sge = 1};
}

static void say(const char *breach) {
    printf("%s\n", breach ? breach : "ok");
    fresh();
}

static void say_send(void) { say(xd_lint_send(&v, XD_LATENCY, &send)); }

static void say_receive(void) { say(xd_lint_receive(&v, XD_LATENCY, &receive)); }

int main(void) {
    fresh();
    say_send();
    v.ready = false, say_send();
    send.opcode = IBV_WR_RDMA_WRITE, say_send();
    send.send_flags = IBV_SEND_INLINE, say_send();
    send.next = &send, say_send();
    v.queues[XD_LATENCY].sends = 3, say_send();
    send.num_sge = 2, say_send();
    sge.length = 4096, say_send();
    sge.addr += sizeof slab - 4096, say_send();
    sge.lkey = 8, say_send();
    say_receive();
    v.ready = false, say_receive();
    receive.next = &receive, say_receive();
    v.queues[XD_LATENCY].receives = 3, say_receive();
    say(xd_lint_arrival(&v, XD_LATENCY, 16384));
    say(xd_lint_arrival(&v, XD_LATENCY, 12288));
    say(xd_lint_slab((void *)(uintptr_t)0x100004000ull, 16384));
    say(xd_lint_slab((void *)(uintptr_t)0x100001000ull, 16384));
    say(xd_lint_slab((void *)(uintptr_t)0xffffc000ull, 32768));
    say(xd_lint_slab((void *)(uintptr_t)0x100004000ull, 1 << 25));
    return 0;
}
