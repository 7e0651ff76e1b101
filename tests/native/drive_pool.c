/* Twenty thousand tiny jobs on three threads: every task runs once, and a thread's own memory is its own. Between
 * some jobs the threads fall asleep, and must wake: a task then waits until each has one. Meant for ThreadSanitizer,
 * which sees every access that nothing orders. */

#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "private.h"

#define CHECK(condition)                                        \
    do {                                                        \
        if (!(condition)) {                                     \
            printf("line %d: %s\n", __LINE__, #condition);      \
            exit(1);                                            \
        }                                                       \
    } while (0)

enum { NUM_THREADS = 3, NUM_JOBS = 20000, MAX_TASKS = 40 };

typedef struct {
    int number;
    int *runs;           /* [MAX_TASKS] */
    int64_t *of_threads; /* [NUM_THREADS * 8] */
} job;

static void count(const void *context, int64_t index, int thread) {
    const job *j = context;
    CHECK(index >= 0 && index < MAX_TASKS && thread >= 0 && thread < NUM_THREADS);
    j->runs[index] += j->number;
    j->of_threads[thread * 8]++;
}

/* As many tasks as threads: none ends before all have begun. */
static void meet(const void *context, int64_t index, int thread) {
    _Atomic int *begun = *(_Atomic int *const *)context;
    (void)index, (void)thread;
    atomic_fetch_add(begun, 1);
    while (atomic_load(begun) < NUM_THREADS) sched_yield();
}

static void rest(long us) {
    const struct timespec t = {0, us * 1000};
    nanosleep(&t, NULL);
}

static void run_jobs(xd_pool *pool, int num_jobs) {
    int64_t total = 0, of_threads[NUM_THREADS * 8] = {0};
    for (int i = 0; i < num_jobs; i++) {
        int runs[MAX_TASKS] = {0};
        const int num_tasks = i * 7 % (MAX_TASKS + 1);
        const job j = {i, runs, of_threads};
        xd_pool_run(pool, count, &j, num_tasks);
        for (int k = 0; k < MAX_TASKS; k++) CHECK(runs[k] == (k < num_tasks ? i : 0));
        total += num_tasks;
        if (i % 200 == 199) {
            _Atomic int begun = 0, *context = &begun;
            rest(i % 400 == 399 ? 300 : 40); /* longer and about as long as they look for work */
            xd_pool_run(pool, meet, &context, NUM_THREADS);
        }
    }
    for (int t = 0; t < NUM_THREADS; t++) total -= of_threads[t * 8];
    CHECK(total == 0);
}

int main(void) {
    char err[200];
    for (int i = 0; i < 50; i++) { /* closed at once, while at work, and asleep */
        xd_pool *pool = xd_pool_open(NUM_THREADS, err, sizeof err);
        CHECK(pool && xd_pool_num_threads(pool) == NUM_THREADS);
        run_jobs(pool, i % 5);
        if (i % 10 == 9) rest(200);
        xd_pool_close(pool);
    }
    xd_pool *pool = xd_pool_open(NUM_THREADS, err, sizeof err);
    CHECK(pool);
    run_jobs(pool, NUM_JOBS);
    xd_pool_close(pool);
    xd_pool_close(NULL);
    CHECK(!xd_pool_open(0, err, sizeof err) && strstr(err, "0 threads"));
    printf("ok\n");
    return 0;
}
