/* Write what an engine computes as a trace for `crossval` (docs/trace-format.md). One header, C99, no dependency.

   Put `#define TRACE_WRITER_IMPLEMENTATION` before the #include in one file of your program. Then:

       trace_writer t;
       trace_model model = {.n_layers = 4, .n_heads = 4, .n_kv_heads = 2, .head_dim = 64,
                            .dim = 256, .hidden_dim = 640, .vocab_size = 1024};
       trace_sha256_file("model.gguf", model.sha256);
       trace_open(&t, "my-trace", "my engine", &model, prompt_ids, n_prompt);
       trace_state(&t, "version", "1.2");                          // and source_commit, compiler, flags: see diff
       trace_begin_pass(&t, prompt_ids, n_prompt);                 // the prompt; then one pass per decoded token
       trace_tap(&t, -1, "inp_embd", x, n_prompt, dim, 0);         // layer -1: of the whole model
       trace_tap(&t, 0, "q", q, n_prompt, n_heads, head_dim);      // blk.0.q; an unused dimension is 0
       trace_tap_from(&t, n_prompt - 1, -1, "result_output", logits, 1, vocab_size, 0);   // the last token only
       trace_end_pass(&t);
       if (trace_close(&t)) fprintf(stderr, "trace: %s\n", t.error);

   Arrays are float32, row after row, and are written at once: call trace_tap when a tensor has been computed,
   before its buffer is reused or changed in place. Nothing is allocated; what is unfinished lies in *.part files
   of the directory. trace.json comes last: without it the directory is not a trace.

   Every function returns 0, or -1 with the reason in `error`. The first error stays: later calls do nothing and
   return -1 as well, so it is enough to check trace_close, which then writes no trace.json. */
#ifndef TRACE_WRITER_H
#define TRACE_WRITER_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
    char sha256[65]; /* of the GGUF file: 64 lower-case hexadecimal digits */
    int n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, vocab_size;
} trace_model;

typedef struct {
    const char *error; /* NULL, or why the first failed call failed */
    char directory[3800];
    FILE *json, *header, *data; /* trace.json; safetensors header and arrays of the pass being written */
    uint64_t n_bytes;           /* of `data` */
    size_t n_tokens, n_pass;    /* tokens in finished passes; tokens of the pass being written, 0 outside one */
    int pass, n_taps;
} trace_writer;

/* Make `directory`, which must not exist, and state engine, model and the token ids that are fed first. */
int trace_open(trace_writer *t, const char *directory, const char *engine, const trace_model *model,
               const int32_t *prompt_ids, size_t n_prompt);
/* State a fact of the build, before the first pass: "version", "source_commit", "compiler" or "flags". */
int trace_state(trace_writer *t, const char *fact, const char *value);
/* Begin the next pass: one call of the engine, with the tokens that follow those of the passes before it. */
int trace_begin_pass(trace_writer *t, const int32_t *token_ids, size_t n_tokens);
/* Write one tensor of all tokens of the pass; its dimensions are in docs/trace-format.md, the last 0 if unused. */
int trace_tap(trace_writer *t, int layer, const char *name, const float *data, size_t d0, size_t d1, size_t d2);
/* The same for tokens `first` (0: the pass's first) to the last of the pass. */
int trace_tap_from(trace_writer *t, size_t first, int layer, const char *name, const float *data, size_t d0,
                   size_t d1, size_t d2);
/* Write the pass file. */
int trace_end_pass(trace_writer *t);
/* Write trace.json, unless a call has failed. */
int trace_close(trace_writer *t);
/* Write the sha256 of a file as 64 hexadecimal digits; -1 if it cannot be read. */
int trace_sha256_file(const char *path, char hex[65]);

#ifdef TRACE_WRITER_IMPLEMENTATION
#include <string.h>
#include <sys/stat.h>
#ifdef _WIN32
#include <direct.h>
#define trace_mkdir(path) _mkdir(path)
#else
#define trace_mkdir(path) mkdir(path, 0777)
#endif

typedef struct {
    uint32_t h[8];
    uint64_t n; /* bytes so far */
    uint8_t block[64];
} trace_sha;

static void trace_sha_block(trace_sha *s) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)s->block[4 * i] << 24 | (uint32_t)s->block[4 * i + 1] << 16 |
               (uint32_t)s->block[4 * i + 2] << 8 | s->block[4 * i + 3];
#define TRACE_TURN(x, n) ((x) >> (n) | (x) << (32 - (n)))
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (TRACE_TURN(a, 7) ^ TRACE_TURN(a, 18) ^ a >> 3) + w[i - 7] +
               (TRACE_TURN(b, 17) ^ TRACE_TURN(b, 19) ^ b >> 10);
    }
    memcpy(v, s->h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t e = v[4], a = v[0];
        uint32_t one = v[7] + (TRACE_TURN(e, 6) ^ TRACE_TURN(e, 11) ^ TRACE_TURN(e, 25)) +
                       ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
        uint32_t two =
            (TRACE_TURN(a, 2) ^ TRACE_TURN(a, 13) ^ TRACE_TURN(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one;
        v[0] = one + two;
    }
#undef TRACE_TURN
    for (int i = 0; i < 8; i++) s->h[i] += v[i];
}

static void trace_sha_add(trace_sha *s, const void *data, size_t n) {
    for (const uint8_t *at = data, *end = at + n; at < end; at++) {
        s->block[s->n++ % 64] = *at;
        if (s->n % 64 == 0) trace_sha_block(s);
    }
}

static void trace_sha_begin(trace_sha *s) {
    static const uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->h, h, sizeof h);
    s->n = 0;
}

static void trace_sha_end(trace_sha *s, char hex[65]) {
    uint64_t bits = s->n * 8;
    trace_sha_add(s, "\x80", 1);
    while (s->n % 64 != 56) trace_sha_add(s, "", 1);
    for (int i = 0; i < 8; i++) {
        uint8_t byte = (uint8_t)(bits >> (56 - 8 * i));
        trace_sha_add(s, &byte, 1);
    }
    for (int i = 0; i < 8; i++) sprintf(hex + 8 * i, "%08x", (unsigned)s->h[i]);
}

int trace_sha256_file(const char *path, char hex[65]) {
    uint8_t part[4096];
    trace_sha s;
    size_t n;
    FILE *file = fopen(path, "rb");
    if (!file) return -1;
    trace_sha_begin(&s);
    while ((n = fread(part, 1, sizeof part, file)) > 0) trace_sha_add(&s, part, n);
    int failed = ferror(file);
    fclose(file);
    if (failed) return -1;
    trace_sha_end(&s, hex);
    return 0;
}

static int trace_fail(trace_writer *t, const char *why) {
    if (!t->error) t->error = why;
    return -1;
}

static FILE *trace_file(trace_writer *t, const char *name, const char *mode) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", t->directory, name);
    FILE *file = fopen(path, mode);
    if (!file) trace_fail(t, "a file in the trace's directory cannot be opened");
    return file;
}

static void trace_shut(trace_writer *t, FILE **file) {
    if (*file && (fflush(*file) || ferror(*file))) trace_fail(t, "a file cannot be written; is the disk full?");
    if (*file) fclose(*file);
    *file = NULL;
}

static void trace_ids(FILE *out, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++) fprintf(out, "%s%ld", i ? ", " : "[", (long)ids[i]);
    fputc(']', out);
}

static void trace_text(FILE *out, const char *text) {
    fputc('"', out);
    for (; *text; text++)
        fprintf(out, "%s%c", strchr("\"\\", *text) ? "\\" : "", (uint8_t)*text < 32 ? ' ' : *text);
    fputc('"', out);
}

int trace_open(trace_writer *t, const char *directory, const char *engine, const trace_model *model,
               const int32_t *prompt_ids, size_t n_prompt) {
    static const uint16_t one = 1;
    memset(t, 0, sizeof *t);
    if (strlen(directory) >= sizeof t->directory) return trace_fail(t, "the directory's name is too long");
    if (!*(const uint8_t *)&one) return trace_fail(t, "arrays are little-endian, this machine is not");
    if (strlen(model->sha256) != 64) return trace_fail(t, "model.sha256 is not set (trace_sha256_file)");
    if (!n_prompt) return trace_fail(t, "the prompt has no tokens");
    if (trace_mkdir(directory)) return trace_fail(t, "the directory exists, or cannot be made");
    strcpy(t->directory, directory);
    if (!(t->json = trace_file(t, "trace.json.part", "wb"))) return -1;
    fprintf(t->json,
            "{\"format\": \"crossval-trace\", \"format_version\": 1,\n \"model\": {\"sha256\": \"%s\", "
            "\"n_layers\": %d, \"n_heads\": %d, \"n_kv_heads\": %d, \"head_dim\": %d, \"dim\": %d, "
            "\"hidden_dim\": %d, "
            "\"vocab_size\": %d},\n \"prompt\": {\"token_ids\": ",
            model->sha256, model->n_layers, model->n_heads, model->n_kv_heads, model->head_dim, model->dim,
            model->hidden_dim, model->vocab_size);
    trace_ids(t->json, prompt_ids, n_prompt);
    fputs("},\n \"engine\": {\"name\": ", t->json);
    trace_text(t->json, engine);
    return 0;
}

int trace_state(trace_writer *t, const char *fact, const char *value) {
    if (t->error) return -1;
    if (t->pass || t->n_pass) return trace_fail(t, "trace_state comes before the first pass");
    fputs(", ", t->json);
    trace_text(t->json, fact);
    fputs(": ", t->json);
    trace_text(t->json, value);
    return 0;
}

int trace_begin_pass(trace_writer *t, const int32_t *token_ids, size_t n_tokens) {
    if (t->error) return -1;
    if (t->n_pass) return trace_fail(t, "a pass begins before trace_end_pass of the one before it");
    if (!n_tokens) return trace_fail(t, "a pass has no tokens");
    if (!(t->header = trace_file(t, "header.part", "w+b")) || !(t->data = trace_file(t, "data.part", "w+b")))
        return -1;
    t->n_pass = n_tokens;
    t->n_taps = 0;
    t->n_bytes = 0;
    if (!t->pass) fputs("},\n \"passes\": [", t->json);
    fprintf(t->json, "%s\n  {\"kind\": \"%s\", \"start\": %zu, \"token_ids\": ", t->pass ? "," : "",
            t->n_tokens && n_tokens == 1 ? "decode" : "prefill", t->n_tokens);
    trace_ids(t->json, token_ids, n_tokens);
    fputs(", \"taps\": [", t->json);
    return 0;
}

int trace_tap(trace_writer *t, int layer, const char *name, const float *data, size_t d0, size_t d1, size_t d2) {
    return trace_tap_from(t, 0, layer, name, data, d0, d1, d2);
}

int trace_tap_from(trace_writer *t, size_t first, int layer, const char *name, const float *data, size_t d0,
                   size_t d1, size_t d2) {
    char full[80], shape[80];
    size_t n = d0 * d1 * (d2 ? d2 : 1), n_bytes = n * sizeof *data;
    if (t->error) return -1;
    if (!t->n_pass) return trace_fail(t, "a tap outside a pass");
    if (!n || first >= t->n_pass || strlen(name) > 40 || strpbrk(name, "\"\\"))
        return trace_fail(t, "a tap is empty, has no such token, or an unusable name");
    if (layer < 0)
        snprintf(full, sizeof full, "%s", name);
    else
        snprintf(full, sizeof full, "blk.%d.%s", layer, name);
    if (d2)
        snprintf(shape, sizeof shape, "[%zu, %zu, %zu]", d0, d1, d2);
    else
        snprintf(shape, sizeof shape, "[%zu, %zu]", d0, d1);
    fprintf(t->header, "%s\"p%d.%s\": {\"dtype\": \"F32\", \"shape\": %s, \"data_offsets\": [%llu, %llu]}",
            t->n_taps ? ", " : "{", t->pass, full, shape, (unsigned long long)t->n_bytes,
            (unsigned long long)(t->n_bytes + n_bytes));
    fprintf(t->json, "%s\n   {\"name\": \"%s\", \"dtype\": \"F32\", \"shape\": %s", t->n_taps++ ? "," : "", full,
            shape);
    for (size_t i = first; first && i < t->n_pass; i++)
        fprintf(t->json, "%s%zu", i == first ? ", \"rows\": [" : ", ", i);
    fputs(first ? "]}" : "}", t->json);
    t->n_bytes += n_bytes;
    return fwrite(data, sizeof *data, n, t->data) == n
               ? 0
               : trace_fail(t, "a tap cannot be written; is the disk full?");
}

static void trace_copy(trace_sha *s, FILE *to, FILE *from) {
    uint8_t part[4096];
    size_t n;
    rewind(from);
    while ((n = fread(part, 1, sizeof part, from)) > 0) {
        trace_sha_add(s, part, n);
        fwrite(part, 1, n, to);
    }
}

int trace_end_pass(trace_writer *t) {
    char name[40], hex[65];
    uint8_t size[8];
    trace_sha s;
    if (t->error) return -1;
    if (!t->n_pass || !t->n_taps) return trace_fail(t, "a pass ends that has no taps, or did not begin");
    snprintf(name, sizeof name, "pass-%04d.safetensors", t->pass);
    FILE *file = trace_file(t, name, "wb");
    if (!file) return -1;
    fputc('}', t->header);
    long n_header = ftell(t->header);
    if (n_header < 0) trace_fail(t, "the header cannot be written; is the disk full?");
    for (int i = 0; i < 8; i++) size[i] = (uint8_t)((uint64_t)n_header >> 8 * i);
    trace_sha_begin(&s);
    trace_sha_add(&s, size, 8);
    fwrite(size, 1, 8, file);
    trace_copy(&s, file, t->header);
    trace_copy(&s, file, t->data);
    trace_sha_end(&s, hex);
    trace_shut(t, &t->header);
    trace_shut(t, &t->data);
    trace_shut(t, &file);
    fprintf(t->json, "],\n   \"file\": \"%s\", \"sha256\": \"%s\"}", name, hex);
    t->n_tokens += t->n_pass;
    t->n_pass = 0;
    t->pass++;
    return t->error ? -1 : 0;
}

int trace_close(trace_writer *t) {
    static const char *const parts[] = {"header.part", "data.part", "trace.json.part"};
    char from[4096], to[4096];
    if (!t->error && (t->n_pass || !t->pass)) trace_fail(t, "closed inside a pass, or before the first");
    if (t->json) fputs("]}\n", t->json);
    trace_shut(t, &t->header);
    trace_shut(t, &t->data);
    trace_shut(t, &t->json);
    for (int i = 0; i < 3; i++) {
        snprintf(from, sizeof from, "%s/%s", t->directory, parts[i]);
        snprintf(to, sizeof to, "%s/trace.json", t->directory);
        if (i == 2 && !t->error) {
            if (rename(from, to)) trace_fail(t, "trace.json.part cannot be renamed");
        } else if (t->directory[0]) {
            remove(from);
        }
    }
    return t->error ? -1 : 0;
}
#endif
#endif
