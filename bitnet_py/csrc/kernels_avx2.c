/* AVX2 + FMA + F16C kernels. Same results as kernels_scalar.c bit for bit; see there for what each computes. */
#include "kernels_avx2.h"
#include "kernels.h"
#include "kernels_x86.h"
#include "numerics.h"

#include <immintrin.h>

/* ---- integer dot ---------------------------------------------------------------------------------------- */

static inline int32_t sum_i32x8(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(s);
}

/* A 16-bit lane gains at most 2 products of 2 * 127 per 32 elements, 4 times per block: 16 blocks reach 32512
 * (or -32768 at v = -128) and still fit. bitnet.cpp sums 32 blocks and can wrap. */
enum { BLOCKS_PER_FLUSH = 16 };

static inline __m256i flush_i16(__m256i acc_i32, __m256i acc_i16) {
    return _mm256_add_epi32(acc_i32, _mm256_madd_epi16(acc_i16, _mm256_set1_epi16(1)));
}

static inline __m256i load(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

/* One row times one column: bound by memory. */
static int32_t dot_row(const uint8_t *w, int64_t n_blocks, const int8_t *x) {
    const __m256i mask = _mm256_set1_epi8(3);
    __m256i acc_i32 = _mm256_setzero_si256();
    for (int64_t b0 = 0; b0 < n_blocks; b0 += BLOCKS_PER_FLUSH) {
        const int64_t b1 = b0 + BLOCKS_PER_FLUSH < n_blocks ? b0 + BLOCKS_PER_FLUSH : n_blocks;
        __m256i acc_i16 = _mm256_setzero_si256();
        for (int64_t b = b0; b < b1; b++) {
            _mm_prefetch((const char *)(w + b * 32 + BN_PREFETCH_TERNARY), _MM_HINT_T0);
            const __m256i packed = load(w + b * 32);
            const int8_t *v = x + b * 128;
            const __m256i w0 = _mm256_and_si256(_mm256_srli_epi16(packed, 6), mask);
            const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            const __m256i w2 = _mm256_and_si256(_mm256_srli_epi16(packed, 2), mask);
            const __m256i w3 = _mm256_and_si256(packed, mask);
            const __m256i s01 =
                _mm256_add_epi16(_mm256_maddubs_epi16(w0, load(v)), _mm256_maddubs_epi16(w1, load(v + 32)));
            const __m256i s23 =
                _mm256_add_epi16(_mm256_maddubs_epi16(w2, load(v + 64)), _mm256_maddubs_epi16(w3, load(v + 96)));
            acc_i16 = _mm256_add_epi16(acc_i16, _mm256_add_epi16(s01, s23));
        }
        acc_i32 = flush_i16(acc_i32, acc_i16);
    }
    return sum_i32x8(acc_i32);
}

/* One row times several columns, bound by arithmetic: each unpacking of the weights serves all of them. */
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
            const __m256i packed = _mm256_loadu_si256((const __m256i *)(w + b * 32));
            const __m256i w0 = _mm256_and_si256(_mm256_srli_epi16(packed, 6), mask);
            const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            const __m256i w2 = _mm256_and_si256(_mm256_srli_epi16(packed, 2), mask);
            const __m256i w3 = _mm256_and_si256(packed, mask);
            for (int c = 0; c < cols; c++) {
                const __m256i *v = (const __m256i *)(x + c * ldx + b * 128);
                const __m256i s01 = _mm256_add_epi16(_mm256_maddubs_epi16(w0, _mm256_loadu_si256(v)),
                                                     _mm256_maddubs_epi16(w1, _mm256_loadu_si256(v + 1)));
                const __m256i s23 = _mm256_add_epi16(_mm256_maddubs_epi16(w2, _mm256_loadu_si256(v + 2)),
                                                     _mm256_maddubs_epi16(w3, _mm256_loadu_si256(v + 3)));
                acc_i16[c] = _mm256_add_epi16(acc_i16[c], _mm256_add_epi16(s01, s23));
            }
        }
        for (int c = 0; c < cols; c++) acc_i32[c] = flush_i16(acc_i32[c], acc_i16[c]);
    }
    for (int c = 0; c < cols; c++) acc[c * ldacc] = sum_i32x8(acc_i32[c]);
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

static inline __m256i quantize_8(const float *x, __m256 s, int fused) {
    const __m256 magic = _mm256_set1_ps(12582912.0f);
    const __m256 v = _mm256_loadu_ps(x);
    const __m256 t = fused ? _mm256_fmadd_ps(v, s, magic) : _mm256_add_ps(_mm256_mul_ps(v, s), magic);
    return _mm256_sub_epi32(_mm256_and_si256(_mm256_castps_si256(t), _mm256_set1_epi32(0x007fffff)),
                            _mm256_set1_epi32(0x00400000));
}

void bn_avx2_quantize(const float *x, int64_t n, int fused, int8_t *q, float *scale, int32_t *sum) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const int64_t full = n - n % 32;
    __m256 top8 = _mm256_setzero_ps();
    for (int64_t i = 0; i < full; i += 8)
        top8 = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(x + i), magnitude), top8);
    float lanes[8], top = 0;
    _mm256_storeu_ps(lanes, top8);
    for (int l = 0; l < 8; l++) top = lanes[l] > top ? lanes[l] : top;
    for (int64_t i = full; i < n; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;

    const float s = (float)(127.0 / ((double)top > 1e-5 ? (double)top : 1e-5));
    const __m256 s8 = _mm256_set1_ps(s);
    const __m256i low = _mm256_set1_epi32(-128), high = _mm256_set1_epi32(127);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i sum_i32 = _mm256_setzero_si256();
    for (int64_t i = 0; i < full; i += 32) {
        __m256i v[4];
        for (int j = 0; j < 4; j++) {
            v[j] = _mm256_min_epi32(_mm256_max_epi32(quantize_8(x + i + 8 * j, s8, fused), low), high);
            sum_i32 = _mm256_add_epi32(sum_i32, v[j]);
        }
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        _mm256_storeu_si256((__m256i *)(q + i), _mm256_permutevar8x32_epi32(packed, order));
    }
    int32_t total = sum_i32x8(sum_i32);
    for (int64_t i = full; i < n; i++) {
        const float t = fused ? fmaf(x[i], s, 12582912.0f) : x[i] * s + 12582912.0f;
        int32_t v = (int32_t)(bn_bits(t) & 0x007fffff) - 0x00400000;
        v = v > 127 ? 127 : v < -128 ? -128 : v;
        q[i] = (int8_t)v;
        total += v;
    }
    *scale = s;
    *sum = total;
}

/* ---- float dots ----------------------------------------------------------------------------------------- */

static inline __m256 load_half_8(const uint16_t *a) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)a));
}

/* Halving tree over 8 lanes: +4, +2, +1. */
static inline float sum_halving_8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float finish_f16(float reduced, const uint16_t *a, const float *b, int64_t full, int64_t n) {
    if (full == n) return reduced;
    double total = reduced;
    for (int64_t i = full; i < n; i++) total += (double)_cvtsh_ss(a[i]) * (double)b[i];
    return (float)total;
}

void bn_avx2_dots_f16_w8(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t n, float *out) {
    const int64_t full = n - n % 32;
    for (int64_t r = 0; r < n_rows; r++, a += lda) {
        __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
        for (int64_t i = 0; i < full; i += 32) {
            _mm_prefetch((const char *)(a + i) + BN_PREFETCH_HALF, _MM_HINT_T0);
            s0 = _mm256_fmadd_ps(load_half_8(a + i), _mm256_loadu_ps(b + i), s0);
            s1 = _mm256_fmadd_ps(load_half_8(a + i + 8), _mm256_loadu_ps(b + i + 8), s1);
            s2 = _mm256_fmadd_ps(load_half_8(a + i + 16), _mm256_loadu_ps(b + i + 16), s2);
            s3 = _mm256_fmadd_ps(load_half_8(a + i + 24), _mm256_loadu_ps(b + i + 24), s3);
        }
        s0 = _mm256_add_ps(_mm256_add_ps(s0, s2), _mm256_add_ps(s1, s3));
        /* this build adds adjacent pairs, unlike every other reduction */
        __m128 t = _mm_add_ps(_mm256_castps256_ps128(s0), _mm256_extractf128_ps(s0, 1));
        t = _mm_hadd_ps(t, t);
        out[r] = finish_f16(_mm_cvtss_f32(_mm_hadd_ps(t, t)), a, b, full, n);
    }
}

/* Sixteen lanes in two registers. */
static void dots_f16_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t n, float *out) {
    const int64_t full = n - n % 64;
    for (int64_t r = 0; r < n_rows; r++, a += lda) {
        __m256 lo[4], hi[4];
        for (int j = 0; j < 4; j++) lo[j] = hi[j] = _mm256_setzero_ps();
        for (int64_t i = 0; i < full; i += 64) {
            for (int j = 0; j < 4; j++) {
                const int64_t e = i + 16 * j;
                lo[j] = _mm256_fmadd_ps(load_half_8(a + e), _mm256_loadu_ps(b + e), lo[j]);
                hi[j] = _mm256_fmadd_ps(load_half_8(a + e + 8), _mm256_loadu_ps(b + e + 8), hi[j]);
            }
        }
        const __m256 l = _mm256_add_ps(_mm256_add_ps(lo[0], lo[2]), _mm256_add_ps(lo[1], lo[3]));
        const __m256 h = _mm256_add_ps(_mm256_add_ps(hi[0], hi[2]), _mm256_add_ps(hi[1], hi[3]));
        out[r] = finish_f16(sum_halving_8(_mm256_add_ps(l, h)), a, b, full, n);
    }
}

/* One accumulator per output as the reference has; four outputs at once hide the latency of the FMA. */
void bn_avx2_dots_tiled_w8(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t n, float *out) {
    int64_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        const uint16_t *row = a + r * lda;
        __m256 s[4];
        for (int j = 0; j < 4; j++) s[j] = _mm256_setzero_ps();
        for (int64_t i = 0; i < n; i += 8) {
            const __m256 v = _mm256_loadu_ps(b + i);
            for (int j = 0; j < 4; j++) s[j] = _mm256_fmadd_ps(load_half_8(row + j * lda + i), v, s[j]);
        }
        for (int j = 0; j < 4; j++) out[r + j] = sum_halving_8(s[j]);
    }
    for (; r < n_rows; r++) {
        __m256 s = _mm256_setzero_ps();
        for (int64_t i = 0; i < n; i += 8)
            s = _mm256_fmadd_ps(load_half_8(a + r * lda + i), _mm256_loadu_ps(b + i), s);
        out[r] = sum_halving_8(s);
    }
}

static void dots_tiled_w16(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t n, float *out) {
    int64_t r = 0;
    for (; r + 4 <= n_rows; r += 4) {
        const uint16_t *row = a + r * lda;
        __m256 lo[4], hi[4];
        for (int j = 0; j < 4; j++) lo[j] = hi[j] = _mm256_setzero_ps();
        for (int64_t i = 0; i < n; i += 16) {
            const __m256 v0 = _mm256_loadu_ps(b + i), v1 = _mm256_loadu_ps(b + i + 8);
            for (int j = 0; j < 4; j++) {
                lo[j] = _mm256_fmadd_ps(load_half_8(row + j * lda + i), v0, lo[j]);
                hi[j] = _mm256_fmadd_ps(load_half_8(row + j * lda + i + 8), v1, hi[j]);
            }
        }
        for (int j = 0; j < 4; j++) out[r + j] = sum_halving_8(_mm256_add_ps(lo[j], hi[j]));
    }
    for (; r < n_rows; r++) {
        __m256 lo = _mm256_setzero_ps(), hi = lo;
        for (int64_t i = 0; i < n; i += 16) {
            lo = _mm256_fmadd_ps(load_half_8(a + r * lda + i), _mm256_loadu_ps(b + i), lo);
            hi = _mm256_fmadd_ps(load_half_8(a + r * lda + i + 8), _mm256_loadu_ps(b + i + 8), hi);
        }
        out[r] = sum_halving_8(_mm256_add_ps(lo, hi));
    }
}

/* ---- screen of the head ---------------------------------------------------------------------------------- */

void bn_avx2_screen_row(const uint16_t *row, int64_t n, int8_t *codes, float *scale, float *error, float *norm) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 top8 = _mm256_setzero_ps();
    /* the maximum with a NaN is its second operand; a NaN in the row has to stay */
    __m256 nan8 = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
        if (i % 32 == 0) _mm_prefetch((const char *)(row + i) + BN_PREFETCH_HALF, _MM_HINT_T0);
        const __m256 a = _mm256_and_ps(load_half_8(row + i), magnitude);
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
            const __m256 a = load_half_8(row + i + 8 * j);
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
    bn_finish_screen_row(top, sum_halving_8(error_squares), sum_i32x8(code_squares), n, scale, error, norm);
}

void bn_avx2_screen_dots(const int8_t *codes, int64_t n_rows, const int16_t *x, int64_t n, int32_t *out) {
    for (int64_t r = 0; r < n_rows; r++, codes += n) {
        __m256i s0 = _mm256_setzero_si256(), s1 = s0;
        for (int64_t i = 0; i < n; i += 32) {
            _mm_prefetch((const char *)(codes + i) + BN_PREFETCH_CODES, _MM_HINT_T0);
            const __m256i c0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i)));
            const __m256i c1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i + 16)));
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(c0, load(x + i)));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(c1, load(x + i + 16)));
        }
        out[r] = sum_i32x8(_mm256_add_epi32(s0, s1));
    }
}

/* ---- softmax -------------------------------------------------------------------------------------------- */

/* Eight exponentials at once where no result is scaled out of the normal range; the rest one by one. */
static inline __m256 exp_8(__m256 x, int wide) {
    const __m256 magic = _mm256_set1_ps(0x1.8p23f);
    const __m256 z = _mm256_fmadd_ps(x, _mm256_set1_ps(0x1.715476p+0f), magic);
    const __m256 n = _mm256_sub_ps(z, magic);
    const __m256 b =
        _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x));
    const __m256 u = _mm256_mul_ps(b, b);
    const __m256 h =
        _mm256_fmadd_ps(_mm256_fmadd_ps(_mm256_set1_ps(0x1.0e4020p-7f), b, _mm256_set1_ps(0x1.573e2ep-5f)), u,
                        _mm256_fmadd_ps(_mm256_set1_ps(0x1.555e66p-3f), b, _mm256_set1_ps(0x1.fffdb6p-2f)));
    const __m256 c1 = _mm256_set1_ps(0x1.ffffecp-1f);
    const __m256i e = _mm256_slli_epi32(_mm256_castps_si256(z), 23);
    const __m256 k = _mm256_castsi256_ps(_mm256_add_epi32(e, _mm256_castps_si256(_mm256_set1_ps(1.0f))));
    if (wide) {
        const __m256 j = _mm256_fmadd_ps(h, u, _mm256_fmadd_ps(c1, b, _mm256_set1_ps(1.0f)));
        return _mm256_mul_ps(j, k);
    }
    const __m256 j = _mm256_fmadd_ps(h, u, _mm256_mul_ps(c1, b));
    return _mm256_fmadd_ps(k, j, k);
}

/* exp(x) stays normal, and 2^n too, for x > -86 (n >= -124). */
static inline __m256 exp_group(const float *x, __m256 top, int wide) {
    const __m256 v = _mm256_sub_ps(_mm256_loadu_ps(x), top);
    if (_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(-86.0f), _CMP_GT_OQ)) == 0xff) return exp_8(v, wide);
    float lanes[8];
    _mm256_storeu_ps(lanes, v);
    for (int l = 0; l < 8; l++) lanes[l] = wide ? bn_exp_w16(lanes[l]) : bn_exp_w8(lanes[l]);
    return _mm256_loadu_ps(lanes);
}

static inline __attribute__((always_inline)) void softmax(float *row, int64_t n_visible, int64_t n_padded,
                                                          float scale, int wide) {
    const int width = wide ? 16 : 8;
    /* the padding up to the next group takes part as -inf, whose exponential is an exact 0 */
    const int64_t n_groups = (n_visible + width - 1) / width * width;
    float top = -INFINITY;
    const __m256 scale8 = _mm256_set1_ps(scale), zero8 = _mm256_setzero_ps();
    __m256 top8 = _mm256_set1_ps(-INFINITY);
    int64_t i = 0;
    for (; i + 8 <= n_visible; i += 8) {
        const __m256 v = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(row + i), scale8), zero8);
        _mm256_storeu_ps(row + i, v);
        top8 = _mm256_max_ps(v, top8);
    }
    float lanes[8];
    _mm256_storeu_ps(lanes, top8);
    for (int l = 0; l < 8; l++) top = lanes[l] > top ? lanes[l] : top;
    for (; i < n_visible; i++) {
        row[i] = row[i] * scale + 0.0f;
        top = row[i] > top ? row[i] : top;
    }
    for (; i < n_groups; i++) row[i] = -INFINITY;

    top8 = _mm256_set1_ps(top);
    double sum = 0;
    for (i = 0; i < n_groups; i += width) {
        __m256 e = exp_group(row + i, top8, wide);
        _mm256_storeu_ps(row + i, e);
        if (wide) {
            const __m256 high = exp_group(row + i + 8, top8, wide);
            _mm256_storeu_ps(row + i + 8, high);
            e = _mm256_add_ps(e, high);
        }
        sum += (double)sum_halving_8(e);
    }
    const float inverse = (float)(1.0 / sum);
    const __m256 inverse8 = _mm256_set1_ps(inverse);
    for (i = 0; i < n_groups; i += 8) _mm256_storeu_ps(row + i, _mm256_mul_ps(_mm256_loadu_ps(row + i), inverse8));
    for (i = n_visible; i < n_padded; i++) row[i] = 0.0f;
}

void bn_avx2_softmax_w8(float *row, int64_t n_visible, int64_t n_padded, float scale) {
    softmax(row, n_visible, n_padded, scale, 0);
}

void bn_avx2_softmax_w16(float *row, int64_t n_visible, int64_t n_padded, float scale) {
    softmax(row, n_visible, n_padded, scale, 1);
}

/* ---- element-wise --------------------------------------------------------------------------------------- */

void bn_avx2_rope(const float *x, const float *cos, const float *sin, int half, float *out) {
    int i = 0;
    for (; i + 8 <= half; i += 8) {
        const __m256 x0 = _mm256_loadu_ps(x + i), x1 = _mm256_loadu_ps(x + i + half);
        const __m256 c = _mm256_loadu_ps(cos + i), s = _mm256_loadu_ps(sin + i);
        _mm256_storeu_ps(out + i, _mm256_fmsub_ps(x0, c, _mm256_mul_ps(x1, s)));
        _mm256_storeu_ps(out + i + half, _mm256_fmadd_ps(x0, s, _mm256_mul_ps(x1, c)));
    }
    for (; i < half; i++) {
        const float x0 = x[i], x1 = x[i + half];
        out[i] = fmaf(x0, cos[i], -(x1 * sin[i]));
        out[i + half] = fmaf(x0, sin[i], x1 * cos[i]);
    }
}

void bn_avx2_gated_relu_squared(const float *gate, const float *up, int64_t n, float *act, float *prod) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        /* the maximum with a NaN is its second operand: 0, as in the scalar comparison */
        const __m256 relu = _mm256_max_ps(_mm256_loadu_ps(gate + i), _mm256_setzero_ps());
        const __m256 squared = _mm256_mul_ps(relu, relu);
        _mm256_storeu_ps(act + i, squared);
        _mm256_storeu_ps(prod + i, _mm256_mul_ps(squared, _mm256_loadu_ps(up + i)));
    }
    bn_kernels_scalar.gated_relu_squared(gate + i, up + i, n - i, act + i, prod + i);
}

void bn_avx2_rescale(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                     float *out) {
    const __m256 sum8 = _mm256_set1_ps(sum), divisor = _mm256_set1_ps(activation_scale);
    const __m256 factor = _mm256_set1_ps(weight_scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 d = _mm256_sub_ps(_mm256_cvtepi32_ps(load(acc + i)), sum8);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_div_ps(d, divisor), factor));
    }
    bn_kernels_scalar.rescale(acc + i, n - i, sum, activation_scale, weight_scale, out + i);
}

void bn_avx2_to_f16(const float *x, int64_t n, uint16_t *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) out[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

void bn_avx2_from_f16(const uint16_t *x, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_half_8(x + i));
    for (; i < n; i++) out[i] = _cvtsh_ss(x[i]);
}

const bn_kernels bn_kernels_avx2 = {
    .name = "avx2",
    .description = "AVX2, FMA and F16C, 256-bit",
    .available = bn_x86_has_avx2,
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
