/* roofline.c: see roofline.h.
 *
 * Each loop is one function: it reads `amount` bytes, or makes `amount` rounds of multiply-adds, and gives a sum that
 * keeps the compiler from leaving anything out. Several loops of a kind do the same in other ways, and the best of
 * them counts: which one that is depends on the processor. */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#include "roofline.h"

/* NUM_SUMS sums grow at once, each waiting for itself alone: more than any processor's latency times its width, and as many
 * as 16 registers hold beside the operands. */
enum { AHEAD = 1024, NUM_STREAMS = 4, NUM_SUMS = 12, MAX_THREADS = 256, MAX_NAMES = 400 };

typedef uint64_t (*loop_function)(const char *from, size_t amount);

static uint64_t total(const void *sums, size_t bytes) {
    uint64_t sum = 0, one;
    for (size_t at = 0; at + sizeof one <= bytes; at += sizeof one) {
        memcpy(&one, (const char *)sums + at, sizeof one);
        sum += one;
    }
    return sum;
}

/* Reading, eight vectors a step. `streams` parts are read at once, so that as many pages are; `ahead` is how many bytes
 * before they are wanted. */

#define READ_LOOP(name, attributes, vector, streams, ahead)                                                        \
    attributes static uint64_t name(const char *from, size_t amount) {                                             \
        size_t step = 8 * sizeof(vector), part = amount / (streams) / step * step;                                 \
        vector a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};                             \
        for (size_t at = 0; at < part; at += step)                                                                 \
            for (size_t s = 0; s < (streams); s++) {                                                               \
                const vector *p = (const vector *)(from + s * part + at);                                          \
                if (ahead)                                                                                         \
                    for (size_t line = 0; line < step; line += 64)                                                 \
                        __builtin_prefetch((const char *)p + (ahead) + line);                                      \
                a += p[0], b += p[1], c += p[2], d += p[3], e += p[4], f += p[5], g += p[6], h += p[7];            \
            }                                                                                                      \
        vector sums = a + b + c + d + e + f + g + h;                                                               \
        return total(&sums, sizeof sums);                                                                          \
    }
#define READ_LOOPS(name, attributes, vector)                \
    READ_LOOP(name, attributes, vector, 1, 0)               \
    READ_LOOP(name##_ahead, attributes, vector, 1, AHEAD)   \
    READ_LOOP(name##_streams, attributes, vector, NUM_STREAMS, 0)

typedef uint64_t vector8;
typedef uint64_t vector16 __attribute__((vector_size(16)));
READ_LOOP(read_8, , vector8, 1, 0)
READ_LOOPS(read_16, , vector16)

/* Multiply-adds: `s = f(s, x, y)` for each of the sums. The empty asm makes x unknown again each time, so that no two of
 * the products are one. */

#define ARITHMETIC_LOOP(name, attributes, vector, operand, in, multiply_add)          \
    attributes static uint64_t name(const char *from, size_t amount) {                \
        operand x, y;                                                                 \
        memcpy(&x, from, sizeof x), memcpy(&y, from + 64, sizeof y);                  \
        vector s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11;                      \
        FOR_SUMS(START)                                                               \
        for (size_t i = 0; i < amount; i++) {                                         \
            FOR_EACH(STEP, in, multiply_add)                                          \
        }                                                                             \
        vector sums[NUM_SUMS] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11};   \
        return total(sums, sizeof sums);                                              \
    }
#define START(s) memcpy(&s, from + 128, sizeof s);
#define STEP(s, in, f) __asm__("" : "+" in(x)); s = f(s, x, y);
#define FOR_SUMS(do) \
    do(s0) do(s1) do(s2) do(s3) do(s4) do(s5) do(s6) do(s7) do(s8) do(s9) do(s10) do(s11)
#define FOR_EACH(do, in, f)                                                                               \
    do(s0, in, f) do(s1, in, f) do(s2, in, f) do(s3, in, f) do(s4, in, f) do(s5, in, f) do(s6, in, f)     \
    do(s7, in, f) do(s8, in, f) do(s9, in, f) do(s10, in, f) do(s11, in, f)

#if defined(__x86_64__)
#define IN_VECTOR "x"
#elif defined(__aarch64__)
#define IN_VECTOR "w"
#else
#define IN_VECTOR "m"
#endif
#define SCALAR_INT8(s, x, y) ((int32_t)(int8_t)(x) * (int8_t)(y) + (s))
#define SCALAR_FLOAT(s, x, y) ((x) * (y) + (s))
ARITHMETIC_LOOP(int8_scalar, , int32_t, int32_t, "r", SCALAR_INT8)
ARITHMETIC_LOOP(float_scalar, , float, float, IN_VECTOR, SCALAR_FLOAT)

#if defined(__x86_64__)

typedef uint64_t vector32 __attribute__((vector_size(32)));
typedef uint64_t vector64 __attribute__((vector_size(64)));
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw")))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))
READ_LOOPS(read_32, AVX2, vector32)
READ_LOOPS(read_64, AVX512, vector64)
#define MADDUBS(s, x, y) _mm256_add_epi16(s, _mm256_maddubs_epi16(x, y))
#define FMA256(s, x, y) _mm256_fmadd_ps(x, y, s)
#define FMA512(s, x, y) _mm512_fmadd_ps(x, y, s)
ARITHMETIC_LOOP(int8_avx2, AVX2, __m256i, __m256i, "x", MADDUBS)
ARITHMETIC_LOOP(float_avx2, AVX2, __m256, __m256, "x", FMA256)
ARITHMETIC_LOOP(float_avx512, AVX512, __m512, __m512, "v", FMA512)
ARITHMETIC_LOOP(int8_vnni, VNNI, __m512i, __m512i, "v", _mm512_dpbusd_epi32)
#if __GNUC__ >= 11 || __clang_major__ >= 12
#define AVX_VNNI __attribute__((target("avx2,avxvnni")))
ARITHMETIC_LOOP(int8_avx_vnni, AVX_VNNI, __m256i, __m256i, "x", _mm256_dpbusd_avx_epi32)
#endif

static bool has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_avx512(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
static bool has_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
static bool has_avx_vnni(void) { /* compilers older than the feature have no name for it */
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
}

#elif defined(__aarch64__)

#if defined(__clang__)
#define DOT __attribute__((target("dotprod")))
#define I8MM __attribute__((target("i8mm")))
#else
#define DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#define I8MM __attribute__((target("arch=armv8.2-a+i8mm")))
#endif
#define FMA128(s, x, y) vfmaq_f32(s, x, y)
#define SDOT(s, x, y) vdotq_s32(s, x, y)
#define SMMLA(s, x, y) vmmlaq_s32(s, x, y)
ARITHMETIC_LOOP(float_neon, , float32x4_t, float32x4_t, "w", FMA128)
ARITHMETIC_LOOP(int8_dot, DOT, int32x4_t, int8x16_t, "w", SDOT)
ARITHMETIC_LOOP(int8_i8mm, I8MM, int32x4_t, int8x16_t, "w", SMMLA)

#if defined(__linux__)
static bool has_dot(void) { return getauxval(AT_HWCAP) & 1ul << 20; }   /* HWCAP_ASIMDDP */
static bool has_i8mm(void) { return getauxval(AT_HWCAP2) & 1ul << 13; } /* HWCAP2_I8MM */
#else /* every Apple processor since the A13 has the first, since the M2 the second */
#include <sys/sysctl.h>
static bool has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, NULL, 0) == 0 && value;
}
static bool has_dot(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static bool has_i8mm(void) { return has("hw.optional.arm.FEAT_I8MM"); }
#endif

#endif

static bool always(void) { return true; }

/* `operations` are those of one round. */
static const struct loop {
    int kind;
    const char *name;
    loop_function run;
    bool (*runs_here)(void);
    int operations;
} LOOPS[] = {
    {XR_READ, "scalar", read_8, always, 0},
    {XR_READ, "vector16", read_16, always, 0},
    {XR_READ, "vector16-ahead", read_16_ahead, always, 0},
    {XR_READ, "vector16-streams", read_16_streams, always, 0},
    {XR_INT8, "scalar", int8_scalar, always, 2 * NUM_SUMS},
    {XR_FLOAT, "scalar", float_scalar, always, 2 * NUM_SUMS},
#if defined(__x86_64__)
    {XR_READ, "avx2", read_32, has_avx2, 0},
    {XR_READ, "avx2-ahead", read_32_ahead, has_avx2, 0},
    {XR_READ, "avx2-streams", read_32_streams, has_avx2, 0},
    {XR_READ, "avx512", read_64, has_avx512, 0},
    {XR_READ, "avx512-ahead", read_64_ahead, has_avx512, 0},
    {XR_READ, "avx512-streams", read_64_streams, has_avx512, 0},
    {XR_INT8, "avx2-maddubs", int8_avx2, has_avx2, 2 * 32 * NUM_SUMS},
    {XR_INT8, "avx512-vpdpbusd", int8_vnni, has_vnni, 2 * 64 * NUM_SUMS},
#if __GNUC__ >= 11 || __clang_major__ >= 12
    {XR_INT8, "avx-vpdpbusd", int8_avx_vnni, has_avx_vnni, 2 * 32 * NUM_SUMS},
#endif
    {XR_FLOAT, "avx2-fma", float_avx2, has_avx2, 2 * 8 * NUM_SUMS},
    {XR_FLOAT, "avx512-fma", float_avx512, has_avx512, 2 * 16 * NUM_SUMS},
#elif defined(__aarch64__)
    {XR_INT8, "neon-sdot", int8_dot, has_dot, 2 * 16 * NUM_SUMS},
    {XR_INT8, "neon-smmla", int8_i8mm, has_i8mm, 2 * 32 * NUM_SUMS},
    {XR_FLOAT, "neon-fmla", float_neon, always, 2 * 4 * NUM_SUMS},
#endif
};
enum { NUM_LOOPS = sizeof LOOPS / sizeof *LOOPS };

const char *xr_loops(int kind) {
    static char names[3][MAX_NAMES];
    char *text = names[kind];
    text[0] = 0;
    for (int i = 0; i < NUM_LOOPS; i++) {
        if (LOOPS[i].kind != kind || !LOOPS[i].runs_here()) continue;
        if (text[0]) strcat(text, " ");
        strcat(text, LOOPS[i].name);
    }
    return text;
}

/* Memory. */

void *xr_buffer(size_t bytes, int huge) {
    char *buffer = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) return NULL;
#if defined(MADV_HUGEPAGE)
    if (huge) madvise(buffer, bytes, MADV_HUGEPAGE);
#else
    (void)huge;
#endif
    uint64_t number = 1;
    for (size_t at = 0; at < bytes; at += sizeof number) {
        number = number * 6364136223846793005u + 1442695040888963407u;
        memcpy(buffer + at, &number, sizeof number);
    }
    return buffer;
}

void xr_free(void *buffer, size_t bytes) { munmap(buffer, bytes); }

/* The threads. */

typedef struct {
    const struct loop *loop;
    const char *from;
    size_t amount;
    int cpu; /* -1: not pinned */
    int num_threads;
    _Atomic int *num_ready;
    pthread_t thread;
    uint64_t begin_ns, end_ns;
    volatile uint64_t sum;
} part;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void pin(int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (cpu >= 0) pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
    (void)cpu;
#endif
}

static void *run_part(void *argument) {
    part *p = argument;
    pin(p->cpu);
    atomic_fetch_add(p->num_ready, 1);
    while (atomic_load(p->num_ready) < p->num_threads) sched_yield();
    p->begin_ns = now_ns();
    p->sum = p->loop->run(p->from, p->amount);
    p->end_ns = now_ns();
    return NULL;
}

/* Run all parts at once; nanoseconds from the first's begin to the last's end, 0 when a thread cannot be had. */
static uint64_t run_parts(part *parts, int num_threads) {
    _Atomic int num_ready = 0;
    int started = 0;
    for (; started < num_threads; started++) {
        parts[started].num_ready = &num_ready;
        if (pthread_create(&parts[started].thread, NULL, run_part, &parts[started])) break;
    }
    if (started < num_threads) atomic_store(&num_ready, MAX_THREADS); /* lets the others go */
    uint64_t begin = UINT64_MAX, end = 0;
    for (int i = 0; i < started; i++) {
        pthread_join(parts[i].thread, NULL);
        if (parts[i].begin_ns < begin) begin = parts[i].begin_ns;
        if (parts[i].end_ns > end) end = parts[i].end_ns;
    }
    return started < num_threads ? 0 : end > begin ? end - begin : 1;
}

/* Rounds of a loop that take about `seconds` on this processor. */
static size_t rounds_of(const struct loop *loop, const char *from, double seconds) {
    for (size_t rounds = 1 << 12;; rounds *= 2) {
        uint64_t begin = now_ns();
        volatile uint64_t sum = loop->run(from, rounds);
        (void)sum;
        uint64_t took = now_ns() - begin;
        if (took > 1000000) return (size_t)((double)rounds * seconds * 1e9 / (double)took) + 1;
    }
}

static const struct loop *find(int kind, const char *name) {
    for (int i = 0; i < NUM_LOOPS; i++)
        if (LOOPS[i].kind == kind && strcmp(LOOPS[i].name, name) == 0 && LOOPS[i].runs_here()) return &LOOPS[i];
    return NULL;
}

int xr_run(int kind, const char *name, const int *cpus, int num_threads, const void *buffer, size_t bytes,
           double seconds, double *rate) {
    const struct loop *loop = find(kind, name);
    if (!loop) return XR_NO_LOOP;
    if (num_threads < 1 || num_threads >= MAX_THREADS) return XR_NO_THREAD;
    part *parts = calloc((size_t)num_threads, sizeof *parts);
    if (!parts) return XR_NO_MEMORY;
    float ones[64]; /* sums of ones are never denormal, which would be slow on some processors */
    for (int i = 0; i < 64; i++) ones[i] = 1;
    size_t share = bytes / (size_t)num_threads / 4096 * 4096;
    size_t rounds = kind == XR_READ ? 0 : rounds_of(loop, (const char *)ones, seconds);
    for (int i = 0; i < num_threads; i++) {
        const char *from = kind == XR_READ ? (const char *)buffer + share * (size_t)i : (const char *)ones;
        parts[i] = (part){.loop = loop, .from = from, .cpu = cpus ? cpus[i] : -1, .num_threads = num_threads};
        parts[i].amount = kind == XR_READ ? share : rounds;
    }
    uint64_t ns = run_parts(parts, num_threads);
    double work = kind == XR_READ ? (double)share : (double)rounds * loop->operations;
    *rate = ns ? work * num_threads / ((double)ns / 1e9) : 0;
    free(parts);
    return ns ? 0 : XR_NO_THREAD;
}
