/* Exact top-k of the logits without reading the whole binary16 LM head (docs/certified-head.md).
 *
 * A row a of the head is scale * codes + e with |e| <= error; the hidden state y is step * z + f
 * with 16-bit integers z. Then a . y = scale * step * (codes . z) + e . y + scale * (codes . f),
 * and by Cauchy-Schwarz the last two are at most error * |y| + norm * |f|. The logit itself
 * is a . y rounded along its reduction, which adds at most gamma * |a| * |y|. So every logit lies in
 * an interval around the integer product, and a row whose interval ends below the n-th largest
 * lower end cannot be among the n largest.
 */
#ifndef BN_SCREEN_H
#define BN_SCREEN_H

#include "bitnet.h"
#include "kernels.h"

/* One search, shared by the threads of a pass. */
typedef struct {
    const bn_kernels *kernels;
    bn_dots_fn dots;      /* the head's own reduction */
    const uint16_t *head; /* [n_rows][dim] */
    int64_t n_rows, dim;
    const float *y; /* [dim] binary16 values */
    const bn_screen *screen;
    int16_t *z;    /* [dim] */
    double *upper; /* [n_rows] */
    double step;
    double per_error, per_norm; /* half the interval = error * per_error + norm * per_norm */
    int32_t n;
} bn_search;

/* What one thread found. */
typedef struct {
    double lower[BN_MAX_TOP]; /* largest lower ends among its rows, decreasing; n_lower of them */
    int32_t n_lower;
    int32_t ids[BN_MAX_TOP]; /* largest logits among its rows, n_found of them */
    float logits[BN_MAX_TOP];
    int32_t n_found;
    int64_t n_rescored;
} bn_found;

/* Phase 0, one thread: quantises y into z. */
void bn_search_prepare(bn_search *search);
/* Phase 1, each thread: the intervals of rows [lo, hi). */
void bn_search_screen(const bn_search *search, int64_t lo, int64_t hi, bn_found *own);
/* Phase 2, each thread, after all have screened: scores the rows of [lo, hi) that can still win. */
void bn_search_rescore(const bn_search *search, int64_t lo, int64_t hi, const bn_found *all, int n_threads,
                       bn_found *own);
/* Phase 3, one thread, after all have rescored. */
void bn_search_merge(const bn_search *search, const bn_found *all, int n_threads, bn_top *top);

#endif
