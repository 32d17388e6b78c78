/* AVX2 + FMA + F16C: the kernels over integers, and the family's table. The float kernels are in
 * kernels_avx2_float.c. Same results as kernels_scalar.c bit for bit; see there for what each
 * computes. */
#include "kernels_avx2.h"
#include "cpu_x86.h"
#include "numerics.h"

/* ---- integer dot ---------------------------------------------------------------------------------------- */

/* A 16-bit lane gains at most 2 products of 2 * 127 per 32 elements, 4 times per block: 16
 * blocks reach 32512 (or -32768 at v = -128) and still fit. bitnet.cpp sums 32 blocks, which can
 * overflow. */
enum { BLOCKS_PER_FLUSH = 16 };

static inline __m256i flush_i16(__m256i acc_i32, __m256i acc_i16) {
    return _mm256_add_epi32(acc_i32, _mm256_madd_epi16(acc_i16, _mm256_set1_epi16(1)));
}

/* One row times one column: bound by memory. */
static int32_t dot_row(const uint8_t *w, int64_t n_blocks, const int8_t *x) {
    const __m256i mask = _mm256_set1_epi8(3);
    __m256i acc_i32 = _mm256_setzero_si256();
    for (int64_t b0 = 0; b0 < n_blocks; b0 += BLOCKS_PER_FLUSH) {
        const int64_t b1 = b0 + BLOCKS_PER_FLUSH < n_blocks ? b0 + BLOCKS_PER_FLUSH : n_blocks;
        __m256i acc_i16 = _mm256_setzero_si256();
        for (int64_t b = b0; b < b1; b++) {
            _mm_prefetch((const char *)(w + b * 32 + BN_PREFETCH_TERNARY), _MM_HINT_T0);
            const __m256i packed = bn_load_256(w + b * 32);
            const int8_t *v = x + b * 128;
            const __m256i w0 = _mm256_and_si256(_mm256_srli_epi16(packed, 6), mask);
            const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            const __m256i w2 = _mm256_and_si256(_mm256_srli_epi16(packed, 2), mask);
            const __m256i w3 = _mm256_and_si256(packed, mask);
            const __m256i s01 = _mm256_add_epi16(_mm256_maddubs_epi16(w0, bn_load_256(v)),
                                                 _mm256_maddubs_epi16(w1, bn_load_256(v + 32)));
            const __m256i s23 = _mm256_add_epi16(_mm256_maddubs_epi16(w2, bn_load_256(v + 64)),
                                                 _mm256_maddubs_epi16(w3, bn_load_256(v + 96)));
            acc_i16 = _mm256_add_epi16(acc_i16, _mm256_add_epi16(s01, s23));
        }
        acc_i32 = flush_i16(acc_i32, acc_i16);
    }
    return bn_sum_i32x8(acc_i32);
}

/* One row times several columns, bound by arithmetic: each unpacking of the weights serves all
 * of them. */
static inline __attribute__((always_inline)) void dot_cols(const uint8_t *w, int64_t n_blocks, const int8_t *x,
                                                           int64_t ldx, int cols, int32_t *acc, int64_t ldacc) {
    const __m256i mask = _mm256_set1_epi8(3);
    __m256i acc_i32[4];
    for (int c = 0; c < cols; c++) acc_i32[c] = _mm256_setzero_si256();
    for (int64_t b0 = 0; b0 < n_blocks; b0 += BLOCKS_PER_FLUSH) {
        const int64_t b1 = b0 + BLOCKS_PER_FLUSH < n_blocks ? b0 + BLOCKS_PER_FLUSH : n_blocks;
        __m256i acc_i16[4];
        for (int c = 0; c < cols; c++) acc_i16[c] = _mm256_setzero_si256();
        for (int64_t b = b0; b < b1; b++) {
            const __m256i packed = bn_load_256(w + b * 32);
            const __m256i w0 = _mm256_and_si256(_mm256_srli_epi16(packed, 6), mask);
            const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            const __m256i w2 = _mm256_and_si256(_mm256_srli_epi16(packed, 2), mask);
            const __m256i w3 = _mm256_and_si256(packed, mask);
            for (int c = 0; c < cols; c++) {
                const int8_t *v = x + c * ldx + b * 128;
                const __m256i s01 = _mm256_add_epi16(_mm256_maddubs_epi16(w0, bn_load_256(v)),
                                                     _mm256_maddubs_epi16(w1, bn_load_256(v + 32)));
                const __m256i s23 = _mm256_add_epi16(_mm256_maddubs_epi16(w2, bn_load_256(v + 64)),
                                                     _mm256_maddubs_epi16(w3, bn_load_256(v + 96)));
                acc_i16[c] = _mm256_add_epi16(acc_i16[c], _mm256_add_epi16(s01, s23));
            }
        }
        for (int c = 0; c < cols; c++) acc_i32[c] = flush_i16(acc_i32[c], acc_i16[c]);
    }
    for (int c = 0; c < cols; c++) acc[c * ldacc] = bn_sum_i32x8(acc_i32[c]);
}

static void i2s_dot(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                    int32_t *acc) {
    const int64_t stride = k / 4, n_blocks = k / 128;
    int c = 0;
    for (; c + 4 <= n_cols; c += 4)
        for (int r = 0; r < n_rows; r++)
            dot_cols(w + r * stride, n_blocks, x + c * ldx, ldx, 4, acc + (int64_t)c * n_rows + r, n_rows);
    for (; c < n_cols; c++)
        for (int r = 0; r < n_rows; r++)
            acc[(int64_t)c * n_rows + r] = dot_row(w + r * stride, n_blocks, x + c * ldx);
}

/* ---- activation quantiser ------------------------------------------------------------------------------- */

static inline __m256i quantize_8(const float *x, __m256 s, int quantizer) {
    const __m256 v = _mm256_loadu_ps(x);
    if (quantizer == BN_QUANTIZE_MAIN) {
        /* truncating p + copysign(0.5 - 2^-25, p) rounds half away from zero while |p| < 2^22 */
        const __m256 p = _mm256_mul_ps(v, s), sign = _mm256_and_ps(p, _mm256_set1_ps(-0.0f));
        return _mm256_cvttps_epi32(_mm256_add_ps(p, _mm256_or_ps(sign, _mm256_set1_ps(0x1.fffffep-2f))));
    }
    const __m256 magic = _mm256_set1_ps(12582912.0f);
    const __m256 t = quantizer == BN_QUANTIZE_MARCH_FUSED ? _mm256_fmadd_ps(v, s, magic)
                                                          : _mm256_add_ps(_mm256_mul_ps(v, s), magic);
    return _mm256_sub_epi32(_mm256_and_si256(_mm256_castps_si256(t), _mm256_set1_epi32(0x007fffff)),
                            _mm256_set1_epi32(0x00400000));
}

static inline __attribute__((always_inline)) void quantize(const float *x, int64_t n, int quantizer, int8_t *q,
                                                           float *scale, int32_t *sum) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const int64_t full = n - n % 32;
    __m256 top8 = _mm256_setzero_ps(), nan8 = _mm256_setzero_ps();
    for (int64_t i = 0; i < full; i += 8) {
        const __m256 v = _mm256_and_ps(_mm256_loadu_ps(x + i), magnitude);
        top8 = _mm256_max_ps(v, top8);
        nan8 = _mm256_or_ps(nan8, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    float lanes[8], top = 0;
    _mm256_storeu_ps(lanes, top8);
    for (int l = 0; l < 8; l++) top = lanes[l] > top ? lanes[l] : top;
    int has_nan = _mm256_movemask_ps(nan8);
    for (int64_t i = full; i < n; i++) {
        top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
        has_nan |= isnan(x[i]);
    }

    float s;
    if (quantizer == BN_QUANTIZE_MAIN) {
        s = 127.0f / top;
        if (has_nan || s == 0 || isinf(s)) { /* zeros, or too small, or not finite */
            bn_kernels_scalar.quantize[quantizer](x, n, q, scale, sum);
            return;
        }
    } else {
        s = (float)(127.0 / ((double)top > 1e-5 ? (double)top : 1e-5));
    }
    const __m256 s8 = _mm256_set1_ps(s);
    const __m256i low = _mm256_set1_epi32(-128), high = _mm256_set1_epi32(127);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i sum_i32 = _mm256_setzero_si256();
    for (int64_t i = 0; i < full; i += 32) {
        __m256i v[4];
        for (int j = 0; j < 4; j++) {
            v[j] = _mm256_min_epi32(_mm256_max_epi32(quantize_8(x + i + 8 * j, s8, quantizer), low), high);
            sum_i32 = _mm256_add_epi32(sum_i32, v[j]);
        }
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        _mm256_storeu_si256((__m256i *)(q + i), _mm256_permutevar8x32_epi32(packed, order));
    }
    int32_t total = bn_sum_i32x8(sum_i32);
    for (int64_t i = full; i < n; i++) {
        int32_t v;
        if (quantizer == BN_QUANTIZE_MAIN) {
            v = (int32_t)roundf(x[i] * s);
        } else {
            const float t =
                quantizer == BN_QUANTIZE_MARCH_FUSED ? fmaf(x[i], s, 12582912.0f) : x[i] * s + 12582912.0f;
            v = (int32_t)(bn_bits(t) & 0x007fffff) - 0x00400000;
        }
        v = v > 127 ? 127 : v < -128 ? -128 : v;
        q[i] = (int8_t)v;
        total += v;
    }
    *scale = s;
    *sum = total;
}

void bn_avx2_quantize_march(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum) {
    quantize(x, n, BN_QUANTIZE_MARCH, q, scale, sum);
}

void bn_avx2_quantize_march_fused(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum) {
    quantize(x, n, BN_QUANTIZE_MARCH_FUSED, q, scale, sum);
}

void bn_avx2_quantize_main(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum) {
    quantize(x, n, BN_QUANTIZE_MAIN, q, scale, sum);
}

/* ---- screen of the head ---------------------------------------------------------------------------------- */

void bn_avx2_screen_row(const uint16_t *row, int64_t n, int8_t *codes, float *scale, float *error, float *norm) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 top8 = _mm256_setzero_ps();
    /* the maximum with a NaN is its second operand; a NaN in the row has to stay */
    __m256 nan8 = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
        if (i % 32 == 0) _mm_prefetch((const char *)(row + i) + BN_PREFETCH_HALF, _MM_HINT_T0);
        const __m256 a = _mm256_and_ps(bn_load_half_8(row + i), magnitude);
        top8 = _mm256_max_ps(a, top8);
        nan8 = _mm256_or_ps(nan8, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    }
    float lanes[8], top = 0;
    _mm256_storeu_ps(lanes, top8);
    for (int l = 0; l < 8; l++) top = lanes[l] > top ? lanes[l] : top;
    if (_mm256_movemask_ps(nan8)) top = NAN;

    const __m256 inverse = _mm256_set1_ps(top > 0 ? 127.0f / top : 0.0f), step = _mm256_set1_ps(top / 127.0f);
    const __m256 limit = _mm256_set1_ps(127.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256 error_squares = _mm256_setzero_ps();
    __m256i code_squares = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 32) {
        __m256i code[4];
        for (int j = 0; j < 4; j++) {
            const __m256 a = bn_load_half_8(row + i + 8 * j);
            const __m256 c =
                _mm256_round_ps(_mm256_mul_ps(a, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            const __m256 usable = _mm256_cmp_ps(_mm256_and_ps(c, magnitude), limit, _CMP_LE_OQ);
            code[j] = _mm256_cvtps_epi32(_mm256_and_ps(c, usable));
            const __m256 e = _mm256_fnmadd_ps(step, _mm256_cvtepi32_ps(code[j]), a);
            error_squares = _mm256_fmadd_ps(e, e, error_squares);
        }
        const __m256i low = _mm256_packs_epi32(code[0], code[1]), high = _mm256_packs_epi32(code[2], code[3]);
        code_squares = _mm256_add_epi32(code_squares, _mm256_madd_epi16(low, low));
        code_squares = _mm256_add_epi32(code_squares, _mm256_madd_epi16(high, high));
        const __m256i packed = _mm256_packs_epi16(low, high);
        _mm256_storeu_si256((__m256i *)(codes + i), _mm256_permutevar8x32_epi32(packed, order));
    }
    bn_finish_screen_row(top, bn_sum_halving_8(error_squares), bn_sum_i32x8(code_squares), n, scale, error, norm);
}

void bn_avx2_screen_dots(const int8_t *codes, int64_t n_rows, const int16_t *x, int64_t n, int32_t *out) {
    for (int64_t r = 0; r < n_rows; r++, codes += n) {
        __m256i s0 = _mm256_setzero_si256(), s1 = s0;
        for (int64_t i = 0; i < n; i += 32) {
            _mm_prefetch((const char *)(codes + i) + BN_PREFETCH_CODES, _MM_HINT_T0);
            const __m256i c0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i)));
            const __m256i c1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i + 16)));
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(c0, bn_load_256(x + i)));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(c1, bn_load_256(x + i + 16)));
        }
        out[r] = bn_sum_i32x8(_mm256_add_epi32(s0, s1));
    }
}

/* ---- the family ------------------------------------------------------------------------------------------- */

const bn_kernels bn_kernels_avx2 = {
    .name = "avx2",
    .description = "AVX2, FMA and F16C, 256-bit",
    .available = bn_x86_has_avx2,
    .tile_rows = 4,
    .tile_bytes = 16 << 10,
    .tile_cols = 16,
    .i2s_dot = i2s_dot,
    .dots_f16 = {bn_avx2_dots_f16_w8, bn_avx2_dots_f16_w16, bn_avx2_dots_half_sums},
    .dots_tiled = {bn_avx2_dots_tiled_w8, bn_avx2_dots_tiled_w16},
    BN_AVX2_KERNELS,
};
