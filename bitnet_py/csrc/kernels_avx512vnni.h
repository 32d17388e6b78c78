/* The AVX-512 kernels that the AMX family reuses. */
#ifndef BN_KERNELS_AVX512VNNI_H
#define BN_KERNELS_AVX512VNNI_H

#include <immintrin.h>
#include <stdint.h>

/* 32 bytes from each of two places. */
static inline __m512i bn_load_2x256(const void *low, const void *high) {
    const __m256i l = _mm256_loadu_si256((const __m256i *)low), h = _mm256_loadu_si256((const __m256i *)high);
    return _mm512_inserti64x4(_mm512_castsi256_si512(l), h, 1);
}

void bn_avx512_i2s_dot(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                       int32_t *acc);
void bn_avx512_dots_f16_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                            int64_t n_cols, int64_t n, float *out, int64_t ldo);
void bn_avx512_dots_tiled_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                              int64_t n_cols, int64_t n, float *out, int64_t ldo);

#endif
