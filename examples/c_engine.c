/* A complete BitNet b1.58 engine in C99, with a trace for `crossval` (trace_writer.h). It reads a GGUF file with
   I2_S matrices, runs a prompt and a few greedy tokens through a KV cache, and records every tensor. It shares no
   code with bitnet_py, crossval or bitnet.cpp. --mistake breaks one layer on purpose.

       cc -std=c99 -O2 -o c_engine c_engine.c -lm
       ./c_engine model.gguf my-trace 1019,277,271,220,17,10,17,30 [--decode 4] [--mistake silu --layer 2]

   Mistakes: interleaved-rope, no-attn-sub-norm, silu, truncating-quantiser. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "trace_writer.h"

#define MAX_LAYERS 256
#define MAX_DIM 32768

static void die(const char *why, const char *what) {
    fprintf(stderr, "c_engine: %s%s%s\n", why, *what ? ": " : "", what);
    exit(4);
}

static void *get(size_t count, size_t size) {
    void *block = calloc(count + 1, size);
    if (!block) die("out of memory", "");
    return block;
}

/* ---- GGUF ---- */

static uint8_t *bytes; /* the whole file */
static size_t n_bytes, at;
static double settings[7]; /* by place in KEYS */
static const char *const KEYS[] = {"block_count",          "embedding_length",
                                   "attention.head_count", "attention.head_count_kv",
                                   "feed_forward_length",  "attention.layer_norm_rms_epsilon",
                                   "rope.freq_base"};
enum { N_LAYERS, DIM, N_HEADS, N_KV_HEADS, HIDDEN_DIM, EPS, ROPE_BASE, N_KEYS };
typedef struct {
    char name[64];
    uint64_t dims[4], offset;
    uint32_t type; /* 0: F32, 1: F16, 36: I2_S */
} tensor;
static tensor *tensors;
static uint64_t n_tensors;
static size_t data_start;

static const uint8_t *take(uint64_t n) {
    if (n > n_bytes - at) die("the file ends too early", "");
    at += n;
    return bytes + at - n;
}

static uint64_t number(int size) { /* little-endian, unsigned */
    const uint8_t *from = take(size);
    uint64_t value = 0;
    while (size--) value = value << 8 | from[size];
    return value;
}

static void text(char *out, size_t room) { /* cut to the room there is */
    uint64_t n = number(8);
    const uint8_t *from = take(n);
    if (n >= room) n = room - 1;
    memcpy(out, from, n);
    out[n] = 0;
}

static double value(uint32_t type, char *out, size_t room) { /* a number is returned, a text is put into out */
    static const int sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (type == 8) return text(out, room), 0;
    if (type == 9) {
        uint32_t of = (uint32_t)number(4);
        for (uint64_t n = number(8); n; n--) value(of, out, room);
        return 0;
    }
    if (type > 12) die("unknown type of a metadata value", "");
    uint64_t bits = number(sizes[type]);
    uint32_t low = (uint32_t)bits;
    float single;
    double wide;
    memcpy(&single, &low, 4);
    memcpy(&wide, &bits, 8);
    return type == 6 ? single : type == 12 ? wide : (double)bits;
}

static void read_file(const char *path) {
    char key[128], word[64], arch[64] = "";
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) die("cannot read", path);
    n_bytes = (size_t)ftell(file);
    rewind(file);
    bytes = get(n_bytes, 1);
    if (fread(bytes, 1, n_bytes, file) != n_bytes) die("cannot read", path);
    fclose(file);
    if (memcmp(take(8), "GGUF\3\0\0\0", 8)) die("not a GGUF file of version 3", path);
    n_tensors = number(8);
    uint64_t alignment = 32, n_values = number(8);
    for (uint64_t i = 0; i < n_values; i++) {
        text(key, sizeof key);
        double found = value((uint32_t)number(4), word, sizeof word);
        if (!strcmp(key, "general.architecture")) strcpy(arch, word);
        if (!strcmp(key, "general.alignment")) alignment = (uint64_t)found;
        size_t n = strlen(arch);
        for (int k = 0; k < N_KEYS; k++)
            if (!strncmp(key, arch, n) && key[n] == '.' && !strcmp(key + n + 1, KEYS[k])) settings[k] = found;
    }
    if (strcmp(arch, "bitnet-b1.58") && strcmp(arch, "bitnet-25")) die("not squared-ReLU BitNet", arch);
    if (n_tensors > n_bytes / 24) die("the file ends too early", "");
    tensors = get(n_tensors, sizeof *tensors);
    for (uint64_t i = 0; i < n_tensors; i++) {
        text(tensors[i].name, sizeof tensors[i].name);
        uint32_t n_dims = (uint32_t)number(4);
        if (n_dims > 4) die("more than four dimensions", tensors[i].name);
        for (int d = 0; d < 4; d++) tensors[i].dims[d] = d < (int)n_dims ? number(8) : 1;
        tensors[i].type = (uint32_t)number(4);
        tensors[i].offset = number(8);
    }
    data_start = (at + alignment - 1) / alignment * alignment;
}

static float half(const uint8_t *from) {
    int bits = from[0] | from[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return (float)(bits >> 15 ? -size : size);
}

typedef struct {
    size_t rows, cols;
    float *floats; /* of F32 and F16 */
    int8_t *codes; /* of I2_S: -1, 0, +1 */
    float scale;
} matrix;

static matrix load(int layer, const char *part, size_t rows, size_t cols) {
    char name[64];
    matrix m = {rows, cols, NULL, NULL, 1};
    if (layer < 0)
        snprintf(name, sizeof name, "%s.weight", part);
    else
        snprintf(name, sizeof name, "blk.%d.%s.weight", layer, part);
    uint64_t i = 0, n = (uint64_t)rows * cols;
    while (i < n_tensors && strcmp(tensors[i].name, name)) i++;
    if (i == n_tensors) die("no such tensor", name);
    if (tensors[i].dims[0] != cols || tensors[i].dims[1] != rows) die("unexpected shape", name);
    at = data_start + tensors[i].offset;
    if (at > n_bytes) die("the file ends too early", name);
    if (tensors[i].type == 36) {
        /* 128 weights of a row are 32 bytes; byte b holds weights b, b + 32, b + 64, b + 96, high bits first */
        if (cols % 128) die("rows that are no multiple of 128", name);
        const uint8_t *packed = take(n / 4);
        m.codes = get(n, 1);
        for (uint64_t w = 0; w < n; w++)
            m.codes[w] = (int8_t)((packed[w / 128 * 32 + w % 32] >> (6 - 2 * (w % 128 / 32)) & 3) - 1);
        memcpy(&m.scale, take(4), 4);
    } else if (tensors[i].type <= 1) {
        const uint8_t *from = take(n * (tensors[i].type ? 2 : 4));
        m.floats = get(n, sizeof(float));
        if (!tensors[i].type) memcpy(m.floats, from, n * sizeof(float));
        for (uint64_t w = 0; tensors[i].type && w < n; w++) m.floats[w] = half(from + 2 * w);
    } else {
        die("only F32, F16 and I2_S are read", name);
    }
    return m;
}

/* ---- the model ---- */

static int n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, vocab_size;
static float eps;
static double rope_base;
typedef struct {
    matrix attn_norm, q, k, v, attn_sub_norm, output, ffn_norm, gate, up, ffn_sub_norm, down;
    float *keys, *values; /* of all tokens so far */
} layer_state;
static layer_state layers[MAX_LAYERS];
static matrix embedding, output_norm;
static trace_writer trace;
static const char *mistake = "";
static int broken_layer;

static const char *const MISTAKES[] = {"interleaved-rope", "no-attn-sub-norm", "silu", "truncating-quantiser"};

static int wrong(int layer, const char *name) { return layer == broken_layer && !strcmp(mistake, name); }

static void load_model(size_t n_context) {
    for (int k = 0; k < N_KEYS; k++)
        if (!(settings[k] > 0) || settings[k] > (k == ROPE_BASE ? 1e12 : k == N_LAYERS ? MAX_LAYERS : MAX_DIM))
            die("missing or out of range in the file", KEYS[k]);
    n_layers = (int)settings[N_LAYERS], dim = (int)settings[DIM], hidden_dim = (int)settings[HIDDEN_DIM];
    n_heads = (int)settings[N_HEADS], n_kv_heads = (int)settings[N_KV_HEADS], head_dim = dim / n_heads;
    eps = (float)settings[EPS], rope_base = settings[ROPE_BASE];
    for (uint64_t i = 0; i < n_tensors; i++)
        if (!strcmp(tensors[i].name, "token_embd.weight")) vocab_size = (int)tensors[i].dims[1];
    embedding = load(-1, "token_embd", vocab_size, dim);
    output_norm = load(-1, "output_norm", 1, dim);
    size_t kv = (size_t)n_kv_heads * head_dim;
    for (int i = 0; i < n_layers; i++) {
        layer_state *l = layers + i;
        l->attn_norm = load(i, "attn_norm", 1, dim), l->attn_sub_norm = load(i, "attn_sub_norm", 1, dim);
        l->ffn_norm = load(i, "ffn_norm", 1, dim), l->ffn_sub_norm = load(i, "ffn_sub_norm", 1, hidden_dim);
        l->q = load(i, "attn_q", dim, dim), l->output = load(i, "attn_output", dim, dim);
        l->k = load(i, "attn_k", kv, dim), l->v = load(i, "attn_v", kv, dim);
        l->gate = load(i, "ffn_gate", hidden_dim, dim), l->up = load(i, "ffn_up", hidden_dim, dim);
        l->down = load(i, "ffn_down", dim, hidden_dim);
        l->keys = get(n_context * kv, sizeof(float)), l->values = get(n_context * kv, sizeof(float));
    }
}

/* ---- one pass; every function works on n rows ---- */

static void norm(float *out, const float *x, const matrix *weight, size_t n) {
    size_t width = weight->cols;
    for (size_t row = 0; row < n; row++, x += width, out += width) {
        double sum = 0;
        for (size_t i = 0; i < width; i++) sum += (double)x[i] * x[i];
        float factor = (float)(1 / sqrt(sum / width + eps));
        for (size_t i = 0; i < width; i++) out[i] = x[i] * factor * weight->floats[i];
    }
}

static void bit_linear(float *out, const float *x, const matrix *weight, size_t n, int truncates) {
    static int8_t codes[MAX_DIM];
    for (size_t row = 0; row < n; row++, x += weight->cols, out += weight->rows) {
        float largest = 1e-5f;
        for (size_t i = 0; i < weight->cols; i++) largest = fmaxf(largest, fabsf(x[i]));
        float scale = 127 / largest; /* the largest magnitude of a row becomes 127 */
        for (size_t i = 0; i < weight->cols; i++)
            codes[i] = (int8_t)(truncates ? truncf(x[i] * scale) : nearbyintf(x[i] * scale));
        for (size_t o = 0; o < weight->rows; o++) {
            const int8_t *w = weight->codes + o * weight->cols;
            int32_t sum = 0;
            for (size_t i = 0; i < weight->cols; i++) sum += w[i] * codes[i];
            out[o] = (float)sum / scale * weight->scale;
        }
    }
}

static void rope(float *x, int heads, size_t start, size_t n, int interleaved) {
    int pairs = head_dim / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
    for (size_t row = 0; row < n; row++)
        for (int head = 0; head < heads; head++, x += head_dim)
            for (int i = 0; i < pairs; i++) {
                double angle = (double)(start + row) * pow(rope_base, -2.0 * i / head_dim);
                float c = (float)cos(angle), s = (float)sin(angle), *a = x + i * step, *b = a + apart, old = *a;
                *a = old * c - *b * s;
                *b = old * s + *b * c;
            }
}

static void attention(int layer, float *out, const float *x, size_t start, size_t n) {
    layer_state *l = layers + layer;
    size_t kv = (size_t)n_kv_heads * head_dim, n_kv = start + n;
    float *normed = get(n * dim, sizeof(float)), *q = get(n * dim, sizeof(float)),
          *joined = get(n * dim, sizeof(float));
    float *k = l->keys + start * kv, *v = l->values + start * kv;
    float *scores = get(n_heads * n * n_kv, sizeof(float)), *weights = get(n_heads * n * n_kv, sizeof(float));
    int truncates = wrong(layer, "truncating-quantiser"), interleaved = wrong(layer, "interleaved-rope");
    norm(normed, x, &l->attn_norm, n);
    trace_tap(&trace, layer, "attn_norm", normed, n, dim, 0);
    bit_linear(q, normed, &l->q, n, truncates);
    bit_linear(k, normed, &l->k, n, truncates);
    bit_linear(v, normed, &l->v, n, truncates);
    trace_tap(&trace, layer, "q", q, n, n_heads, head_dim);
    trace_tap(&trace, layer, "k", k, n, n_kv_heads, head_dim);
    trace_tap(&trace, layer, "v", v, n, n_kv_heads, head_dim);
    rope(q, n_heads, start, n, interleaved);
    rope(k, n_kv_heads, start, n, interleaved);
    trace_tap(&trace, layer, "q_rope", q, n, n_heads, head_dim);
    trace_tap(&trace, layer, "k_rope", k, n, n_kv_heads, head_dim);
    for (int head = 0; head < n_heads; head++)
        for (size_t row = 0; row < n; row++) {
            size_t of = (size_t)(head / (n_heads / n_kv_heads)) * head_dim, seen = start + row + 1;
            float *score = scores + (head * n + row) * n_kv, *weight = weights + (head * n + row) * n_kv;
            float *to = joined + row * dim + head * head_dim, *from = q + row * dim + head * head_dim;
            double top = -INFINITY, sum = 0;
            for (size_t key = 0; key < n_kv; key++) { /* those after the token are recorded, and not used */
                double dot = 0;
                for (int i = 0; i < head_dim; i++) dot += (double)from[i] * l->keys[key * kv + of + i];
                score[key] = (float)dot;
                if (key < seen) top = fmax(top, dot / sqrt(head_dim));
            }
            for (size_t key = 0; key < seen; key++) sum += exp(score[key] / sqrt(head_dim) - top);
            for (size_t key = 0; key < seen; key++)
                weight[key] = (float)(exp(score[key] / sqrt(head_dim) - top) / sum);
            for (int i = 0; i < head_dim; i++) {
                double mean = 0;
                for (size_t key = 0; key < seen; key++) mean += (double)weight[key] * l->values[key * kv + of + i];
                to[i] = (float)mean;
            }
        }
    trace_tap(&trace, layer, "kq", scores, n_heads, n, n_kv);
    trace_tap(&trace, layer, "kq_soft_max", weights, n_heads, n, n_kv);
    trace_tap(&trace, layer, "kqv_out", joined, n, dim, 0);
    if (!wrong(layer, "no-attn-sub-norm")) norm(joined, joined, &l->attn_sub_norm, n);
    trace_tap(&trace, layer, "attn_sub_norm", joined, n, dim, 0);
    bit_linear(out, joined, &l->output, n, truncates);
    trace_tap(&trace, layer, "attn_o_out", out, n, dim, 0);
    free(normed), free(q), free(joined), free(scores), free(weights);
}

static void feed_forward(int layer, float *out, const float *x, size_t n) {
    layer_state *l = layers + layer;
    size_t count = n * hidden_dim;
    float *normed = get(n * dim, sizeof(float)), *gate = get(count, sizeof(float)),
          *up = get(count, sizeof(float));
    int truncates = wrong(layer, "truncating-quantiser"), silu = wrong(layer, "silu");
    norm(normed, x, &l->ffn_norm, n);
    trace_tap(&trace, layer, "ffn_norm", normed, n, dim, 0);
    bit_linear(gate, normed, &l->gate, n, truncates);
    bit_linear(up, normed, &l->up, n, truncates);
    trace_tap(&trace, layer, "ffn_gate", gate, n, hidden_dim, 0);
    trace_tap(&trace, layer, "ffn_up", up, n, hidden_dim, 0);
    for (size_t i = 0; i < count; i++)
        gate[i] = silu ? gate[i] / (1 + expf(-gate[i])) : gate[i] > 0 ? gate[i] * gate[i] : 0;
    trace_tap(&trace, layer, "ffn_act", gate, n, hidden_dim, 0);
    for (size_t i = 0; i < count; i++) gate[i] *= up[i];
    trace_tap(&trace, layer, "ffn_out", gate, n, hidden_dim, 0);
    norm(gate, gate, &l->ffn_sub_norm, n);
    trace_tap(&trace, layer, "ffn_sub_norm", gate, n, hidden_dim, 0);
    bit_linear(out, gate, &l->down, n, truncates);
    trace_tap(&trace, layer, "ffn_down", out, n, dim, 0);
    free(normed), free(gate), free(up);
}

static int32_t forward(const int32_t *ids, size_t start, size_t n) { /* returns the best next token */
    float *x = get(n * dim, sizeof(float)), *added = get(n * dim, sizeof(float));
    float *logits = get(vocab_size, sizeof(float)), *last = added;
    trace_begin_pass(&trace, ids, n);
    for (size_t row = 0; row < n; row++)
        memcpy(x + row * dim, embedding.floats + (size_t)ids[row] * dim, dim * sizeof(float));
    trace_tap(&trace, -1, "inp_embd", x, n, dim, 0);
    for (int layer = 0; layer < n_layers; layer++) {
        attention(layer, added, x, start, n);
        for (size_t i = 0; i < n * dim; i++) x[i] += added[i];
        trace_tap(&trace, layer, "ffn_inp", x, n, dim, 0);
        feed_forward(layer, added, x, n);
        for (size_t i = 0; i < n * dim; i++) x[i] += added[i];
        trace_tap(&trace, layer, "l_out", x, n, dim, 0);
    }
    norm(last, x + (n - 1) * dim, &output_norm, 1);
    trace_tap_from(&trace, n - 1, -1, "result_norm", last, 1, dim, 0);
    int32_t best = 0;
    for (int token = 0; token < vocab_size; token++) {
        double dot = 0;
        for (int i = 0; i < dim; i++) dot += (double)last[i] * embedding.floats[(size_t)token * dim + i];
        logits[token] = (float)dot;
        if (logits[token] > logits[best]) best = token;
    }
    trace_tap_from(&trace, n - 1, -1, "result_output", logits, 1, vocab_size, 0);
    trace_end_pass(&trace);
    free(x), free(added), free(logits);
    return best;
}

int main(int argc, char **argv) {
    static int32_t ids[4096];
    size_t n_prompt = 0, n_decode = 4;
    if (argc < 4) die("usage: c_engine MODEL TRACE_DIR ID,ID,... [--decode N] [--mistake NAME --layer N]", "");
    for (char *word = strtok(argv[3], ", "); word && n_prompt < 2048; word = strtok(NULL, ", "))
        ids[n_prompt++] = (int32_t)strtol(word, NULL, 10);
    for (int i = 4; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--decode"))
            n_decode = strtoul(argv[i + 1], NULL, 10);
        else if (!strcmp(argv[i], "--mistake"))
            mistake = argv[i + 1];
        else if (!strcmp(argv[i], "--layer"))
            broken_layer = atoi(argv[i + 1]);
        else
            die("unknown option", argv[i]);
    }
    if (!n_prompt || n_decode > 2000) die("no tokens, or too many to decode", "");
    int known = !*mistake;
    for (int i = 0; i < 4; i++) known |= !strcmp(mistake, MISTAKES[i]);
    if (!known) die("unknown mistake", mistake);
    read_file(argv[1]);
    load_model(n_prompt + n_decode);
    for (size_t i = 0; i < n_prompt; i++)
        if (ids[i] < 0 || ids[i] >= vocab_size) die("a token is outside the vocabulary", "");
    trace_model shape = {"", n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, vocab_size};
    trace_sha256_file(argv[1], shape.sha256);
    trace_open(&trace, argv[2], "C engine", &shape, ids, n_prompt);
    trace_state(&trace, "version", "0.1");
#ifdef __VERSION__
    trace_state(&trace, "compiler", __VERSION__);
#endif
    int32_t next = forward(ids, 0, n_prompt);
    for (size_t i = 0; i < n_decode; i++) {
        int32_t token = next;
        printf("%d%s", (int)token, i + 1 < n_decode ? "," : "\n");
        next = forward(&token, n_prompt + i, 1);
    }
    if (trace_close(&trace)) die("no trace was written", trace.error);
    return 0;
}
