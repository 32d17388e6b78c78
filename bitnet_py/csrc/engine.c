/* Life cycle of an engine: creation, buffers, validation of a pass, counters. */
#include "engine.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(int status, const char *message) {
    bn_set_error("%s", message);
    return status;
}

static int matrix_ok(const bn_matrix *m, int64_t rows, int64_t cols) {
    return m->data && m->rows == rows && m->cols == cols && cols % 128 == 0;
}

static int model_ok(const bn_model *m) {
    if (m->n_layers <= 0 || m->n_heads <= 0 || m->n_kv_heads <= 0 || m->head_dim <= 0 || m->hidden_dim <= 0 ||
        m->vocab_size <= 0 || m->head_dim % 2 || m->n_heads % m->n_kv_heads || m->dim != m->n_heads * m->head_dim)
        return 0;
    if (!m->token_embd || !m->output || !m->output_norm || !m->layers) return 0;
    const int64_t dim = m->dim, kv_dim = (int64_t)m->n_kv_heads * m->head_dim, hidden = m->hidden_dim;
    for (int32_t i = 0; i < m->n_layers; i++) {
        const bn_layer *l = &m->layers[i];
        if (!l->attn_norm || !l->ffn_norm || !matrix_ok(&l->q, dim, dim) || !matrix_ok(&l->k, kv_dim, dim) ||
            !matrix_ok(&l->v, kv_dim, dim) || !matrix_ok(&l->o, dim, dim) || !matrix_ok(&l->gate, hidden, dim) ||
            !matrix_ok(&l->up, hidden, dim) || !matrix_ok(&l->down, dim, hidden))
            return 0;
    }
    return 1;
}

int bn_engine_create(const bn_model *model, const bn_options *options, bn_engine **out) {
    *out = NULL;
    if (options->simd_width != 8 && options->simd_width != 16)
        return fail(BN_ERR_ARGUMENT, "simd_width must be 8 or 16");
    if (options->n_threads < 1 || options->n_threads > 1024)
        return fail(BN_ERR_ARGUMENT, "n_threads must be between 1 and 1024");
    if (options->bytes_per_thread < 1) return fail(BN_ERR_ARGUMENT, "bytes_per_thread must be at least 1");
    if (!model_ok(model)) return fail(BN_ERR_ARGUMENT, "the model's dimensions and tensors do not agree");
    const bn_kernels *kernels = bn_select_kernels(options->kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;

    bn_engine *e = calloc(1, sizeof *e);
    if (!e) return fail(BN_ERR_MEMORY, "out of memory");
    e->model = *model;
    e->kv_dim = model->n_kv_heads * model->head_dim;
    e->simd_width = options->simd_width;
    e->width_index = BN_WIDTH_INDEX(options->simd_width);
    e->fused_quantizer = options->fused_quantizer;
    e->bytes_per_thread = options->bytes_per_thread;
    e->kernels = kernels;
    e->layers = malloc((size_t)model->n_layers * sizeof *e->layers);
    e->members = calloc((size_t)options->n_threads, sizeof *e->members);
    if (!e->layers || !e->members) {
        bn_engine_free(e);
        return fail(BN_ERR_MEMORY, "out of memory");
    }
    memcpy(e->layers, model->layers, (size_t)model->n_layers * sizeof *e->layers);
    e->model.layers = e->layers;
    const int64_t dim = model->dim, hidden = model->hidden_dim;
    e->ternary_bytes = model->n_layers * (2 * dim * dim + 2 * dim * e->kv_dim + 3 * dim * hidden) / 4;
    e->team = bn_team_create(options->n_threads);
    if (!e->team) {
        bn_engine_free(e);
        return fail(BN_ERR_THREAD, "could not start the worker threads");
    }
    static const char *const names[BN_COUNTERS] = {
        [BN_COUNT_I2S_GEMV] = "i2s_gemv",    [BN_COUNT_I2S_GEMM] = "i2s_gemm",
        [BN_COUNT_QUANTIZE] = "quantize_i8", [BN_COUNT_ATTENTION] = "attention",
        [BN_COUNT_HEAD_F16] = "head_f16",    [BN_COUNT_HEAD_SCREEN] = "head_screen",
        [BN_COUNT_RMS_NORM] = "rms_norm",    [BN_COUNT_ROPE] = "rope",
    };
    for (int i = 0; i < BN_COUNTERS; i++)
        snprintf(e->counter_names[i], sizeof e->counter_names[i], "%s_%s", names[i],
                 i == BN_COUNT_RMS_NORM ? "scalar" : kernels->name);
    *out = e;
    return BN_OK;
}

void bn_engine_free(bn_engine *e) {
    if (!e) return;
    bn_team_free(e->team);
    free(e->arena);
    free(e->search.z);
    free(e->search.upper);
    free(e->found);
    free(e->rope_cos);
    free(e->rope_sin);
    free(e->members);
    free(e->layers);
    free(e);
}

const char *bn_engine_kernel(const bn_engine *e) { return e->kernels->name; }

int bn_engine_counters(const bn_engine *e, bn_counter *out, int capacity, int *count) {
    *count = BN_COUNTERS;
    for (int i = 0; i < BN_COUNTERS && i < capacity; i++)
        out[i] = (bn_counter){e->counter_names[i], e->calls[i], e->bytes[i]};
    return BN_OK;
}

/* Hands out 64-byte aligned pieces; with base NULL it only measures. */
typedef struct {
    char *base;
    size_t used;
} arena;

static void *take(arena *a, size_t n, size_t item) {
    void *p = a->base ? a->base + a->used : NULL;
    a->used += (n * item + 63) / 64 * 64;
    return p;
}

static size_t lay_out(bn_engine *e, char *base, int32_t n_tokens, int64_t n_cells) {
    const size_t n = (size_t)n_tokens, dim = (size_t)e->model.dim, kv = (size_t)e->kv_dim;
    const size_t hidden = (size_t)e->model.hidden_dim, longest = dim > hidden ? dim : hidden;
    arena a = {base, 0};
    bn_buffers *b = &e->buffers;
    float **of_dim[] = {&b->x,        &b->attn_norm, &b->q,        &b->q_rope, &b->kqv,         &b->attn_sub,
                        &b->attn_out, &b->ffn_inp,   &b->ffn_norm, &b->down,   &b->result_norm, &b->head_in};
    float **of_hidden[] = {&b->gate, &b->up, &b->act, &b->prod, &b->ffn_sub};
    float **of_kv[] = {&b->k, &b->k_rope, &b->v};
    for (size_t i = 0; i < sizeof of_dim / sizeof *of_dim; i++) *of_dim[i] = take(&a, n * dim, sizeof(float));
    for (size_t i = 0; i < sizeof of_hidden / sizeof *of_hidden; i++)
        *of_hidden[i] = take(&a, n * hidden, sizeof(float));
    for (size_t i = 0; i < sizeof of_kv / sizeof *of_kv; i++) *of_kv[i] = take(&a, n * kv, sizeof(float));
    b->q8 = take(&a, n * longest, 1);
    b->q8_scale = take(&a, n, sizeof(float));
    b->q8_sum = take(&a, n, sizeof(int32_t));
    b->half = take(&a, n * kv, sizeof(uint16_t));
    const size_t cells = (size_t)n_cells;
    const size_t head = (size_t)e->model.head_dim, of_heads = BN_HEADS_AT_ONCE * (head > cells ? head : cells);
    for (int i = 0; i < bn_team_size(e->team); i++) {
        bn_private *m = &e->members[i];
        m->query = take(&a, BN_HEADS_AT_ONCE * head, sizeof(float));
        m->scores = take(&a, BN_HEADS_AT_ONCE * cells, sizeof(float));
        m->half = take(&a, dim > of_heads ? dim : of_heads, sizeof(uint16_t));
        m->acc = take(&a, BN_TILE_ROWS * (size_t)e->kernels->tile_cols, sizeof(int32_t));
    }
    return a.used;
}

static int reserve(bn_engine *e, int32_t n_tokens, int64_t n_cells) {
    if (n_tokens <= e->arena_tokens && n_cells <= e->arena_cells) return BN_OK;
    if (n_tokens < e->arena_tokens) n_tokens = e->arena_tokens;
    if (n_cells < e->arena_cells) n_cells = e->arena_cells;
    free(e->arena);
    e->arena = NULL;
    e->arena_tokens = 0;
    e->arena_cells = 0;
    const size_t size = lay_out(e, NULL, n_tokens, n_cells);
    if (posix_memalign(&e->arena, 64, size)) {
        e->arena = NULL;
        return fail(BN_ERR_MEMORY, "out of memory for the activations of this pass");
    }
    lay_out(e, e->arena, n_tokens, n_cells);
    e->arena_tokens = n_tokens;
    e->arena_cells = n_cells;
    return BN_OK;
}

/* bitnet.cpp ggml.c, ggml_rope_cache_init: the angle is a running product in binary32, not position * frequency,
 * and powf, cosf and sinf are the C library's. */
static int reserve_rope(bn_engine *e, int32_t positions) {
    if (positions <= e->rope_positions) return BN_OK;
    const int32_t half = e->model.head_dim / 2;
    int32_t target = e->rope_positions ? e->rope_positions : 64;
    while (target < positions) target *= 2;
    const size_t size = (size_t)target * (size_t)half * sizeof(float);
    float *cosines = realloc(e->rope_cos, size);
    if (cosines) e->rope_cos = cosines;
    float *sines = realloc(e->rope_sin, size);
    if (sines) e->rope_sin = sines;
    if (!cosines || !sines) return fail(BN_ERR_MEMORY, "out of memory for the rotary table");
    const float ratio = powf(e->model.rope_base, -2.0f / (float)e->model.head_dim);
    for (int32_t p = e->rope_positions; p < target; p++) {
        float theta = (float)p;
        for (int32_t i = 0; i < half; i++) {
            e->rope_cos[(size_t)p * half + i] = cosf(theta);
            e->rope_sin[(size_t)p * half + i] = sinf(theta);
            theta *= ratio;
        }
    }
    e->rope_positions = target;
    return BN_OK;
}

static int screen_ok(const bn_engine *e, const bn_screen *s) {
    return s && s->codes && s->scale && s->error && s->norm && e->model.dim % 32 == 0 &&
           e->model.dim <= BN_MAX_SCREEN_DIM;
}

static int reserve_search(bn_engine *e, const bn_top *top) {
    if (top->n < 1 || top->n > BN_MAX_TOP || top->n > e->model.vocab_size || !top->ids || !top->logits ||
        !screen_ok(e, top->screen))
        return fail(BN_ERR_ARGUMENT, "the search for the largest logits has a bad count, buffer or screen");
    bn_search *s = &e->search;
    if (!s->z) s->z = malloc((size_t)e->model.dim * sizeof *s->z);
    if (!s->upper) s->upper = malloc((size_t)e->model.vocab_size * sizeof *s->upper);
    if (!e->found) e->found = malloc((size_t)bn_team_size(e->team) * sizeof *e->found);
    if (!s->z || !s->upper || !e->found) return fail(BN_ERR_MEMORY, "out of memory for the search");
    s->kernels = e->kernels;
    s->dots = e->kernels->dots_f16[e->width_index];
    s->head = e->model.output;
    s->n_rows = e->model.vocab_size;
    s->dim = e->model.dim;
    s->screen = top->screen;
    s->n = top->n;
    return BN_OK;
}

static int rows_ok(const bn_engine *e, int64_t first_row, int64_t n_rows) {
    return first_row >= 0 && n_rows >= 0 && n_rows <= e->model.vocab_size &&
           first_row <= e->model.vocab_size - n_rows;
}

int bn_engine_build_screen(bn_engine *e, int64_t first_row, int64_t n_rows, const bn_screen *out) {
    if (!screen_ok(e, out)) return fail(BN_ERR_ARGUMENT, "a screen needs four buffers and a dim it can hold");
    if (!rows_ok(e, first_row, n_rows)) return fail(BN_ERR_ARGUMENT, "rows outside the head");
    bn_build_screen(e, first_row, n_rows, out);
    return BN_OK;
}

int bn_engine_last_logits(bn_engine *e, int64_t first_row, int64_t n_rows, float *logits) {
    if (!e->has_head_input) return fail(BN_ERR_ARGUMENT, "the last pass computed no output row");
    if (!rows_ok(e, first_row, n_rows)) return fail(BN_ERR_ARGUMENT, "rows outside the head");
    bn_last_logits(e, first_row, n_rows, logits);
    return BN_OK;
}

int bn_engine_forward(bn_engine *e, const bn_pass *pass) {
    if (pass->n_tokens < 1 || pass->start < 0) return fail(BN_ERR_ARGUMENT, "a pass needs at least one token");
    if (pass->start > INT32_MAX / 2 - pass->n_tokens) return fail(BN_ERR_ARGUMENT, "position out of range");
    if (pass->capacity % 32 || pass->capacity < (int64_t)pass->start + pass->n_tokens)
        return fail(BN_ERR_ARGUMENT, "the cache is too small for this pass, or not a multiple of 32 cells");
    if (pass->n_outputs != 0 && pass->n_outputs != 1 && pass->n_outputs != pass->n_tokens)
        return fail(BN_ERR_ARGUMENT, "n_outputs must be 0, 1 or n_tokens");
    if (!pass->tokens || !pass->k_cache || !pass->v_cache || (pass->n_outputs && !pass->logits && !pass->top))
        return fail(BN_ERR_ARGUMENT, "a buffer of the pass is missing");
    if (pass->top && (pass->n_outputs != 1 || pass->logits))
        return fail(BN_ERR_ARGUMENT, "the largest logits can be had of one output row, instead of all logits");
    for (int32_t i = 0; i < pass->n_tokens; i++) {
        if (pass->tokens[i] < 0 || pass->tokens[i] >= e->model.vocab_size) {
            bn_set_error("token id %d is outside the vocabulary of %d", pass->tokens[i], e->model.vocab_size);
            return BN_ERR_ARGUMENT;
        }
    }
    e->has_head_input = 0; /* the buffers may move even when something fails below */
    int status = reserve(e, pass->n_tokens, bn_pad32((int64_t)pass->start + pass->n_tokens));
    if (!status) status = reserve_rope(e, pass->start + pass->n_tokens);
    if (!status && pass->top) status = reserve_search(e, pass->top);
    if (status) return status;
    bn_forward(e, pass);
    e->has_head_input = pass->n_outputs == 1;
    return BN_OK;
}
