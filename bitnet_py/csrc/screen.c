#include "screen.h"

#include <math.h>

/* The integer product must not overflow: 127 * largest * dim < 2^31, and z is 16 bits wide. */
static double largest_z(int64_t dim) {
    const double largest = floor(2147483647.0 / (127.0 * (double)dim));
    return largest < 32767.0 ? largest : 32767.0;
}

/* Rounding of a logit relative to |a| |y|: a term passes at most dim / 32 fused steps, the
 * additions of the accumulators and lanes (at most 6) and the final rounding; one more covers (1
 * + u)^m - m u - 1. */
static double gamma_of(int64_t dim) { return ((double)dim / 32.0 + 9.0) * 0x1p-24; }

void bn_search_prepare(bn_search *s) {
    double top = 0, squares = 0, lost = 0;
    for (int64_t i = 0; i < s->dim; i++) {
        const double magnitude = fabs((double)s->y[i]);
        if (magnitude > top) top = magnitude;
        squares += (double)s->y[i] * (double)s->y[i];
    }
    s->step = top / largest_z(s->dim);
    for (int64_t i = 0; i < s->dim; i++) {
        const double z = s->step > 0 ? rint((double)s->y[i] / s->step) : 0;
        s->z[i] = (int16_t)(isfinite(z) ? z : 0);
        const double f = (double)s->y[i] - s->step * z;
        lost += f * f;
    }
    /* 1e-9 covers what binary64 rounds here and in the intervals, by orders of magnitude; not
     * finite stays not finite */
    const double y = sqrt(squares) * (1 + 1e-9), f = sqrt(lost) * (1 + 1e-9), gamma = gamma_of(s->dim);
    s->per_error = y * (1 + gamma) * (1 + 1e-9);
    s->per_norm = (f + (gamma + 1e-12) * y) * (1 + 1e-9);
}

static void keep_lower(bn_found *own, int32_t n, double value) {
    if (own->n_lower == n && !(value > own->lower[n - 1])) return;
    int32_t at = own->n_lower < n ? own->n_lower++ : n - 1;
    for (; at > 0 && value > own->lower[at - 1]; at--) own->lower[at] = own->lower[at - 1];
    own->lower[at] = value;
}

void bn_search_screen(const bn_search *s, int64_t lo, int64_t hi, bn_found *own) {
    enum { GROUP = 16 };
    int32_t products[GROUP];
    own->n_lower = 0;
    for (int64_t row = lo; row < hi; row += GROUP) {
        const int64_t n = hi - row < GROUP ? hi - row : GROUP;
        s->kernels->screen_dots(s->screen->codes + row * s->dim, n, s->z, s->dim, products);
        for (int64_t i = 0; i < n; i++) {
            const int64_t r = row + i;
            const double centre = (double)s->screen->scale[r] * s->step * (double)products[i];
            const double half =
                (double)s->screen->error[r] * s->per_error + (double)s->screen->norm[r] * s->per_norm;
            s->upper[r] = centre + half;
            if (centre - half == centre - half) keep_lower(own, s->n, centre - half);
        }
    }
}

/* A NaN comes first: it must not stay hidden. */
static int before(float a, int32_t a_id, float b, int32_t b_id) {
    if (isnan(a) || isnan(b)) return isnan(a) && (!isnan(b) || a_id < b_id);
    return a > b || (a == b && a_id < b_id);
}

static void keep_logit(int32_t *ids, float *logits, int32_t *n_found, int32_t n, int32_t id, float logit) {
    if (*n_found == n && !before(logit, id, logits[n - 1], ids[n - 1])) return;
    int32_t at = *n_found < n ? (*n_found)++ : n - 1;
    for (; at > 0 && before(logit, id, logits[at - 1], ids[at - 1]); at--) {
        ids[at] = ids[at - 1];
        logits[at] = logits[at - 1];
    }
    ids[at] = id;
    logits[at] = logit;
}

void bn_search_rescore(const bn_search *s, int64_t lo, int64_t hi, const bn_found *all, int n_threads,
                       bn_found *own) {
    /* the n-th largest lower end of all rows; without n usable ones every row is scored */
    bn_found merged;
    merged.n_lower = 0;
    for (int t = 0; t < n_threads; t++)
        for (int32_t i = 0; i < all[t].n_lower; i++) keep_lower(&merged, s->n, all[t].lower[i]);
    const double least = merged.n_lower == s->n ? merged.lower[s->n - 1] : -INFINITY;
    own->n_found = 0;
    own->n_rescored = 0;
    for (int64_t r = lo; r < hi; r++) {
        if (s->upper[r] < least) continue; /* false for a NaN */
        float logit;
        s->dots(s->head + r * s->dim, s->dim, 1, s->y, s->dim, 1, s->dim, &logit, 1);
        keep_logit(own->ids, own->logits, &own->n_found, s->n, (int32_t)r, logit);
        own->n_rescored++;
    }
}

void bn_search_merge(const bn_search *s, const bn_found *all, int n_threads, bn_top *top) {
    int32_t n_found = 0;
    top->n_rescored = 0;
    for (int t = 0; t < n_threads; t++) {
        for (int32_t i = 0; i < all[t].n_found; i++)
            keep_logit(top->ids, top->logits, &n_found, s->n, all[t].ids[i], all[t].logits[i]);
        top->n_rescored += all[t].n_rescored;
    }
}
