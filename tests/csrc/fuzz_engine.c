/* libFuzzer on the engine (`make fuzz TARGET=engine`, docs/reliability.md): a model, an arithmetic and a few
 * passes made of the input's bytes, run by one kernel family and some threads, and again by the scalar one with
 * one thread. Under AddressSanitizer and UndefinedBehaviorSanitizer, in buffers that end where their data end; and
 * the bits have to be the same.
 *
 * The first N_KNOBS bytes choose shapes, types and passes, all within what bitnet_py's loader lets through, but
 * for one in 16 inputs, which gets one number of the options, the model or the pass that no caller should give.
 * The bytes after them seed the values. */
#include "checks.h"
#include "tables.h"

#include <math.h>
#include <string.h>

enum { N_KNOBS = 48, MAX_LAYERS = 2, MAX_TOKENS = 18, N_PASSES = 2, N_BEST = 5 };

static const uint8_t *knobs;
static int n_knobs, next_knob;
static uint64_t content;

/* 0 to n - 1 */
static int knob(int n) { return next_knob < n_knobs ? knobs[next_knob++] % n : 0; }

static uint32_t bits(void) { /* xorshift64* of the content */
    content ^= content >> 12;
    content ^= content << 25;
    content ^= content >> 27;
    return (uint32_t)((content * 0x2545f4914f6cdd1du) >> 32);
}

enum { ORDINARY, ZEROS, HUGE_ONES, SUBNORMAL, ANY, N_STYLES };
static int style;

/* A finite float, of any size that the style allows; positive if asked for. */
static float number(int positive) {
    const uint32_t b = bits();
    float x = ((float)(b >> 8) / 8388608.0f - 1.0f);
    if (style == ZEROS && !positive) x = b % 8 ? 0.0f : -0.0f;
    if (style == HUGE_ONES) x *= 1e38f;
    if (style == SUBNORMAL) x *= 1e-40f;
    if (style == ANY) {
        memcpy(&x, &b, sizeof x);
        if (!isfinite(x)) x = 1.0f;
    }
    return positive && !(x > 0) ? 0.75f : x;
}

static float *floats(int64_t n, int positive) {
    float *x = room(n, sizeof *x, knob(4));
    for (int64_t i = 0; i < n; i++) x[i] = number(positive);
    return x;
}

static const float *norm(int exists, int64_t n) { return exists ? floats(n, 0) : NULL; }

static bn_matrix matrix(int64_t rows, int64_t cols, int extras) {
    const int64_t n_bytes = rows * cols / 4;
    uint8_t *w = room(n_bytes, 1, 8 * knob(4));
    for (int64_t i = 0; i < n_bytes; i++)
        w[i] = (uint8_t)bits(); /* code 3 as well: it is found late, or not at all */
    return (bn_matrix){
        w, rows, cols, number(1), extras & 1 ? number(1) : 1.0f, extras & 2 ? floats(rows, 0) : NULL};
}

/* A type whose rows of this length are whole blocks. */
static int table_type(int64_t dim) {
    int type = knob(BN_TABLE_TYPES);
    while (dim % bn_table_formats[type].values) type = (type + 1) % BN_TABLE_TYPES;
    return type;
}

/* Rows of finite values, as the loader demands. */
static bn_table table(int64_t n_rows, int64_t dim) {
    const int type = table_type(dim);
    const int64_t n_bytes = bn_table_row_bytes(type, dim);
    uint8_t *rows = room(n_rows * n_bytes, 1, 8 * knob(4));
    const int keep = n_held;
    float *values = room(dim, sizeof *values, 0);
    for (int64_t r = 0; r < n_rows; r++) {
        uint8_t *row = rows + r * n_bytes;
        for (int64_t i = 0; i < n_bytes; i++) row[i] = (uint8_t)bits();
        if (type == BN_TABLE_F32)
            for (int64_t i = 0; i < dim; i++) {
                const float x = number(0);
                memcpy(row + 4 * i, &x, sizeof x);
            }
        require(!bn_table_values(type, row, dim, values), "values of a row");
        for (int64_t i = 0; i < dim; i++)
            if (!isfinite(values[i])) {
                memset(row, 0, (size_t)n_bytes);
                break;
            }
    }
    release(keep);
    return (bn_table){rows, type};
}

static bn_model model(void) {
    static const int head_dims[] = {2, 4, 8, 16, 32, 64, 128, 192, 256, 10, 6, 12};
    bn_model m = {.n_layers = 1 + knob(4) / 3, .head_dim = head_dims[knob(12)]};
    m.n_kv_heads = 1 + knob(4);
    m.n_heads = m.n_kv_heads * (1 + knob(4));
    while (m.n_heads * m.head_dim % 128) m.n_heads += m.n_kv_heads;
    if (m.n_heads * m.head_dim > 384) {
        m.n_heads = m.n_kv_heads = 1;
        m.head_dim = 128;
    }
    m.dim = 128 * (1 + knob(4) / 3);
    m.hidden_dim = 128 * (1 + knob(4) / 3);
    m.vocab_size = 1 + knob(40);
    m.activation = knob(BN_ACTIVATIONS);
    m.rope_pairing = knob(BN_ROPE_PAIRINGS);
    style = knob(N_STYLES);
    const int norms = knob(16), extras = knob(4), tied = knob(2);
    m.rms_eps = number(1);
    m.rope_base = style == ANY ? number(1) : 10000.0f;
    m.rope_scale = extras ? 0.25f : 1.0f;
    m.rope_factors = extras & 1 ? floats(m.head_dim / 2, 1) : NULL;
    m.embedding_scale = norms & 8 ? 11.5f : 1.0f;
    m.query_scale = norms & 8 ? 0.09f : 0.0f;
    const int64_t dim = m.dim, q_dim = m.n_heads * m.head_dim, kv_dim = m.n_kv_heads * m.head_dim;
    bn_layer *layers = room(m.n_layers, sizeof *layers, 0);
    for (int i = 0; i < m.n_layers; i++)
        layers[i] = (bn_layer){
            .attn_norm = floats(dim, 0),
            .attn_q_norm_in = norm(norms & 1, dim),
            .attn_k_norm_in = norm(norms & 1, dim),
            .attn_v_norm_in = norm(norms & 1, dim),
            .q_norm = norm(norms & 2, m.head_dim),
            .k_norm = norm(norms & 2, m.head_dim),
            .attn_sub_norm = norm(norms & 4, q_dim),
            .attn_post_norm = norm(norms & 8, dim),
            .ffn_norm = floats(dim, 0),
            .ffn_gate_norm_in = norm(norms & 1, dim),
            .ffn_up_norm_in = norm(norms & 1, dim),
            .ffn_sub_norm = norm(norms & 4, m.hidden_dim),
            .ffn_post_norm = norm(norms & 8, dim),
            .q = matrix(q_dim, dim, extras),
            .k = matrix(kv_dim, dim, extras),
            .v = matrix(kv_dim, dim, extras),
            .o = matrix(dim, q_dim, extras),
            .gate = matrix(m.hidden_dim, dim, extras & 1),
            .up = matrix(m.hidden_dim, dim, extras & 1),
            .down = matrix(dim, m.hidden_dim, extras & 1),
        };
    m.layers = layers;
    m.token_embd = table(m.vocab_size, dim);
    m.output = tied ? m.token_embd : table(m.vocab_size, dim);
    m.own_head = knob(2);
    m.output_norm = floats(dim, 0);
    return m;
}

static bn_arithmetic arithmetic(const bn_model *m) {
    bn_arithmetic a = {.generation = knob(BN_GENERATIONS), .simd_width = 8 + 8 * knob(2)};
    const int is_main = a.generation == BN_MAIN;
    a.block_quantizer =
        knob(2) && m->dim % 256 == 0 && m->hidden_dim % 256 == 0 && m->n_heads * m->head_dim % 256 == 0;
    a.fused_quantizer = knob(2) && (!is_main || a.block_quantizer);
    a.fused_sums = knob(2) && a.block_quantizer;
    a.bfloat_pairs = knob(2) && a.simd_width == 16;
    a.half_sums = knob(2) && is_main && a.simd_width == 16;
    a.flash_attention = knob(2) && is_main;
    a.follow_reference = knob(2) && is_main;
    a.attention_threads = 1 + knob(9);
    return a;
}

/* What one engine gave, as one number; any NaN counts as any other. */
static uint64_t mix(uint64_t digest, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t b;
        memcpy(&b, x + i, sizeof b);
        if (isnan(x[i])) b = 0x7fc00000u;
        digest = (digest ^ b) * 0x100000001b3u;
    }
    return digest;
}

typedef struct {
    int n_tokens[N_PASSES], outputs, record, pooling, top, start;
    int32_t tokens[MAX_TOKENS];
} script;

static uint64_t run(const bn_model *m, const bn_options *options, const script *s) {
    const int keep = n_held, is_main = options->arithmetic.generation == BN_MAIN;
    const int64_t kv_dim = m->n_kv_heads * m->head_dim, multiple = is_main ? 256 : 32;
    int64_t n_cells = s->start;
    for (int i = 0; i < N_PASSES; i++) n_cells += s->n_tokens[i];
    const int64_t capacity = (n_cells + multiple - 1) / multiple * multiple, n = m->n_layers * capacity * kv_dim;
    bn_engine *engine;
    if (bn_engine_create(m, options, &engine)) return 0;
    uint16_t *keys = room(n, sizeof *keys, 1), *values = room(n, sizeof *values, 3);
    memset(keys, 0, (size_t)n * sizeof *keys);
    memset(values, 0, (size_t)n * sizeof *values);
    uint64_t digest = 0xcbf29ce484222325u;
    for (int i = 0, start = s->start; i < N_PASSES; start += s->n_tokens[i++]) {
        const int keep_pass = n_held, n_tokens = s->n_tokens[i];
        int32_t *tokens = room(n_tokens, sizeof *tokens, 1);
        memcpy(tokens, s->tokens, (size_t)n_tokens * sizeof *tokens);
        bn_pass p = {.tokens = tokens,
                     .n_tokens = n_tokens,
                     .start = start,
                     .capacity = capacity,
                     .k_cache = keys,
                     .v_cache = values};
        p.n_outputs = s->outputs == 0 ? 0 : s->outputs == 1 ? 1 : n_tokens;
        const int searches = s->top && p.n_outputs == 1 && m->vocab_size >= N_BEST;
        if (s->pooling && is_main && p.n_outputs == n_tokens && !searches) {
            p.pooling = s->pooling;
            p.pooled = room(m->dim, sizeof(float), 3);
        }
        bn_screen screen;
        bn_top top = {&screen, N_BEST, NULL, NULL, 0};
        if (searches) {
            screen = (bn_screen){room((int64_t)m->vocab_size * m->dim, 1, 3), room(m->vocab_size, 4, 1),
                                 room(m->vocab_size, 4, 1), room(m->vocab_size, 4, 1)};
            if (bn_engine_build_screen(engine, 0, m->vocab_size, &screen)) break;
            top.ids = room(N_BEST, sizeof *top.ids, 1);
            top.logits = room(N_BEST, sizeof *top.logits, 1);
            p.top = &top;
        } else if (p.n_outputs) {
            p.logits = room((int64_t)p.n_outputs * m->vocab_size, sizeof(float), 1);
        }
        int64_t sizes[MAX_LAYERS * BN_LAYER_TAPS + BN_MODEL_TAPS];
        float *taps[MAX_LAYERS * BN_LAYER_TAPS + BN_MODEL_TAPS];
        const int n_taps = m->n_layers * BN_LAYER_TAPS + BN_MODEL_TAPS;
        tap_sizes(m, &p, options->arithmetic.flash_attention, sizes);
        for (int t = 0; t < n_taps; t++)
            taps[t] = s->record && sizes[t] ? room(sizes[t], sizeof(float), t % 4) : NULL;
        if (s->record) p.taps = taps;
        if (bn_engine_forward(engine, &p)) break;
        for (int t = 0; t < n_taps; t++)
            if (taps[t]) digest = mix(digest, taps[t], sizes[t]);
        if (p.logits) digest = mix(digest, p.logits, (int64_t)p.n_outputs * m->vocab_size);
        if (p.pooled) digest = mix(digest, p.pooled, m->dim);
        if (p.top) digest = mix(digest, top.logits, N_BEST);
        release(keep_pass);
    }
    bn_engine_free(engine);
    release(keep);
    return digest;
}

/* A number that no caller should give, where it is checked. */
static void spoil(bn_model *m, bn_options *options, script *s) {
    static const int32_t odd[] = {-1, INT32_MIN, INT32_MAX, 1 << 16, 0, 1, 2, 3, 63, 127, 129};
    int32_t *const places[] = {&m->token_embd.type,
                               &m->output.type,
                               &m->head_dim,
                               &m->n_heads,
                               &m->n_kv_heads,
                               &m->dim,
                               &m->hidden_dim,
                               &m->activation,
                               &m->rope_pairing,
                               &options->arithmetic.generation,
                               &options->arithmetic.simd_width,
                               &options->arithmetic.attention_threads,
                               &s->tokens[0]};
    const int place = knob(sizeof places / sizeof *places);
    *places[place] =
        odd[knob(place < 2 ? 4 : sizeof odd / sizeof *odd)]; /* of a known type, rows would be too few */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < N_KNOBS) return -1;
    knobs = data;
    n_knobs = N_KNOBS;
    next_knob = 0;
    content = 0x9e3779b97f4a7c15u;
    for (size_t i = N_KNOBS; i < size; i++) content = (content ^ data[i]) * 0x100000001b3u;
    content |= 1;
    script s = {.outputs = knob(3),
                .record = knob(2),
                .pooling = knob(4),
                .top = knob(2),
                .start = knob(4) ? 0 : knob(40)};
    s.n_tokens[0] = knob(4) ? 1 + knob(3) : 1 + knob(MAX_TOKENS);
    s.n_tokens[1] = 1 + knob(4) / 2;
    /* few inputs for what is slow: threads that wait for each other, and the emulated families, which come first
     */
    const int n_threads = knob(16) == 15 ? 2 + knob(2) : 1, is_spoilt = knob(16) == 15;
    const int which = knob(16), wanted = which < bn_kernel_count() ? which : which % 2 ? bn_kernel_count() - 1 : 2;
    const int bytes_per_thread = knob(2) ? 1 : 1 << 16;
    bn_model m = model();
    for (int i = 0; i < MAX_TOKENS; i++) s.tokens[i] = (int32_t)(bits() % (uint32_t)m.vocab_size);
    const bn_arithmetic a = arithmetic(&m);
    const char *name, *description;
    int available;
    require(!bn_kernel_info(wanted, &name, &description, &available), "kernel_info");
    bn_options theirs = {a, n_threads, bytes_per_thread, available ? name : "scalar"};
    if (is_spoilt) spoil(&m, &theirs, &s);
    bn_options ours = theirs;
    ours.n_threads = 1;
    ours.kernel = "scalar";
    const uint64_t expected = run(&m, &ours, &s);
    require(run(&m, &theirs, &s) == expected, "a kernel family differs from the scalar one");
    release(0);
    return 0;
}
