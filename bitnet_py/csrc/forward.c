/* One pass through the network, executed by all members of the team together (same program, shared data,
 * barriers between phases). Reads top to bottom: helpers, operations, layer, pass.
 *
 * Every operation rounds as bitnet.cpp's does (docs/numerics.md); none is fused with its neighbour.
 * A buffer that a phase writes is never read or recorded by another member in the same phase.
 */
#include "engine.h"
#include "numerics.h"

typedef struct {
    bn_engine *engine;
    const bn_pass *pass;
    int member, n_members;
} run;

static void meet(const run *r) { bn_team_barrier(r->engine->team); }

static float *tap(const run *r, int32_t layer, int which) {
    return r->pass->taps ? r->pass->taps[(int64_t)layer * BN_LAYER_TAPS + which] : NULL;
}

static float *model_tap(const run *r, int which) { return tap(r, r->engine->model.n_layers, which); }

/* By member 0, while nobody writes `source`. */
static void record(const run *r, float *target, const float *source, int64_t n) {
    if (target && r->member == 0) memcpy(target, source, (size_t)n * sizeof *source);
}

static void count(const run *r, int which, uint64_t bytes) {
    if (r->member == 0) {
        r->engine->calls[which]++;
        r->engine->bytes[which] += bytes;
    }
}

/* ---- operations on one row ------------------------------------------------------------------------------ */

/* Rows normed side by side: each sum is one long chain of dependent additions. */
enum { NORM_ROWS = 4 };

/* bitnet.cpp ggml.c, ggml_compute_forward_rms_norm_f32 then ggml_compute_forward_mul_f32: squares in binary32,
 * their sum strictly sequential in binary64, 1/sqrt as two roundings, the weight as a separate product.
 * `n_rows` rows of length n, `stride` elements apart. */
static inline __attribute__((always_inline)) void rms_norm(const float *x, int64_t stride, int n_rows,
                                                           const float *weight, int64_t n, float eps, float *out) {
    double sum[NORM_ROWS] = {0};
    for (int64_t i = 0; i < n; i++)
        for (int r = 0; r < n_rows; r++) sum[r] += (double)(x[r * stride + i] * x[r * stride + i]);
    for (int r = 0; r < n_rows; r++) {
        const float mean = (float)(sum[r] / (double)n);
        const float scale = 1.0f / sqrtf(mean + eps);
        for (int64_t i = 0; i < n; i++) {
            const float normed = x[r * stride + i] * scale;
            out[r * stride + i] = normed * weight[i];
        }
    }
}

static void quantize_row(const run *r, const float *x, int64_t n, int64_t row) {
    bn_engine *e = r->engine;
    e->kernels->quantize(x, n, e->fused_quantizer, e->buffers.q8 + row * n, &e->buffers.q8_scale[row],
                         &e->buffers.q8_sum[row]);
}

/* ---- operations of the team ----------------------------------------------------------------------------- */

static void embed(const run *r) {
    const bn_engine *e = r->engine;
    const int64_t dim = e->model.dim;
    for (int64_t t = r->member; t < r->pass->n_tokens; t += r->n_members)
        e->kernels->from_f16(e->model.token_embd + r->pass->tokens[t] * dim, dim, e->buffers.x + t * dim);
}

/* Norms the rows this member owns: t = member, member + n_members, ... */
static void norm_rows(const run *r, const float *x, const float *weight, int64_t n, int64_t rows, float *normed) {
    const float eps = r->engine->model.rms_eps;
    const int64_t stride = r->n_members * n;
    int64_t t = r->member;
    for (; t + (NORM_ROWS - 1) * r->n_members < rows; t += NORM_ROWS * r->n_members)
        rms_norm(x + t * n, stride, NORM_ROWS, weight, n, eps, normed + t * n);
    for (; t < rows; t += r->n_members) rms_norm(x + t * n, stride, 1, weight, n, eps, normed + t * n);
    count(r, BN_COUNT_RMS_NORM, (uint64_t)n * sizeof(float));
}

static void norm_and_quantize(const run *r, const float *x, const float *weight, int64_t n, int64_t rows,
                              float *normed) {
    if (weight) norm_rows(r, x, weight, n, rows, normed);
    for (int64_t t = r->member; t < rows; t += r->n_members) quantize_row(r, (weight ? normed : x) + t * n, n, t);
    count(r, BN_COUNT_QUANTIZE, 0);
}

/* y[t][row] = (D - sum) / s * scale with D = sum_i (w + 1) q8. */
static void bitlinear(const run *r, const bn_matrix *m, int64_t n_tokens, float *y) {
    const bn_engine *e = r->engine;
    const bn_buffers *b = &e->buffers;
    int32_t *acc = e->members[r->member].acc;
    const int64_t tile_cols = e->kernels->tile_cols;
    /* weights of one tile stay in the cache while the columns pass by */
    const int64_t unit = e->kernels->tile_rows;
    int64_t tile = e->kernels->tile_bytes / (m->cols / 4) / unit * unit;
    tile = tile < unit ? unit : tile > BN_TILE_ROWS ? BN_TILE_ROWS : tile;
    int64_t lo, hi;
    bn_share(m->rows, unit, r->member, r->n_members, &lo, &hi);
    for (int64_t row = lo; row < hi; row += tile) {
        const int n_rows = (int)(hi - row < tile ? hi - row : tile);
        for (int64_t t = 0; t < n_tokens; t += tile_cols) {
            const int n_cols = (int)(n_tokens - t < tile_cols ? n_tokens - t : tile_cols);
            e->kernels->i2s_dot(m->data + row * (m->cols / 4), m->cols, n_rows, b->q8 + t * m->cols, m->cols,
                                n_cols, acc);
            for (int c = 0; c < n_cols; c++) {
                const float sum = (float)b->q8_sum[t + c], s = b->q8_scale[t + c];
                float *out = y + (t + c) * m->rows + row;
                e->kernels->rescale(acc + c * n_rows, n_rows, sum, s, m->scale, out);
            }
        }
    }
    count(r, n_tokens == 1 ? BN_COUNT_I2S_GEMV : BN_COUNT_I2S_GEMM, (uint64_t)(m->rows * (m->cols / 4)));
}

static void rope_rows(const run *r, const float *x, int32_t n_heads, float *out) {
    const bn_engine *e = r->engine;
    const int64_t head_dim = e->model.head_dim, half = head_dim / 2;
    for (int64_t t = r->member; t < r->pass->n_tokens; t += r->n_members) {
        const float *cosines = e->rope_cos + (r->pass->start + t) * half;
        const float *sines = e->rope_sin + (r->pass->start + t) * half;
        for (int64_t h = 0; h < n_heads; h++) {
            const int64_t at = (t * n_heads + h) * head_dim;
            e->kernels->rope(x + at, cosines, sines, (int)half, out + at);
        }
    }
    count(r, BN_COUNT_ROPE, 0);
}

/* K by cell, V transposed, both rounded to binary16. */
static void store_kv(const run *r, int32_t layer) {
    const bn_engine *e = r->engine;
    const bn_pass *p = r->pass;
    const int64_t kv_dim = e->kv_dim;
    uint16_t *keys = p->k_cache + layer * p->capacity * kv_dim;
    uint16_t *values = p->v_cache + layer * p->capacity * kv_dim;
    for (int64_t t = r->member; t < p->n_tokens; t += r->n_members) {
        const int64_t cell = p->start + t;
        e->kernels->to_f16(e->buffers.k_rope + t * kv_dim, kv_dim, keys + cell * kv_dim);
        uint16_t *half = e->buffers.half + t * kv_dim;
        e->kernels->to_f16(e->buffers.v + t * kv_dim, kv_dim, half);
        for (int64_t d = 0; d < kv_dim; d++) values[d * p->capacity + cell] = half[d];
    }
}

/* `n_together` heads of one token from `head` on, that share keys and values: scores, softmax, weighted sum of
 * the values. bitnet.cpp llm_build_kqv; for the two forms of the last product see docs/numerics.md, "prompt and
 * single". */
static void attend(const run *r, int32_t layer, int64_t head, int64_t n_together, int64_t t) {
    const bn_engine *e = r->engine;
    const bn_pass *p = r->pass;
    const bn_private *own = &e->members[r->member];
    const int64_t head_dim = e->model.head_dim, kv_dim = e->kv_dim;
    const int64_t kv_head = head / (e->model.n_heads / e->model.n_kv_heads);
    const int64_t n_visible = p->start + t + 1, n_used = (int64_t)p->start + p->n_tokens, n_kv = bn_pad32(n_used);
    const uint16_t *keys = p->k_cache + layer * p->capacity * kv_dim + kv_head * head_dim;
    const uint16_t *values = p->v_cache + layer * p->capacity * kv_dim + kv_head * head_dim * p->capacity;
    const float *q = e->buffers.q_rope + (t * e->model.n_heads + head) * head_dim;
    float *kq_tap = tap(r, layer, BN_TAP_KQ), *p_tap = tap(r, layer, BN_TAP_KQ_SOFT_MAX);

    /* scores of later tokens are masked anyway; they are computed only for the tap */
    const int64_t n_scores = kq_tap ? n_used : n_visible;
    if (e->model.n_heads == 1 && p->n_tokens > 1 && head_dim % e->simd_width == 0) {
        /* a single head leaves the permuted Q contiguous, and bitnet.cpp then takes its tiled product */
        e->kernels->dots_tiled[e->width_index](keys, kv_dim, n_scores, q, head_dim, n_together, head_dim,
                                               own->scores, n_kv);
    } else {
        e->kernels->to_f16(q, n_together * head_dim, own->half);
        e->kernels->from_f16(own->half, n_together * head_dim, own->query);
        e->kernels->dots_f16[e->width_index](keys, kv_dim, n_scores, own->query, head_dim, n_together, head_dim,
                                             own->scores, n_kv);
    }

    const float scale = 1.0f / sqrtf((float)head_dim);
    for (int64_t h = 0; h < n_together; h++) {
        float *scores = own->scores + h * n_kv;
        const int64_t tap_row = ((head + h) * p->n_tokens + t) * n_used;
        if (kq_tap) memcpy(kq_tap + tap_row, scores, (size_t)n_used * sizeof(float));
        e->kernels->softmax[e->width_index](scores, n_visible, n_kv, scale);
        if (p_tap) memcpy(p_tap + tap_row, scores, (size_t)n_used * sizeof(float));
    }

    float *out = e->buffers.kqv + (t * e->model.n_heads + head) * head_dim;
    if (p->n_tokens == 1) {
        e->kernels->to_f16(own->scores, n_together * n_kv, own->half);
        e->kernels->from_f16(own->half, n_together * n_kv, own->scores);
        e->kernels->dots_f16[e->width_index](values, p->capacity, head_dim, own->scores, n_kv, n_together, n_kv,
                                             out, head_dim);
    } else {
        /* groups past the last visible cell would add exact zeros */
        e->kernels->dots_tiled[e->width_index](values, p->capacity, head_dim, own->scores, n_kv, n_together,
                                               bn_pad32(n_visible), out, head_dim);
    }
}

/* Heads from `head` on that share keys, before `end`. */
static int64_t heads_together(const bn_engine *e, int64_t head, int64_t end) {
    const int64_t group = e->model.n_heads / e->model.n_kv_heads;
    int64_t n = group - head % group;
    n = n < BN_HEADS_AT_ONCE ? n : BN_HEADS_AT_ONCE;
    return n < end - head ? n : end - head;
}

static void attention(const run *r, int32_t layer) {
    const bn_engine *e = r->engine;
    const int64_t n_tokens = r->pass->n_tokens;
    int64_t lo = 0, hi = e->model.n_heads;
    /* one token has few groups of heads: even shares are worth more than whole groups */
    if (n_tokens == 1) bn_share(hi, 1, r->member, r->n_members, &lo, &hi);
    /* later tokens see more cells: dealing the tokens out in turn keeps the shares even */
    int64_t n, item = 0;
    for (int64_t head = lo; head < hi; head += n) {
        n = heads_together(e, head, hi);
        for (int64_t t = 0; t < n_tokens; t++, item++)
            if (n_tokens == 1 || item % r->n_members == r->member) attend(r, layer, head, n, t);
    }
    count(r, BN_COUNT_ATTENTION,
          (uint64_t)(r->pass->start + r->pass->n_tokens) * (uint64_t)r->engine->kv_dim * 2 * sizeof(uint16_t));
}

static void add_rows(const run *r, const float *a, const float *b, int64_t n, float *out) {
    int64_t lo, hi;
    bn_share(n, 16, r->member, r->n_members, &lo, &hi);
    for (int64_t i = lo; i < hi; i++) out[i] = a[i] + b[i];
}

/* ---- one layer ------------------------------------------------------------------------------------------ */

/* `n_rows` trailing tokens go on after attention: all of them, but in the last layer only the output rows. */
static void forward_layer(const run *r, int32_t layer, int64_t n_rows) {
    bn_engine *e = r->engine;
    bn_buffers *b = &e->buffers;
    const bn_layer *w = &e->layers[layer];
    const int64_t n = r->pass->n_tokens, dim = e->model.dim, kv_dim = e->kv_dim, hidden = e->model.hidden_dim;

    norm_and_quantize(r, b->x, w->attn_norm, dim, n, b->attn_norm);
    meet(r);
    record(r, tap(r, layer, BN_TAP_ATTN_NORM), b->attn_norm, n * dim);
    bitlinear(r, &w->q, n, b->q);
    bitlinear(r, &w->k, n, b->k);
    bitlinear(r, &w->v, n, b->v);
    meet(r);
    record(r, tap(r, layer, BN_TAP_Q), b->q, n * dim);
    record(r, tap(r, layer, BN_TAP_K), b->k, n * kv_dim);
    record(r, tap(r, layer, BN_TAP_V), b->v, n * kv_dim);
    rope_rows(r, b->q, e->model.n_heads, b->q_rope);
    rope_rows(r, b->k, e->model.n_kv_heads, b->k_rope);
    store_kv(r, layer); /* a member stores the tokens it rotated */
    meet(r);
    record(r, tap(r, layer, BN_TAP_Q_ROPE), b->q_rope, n * dim);
    record(r, tap(r, layer, BN_TAP_K_ROPE), b->k_rope, n * kv_dim);
    attention(r, layer);
    meet(r);
    record(r, tap(r, layer, BN_TAP_KQV_OUT), b->kqv, n * dim);
    norm_and_quantize(r, b->kqv, w->attn_sub_norm, dim, n, b->attn_sub);
    meet(r);
    if (w->attn_sub_norm) record(r, tap(r, layer, BN_TAP_ATTN_SUB_NORM), b->attn_sub, n * dim);
    bitlinear(r, &w->o, n, b->attn_out);
    meet(r);
    record(r, tap(r, layer, BN_TAP_ATTN_O_OUT), b->attn_out, n * dim);
    if (n_rows == 0) return;

    const int64_t skipped = (n - n_rows) * dim;
    add_rows(r, b->attn_out + skipped, b->x + skipped, n_rows * dim, b->ffn_inp);
    meet(r);
    record(r, tap(r, layer, BN_TAP_FFN_INP), b->ffn_inp, n_rows * dim);
    norm_and_quantize(r, b->ffn_inp, w->ffn_norm, dim, n_rows, b->ffn_norm);
    meet(r);
    record(r, tap(r, layer, BN_TAP_FFN_NORM), b->ffn_norm, n_rows * dim);
    bitlinear(r, &w->gate, n_rows, b->gate);
    bitlinear(r, &w->up, n_rows, b->up);
    meet(r);
    record(r, tap(r, layer, BN_TAP_FFN_GATE), b->gate, n_rows * hidden);
    record(r, tap(r, layer, BN_TAP_FFN_UP), b->up, n_rows * hidden);
    for (int64_t t = r->member; t < n_rows; t += r->n_members)
        e->kernels->gated_relu_squared(b->gate + t * hidden, b->up + t * hidden, hidden, b->act + t * hidden,
                                       b->prod + t * hidden);
    norm_and_quantize(r, b->prod, w->ffn_sub_norm, hidden, n_rows, b->ffn_sub); /* same rows, same member */
    meet(r);
    record(r, tap(r, layer, BN_TAP_FFN_ACT), b->act, n_rows * hidden);
    record(r, tap(r, layer, BN_TAP_FFN_OUT), b->prod, n_rows * hidden);
    if (w->ffn_sub_norm) record(r, tap(r, layer, BN_TAP_FFN_SUB_NORM), b->ffn_sub, n_rows * hidden);
    bitlinear(r, &w->down, n_rows, b->down);
    meet(r);
    record(r, tap(r, layer, BN_TAP_FFN_DOWN), b->down, n_rows * dim);
    add_rows(r, b->down, b->ffn_inp, n_rows * dim, b->x);
    meet(r);
    record(r, tap(r, layer, BN_TAP_L_OUT), b->x, n_rows * dim);
}

/* bitnet.cpp multiplies one output row in binary16 and several in binary32 (llamafile sgemm). */
static void all_logits(const run *r, int64_t n_rows, float *logits) {
    const bn_engine *e = r->engine;
    const int64_t dim = e->model.dim, vocab = e->model.vocab_size;
    const bn_dots_fn dots = (n_rows == 1 ? e->kernels->dots_f16 : e->kernels->dots_tiled)[e->width_index];
    int64_t lo, hi;
    bn_share(vocab, 16, r->member, r->n_members, &lo, &hi);
    for (int64_t row = lo; row < hi; row += 16)
        dots(e->model.output + row * dim, dim, hi - row < 16 ? hi - row : 16, e->buffers.head_in, dim, n_rows, dim,
             logits + row, vocab);
    count(r, BN_COUNT_HEAD_F16, (uint64_t)(vocab * dim) * sizeof(uint16_t));
}

/* The largest of them, by interval first: see screen.h. */
static void top_logits(const run *r) {
    bn_engine *e = r->engine;
    bn_found *own = &e->found[r->member];
    const int64_t dim = e->model.dim, vocab = e->model.vocab_size;
    int64_t lo, hi;
    bn_share(vocab, 16, r->member, r->n_members, &lo, &hi);
    if (r->member == 0) {
        e->search.y = e->buffers.head_in;
        bn_search_prepare(&e->search);
    }
    meet(r);
    bn_search_screen(&e->search, lo, hi, own);
    count(r, BN_COUNT_HEAD_SCREEN, (uint64_t)(vocab * dim));
    meet(r);
    bn_search_rescore(&e->search, lo, hi, e->found, r->n_members, own);
    meet(r);
    if (r->member) return;
    bn_search_merge(&e->search, e->found, r->n_members, r->pass->top);
    count(r, BN_COUNT_HEAD_F16, (uint64_t)(r->pass->top->n_rescored * dim) * sizeof(uint16_t));
}

static void head(const run *r, int64_t n_rows) {
    const bn_engine *e = r->engine;
    const bn_buffers *b = &e->buffers;
    const int64_t dim = e->model.dim, vocab = e->model.vocab_size;
    norm_rows(r, b->x, e->model.output_norm, dim, n_rows, b->result_norm);
    for (int64_t t = r->member; t < n_rows; t += r->n_members) {
        const float *normed = b->result_norm + t * dim;
        float *input = b->head_in + t * dim;
        if (n_rows == 1) {
            uint16_t *half = e->members[r->member].half;
            e->kernels->to_f16(normed, dim, half);
            e->kernels->from_f16(half, dim, input);
        } else {
            memcpy(input, normed, (size_t)dim * sizeof *input);
        }
    }
    meet(r);
    record(r, model_tap(r, BN_TAP_RESULT_NORM), b->result_norm, n_rows * dim);
    if (r->pass->top) {
        top_logits(r);
        return;
    }
    all_logits(r, n_rows, r->pass->logits);
    meet(r);
    record(r, model_tap(r, BN_TAP_RESULT_OUTPUT), r->pass->logits, n_rows * vocab);
}

static void forward(void *argument, int member, int n_members) {
    run r = *(const run *)argument;
    r.member = member;
    r.n_members = n_members;
    const bn_engine *e = r.engine;
    embed(&r); /* member t % n_members embeds token t and norms it in the first layer */
    meet(&r);
    record(&r, model_tap(&r, BN_TAP_INP_EMBD), e->buffers.x, (int64_t)r.pass->n_tokens * e->model.dim);
    for (int32_t layer = 0; layer < e->model.n_layers; layer++)
        forward_layer(&r, layer, layer + 1 < e->model.n_layers ? r.pass->n_tokens : r.pass->n_outputs);
    if (r.pass->n_outputs) head(&r, r.pass->n_outputs);
}

/* For little work, waking another member costs more than it saves. */
static int members_for(const bn_engine *e, const bn_pass *pass) {
    const int64_t work = e->ternary_bytes * pass->n_tokens +
                         (int64_t)pass->n_outputs * e->model.vocab_size * e->model.dim * (int64_t)sizeof(uint16_t);
    const int64_t members = work / e->bytes_per_thread, most = bn_team_size(e->team);
    return (int)(members < 1 ? 1 : members > most ? most : members);
}

void bn_forward(bn_engine *engine, const bn_pass *pass) {
    run r = {engine, pass, 0, 1};
    bn_team_run(engine->team, members_for(engine, pass), forward, &r);
}

typedef struct {
    bn_engine *engine;
    int64_t first_row, n_rows;
    const bn_screen *screen;
} screen_rows;

static void build_screen(void *argument, int member, int n_members) {
    const screen_rows *rows = argument;
    const int64_t dim = rows->engine->model.dim;
    const bn_screen *s = rows->screen;
    int64_t lo, hi;
    bn_share(rows->n_rows, 1, member, n_members, &lo, &hi);
    for (int64_t r = rows->first_row + lo; r < rows->first_row + hi; r++)
        rows->engine->kernels->screen_row(rows->engine->model.output + r * dim, dim, s->codes + r * dim,
                                          &s->scale[r], &s->error[r], &s->norm[r]);
}

void bn_build_screen(bn_engine *engine, int64_t first_row, int64_t n_rows, const bn_screen *out) {
    screen_rows rows = {engine, first_row, n_rows, out};
    bn_team_run(engine->team, bn_team_size(engine->team), build_screen, &rows);
}

typedef struct {
    bn_engine *engine;
    int64_t first_row, n_rows;
    float *logits;
} logits_of_last;

static void last_logits(void *argument, int member, int n_members) {
    const logits_of_last *wanted = argument;
    const bn_engine *e = wanted->engine;
    const int64_t dim = e->model.dim;
    int64_t lo, hi;
    bn_share(wanted->n_rows, 16, member, n_members, &lo, &hi);
    e->kernels->dots_f16[e->width_index](e->model.output + (wanted->first_row + lo) * dim, dim, hi - lo,
                                         e->buffers.head_in, dim, 1, dim, wanted->logits + lo, wanted->n_rows);
    if (member) return;
    wanted->engine->calls[BN_COUNT_HEAD_F16]++;
    wanted->engine->bytes[BN_COUNT_HEAD_F16] += (uint64_t)(wanted->n_rows * dim) * sizeof(uint16_t);
}

void bn_last_logits(bn_engine *engine, int64_t first_row, int64_t n_rows, float *logits) {
    logits_of_last wanted = {engine, first_row, n_rows, logits};
    bn_team_run(engine->team, bn_team_size(engine->team), last_logits, &wanted);
}
