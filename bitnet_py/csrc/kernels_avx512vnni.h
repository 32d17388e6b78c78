/* The AVX-512 kernels that the AMX family reuses. */
#ifndef BN_KERNELS_AVX512VNNI_H
#define BN_KERNELS_AVX512VNNI_H

#include <stdint.h>

void bn_avx512_i2s_dot(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                       int32_t *acc);
void bn_avx512_dots_f16_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                            int64_t n_cols, int64_t n, float *out, int64_t ldo);
void bn_avx512_dots_tiled_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                              int64_t n_cols, int64_t n, float *out, int64_t ldo);

#endif
