#include "checks.h"

#include <string.h>

typedef struct {
    int n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, vocab_size, sub_norms;
    int activation, rope_pairing, separate_head;
    int extras; /* biases, factors of matrices, divisors and a scale of RoPE's angles */
    int own;    /* norms of heads and of every matrix's input; 2: also those of branches, and the factors */
} shape;

static const shape SHAPES[] = {
    /* rows of one and of three blocks */
    {2, 4, 2, 32, 128, 384, 61, 1, BN_RELU_SQUARED, BN_ROPE_HALVES, 0},
    /* a single head, whose scores are a tiled product; no sub-norms */
    {1, 1, 1, 128, 128, 128, 37, 0, BN_RELU_SQUARED, BN_ROPE_HALVES, 0},
    /* eight heads share one KV head: more than are attended together */
    {1, 16, 2, 8, 128, 128, 37, 1, BN_RELU_SQUARED, BN_ROPE_HALVES, 0},
    /* heads wider than dim / n_heads, and narrower ones */
    {2, 6, 3, 64, 128, 256, 41, 0, BN_SILU, BN_ROPE_ADJACENT, 1, 1},
    {1, 4, 4, 32, 384, 128, 37, 1, BN_SILU, BN_ROPE_HALVES, 1},
    /* norms of every kind, of one head and of six */
    {2, 6, 2, 64, 128, 256, 41, 1, BN_SILU, BN_ROPE_HALVES, 0, 0, 1},
    {2, 1, 1, 128, 256, 128, 37, 1, BN_GELU, BN_ROPE_HALVES, 0, 0, 2},
};

enum { ALL = -1 }; /* for n_outputs */

/* Arithmetic, prompt, what is recorded, and how many empty cells come first: the results must not
 * depend on anything else. */
typedef struct {
    bn_arithmetic arithmetic;
    int n_prompt, n_outputs, record, start;
} variant;

/* Cells of a cache for n tokens. */
static int64_t capacity_of(const variant *v, int64_t n) {
    const int64_t multiple = v->arithmetic.generation == BN_MAIN ? 256 : 32;
    return (n + multiple - 1) / multiple * multiple;
}

static bn_matrix random_matrix(int64_t rows, int64_t cols, int extras) {
    const float *bias = extras ? random_floats(rows, 0.0f, 0.5f) : NULL;
    return (bn_matrix){random_codes(rows * cols / 4), rows, cols, 0.05f, extras ? 0.75f : 1.0f, bias};
}

static const float *random_norm(int exists, int64_t n) { return exists ? random_floats(n, 1.0f, 0.5f) : NULL; }

static bn_model random_model(const shape *s) {
    const int64_t dim = s->dim, q_dim = s->n_heads * s->head_dim, kv_dim = s->n_kv_heads * s->head_dim;
    const int64_t hidden = s->hidden_dim;
    bn_layer *layers = room(s->n_layers, sizeof *layers, 0);
    for (int i = 0; i < s->n_layers; i++) {
        layers[i] = (bn_layer){
            .attn_norm = random_norm(1, dim),
            .attn_q_norm_in = random_norm(s->own, dim),
            .attn_k_norm_in = random_norm(s->own, dim),
            .attn_v_norm_in = random_norm(s->own, dim),
            .q_norm = random_norm(s->own, s->head_dim),
            .k_norm = random_norm(s->own, s->head_dim),
            .attn_sub_norm = random_norm(s->sub_norms, q_dim),
            .attn_post_norm = random_norm(s->own > 1, dim),
            .ffn_norm = random_norm(1, dim),
            .ffn_gate_norm_in = random_norm(s->own, dim),
            .ffn_up_norm_in = random_norm(s->own, dim),
            .ffn_sub_norm = random_norm(s->sub_norms, hidden),
            .ffn_post_norm = random_norm(s->own > 1, dim),
            .q = random_matrix(q_dim, dim, s->extras),
            .k = random_matrix(kv_dim, dim, s->extras),
            .v = random_matrix(kv_dim, dim, s->extras),
            .o = random_matrix(dim, q_dim, s->extras),
            .gate = random_matrix(hidden, dim, s->extras),
            .up = random_matrix(hidden, dim, s->extras),
            .down = random_matrix(dim, hidden, s->extras),
        };
    }
    const uint16_t *embeddings = random_halves(s->vocab_size * dim);
    return (bn_model){
        .n_layers = s->n_layers,
        .n_heads = s->n_heads,
        .n_kv_heads = s->n_kv_heads,
        .head_dim = s->head_dim,
        .dim = (int32_t)dim,
        .hidden_dim = s->hidden_dim,
        .vocab_size = s->vocab_size,
        .activation = s->activation,
        .rope_pairing = s->rope_pairing,
        .rms_eps = 1e-5f,
        .rope_base = 10000.0f,
        .rope_scale = s->extras ? 0.5f : 1.0f,
        .rope_factors = s->extras ? random_floats(s->head_dim / 2, 2.0f, 1.0f) : NULL,
        .embedding_scale = s->own > 1 ? 11.3f : 1.0f,
        .query_scale = s->own > 1 ? 0.09f : 0.0f,
        .token_embd = {embeddings, BN_TABLE_F16},
        .output = {s->separate_head ? random_halves(s->vocab_size * dim) : embeddings, BN_TABLE_F16},
        .output_norm = random_floats(dim, 1.0f, 0.5f),
        .layers = layers,
    };
}

static uint64_t mix(uint64_t digest, const void *data, int64_t size) { /* FNV-1a */
    const uint8_t *bytes = data;
    for (int64_t i = 0; i < size; i++) digest = (digest ^ bytes[i]) * 0x100000001b3u;
    return digest;
}

/* Values of one layer's tap in a pass; 0 when the engine does not record it. */
static int64_t tap_size(const bn_model *m, int32_t layer, int which, const bn_pass *p, int flash) {
    const int64_t dim = m->dim, q_dim = m->n_heads * m->head_dim, kv_dim = m->n_kv_heads * m->head_dim;
    const int64_t n_used = p->start + p->n_tokens;
    const int64_t rows = layer + 1 == m->n_layers ? p->n_outputs : p->n_tokens;
    const bn_layer *l = &m->layers[layer];
    switch (which) {
    case BN_TAP_ATTN_Q_NORM_IN:
    case BN_TAP_ATTN_K_NORM_IN:
    case BN_TAP_ATTN_V_NORM_IN:
        return l->attn_q_norm_in ? p->n_tokens * dim : 0;
    case BN_TAP_FFN_GATE_NORM_IN:
    case BN_TAP_FFN_UP_NORM_IN:
        return l->attn_q_norm_in ? rows * dim : 0;
    case BN_TAP_Q_NORM:
        return l->q_norm ? p->n_tokens * q_dim : 0;
    case BN_TAP_K_NORM:
        return l->k_norm ? p->n_tokens * kv_dim : 0;
    case BN_TAP_Q_SCALED:
        return m->query_scale > 0 ? p->n_tokens * q_dim : 0;
    case BN_TAP_ATTN_POST_NORM:
    case BN_TAP_FFN_POST_NORM:
        return l->attn_post_norm ? rows * dim : 0;
    case BN_TAP_Q:
    case BN_TAP_Q_ROPE:
    case BN_TAP_KQV_OUT:
        return p->n_tokens * q_dim;
    case BN_TAP_K:
    case BN_TAP_V:
    case BN_TAP_K_ROPE:
        return p->n_tokens * kv_dim;
    case BN_TAP_KQ:
    case BN_TAP_KQ_SOFT_MAX:
        return flash ? 0 : m->n_heads * p->n_tokens * n_used;
    case BN_TAP_ATTN_SUB_NORM:
        return l->attn_sub_norm ? p->n_tokens * q_dim : 0;
    case BN_TAP_FFN_GATE:
    case BN_TAP_FFN_UP:
    case BN_TAP_FFN_ACT:
    case BN_TAP_FFN_OUT:
        return rows * m->hidden_dim;
    case BN_TAP_FFN_SUB_NORM:
        return l->ffn_sub_norm ? rows * m->hidden_dim : 0;
    case BN_TAP_FFN_INP:
    case BN_TAP_FFN_NORM:
    case BN_TAP_FFN_DOWN:
    case BN_TAP_L_OUT:
        return rows * dim;
    default:
        return p->n_tokens * dim;
    }
}

void tap_sizes(const bn_model *m, const bn_pass *p, int flash, int64_t *sizes) {
    const int32_t n_layer_taps = m->n_layers * BN_LAYER_TAPS;
    for (int32_t i = 0; i < n_layer_taps; i++)
        sizes[i] = tap_size(m, i / BN_LAYER_TAPS, i % BN_LAYER_TAPS, p, flash);
    sizes[n_layer_taps + BN_TAP_INP_EMBD] = (int64_t)p->n_tokens * m->dim;
    sizes[n_layer_taps + BN_TAP_INP_SCALED] = m->embedding_scale > 1 ? (int64_t)p->n_tokens * m->dim : 0;
    sizes[n_layer_taps + BN_TAP_RESULT_NORM] = (int64_t)p->n_outputs * m->dim;
    sizes[n_layer_taps + BN_TAP_RESULT_OUTPUT] = p->logits ? (int64_t)p->n_outputs * m->vocab_size : 0;
    sizes[n_layer_taps + BN_TAP_POOLED] = p->pooled ? m->dim : 0;
}

static uint64_t digest_pass(bn_engine *engine, const bn_model *m, bn_pass *p, const variant *v, uint64_t digest) {
    const int keep = n_held;
    /* a pass may also make one vector, and of an odd number of tokens nothing else */
    const int pools = v->arithmetic.generation == BN_MAIN && v->n_outputs == ALL;
    const int64_t n_logits = pools && p->n_tokens % 2 ? 0 : (int64_t)p->n_outputs * m->vocab_size;
    int64_t sizes[2 * BN_LAYER_TAPS + BN_MODEL_TAPS];
    const int32_t n_layer_taps = m->n_layers * BN_LAYER_TAPS;
    p->logits = n_logits ? room(n_logits, sizeof(float), 1) : NULL;
    p->pooling = pools ? BN_POOL_MEAN + p->n_tokens / 2 % 3 : BN_POOL_NONE;
    p->pooled = pools ? room(m->dim, sizeof(float), 3) : NULL;
    tap_sizes(m, p, v->arithmetic.flash_attention, sizes);
    float **recorded = room(n_layer_taps + BN_MODEL_TAPS, sizeof *recorded, 0);
    for (int32_t i = 0; i < n_layer_taps + BN_MODEL_TAPS; i++)
        recorded[i] = sizes[i] ? room(sizes[i], sizeof(float), i % 4) : NULL;
    p->taps = v->record ? recorded : NULL;
    require(!bn_engine_forward(engine, p), "forward");
    if (pools) digest = mix(digest, p->pooled, m->dim * (int64_t)sizeof(float));
    if (n_logits) digest = mix(digest, p->logits, n_logits * (int64_t)sizeof(float));
    for (int32_t i = 0; v->record && i < n_layer_taps + BN_MODEL_TAPS; i++)
        if (recorded[i]) digest = mix(digest, recorded[i], sizes[i] * (int64_t)sizeof(float));
    release(keep);
    return digest;
}

/* One more token, of which only the largest logits are asked for, and then all of them after
 * all. */
static uint64_t digest_top(bn_engine *engine, const bn_model *m, const variant *v, int64_t capacity,
                           uint16_t *keys, uint16_t *values) {
    enum { N_BEST = 5 };
    const int keep = n_held;
    const int64_t vocab = m->vocab_size, half = vocab / 2;
    const bn_screen screen = {room(vocab * m->dim, 1, 3), room(vocab, sizeof(float), 1),
                              room(vocab, sizeof(float), 1), room(vocab, sizeof(float), 1)};
    require(!bn_engine_build_screen(engine, 0, half, &screen), "build_screen");
    require(!bn_engine_build_screen(engine, half, vocab - half, &screen), "build_screen");
    require(bn_engine_build_screen(engine, half, vocab, &screen) == BN_ERR_ARGUMENT, "rows outside the head");
    bn_top top = {&screen, N_BEST, room(N_BEST, sizeof(int32_t), 1), room(N_BEST, sizeof(float), 1), 0};
    int32_t token = 11;
    bn_pass pass = {.tokens = &token,
                    .n_tokens = 1,
                    .start = v->start + v->n_prompt + 5,
                    .n_outputs = 1,
                    .capacity = capacity,
                    .k_cache = keys,
                    .v_cache = values,
                    .top = &top};
    const int status = bn_engine_forward(engine, &pass);
    if (v->arithmetic.half_sums) { /* its logits are outside the search's bounds */
        require(status == BN_ERR_ARGUMENT, "a search with sums in binary16");
        release(keep);
        return 0;
    }
    require(!status, "forward with top");
    float *logits = room(vocab, sizeof *logits, 1);
    require(!bn_engine_last_logits(engine, 0, half, logits), "last_logits");
    require(!bn_engine_last_logits(engine, half, vocab - half, logits + half), "last_logits");
    for (int i = 0; i < N_BEST; i++) require(logits[top.ids[i]] == top.logits[i], "top and last_logits differ");
    uint64_t digest = mix(0xcbf29ce484222325u, top.ids, N_BEST * (int64_t)sizeof *top.ids);
    digest =
        mix(mix(digest, top.logits, N_BEST * (int64_t)sizeof(float)), logits, vocab * (int64_t)sizeof *logits);
    release(keep);
    return digest;
}

/* A prompt, two single tokens, three more at once, and one searched: everything that came out,
 * as one number. */
static uint64_t digest_run(const bn_model *m, const variant *v, const char *kernel, int n_threads,
                           int64_t bytes_per_thread) {
    const int keep = n_held, chunks[] = {v->n_prompt, 1, 1, 3};
    const int64_t kv_dim = m->n_kv_heads * m->head_dim, capacity = capacity_of(v, v->start + v->n_prompt + 6);
    const int64_t n_cells = m->n_layers * capacity * kv_dim;
    bn_options options = {v->arithmetic, n_threads, bytes_per_thread, kernel};
    bn_engine *engine;
    require(!bn_engine_create(m, &options, &engine), "create");
    require(!strcmp(bn_engine_kernel(engine), kernel), "another kernel than asked for");
    uint16_t *keys = room(n_cells, sizeof *keys, 1), *values = room(n_cells, sizeof *values, 3);
    memset(keys, 0, (size_t)n_cells * sizeof *keys);
    memset(values, 0, (size_t)n_cells * sizeof *values);
    uint64_t digest = 0xcbf29ce484222325u;
    for (int c = 0, start = v->start; c < 4; start += chunks[c++]) {
        const int n = chunks[c], keep_pass = n_held;
        int32_t *tokens = room(n, sizeof *tokens, 1);
        for (int i = 0; i < n; i++) tokens[i] = (7 * (start + i) + 3) % m->vocab_size;
        bn_pass pass = {.tokens = tokens,
                        .n_tokens = n,
                        .start = start,
                        .n_outputs = v->n_outputs == ALL ? n : v->n_outputs,
                        .capacity = capacity,
                        .k_cache = keys,
                        .v_cache = values};
        digest = digest_pass(engine, m, &pass, v, digest);
        release(keep_pass);
    }
    digest = mix(digest_top(engine, m, v, capacity, keys, values), &digest, sizeof digest);
    digest = mix(mix(digest, keys, n_cells * (int64_t)sizeof *keys), values, n_cells * (int64_t)sizeof *values);
    bn_engine_free(engine);
    release(keep);
    return digest;
}

/* Every family once, each with another of three ways to share the work, in turn: under a sanitizer threads
 * that wait for each other are what takes long. */
static void check_variant(const bn_model *m, const variant *v, int turn) {
    enum { LITTLE = 1, DECODE_ALONE = 1 << 16 }; /* with the latter, short passes leave threads asleep */
    static const struct {
        int n_threads, bytes_per_thread;
        const char *wrong;
    } ways[] = {{2, LITTLE, "two threads differ from scalar and one thread"},
                {3, LITTLE, "three threads differ from scalar and one thread"},
                {3, DECODE_ALONE, "some of three threads differ from one"}};
    const uint64_t expected = digest_run(m, v, "scalar", 1, LITTLE);
    for (int i = 0; i < bn_kernel_count(); i++) {
        const char *name, *description;
        int available;
        require(!bn_kernel_info(i, &name, &description, &available), "kernel_info");
        if (!available) continue;
        const int way = (turn + i) % 3;
        require(digest_run(m, v, name, ways[way].n_threads, ways[way].bytes_per_thread) == expected,
                ways[way].wrong);
    }
}

/* The logits of a prompt of 5 tokens and of one more, [2][vocab_size]. */
static float *two_logits(const bn_model *m, const char *kernel, int n_threads) {
    enum { N_PROMPT = 5, CAPACITY = 32 };
    float *logits = room(2 * m->vocab_size, sizeof *logits, 1);
    const int keep = n_held;
    const int64_t n_cells = (int64_t)m->n_layers * CAPACITY * m->n_kv_heads * m->head_dim;
    uint16_t *keys = room(n_cells, sizeof *keys, 1), *values = room(n_cells, sizeof *values, 3);
    memset(keys, 0, (size_t)n_cells * sizeof *keys);
    memset(values, 0, (size_t)n_cells * sizeof *values);
    bn_options options = {{BN_MARCH, .simd_width = 8, .attention_threads = 1}, n_threads, 1, kernel};
    bn_engine *engine;
    require(!bn_engine_create(m, &options, &engine), "create");
    const int32_t tokens[N_PROMPT + 1] = {3, 30, 17, 9, 22, 5};
    bn_pass pass = {.tokens = tokens,
                    .n_tokens = N_PROMPT,
                    .n_outputs = 1,
                    .capacity = CAPACITY,
                    .k_cache = keys,
                    .v_cache = values,
                    .logits = logits};
    require(!bn_engine_forward(engine, &pass), "forward");
    pass.tokens += N_PROMPT;
    pass.start = N_PROMPT;
    pass.n_tokens = 1;
    pass.logits += m->vocab_size;
    require(!bn_engine_forward(engine, &pass), "forward");
    bn_engine_free(engine);
    release(keep);
    return logits;
}

/* The matrix with the rows of every KV head repeated for each query head that reads it. */
static bn_matrix repeat_heads(const bn_matrix *m, int head_dim, int group) {
    const int64_t of_head = head_dim * m->cols / 4, n_heads = m->rows / head_dim;
    uint8_t *data = room(group * m->rows * m->cols / 4, 1, 5);
    for (int64_t h = 0; h < n_heads * group; h++)
        memcpy(data + h * of_head, m->data + h / group * of_head, (size_t)of_head);
    return (bn_matrix){data, group * m->rows, m->cols, m->scale, m->factor, m->bias};
}

/* Heads that share keys and values against the same heads with copies of their own. */
static void check_shared_heads(void) {
    static const shape shapes[] = {{1, 16, 2, 8, 128, 128, 37, 1, BN_RELU_SQUARED, BN_ROPE_HALVES, 0},
                                   {1, 12, 4, 32, 384, 128, 37, 0, BN_RELU_SQUARED, BN_ROPE_HALVES, 0},
                                   {1, 8, 1, 16, 128, 128, 37, 0, BN_RELU_SQUARED, BN_ROPE_HALVES, 0}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const bn_model shared = random_model(&shapes[s]);
        const int group = shared.n_heads / shared.n_kv_heads;
        bn_layer layer = shared.layers[0];
        layer.k = repeat_heads(&layer.k, shared.head_dim, group);
        layer.v = repeat_heads(&layer.v, shared.head_dim, group);
        bn_model alone = shared;
        alone.n_kv_heads = shared.n_heads;
        alone.layers = &layer;
        const float *expected = two_logits(&alone, "scalar", 1);
        for (int i = 0; i < bn_kernel_count(); i++) {
            const char *name, *description;
            int available;
            require(!bn_kernel_info(i, &name, &description, &available), "kernel_info");
            for (int n_threads = 1; available && n_threads <= 3; n_threads++)
                require(!memcmp(two_logits(&shared, name, n_threads), expected,
                                2 * (size_t)shared.vocab_size * sizeof *expected),
                        "heads that share keys differ from heads with keys of their own");
        }
        release(0);
    }
}

void check_engines(void) {
    static const variant variants[] = {
        {{BN_MARCH, 8, 1, .attention_threads = 1}, 1, ALL, 1},
        {{BN_MARCH, 16, 0, .attention_threads = 1}, 2, ALL, 1},
        {{BN_MARCH, 8, 0, .attention_threads = 1}, 5, 0, 0},
        {{BN_MARCH, 16, 1, .attention_threads = 1}, 5, 1, 0},
        {{BN_MARCH, 8, 1, .attention_threads = 1}, 33, ALL, 1},
        {{BN_MARCH, 16, 1, .attention_threads = 1}, 33, 1, 1},
        {{BN_MAIN, 8, .attention_threads = 1}, 5, ALL, 1},
        {{BN_MAIN, 16, .half_sums = 1, .attention_threads = 1, .follow_reference = 1}, 3, 1, 1},
        {{BN_MAIN, 8, .flash_attention = 1, .attention_threads = 2, .follow_reference = 1}, 5, 1, 0},
        /* its mean: one whole step, and one token more */
        {{BN_MAIN, 16, .flash_attention = 1, .attention_threads = 3}, 65, ALL, 1},
        {{BN_MAIN, 16, .half_sums = 1, .flash_attention = 1, .attention_threads = 3}, 1, 1, 0, 255},
    };
    for (size_t s = 0; s < sizeof SHAPES / sizeof *SHAPES; s++) {
        const bn_model model = random_model(&SHAPES[s]);
        for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
            /* the longest prompt on the smallest model: it takes seconds under a sanitizer */
            if (variants[v].n_prompt > 33 && SHAPES[s].n_heads > 1) continue;
            check_variant(&model, &variants[v], (int)(s + v));
        }
        release(0);
    }
    check_shared_heads();
}

/* What is refused must not leak or touch anything. */
void check_refusals(void) {
    bn_model model = random_model(&SHAPES[0]);
    bn_options options = {{BN_MARCH, 8, 1, .attention_threads = 1}, 2, 1, "no such kernel"};
    bn_engine *engine;
    require(bn_engine_create(&model, &options, &engine) == BN_ERR_UNAVAILABLE && !engine, "unknown kernel");
    options.kernel = NULL;
    model.head_dim++;
    require(bn_engine_create(&model, &options, &engine) == BN_ERR_ARGUMENT && !engine, "wrong shape");
    model.head_dim--;
    model.activation = BN_ACTIVATIONS;
    require(bn_engine_create(&model, &options, &engine) == BN_ERR_ARGUMENT && !engine, "unknown activation");
    model.activation = BN_RELU_SQUARED;
    model.rope_pairing = -1;
    require(bn_engine_create(&model, &options, &engine) == BN_ERR_ARGUMENT && !engine, "unknown RoPE pairing");
    model.rope_pairing = BN_ROPE_HALVES;
    require(!bn_engine_create(&model, &options, &engine), "create");
    const int32_t token = model.vocab_size;
    uint16_t cell = 0;
    bn_pass pass = {.tokens = &token, .n_tokens = 1, .capacity = 32, .k_cache = &cell, .v_cache = &cell};
    require(bn_engine_forward(engine, &pass) == BN_ERR_ARGUMENT, "token outside the vocabulary");
    pass.start = 32;
    require(bn_engine_forward(engine, &pass) == BN_ERR_ARGUMENT, "pass outside the cache");
    bn_counter counters[2];
    int count;
    require(!bn_engine_counters(engine, counters, 2, &count) && count > 2, "counters");
    bn_engine_free(engine);
    bn_engine_free(NULL);
    const uint16_t half = 0;
    const float one = 1.0f;
    float dot;
    for (int i = 0; i < bn_kernel_count(); i++) {
        const char *name, *description;
        int available;
        require(!bn_kernel_info(i, &name, &description, &available), "kernel_info");
        if (available)
            require(bn_kernel_dots(name, 8, 0, &half, 0, 1, &one, 0, 1, 0, &dot, 1) == BN_ERR_ARGUMENT,
                    "empty dots");
    }
    release(0);
}
