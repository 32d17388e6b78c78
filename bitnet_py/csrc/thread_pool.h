/* A fixed pool of threads that run one function together, with barriers. The calling thread is
 * thread 0. Between jobs the others sleep; inside a job they spin, because barriers are
 * microseconds apart. */
#ifndef BN_THREAD_POOL_H
#define BN_THREAD_POOL_H

#include <stdint.h>

typedef struct bn_pool bn_pool;
typedef void (*bn_job)(void *argument, int thread, int n_threads);

/* NULL when a thread could not be started. */
bn_pool *bn_pool_create(int n_threads);
void bn_pool_free(bn_pool *pool);
int bn_pool_size(const bn_pool *pool);
/* Runs the job on threads 0 .. n_active-1; the others keep sleeping. */
void bn_pool_run(bn_pool *pool, int n_active, bn_job job, void *argument);
/* Call only inside a job, from every active thread. */
void bn_pool_barrier(bn_pool *pool);

/* Part [*lo, *hi) of n items for thread `thread`, in multiples of `unit` except for the last. */
static inline void bn_share(int64_t n, int64_t unit, int thread, int n_threads, int64_t *lo, int64_t *hi) {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t a = units * thread / n_threads * unit, b = units * (thread + 1) / n_threads * unit;
    *lo = a < n ? a : n;
    *hi = b < n ? b : n;
}

#endif
