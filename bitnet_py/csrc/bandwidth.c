/* Bandwidth probe, a streaming read of a buffer: what a pass over the weights would cost if
 * only reading them took time. */
#include "bitnet.h"
#include "error.h"
#include "thread_pool.h"
#if !defined(BN_SCALAR_ONLY)
#include "cpu_x86.h"
#endif

enum { LANES = 16 }; /* independent sums, so that loads do not wait for additions */

typedef struct {
    const uint64_t *data;
    int64_t n;
    int n_passes;   /* over the whole buffer, so that starting the threads does not count */
    uint64_t *sums; /* [n_threads] */
} reading;

/* No software prefetch: it made reading slower, 29 instead of 36 GB/s where this was written. */
static inline __attribute__((always_inline)) void read_share(const reading *r, int thread, int n_threads) {
    uint64_t lanes[LANES] = {0}, sum = 0;
    int64_t lo, hi;
    bn_share(r->n, LANES, thread, n_threads, &lo, &hi);
    for (int pass = 0; pass < r->n_passes; pass++) {
        int64_t i = lo;
        for (; i + LANES <= hi; i += LANES)
            for (int lane = 0; lane < LANES; lane++) lanes[lane] += r->data[i + lane];
        for (; i < hi; i++) sum += r->data[i];
    }
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    r->sums[thread] = sum;
}

static void read_portable(void *argument, int thread, int n_threads) { read_share(argument, thread, n_threads); }

#if defined(BN_SCALAR_ONLY)
static bn_job best_read(void) { return read_portable; }
#else
/* 256-bit loads read a tenth more than the 128-bit ones every x86 has. */
__attribute__((target("avx2"))) static void read_avx2(void *argument, int thread, int n_threads) {
    read_share(argument, thread, n_threads);
}

static bn_job best_read(void) { return bn_x86_has_avx2() ? read_avx2 : read_portable; }
#endif

int bn_probe_bandwidth(const uint64_t *data, int64_t n, int n_passes, int n_threads, uint64_t *sum) {
    enum { MOST_THREADS = 1024 };
    uint64_t sums[MOST_THREADS];
    if (!data || n < 1 || n_passes < 1 || n_threads < 1 || n_threads > MOST_THREADS) {
        bn_set_error("the bandwidth probe needs a buffer, at least one pass, and between 1 and %d threads",
                     MOST_THREADS);
        return BN_ERR_ARGUMENT;
    }
    bn_pool *pool = bn_pool_create(n_threads);
    if (!pool) {
        bn_set_error("could not start the worker threads");
        return BN_ERR_THREAD;
    }
    reading r = {data, n, n_passes, sums};
    bn_pool_run(pool, n_threads, best_read(), &r);
    bn_pool_free(pool);
    *sum = 0;
    for (int i = 0; i < n_threads; i++) *sum += sums[i];
    return BN_OK;
}
