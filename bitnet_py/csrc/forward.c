/* One pass through the network. Reads top to bottom: operations on one row, operations that all
 * threads share, layer, pass.
 *
 * Every operation rounds as bitnet.cpp's does (docs/numerics.md); none is fused with its
 * neighbour. What depends on the architecture (activation, RoPE pairing, sub-norms, head width,
 * biases) is read from bn_model.
 */
#include "forward.h"
#include "attention.h"
#include "head.h"
#include "pass.h"
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

static void norm_and_quantize(const bn_run *r, const float *x, const float *weight, int64_t n, int64_t rows,
                              float *normed) {
    if (weight) norm_rows(r, x, weight, n, rows, normed);
    for (int64_t t = r->thread; t < rows; t += r->n_threads) quantize_row(r, (weight ? normed : x) + t * n, n, t);
    bn_count_once(r, BN_COUNT_QUANTIZE, 0);
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
                            int64_t n_tokens, float *y) {
    const bn_engine *e = r->engine;
    const bn_buffers *b = &e->buffers;
    const int64_t tile_cols = e->kernels->tile_cols;
    for (int64_t row = lo; row < hi; row += tile) {
        const int n_rows = (int)(hi - row < tile ? hi - row : tile);
        for (int64_t t = 0; t < n_tokens; t += tile_cols) {
            const int n_cols = (int)(n_tokens - t < tile_cols ? n_tokens - t : tile_cols);
            const bn_blocks x = {b->q8 + t * m->cols, b->steps + t * (m->cols / BN_BLOCK),
                                 b->groups + t * (m->cols / BN_GROUP)};
            e->kernels->blocks_dot[e->arithmetic.fused_sums](m->data + row * (m->cols / 4), m->cols, n_rows,
                                                             m->scale, &x, n_cols, y + t * m->rows + row, m->rows);
            for (int c = 0; c < n_cols; c++) finish(m, row, n_rows, y + (t + c) * m->rows + row);
        }
    }
}

/* y[t][row] = (D - sum) / s * scale with D = sum_i (w + 1) q8, rounded as the generation does. */
static void bitlinear(const bn_run *r, const bn_matrix *m, int64_t n_tokens, float *y) {
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
        multiply_blocks(r, m, lo, hi, tile, n_tokens, y);
        lo = hi;
    }
    for (int64_t row = lo; row < hi; row += tile) {
        const int n_rows = (int)(hi - row < tile ? hi - row : tile);
        for (int64_t t = 0; t < n_tokens; t += tile_cols) {
            const int n_cols = (int)(n_tokens - t < tile_cols ? n_tokens - t : tile_cols);
            e->kernels->i2s_dot(m->data + row * (m->cols / 4), m->cols, n_rows, b->q8 + t * m->cols, m->cols,
                                n_cols, acc);
            for (int c = 0; c < n_cols; c++) {
                const float sum = (float)b->q8_sum[t + c], s = b->q8_scale[t + c];
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

/* `n_rows` trailing tokens continue after attention: all of them, except in the last layer only
 * the output rows. */
static void forward_layer(const bn_run *r, int32_t layer, int64_t n_rows) {
    bn_engine *e = r->engine;
    bn_buffers *b = &e->buffers;
    const bn_layer *w = &e->layers[layer];
    const int64_t n = r->pass->n_tokens, hidden = e->model.hidden_dim;
    const int64_t dim = e->model.dim, q_dim = e->q_dim, kv_dim = e->kv_dim;
    const bn_gated_fn activate = e->kernels->gated[e->activation][e->width_index];

    norm_and_quantize(r, b->x, w->attn_norm, dim, n, b->attn_norm);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_ATTN_NORM, b->attn_norm, n * dim);
    bitlinear(r, &w->q, n, b->q);
    bitlinear(r, &w->k, n, b->k);
    bitlinear(r, &w->v, n, b->v);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_Q, b->q, n * q_dim);
    bn_record(r, layer, BN_TAP_K, b->k, n * kv_dim);
    bn_record(r, layer, BN_TAP_V, b->v, n * kv_dim);
    rope_rows(r, b->q, e->model.n_heads, b->q_rope);
    rope_rows(r, b->k, e->model.n_kv_heads, b->k_rope);
    bn_store_kv(r, layer); /* a thread stores the tokens it rotated */
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_Q_ROPE, b->q_rope, n * q_dim);
    bn_record(r, layer, BN_TAP_K_ROPE, b->k_rope, n * kv_dim);
    bn_attention(r, layer);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_KQV_OUT, b->kqv, n * q_dim);
    norm_and_quantize(r, b->kqv, w->attn_sub_norm, q_dim, n, b->attn_sub);
    bn_barrier(r);
    if (w->attn_sub_norm) bn_record(r, layer, BN_TAP_ATTN_SUB_NORM, b->attn_sub, n * q_dim);
    bitlinear(r, &w->o, n, b->attn_out);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_ATTN_O_OUT, b->attn_out, n * dim);
    if (n_rows == 0) return;

    const int64_t skipped = (n - n_rows) * dim;
    add_rows(r, b->attn_out + skipped, b->x + skipped, n_rows * dim, b->ffn_inp);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_INP, b->ffn_inp, n_rows * dim);
    norm_and_quantize(r, b->ffn_inp, w->ffn_norm, dim, n_rows, b->ffn_norm);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_NORM, b->ffn_norm, n_rows * dim);
    bitlinear(r, &w->gate, n_rows, b->gate);
    bitlinear(r, &w->up, n_rows, b->up);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_GATE, b->gate, n_rows * hidden);
    bn_record(r, layer, BN_TAP_FFN_UP, b->up, n_rows * hidden);
    for (int64_t t = r->thread; t < n_rows; t += r->n_threads)
        activate(b->gate + t * hidden, b->up + t * hidden, hidden, b->act + t * hidden, b->prod + t * hidden);
    norm_and_quantize(r, b->prod, w->ffn_sub_norm, hidden, n_rows, b->ffn_sub); /* same rows, same thread */
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_ACT, b->act, n_rows * hidden);
    bn_record(r, layer, BN_TAP_FFN_OUT, b->prod, n_rows * hidden);
    if (w->ffn_sub_norm) bn_record(r, layer, BN_TAP_FFN_SUB_NORM, b->ffn_sub, n_rows * hidden);
    bitlinear(r, &w->down, n_rows, b->down);
    bn_barrier(r);
    bn_record(r, layer, BN_TAP_FFN_DOWN, b->down, n_rows * dim);
    add_rows(r, b->down, b->ffn_inp, n_rows * dim, b->x);
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
    embed(r); /* thread t % n_threads embeds token t and norms it in the first layer */
    bn_barrier(r);
    bn_record_model(r, BN_TAP_INP_EMBD, b->x, (int64_t)p->n_tokens * e->model.dim);
    for (int32_t layer = 0; layer < e->model.n_layers; layer++)
        forward_layer(r, layer, layer + 1 < e->model.n_layers ? p->n_tokens : p->n_outputs);
    if (p->n_outputs == 0) return;

    norm_rows(r, b->x, e->model.output_norm, e->model.dim, p->n_outputs, b->result_norm);
    bn_head(r, p->n_outputs); /* same rows, same thread */
    bn_record_model(r, BN_TAP_RESULT_NORM, b->result_norm, (int64_t)p->n_outputs * e->model.dim);
    if (p->logits)
        bn_record_model(r, BN_TAP_RESULT_OUTPUT, p->logits, (int64_t)p->n_outputs * e->model.vocab_size);
}

/* For little work, waking another thread costs more than it saves. */
static int threads_for(const bn_engine *e, const bn_pass *pass) {
    const int64_t work =
        e->ternary_bytes * pass->n_tokens +
        (int64_t)pass->n_outputs * e->model.vocab_size * bn_table_row_bytes(e->model.output.type, e->model.dim);
    const int64_t wanted = work / e->bytes_per_thread, most = bn_pool_size(e->pool);
    return (int)(wanted < 1 ? 1 : wanted > most ? most : wanted);
}

void bn_forward(bn_engine *engine, const bn_pass *pass) {
    bn_run run = {engine, pass, 0, 1};
    bn_pool_run(engine->pool, threads_for(engine, pass), forward, &run);
}
