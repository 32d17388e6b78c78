/* AVX-512 VNNI kernels where 512 bits pay: the integer dot and the 16-lane reductions. The
 * 8-lane reductions and the element-wise kernels are those of AVX2. Same results as
 * kernels_scalar.c bit for bit. */
#include "kernels_avx512vnni.h"
#include "kernels_avx2.h"
#include "cpu_x86.h"

#include <immintrin.h>

/* ---- integer dot ---------------------------------------------------------------------------------------- */

/* 64 packed bytes are two I2_S blocks. Shifting by 6, 4, 2, 0 gives elements [0,32), [32,64),
 * [64,96), [96,128) of the first block in the low half and of the second in the high half; x is
 * paired up the same way. */
static inline __m512i load_pair(const int8_t *x, int quarter) {
    return bn_load_2x256(x + 32 * quarter, x + 128 + 32 * quarter);
}

static inline __m512i load_single(const int8_t *x, int quarter) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)(x + 32 * quarter)));
}

static inline __m512i load_weights(const uint8_t *w, int single) {
    return single ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)w)) : _mm512_loadu_si512(w);
}

/* Quarter 0 is the first 32 elements of a block. */
static inline __attribute__((always_inline)) __m512i unpack(__m512i packed, int quarter) {
    const __m512i moved = quarter == 0   ? _mm512_srli_epi16(packed, 6)
                          : quarter == 1 ? _mm512_srli_epi16(packed, 4)
                          : quarter == 2 ? _mm512_srli_epi16(packed, 2)
                                         : packed;
    return _mm512_and_si512(moved, _mm512_set1_epi8(3));
}

/* One row is one stream from memory, prefetched as in the AVX2 kernel, where this was
 * measured. */
static int32_t dot_row(const uint8_t *w, int64_t n_blocks, const int8_t *x) {
    __m512i acc_i32[4]; /* one per quarter: in a single one, every instruction would wait for the last */
    for (int q = 0; q < 4; q++) acc_i32[q] = _mm512_setzero_si512();
    for (int64_t b = 0; b < n_blocks; b += 2) {
        const int single = b + 1 == n_blocks;
        _mm_prefetch((const char *)(w + b * 32 + BN_PREFETCH_TERNARY), _MM_HINT_T0);
        const __m512i packed = load_weights(w + b * 32, single);
        for (int q = 0; q < 4; q++)
            acc_i32[q] = _mm512_dpbusd_epi32(acc_i32[q], unpack(packed, q),
                                             single ? load_single(x + b * 128, q) : load_pair(x + b * 128, q));
    }
    return _mm512_reduce_add_epi32(
        _mm512_add_epi32(_mm512_add_epi32(acc_i32[0], acc_i32[1]), _mm512_add_epi32(acc_i32[2], acc_i32[3])));
}

/* Pairs of rows times several columns, bound by arithmetic. The activations reach both rows of a
 * pair by a broadcast, which a load does for free; with two pairs each serves four rows, with
 * eight columns each unpacking eight. */
static inline __attribute__((always_inline)) void dot_tile(const uint8_t *w, int64_t stride, int pairs,
                                                           int64_t n_blocks, const int8_t *x, int64_t ldx,
                                                           int cols, int32_t *acc, int64_t ldacc) {
    __m512i acc_i32[2][8];
    for (int p = 0; p < pairs; p++)
        for (int c = 0; c < cols; c++) acc_i32[p][c] = _mm512_setzero_si512();
    for (int64_t b = 0; b < n_blocks; b++) {
        __m512i packed[2];
        for (int p = 0; p < pairs; p++) {
            const uint8_t *at = w + 2 * p * stride + b * 32;
            packed[p] = bn_load_2x256(at, at + stride); /* the same elements of both rows */
        }
        for (int q = 0; q < 4; q++) {
            __m512i codes[2];
            for (int p = 0; p < pairs; p++) codes[p] = unpack(packed[p], q);
            for (int c = 0; c < cols; c++) {
                const __m256i v = _mm256_loadu_si256((const __m256i *)(x + c * ldx + b * 128 + 32 * q));
                for (int p = 0; p < pairs; p++)
                    acc_i32[p][c] = _mm512_dpbusd_epi32(acc_i32[p][c], codes[p], _mm512_broadcast_i64x4(v));
            }
        }
    }
    for (int p = 0; p < pairs; p++) {
        for (int c = 0; c < cols; c++) {
            acc[c * ldacc + 2 * p] = bn_sum_i32x8(_mm512_castsi512_si256(acc_i32[p][c]));
            acc[c * ldacc + 2 * p + 1] = bn_sum_i32x8(_mm512_extracti64x4_epi64(acc_i32[p][c], 1));
        }
    }
}

static inline __attribute__((always_inline)) void dot_cols(const uint8_t *w, int64_t k, int n_rows,
                                                           const int8_t *x, int64_t ldx, int cols, int32_t *acc) {
    const int64_t stride = k / 4, n_blocks = k / 128;
    int r = 0;
    for (; r + 4 <= n_rows; r += 4) dot_tile(w + r * stride, stride, 2, n_blocks, x, ldx, cols, acc + r, n_rows);
    for (; r + 2 <= n_rows; r += 2) dot_tile(w + r * stride, stride, 1, n_blocks, x, ldx, cols, acc + r, n_rows);
    for (int c = 0; r < n_rows && c < cols; c++)
        acc[(int64_t)c * n_rows + r] = dot_row(w + r * stride, n_blocks, x + c * ldx);
}

void bn_avx512_i2s_dot(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                       int32_t *acc) {
    int c = 0;
    for (; c + 8 <= n_cols; c += 8) dot_cols(w, k, n_rows, x + c * ldx, ldx, 8, acc + (int64_t)c * n_rows);
    for (; c + 2 <= n_cols; c += 2) dot_cols(w, k, n_rows, x + c * ldx, ldx, 2, acc + (int64_t)c * n_rows);
    for (int r = 0; c < n_cols && r < n_rows; r++)
        acc[(int64_t)c * n_rows + r] = dot_row(w + r * (k / 4), k / 128, x + c * ldx);
}

/* ---- float dots, 16 lanes ------------------------------------------------------------------------------- */

typedef __m512 vector;
enum { LANES = 16 };
static inline vector vector_zero(void) { return _mm512_setzero_ps(); }
static inline vector vector_load(const float *x) { return _mm512_loadu_ps(x); }
static inline vector vector_load_half(const uint16_t *x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
}
static inline vector vector_fma(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }

/* The first step of the halving tree over 16 lanes. */
static inline __attribute__((always_inline)) __m256 vector_join(const vector *s, int n_sums) {
    const __m512 v = n_sums == 1 ? s[0] : _mm512_add_ps(_mm512_add_ps(s[0], s[2]), _mm512_add_ps(s[1], s[3]));
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(v), high);
}

#include "dots_tiles.h"

DEFINE_DOTS(bn_avx512_dots_f16_w16, 4, 0)
DEFINE_DOTS(bn_avx512_dots_tiled_w16, 1, 0)

const bn_kernels bn_kernels_avx512vnni = {
    .name = "avx512vnni",
    .description = "AVX-512 F, BW, VL and VNNI, 512-bit",
    .available = bn_x86_has_avx512vnni,
    .tile_rows = 4,
    .tile_bytes = 16 << 10,
    .tile_cols = 16,
    .i2s_dot = bn_avx512_i2s_dot,
    .dots_f16 = {bn_avx2_dots_f16_w8, bn_avx512_dots_f16_w16, bn_avx2_dots_half_sums},
    .dots_tiled = {bn_avx2_dots_tiled_w8, bn_avx512_dots_tiled_w16},
    BN_AVX2_KERNELS,
};
