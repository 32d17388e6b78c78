#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef struct {
    bn_pool *pool;
    int index;
    pthread_t thread;
} worker;

struct bn_pool {
    int n_threads;
    int n_started;
    worker *workers;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_uint generation; /* a new value means a new job; written under the lock */
    int stopping;           /* guarded by lock */
    int n_active;           /* guarded by lock; fixed during a job */
    bn_job job;
    void *argument;
    atomic_int arrived;
    atomic_uint phase;
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

enum {
    /* past this many polls the other threads are probably not running: give the processor away */
    SPINS_BEFORE_YIELD = 4096,
    /* passes follow each other closely: about a millisecond of polling saves the next one a
     * wake-up, after which the scheduler may leave both threads on one processor for many
     * milliseconds */
    SPINS_BEFORE_SLEEP = 40000,
};

void bn_pool_barrier(bn_pool *pool) {
    /* read before arriving: after the last arrival the next job may set it already */
    const int n_active = pool->n_active;
    if (n_active == 1) return;
    const unsigned phase = atomic_load_explicit(&pool->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) == n_active - 1) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&pool->phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS_BEFORE_YIELD)
            relax();
        else
            sched_yield();
    }
}

/* Waits for a job newer than `seen`; 0 when the pool is stopping. */
static int wait_for_job(bn_pool *pool, unsigned seen) {
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP; spins++) {
        if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen) break;
        relax();
    }
    pthread_mutex_lock(&pool->lock);
    while (atomic_load_explicit(&pool->generation, memory_order_relaxed) == seen && !pool->stopping)
        pthread_cond_wait(&pool->wake, &pool->lock);
    const int go_on = !pool->stopping;
    pthread_mutex_unlock(&pool->lock);
    return go_on;
}

static void *work(void *argument) {
    worker *self = argument;
    bn_pool *pool = self->pool;
    unsigned seen = 0;
    while (wait_for_job(pool, seen)) {
        pthread_mutex_lock(&pool->lock);
        seen = atomic_load_explicit(&pool->generation, memory_order_relaxed);
        const int active = self->index < pool->n_active;
        pthread_mutex_unlock(&pool->lock);
        if (!active) continue;
        pool->job(pool->argument, self->index, pool->n_active);
        bn_pool_barrier(pool);
    }
    return NULL;
}

bn_pool *bn_pool_create(int n_threads) {
    bn_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->n_threads = n_threads;
    pool->n_started = 1;
    pool->workers = calloc((size_t)n_threads, sizeof *pool->workers);
    if (!pool->workers || pthread_mutex_init(&pool->lock, NULL) || pthread_cond_init(&pool->wake, NULL)) {
        free(pool->workers);
        free(pool);
        return NULL;
    }
    for (int i = 1; i < n_threads; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].index = i;
        if (pthread_create(&pool->workers[i].thread, NULL, work, &pool->workers[i])) {
            bn_pool_free(pool);
            return NULL;
        }
        pool->n_started++;
    }
    return pool;
}

void bn_pool_free(bn_pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->stopping = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 1; i < pool->n_started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool->workers);
    free(pool);
}

int bn_pool_size(const bn_pool *pool) { return pool->n_threads; }

void bn_pool_run(bn_pool *pool, int n_active, bn_job job, void *argument) {
    /* an inactive thread may still be waking up for an earlier job: it reads n_active under the
     * lock */
    pthread_mutex_lock(&pool->lock);
    pool->n_active = n_active;
    if (n_active > 1) {
        pool->job = job;
        pool->argument = argument;
        atomic_fetch_add_explicit(&pool->generation, 1, memory_order_release);
        pthread_cond_broadcast(&pool->wake);
    }
    pthread_mutex_unlock(&pool->lock);
    job(argument, 0, n_active);
    bn_pool_barrier(pool);
}
