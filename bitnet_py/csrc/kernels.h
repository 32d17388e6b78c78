/* The table of kernels that exist once per instruction set. Scalar is the specification: integer
 * results are equal in every family, and so are float results, because each family rounds in the
 * same order.
 *
 * Reductions over floats use bitnet.cpp's summation order, which depends on its SIMD width W (8: AVX2
 * build, 16: AVX-512 build). Tables indexed by width use BN_WIDTH_INDEX(W).
 */
#ifndef BN_KERNELS_H
#define BN_KERNELS_H

#include "bitnet.h"

#include <stdint.h>

#define BN_WIDTH_INDEX(w) ((w) == 16)

/* acc[c * n_rows + r] = sum_i code(r, i) * x[c * ldx + i] with code = weight + 1 in {0, 1, 2}. */
typedef void (*bn_i2s_dot_fn)(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                              int32_t *acc);
typedef void (*bn_quantize_fn)(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum);
/* In blocks of BN_BLOCK values: steps[n / BN_BLOCK], and the sums of BN_GROUP consecutive integers. */
enum { BN_BLOCK = 256, BN_GROUP = 32 };
typedef void (*bn_quantize_blocks_fn)(const float *x, int64_t n, int8_t *q, float *steps, int32_t *groups);
/* Rows of activations in blocks, k apart. */
typedef struct {
    const int8_t *q;
    const float *steps;
    const int32_t *groups;
} bn_blocks;
/* out[c * ldo + r] = row r times column c, k a multiple of BN_BLOCK. */
typedef void (*bn_blocks_dot_fn)(const uint8_t *w, int64_t k, int n_rows, float scale, const bn_blocks *x,
                                 int n_cols, float *out, int64_t ldo);
/* out[c * ldo + r] = sum_i a[r * lda + i] * b[c * ldb + i], a in binary16. */
typedef void (*bn_dots_fn)(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                           int64_t n_cols, int64_t n, float *out, int64_t ldo);
/* One row of the LM head's input, rounded as the type of its table demands (tables.h). */
typedef struct {
    const float *x;        /* [n]       F32, BF16 */
    const int8_t *q;       /* [n]       Q8_0, Q8_K */
    const float *steps;    /* [n / 32]  Q8_0; [n / BN_BLOCK] Q8_K */
    const int32_t *groups; /* [n / BN_GROUP] Q8_K: sums */
} bn_table_input;
/* out[r] = row r of a table times the input; n a multiple of 128, and of the type's block. */
typedef void (*bn_table_dots_fn)(const uint8_t *rows, int64_t n_rows, int64_t n, const bn_table_input *x,
                                 float *out);
/* The products with the types of a table but F16, in the orders of the builds of bitnet.cpp. */
enum {
    BN_DOTS_F32_W8,
    BN_DOTS_F32_W16,
    BN_DOTS_F32_TILED_W8,
    BN_DOTS_F32_TILED_W16,
    BN_DOTS_BF16_W8,
    BN_DOTS_BF16_W16,
    BN_DOTS_BF16_PAIRS,
    BN_DOTS_BF16_TILED_W8,
    BN_DOTS_BF16_TILED_W16,
    BN_DOTS_BF16_TILED_PAIRS,
    BN_DOTS_Q8_0,
    BN_DOTS_Q4_0,
    BN_DOTS_Q4_0_PACKED,
    BN_DOTS_Q5_0,
    BN_DOTS_Q6_K,
    BN_DOTS_Q6_K_MAIN,
    BN_DOTS_Q3_K,
    BN_DOTS_TQ1_0,
    BN_DOTS_TQ1_0_FUSED,
    BN_DOTS_TQ2_0,
    BN_DOTS_TQ2_0_FUSED,
    BN_TABLE_DOTS
};
/* In place: row[0..n_visible) holds raw scores; row[0..n_padded) becomes probabilities, 0 where
 * masked. */
typedef void (*bn_softmax_fn)(float *row, int64_t n_visible, int64_t n_padded, float scale);

/* Rotates one head of 2*half values by `half` angles; the model's pairing says which two
 * elements go together. */
typedef void (*bn_rope_fn)(const float *x, const float *cos, const float *sin, int half, float *out);
/* act = activation(gate), prod = act * up, each rounded. */
typedef void (*bn_gated_fn)(const float *gate, const float *up, int64_t n, float *act, float *prod);
/* From acc = sum_i (w_i + 1) x_i and sum = sum_i x_i, the product of a row; see BN_GENERATIONS. */
typedef void (*bn_rescale_fn)(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                              float *out);
/* In place: e^(row[i] - top); returns the sum, added as softmax adds it. n is a multiple of W. */
typedef double (*bn_exponentials_fn)(float *row, int64_t n, float top);
/* One cell of flash attention: a = a * factor unless factor is 1, then a = v * weight + a, both
 * rounded to binary16. a holds binary16 values. */
typedef void (*bn_weigh_half_fn)(float factor, const uint16_t *v, float weight, int64_t n, float *a);

/* The dots of two binary16 rows: of 8 and of 16 lanes (BN_WIDTH_INDEX), and accumulated in binary16. */
enum { BN_DOT_HALF_SUMS = 2, BN_DOTS };

typedef struct {
    const char *name;
    const char *description;
    int (*available)(void);
    /* i2s_dot is called for multiples of so many rows where there are enough, for about so many
     * bytes of packed weights, and for at most so many columns: what suits the caches, and how
     * often unpacked weights are used. */
    int32_t tile_rows, tile_bytes, tile_cols;
    bn_i2s_dot_fn i2s_dot;
    bn_quantize_fn quantize[BN_QUANTIZERS];
    bn_quantize_blocks_fn quantize_blocks[2]; /* 1: fused_quantizer */
    bn_blocks_dot_fn blocks_dot[2];           /* 1: fused_sums */
    bn_dots_fn dots_f16[BN_DOTS]; /* bitnet.cpp ggml_vec_dot_f16: 4 accumulators of W lanes, or of 32 binary16 */
    bn_dots_fn dots_tiled[2];     /* bitnet.cpp llamafile sgemm: 1 accumulator of W lanes */
    bn_table_dots_fn table_dots[BN_TABLE_DOTS];
    void (*quantize_q8_0)(const float *x, int64_t n, int8_t *q, float *steps); /* steps[n / 32] */
    bn_softmax_fn softmax[2];
    bn_exponentials_fn exponentials[2];
    bn_rope_fn rope[BN_ROPE_PAIRINGS];
    bn_gated_fn gated[BN_ACTIVATIONS][2];
    bn_rescale_fn rescale[BN_GENERATIONS];
    bn_weigh_half_fn weigh_half[2]; /* 1: half_sums */
    /* c[r * ldc + j] += sum_i a[r * lda + i] * b[i * n + j], fused, i ascending, j < n. */
    void (*multiply_add)(const float *a, int64_t lda, int64_t n_rows, const float *b, int64_t k, int64_t n,
                         float *c, int64_t ldc);
    /* See bn_screen: codes[i] = rint(row[i] / scale) with scale = max |row| / 127; n % 32 == 0. */
    void (*screen_row)(const uint16_t *row, int64_t n, int8_t *codes, float *scale, float *error, float *norm);
    /* out[r] = sum_i codes[r * n + i] * x[i], n % 32 == 0. */
    void (*screen_dots)(const int8_t *codes, int64_t n_rows, const int16_t *x, int64_t n, int32_t *out);
    void (*to_f16)(const float *x, int64_t n, uint16_t *out);
    void (*from_f16)(const uint16_t *x, int64_t n, float *out);
} bn_kernels;

extern const bn_kernels bn_kernels_scalar;
/* Kernels of which no family has a faster version yet. */
void bn_gated_gelu(const float *gate, const float *up, int64_t n, float *act, float *prod); /* gelu.h */
void bn_scalar_quantize_blocks(const float *x, int64_t n, int8_t *q, float *steps, int32_t *groups);
void bn_scalar_quantize_blocks_fused(const float *x, int64_t n, int8_t *q, float *steps, int32_t *groups);
void bn_scalar_quantize_q8_0(const float *x, int64_t n, int8_t *q, float *steps);
#define BN_DECLARE_TABLE_DOTS(name)                                                                               \
    void name(const uint8_t *rows, int64_t n_rows, int64_t n, const bn_table_input *x, float *out)
BN_DECLARE_TABLE_DOTS(bn_scalar_f32_w8);
BN_DECLARE_TABLE_DOTS(bn_scalar_f32_w16);
BN_DECLARE_TABLE_DOTS(bn_scalar_f32_tiled_w8);
BN_DECLARE_TABLE_DOTS(bn_scalar_f32_tiled_w16);
BN_DECLARE_TABLE_DOTS(bn_scalar_bf16_w8);
BN_DECLARE_TABLE_DOTS(bn_scalar_bf16_w16);
BN_DECLARE_TABLE_DOTS(bn_scalar_bf16_pairs);
BN_DECLARE_TABLE_DOTS(bn_scalar_bf16_tiled_w8);
BN_DECLARE_TABLE_DOTS(bn_scalar_bf16_tiled_w16);
BN_DECLARE_TABLE_DOTS(bn_scalar_bf16_tiled_pairs);
BN_DECLARE_TABLE_DOTS(bn_scalar_q8_0);
BN_DECLARE_TABLE_DOTS(bn_scalar_q4_0);
BN_DECLARE_TABLE_DOTS(bn_scalar_q4_0_packed);
BN_DECLARE_TABLE_DOTS(bn_scalar_q5_0);
BN_DECLARE_TABLE_DOTS(bn_scalar_q6_k);
BN_DECLARE_TABLE_DOTS(bn_scalar_q6_k_main);
BN_DECLARE_TABLE_DOTS(bn_scalar_q3_k);
BN_DECLARE_TABLE_DOTS(bn_scalar_tq1_0);
BN_DECLARE_TABLE_DOTS(bn_scalar_tq1_0_fused);
BN_DECLARE_TABLE_DOTS(bn_scalar_tq2_0);
BN_DECLARE_TABLE_DOTS(bn_scalar_tq2_0_fused);
/* clang-format off */
#define BN_TABLE_KERNELS(family)                                                                                  \
    .table_dots = {                                                                                               \
        [BN_DOTS_F32_W8] = family##_f32_w8, [BN_DOTS_F32_W16] = family##_f32_w16,                                 \
        [BN_DOTS_F32_TILED_W8] = family##_f32_tiled_w8, [BN_DOTS_F32_TILED_W16] = family##_f32_tiled_w16,         \
        [BN_DOTS_BF16_W8] = family##_bf16_w8, [BN_DOTS_BF16_W16] = family##_bf16_w16,                             \
        [BN_DOTS_BF16_PAIRS] = family##_bf16_pairs, [BN_DOTS_BF16_TILED_W8] = family##_bf16_tiled_w8,             \
        [BN_DOTS_BF16_TILED_W16] = family##_bf16_tiled_w16,                                                       \
        [BN_DOTS_BF16_TILED_PAIRS] = family##_bf16_tiled_pairs,                                                   \
        [BN_DOTS_Q8_0] = family##_q8_0, [BN_DOTS_Q4_0] = family##_q4_0, [BN_DOTS_Q4_0_PACKED] = family##_q4_0_packed, \
        [BN_DOTS_Q5_0] = family##_q5_0,           \
        [BN_DOTS_Q6_K] = family##_q6_k, [BN_DOTS_Q6_K_MAIN] = family##_q6_k_main,                                      \
        [BN_DOTS_Q3_K] = family##_q3_k,                                                                           \
        [BN_DOTS_TQ1_0] = family##_tq1_0, [BN_DOTS_TQ1_0_FUSED] = family##_tq1_0_fused,                           \
        [BN_DOTS_TQ2_0] = family##_tq2_0, [BN_DOTS_TQ2_0_FUSED] = family##_tq2_0_fused},                          \
    .quantize_q8_0 = bn_scalar_quantize_q8_0
/* clang-format on */
#if defined(__x86_64__) && !defined(BN_SCALAR_ONLY)
extern const bn_kernels bn_kernels_avx2;
extern const bn_kernels bn_kernels_avx512vnni;
#ifdef BN_HAVE_AMX
extern const bn_kernels bn_kernels_amx;
#endif
#endif

#endif
