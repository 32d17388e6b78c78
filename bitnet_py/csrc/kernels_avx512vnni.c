/* AVX-512 VNNI kernels where 512 bits pay: the integer dot and the 16-lane reductions. The 8-lane reductions
 * and the element-wise kernels are those of AVX2. Same results as kernels_scalar.c bit for bit. */
#include "kernels.h"
#include "kernels_avx2.h"
#include "kernels_x86.h"

#include <immintrin.h>

/* ---- integer dot ---------------------------------------------------------------------------------------- */

/* 64 packed bytes are two I2_S blocks. Shifting by 6, 4, 2, 0 gives elements [0,32), [32,64), [64,96), [96,128)
 * of the first block in the low half and of the second in the high half; x is paired up the same way. */
static inline __m512i load_pair(const int8_t *x, int sub) {
    const __m256i low = _mm256_loadu_si256((const __m256i *)(x + 32 * sub));
    const __m256i high = _mm256_loadu_si256((const __m256i *)(x + 128 + 32 * sub));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

static inline __m512i load_single(const int8_t *x, int sub) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)(x + 32 * sub)));
}

static inline __m512i load_weights(const uint8_t *w, int single) {
    return single ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)w)) : _mm512_loadu_si512(w);
}

static inline __m512i dot_packed(__m512i acc_i32, __m512i packed, const __m512i x[4]) {
    const __m512i mask = _mm512_set1_epi8(3);
    acc_i32 = _mm512_dpbusd_epi32(acc_i32, _mm512_and_si512(_mm512_srli_epi16(packed, 6), mask), x[0]);
    acc_i32 = _mm512_dpbusd_epi32(acc_i32, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), x[1]);
    acc_i32 = _mm512_dpbusd_epi32(acc_i32, _mm512_and_si512(_mm512_srli_epi16(packed, 2), mask), x[2]);
    return _mm512_dpbusd_epi32(acc_i32, _mm512_and_si512(packed, mask), x[3]);
}

/* One row is one stream from memory, asked for ahead, as in the AVX2 kernel; there it was measured. */
static int32_t dot_row(const uint8_t *w, int64_t n_blocks, const int8_t *x) {
    __m512i acc_i32 = _mm512_setzero_si512();
    for (int64_t b = 0; b < n_blocks; b += 2) {
        const int single = b + 1 == n_blocks;
        __m512i v[4];
        for (int s = 0; s < 4; s++) v[s] = single ? load_single(x + b * 128, s) : load_pair(x + b * 128, s);
        _mm_prefetch((const char *)(w + b * 32 + BN_PREFETCH_TERNARY), _MM_HINT_T0);
        acc_i32 = dot_packed(acc_i32, load_weights(w + b * 32, single), v);
    }
    return _mm512_reduce_add_epi32(acc_i32);
}

static inline __attribute__((always_inline)) void dot_cols(const uint8_t *w, int64_t n_blocks, const int8_t *x,
                                                           int64_t ldx, int cols, int32_t *acc, int64_t ldacc) {
    const __m512i mask = _mm512_set1_epi8(3);
    __m512i acc_i32[8];
    for (int c = 0; c < cols; c++) acc_i32[c] = _mm512_setzero_si512();
    for (int64_t b = 0; b < n_blocks; b += 2) {
        const int single = b + 1 == n_blocks;
        const __m512i packed = load_weights(w + b * 32, single);
        const __m512i codes[4] = {_mm512_and_si512(_mm512_srli_epi16(packed, 6), mask),
                                  _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask),
                                  _mm512_and_si512(_mm512_srli_epi16(packed, 2), mask),
                                  _mm512_and_si512(packed, mask)};
        for (int c = 0; c < cols; c++) {
            const int8_t *col = x + c * ldx + b * 128;
            for (int s = 0; s < 4; s++)
                acc_i32[c] =
                    _mm512_dpbusd_epi32(acc_i32[c], codes[s], single ? load_single(col, s) : load_pair(col, s));
        }
    }
    for (int c = 0; c < cols; c++) acc[c * ldacc] = _mm512_reduce_add_epi32(acc_i32[c]);
}

static void i2s_dot(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                    int32_t *acc) {
    const int64_t stride = k / 4, n_blocks = k / 128;
    int c = 0;
    for (; c + 8 <= n_cols; c += 8)
        for (int r = 0; r < n_rows; r++)
            dot_cols(w + r * stride, n_blocks, x + c * ldx, ldx, 8, acc + (int64_t)c * n_rows + r, n_rows);
    for (; c < n_cols; c++)
        for (int r = 0; r < n_rows; r++)
            acc[(int64_t)c * n_rows + r] = dot_row(w + r * stride, n_blocks, x + c * ldx);
}

/* ---- float dots, 16 lanes ------------------------------------------------------------------------------- */

static inline __m512 load_half_16(const uint16_t *a) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)a));
}

/* Halving tree over 16 lanes: +8, +4, +2, +1. */
static inline float sum_halving_16(__m512 v) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 t = _mm256_add_ps(_mm512_castps512_ps256(v), high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static void dots_f16_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t n, float *out) {
    const int64_t full = n - n % 64;
    for (int64_t r = 0; r < n_rows; r++, a += lda) {
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
        for (int64_t i = 0; i < full; i += 64) {
            _mm_prefetch((const char *)(a + i) + BN_PREFETCH_HALF, _MM_HINT_T0);
            _mm_prefetch((const char *)(a + i) + BN_PREFETCH_HALF + 64, _MM_HINT_T0);
            s0 = _mm512_fmadd_ps(load_half_16(a + i), _mm512_loadu_ps(b + i), s0);
            s1 = _mm512_fmadd_ps(load_half_16(a + i + 16), _mm512_loadu_ps(b + i + 16), s1);
            s2 = _mm512_fmadd_ps(load_half_16(a + i + 32), _mm512_loadu_ps(b + i + 32), s2);
            s3 = _mm512_fmadd_ps(load_half_16(a + i + 48), _mm512_loadu_ps(b + i + 48), s3);
        }
        double total = sum_halving_16(_mm512_add_ps(_mm512_add_ps(s0, s2), _mm512_add_ps(s1, s3)));
        for (int64_t i = full; i < n; i++) total += (double)_cvtsh_ss(a[i]) * (double)b[i];
        out[r] = (float)total;
    }
}

static void dots_tiled_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t n, float *out) {
    int64_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        const uint16_t *row = a + r * lda;
        __m512 s[4];
        for (int j = 0; j < 4; j++) s[j] = _mm512_setzero_ps();
        for (int64_t i = 0; i < n; i += 16) {
            const __m512 v = _mm512_loadu_ps(b + i);
            for (int j = 0; j < 4; j++) s[j] = _mm512_fmadd_ps(load_half_16(row + j * lda + i), v, s[j]);
        }
        for (int j = 0; j < 4; j++) out[r + j] = sum_halving_16(s[j]);
    }
    for (; r < n_rows; r++) {
        __m512 s = _mm512_setzero_ps();
        for (int64_t i = 0; i < n; i += 16)
            s = _mm512_fmadd_ps(load_half_16(a + r * lda + i), _mm512_loadu_ps(b + i), s);
        out[r] = sum_halving_16(s);
    }
}

const bn_kernels bn_kernels_avx512vnni = {
    .name = "avx512vnni",
    .description = "AVX-512 F, BW, VL and VNNI, 512-bit",
    .available = bn_x86_has_avx512vnni,
    .i2s_dot = i2s_dot,
    .quantize = bn_avx2_quantize,
    .dots_f16 = {bn_avx2_dots_f16_w8, dots_f16_w16},
    .dots_tiled = {bn_avx2_dots_tiled_w8, dots_tiled_w16},
    .softmax = {bn_avx2_softmax_w8, bn_avx2_softmax_w16},
    .rope = bn_avx2_rope,
    .gated_relu_squared = bn_avx2_gated_relu_squared,
    .rescale = bn_avx2_rescale,
    .screen_row = bn_avx2_screen_row,
    .screen_dots = bn_avx2_screen_dots,
    .to_f16 = bn_avx2_to_f16,
    .from_f16 = bn_avx2_from_f16,
};
