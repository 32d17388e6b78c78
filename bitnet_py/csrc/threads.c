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
    uint64_t generation; /* guarded by lock; a new value means a new job */
    int stopping;        /* guarded by lock */
    int n_active;        /* guarded by lock; fixed during a job */
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

/* Past this many polls the other members are probably not running: give the processor away. */
enum { SPINS_BEFORE_YIELD = 4096 };

void bn_team_barrier(bn_team *team) {
    if (team->n_active == 1) return;
    const unsigned phase = atomic_load_explicit(&team->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == team->n_active - 1) {
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

static void *work(void *argument) {
    member *self = argument;
    bn_team *team = self->team;
    uint64_t seen = 0;
    for (;;) {
        pthread_mutex_lock(&team->lock);
        while (team->generation == seen && !team->stopping) pthread_cond_wait(&team->wake, &team->lock);
        const int stopping = team->stopping;
        seen = team->generation;
        const int active = self->index < team->n_active;
        pthread_mutex_unlock(&team->lock);
        if (stopping) return NULL;
        if (!active) continue;
        team->job(team->argument, self->index, team->n_active);
        bn_team_barrier(team);
    }
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
        team->generation++;
        pthread_cond_broadcast(&team->wake);
    }
    pthread_mutex_unlock(&team->lock);
    job(argument, 0, n_active);
    bn_team_barrier(team);
}
