#include "head.h"
#include "error.h"

#include <stdlib.h>

/* ---- within a pass --------------------------------------------------------------------------------------- */

/* The product of one output row, and that of several (llamafile sgemm, which main refuses where the
 * vocabulary is not a multiple of 4). */
static bn_dots_fn dots_of(const bn_engine *e, int64_t n_rows) {
    const int is_tiled = n_rows > 1 && (e->arithmetic.generation == BN_MARCH || e->model.vocab_size % 4 == 0);
    return is_tiled ? e->kernels->dots_tiled[e->width_index] : e->kernels->dots_f16[e->dot];
}

static void all_logits(const bn_run *r, int64_t n_rows, float *logits) {
    const bn_engine *e = r->engine;
    const int64_t dim = e->model.dim, vocab = e->model.vocab_size;
    const bn_dots_fn dots = dots_of(e, n_rows);
    int64_t lo, hi;
    bn_share(vocab, 16, r->thread, r->n_threads, &lo, &hi);
    for (int64_t row = lo; row < hi; row += 16)
        dots(e->model.output + row * dim, dim, hi - row < 16 ? hi - row : 16, e->buffers.head_in, dim, n_rows, dim,
             logits + row, vocab);
    bn_count_once(r, BN_COUNT_HEAD_F16, (uint64_t)(vocab * dim) * sizeof(uint16_t));
}

/* The largest of them, first by interval: see screen.h. */
static void top_logits(const bn_run *r) {
    bn_engine *e = r->engine;
    bn_found *own = &e->found[r->thread];
    const int64_t dim = e->model.dim, vocab = e->model.vocab_size;
    int64_t lo, hi;
    bn_share(vocab, 16, r->thread, r->n_threads, &lo, &hi);
    if (r->thread == 0) {
        e->search.y = e->buffers.head_in;
        bn_search_prepare(&e->search);
    }
    bn_barrier(r);
    bn_search_screen(&e->search, lo, hi, own);
    bn_count_once(r, BN_COUNT_HEAD_SCREEN, (uint64_t)(vocab * dim));
    bn_barrier(r);
    bn_search_rescore(&e->search, lo, hi, e->found, r->n_threads, own);
    bn_barrier(r);
    if (r->thread) return;
    bn_search_merge(&e->search, e->found, r->n_threads, r->pass->top);
    bn_count_once(r, BN_COUNT_HEAD_F16, (uint64_t)(r->pass->top->n_rescored * dim) * sizeof(uint16_t));
}

void bn_head(const bn_run *r, int64_t n_rows) {
    const bn_engine *e = r->engine;
    const int64_t dim = e->model.dim;
    for (int64_t t = r->thread; t < n_rows; t += r->n_threads) {
        const float *normed = e->buffers.result_norm + t * dim;
        float *input = e->buffers.head_in + t * dim;
        if (n_rows == 1 || e->arithmetic.generation == BN_MAIN) {
            uint16_t *half = e->threads[r->thread].half;
            e->kernels->to_f16(normed, dim, half);
            e->kernels->from_f16(half, dim, input);
        } else {
            memcpy(input, normed, (size_t)dim * sizeof *input);
        }
    }
    bn_barrier(r);
    if (r->pass->top)
        top_logits(r);
    else
        all_logits(r, n_rows, r->pass->logits);
    bn_barrier(r);
}

/* ---- before and after ------------------------------------------------------------------------------------ */

static int screen_ok(const bn_engine *e, const bn_screen *s) {
    return s && s->codes && s->scale && s->error && s->norm && e->model.dim % 32 == 0 &&
           e->model.dim <= BN_MAX_SCREEN_DIM;
}

int bn_reserve_search(bn_engine *e, const bn_top *top) {
    if (e->arithmetic.half_sums)
        return bn_fail(BN_ERR_ARGUMENT, "sums in binary16 exceed the bounds of the search for the largest logits");
    if (top->n < 1 || top->n > BN_MAX_TOP || top->n > e->model.vocab_size || !top->ids || !top->logits ||
        !screen_ok(e, top->screen))
        return bn_fail(BN_ERR_ARGUMENT,
                       "the search for the largest logits has an invalid count, buffer or screen");
    bn_search *s = &e->search;
    if (!s->z) s->z = malloc((size_t)e->model.dim * sizeof *s->z);
    if (!s->upper) s->upper = malloc((size_t)e->model.vocab_size * sizeof *s->upper);
    if (!e->found) e->found = malloc((size_t)bn_pool_size(e->pool) * sizeof *e->found);
    if (!s->z || !s->upper || !e->found) return bn_fail(BN_ERR_MEMORY, "out of memory for the search");
    s->kernels = e->kernels;
    s->dots = dots_of(e, 1);
    s->head = e->model.output;
    s->n_rows = e->model.vocab_size;
    s->dim = e->model.dim;
    s->screen = top->screen;
    s->n = top->n;
    return BN_OK;
}

void bn_free_search(bn_engine *e) {
    free(e->search.z);
    free(e->search.upper);
    free(e->found);
}

static int rows_ok(const bn_engine *e, int64_t first_row, int64_t n_rows) {
    return first_row >= 0 && n_rows >= 0 && n_rows <= e->model.vocab_size &&
           first_row <= e->model.vocab_size - n_rows;
}

typedef struct {
    bn_engine *engine;
    int64_t first_row, n_rows;
    const bn_screen *screen;
} screen_rows;

static void build_screen(void *argument, int thread, int n_threads) {
    const screen_rows *rows = argument;
    const int64_t dim = rows->engine->model.dim;
    const bn_screen *s = rows->screen;
    int64_t lo, hi;
    bn_share(rows->n_rows, 1, thread, n_threads, &lo, &hi);
    for (int64_t r = rows->first_row + lo; r < rows->first_row + hi; r++)
        rows->engine->kernels->screen_row(rows->engine->model.output + r * dim, dim, s->codes + r * dim,
                                          &s->scale[r], &s->error[r], &s->norm[r]);
}

int bn_engine_build_screen(bn_engine *e, int64_t first_row, int64_t n_rows, const bn_screen *out) {
    if (!screen_ok(e, out))
        return bn_fail(BN_ERR_ARGUMENT,
                       "a screen needs four buffers, and dim must be a multiple of 32 that it can hold");
    if (!rows_ok(e, first_row, n_rows)) return bn_fail(BN_ERR_ARGUMENT, "rows outside the LM head");
    screen_rows rows = {e, first_row, n_rows, out};
    bn_pool_run(e->pool, bn_pool_size(e->pool), build_screen, &rows);
    return BN_OK;
}

typedef struct {
    bn_engine *engine;
    int64_t first_row, n_rows;
    float *logits;
} logits_of_last;

static void last_logits(void *argument, int thread, int n_threads) {
    const logits_of_last *wanted = argument;
    const bn_engine *e = wanted->engine;
    const int64_t dim = e->model.dim;
    int64_t lo, hi;
    bn_share(wanted->n_rows, 16, thread, n_threads, &lo, &hi);
    dots_of(e, 1)(e->model.output + (wanted->first_row + lo) * dim, dim, hi - lo, e->buffers.head_in, dim, 1, dim,
                  wanted->logits + lo, wanted->n_rows);
}

int bn_engine_last_logits(bn_engine *e, int64_t first_row, int64_t n_rows, float *logits) {
    if (!e->has_head_input) return bn_fail(BN_ERR_ARGUMENT, "the last pass computed no output row");
    if (!rows_ok(e, first_row, n_rows)) return bn_fail(BN_ERR_ARGUMENT, "rows outside the LM head");
    logits_of_last wanted = {e, first_row, n_rows, logits};
    bn_pool_run(e->pool, bn_pool_size(e->pool), last_logits, &wanted);
    bn_count(&e->counters, BN_COUNT_HEAD_F16, (uint64_t)(n_rows * e->model.dim) * sizeof(uint16_t));
    return BN_OK;
}
