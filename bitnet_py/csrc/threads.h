/* A fixed team of threads that run one function together and meet at barriers. The calling thread is member 0.
 * Between jobs the others sleep; inside a job they spin, because barriers are microseconds apart. */
#ifndef BN_THREADS_H
#define BN_THREADS_H

#include <stdint.h>

typedef struct bn_team bn_team;
typedef void (*bn_job)(void *argument, int member, int n_members);

/* NULL when a thread could not be started. */
bn_team *bn_team_create(int n_members);
void bn_team_free(bn_team *team);
int bn_team_size(const bn_team *team);
/* Runs the job on members 0 .. n_active-1; the others sleep on. */
void bn_team_run(bn_team *team, int n_active, bn_job job, void *argument);
/* Only inside a job, by every active member. */
void bn_team_barrier(bn_team *team);

/* Member `member`'s share [*lo, *hi) of n items, in multiples of `unit` but for the last. */
static inline void bn_share(int64_t n, int64_t unit, int member, int n_members, int64_t *lo, int64_t *hi) {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t a = units * member / n_members * unit, b = units * (member + 1) / n_members * unit;
    *lo = a < n ? a : n;
    *hi = b < n ? b : n;
}

#endif
