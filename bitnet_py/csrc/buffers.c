#include "buffers.h"
#include "error.h"

#include <math.h>
#include <stdlib.h>

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

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t lay_out(bn_engine *e, char *base, int32_t n_tokens, int64_t n_cells) {
    const size_t n = (size_t)n_tokens, dim = (size_t)e->model.dim, q = (size_t)e->q_dim, kv = (size_t)e->kv_dim;
    const size_t hidden = (size_t)e->model.hidden_dim;
    /* what only some models have */
    const bn_layer *w = &e->layers[0];
    const size_t own = w->attn_q_norm_in ? dim : 0, post = w->attn_post_norm ? dim : 0;
    const size_t head_q = w->q_norm ? q : 0, head_k = w->k_norm ? kv : 0;
    const size_t scaled_q = e->model.query_scale > 0 ? q : 0, embd = e->model.embedding_scale != 1.0f ? dim : 0;
    const size_t longest = larger(larger(larger(dim, q), hidden), 3 * own), rows = own ? 3 * n : n;
    arena a = {base, 0};
    bn_buffers *b = &e->buffers;
    const struct {
        float **buffer;
        size_t width;
    } floats[] = {
        {&b->x, dim},
        {&b->attn_norm, dim},
        {&b->q, q},
        {&b->q_rope, q},
        {&b->kqv, q},
        {&b->attn_sub, q},
        {&b->attn_out, dim},
        {&b->ffn_inp, dim},
        {&b->ffn_norm, dim},
        {&b->down, dim},
        {&b->result_norm, dim},
        {&b->head_in, dim},
        {&b->gate, hidden},
        {&b->up, hidden},
        {&b->act, hidden},
        {&b->prod, hidden},
        {&b->ffn_sub, hidden},
        {&b->k, kv},
        {&b->k_rope, kv},
        {&b->v, kv},
        {&b->embd, embd},
        {&b->inputs[0], own},
        {&b->inputs[1], own},
        {&b->inputs[2], own},
        {&b->q_norm, head_q},
        {&b->k_norm, head_k},
        {&b->q_scaled, scaled_q},
        {&b->attn_post, post},
        {&b->ffn_post, post},
    };
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++)
        *floats[i].buffer = take(&a, n * floats[i].width, sizeof(float));
    b->q8 = take(&a, n * longest, 1);
    b->q8_scale = take(&a, rows, sizeof(float));
    b->q8_sum = take(&a, rows, sizeof(int32_t));
    b->steps = take(&a, n * longest / BN_GROUP, sizeof(float));
    b->groups = take(&a, n * longest / BN_GROUP, sizeof(int32_t));
    b->half = take(&a, n * kv, sizeof(uint16_t));
    const size_t cells = (size_t)n_cells, head_dim = (size_t)e->model.head_dim;
    for (int i = 0; i < bn_pool_size(e->pool); i++) {
        bn_private *own = &e->threads[i];
        own->query = take(&a, BN_HEADS_AT_ONCE * head_dim, sizeof(float));
        own->scores = take(&a, BN_HEADS_AT_ONCE * cells, sizeof(float));
        own->half = take(&a, larger(dim, BN_HEADS_AT_ONCE * larger(head_dim, cells)), sizeof(uint16_t));
        own->acc = take(&a, BN_TILE_ROWS * (size_t)e->kernels->tile_cols, sizeof(int32_t));
        if (!e->arithmetic.flash_attention) continue;
        own->flash.query = take(&a, BN_FLASH_ROWS * head_dim, sizeof(float));
        own->flash.keys = take(&a, BN_FLASH_CELLS * head_dim, sizeof(float));
        own->flash.values = take(&a, BN_FLASH_CELLS * head_dim, sizeof(float));
        own->flash.scores = take(&a, BN_FLASH_ROWS * BN_FLASH_CELLS, sizeof(float));
        own->flash.sums = take(&a, BN_FLASH_ROWS * head_dim, sizeof(float));
        own->flash.part = take(&a, head_dim, sizeof(float));
    }
    return a.used;
}

static int reserve_activations(bn_engine *e, int32_t n_tokens, int64_t n_cells) {
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
        return bn_fail(BN_ERR_MEMORY, "out of memory for the activations of this pass");
    }
    lay_out(e, e->arena, n_tokens, n_cells);
    e->arena_tokens = n_tokens;
    e->arena_cells = n_cells;
    return BN_OK;
}

/* bitnet.cpp ggml.c, ggml_rope_cache_init and rope_yarn: the angle is a running product in
 * binary32, not position * frequency; divided by its pair's factor and scaled only where it is used.
 * powf, cosf and sinf are the C library's. */
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
    if (!cosines || !sines) return bn_fail(BN_ERR_MEMORY, "out of memory for the rotary table");
    const float ratio = powf(e->model.rope_base, -2.0f / (float)e->model.head_dim);
    const float *factors = e->model.rope_factors;
    for (int32_t p = e->rope_positions; p < target; p++) {
        float theta = (float)p;
        for (int32_t i = 0; i < half; i++) {
            const float angle = e->model.rope_scale * (theta / (factors ? factors[i] : 1.0f));
            e->rope_cos[(size_t)p * half + i] = cosf(angle);
            e->rope_sin[(size_t)p * half + i] = sinf(angle);
            theta *= ratio;
        }
    }
    e->rope_positions = target;
    return BN_OK;
}

int bn_reserve_buffers(bn_engine *e, int32_t n_tokens, int32_t n_used) {
    const int status = reserve_activations(e, n_tokens, bn_pad(n_used, e->cell_multiple));
    return status ? status : reserve_rope(e, n_used);
}

void bn_free_buffers(bn_engine *e) {
    free(e->arena);
    free(e->rope_cos);
    free(e->rope_sin);
}
