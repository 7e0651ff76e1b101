/* pool.c: the threads that share a job.

   Theory of operation. A job is a number of tasks that do not touch each other's memory. One 64-bit word says how many
   there are and which is next: a thread takes a task by adding 1 to it. The count is in the same word, so what a thread
   takes always belongs to the job that it saw, even if that job ended and the next began between two of its instructions:
   a job cannot end while one of its tasks is held, and a task beyond the count is nobody's.

   A thread without work looks for SPIN_NS, giving its processor away between looks after the first few, then sleeps until
   the next job. Longer spinning would take the processor from MLX's main thread, which builds what comes next; sleeping at once
   would cost a wake-up of 20 to 50 us at each of the hundred products of a token.

   Linux may wake a thread on the processor of the one that shares the job out, and leaves it there for 10 ms, although another
   is idle: a spinning thread that yields looks as if it had just run. So threads that sleep are kept off that processor. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "private.h"

enum { INDEX_BITS = 28, MAX_THREADS = 256 };
#define INDEX_MASK (((uint64_t)1 << INDEX_BITS) - 1)
#define SPIN_NS 50000
#define BUSY_LOOKS 200 /* about 5 us of `pause` */

typedef struct {
  xd_pool *pool;
  pthread_t thread;
  int number;
} worker;

struct xd_pool {
  _Alignas(64) _Atomic uint64_t word; /* a job's number of tasks, and the next task */
  _Alignas(64) _Atomic int64_t done;
  _Alignas(64) _Atomic int sleepers;
  _Atomic int stop;
  xd_task task;
  const void *job;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  int num_threads;
  int num_started;
  int kept_off; /* the processor that the other threads may not use; -1 before the first wake-up */
  worker workers[];
};

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int has_work(xd_pool *pool) {
  uint64_t word = atomic_load(&pool->word); /* in one order with `sleepers`: see work() */
  return (word & INDEX_MASK) < word >> INDEX_BITS;
}

static void take_tasks(xd_pool *pool, int thread) {
  while (has_work(pool)) {
    uint64_t word = atomic_fetch_add_explicit(&pool->word, 1, memory_order_acq_rel);
    uint64_t index = word & INDEX_MASK;
    if (index >= word >> INDEX_BITS) return;
    pool->task(pool->job, (int64_t)index, thread);
    atomic_fetch_add_explicit(&pool->done, 1, memory_order_release);
  }
}

/* 1 when there is work within SPIN_NS. */
static int look(xd_pool *pool) {
  for (int i = 0; i < BUSY_LOOKS; i++) {
    if (has_work(pool) || atomic_load(&pool->stop)) return 1;
    relax();
  }
  int64_t end = now_ns() + SPIN_NS;
  while (now_ns() < end) {
    if (has_work(pool) || atomic_load(&pool->stop)) return 1;
    sched_yield();
  }
  return 0;
}

static void *work(void *argument) {
  worker *me = argument;
  xd_pool *pool = me->pool;
  while (!atomic_load(&pool->stop)) {
    take_tasks(pool, me->number);
    if (look(pool)) continue;
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1); /* before the last look: who publishes later sees it and wakes us */
    while (!has_work(pool) && !atomic_load(&pool->stop)) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
  }
  return NULL;
}

/* Keep the other threads off the processor that we are on, where there is more than one for us. */
static void keep_off(xd_pool *pool) {
#if defined(__linux__)
  const int here = sched_getcpu();
  cpu_set_t others;
  if (here == pool->kept_off || here < 0 || here >= CPU_SETSIZE || sched_getaffinity(0, sizeof others, &others)) return;
  CPU_CLR((size_t)here, &others);
  if (CPU_COUNT(&others) == 0) return;
  for (int i = 1; i <= pool->num_started; i++) pthread_setaffinity_np(pool->workers[i].thread, sizeof others, &others);
  pool->kept_off = here;
#else
  (void)pool;
#endif
}

static void wake_all(xd_pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  pthread_cond_broadcast(&pool->wake);
  pthread_mutex_unlock(&pool->mutex);
}

void xd_pool_run(xd_pool *pool, xd_task task, const void *job, int64_t num_tasks) {
  if (pool->num_threads == 1 || num_tasks < 2 || num_tasks > (int64_t)(INDEX_MASK >> 1)) {
    for (int64_t i = 0; i < num_tasks; i++) task(job, i, 0);
    return;
  }
  pool->task = task, pool->job = job;
  atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
  atomic_store(&pool->word, (uint64_t)num_tasks << INDEX_BITS);
  if (atomic_load(&pool->sleepers)) {
    keep_off(pool);
    wake_all(pool);
  }
  take_tasks(pool, 0);
  for (int i = 0; atomic_load_explicit(&pool->done, memory_order_acquire) < num_tasks; i++) {
    if (i < BUSY_LOOKS)
      relax();
    else
      sched_yield(); /* a thread that holds a task may want this very processor */
  }
}

static int start_threads(xd_pool *pool) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's */
  int code = 0;
  for (int i = 1; i < pool->num_threads && code == 0; i++) {
    pool->workers[i] = (worker){.pool = pool, .number = i};
    code = pthread_create(&pool->workers[i].thread, NULL, work, &pool->workers[i]);
    pool->num_started += code == 0;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return code;
}

xd_pool *xd_pool_open(int num_threads, char *err, size_t err_bytes) {
  if (num_threads < 1 || num_threads > MAX_THREADS) {
    snprintf(err, err_bytes, "%d threads: wanted 1 to %d", num_threads, MAX_THREADS);
    return NULL;
  }
  size_t bytes = (size_t)xd_round_up((int64_t)(sizeof(xd_pool) + (size_t)num_threads * sizeof(worker)), 64);
  xd_pool *pool = aligned_alloc(64, bytes);
  if (!pool) {
    snprintf(err, err_bytes, "no memory for %d threads", num_threads);
    return NULL;
  }
  memset(pool, 0, bytes);
  pool->num_threads = num_threads;
  pool->kept_off = -1;
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->wake, NULL);
  int code = start_threads(pool);
  if (code) {
    snprintf(err, err_bytes, "thread %d of %d: %s", pool->num_started + 1, num_threads, strerror(code));
    xd_pool_close(pool);
    return NULL;
  }
  return pool;
}

void xd_pool_close(xd_pool *pool) {
  if (!pool) return;
  atomic_store(&pool->stop, 1);
  wake_all(pool);
  for (int i = 1; i <= pool->num_started; i++) pthread_join(pool->workers[i].thread, NULL);
  pthread_cond_destroy(&pool->wake);
  pthread_mutex_destroy(&pool->mutex);
  free(pool);
}

int xd_pool_num_threads(const xd_pool *pool) {
  return pool->num_threads;
}
