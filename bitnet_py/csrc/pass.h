/* One pass as seen by one of its threads, and what every operation does besides its arithmetic:
 * wait at the barrier, record taps, count.
 *
 * All threads execute the same program on shared data, with barriers between phases. A buffer
 * written in a phase is never read or recorded by another thread in the same phase.
 */
#ifndef BN_PASS_H
#define BN_PASS_H

#include "engine.h"

#include <string.h>

typedef struct {
    bn_engine *engine;
    const bn_pass *pass;
    int thread, n_threads;
} bn_run;

static inline void bn_barrier(const bn_run *r) { bn_pool_barrier(r->engine->pool); }

/* The destination of the tap in this pass, or NULL. */
static inline float *bn_tap(const bn_run *r, int32_t layer, int which) {
    return r->pass->taps ? r->pass->taps[(int64_t)layer * BN_LAYER_TAPS + which] : NULL;
}

/* Copies a tap of a layer to its destination; by thread 0, while no thread writes `source`. */
static inline void bn_record(const bn_run *r, int32_t layer, int which, const float *source, int64_t n) {
    float *target = bn_tap(r, layer, which);
    if (target && r->thread == 0) memcpy(target, source, (size_t)n * sizeof *source);
}

/* The same for a model-wide tap; they follow those of the last layer. */
static inline void bn_record_model(const bn_run *r, int which, const float *source, int64_t n) {
    bn_record(r, r->engine->model.n_layers, which, source, n);
}

/* Once per operation and pass. */
static inline void bn_count_once(const bn_run *r, int which, uint64_t bytes) {
    if (r->thread == 0) bn_count(&r->engine->counters, which, bytes);
}

#endif
