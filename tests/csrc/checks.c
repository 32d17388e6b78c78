/* Exercises the C library without Python: every kernel family beside the scalar one, and whole passes of small
 * engines. All buffers end where their data end and start unaligned, so that AddressSanitizer and valgrind see
 * what is read beside or before it was written, and ThreadSanitizer what two threads touch without a barrier
 * between them; tests/checked_library.py builds and runs it under each. Exits 1 at the first difference. */
#include "bitnet.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void require(int ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "checks: %s: %s\n", what, bn_last_error());
    exit(1);
}

/* ---- memory and numbers --------------------------------------------------------------------------------- */

static void *held[512];
static int n_held;

/* Room for exactly n items, `skew` items away from malloc's alignment; lives until release(). */
static void *room(int64_t n, size_t item, int skew) {
    require(n_held < (int)(sizeof held / sizeof *held), "more buffers than expected");
    char *p = malloc((size_t)(n + skew) * item);
    require(p != NULL, "out of memory");
    held[n_held++] = p;
    return p + (size_t)skew * item;
}

static void release(int keep) {
    while (n_held > keep) free(held[--n_held]);
}

static uint64_t state;

static uint32_t random_bits(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 0x2545f4914f6cdd1du) >> 32);
}

static int between(int low, int high) { return low + (int)(random_bits() % (uint32_t)(high - low + 1)); }

static float *random_floats(int64_t n, float centre, float spread) {
    float *x = room(n, sizeof *x, between(0, 3));
    for (int64_t i = 0; i < n; i++) x[i] = centre + spread * ((float)random_bits() / 2147483648.0f - 1.0f);
    return x;
}

static uint16_t *random_halves(int64_t n) {
    uint16_t *x = room(n, sizeof *x, between(0, 7));
    for (int64_t i = 0; i < n; i++) /* either sign, 2^-6 to 2 */
        x[i] = (uint16_t)((random_bits() & 0x83ffu) | (uint32_t)between(9, 15) << 10);
    return x;
}

static uint8_t *random_codes(int64_t n_bytes) {
    uint8_t *w = room(n_bytes, 1, between(0, 15));
    for (int64_t i = 0; i < n_bytes; i++)
        w[i] = (uint8_t)(between(0, 2) << 6 | between(0, 2) << 4 | between(0, 2) << 2 | between(0, 2));
    return w;
}

/* ---- kernels -------------------------------------------------------------------------------------------- */

static void check_i2s_dot(const char *kernel) {
    static const int blocks[] = {1, 2, 3, 5, 16, 17, 20, 33}, rows[] = {1, 3, 4, 6, 7, 9, 19, 35};
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 8; j++) {
            const int k = 128 * blocks[i], n_rows = rows[j], n_cols = between(1, blocks[i] < 16 ? 70 : 20);
            const uint8_t *w = random_codes((int64_t)n_rows * k / 4);
            int8_t *x = room((int64_t)n_cols * k, 1, between(0, 15));
            for (int64_t e = 0; e < (int64_t)n_cols * k; e++) x[e] = (int8_t)random_bits();
            const int64_t n = (int64_t)n_rows * n_cols;
            int32_t *got = room(n, sizeof *got, 1), *expected = room(n, sizeof *expected, 0);
            require(!bn_kernel_i2s_dot(kernel, w, k, n_rows, x, n_cols, got), "i2s_dot");
            require(!bn_kernel_i2s_dot("scalar", w, k, n_rows, x, n_cols, expected), "i2s_dot");
            require(!memcmp(got, expected, (size_t)n * sizeof *got), "i2s_dot differs from scalar");
            release(0);
        }
    }
}

static void check_dots(const char *kernel) {
    static const int lengths[] = {1, 7, 16, 31, 32, 33, 48, 63, 64, 65, 100, 128, 144, 300, 1111, 2112};
    for (int i = 0; i < 16; i++) {
        for (int n_rows = 1; n_rows < 10; n_rows++) {
            for (int width = 8; width <= 16; width += 8) {
                for (int shape = 0; shape < (lengths[i] % width ? 1 : 2); shape++) {
                    const int n = lengths[i], n_cols = between(1, 9), lda = n + between(0, 5);
                    const int ldb = n + between(0, 5);
                    const uint16_t *a = random_halves((int64_t)(n_rows - 1) * lda + n);
                    const float *b = random_floats((int64_t)(n_cols - 1) * ldb + n, 0.0f, 1.0f);
                    const int64_t size = (int64_t)n_cols * n_rows;
                    float *got = room(size, sizeof *got, 1), *expected = room(size, sizeof *expected, 0);
                    require(!bn_kernel_dots(kernel, width, shape, a, lda, n_rows, b, ldb, n_cols, n, got, n_rows),
                            "dots");
                    require(!bn_kernel_dots("scalar", width, shape, a, lda, n_rows, b, ldb, n_cols, n, expected,
                                            n_rows),
                            "dots");
                    require(!memcmp(got, expected, (size_t)size * sizeof *got), "dots differ from scalar");
                    release(0);
                }
            }
        }
    }
}

static void check_quantize(const char *kernel) {
    for (int n = 1; n < 140; n++) {
        for (int fused = 0; fused < 2; fused++) {
            const float *x = random_floats(n, 0.0f, n % 7 ? 3.0f : 0.0f);
            int8_t *got = room(n, 1, n % 16), *expected = room(n, 1, 0);
            float scales[2];
            int32_t sums[2];
            require(!bn_kernel_quantize(kernel, x, n, fused, got, &scales[0], &sums[0]), "quantize");
            require(!bn_kernel_quantize("scalar", x, n, fused, expected, &scales[1], &sums[1]), "quantize");
            require(!memcmp(got, expected, (size_t)n) && scales[0] == scales[1] && sums[0] == sums[1],
                    "quantize differs from scalar");
            release(0);
        }
    }
}

static void check_softmax(const char *kernel) {
    for (int n = 1; n < 100; n++) {
        for (int width = 8; width <= 16; width += 8) {
            const int padded = (n + 31) / 32 * 32 + 32 * between(0, 1);
            const float *scores = random_floats(n, 0.0f, n % 5 ? 10.0f : 1000.0f);
            float *got = room(padded, sizeof *got, n % 4), *expected = room(padded, sizeof *expected, 0);
            memcpy(got, scores, (size_t)n * sizeof *got);
            memcpy(expected, scores, (size_t)n * sizeof *expected);
            require(!bn_kernel_softmax(kernel, width, got, n, padded, 0.125f), "softmax");
            require(!bn_kernel_softmax("scalar", width, expected, n, padded, 0.125f), "softmax");
            require(!memcmp(got, expected, (size_t)padded * sizeof *got), "softmax differs from scalar");
            release(0);
        }
    }
}

static void check_elementwise(const char *kernel) {
    for (int n = 1; n < 70; n++) {
        const float *x = random_floats(2 * n, 0.0f, 70000.0f), *c = random_floats(n, 0.0f, 1.0f);
        const float *s = random_floats(n, 0.0f, 1.0f);
        const uint16_t *halves = random_halves(n);
        float *got = room(2 * n, sizeof *got, 1), *expected = room(2 * n, sizeof *expected, 0);
        uint16_t *got_halves = room(n, sizeof *got_halves, 1), *expected_halves = room(n, sizeof *got_halves, 0);
        require(!bn_kernel_rope(kernel, x, c, s, n, got), "rope");
        require(!bn_kernel_rope("scalar", x, c, s, n, expected), "rope");
        require(!memcmp(got, expected, 2 * (size_t)n * sizeof *got), "rope differs from scalar");
        require(!bn_kernel_to_f16(kernel, x, n, got_halves), "to_f16");
        require(!bn_kernel_to_f16("scalar", x, n, expected_halves), "to_f16");
        require(!memcmp(got_halves, expected_halves, (size_t)n * sizeof *halves), "to_f16 differs from scalar");
        require(!bn_kernel_from_f16(kernel, halves, n, got + n), "from_f16");
        require(!bn_kernel_from_f16("scalar", halves, n, expected + n), "from_f16");
        require(!memcmp(got + n, expected + n, (size_t)n * sizeof *got), "from_f16 differs from scalar");
        release(0);
    }
    for (int n = 1; n < 40; n++) {
        const float *gate = random_floats(n, 0.0f, 3.0f), *up = random_floats(n, 0.0f, 3.0f);
        float *got = room(n, sizeof *got, 1), *more = room(n, sizeof *got, 2);
        float *expected = room(n, sizeof *got, 0), *expected_more = room(n, sizeof *got, 3);
        int32_t *acc = room(n, sizeof *acc, 1);
        for (int i = 0; i < n; i++) acc[i] = between(-100000, 100000);
        require(!bn_kernel_gated_relu_squared(kernel, gate, up, n, got, more), "gated_relu_squared");
        require(!bn_kernel_gated_relu_squared("scalar", gate, up, n, expected, expected_more),
                "gated_relu_squared");
        require(!memcmp(got, expected, (size_t)n * sizeof *got) &&
                    !memcmp(more, expected_more, (size_t)n * sizeof *got),
                "gated_relu_squared differs from scalar");
        require(!bn_kernel_rescale(kernel, acc, n, 7.0f, 3.5f, 0.3f, got), "rescale");
        require(!bn_kernel_rescale("scalar", acc, n, 7.0f, 3.5f, 0.3f, expected), "rescale");
        require(!memcmp(got, expected, (size_t)n * sizeof *got), "rescale differs from scalar");
        release(0);
    }
}

static void check_screen(const char *kernel) {
    for (int n_rows = 1; n_rows < 40; n_rows += between(1, 4)) {
        const int n = 32 * between(1, 9), n_best = between(1, n_rows);
        const uint16_t *rows = random_halves((int64_t)n_rows * n);
        const float *y = random_floats(n, 0.0f, 2.0f);
        int8_t *codes[2];
        float *numbers[2][3];
        for (int side = 0; side < 2; side++) {
            codes[side] = room((int64_t)n_rows * n, 1, side * 5);
            for (int i = 0; i < 3; i++) numbers[side][i] = room(n_rows, sizeof(float), side);
            for (int r = 0; r < n_rows; r++)
                require(!bn_kernel_screen_row(side ? kernel : "scalar", rows + r * n, n, codes[side] + r * n,
                                              &numbers[side][0][r], &numbers[side][1][r], &numbers[side][2][r]),
                        "screen_row");
        }
        require(!memcmp(codes[0], codes[1], (size_t)n_rows * (size_t)n), "screen_row differs from scalar");
        for (int i = 0; i < 3; i++)
            require(!memcmp(numbers[0][i], numbers[1][i], (size_t)n_rows * sizeof(float)),
                    "screen_row's bounds differ from scalar");
        int16_t *z = room(n, sizeof *z, 1);
        for (int i = 0; i < n; i++) z[i] = (int16_t)between(-6000, 6000);
        int32_t *got = room(n_rows, sizeof *got, 1), *expected = room(n_rows, sizeof *got, 0);
        require(!bn_kernel_screen_dots(kernel, codes[1], n_rows, z, n, got), "screen_dots");
        require(!bn_kernel_screen_dots("scalar", codes[1], n_rows, z, n, expected), "screen_dots");
        require(!memcmp(got, expected, (size_t)n_rows * sizeof *got), "screen_dots differs from scalar");

        const bn_screen screen = {codes[1], numbers[1][0], numbers[1][1], numbers[1][2]};
        bn_top top = {&screen, n_best, room(n_best, sizeof(int32_t), 1), room(n_best, sizeof(float), 1), 0};
        float *logits = room(n_rows, sizeof *logits, 1);
        require(!bn_kernel_top(kernel, 8, rows, n_rows, n, y, &top), "top");
        require(!bn_kernel_dots("scalar", 8, 0, rows, n, n_rows, y, n, 1, n, logits, n_rows), "dots");
        for (int i = 0; i < n_best; i++) {
            int larger = 0;
            for (int r = 0; r < n_rows; r++)
                larger += logits[r] > top.logits[i] || (logits[r] == top.logits[i] && r < top.ids[i]);
            require(larger == i && logits[top.ids[i]] == top.logits[i], "top is not that of all rows");
        }
        release(0);
    }
}

/* ---- engines -------------------------------------------------------------------------------------------- */

typedef struct {
    int n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, sub_norms;
} shape;

static const shape SHAPES[] = {
    {2, 4, 2, 32, 384, 61, 1},  /* rows of one and of three blocks */
    {1, 1, 1, 128, 128, 37, 0}, /* a single head, whose scores are a tiled product; no sub-norms */
};

enum { ALL = -1 }; /* for n_outputs */

/* Numerics, prompt and what is recorded: the results must not depend on anything else. */
typedef struct {
    int simd_width, fused_quantizer, n_prompt, n_outputs, record;
} variant;

static bn_matrix random_matrix(int64_t rows, int64_t cols) {
    return (bn_matrix){random_codes(rows * cols / 4), rows, cols, 0.05f};
}

static bn_model random_model(const shape *s) {
    const int64_t dim = s->n_heads * s->head_dim, kv_dim = s->n_kv_heads * s->head_dim, hidden = s->hidden_dim;
    bn_layer *layers = room(s->n_layers, sizeof *layers, 0);
    for (int i = 0; i < s->n_layers; i++) {
        layers[i] = (bn_layer){
            .attn_norm = random_floats(dim, 1.0f, 0.5f),
            .attn_sub_norm = s->sub_norms ? random_floats(dim, 1.0f, 0.5f) : NULL,
            .ffn_norm = random_floats(dim, 1.0f, 0.5f),
            .ffn_sub_norm = s->sub_norms ? random_floats(hidden, 1.0f, 0.5f) : NULL,
            .q = random_matrix(dim, dim),
            .k = random_matrix(kv_dim, dim),
            .v = random_matrix(kv_dim, dim),
            .o = random_matrix(dim, dim),
            .gate = random_matrix(hidden, dim),
            .up = random_matrix(hidden, dim),
            .down = random_matrix(dim, hidden),
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
        .rms_eps = 1e-5f,
        .rope_base = 10000.0f,
        .token_embd = embeddings,
        .output = embeddings,
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
static int64_t tap_size(const bn_model *m, int32_t layer, int which, const bn_pass *p) {
    const int64_t dim = m->dim, kv_dim = m->n_kv_heads * m->head_dim, n_used = p->start + p->n_tokens;
    const int64_t rows = layer + 1 == m->n_layers ? p->n_outputs : p->n_tokens;
    switch (which) {
    case BN_TAP_K:
    case BN_TAP_V:
    case BN_TAP_K_ROPE:
        return p->n_tokens * kv_dim;
    case BN_TAP_KQ:
    case BN_TAP_KQ_SOFT_MAX:
        return m->n_heads * p->n_tokens * n_used;
    case BN_TAP_ATTN_SUB_NORM:
        return m->layers[layer].attn_sub_norm ? p->n_tokens * dim : 0;
    case BN_TAP_FFN_GATE:
    case BN_TAP_FFN_UP:
    case BN_TAP_FFN_ACT:
    case BN_TAP_FFN_OUT:
        return rows * m->hidden_dim;
    case BN_TAP_FFN_SUB_NORM:
        return m->layers[layer].ffn_sub_norm ? rows * m->hidden_dim : 0;
    case BN_TAP_FFN_INP:
    case BN_TAP_FFN_NORM:
    case BN_TAP_FFN_DOWN:
    case BN_TAP_L_OUT:
        return rows * dim;
    default:
        return p->n_tokens * dim;
    }
}

static uint64_t digest_pass(bn_engine *engine, const bn_model *m, bn_pass *p, int record, uint64_t digest) {
    const int keep = n_held;
    const int64_t n_logits = (int64_t)p->n_outputs * m->vocab_size;
    int64_t sizes[2 * BN_LAYER_TAPS + BN_MODEL_TAPS];
    const int32_t n_layer_taps = m->n_layers * BN_LAYER_TAPS;
    float **recorded = room(n_layer_taps + BN_MODEL_TAPS, sizeof *recorded, 0);
    for (int32_t i = 0; i < n_layer_taps; i++) sizes[i] = tap_size(m, i / BN_LAYER_TAPS, i % BN_LAYER_TAPS, p);
    sizes[n_layer_taps + BN_TAP_INP_EMBD] = (int64_t)p->n_tokens * m->dim;
    sizes[n_layer_taps + BN_TAP_RESULT_NORM] = (int64_t)p->n_outputs * m->dim;
    sizes[n_layer_taps + BN_TAP_RESULT_OUTPUT] = n_logits;
    for (int32_t i = 0; i < n_layer_taps + BN_MODEL_TAPS; i++)
        recorded[i] = sizes[i] ? room(sizes[i], sizeof(float), i % 4) : NULL;
    p->taps = record ? recorded : NULL;
    p->logits = n_logits ? room(n_logits, sizeof(float), 1) : NULL;
    require(!bn_engine_forward(engine, p), "forward");
    if (n_logits) digest = mix(digest, p->logits, n_logits * (int64_t)sizeof(float));
    for (int32_t i = 0; record && i < n_layer_taps + BN_MODEL_TAPS; i++)
        if (recorded[i]) digest = mix(digest, recorded[i], sizes[i] * (int64_t)sizeof(float));
    release(keep);
    return digest;
}

/* One more token, of which only the largest logits are asked for, and then all of them after all. */
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
                    .start = v->n_prompt + 5,
                    .n_outputs = 1,
                    .capacity = capacity,
                    .k_cache = keys,
                    .v_cache = values,
                    .top = &top};
    require(!bn_engine_forward(engine, &pass), "forward with top");
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

/* A prompt, two single tokens, three more at once, and one searched: everything that came out, as one number. */
static uint64_t digest_run(const bn_model *m, const variant *v, const char *kernel, int n_threads,
                           int64_t bytes_per_thread) {
    const int keep = n_held, chunks[] = {v->n_prompt, 1, 1, 3};
    const int64_t kv_dim = m->n_kv_heads * m->head_dim, capacity = (v->n_prompt + 6 + 31) / 32 * 32;
    const int64_t n_cells = m->n_layers * capacity * kv_dim;
    bn_options options = {v->simd_width, v->fused_quantizer, n_threads, bytes_per_thread, kernel};
    bn_engine *engine;
    require(!bn_engine_create(m, &options, &engine), "create");
    require(!strcmp(bn_engine_kernel(engine), kernel), "another kernel than asked for");
    uint16_t *keys = room(n_cells, sizeof *keys, 1), *values = room(n_cells, sizeof *values, 3);
    memset(keys, 0, (size_t)n_cells * sizeof *keys);
    memset(values, 0, (size_t)n_cells * sizeof *values);
    uint64_t digest = 0xcbf29ce484222325u;
    for (int c = 0, start = 0; c < 4; start += chunks[c++]) {
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
        digest = digest_pass(engine, m, &pass, v->record, digest);
        release(keep_pass);
    }
    digest = mix(digest_top(engine, m, v, capacity, keys, values), &digest, sizeof digest);
    digest = mix(mix(digest, keys, n_cells * (int64_t)sizeof *keys), values, n_cells * (int64_t)sizeof *values);
    bn_engine_free(engine);
    release(keep);
    return digest;
}

static void check_variant(const bn_model *m, const variant *v) {
    const int64_t little = 1, decode_alone = 1 << 16; /* with the latter, short passes leave members asleep */
    const uint64_t expected = digest_run(m, v, "scalar", 1, little);
    for (int i = 0; i < bn_kernel_count(); i++) {
        const char *name, *description;
        int available;
        require(!bn_kernel_info(i, &name, &description, &available), "kernel_info");
        if (!available) continue;
        require(digest_run(m, v, name, 2, little) == expected, "two threads differ from scalar and one thread");
        require(digest_run(m, v, name, 3, decode_alone) == expected, "some of three threads differ from one");
    }
}

static void check_engines(void) {
    static const variant variants[] = {
        {8, 1, 1, ALL, 1}, {16, 0, 2, ALL, 1}, {8, 0, 5, 0, 0},
        {16, 1, 5, 1, 0},  {8, 1, 33, ALL, 1}, {16, 1, 33, 1, 1},
    };
    for (size_t s = 0; s < sizeof SHAPES / sizeof *SHAPES; s++) {
        const bn_model model = random_model(&SHAPES[s]);
        for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) check_variant(&model, &variants[v]);
        release(0);
    }
}

/* What is refused must not leak or touch anything. */
static void check_refusals(void) {
    bn_model model = random_model(&SHAPES[0]);
    bn_options options = {8, 1, 2, 1, "no such kernel"};
    bn_engine *engine;
    require(bn_engine_create(&model, &options, &engine) == BN_ERR_UNAVAILABLE && !engine, "unknown kernel");
    options.kernel = NULL;
    model.head_dim++;
    require(bn_engine_create(&model, &options, &engine) == BN_ERR_ARGUMENT && !engine, "wrong shape");
    model.head_dim--;
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
    release(0);
}

int main(void) {
    state = 0x9e3779b97f4a7c15u;
    int n_families = 0;
    for (int i = 0; i < bn_kernel_count(); i++) {
        const char *name, *description;
        int available;
        require(!bn_kernel_info(i, &name, &description, &available), "kernel_info");
        if (!available) continue;
        check_i2s_dot(name);
        check_dots(name);
        check_quantize(name);
        check_softmax(name);
        check_elementwise(name);
        check_screen(name);
        printf("%s%s", n_families++ ? ", " : "kernels ", name);
    }
    check_engines();
    check_refusals();
    printf(": all checks passed\n");
    return 0;
}
