#include "flash.h"
#include "attention.h"

#include <math.h>

/* bitnet.cpp's main, ops.cpp: from so many tokens on, a pass goes by tiles; from so many cells on,
 * those of a single token are divided among the threads. */
enum { TILED_FROM = 64, DIVIDED_FROM = 512 };

/* Keys or values of a head in the cache. */
static const uint16_t *cells_of(const bn_run *r, const uint16_t *cache, int32_t layer, int64_t head) {
    const bn_engine *e = r->engine;
    const int64_t kv_head = head / (e->model.n_heads / e->model.n_kv_heads);
    return cache + layer * r->pass->capacity * e->kv_dim + kv_head * e->model.head_dim;
}

static float scale_of(const bn_engine *e) {
    return e->model.query_scale > 0 ? 1.0f : 1.0f / sqrtf((float)e->model.head_dim);
}

/* A weighted sum that has seen some of the cells: the weights are relative to e^top. */
typedef struct {
    float top, sum;
} weighed;

static void normalise(const float *a, float sum, int64_t n, float *out) {
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < n; d++) out[d] = a[d] * inverse;
}

/* ---- one cell after the other ---------------------------------------------------------------------------- */

/* ggml_compute_forward_flash_attn_ext_f16_one_chunk: the sum is kept in binary16. */
static weighed weigh_cells(const bn_engine *e, const float *scores, const uint16_t *values, int64_t begin,
                           int64_t end, float *a) {
    const int64_t head_dim = e->model.head_dim;
    const float scale = scale_of(e);
    const bn_weigh_half_fn weigh = e->kernels->weigh_half[e->arithmetic.half_sums];
    weighed w = {-INFINITY, 0};
    memset(a, 0, (size_t)head_dim * sizeof *a);
    for (int64_t cell = begin; cell < end; cell++) {
        const float s = scores[cell] * scale + 0.0f;
        float factor = 1.0f, weight = 1.0f;
        if (s > w.top) {
            factor = expf(w.top - s);
            w.top = s;
        } else {
            weight = expf(s - w.top);
        }
        weigh(factor, values + cell * e->kv_dim, weight, head_dim, a);
        w.sum = fmaf(w.sum, factor, weight);
    }
    return w;
}

/* ggml_flash_attn_ext_reduce_partials */
static weighed join(weighed w, float *a, weighed part, const float *part_a, int64_t n) {
    const float top = fmaxf(w.top, part.top);
    const float old = expf(w.top - top), added = expf(part.top - top);
    for (int64_t d = 0; d < n; d++) a[d] = fmaf(a[d], old, part_a[d] * added);
    return (weighed){top, fmaf(w.sum, old, part.sum * added)};
}

/* `n_together` heads of one token from `head` on, that share keys and values. */
static void attend(const bn_run *r, int32_t layer, int64_t head, int64_t n_together, int64_t t) {
    const bn_engine *e = r->engine;
    const bn_pass *p = r->pass;
    const bn_private *own = &e->threads[r->thread];
    const int64_t head_dim = e->model.head_dim, n_visible = p->start + t + 1;
    const int64_t n_kv = bn_pad((int64_t)p->start + p->n_tokens, e->cell_multiple);
    const uint16_t *values = cells_of(r, p->v_cache, layer, head);
    e->kernels->to_f16(bn_query(e) + (t * e->model.n_heads + head) * head_dim, n_together * head_dim, own->half);
    e->kernels->from_f16(own->half, n_together * head_dim, own->query);
    e->kernels->dots_f16[e->dot](cells_of(r, p->k_cache, layer, head), e->kv_dim, n_visible, own->query, head_dim,
                                 n_together, head_dim, own->scores, n_kv);

    const int64_t n_parts = p->n_tokens == 1 && n_kv >= DIVIDED_FROM ? e->arithmetic.attention_threads : 1;
    const int64_t part_cells = (n_kv + n_parts - 1) / n_parts;
    for (int64_t h = 0; h < n_together; h++) {
        const float *scores = own->scores + h * n_kv;
        float *a = own->flash.sums, *part_a = own->flash.part;
        weighed w = {-INFINITY, 0};
        if (n_parts == 1) {
            w = weigh_cells(e, scores, values, 0, n_visible, a);
        } else {
            memset(a, 0, (size_t)head_dim * sizeof *a);
            for (int64_t begin = 0; begin < n_visible; begin += part_cells) {
                const int64_t end = begin + part_cells < n_visible ? begin + part_cells : n_visible;
                const weighed part = weigh_cells(e, scores, values, begin, end, part_a);
                w = join(w, a, part, part_a, head_dim);
            }
        }
        normalise(a, w.sum, head_dim, e->buffers.kqv + (t * e->model.n_heads + head + h) * head_dim);
    }
}

/* ---- by tiles --------------------------------------------------------------------------------------------- */

/* One row of a tile: scales and masks its scores, turns them into weights and brings what was
 * summed before to their scale. `n_visible` may be beyond the tile, or not positive. */
static weighed weigh_row(const bn_engine *e, weighed w, float *scores, int64_t n_visible, float *a) {
    const float scale = scale_of(e);
    float tops[8];
    for (int l = 0; l < 8; l++) tops[l] = -INFINITY;
    for (int64_t c = 0; c < BN_FLASH_CELLS; c++)
        scores[c] = scores[c] * scale + (c < n_visible ? 0.0f : -INFINITY);
    for (int64_t c = 0; c < BN_FLASH_CELLS; c += 8)
        for (int l = 0; l < 8; l++) tops[l] = tops[l] > scores[c + l] ? tops[l] : scores[c + l];
    float top = -INFINITY;
    for (int l = 0; l < 8; l++) top = top > tops[l] ? top : tops[l];
    if (top == -INFINITY) {
        memset(scores, 0, BN_FLASH_CELLS * sizeof *scores);
        return w;
    }
    top = fmaxf(w.top, top);
    if (top > w.top) {
        const float factor = expf(w.top - top);
        for (int64_t d = 0; d < e->model.head_dim; d++) a[d] *= factor;
        w.sum *= factor;
    }
    const double added = e->kernels->exponentials[e->width_index](scores, BN_FLASH_CELLS, top);
    return (weighed){top, (float)((double)w.sum + added)};
}

/* ggml_compute_forward_flash_attn_ext_tiled, all in binary32. Queries `first` to `first + n` of
 * `n_together` heads: rows are independent of each other, so that the tile's height is ours. */
static void attend_tile(const bn_run *r, int32_t layer, int64_t head, int64_t n_together, int64_t first,
                        int64_t n) {
    const bn_engine *e = r->engine;
    const bn_pass *p = r->pass;
    const bn_flash *own = &e->threads[r->thread].flash;
    const int64_t head_dim = e->model.head_dim, rows = n * n_together;
    const uint16_t *keys = cells_of(r, p->k_cache, layer, head), *values = cells_of(r, p->v_cache, layer, head);
    weighed w[BN_FLASH_ROWS];
    for (int64_t i = 0; i < n; i++) /* row i * n_together + h: query i of head h */
        memcpy(own->query + i * n_together * head_dim,
               bn_query(e) + ((first + i) * e->model.n_heads + head) * head_dim,
               (size_t)(n_together * head_dim) * sizeof(float));
    for (int64_t row = 0; row < rows; row++) w[row] = (weighed){-INFINITY, 0};
    memset(own->sums, 0, (size_t)(rows * head_dim) * sizeof(float));

    for (int64_t cell = 0; cell < p->start + first + n; cell += BN_FLASH_CELLS) {
        for (int64_t c = 0; c < BN_FLASH_CELLS; c++) {
            float *key = own->values + c * head_dim; /* not needed yet */
            e->kernels->from_f16(keys + (cell + c) * e->kv_dim, head_dim, key);
            for (int64_t d = 0; d < head_dim; d++) own->keys[d * BN_FLASH_CELLS + c] = key[d];
        }
        memset(own->scores, 0, (size_t)(rows * BN_FLASH_CELLS) * sizeof(float));
        e->kernels->multiply_add(own->query, head_dim, rows, own->keys, head_dim, BN_FLASH_CELLS, own->scores,
                                 BN_FLASH_CELLS);
        for (int64_t row = 0; row < rows; row++)
            w[row] = weigh_row(e, w[row], own->scores + row * BN_FLASH_CELLS,
                               p->start + first + row / n_together + 1 - cell, own->sums + row * head_dim);
        for (int64_t c = 0; c < BN_FLASH_CELLS; c++)
            e->kernels->from_f16(values + (cell + c) * e->kv_dim, head_dim, own->values + c * head_dim);
        e->kernels->multiply_add(own->scores, BN_FLASH_CELLS, rows, own->values, BN_FLASH_CELLS, head_dim,
                                 own->sums, head_dim);
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t t = first + row / n_together, h = head + row % n_together;
        normalise(own->sums + row * head_dim, w[row].sum, head_dim,
                  e->buffers.kqv + (t * e->model.n_heads + h) * head_dim);
    }
}

/* ---- distribution among the threads ----------------------------------------------------------------------- */

void bn_flash_attention(const bn_run *r, int32_t layer) {
    const bn_engine *e = r->engine;
    const int64_t n_tokens = r->pass->n_tokens;
    const int is_tiled = n_tokens >= TILED_FROM && e->model.head_dim % e->arithmetic.simd_width == 0;
    const int64_t step = is_tiled ? BN_FLASH_QUERIES : 1;
    int64_t lo = 0, hi = e->model.n_heads;
    if (n_tokens == 1) bn_share(hi, 1, r->thread, r->n_threads, &lo, &hi);
    int64_t n_together, item = 0;
    for (int64_t head = lo; head < hi; head += n_together) {
        n_together = bn_heads_together(e, head, hi);
        for (int64_t t = 0; t < n_tokens; t += step, item++) {
            if (n_tokens > 1 && item % r->n_threads != r->thread) continue;
            if (is_tiled)
                attend_tile(r, layer, head, n_together, t, n_tokens - t < step ? n_tokens - t : step);
            else
                attend(r, layer, head, n_together, t);
        }
    }
}
