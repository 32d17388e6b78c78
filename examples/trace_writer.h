/* Write what an engine computes as a trace for `crossval` (docs/trace-format.md). One header for C99 and C++11.

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
   before its buffer is reused or changed in place. Nothing is allocated. trace.json comes last: without it the
   directory is not a trace. The first error stays in `error`: later calls do nothing, so it is enough to check
   trace_close, which then writes no trace.json. */
#ifndef TRACE_WRITER_H
#define TRACE_WRITER_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#ifdef _WIN32
#include <direct.h>
#define trace_mkdir(path) _mkdir(path)
#else
#define trace_mkdir(path) mkdir(path, 0777)
#endif

typedef struct {
    char sha256[65]; /* of the GGUF file: 64 lower-case hexadecimal digits */
    int n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, vocab_size;
} trace_model;

typedef struct {
    const char *error; /* NULL, or why the first failed call failed */
    char directory[3800];
    FILE *json, *file;             /* trace.json, and the safetensors file of the pass that has begun */
    size_t room, n_header, n_data; /* of that file: bytes kept for its header, and how much there is */
    size_t n_tokens, n_pass;       /* tokens in finished passes; tokens of the pass that has begun, else 0 */
    int pass;
} trace_writer;

/* ---- SHA-256 (FIPS 180-4) ---- */

static inline uint32_t trace_turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

static inline uint32_t trace_mix(uint32_t x, int a, int b, int c) {
    return trace_turn(x, a) ^ trace_turn(x, b) ^ trace_turn(x, c);
}

static inline void trace_sha256_block(uint32_t h[8], const uint8_t block[64]) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64] = {0}, v[8];
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) w[i / 4] = w[i / 4] << 8 | block[i];
    for (int i = 0; i < 64; i++) {
        if (i >= 16)
            w[i] = w[i - 16] + (trace_turn(w[i - 15], 7) ^ trace_turn(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
                   (trace_turn(w[i - 2], 17) ^ trace_turn(w[i - 2], 19) ^ w[i - 2] >> 10);
        uint32_t one = v[7] + trace_mix(v[4], 6, 11, 25) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
        uint32_t two = trace_mix(v[0], 2, 13, 22) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one;
        v[0] = one + two;
    }
    for (int i = 0; i < 8; i++) h[i] += v[i];
}

/* Put the sha256 of a file into `hex` as 64 hexadecimal digits; -1 and "" if it cannot be read. */
static inline int trace_sha256_file(const char *path, char hex[65]) {
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t block[128];
    uint64_t n_bits = 0;
    size_t n;
    FILE *file = fopen(path, "rb");
    hex[0] = 0;
    if (!file) return -1;
    for (; (n = fread(block, 1, 64, file)) == 64; n_bits += 512) trace_sha256_block(h, block);
    int failed = ferror(file);
    fclose(file);
    if (failed) return -1;
    n_bits += 8 * n;
    memset(block + n, 0, sizeof block - n);
    block[n] = 0x80;
    size_t end = n < 56 ? 64 : 128; /* the last eight bytes are the length */
    for (size_t at = end; n_bits; n_bits >>= 8) block[--at] = (uint8_t)n_bits;
    for (size_t at = 0; at < end; at += 64) trace_sha256_block(h, block + at);
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08lx", (unsigned long)h[i]);
    return 0;
}

/* ---- files; after an error nothing is done ---- */

/* Return whether no check has failed so far; the first that did gives the error. */
static inline int trace_check(trace_writer *t, int good, const char *why) {
    if (!t->error && !good) t->error = why;
    return !t->error;
}

static inline FILE *trace_create(trace_writer *t, const char *name) {
    char part[4096];
    snprintf(part, sizeof part, "%s/%s.part", t->directory, name);
    FILE *file = fopen(part, "wb");
    trace_check(t, file != NULL, "a file of the trace cannot be made");
    return file;
}

/* Close a file, which has its name only now that it is whole, and put its sha256 into `hex`. */
static inline void trace_finish(trace_writer *t, FILE **file, const char *name, char hex[65]) {
    char part[4096], path[4096];
    int good = *file && !ferror(*file);
    if (*file && fclose(*file)) good = 0;
    *file = NULL;
    snprintf(part, sizeof part, "%s/%s.part", t->directory, name);
    snprintf(path, sizeof path, "%s/%s", t->directory, name);
    if (!t->error)
        trace_check(t, good && !rename(part, path) && !trace_sha256_file(path, hex),
                    "a file cannot be written; is the disk full?");
}

static inline void trace_print_text(FILE *out, const char *text) {
    fputc('"', out);
    for (; *text; text++)
        fprintf(out, "%s%c", strchr("\"\\", *text) ? "\\" : "", (uint8_t)*text < 32 ? ' ' : *text);
    fputc('"', out);
}

static inline void trace_print_ids(FILE *out, const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++) fprintf(out, "%s%ld", i ? ", " : "", (long)ids[i]);
}

/* ---- the trace ---- */

/* Make `directory`, which must not exist; state engine, model and the ids that are fed first. -1 if it failed. */
static inline int trace_open(trace_writer *t, const char *directory, const char *engine, const trace_model *model,
                             const int32_t *prompt_ids, size_t n_prompt) {
    static const uint16_t one = 1;
    memset(t, 0, sizeof *t);
    trace_check(t, *(const uint8_t *)&one, "arrays are little-endian, this machine is not");
    trace_check(t, strlen(directory) < sizeof t->directory, "the directory's name is too long");
    trace_check(t, strlen(model->sha256) == 64, "model.sha256 is not set (trace_sha256_file)");
    if (t->error || !trace_check(t, !trace_mkdir(directory), "the directory exists, or cannot be made")) return -1;
    strcpy(t->directory, directory);
    t->room = 200 * (48 * (size_t)model->n_layers + 32); /* for the names and shapes of so many taps */
    if (!(t->json = trace_create(t, "trace.json"))) return -1;
    fprintf(t->json,
            "{\"format\": \"crossval-trace\", \"format_version\": 1,\n \"model\": {\"sha256\": \"%s\", "
            "\"n_layers\": %d, \"n_heads\": %d, \"n_kv_heads\": %d, \"head_dim\": %d, \"dim\": %d, "
            "\"hidden_dim\": %d, \"vocab_size\": %d},\n \"prompt\": {\"token_ids\": [",
            model->sha256, model->n_layers, model->n_heads, model->n_kv_heads, model->head_dim, model->dim,
            model->hidden_dim, model->vocab_size);
    trace_print_ids(t->json, prompt_ids, n_prompt);
    fputs("]},\n \"engine\": {\"name\": ", t->json);
    trace_print_text(t->json, engine);
    return 0;
}

/* State a fact of the build, before the first pass: "version", "source_commit", "compiler" or "flags". */
static inline void trace_state(trace_writer *t, const char *fact, const char *value) {
    if (!trace_check(t, !t->pass && !t->n_pass, "a fact is stated after the first pass has begun")) return;
    fprintf(t->json, ", \"%s\": ", fact);
    trace_print_text(t->json, value);
}

/* Begin the next pass: one call of the engine, with the tokens that follow those of the passes before it. */
static inline void trace_begin_pass(trace_writer *t, const int32_t *token_ids, size_t n_tokens) {
    char name[40];
    if (!trace_check(t, !t->n_pass && n_tokens, "a pass begins inside another, or has no tokens")) return;
    snprintf(name, sizeof name, "pass-%04d.safetensors", t->pass);
    if (!(t->file = trace_create(t, name))) return;
    for (int i = 0; i < 8; i++) fputc((int)((uint64_t)t->room >> 8 * i & 255), t->file);
    for (size_t i = 0; i < t->room; i++) fputc(' ', t->file);
    t->n_header = t->n_data = 0;
    t->n_pass = n_tokens;
    fprintf(t->json, "%s\n  {\"kind\": \"%s\", \"start\": %zu, \"token_ids\": [",
            t->pass ? "," : "},\n \"passes\": [", t->n_tokens && n_tokens == 1 ? "decode" : "prefill",
            t->n_tokens);
    trace_print_ids(t->json, token_ids, n_tokens);
    fputs("], \"taps\": [", t->json);
}

/* Record one tensor of tokens `first` (0: the pass's first) to the last of the pass. Its dimensions are in
   docs/trace-format.md, the last is 0 if unused. */
static inline void trace_tap_from(trace_writer *t, size_t first, int layer, const char *name, const float *data,
                                  size_t d0, size_t d1, size_t d2) {
    char block[24] = "", last[24] = "";
    size_t n_bytes = d0 * d1 * (d2 ? d2 : 1) * sizeof *data;
    if (!trace_check(t, n_bytes && first < t->n_pass, "a tap is empty, outside a pass or beyond it")) return;
    if (layer >= 0) snprintf(block, sizeof block, "blk.%d.", layer);
    if (d2) snprintf(last, sizeof last, ", %zu", d2);
    fprintf(t->json, "%s\n   {\"name\": \"%s%s\", \"dtype\": \"F32\", \"shape\": [%zu, %zu%s]",
            t->n_data ? "," : "", block, name, d0, d1, last);
    for (size_t i = first; first && i < t->n_pass; i++)
        fprintf(t->json, "%s%zu", i == first ? ", \"rows\": [" : ", ", i);
    fputs(first ? "]}" : "}", t->json);
    fwrite(data, 1, n_bytes, t->file);
    fseek(t->file, (long)(8 + t->n_header), SEEK_SET);
    int n = fprintf(t->file,
                    "%s\"p%d.%s%s\": {\"dtype\": \"F32\", \"shape\": [%zu, %zu%s], \"data_offsets\": [%zu, %zu]",
                    t->n_data ? "}, " : "{", t->pass, block, name, d0, d1, last, t->n_data, t->n_data + n_bytes);
    fseek(t->file, 0, SEEK_END);
    t->n_header += n > 0 ? (size_t)n : t->room;
    t->n_data += n_bytes;
    trace_check(t, t->n_header + 2 <= t->room, "the file's header has no room for so many taps or such names");
}

/* The same for all tokens of the pass. */
static inline void trace_tap(trace_writer *t, int layer, const char *name, const float *data, size_t d0, size_t d1,
                             size_t d2) {
    trace_tap_from(t, 0, layer, name, data, d0, d1, d2);
}

/* Write the pass file. */
static inline void trace_end_pass(trace_writer *t) {
    char name[40], hex[65] = "";
    if (!trace_check(t, t->n_pass && t->n_data, "a pass ends that has no taps, or did not begin")) return;
    fseek(t->file, (long)(8 + t->n_header), SEEK_SET);
    fputs("}}", t->file);
    snprintf(name, sizeof name, "pass-%04d.safetensors", t->pass++);
    trace_finish(t, &t->file, name, hex);
    fprintf(t->json, "],\n   \"file\": \"%s\", \"sha256\": \"%s\"}", name, hex);
    t->n_tokens += t->n_pass;
    t->n_pass = 0;
}

/* Write trace.json, unless a call has failed; -1 if it was not written. */
static inline int trace_close(trace_writer *t) {
    char hex[65];
    trace_check(t, !t->n_pass && t->pass, "closed inside a pass, or before the first");
    if (t->file) fclose(t->file);
    t->file = NULL;
    if (t->json) fputs("]}\n", t->json);
    trace_finish(t, &t->json, "trace.json", hex);
    t->pass = 0;
    return t->error ? -1 : 0;
}
#endif
