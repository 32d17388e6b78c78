#include "head.h"
#include "error.h"
#include "numerics.h"
#include "tables.h"

#include <stdlib.h>

/* ---- within a pass --------------------------------------------------------------------------------------- */

/* The product of one output row with a table of F16, and that of several (llamafile sgemm, which main refuses
 * where the vocabulary is not a multiple of 4). */
static int is_tiled(const bn_engine *e, int64_t n_rows) {
    return n_rows > 1 && (e->arithmetic.generation == BN_MARCH || e->model.vocab_size % 4 == 0);
}

static bn_dots_fn dots_of(const bn_engine *e, int64_t n_rows) {
    return is_tiled(e, n_rows) ? e->kernels->dots_tiled[e->width_index] : e->kernels->dots_f16[e->dot];
}

int32_t bn_table_dots_of(int32_t type, const bn_arithmetic *a, int tiled, int packed) {
    const int wide = a->simd_width == 16;
    /* the dots of ternary types are written as a product and a sum, which a compiler of March's gcc builds fuses,
     * as it does in the quantiser */
    const int fused = a->fused_sums || (a->generation == BN_MARCH && a->fused_quantizer);
    switch (type) {
    case BN_TABLE_F32:
        return (tiled ? BN_DOTS_F32_TILED_W8 : BN_DOTS_F32_W8) + wide;
    case BN_TABLE_BF16: /* March has no tiled product of bfloat16 */
        tiled = tiled && a->generation == BN_MAIN;
        return (tiled ? BN_DOTS_BF16_TILED_W8 : BN_DOTS_BF16_W8) + wide + (wide && a->bfloat_pairs);
    case BN_TABLE_Q8_0:
        return BN_DOTS_Q8_0;
    case BN_TABLE_Q4_0:
        return packed && a->generation == BN_MAIN ? BN_DOTS_Q4_0_PACKED : BN_DOTS_Q4_0;
    case BN_TABLE_Q5_0:
        return BN_DOTS_Q5_0;
    case BN_TABLE_Q6_K:
        return a->generation == BN_MAIN ? BN_DOTS_Q6_K_MAIN : BN_DOTS_Q6_K;
    case BN_TABLE_Q3_K:
        return BN_DOTS_Q3_K;
    case BN_TABLE_TQ1_0:
        return BN_DOTS_TQ1_0 + fused;
    default:
        return BN_DOTS_TQ2_0 + fused;
    }
}

void bn_choose_head(bn_engine *e) {
    for (int n_rows = 1; n_rows <= 2; n_rows++)
        e->head_dots[n_rows - 1] = bn_table_dots_of(e->model.output.type, &e->arithmetic, is_tiled(e, n_rows),
                                                    e->model.own_head && e->model.vocab_size % 8 == 0);
}

/* Rows [first, first + n_rows) of the head times n_columns rows of its input. */
static void multiply_rows(const bn_engine *e, int64_t first, int64_t n_rows, int64_t n_columns, float *out,
                          int64_t ldo) {
    const int64_t dim = e->model.dim;
    const bn_table *table = &e->model.output;
    if (table->type == BN_TABLE_F16) {
        const uint16_t *head = table->rows;
        dots_of(e, n_columns)(head + first * dim, dim, n_rows, e->buffers.head_in, dim, n_columns, dim, out, ldo);
        return;
    }
    const bn_buffers *b = &e->buffers;
    const int64_t per_step = bn_table_formats[table->type].values > 1 ? bn_table_formats[table->type].values : dim;
    const bn_table_dots_fn dots = e->kernels->table_dots[e->head_dots[n_columns > 1]];
    for (int64_t c = 0; c < n_columns; c++) {
        const bn_table_input x = {b->head_in + c * dim, b->q8 + c * dim, b->steps + c * (dim / per_step),
                                  b->groups + c * (dim / BN_GROUP)};
        dots(bn_table_row(table, first, dim), n_rows, dim, &x, out + c * ldo);
    }
}

static void all_logits(const bn_run *r, int64_t n_rows, float *logits) {
    const bn_engine *e = r->engine;
    const int64_t dim = e->model.dim, vocab = e->model.vocab_size;
    int64_t lo, hi;
    bn_share(vocab, 16, r->thread, r->n_threads, &lo, &hi);
    for (int64_t row = lo; row < hi; row += 16)
        multiply_rows(e, row, hi - row < 16 ? hi - row : 16, n_rows, logits + row, vocab);
    bn_count_once(r, BN_COUNT_HEAD, (uint64_t)(vocab * bn_table_row_bytes(e->model.output.type, dim)));
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
    bn_count_once(r, BN_COUNT_HEAD, (uint64_t)(r->pass->top->n_rescored * dim) * sizeof(uint16_t));
}

/* One row of the head's input, rounded as the type of its table demands. */
static void round_input(const bn_run *r, int64_t n_rows, int64_t t) {
    const bn_engine *e = r->engine;
    const bn_buffers *b = &e->buffers;
    const int64_t dim = e->model.dim;
    const float *normed = b->result_norm + t * dim;
    float *input = b->head_in + t * dim;
    switch (bn_table_formats[e->model.output.type].input) {
    case BN_INPUT_F16:
        if (n_rows == 1 || e->arithmetic.generation == BN_MAIN) {
            uint16_t *half = e->threads[r->thread].half;
            e->kernels->to_f16(normed, dim, half);
            e->kernels->from_f16(half, dim, input);
        } else {
            memcpy(input, normed, (size_t)dim * sizeof *input);
        }
        break;
    case BN_INPUT_F32:
        memcpy(input, normed, (size_t)dim * sizeof *input);
        break;
    case BN_INPUT_BF16:
        for (int64_t i = 0; i < dim; i++) input[i] = bn_round_bfloat(normed[i]);
        break;
    case BN_INPUT_Q8_0:
        e->kernels->quantize_q8_0(normed, dim, b->q8 + t * dim, b->steps + t * (dim / 32));
        break;
    default:
        e->kernels->quantize_blocks[e->arithmetic.fused_quantizer](
            normed, dim, b->q8 + t * dim, b->steps + t * (dim / BN_BLOCK), b->groups + t * (dim / BN_GROUP));
    }
}

void bn_head(const bn_run *r, int64_t n_rows) {
    for (int64_t t = r->thread; t < n_rows; t += r->n_threads) round_input(r, n_rows, t);
    bn_barrier(r);
    if (r->pass->top)
        top_logits(r);
    else
        all_logits(r, n_rows, r->pass->logits);
    bn_barrier(r);
}

/* ---- before and after ------------------------------------------------------------------------------------ */

/* A screen holds for the products of binary16 rows (screen.h). */
static int screen_ok(const bn_engine *e, const bn_screen *s) {
    return e->model.output.type == BN_TABLE_F16 && s && s->codes && s->scale && s->error && s->norm &&
           e->model.dim % 32 == 0 && e->model.dim <= BN_MAX_SCREEN_DIM;
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
    s->head = e->model.output.rows;
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
    const uint16_t *head = rows->engine->model.output.rows;
    int64_t lo, hi;
    bn_share(rows->n_rows, 1, thread, n_threads, &lo, &hi);
    for (int64_t r = rows->first_row + lo; r < rows->first_row + hi; r++)
        rows->engine->kernels->screen_row(head + r * dim, dim, s->codes + r * dim, &s->scale[r], &s->error[r],
                                          &s->norm[r]);
}

int bn_engine_build_screen(bn_engine *e, int64_t first_row, int64_t n_rows, const bn_screen *out) {
    if (!screen_ok(e, out))
        return bn_fail(BN_ERR_ARGUMENT, "a screen needs an LM head of binary16, four buffers, and dim must be a "
                                        "multiple of 32 that it can hold");
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
    int64_t lo, hi;
    bn_share(wanted->n_rows, 16, thread, n_threads, &lo, &hi);
    multiply_rows(e, wanted->first_row + lo, hi - lo, 1, wanted->logits + lo, wanted->n_rows);
}

int bn_engine_last_logits(bn_engine *e, int64_t first_row, int64_t n_rows, float *logits) {
    if (!e->has_head_input) return bn_fail(BN_ERR_ARGUMENT, "the last pass computed no output row");
    if (!rows_ok(e, first_row, n_rows)) return bn_fail(BN_ERR_ARGUMENT, "rows outside the LM head");
    logits_of_last wanted = {e, first_row, n_rows, logits};
    bn_pool_run(e->pool, bn_pool_size(e->pool), last_logits, &wanted);
    bn_count(&e->counters, BN_COUNT_HEAD,
             (uint64_t)(n_rows * bn_table_row_bytes(e->model.output.type, e->model.dim)));
    return BN_OK;
}
