#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef struct {
    bn_team *team;
    int index;
    pthread_t thread;
} member;

struct bn_team {
    int n_members;
    int n_started;
    member *members;
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
    /* past this many polls the other members are probably not running: give the processor away */
    SPINS_BEFORE_YIELD = 4096,
    /* passes follow each other closely: about a millisecond of polling spares the next one a wake-up, after which
     * the scheduler may leave both threads on one processor for many milliseconds */
    SPINS_BEFORE_SLEEP = 40000,
};

void bn_team_barrier(bn_team *team) {
    /* read before arriving: after the last arrival the next job may set it already */
    const int n_active = team->n_active;
    if (n_active == 1) return;
    const unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == n_active - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS_BEFORE_YIELD)
            relax();
        else
            sched_yield();
    }
}

/* Waits for a job newer than `seen`; 0 when the team is stopping. */
static int wait_for_job(bn_team *team, unsigned seen) {
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP; spins++) {
        if (atomic_load_explicit(&team->generation, memory_order_acquire) != seen) break;
        relax();
    }
    pthread_mutex_lock(&team->lock);
    while (atomic_load_explicit(&team->generation, memory_order_relaxed) == seen && !team->stopping)
        pthread_cond_wait(&team->wake, &team->lock);
    const int go_on = !team->stopping;
    pthread_mutex_unlock(&team->lock);
    return go_on;
}

static void *work(void *argument) {
    member *self = argument;
    bn_team *team = self->team;
    unsigned seen = 0;
    while (wait_for_job(team, seen)) {
        pthread_mutex_lock(&team->lock);
        seen = atomic_load_explicit(&team->generation, memory_order_relaxed);
        const int active = self->index < team->n_active;
        pthread_mutex_unlock(&team->lock);
        if (!active) continue;
        team->job(team->argument, self->index, team->n_active);
        bn_team_barrier(team);
    }
    return NULL;
}

bn_team *bn_team_create(int n_members) {
    bn_team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->n_members = n_members;
    team->n_started = 1;
    team->members = calloc((size_t)n_members, sizeof *team->members);
    if (!team->members || pthread_mutex_init(&team->lock, NULL) || pthread_cond_init(&team->wake, NULL)) {
        free(team->members);
        free(team);
        return NULL;
    }
    for (int i = 1; i < n_members; i++) {
        team->members[i].team = team;
        team->members[i].index = i;
        if (pthread_create(&team->members[i].thread, NULL, work, &team->members[i])) {
            bn_team_free(team);
            return NULL;
        }
        team->n_started++;
    }
    return team;
}

void bn_team_free(bn_team *team) {
    if (!team) return;
    pthread_mutex_lock(&team->lock);
    team->stopping = 1;
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
    for (int i = 1; i < team->n_started; i++) pthread_join(team->members[i].thread, NULL);
    pthread_cond_destroy(&team->wake);
    pthread_mutex_destroy(&team->lock);
    free(team->members);
    free(team);
}

int bn_team_size(const bn_team *team) { return team->n_members; }

void bn_team_run(bn_team *team, int n_active, bn_job job, void *argument) {
    /* an inactive member may still be waking up for an earlier job: it reads n_active under the lock */
    pthread_mutex_lock(&team->lock);
    team->n_active = n_active;
    if (n_active > 1) {
        team->job = job;
        team->argument = argument;
        atomic_fetch_add_explicit(&team->generation, 1, memory_order_release);
        pthread_cond_broadcast(&team->wake);
    }
    pthread_mutex_unlock(&team->lock);
    job(argument, 0, n_active);
    bn_team_barrier(team);
}
