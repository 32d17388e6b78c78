/* AVX2 + FMA + F16C: the kernels over floats. Same results as kernels_scalar.c bit for bit; see
 * there for what each computes. */
#include "kernels_avx2.h"
#include "numerics.h"

#include <immintrin.h>

/* ---- float dots ----------------------------------------------------------------------------------------- */

typedef __m256 vector;
enum { LANES = 8 };
static inline vector vector_zero(void) { return _mm256_setzero_ps(); }
static inline vector vector_load(const float *x) { return _mm256_loadu_ps(x); }
static inline vector vector_load_half(const uint16_t *x) { return bn_load_half_8(x); }
static inline vector vector_fma(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }

static inline __attribute__((always_inline)) __m256 vector_join(const vector *s, int n_sums) {
    if (n_sums == 1) return s[0];
    if (n_sums == 2) return _mm256_add_ps(s[0], s[1]); /* sixteen lanes are two vectors */
    if (n_sums == 4) return _mm256_add_ps(_mm256_add_ps(s[0], s[2]), _mm256_add_ps(s[1], s[3]));
    const __m256 low = _mm256_add_ps(_mm256_add_ps(s[0], s[4]), _mm256_add_ps(s[2], s[6]));
    const __m256 high = _mm256_add_ps(_mm256_add_ps(s[1], s[5]), _mm256_add_ps(s[3], s[7]));
    return _mm256_add_ps(low, high);
}

#include "dots_tiles.h"

/* bitnet.cpp's AVX2 build adds adjacent pairs here, unlike every other reduction. */
DEFINE_DOTS(bn_avx2_dots_f16_w8, 4, 1)
DEFINE_DOTS(bn_avx2_dots_f16_w16, 8, 0)
DEFINE_DOTS(bn_avx2_dots_tiled_w8, 1, 0)
DEFINE_DOTS(bn_avx2_dots_tiled_w16, 2, 0)

/* ---- softmax -------------------------------------------------------------------------------------------- */

/* Eight exponentials at once where no result is scaled out of the normal range; the others one at
 * a time. */
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

/* e^x, the value and 2^n stay normal for |x| < 86 (|n| <= 124). */
static inline __m256 exp_any(__m256 x, int wide) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    if (_mm256_movemask_ps(_mm256_cmp_ps(magnitude, _mm256_set1_ps(86.0f), _CMP_LT_OQ)) == 0xff)
        return exp_8(x, wide);
    float lanes[8];
    _mm256_storeu_ps(lanes, x);
    for (int l = 0; l < 8; l++) lanes[l] = wide ? bn_exp_w16(lanes[l]) : bn_exp_w8(lanes[l]);
    return _mm256_loadu_ps(lanes);
}

static inline __attribute__((always_inline)) double exponentials(float *row, int64_t n, float top, int wide) {
    const __m256 top8 = _mm256_set1_ps(top);
    double sum = 0;
    for (int64_t i = 0; i < n; i += wide ? 16 : 8) {
        __m256 e = exp_any(_mm256_sub_ps(_mm256_loadu_ps(row + i), top8), wide);
        _mm256_storeu_ps(row + i, e);
        if (wide) {
            const __m256 high = exp_any(_mm256_sub_ps(_mm256_loadu_ps(row + i + 8), top8), wide);
            _mm256_storeu_ps(row + i + 8, high);
            e = _mm256_add_ps(e, high);
        }
        sum += (double)bn_sum_halving_8(e);
    }
    return sum;
}

double bn_avx2_exponentials_w8(float *row, int64_t n, float top) { return exponentials(row, n, top, 0); }

double bn_avx2_exponentials_w16(float *row, int64_t n, float top) { return exponentials(row, n, top, 1); }

static inline __attribute__((always_inline)) void softmax(float *row, int64_t n_visible, int64_t n_padded,
                                                          float scale, int wide) {
    const int width = wide ? 16 : 8;
    /* the padding up to the next group is -inf, whose exponential is exactly 0 */
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

    const float inverse = (float)(1.0 / exponentials(row, n_groups, top, wide));
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

void bn_avx2_rope_halves(const float *x, const float *cos, const float *sin, int half, float *out) {
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

void bn_avx2_rope_adjacent(const float *x, const float *cos, const float *sin, int half, float *out) {
    int i = 0;
    for (; i + 4 <= half; i += 4) {
        const __m128 c = _mm_loadu_ps(cos + i), s = _mm_loadu_ps(sin + i);
        const __m128 low = _mm_unpacklo_ps(c, s), high = _mm_unpackhi_ps(c, s);
        const __m256 cs = _mm256_set_m128(high, low);                     /* c0 s0 c1 s1 ... */
        const __m256 sc = _mm256_permute_ps(cs, _MM_SHUFFLE(2, 3, 0, 1)); /* s0 c0 s1 c1 ... */
        const __m256 pair = _mm256_loadu_ps(x + 2 * i);
        const __m256 x0 = _mm256_moveldup_ps(pair), x1 = _mm256_movehdup_ps(pair);
        _mm256_storeu_ps(out + 2 * i, _mm256_fmaddsub_ps(x0, cs, _mm256_mul_ps(x1, sc)));
    }
    for (; i < half; i++) {
        const float x0 = x[2 * i], x1 = x[2 * i + 1];
        out[2 * i] = fmaf(x0, cos[i], -(x1 * sin[i]));
        out[2 * i + 1] = fmaf(x0, sin[i], x1 * cos[i]);
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
    bn_kernels_scalar.gated[BN_RELU_SQUARED][0](gate + i, up + i, n - i, act + i, prod + i);
}

static inline __attribute__((always_inline)) void gated_silu(const float *gate, const float *up, int64_t n,
                                                             float *act, float *prod, int wide) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 e = exp_any(_mm256_sub_ps(_mm256_setzero_ps(), g), wide);
        const __m256 a = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
        _mm256_storeu_ps(act + i, a);
        _mm256_storeu_ps(prod + i, _mm256_mul_ps(a, _mm256_loadu_ps(up + i)));
    }
    bn_kernels_scalar.gated[BN_SILU][wide](gate + i, up + i, n - i, act + i, prod + i);
}

void bn_avx2_gated_silu_w8(const float *gate, const float *up, int64_t n, float *act, float *prod) {
    gated_silu(gate, up, n, act, prod, 0);
}

void bn_avx2_gated_silu_w16(const float *gate, const float *up, int64_t n, float *act, float *prod) {
    gated_silu(gate, up, n, act, prod, 1);
}

void bn_avx2_rescale_march(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                           float *out) {
    const __m256 sum8 = _mm256_set1_ps(sum), divisor = _mm256_set1_ps(activation_scale);
    const __m256 factor = _mm256_set1_ps(weight_scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 d = _mm256_sub_ps(_mm256_cvtepi32_ps(bn_load_256(acc + i)), sum8);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_div_ps(d, divisor), factor));
    }
    bn_kernels_scalar.rescale[BN_MARCH](acc + i, n - i, sum, activation_scale, weight_scale, out + i);
}

void bn_avx2_rescale_main(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                          float *out) {
    const __m256 sum8 = _mm256_set1_ps(sum), factor = _mm256_set1_ps(weight_scale / activation_scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 d = _mm256_sub_ps(_mm256_cvtepi32_ps(bn_load_256(acc + i)), sum8);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(d, factor));
    }
    bn_kernels_scalar.rescale[BN_MAIN](acc + i, n - i, sum, activation_scale, weight_scale, out + i);
}

/* ---- sums in binary16, of values kept in binary32 --------------------------------------------------------- */

static inline __m256 round_half(__m256 x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

/* bn_fma_half, eight at a time. */
static inline __m256 fma_half(__m256 a, __m256 b, __m256 c) {
    const __m256 product = _mm256_mul_ps(a, b), sum = _mm256_add_ps(product, c);
    const __m256 of_c = _mm256_sub_ps(sum, product);
    const __m256 error = _mm256_add_ps(_mm256_sub_ps(product, _mm256_sub_ps(sum, of_c)), _mm256_sub_ps(c, of_c));
    const __m256i u = _mm256_castps_si256(sum);
    const __m256i inexact = _mm256_castps_si256(_mm256_cmp_ps(error, _mm256_setzero_ps(), _CMP_NEQ_OQ));
    const __m256i is_odd = _mm256_srai_epi32(_mm256_slli_epi32(u, 31), 31);
    /* away from zero where error and sum have the same sign */
    const __m256i step = _mm256_or_si256(_mm256_srai_epi32(_mm256_castps_si256(_mm256_xor_ps(error, sum)), 31),
                                         _mm256_set1_epi32(1));
    const __m256i moved = _mm256_add_epi32(u, _mm256_and_si256(step, _mm256_andnot_si256(is_odd, inexact)));
    return round_half(_mm256_castsi256_ps(moved));
}

/* `n_steps` steps of 128: 4 sums of 32 lanes, which are 16 vectors, 8 at a time. */
static float dot_half_sums(const uint16_t *a, const float *b, int64_t n) {
    const int64_t full = n - n % 128;
    __m256 sums[16];
    for (int s0 = 0; s0 < 16; s0 += 8) {
        __m256 acc[8];
        for (int s = 0; s < 8; s++) acc[s] = _mm256_setzero_ps();
        for (int64_t i = 8 * s0; i < full; i += 128) {
            _mm_prefetch((const char *)(a + i) + BN_PREFETCH_HALF, _MM_HINT_T0);
            _mm_prefetch((const char *)(a + i + 32) + BN_PREFETCH_HALF, _MM_HINT_T0);
            for (int s = 0; s < 8; s++)
                acc[s] = fma_half(bn_load_half_8(a + i + 8 * s), _mm256_loadu_ps(b + i + 8 * s), acc[s]);
        }
        for (int s = 0; s < 8; s++) sums[s0 + s] = acc[s];
    }
    /* A0 += A2, A1 += A3, A0 += A1 of four vectors each, then lanes +16, +8, +4, +2, +1 */
    __m256 t[4];
    for (int s = 0; s < 4; s++)
        t[s] = round_half(_mm256_add_ps(round_half(_mm256_add_ps(sums[s], sums[8 + s])),
                                        round_half(_mm256_add_ps(sums[4 + s], sums[12 + s]))));
    const __m256 low = round_half(_mm256_add_ps(t[0], t[2])), high = round_half(_mm256_add_ps(t[1], t[3]));
    __m256 v = round_half(_mm256_add_ps(low, high));
    v = round_half(_mm256_add_ps(v, _mm256_permute2f128_ps(v, v, 1)));
    v = round_half(_mm256_add_ps(v, _mm256_shuffle_ps(v, v, _MM_SHUFFLE(1, 0, 3, 2))));
    v = round_half(_mm256_add_ps(v, _mm256_shuffle_ps(v, v, _MM_SHUFFLE(2, 3, 0, 1))));
    double total = (double)_mm256_cvtss_f32(v);
    for (int64_t i = full; i < n; i++) total += (double)_cvtsh_ss(a[i]) * (double)b[i];
    return (float)total;
}

void bn_avx2_dots_half_sums(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb,
                            int64_t n_cols, int64_t n, float *out, int64_t ldo) {
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t c = 0; c < n_cols; c++) out[c * ldo + r] = dot_half_sums(a + r * lda, b + c * ldb, n);
}

/* ---- flash attention -------------------------------------------------------------------------------------- */

void bn_avx2_weigh_half(float factor, const uint16_t *v, float weight, int64_t n, float *a) {
    const __m256 factor8 = _mm256_set1_ps(factor), weight8 = _mm256_set1_ps(weight);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(a + i);
        if (factor != 1.0f) x = round_half(_mm256_mul_ps(x, factor8));
        _mm256_storeu_ps(a + i, round_half(_mm256_fmadd_ps(bn_load_half_8(v + i), weight8, x)));
    }
    bn_kernels_scalar.weigh_half[0](factor, v + i, weight, n - i, a + i);
}

void bn_avx2_weigh_half_sums(float factor, const uint16_t *v, float weight, int64_t n, float *a) {
    const __m256 factor8 = round_half(_mm256_set1_ps(factor)), weight8 = round_half(_mm256_set1_ps(weight));
    const int64_t full = n - n % 128;
    for (int64_t i = 0; i < full; i += 8) {
        __m256 x = _mm256_loadu_ps(a + i);
        if (factor != 1.0f) x = round_half(_mm256_mul_ps(x, factor8));
        _mm256_storeu_ps(a + i, fma_half(bn_load_half_8(v + i), weight8, x));
    }
    bn_avx2_weigh_half(factor, v + full, weight, n - full, a + full);
}

/* Some rows of c times 16 columns, or 8, stay in registers over all of k. */
static inline __attribute__((always_inline)) void multiply_add_block(const float *a, int64_t lda, int rows,
                                                                     const float *b, int64_t k, int64_t n,
                                                                     int vectors, float *c, int64_t ldc) {
    __m256 acc[4][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) acc[r][v] = _mm256_loadu_ps(c + r * ldc + 8 * v);
    for (int64_t i = 0; i < k; i++) {
        __m256 x[2];
        for (int v = 0; v < vectors; v++) x[v] = _mm256_loadu_ps(b + i * n + 8 * v);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                acc[r][v] = _mm256_fmadd_ps(x[v], _mm256_broadcast_ss(a + r * lda + i), acc[r][v]);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) _mm256_storeu_ps(c + r * ldc + 8 * v, acc[r][v]);
}

static inline __attribute__((always_inline)) void multiply_add_rows(const float *a, int64_t lda, int rows,
                                                                    const float *b, int64_t k, int64_t n, float *c,
                                                                    int64_t ldc) {
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) multiply_add_block(a, lda, rows, b + j, k, n, 2, c + j, ldc);
    for (; j + 8 <= n; j += 8) multiply_add_block(a, lda, rows, b + j, k, n, 1, c + j, ldc);
    for (; j < n; j++)
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < k; i++) c[r * ldc + j] = fmaf(b[i * n + j], a[r * lda + i], c[r * ldc + j]);
}

void bn_avx2_multiply_add(const float *a, int64_t lda, int64_t n_rows, const float *b, int64_t k, int64_t n,
                          float *c, int64_t ldc) {
    int64_t r = 0;
    for (; r + 4 <= n_rows; r += 4) multiply_add_rows(a + r * lda, lda, 4, b, k, n, c + r * ldc, ldc);
    for (; r < n_rows; r++) multiply_add_rows(a + r * lda, lda, 1, b, k, n, c + r * ldc, ldc);
}

/* ---- conversions ------------------------------------------------------------------------------------------ */

void bn_avx2_to_f16(const float *x, int64_t n, uint16_t *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++) out[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

void bn_avx2_from_f16(const uint16_t *x, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, bn_load_half_8(x + i));
    for (; i < n; i++) out[i] = _cvtsh_ss(x[i]);
}
