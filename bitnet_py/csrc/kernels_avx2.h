/* The AVX2 kernels that wider families reuse. */
#ifndef BN_KERNELS_AVX2_H
#define BN_KERNELS_AVX2_H

#include <stdint.h>

/* How far ahead, in bytes, a stream of weights is asked for. One row is one stream: rows taken in groups make
 * several, and reached two thirds of the bandwidth. The hardware prefetcher stops at every page of the mapped
 * file; this crosses pages in time. Farther is better only where more is computed per byte. */
enum { BN_PREFETCH_TERNARY = 4096, BN_PREFETCH_HALF = 1024, BN_PREFETCH_CODES = 1024 };

void bn_avx2_quantize(const float *x, int64_t n, int fused, int8_t *q, float *scale, int32_t *sum);
void bn_avx2_dots_f16_w8(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t n, float *out);
void bn_avx2_dots_tiled_w8(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t n, float *out);
void bn_avx2_softmax_w8(float *row, int64_t n_visible, int64_t n_padded, float scale);
void bn_avx2_softmax_w16(float *row, int64_t n_visible, int64_t n_padded, float scale);
void bn_avx2_rope(const float *x, const float *cos, const float *sin, int half, float *out);
void bn_avx2_gated_relu_squared(const float *gate, const float *up, int64_t n, float *act, float *prod);
void bn_avx2_rescale(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                     float *out);
void bn_avx2_screen_row(const uint16_t *row, int64_t n, int8_t *codes, float *scale, float *error, float *norm);
void bn_avx2_screen_dots(const int8_t *codes, int64_t n_rows, const int16_t *x, int64_t n, int32_t *out);
void bn_avx2_to_f16(const float *x, int64_t n, uint16_t *out);
void bn_avx2_from_f16(const uint16_t *x, int64_t n, float *out);

#endif
