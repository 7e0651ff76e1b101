/* provider.h: what provider.c and fabric.c share; see provider.c. */

#ifndef PROVIDER_H
#define PROVIDER_H

#include <stdbool.h>
#include <stdint.h>

enum { FABRIC_QPS = 64, FABRIC_RING = 64, FRAME = 4096, MAX_MESSAGE = 32 * FRAME };

/* A queue pair as the others see it, in shared memory. What is sent to it lies in `ring` until it takes it; one peer
 * writes, the owner reads. */
typedef struct fabric_qp fabric_qp;

/* Temper. */

/* The number behind `name:` in XDP_TEMPER; 1 for the bare name; `missing` if it is not there. */
long temper(const char *name, long missing);
/* Whether XDP_TEMPER has `name:word`. */
bool temper_is(const char *name, const char *word);
/* Hang, or die by a segmentation fault, if the temper says so for this function (and this call of it). */
void act_up(const char *function);
/* Write down that a rule was broken, where the test finds it. */
void breach(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Fabric. */

/* Take a place in the fabric for a queue pair of the device with this address: NULL and errno EBUSY when the device
 * has all that it may have. *qp_num is its number. */
fabric_qp *fabric_enter(const char *ip, int max_of_device, uint32_t *qp_num);
void fabric_leave(fabric_qp *qp);
/* From now on it takes messages of a peer that starts with this PSN. */
void fabric_listen(fabric_qp *qp, uint32_t psn, bool dead);
void fabric_receive_posted(fabric_qp *qp);
/* The address of the device that has this queue pair, or NULL. */
const char *fabric_owner(uint32_t qp_num);
/* Send, as the temper says: lost, damaged, twice or dropped for want of a receive. Never tells. */
void fabric_send(uint32_t qp_num, uint32_t psn, const void *bytes, uint32_t n);
/* The oldest message that has come, or NULL; fabric_taken frees it. */
const void *fabric_arrived(fabric_qp *qp, uint32_t *n);
void fabric_taken(fabric_qp *qp);

#endif
