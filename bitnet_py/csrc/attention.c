#include "attention.h"
#include "flash.h"

#include <math.h>

/* K by cell; V transposed, with flash attention by cell; both rounded to binary16. */
void bn_store_kv(const bn_run *r, int32_t layer) {
    const bn_engine *e = r->engine;
    const bn_pass *p = r->pass;
    const int64_t kv_dim = e->kv_dim;
    uint16_t *keys = p->k_cache + layer * p->capacity * kv_dim;
    uint16_t *values = p->v_cache + layer * p->capacity * kv_dim;
    for (int64_t t = r->thread; t < p->n_tokens; t += r->n_threads) {
        const int64_t cell = p->start + t;
        e->kernels->to_f16(e->buffers.k_rope + t * kv_dim, kv_dim, keys + cell * kv_dim);
        uint16_t *half = e->arithmetic.flash_attention ? values + cell * kv_dim : e->buffers.half + t * kv_dim;
        e->kernels->to_f16(e->buffers.v + t * kv_dim, kv_dim, half);
        if (e->arithmetic.flash_attention) continue;
        for (int64_t d = 0; d < kv_dim; d++) values[d * p->capacity + cell] = half[d];
    }
}

/* Whether the softmax of a row is NaN throughout: of a NaN, which a mask of -inf leaves one, and of an
 * infinite score, whether it is masked (inf - inf) or the largest (the difference to itself). */
static int is_spoilt(const float *scores, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!(scores[i] < INFINITY)) return 1;
    return 0;
}

/* `n_together` heads of one token from `head` on, that share keys and values: scores, softmax,
 * weighted sum of the values. bitnet.cpp llm_build_kqv and, in main, llm_graph_context::build_attn_mha;
 * for the forms of the two products see docs/numerics.md. */
static void attend(const bn_run *r, int32_t layer, int64_t head, int64_t n_together, int64_t t) {
    const bn_engine *e = r->engine;
    const bn_pass *p = r->pass;
    const bn_private *own = &e->threads[r->thread];
    const int64_t head_dim = e->model.head_dim, kv_dim = e->kv_dim;
    const int64_t kv_head = head / (e->model.n_heads / e->model.n_kv_heads);
    const int64_t n_visible = p->start + t + 1, n_used = (int64_t)p->start + p->n_tokens;
    const int64_t n_kv = bn_pad(n_used, e->cell_multiple);
    const uint16_t *keys = p->k_cache + layer * p->capacity * kv_dim + kv_head * head_dim;
    const uint16_t *values = p->v_cache + layer * p->capacity * kv_dim + kv_head * head_dim * p->capacity;
    const float *q = bn_query(e) + (t * e->model.n_heads + head) * head_dim;
    float *kq_tap = bn_tap(r, layer, BN_TAP_KQ), *p_tap = bn_tap(r, layer, BN_TAP_KQ_SOFT_MAX);
    const int is_main = e->arithmetic.generation == BN_MAIN, is_batch = p->n_tokens > 1;
    const int follows = e->arithmetic.follow_reference;

    /* scores of later tokens are masked anyway; they are computed only for the tap, and where a NaN
     * has to spread as it does in the reference */
    const int64_t n_scores = kq_tap || follows ? n_used : n_visible;
    /* March takes the tiled product only where a single head leaves the permuted Q contiguous */
    const int tiles_scores =
        is_batch && head_dim % e->arithmetic.simd_width == 0 && (is_main || e->model.n_heads == 1);
    const float *query = q;
    if (is_main || !tiles_scores) {
        e->kernels->to_f16(q, n_together * head_dim, own->half);
        e->kernels->from_f16(own->half, n_together * head_dim, own->query);
        query = own->query;
    }
    const bn_dots_fn score = tiles_scores ? e->kernels->dots_tiled[e->width_index] : e->kernels->dots_f16[e->dot];
    score(keys, kv_dim, n_scores, query, head_dim, n_together, head_dim, own->scores, n_kv);

    const float scale = e->model.query_scale > 0 ? 1.0f : 1.0f / sqrtf((float)head_dim);
    for (int64_t h = 0; h < n_together; h++) {
        float *scores = own->scores + h * n_kv;
        const int64_t tap_row = ((head + h) * p->n_tokens + t) * n_used;
        if (kq_tap) memcpy(kq_tap + tap_row, scores, (size_t)n_used * sizeof(float));
        if (follows && is_spoilt(scores, n_used)) {
            for (int64_t j = 0; j < n_kv; j++) scores[j] = NAN;
        } else {
            e->kernels->softmax[e->width_index](scores, n_visible, n_kv, scale);
        }
        if (p_tap) memcpy(p_tap + tap_row, scores, (size_t)n_used * sizeof(float));
    }

    float *out = e->buffers.kqv + (t * e->model.n_heads + head) * head_dim;
    if (is_main || !is_batch) {
        e->kernels->to_f16(own->scores, n_together * n_kv, own->half);
        e->kernels->from_f16(own->half, n_together * n_kv, own->scores);
    }
    const int tiles_values = is_batch && (!is_main || head_dim % 4 == 0);
    const bn_dots_fn weigh = tiles_values ? e->kernels->dots_tiled[e->width_index] : e->kernels->dots_f16[e->dot];
    int64_t n_read = n_kv;
    /* Steps past the last visible cell would add exact zeros. Not where the cells fill no whole steps,
     * as March's 32 do, nor in binary16, where a sum may have become -0. */
    if (tiles_values) n_read = bn_pad(n_visible, 32);
    if (is_main && !tiles_values && !e->arithmetic.half_sums) n_read = bn_pad(n_visible, 64);
    weigh(values, p->capacity, head_dim, own->scores, n_kv, n_together, follows ? n_kv : n_read, out, head_dim);
}

int64_t bn_heads_together(const bn_engine *e, int64_t head, int64_t end) {
    const int64_t group = e->model.n_heads / e->model.n_kv_heads;
    int64_t n = group - head % group;
    n = n < BN_HEADS_AT_ONCE ? n : BN_HEADS_AT_ONCE;
    return n < end - head ? n : end - head;
}

void bn_attention(const bn_run *r, int32_t layer) {
    const bn_engine *e = r->engine;
    const int64_t n_tokens = r->pass->n_tokens;
    if (e->arithmetic.flash_attention) {
        bn_flash_attention(r, layer);
    } else {
        int64_t lo = 0, hi = e->model.n_heads;
        /* one token has few groups of heads: balanced threads are worth more than whole groups */
        if (n_tokens == 1) bn_share(hi, 1, r->thread, r->n_threads, &lo, &hi);
        /* later tokens see more cells: distributing the tokens round-robin balances the threads */
        int64_t n, item = 0;
        for (int64_t head = lo; head < hi; head += n) {
            n = bn_heads_together(e, head, hi);
            for (int64_t t = 0; t < n_tokens; t++, item++)
                if (n_tokens == 1 || item % r->n_threads == r->thread) attend(r, layer, head, n, t);
        }
    }
    bn_count_once(r, BN_COUNT_ATTENTION,
                  (uint64_t)(r->pass->start + r->pass->n_tokens) * (uint64_t)r->engine->kv_dim * 2 *
                      sizeof(uint16_t));
}
