/* The AVX2 kernels, shared by their two files and reused by wider families. */
#ifndef BN_KERNELS_AVX2_H
#define BN_KERNELS_AVX2_H

#include "kernels.h"

#include <immintrin.h>

/* How far ahead, in bytes, a stream of weights is prefetched. One row is one stream: rows taken
 * in groups make several, and reached two thirds of the bandwidth. The hardware prefetcher stops
 * at every page of the mapped file; this crosses pages in time. Farther is better only where
 * more is computed per byte. */
enum { BN_PREFETCH_TERNARY = 4096, BN_PREFETCH_HALF = 1024, BN_PREFETCH_CODES = 1024 };

static inline __m256i bn_load_256(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

static inline __m256 bn_load_half_8(const uint16_t *a) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)a));
}

/* Halving tree over 8 lanes: +4, +2, +1. */
static inline float bn_sum_halving_8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* +4, then adjacent pairs. */
static inline float bn_sum_paired_8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_hadd_ps(s, s);
    return _mm_cvtss_f32(_mm_hadd_ps(s, s));
}

/* out[c * ldo + r] = the sum of 8 lanes of row r's c-th vector, eight sums at a time. */
static inline void bn_sum_2x4(const __m256 row0[4], const __m256 row1[4], int is_paired, float *out, int64_t ldo) {
    __m256 t[4]; /* +4: four lanes of row 0, four of row 1 */
    for (int c = 0; c < 4; c++)
        t[c] = _mm256_add_ps(_mm256_permute2f128_ps(row0[c], row1[c], 0x20),
                             _mm256_permute2f128_ps(row0[c], row1[c], 0x31));
    __m256 sums; /* four columns of row 0, four of row 1 */
    if (is_paired) {
        sums = _mm256_hadd_ps(_mm256_hadd_ps(t[0], t[1]), _mm256_hadd_ps(t[2], t[3]));
    } else {
        const __m256 u = _mm256_add_ps(_mm256_unpacklo_ps(t[0], t[1]), _mm256_unpackhi_ps(t[0], t[1]));
        const __m256 v = _mm256_add_ps(_mm256_unpacklo_ps(t[2], t[3]), _mm256_unpackhi_ps(t[2], t[3]));
        sums = _mm256_add_ps(_mm256_shuffle_ps(u, v, 0x44), _mm256_shuffle_ps(u, v, 0xee));
    }
    float lanes[8];
    _mm256_storeu_ps(lanes, sums);
    for (int c = 0; c < 4; c++)
        for (int r = 0; r < 2; r++) out[c * ldo + r] = lanes[4 * r + c];
}

static inline int32_t bn_sum_i32x8(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(s);
}

void bn_avx2_quantize_march(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum);
void bn_avx2_quantize_march_fused(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum);
void bn_avx2_quantize_main(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum);
void bn_avx2_blocks_dot(const uint8_t *w, int64_t k, int n_rows, float scale, const bn_blocks *x, int n_cols,
                        float *out, int64_t ldo);
void bn_avx2_blocks_dot_fused(const uint8_t *w, int64_t k, int n_rows, float scale, const bn_blocks *x, int n_cols,
                              float *out, int64_t ldo);
void bn_avx2_dots_f16_w8(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                         int64_t n_cols, int64_t n, float *out, int64_t ldo);
void bn_avx2_dots_f16_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                          int64_t n_cols, int64_t n, float *out, int64_t ldo);
void bn_avx2_dots_half_sums(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                            int64_t n_cols, int64_t n, float *out, int64_t ldo);
void bn_avx2_dots_tiled_w8(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                           int64_t n_cols, int64_t n, float *out, int64_t ldo);
void bn_avx2_dots_tiled_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                            int64_t n_cols, int64_t n, float *out, int64_t ldo);
BN_DECLARE_TABLE_DOTS(bn_avx2_f32_w8);
BN_DECLARE_TABLE_DOTS(bn_avx2_f32_w16);
BN_DECLARE_TABLE_DOTS(bn_avx2_f32_tiled_w8);
BN_DECLARE_TABLE_DOTS(bn_avx2_f32_tiled_w16);
BN_DECLARE_TABLE_DOTS(bn_avx2_bf16_w8);
BN_DECLARE_TABLE_DOTS(bn_avx2_bf16_w16);
BN_DECLARE_TABLE_DOTS(bn_avx2_bf16_pairs);
BN_DECLARE_TABLE_DOTS(bn_avx2_bf16_tiled_w8);
BN_DECLARE_TABLE_DOTS(bn_avx2_bf16_tiled_w16);
BN_DECLARE_TABLE_DOTS(bn_avx2_bf16_tiled_pairs);
BN_DECLARE_TABLE_DOTS(bn_avx2_q8_0);
BN_DECLARE_TABLE_DOTS(bn_avx2_q4_0);
BN_DECLARE_TABLE_DOTS(bn_avx2_q4_0_packed);
BN_DECLARE_TABLE_DOTS(bn_avx2_q5_0);
BN_DECLARE_TABLE_DOTS(bn_avx2_q6_k);
BN_DECLARE_TABLE_DOTS(bn_avx2_q6_k_main);
BN_DECLARE_TABLE_DOTS(bn_avx2_q3_k);
BN_DECLARE_TABLE_DOTS(bn_avx2_tq1_0);
BN_DECLARE_TABLE_DOTS(bn_avx2_tq1_0_fused);
BN_DECLARE_TABLE_DOTS(bn_avx2_tq2_0);
BN_DECLARE_TABLE_DOTS(bn_avx2_tq2_0_fused);
void bn_avx2_softmax_w8(float *row, int64_t n_visible, int64_t n_padded, float scale);
void bn_avx2_softmax_w16(float *row, int64_t n_visible, int64_t n_padded, float scale);
double bn_avx2_exponentials_w8(float *row, int64_t n, float top);
double bn_avx2_exponentials_w16(float *row, int64_t n, float top);
void bn_avx2_rope_halves(const float *x, const float *cos, const float *sin, int half, float *out);
void bn_avx2_rope_adjacent(const float *x, const float *cos, const float *sin, int half, float *out);
void bn_avx2_gated_relu_squared(const float *gate, const float *up, int64_t n, float *act, float *prod);
void bn_avx2_gated_silu_w8(const float *gate, const float *up, int64_t n, float *act, float *prod);
void bn_avx2_gated_silu_w16(const float *gate, const float *up, int64_t n, float *act, float *prod);
void bn_avx2_rescale_march(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                           float *out);
void bn_avx2_rescale_main(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                          float *out);
void bn_avx2_weigh_half(float factor, const uint16_t *v, float weight, int64_t n, float *a);
void bn_avx2_weigh_half_sums(float factor, const uint16_t *v, float weight, int64_t n, float *a);
void bn_avx2_multiply_add(const float *a, int64_t lda, int64_t n_rows, const float *b, int64_t k, int64_t n,
                          float *c, int64_t ldc);
void bn_avx2_screen_row(const uint16_t *row, int64_t n, int8_t *codes, float *scale, float *error, float *norm);
void bn_avx2_screen_dots(const int8_t *codes, int64_t n_rows, const int16_t *x, int64_t n, int32_t *out);
void bn_avx2_to_f16(const float *x, int64_t n, uint16_t *out);
void bn_avx2_from_f16(const uint16_t *x, int64_t n, float *out);

/* What the wider families use unchanged. */
#define BN_AVX2_KERNELS                                                                                           \
    .quantize = {bn_avx2_quantize_march, bn_avx2_quantize_march_fused, bn_avx2_quantize_main},                    \
    .quantize_blocks = {bn_scalar_quantize_blocks, bn_scalar_quantize_blocks_fused},                              \
    .blocks_dot = {bn_avx2_blocks_dot, bn_avx2_blocks_dot_fused}, BN_TABLE_KERNELS(bn_avx2),                      \
    .softmax = {bn_avx2_softmax_w8, bn_avx2_softmax_w16},                                                         \
    .exponentials = {bn_avx2_exponentials_w8, bn_avx2_exponentials_w16},                                          \
    .rope = {[BN_ROPE_HALVES] = bn_avx2_rope_halves, [BN_ROPE_ADJACENT] = bn_avx2_rope_adjacent},                 \
    .gated = {[BN_RELU_SQUARED] = {bn_avx2_gated_relu_squared, bn_avx2_gated_relu_squared},                       \
              [BN_SILU] = {bn_avx2_gated_silu_w8, bn_avx2_gated_silu_w16},                                        \
              [BN_GELU] = {bn_gated_gelu, bn_gated_gelu}},                                                        \
    .rescale = {bn_avx2_rescale_march, bn_avx2_rescale_main},                                                     \
    .weigh_half = {bn_avx2_weigh_half, bn_avx2_weigh_half_sums}, .multiply_add = bn_avx2_multiply_add,            \
    .screen_row = bn_avx2_screen_row, .screen_dots = bn_avx2_screen_dots, .to_f16 = bn_avx2_to_f16,               \
    .from_f16 = bn_avx2_from_f16

#endif
