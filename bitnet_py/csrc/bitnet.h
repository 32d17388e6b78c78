/* Public interface of the BitNet engine's C library; mirrored by bitnet_py/_native.py.
 *
 * Conventions: opaque engine handle, caller-owned buffers, int status (0 = ok), the reason for a
 * failure in a thread-local string. The library never prints, exits or aborts. Nothing here
 * allocates on behalf of the caller except the engine itself. Change any struct or signature:
 * raise BN_ABI_VERSION.
 *
 * Names of dimensions: n_layers, n_heads, n_kv_heads, head_dim, dim, q_dim (= n_heads *
 * head_dim), kv_dim (= n_kv_heads * head_dim), hidden_dim, vocab_size. Matrices are row-major.
 */
#ifndef BITNET_H
#define BITNET_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define BN_API __declspec(dllexport)
#else
#define BN_API __attribute__((visibility("default")))
#endif

#define BN_ABI_VERSION 9

enum {
    BN_OK = 0,
    BN_ERR_ARGUMENT = 1,    /* a value the caller passed is out of range */
    BN_ERR_MEMORY = 2,      /* an allocation failed */
    BN_ERR_UNAVAILABLE = 3, /* the requested kernel is unknown or this CPU/OS cannot run it */
    BN_ERR_THREAD = 4,      /* a worker thread could not be started */
};

/* Ternary matrix in bitnet.cpp's I2_S layout (see bitnet_py/quants.py for the byte diagram), and
 * what follows the product with it: y = W x * factor + bias. */
typedef struct {
    const uint8_t *data; /* [rows][cols / 4] */
    int64_t rows;
    int64_t cols;      /* multiple of 128 */
    float scale;       /* one per tensor */
    float factor;      /* another one, applied to the rounded product (a ".scale" tensor); 1: none */
    const float *bias; /* [rows], or NULL: none */
} bn_matrix;

/* Every norm but attn_norm and ffn_norm may be NULL: the model has none, in any layer. The five norms "in" come
 * together, q_norm with k_norm, and the post norms together. */
typedef struct {
    const float *attn_norm;        /* [dim] */
    const float *attn_q_norm_in;   /* [dim]         of the input of q alone, which is attn_norm's output */
    const float *attn_k_norm_in;   /* [dim] */
    const float *attn_v_norm_in;   /* [dim] */
    const float *q_norm;           /* [head_dim]    of every head before RoPE */
    const float *k_norm;           /* [head_dim] */
    const float *attn_sub_norm;    /* [q_dim]       of the input of o */
    const float *attn_post_norm;   /* [dim]         of the output of o */
    const float *ffn_norm;         /* [dim] */
    const float *ffn_gate_norm_in; /* [dim]         of the input of gate alone, which is ffn_norm's output */
    const float *ffn_up_norm_in;   /* [dim] */
    const float *ffn_sub_norm;     /* [hidden_dim]  of the input of down */
    const float *ffn_post_norm;    /* [dim]         of the output of down */
    bn_matrix q;                   /* [q_dim][dim] */
    bn_matrix k;                   /* [kv_dim][dim] */
    bn_matrix v;                   /* [kv_dim][dim] */
    bn_matrix o;                   /* [dim][q_dim] */
    bn_matrix gate;                /* [hidden_dim][dim] */
    bn_matrix up;                  /* [hidden_dim][dim] */
    bn_matrix down;                /* [dim][hidden_dim] */
} bn_layer;

/* What the feed-forward block applies to the gate. */
enum {
    BN_RELU_SQUARED, /* max(x, 0)^2 */
    BN_SILU,         /* x / (1 + e^-x) */
    BN_GELU,         /* x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), from a table of binary16 (gelu.h) */
    BN_ACTIVATIONS
};

/* Which elements of a head RoPE rotates together. */
enum {
    BN_ROPE_HALVES,   /* i and i + head_dim / 2 ("NeoX") */
    BN_ROPE_ADJACENT, /* 2i and 2i + 1 */
    BN_ROPE_PAIRINGS
};

/* The types of ggml that the embedding and the LM head may have (csrc/tables.c). */
enum {
    BN_TABLE_F16,
    BN_TABLE_F32,
    BN_TABLE_BF16,
    BN_TABLE_Q8_0,
    BN_TABLE_Q6_K,
    BN_TABLE_Q4_0,
    BN_TABLE_Q5_0,
    BN_TABLE_Q3_K,
    BN_TABLE_TQ1_0,
    BN_TABLE_TQ2_0,
    BN_TABLE_TYPES
};

typedef struct {
    const void *rows; /* [vocab_size][dim] in the file's layout */
    int32_t type;     /* BN_TABLE_* */
} bn_table;

typedef struct {
    int32_t n_layers, n_heads, n_kv_heads, head_dim, dim, hidden_dim, vocab_size;
    int32_t activation;   /* BN_RELU_SQUARED, BN_SILU, BN_GELU */
    int32_t rope_pairing; /* BN_ROPE_HALVES, BN_ROPE_ADJACENT */
    float rms_eps;
    float rope_base;
    float rope_scale;          /* times every angle: 1 / the factor of linear RoPE scaling; 1: none */
    const float *rope_factors; /* [head_dim / 2] divisors of the angles, or NULL: none */
    float embedding_scale;     /* times the embedding; 1: none */
    float query_scale;         /* times Q after RoPE; 0: the scores are divided by sqrt(head_dim) instead */
    bn_table token_embd;
    bn_table output;  /* the LM head; token_embd again when tied */
    int32_t own_head; /* 1: the reference's graph has a head of its own, be it a copy of token_embd; main packs
                       * one of Q4_0 with a multiple of 8 rows */
    const float *output_norm; /* [dim] */
    const bn_layer *layers;   /* [n_layers]; copied by bn_engine_create, the tensors are not */
} bn_model;

/* Whose arithmetic: docs/numerics.md. */
enum {
    BN_MARCH, /* bitnet.cpp of March 2026 */
    BN_MAIN,  /* bitnet.cpp's main since July 2026 */
    BN_GENERATIONS
};

/* How the engine rounds where the result depends on the reference's version, build or settings. */
typedef struct {
    int32_t generation;      /* BN_MARCH, BN_MAIN */
    int32_t simd_width;      /* float32 lanes of the reference's reductions: 8 or 16 */
    int32_t fused_quantizer; /* March, or in blocks. 1: x*s and rounding to integer share one rounding */
    int32_t block_quantizer; /* 1: activations in blocks of 256, each with its own step (llama.cpp's Q8_K) */
    int32_t fused_sums;      /* in blocks. 1: a block's scaled sum is added in one rounding (gcc builds) */
    int32_t bfloat_pairs;    /* 16 lanes. 1: dots of bfloat16 as AVX512-BF16 computes them */
    int32_t half_sums;       /* main, 16 lanes. 1: dots of binary16 accumulate in binary16 (AVX512-FP16 builds) */
    int32_t flash_attention; /* main. 1: scores, softmax and weighted sum are one operation */
    int32_t
        attention_threads;    /* flash attention of one token: parts that its cells are divided into; at least 1 */
    int32_t follow_reference; /* main. 1: also compute what the reference computes instead of the model */
} bn_arithmetic;

typedef struct {
    bn_arithmetic arithmetic;
    int32_t n_threads;
    int64_t bytes_per_thread; /* a pass that reads fewer bytes of weights per thread uses fewer threads */
    const char *kernel;       /* NULL: the best this machine can run */
} bn_options;

/* Taps of one layer, in the order of crossval/model/taps.py. */
enum {
    BN_TAP_ATTN_NORM,
    BN_TAP_ATTN_Q_NORM_IN,
    BN_TAP_ATTN_K_NORM_IN,
    BN_TAP_ATTN_V_NORM_IN,
    BN_TAP_Q,
    BN_TAP_K,
    BN_TAP_V,
    BN_TAP_Q_NORM,
    BN_TAP_K_NORM,
    BN_TAP_Q_ROPE,
    BN_TAP_K_ROPE,
    BN_TAP_Q_SCALED,
    BN_TAP_KQ,
    BN_TAP_KQ_SOFT_MAX,
    BN_TAP_KQV_OUT,
    BN_TAP_ATTN_SUB_NORM,
    BN_TAP_ATTN_O_OUT,
    BN_TAP_ATTN_POST_NORM,
    BN_TAP_FFN_INP,
    BN_TAP_FFN_NORM,
    BN_TAP_FFN_GATE_NORM_IN,
    BN_TAP_FFN_UP_NORM_IN,
    BN_TAP_FFN_GATE,
    BN_TAP_FFN_UP,
    BN_TAP_FFN_ACT,
    BN_TAP_FFN_OUT,
    BN_TAP_FFN_SUB_NORM,
    BN_TAP_FFN_DOWN,
    BN_TAP_FFN_POST_NORM,
    BN_TAP_L_OUT,
    BN_LAYER_TAPS
};
/* After the taps of all layers come the model-wide ones. */
enum {
    BN_TAP_INP_EMBD,
    BN_TAP_INP_SCALED,
    BN_TAP_RESULT_NORM,
    BN_TAP_RESULT_OUTPUT,
    BN_TAP_POOLED,
    BN_MODEL_TAPS
};

/* How the normed rows of a pass become one vector. */
enum {
    BN_POOL_NONE,
    BN_POOL_MEAN,
    BN_POOL_CLS,  /* that of the first token */
    BN_POOL_LAST, /* that of the last one */
    BN_POOLINGS
};

/* A compact copy of the LM head: row r is scale[r] * codes[r] plus an error whose norm is at
 * most error[r]. It bounds every logit, so that only the rows that can still be among the
 * largest are read in binary16. */
typedef struct {
    int8_t *codes; /* [vocab_size][dim] */
    float *scale;  /* [vocab_size] */
    float *error;  /* [vocab_size] at least |row - scale * codes|, Euclidean */
    float *norm;   /* [vocab_size] at least |scale * codes| */
} bn_screen;

/* The largest logits of a pass, found with a screen. */
typedef struct {
    const bn_screen *screen;
    int32_t n;          /* how many, 1 .. BN_MAX_TOP and at most vocab_size */
    int32_t *ids;       /* [n] by decreasing logit, ties by lower id; a NaN comes first */
    float *logits;      /* [n] bit-identical to those of the whole head */
    int64_t n_rescored; /* out: rows of the head that were read */
} bn_top;

enum { BN_MAX_TOP = 256, BN_MAX_SCREEN_DIM = 65536 };

/* One pass: n_tokens consecutive tokens appended to a sequence that already holds `start`
 * tokens. */
typedef struct {
    const int32_t *tokens;
    int32_t n_tokens;
    int32_t start;
    int32_t n_outputs;  /* trailing tokens that get logits: 0, 1 or n_tokens, which pooling needs */
    int64_t capacity;   /* cells in the cache, >= start + n_tokens, multiple of 32 (March) or 256 (main) */
    uint16_t *k_cache;  /* [n_layers][capacity][kv_dim] binary16, zeroed before first use */
    uint16_t *v_cache;  /* [n_layers][kv_dim][capacity] binary16 (transposed), zeroed before first use;
                         * with flash attention like k_cache */
    float *logits;      /* [n_outputs][vocab_size], or NULL when `top` or `pooled` is given */
    bn_top *top;        /* instead of the logits, with n_outputs 1; or NULL */
    int32_t pooling;    /* BN_POOL_*; other than BN_POOL_NONE in main only */
    float *pooled;      /* [dim], with a pooling */
    float *const *taps; /* [n_layers * BN_LAYER_TAPS + BN_MODEL_TAPS], NULL entries are not recorded; or NULL */
} bn_pass;

typedef struct {
    const char *name;      /* operation and family, e.g. "i2s_gemv_avx2" */
    const char *operation; /* e.g. "i2s_gemv" */
    const char *family;    /* family of the kernels that ran, e.g. "avx2" */
    int32_t quantized;     /* 1: multiplies packed ternary weights */
    int32_t reads_weights; /* 1: `bytes` are bytes of weights; 0: of the KV cache, or none */
    uint64_t calls;        /* times the operation ran (once per matrix or tensor and pass) */
    uint64_t bytes;        /* read by it */
} bn_counter;

typedef struct bn_engine bn_engine;

BN_API int bn_abi_version(void);
BN_API const char *bn_last_error(void);

/* Digest of powf, cosf and sinf over the angles of RoPE: two C libraries with the same digest
 * are bit-identical there. Takes a few milliseconds. */
BN_API uint64_t bn_libm_digest(void);

/* Bandwidth probe: reads n words n_passes times with n_threads threads, each its own part, and
 * returns the sum of all words read modulo 2^64. The caller measures the time, to compare it with
 * what a pass reads. */
BN_API int bn_probe_bandwidth(const uint64_t *data, int64_t n, int n_passes, int n_threads, uint64_t *sum);

/* Kernel families, best first. `available` is 0 when this CPU or OS cannot run it. */
BN_API int bn_kernel_count(void);
BN_API int bn_kernel_info(int index, const char **name, const char **description, int *available);

BN_API int bn_engine_create(const bn_model *model, const bn_options *options, bn_engine **out);
BN_API void bn_engine_free(bn_engine *engine);
BN_API const char *bn_engine_kernel(const bn_engine *engine);
BN_API int bn_engine_forward(bn_engine *engine, const bn_pass *pass);
/* Fills rows [first_row, first_row + n_rows) of a screen from the head. dim must be at most
 * BN_MAX_SCREEN_DIM. */
BN_API int bn_engine_build_screen(bn_engine *engine, int64_t first_row, int64_t n_rows, const bn_screen *out);
/* Logits [first_row, first_row + n_rows) of the last output row of the last pass, written from
 * logits[0]. An error when that pass had no output. */
BN_API int bn_engine_last_logits(bn_engine *engine, int64_t first_row, int64_t n_rows, float *logits);
/* Writes up to `capacity` counters and their number to *count. */
BN_API int bn_engine_counters(const bn_engine *engine, bn_counter *out, int capacity, int *count);

/* How a row of activations is rounded to int8; each sets a scale, by which the integers were multiplied. */
enum {
    BN_QUANTIZE_MARCH,       /* 127 / max(1e-5, max |x|); half to even, after x * scale was rounded */
    BN_QUANTIZE_MARCH_FUSED, /* the same in one rounding */
    BN_QUANTIZE_MAIN,        /* 127 / max |x|, 0 for a row of zeros; half away from zero */
    BN_QUANTIZERS
};

/* Single kernels, for tests and benchmarks. `kernel` NULL: best available. */
/* acc[c * n_rows + r] = sum_i (w[r][i] + 1) * x[c * k + i], exact in int32. */
BN_API int bn_kernel_i2s_dot(const char *kernel, const uint8_t *w, int64_t k, int n_rows, const int8_t *x,
                             int n_cols, int32_t *acc);
BN_API int bn_kernel_quantize(const char *kernel, int quantizer, const float *x, int64_t n, int8_t *q,
                              float *scale, int32_t *sum);
/* out[c * ldo + r] = sum_i a[r * lda + i] * b[c * ldb + i]. shape 0: bitnet.cpp's dot of two F16
 * rows (b already rounded to binary16); 1: its blocked dot; 2: as 0, accumulated in binary16. */
BN_API int bn_kernel_dots(const char *kernel, int simd_width, int shape, const uint16_t *a, int64_t lda,
                          int64_t n_rows, const float *b, int64_t ldb, int64_t n_cols, int64_t n, float *out,
                          int64_t ldo);
BN_API int bn_kernel_softmax(const char *kernel, int simd_width, float *row, int64_t n_visible, int64_t n_padded,
                             float scale);
BN_API int bn_kernel_rope(const char *kernel, int pairing, const float *x, const float *cos, const float *sin,
                          int half, float *out);
BN_API int bn_kernel_gated(const char *kernel, int simd_width, int activation, const float *gate, const float *up,
                           int64_t n, float *act, float *prod);
BN_API int bn_kernel_rescale(const char *kernel, int generation, const int32_t *acc, int64_t n, float sum,
                             float activation_scale, float weight_scale, float *out);
/* Activations in blocks, see bn_arithmetic: out[c * n_rows + r] is row r times the quantised x[c * k ..]. */
BN_API int bn_kernel_blocks(const char *kernel, int fused_quantizer, int fused_sums, const uint8_t *w, int64_t k,
                            int n_rows, float weight_scale, const float *x, int n_cols, float *out);
/* out[c * n_rows + r] = row r of a table, of any type but F16, times x[c * n ..], which is rounded as the type
 * demands, in the order of a build for one row of x, or (is_tiled) for several; `packed` as bn_model's own_head
 * says. */
BN_API int bn_kernel_table(const char *kernel, int type, const bn_arithmetic *arithmetic, int is_tiled, int packed,
                           const uint8_t *rows, int64_t n_rows, int64_t n, const float *x, int64_t n_cols,
                           float *out);
/* The n values of a row of a table in binary32. */
BN_API int bn_table_values(int type, const uint8_t *row, int64_t n, float *out);
/* row[i] = e^(row[i] - top), *sum = their sum; n a multiple of simd_width. */
BN_API int bn_kernel_exponentials(const char *kernel, int simd_width, float *row, int64_t n, float top,
                                  double *sum);
/* a[i] = a[i] * factor, then a[i] = v[i] * weight + a[i], both rounded to binary16; a holds binary16
 * values. half_sums as in bn_arithmetic. */
BN_API int bn_kernel_weigh_half(const char *kernel, int half_sums, float factor, const uint16_t *v, float weight,
                                int64_t n, float *a);
/* c[r * ldc + j] += sum_i a[r * lda + i] * b[i * n + j], fused, i ascending. */
BN_API int bn_kernel_multiply_add(const char *kernel, const float *a, int64_t lda, int64_t n_rows, const float *b,
                                  int64_t k, int64_t n, float *c, int64_t ldc);
/* One row of a screen; n % 32 == 0. */
BN_API int bn_kernel_screen_row(const char *kernel, const uint16_t *row, int64_t n, int8_t *codes, float *scale,
                                float *error, float *norm);
/* out[r] = sum_i codes[r * n + i] * x[i]; n % 32 == 0; exact while 127 * sum |x| < 2^31. */
BN_API int bn_kernel_screen_dots(const char *kernel, const int8_t *codes, int64_t n_rows, const int16_t *x,
                                 int64_t n, int32_t *out);
/* The largest of the dots of F16 rows with b (rounded to binary16, dim values), as one output
 * row of a pass. */
BN_API int bn_kernel_top(const char *kernel, int simd_width, const uint16_t *rows, int64_t n_rows, int64_t dim,
                         const float *b, bn_top *top);
BN_API int bn_kernel_to_f16(const char *kernel, const float *x, int64_t n, uint16_t *out);
BN_API int bn_kernel_from_f16(const char *kernel, const uint16_t *x, int64_t n, float *out);

#ifdef __cplusplus
}
#endif
#endif
