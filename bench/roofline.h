/* roofline.h: what this processor can do at most: bytes read from memory and operations in registers per second. cffi and
 * the compiler read the same text; the loops are compiled when the benchmark starts. */

enum {
    XR_READ = 0,  /* bytes per second read from a buffer */
    XR_INT8 = 1,  /* operations (2 per multiply-add) per second on 8-bit integers, summed in 16 or 32 bits */
    XR_FLOAT = 2, /* the same on float32 */
    XR_NO_LOOP = -1,
    XR_NO_MEMORY = -2,
    XR_NO_THREAD = -3
};

/* The loops of a kind that run on this processor, with spaces between. */
const char *xr_loops(int kind);

/* Memory as malloc gives it to MLX, with pages of the usual size, or in huge ones where the system has them; filled with
 * numbers, in `bytes`, a multiple of 4096. NULL when there is none. */
void *xr_buffer(size_t bytes, int huge);
void xr_free(void *buffer, size_t bytes);

/* Run a loop once on num_threads threads, thread t on processor cpus[t] (NULL: not pinned): each reads its part of the
 * buffer, or computes for about `seconds`. All begin together; the time is that until the last is done. The rate of all
 * of them goes into *rate. 0, or one of the codes above. */
int xr_run(int kind, const char *loop, const int *cpus, int num_threads, const void *buffer, size_t bytes,
           double seconds, double *rate);
