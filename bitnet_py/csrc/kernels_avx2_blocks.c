/* AVX2: ternary weights times activations in blocks. Same results as kernels_scalar.c bit for bit; see there. */
#include "kernels_avx2.h"

/* One row times some columns: each unpacking of the weights serves all of them. A 16-bit lane holds at most
 * 8 * 2 products of 2 * 127. */
static inline __attribute__((always_inline)) void dot_cols(const uint8_t *w, int64_t n_blocks, float scale,
                                                           const bn_blocks *x, int64_t first, int cols, int fused,
                                                           float *out, int64_t ldo) {
    const __m256i mask = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
    __m256 lanes[4];
    for (int c = 0; c < cols; c++) lanes[c] = _mm256_setzero_ps();
    for (int64_t block = 0; block < n_blocks; block++, w += BN_BLOCK / 4) {
        __m256i sum[4];
        for (int c = 0; c < cols; c++) sum[c] = _mm256_setzero_si256();
        _mm_prefetch((const char *)(w + BN_PREFETCH_TERNARY), _MM_HINT_T0);
        for (int half = 0; half < 2; half++) {
            const __m256i packed = bn_load_256(w + half * 32);
            const __m256i w0 = _mm256_and_si256(_mm256_srli_epi16(packed, 6), mask);
            const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            const __m256i w2 = _mm256_and_si256(_mm256_srli_epi16(packed, 2), mask);
            const __m256i w3 = _mm256_and_si256(packed, mask);
            for (int c = 0; c < cols; c++) {
                const int8_t *v = x->q + ((first + c) * n_blocks + block) * BN_BLOCK + half * 128;
                const __m256i s01 = _mm256_add_epi16(_mm256_maddubs_epi16(w0, bn_load_256(v)),
                                                     _mm256_maddubs_epi16(w1, bn_load_256(v + 32)));
                const __m256i s23 = _mm256_add_epi16(_mm256_maddubs_epi16(w2, bn_load_256(v + 64)),
                                                     _mm256_maddubs_epi16(w3, bn_load_256(v + 96)));
                sum[c] = _mm256_add_epi16(sum[c], _mm256_add_epi16(s01, s23));
            }
        }
        for (int c = 0; c < cols; c++) {
            const int64_t at = (first + c) * n_blocks + block;
            const __m256i groups = bn_load_256(x->groups + at * (BN_BLOCK / BN_GROUP));
            const __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_madd_epi16(sum[c], one), groups));
            const __m256 factor = _mm256_set1_ps(x->steps[at] * scale);
            lanes[c] = fused ? _mm256_fmadd_ps(whole, factor, lanes[c])
                             : _mm256_add_ps(_mm256_mul_ps(whole, factor), lanes[c]);
        }
    }
    for (int c = 0; c < cols; c++) out[c * ldo] = bn_sum_halving_8(lanes[c]);
}

static inline __attribute__((always_inline)) void blocks_dot(const uint8_t *w, int64_t k, int n_rows, float scale,
                                                             const bn_blocks *x, int n_cols, int fused, float *out,
                                                             int64_t ldo) {
    const int64_t n_blocks = k / BN_BLOCK;
    int c = 0;
    for (; c + 4 <= n_cols; c += 4)
        for (int r = 0; r < n_rows; r++)
            dot_cols(w + r * (k / 4), n_blocks, scale, x, c, 4, fused, out + c * ldo + r, ldo);
    for (; c < n_cols; c++)
        for (int r = 0; r < n_rows; r++)
            dot_cols(w + r * (k / 4), n_blocks, scale, x, c, 1, fused, out + c * ldo + r, ldo);
}

void bn_avx2_blocks_dot(const uint8_t *w, int64_t k, int n_rows, float scale, const bn_blocks *x, int n_cols,
                        float *out, int64_t ldo) {
    blocks_dot(w, k, n_rows, scale, x, n_cols, 0, out, ldo);
}

void bn_avx2_blocks_dot_fused(const uint8_t *w, int64_t k, int n_rows, float scale, const bn_blocks *x, int n_cols,
                              float *out, int64_t ldo) {
    blocks_dot(w, k, n_rows, scale, x, n_cols, 1, out, ldo);
}
