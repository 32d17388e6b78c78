/* One pass through the network. Reads top to bottom: operations on one row, operations that all
 * threads share, layer, pass.
 *
 * Every operation rounds as bitnet.cpp's does (docs/numerics.md); none is fused with its
 * neighbour. What depends on the architecture (activation, RoPE pairing, head width, biases, which
 * norms there are, factors) is read from bn_model.
 */
#include "forward.h"
#include "attention.h"
#include "head.h"
#include "pass.h"
#include "pooling.h"
#include "tables.h"

#include <math.h>

/* ---- operations on one row ------------------------------------------------------------------------------ */

/* Rows normed side by side: each sum is one long chain of dependent additions. */
enum { NORM_ROWS = 4 };

/* bitnet.cpp ggml.c, ggml_compute_forward_rms_norm_f32 then ggml_compute_forward_mul_f32:
 * squares in binary32, their sum strictly sequential in binary64, 1/sqrt as two roundings, the
 * weight as a separate product. `n_rows` rows of length n, `stride` elements apart. */
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

static void scale_row(const float *x, int64_t n, float factor, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor;
}

static int is_zero(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (x[i] != 0) return 0;
    return 1;
}

static void quantize_row(const bn_run *r, const float *x, int64_t n, int64_t row) {
    bn_engine *e = r->engine;
    if (e->arithmetic.block_quantizer) {
        e->kernels->quantize_blocks[e->arithmetic.fused_quantizer](x, n, e->buffers.q8 + row * n,
                                                                   e->buffers.steps + row * (n / BN_BLOCK),
                                                                   e->buffers.groups + row * (n / BN_GROUP));
        return;
    }
    float *scale = &e->buffers.q8_scale[row];
    e->kernels->quantize[e->quantizer](x, n, e->buffers.q8 + row * n, scale, &e->buffers.q8_sum[row]);
    /* main gives a row of zeros the scale 0, and its product becomes 0 * inf; with this one it is 0 */
    if (*scale == 0 && !e->arithmetic.follow_reference && is_zero(x, n)) *scale = INFINITY;
}

/* ---- operations that all threads share ------------------------------------------------------------------- */

static void embed(const bn_run *r) {
    const bn_engine *e = r->engine;
    const int64_t dim = e->model.dim;
    const bn_table *table = &e->model.token_embd;
    for (int64_t t = r->thread; t < r->pass->n_tokens; t += r->n_threads)
        bn_table_widen(table->type, bn_table_row(table, r->pass->tokens[t], dim), dim, e->buffers.x + t * dim);
    if (e->model.embedding_scale == 1.0f) return;
    for (int64_t t = r->thread; t < r->pass->n_tokens; t += r->n_threads) {
        memcpy(e->buffers.embd + t * dim, e->buffers.x + t * dim, (size_t)dim * sizeof(float));
        scale_row(e->buffers.embd + t * dim, dim, e->model.embedding_scale, e->buffers.x + t * dim);
    }
}

/* Norms the rows of this thread: t = thread, thread + n_threads, ... */
static void norm_rows(const bn_run *r, const float *x, const float *weight, int64_t n, int64_t rows,
                      float *normed) {
    const float eps = r->engine->model.rms_eps;
    const int64_t stride = r->n_threads * n;
    int64_t t = r->thread;
    for (; t + (NORM_ROWS - 1) * r->n_threads < rows; t += NORM_ROWS * r->n_threads)
        rms_norm(x + t * n, stride, NORM_ROWS, weight, n, eps, normed + t * n);
    for (; t < rows; t += r->n_threads) rms_norm(x + t * n, stride, 1, weight, n, eps, normed + t * n);
    bn_count_once(r, BN_COUNT_RMS_NORM, (uint64_t)n * sizeof(float));
}

/* Row t becomes row `first` + t of the quantised ones; without a weight as it is. */
static void norm_and_quantize(const bn_run *r, const float *x, const float *weight, int64_t n, int64_t rows,
                              int64_t first, float *normed) {
    if (weight) norm_rows(r, x, weight, n, rows, normed);
    for (int64_t t = r->thread; t < rows; t += r->n_threads)
        quantize_row(r, (weight ? normed : x) + t * n, n, first + t);
    bn_count_once(r, BN_COUNT_QUANTIZE, 0);
}

/* Every head of the tokens of this thread, which rotates them next: normed, or as it is. */
static const float *norm_heads(const bn_run *r, const float *x, const float *weight, int64_t n_heads,
                               float *normed) {
    if (!weight) return x;
    const int64_t n = r->engine->model.head_dim, width = n_heads * n;
    const float epsilon = r->engine->model.rms_eps;
    for (int64_t t = r->thread; t < r->pass->n_tokens; t += r->n_threads) {
        const int64_t end = (t + 1) * width;
        int64_t at = t * width;
        for (; at + NORM_ROWS * n <= end; at += NORM_ROWS * n)
            rms_norm(x + at, n, NORM_ROWS, weight, n, epsilon, normed + at);
        for (; at < end; at += n) rms_norm(x + at, n, 1, weight, n, epsilon, normed + at);
    }
    bn_count_once(r, BN_COUNT_RMS_NORM, (uint64_t)n * sizeof(float));
    return normed;
}

/* What follows a product: its tensor's factor, then the bias of these rows, each rounded. */
static void finish(const bn_matrix *m, int64_t row, int64_t n, float *y) {
    if (m->factor != 1.0f)
        for (int64_t i = 0; i < n; i++) y[i] *= m->factor;
    if (m->bias)
        for (int64_t i = 0; i < n; i++) y[i] += m->bias[row + i];
}

/* The product of rows lo to hi with activations in blocks. */
static void multiply_blocks(const bn_run *r, const bn_matrix *m, int64_t lo, int64_t hi, int64_t tile,
                            int64_t first, int64_t n_tokens, float *y) {
    const bn_engine *e = r->engine;
    const bn_buffers *b = &e->buffers;
    const int64_t tile_cols = e->kernels->tile_cols;
    for (int64_t row = lo; row < hi; row += tile) {
        const int n_rows = (int)(hi - row < tile ? hi - row : tile);
        for (int64_t t = 0; t < n_tokens; t += tile_cols) {
            const int n_cols = (int)(n_tokens - t < tile_cols ? n_tokens - t : tile_cols);
            const int64_t from = first + t;
            const bn_blocks x = {b->q8 + from * m->cols, b->steps + from * (m->cols / BN_BLOCK),
                                 b->groups + from * (m->cols / BN_GROUP)};
            e->kernels->blocks_dot[e->arithmetic.fused_sums](m->data + row * (m->cols / 4), m->cols, n_rows,
                                                             m->scale, &x, n_cols, y + t * m->rows + row, m->rows);
            for (int c = 0; c < n_cols; c++) finish(m, row, n_rows, y + (t + c) * m->rows + row);
        }
    }
}

/* y[t][row] = (D - sum) / s * scale with D = sum_i (w + 1) q8, rounded as the generation does; of the quantised
 * rows from `first` on. */
static void bitlinear(const bn_run *r, const bn_matrix *m, int64_t first, int64_t n_tokens, float *y) {
    const bn_engine *e = r->engine;
    const bn_buffers *b = &e->buffers;
    int32_t *acc = e->threads[r->thread].acc;
    const bn_rescale_fn rescale = e->kernels->rescale[e->arithmetic.generation];
    const int64_t tile_cols = e->kernels->tile_cols;
    /* the weights of one tile stay in the cache over all columns */
    const int64_t unit = e->kernels->tile_rows;
    int64_t tile = e->kernels->tile_bytes / (m->cols / 4) / unit * unit;
    tile = tile < unit ? unit : tile > BN_TILE_ROWS ? BN_TILE_ROWS : tile;
    int64_t lo, hi;
    bn_share(m->rows, unit, r->thread, r->n_threads, &lo, &hi);
    if (e->arithmetic.block_quantizer) {
        multiply_blocks(r, m, lo, hi, tile, first, n_tokens, y);
        lo = hi;
    }
    for (int64_t row = lo; row < hi; row += tile) {
        const int n_rows = (int)(hi - row < tile ? hi - row : tile);
        for (int64_t t = 0; t < n_tokens; t += tile_cols) {
            const int n_cols = (int)(n_tokens - t < tile_cols ? n_tokens - t : tile_cols);
            e->kernels->i2s_dot(m->data + row * (m->cols / 4), m->cols, n_rows, b->q8 + (first + t) * m->cols,
                                m->cols, n_cols, acc);
            for (int c = 0; c < n_cols; c++) {
                const float sum = (float)b->q8_sum[first + t + c], s = b->q8_scale[first + t + c];
                float *out = y + (t + c) * m->rows + row;
                rescale(acc + c * n_rows, n_rows, sum, s, m->scale, out);
                finish(m, row, n_rows, out);
            }
        }
    }
    bn_count_once(r, n_tokens == 1 ? BN_COUNT_I2S_GEMV : BN_COUNT_I2S_GEMM, (uint64_t)(m->rows * (m->cols / 4)));
}

static void rope_rows(const bn_run *r, const float *x, int32_t n_heads, float *out) {
    const bn_engine *e = r->engine;
    const int64_t head_dim = e->model.head_dim, half = head_dim / 2;
    const bn_rope_fn rotate = e->kernels->rope[e->model.rope_pairing];
    for (int64_t t = r->thread; t < r->pass->n_tokens; t += r->n_threads) {
        const float *cosines = e->rope_cos + (r->pass->start + t) * half;
        const float *sines = e->rope_sin + (r->pass->start + t) * half;
        for (int64_t h = 0; h < n_heads; h++) {
            const int64_t at = (t * n_heads + h) * head_dim;
            rotate(x + at, cosines, sines, (int)half, out + at);
        }
    }
    bn_count_once(r, BN_COUNT_ROPE, 0);
}

static void add_rows(const bn_run *r, const float *a, const float *b, int64_t n, float *out) {
    int64_t lo, hi;
    bn_share(n, 16, r->thread, r->n_threads, &lo, &hi);
    for (int64_t i = lo; i < hi; i++) out[i] = a[i] + b[i];
}

/* ---- one layer ------------------------------------------------------------------------------------------ */

/* The tap of a norm that not every model has. */
static void record_norm(const bn_run *r, int32_t layer, int which, const float *weight, const float *normed,
                        int64_t n) {
    if (weight) bn_record(r, layer, which, normed, n);
}

/* What several matrices multiply, quantised: the normed rows for all of them, or after another norm for each.
 * Returns how many rows those of one matrix are behind those of the one before. */
static int64_t prepare(const bn_run *r, const float *in, const float *norm, const float *const *norms_in, int n_in,
                       int64_t n, float *normed) {
    const bn_buffers *b = &r->engine->buffers;
    const int64_t dim = r->engine->model.dim;
    if (!norms_in[0]) {
        norm_and_quantize(r, in, norm, dim, n, 0, normed);
        return 0;
    }
    norm_rows(r, in, norm, dim, n, normed);
    for (int i = 0; i < n_in; i++) norm_and_quantize(r, normed, norms_in[i], dim, n, i * n, b->inputs[i]);
    return n;
}

/* Q times its factor, where it has one; of the tokens that this thread rotated. */
static void scale_query(const bn_run *r) {
    const bn_engine *e = r->engine;
    const int64_t n = e->q_dim;
    if (!(e->model.query_scale > 0)) return;
    for (int64_t t = r->thread; t < r->pass->n_tokens; t += r->n_threads)
        scale_row(e->buffers.q_rope + t * n, n, e->model.query_scale, e->buffers.q_scaled + t * n);
}

/* What is added to the residual stream: a branch's result, or that after a norm of its own. */
static const float *norm_branch(const bn_run *r, int32_t layer, int which, const float *x, const float *weight,
                                int64_t n_rows, float *normed) {
    const int64_t dim = r->engine->model.dim;
    if (!weight) return x;
    norm_rows(r, x, weight, dim, n_rows, normed);
    bn_barrier(r);
    bn_record(r, layer, which, normed, n_rows * dim);
    return normed;
}

/* `n_rows` trailing tokens continue after attention: all of them, except in the last layer only
 * the output rows. */
static void forward_layer(const bn_run *r, int32_t layer, int64_t n_rows) {
    bn_engine *e = r->engine;
    bn_buffers *b = &e->buffers;
    const bn_layer *w = &e->layers[layer];
    const int64_t n = r->pass->n_tokens, hidden = e->model.hidden_dim;
    const int64_t dim = e->model.dim, q_dim = e->q_dim, kv_dim = e->kv_dim;
    const bn_gated_fn activate = e->kernels->gated[e->activation][e->width_index];

    const float *const qkv_norms[] = {w->attn_q_norm_in, w->attn_k_norm_in, w->attn_v_norm_in};
    int64_t apart = prepare(r, b->x, w->attn_norm, qkv_norms, 3, n, b->attn_norm);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_ATTN_NORM, b->attn_norm, n * dim);
    record_norm(r, layer, BN_TAP_ATTN_Q_NORM_IN, w->attn_q_norm_in, b->inputs[0], n * dim);
    record_norm(r, layer, BN_TAP_ATTN_K_NORM_IN, w->attn_k_norm_in, b->inputs[1], n * dim);
    record_norm(r, layer, BN_TAP_ATTN_V_NORM_IN, w->attn_v_norm_in, b->inputs[2], n * dim);
    bitlinear(r, &w->q, 0, n, b->q);
    bitlinear(r, &w->k, apart, n, b->k);
    bitlinear(r, &w->v, 2 * apart, n, b->v);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_Q, b->q, n * q_dim);
    bn_record(r, layer, BN_TAP_K, b->k, n * kv_dim);
    bn_record(r, layer, BN_TAP_V, b->v, n * kv_dim);
    const float *q = norm_heads(r, b->q, w->q_norm, e->model.n_heads, b->q_norm);
    const float *k = norm_heads(r, b->k, w->k_norm, e->model.n_kv_heads, b->k_norm);
    rope_rows(r, q, e->model.n_heads, b->q_rope);
    rope_rows(r, k, e->model.n_kv_heads, b->k_rope);
    scale_query(r);
    bn_store_kv(r, layer); /* a thread stores the tokens it rotated */
    bn_barrier(r);
    record_norm(r, layer, BN_TAP_Q_NORM, w->q_norm, b->q_norm, n * q_dim);
    record_norm(r, layer, BN_TAP_K_NORM, w->k_norm, b->k_norm, n * kv_dim);
    bn_record(r, layer, BN_TAP_Q_ROPE, b->q_rope, n * q_dim);
    bn_record(r, layer, BN_TAP_K_ROPE, b->k_rope, n * kv_dim);
    if (e->model.query_scale > 0) bn_record(r, layer, BN_TAP_Q_SCALED, b->q_scaled, n * q_dim);
    bn_attention(r, layer);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_KQV_OUT, b->kqv, n * q_dim);
    norm_and_quantize(r, b->kqv, w->attn_sub_norm, q_dim, n, 0, b->attn_sub);
    bn_barrier(r);
    record_norm(r, layer, BN_TAP_ATTN_SUB_NORM, w->attn_sub_norm, b->attn_sub, n * q_dim);
    bitlinear(r, &w->o, 0, n, b->attn_out);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_ATTN_O_OUT, b->attn_out, n * dim);
    if (n_rows == 0) return;

    const int64_t skipped = (n - n_rows) * dim;
    const float *attended = norm_branch(r, layer, BN_TAP_ATTN_POST_NORM, b->attn_out + skipped, w->attn_post_norm,
                                        n_rows, b->attn_post);
    add_rows(r, attended, b->x + skipped, n_rows * dim, b->ffn_inp);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_INP, b->ffn_inp, n_rows * dim);
    const float *const ffn_norms[] = {w->ffn_gate_norm_in, w->ffn_up_norm_in};
    apart = prepare(r, b->ffn_inp, w->ffn_norm, ffn_norms, 2, n_rows, b->ffn_norm);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_NORM, b->ffn_norm, n_rows * dim);
    record_norm(r, layer, BN_TAP_FFN_GATE_NORM_IN, w->ffn_gate_norm_in, b->inputs[0], n_rows * dim);
    record_norm(r, layer, BN_TAP_FFN_UP_NORM_IN, w->ffn_up_norm_in, b->inputs[1], n_rows * dim);
    bitlinear(r, &w->gate, 0, n_rows, b->gate);
    bitlinear(r, &w->up, apart, n_rows, b->up);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_GATE, b->gate, n_rows * hidden);
    bn_record(r, layer, BN_TAP_FFN_UP, b->up, n_rows * hidden);
    for (int64_t t = r->thread; t < n_rows; t += r->n_threads)
        activate(b->gate + t * hidden, b->up + t * hidden, hidden, b->act + t * hidden, b->prod + t * hidden);
    norm_and_quantize(r, b->prod, w->ffn_sub_norm, hidden, n_rows, 0, b->ffn_sub); /* same rows, same thread */
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_ACT, b->act, n_rows * hidden);
    bn_record(r, layer, BN_TAP_FFN_OUT, b->prod, n_rows * hidden);
    record_norm(r, layer, BN_TAP_FFN_SUB_NORM, w->ffn_sub_norm, b->ffn_sub, n_rows * hidden);
    bitlinear(r, &w->down, 0, n_rows, b->down);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_DOWN, b->down, n_rows * dim);
    const float *fed = norm_branch(r, layer, BN_TAP_FFN_POST_NORM, b->down, w->ffn_post_norm, n_rows, b->ffn_post);
    add_rows(r, fed, b->ffn_inp, n_rows * dim, b->x);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_L_OUT, b->x, n_rows * dim);
}

static void forward(void *argument, int thread, int n_threads) {
    bn_run run = *(const bn_run *)argument, *r = &run;
    run.thread = thread;
    run.n_threads = n_threads;
    const bn_engine *e = r->engine;
    const bn_buffers *b = &e->buffers;
    const bn_pass *p = r->pass;
    const int64_t dim = e->model.dim;
    const int scales = e->model.embedding_scale != 1.0f;
    embed(r); /* thread t % n_threads embeds token t and norms it in the first layer */
    bn_barrier(r);
    const float *embd = scales ? b->embd : b->x;
    bn_record_model(r, BN_TAP_INP_EMBD, embd, p->n_tokens * dim);
    if (scales) bn_record_model(r, BN_TAP_INP_SCALED, b->x, p->n_tokens * dim);
    for (int32_t layer = 0; layer < e->model.n_layers; layer++)
        forward_layer(r, layer, layer + 1 < e->model.n_layers ? p->n_tokens : p->n_outputs);
    if (p->n_outputs == 0) return;

    norm_rows(r, b->x, e->model.output_norm, dim, p->n_outputs, b->result_norm);
    if (p->logits || p->top)
        bn_head(r, p->n_outputs); /* same rows, same thread */
    else
        bn_barrier(r);
    bn_record_model(r, BN_TAP_RESULT_NORM, b->result_norm, p->n_outputs * dim);
    if (p->logits)
        bn_record_model(r, BN_TAP_RESULT_OUTPUT, p->logits, (int64_t)p->n_outputs * e->model.vocab_size);
    if (p->pooling == BN_POOL_NONE) return;

    bn_pooling(r);
    bn_barrier(r);
    bn_record_model(r, BN_TAP_POOLED, p->pooled, dim);
}

/* For little work, waking another thread costs more than it saves. */
static int threads_for(const bn_engine *e, const bn_pass *pass) {
    const int64_t work = e->ternary_bytes * pass->n_tokens +
                         (pass->logits || pass->top ? (int64_t)pass->n_outputs * e->model.vocab_size : 0) *
                             bn_table_row_bytes(e->model.output.type, e->model.dim);
    const int64_t wanted = work / e->bytes_per_thread, most = bn_pool_size(e->pool);
    return (int)(wanted < 1 ? 1 : wanted > most ? most : wanted);
}

void bn_forward(bn_engine *engine, const bn_pass *pass) {
    bn_run run = {engine, pass, 0, 1};
    bn_pool_run(engine->pool, threads_for(engine, pass), forward, &run);
}
