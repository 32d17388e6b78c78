/* Scalar kernels: the specification of every kernel family, written for reading, compiled without
 * auto-vectorisation. Float reductions keep bitnet.cpp's lanes as arrays. */
#include "kernels.h"
#include "numerics.h"

static int always(void) { return 1; }

/* I2_S: byte p of a 32-byte block holds elements p, 32+p, 64+p, 96+p in bits 7-6, 5-4, 3-2, 1-0. */
static void i2s_dot(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                    int32_t *acc) {
    for (int c = 0; c < n_cols; c++) {
        for (int r = 0; r < n_rows; r++) {
            const uint8_t *row = w + (int64_t)r * (k / 4);
            const int8_t *col = x + c * ldx;
            int32_t sum = 0;
            for (int64_t block = 0; block < k / 128; block++) {
                for (int p = 0; p < 32; p++) {
                    const uint8_t byte = row[block * 32 + p];
                    const int8_t *v = col + block * 128 + p;
                    sum += (byte >> 6) * v[0] + ((byte >> 4) & 3) * v[32] + ((byte >> 2) & 3) * v[64] +
                           (byte & 3) * v[96];
                }
            }
            acc[(int64_t)c * n_rows + r] = sum;
        }
    }
}

/* bitnet.cpp of March, ggml-quants.c, quantize_row_i8_s. The maximum and the division are in
 * binary64; adding 1.5 * 2^23 rounds half to even; whether the product is rounded before that
 * addition depends on the compiler. */
static inline void quantize_march(const float *x, int64_t n, int fused, int8_t *q, float *scale, int32_t *sum) {
    float top = 0;
    for (int64_t i = 0; i < n; i++) {
        const float magnitude = fabsf(x[i]);
        if (magnitude > top) top = magnitude;
    }
    const float s = (float)(127.0 / ((double)top > 1e-5 ? (double)top : 1e-5));
    int32_t total = 0;
    for (int64_t i = 0; i < n; i++) {
        const float t = fused ? fmaf(x[i], s, 12582912.0f) : x[i] * s + 12582912.0f;
        int32_t v = (int32_t)(bn_bits(t) & 0x007fffff) - 0x00400000;
        v = v > 127 ? 127 : v < -128 ? -128 : v;
        q[i] = (int8_t)v;
        total += v;
    }
    *scale = s;
    *sum = total;
}

static void quantize_unfused(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum) {
    quantize_march(x, n, 0, q, scale, sum);
}

static void quantize_fused(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum) {
    quantize_march(x, n, 1, q, scale, sum);
}

/* bitnet.cpp's main, ggml-cpu/quants.c, quantize_row_i8_s. What is not finite follows from its
 * comparison, which forgets a NaN when a number comes after it, and from the conversion of x86,
 * which turns what no integer holds into the least one. */
static void quantize_main(const float *x, int64_t n, int8_t *q, float *scale, int32_t *sum) {
    float top = 0;
    for (int64_t i = 0; i < n; i++) {
        const float magnitude = fabsf(x[i]);
        top = top > magnitude ? top : magnitude;
    }
    const float s = top > 0 ? 127.0f / top : 0.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < n; i++) {
        const float rounded = roundf(x[i] * s); /* half away from zero */
        const int32_t v = !isfinite(rounded) || rounded < -128 ? -128 : rounded > 127 ? 127 : (int32_t)rounded;
        q[i] = (int8_t)v;
        total += v;
    }
    *scale = s;
    *sum = total;
}

/* llama.cpp ggml-quants.c, quantize_row_q8_K_ref. */
static inline void quantize_blocks(const float *x, int64_t n, int fused, int8_t *q, float *steps,
                                   int32_t *groups) {
    for (int64_t block = 0; block < n / BN_BLOCK; block++, x += BN_BLOCK, q += BN_BLOCK) {
        float top = 0, largest = 0;
        for (int i = 0; i < BN_BLOCK; i++) {
            const float magnitude = fabsf(x[i]);
            if (magnitude > top) top = magnitude, largest = x[i];
        }
        const float factor = -127.0f / largest;
        steps[block] = top > 0 ? 1.0f / factor : 0.0f;
        for (int i = 0; i < BN_BLOCK; i++) {
            const float t = fused ? fmaf(factor, x[i], 12582912.0f) : factor * x[i] + 12582912.0f;
            const int32_t v = (int32_t)(bn_bits(t) & 0x007fffff) - 0x00400000;
            q[i] = (int8_t)(!(top > 0) ? 0 : v > 127 ? 127 : v);
        }
        for (int g = 0; g < BN_BLOCK / BN_GROUP; g++) {
            int32_t sum = 0;
            for (int i = 0; i < BN_GROUP; i++) sum += q[g * BN_GROUP + i];
            groups[block * (BN_BLOCK / BN_GROUP) + g] = sum;
        }
    }
}

void bn_scalar_quantize_blocks(const float *x, int64_t n, int8_t *q, float *steps, int32_t *groups) {
    quantize_blocks(x, n, 0, q, steps, groups);
}

void bn_scalar_quantize_blocks_fused(const float *x, int64_t n, int8_t *q, float *steps, int32_t *groups) {
    quantize_blocks(x, n, 1, q, steps, groups);
}

/* Halving tree: lane l with lane l + W/2, then W/4, ... 1. */
static float sum_halving(float *lanes, int width) {
    for (int half = width / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

/* llama.cpp ggml-cpu/arch/x86/quants.c, ggml_vec_dot_tq2_0_q8_K (TQ1_0 is the same): in lane l the elements of
 * which the number modulo 32 is 4 l to 4 l + 3 times code + 1, less the sum of the l-th group of 32. */
static inline void blocks_dot(const uint8_t *w, int64_t k, int n_rows, float scale, const bn_blocks *x, int n_cols,
                              int fused, float *out, int64_t ldo) {
    enum { LANES = 8 };
    for (int c = 0; c < n_cols; c++) {
        for (int r = 0; r < n_rows; r++) {
            float lanes[LANES] = {0};
            for (int64_t block = 0; block < k / BN_BLOCK; block++) {
                const int64_t at = c * (k / BN_BLOCK) + block;
                const uint8_t *codes = w + (r * k + block * BN_BLOCK) / 4;
                const int8_t *v = x->q + at * BN_BLOCK;
                const float factor = x->steps[at] * scale;
                int32_t sums[LANES] = {0};
                for (int i = 0; i < BN_BLOCK; i++) {
                    const int shift = 6 - 2 * (i % 128 / 32);
                    sums[i % 32 / 4] += ((codes[i / 128 * 32 + i % 32] >> shift) & 3) * v[i];
                }
                for (int l = 0; l < LANES; l++) {
                    const float sum = (float)(sums[l] - x->groups[at * LANES + l]);
                    lanes[l] = fused ? fmaf(sum, factor, lanes[l]) : sum * factor + lanes[l];
                }
            }
            out[c * ldo + r] = sum_halving(lanes, LANES);
        }
    }
}

static void blocks_dot_unfused(const uint8_t *w, int64_t k, int n_rows, float scale, const bn_blocks *x,
                               int n_cols, float *out, int64_t ldo) {
    blocks_dot(w, k, n_rows, scale, x, n_cols, 0, out, ldo);
}

static void blocks_dot_fused(const uint8_t *w, int64_t k, int n_rows, float scale, const bn_blocks *x, int n_cols,
                             float *out, int64_t ldo) {
    blocks_dot(w, k, n_rows, scale, x, n_cols, 1, out, ldo);
}

static float dot_f16(const uint16_t *a, const float *b, int64_t n, int width) {
    float lanes[4][16] = {{0}};
    const int step = 4 * width;
    const int64_t full = n - n % step;
    for (int64_t i = 0; i < full; i += step)
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < width; l++) {
                const int64_t e = i + j * width + l;
                lanes[j][l] = fmaf(bn_half_to_float(a[e]), b[e], lanes[j][l]);
            }
    for (int l = 0; l < width; l++) {
        lanes[0][l] += lanes[2][l];
        lanes[1][l] += lanes[3][l];
        lanes[0][l] += lanes[1][l];
    }
    float reduced;
    if (width == 16) {
        reduced = sum_halving(lanes[0], 16);
    } else { /* the AVX2 build adds adjacent pairs after the first halving */
        float t[4];
        for (int l = 0; l < 4; l++) t[l] = lanes[0][l] + lanes[0][l + 4];
        reduced = (t[0] + t[1]) + (t[2] + t[3]);
    }
    double total = reduced;
    for (int64_t i = full; i < n; i++) total += (double)bn_half_to_float(a[i]) * (double)b[i];
    return (float)total;
}

static float dot_tiled(const uint16_t *a, const float *b, int64_t n, int width) {
    float lanes[16] = {0};
    for (int64_t i = 0; i < n; i += width)
        for (int l = 0; l < width; l++) lanes[l] = fmaf(bn_half_to_float(a[i + l]), b[i + l], lanes[l]);
    return sum_halving(lanes, width);
}

/* The same shape with 32 lanes of binary16, as AVX512-FP16 computes it. */
static float dot_f16_half_sums(const uint16_t *a, const float *b, int64_t n, int width) {
    float lanes[4][32] = {{0}};
    const int64_t full = n - n % (4 * width);
    for (int64_t i = 0; i < full; i += 4 * width)
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < width; l++) {
                const int64_t e = i + j * width + l;
                lanes[j][l] = bn_fma_half(bn_half_to_float(a[e]), b[e], lanes[j][l]);
            }
    for (int l = 0; l < width; l++) {
        lanes[0][l] = bn_round_half(lanes[0][l] + lanes[2][l]);
        lanes[1][l] = bn_round_half(lanes[1][l] + lanes[3][l]);
        lanes[0][l] = bn_round_half(lanes[0][l] + lanes[1][l]);
    }
    for (int half = width / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lanes[0][l] = bn_round_half(lanes[0][l] + lanes[0][l + half]);
    double total = lanes[0][0];
    for (int64_t i = full; i < n; i++) total += (double)bn_half_to_float(a[i]) * (double)b[i];
    return (float)total;
}

#define DEFINE_DOTS(name, dot, width)                                                                             \
    static void name(const uint16_t *a, int64_t lda, int64_t n_rows, const float *b, int64_t ldb, int64_t n_cols, \
                     int64_t n, float *out, int64_t ldo) {                                                        \
        for (int64_t c = 0; c < n_cols; c++)                                                                      \
            for (int64_t r = 0; r < n_rows; r++) out[c * ldo + r] = dot(a + r * lda, b + c * ldb, n, width);      \
    }
DEFINE_DOTS(dots_f16_w8, dot_f16, 8)
DEFINE_DOTS(dots_f16_w16, dot_f16, 16)
DEFINE_DOTS(dots_half_sums, dot_f16_half_sums, 32)
DEFINE_DOTS(dots_tiled_w8, dot_tiled, 8)
DEFINE_DOTS(dots_tiled_w16, dot_tiled, 16)

/* bitnet.cpp ggml_vec_soft_max_f32: exponentials, and their sum by groups of `width`. */
static inline double exponentials(float *row, int64_t n, float top, int width, float (*exponential)(float)) {
    double sum = 0;
    for (int64_t i = 0; i < n; i += width) {
        float lanes[16];
        for (int l = 0; l < width; l++) lanes[l] = row[i + l] = exponential(row[i + l] - top);
        sum += (double)sum_halving(lanes, width);
    }
    return sum;
}

static double exponentials_w8(float *row, int64_t n, float top) { return exponentials(row, n, top, 8, bn_exp_w8); }

static double exponentials_w16(float *row, int64_t n, float top) {
    return exponentials(row, n, top, 16, bn_exp_w16);
}

/* bitnet.cpp ggml.c, ggml_compute_forward_soft_max_f32 and ggml_vec_soft_max_f32. A masked score
 * is -inf and its exponential an exact 0, so groups past the last visible score add nothing to
 * the sum. */
static void softmax(float *row, int64_t n_visible, int64_t n_padded, float scale, int width,
                    float (*exponential)(float)) {
    float top = -INFINITY;
    for (int64_t i = 0; i < n_visible; i++) {
        row[i] = row[i] * scale + 0.0f;
        if (row[i] > top) top = row[i];
    }
    double sum = 0;
    for (int64_t i = 0; i < n_visible; i += width) {
        float lanes[16];
        for (int l = 0; l < width; l++) {
            lanes[l] = i + l < n_visible ? exponential(row[i + l] - top) : 0.0f;
            if (i + l < n_visible) row[i + l] = lanes[l];
        }
        sum += (double)sum_halving(lanes, width);
    }
    const float inverse = (float)(1.0 / sum);
    for (int64_t i = 0; i < n_visible; i++) row[i] *= inverse;
    for (int64_t i = n_visible; i < n_padded; i++) row[i] = 0.0f;
}

static void softmax_w8(float *row, int64_t n_visible, int64_t n_padded, float scale) {
    softmax(row, n_visible, n_padded, scale, 8, bn_exp_w8);
}

static void softmax_w16(float *row, int64_t n_visible, int64_t n_padded, float scale) {
    softmax(row, n_visible, n_padded, scale, 16, bn_exp_w16);
}

/* The compiler of the reference contracts one of the two products into the addition; which one
 * matters. */
static void rotate(float x0, float x1, float cos, float sin, float *out0, float *out1) {
    *out0 = fmaf(x0, cos, -(x1 * sin));
    *out1 = fmaf(x0, sin, x1 * cos);
}

static void rope_halves(const float *x, const float *cos, const float *sin, int half, float *out) {
    for (int i = 0; i < half; i++) rotate(x[i], x[i + half], cos[i], sin[i], &out[i], &out[i + half]);
}

/* The same rounding as for halves: the same expressions, contracted alike. */
static void rope_adjacent(const float *x, const float *cos, const float *sin, int half, float *out) {
    for (int i = 0; i < half; i++) rotate(x[2 * i], x[2 * i + 1], cos[i], sin[i], &out[2 * i], &out[2 * i + 1]);
}

/* bitnet.cpp llm_build_ffn with LLM_FFN_RELU_SQR: relu, square and product are three operations. */
static void gated_relu_squared(const float *gate, const float *up, int64_t n, float *act, float *prod) {
    for (int64_t i = 0; i < n; i++) {
        const float relu = gate[i] > 0 ? gate[i] : 0.0f;
        act[i] = relu * relu;
        prod[i] = act[i] * up[i];
    }
}

/* bitnet.cpp's main, vec.cpp, ggml_vec_swiglu_f32: the sum, the quotient and the product are
 * rounded, in this order. Below -88.7, where the exponential overflows, act is -0. */
static inline void gated_silu(const float *gate, const float *up, int64_t n, float *act, float *prod,
                              float (*exponential)(float)) {
    for (int64_t i = 0; i < n; i++) {
        act[i] = gate[i] / (1.0f + exponential(0.0f - gate[i]));
        prod[i] = act[i] * up[i];
    }
}

static void gated_silu_w8(const float *gate, const float *up, int64_t n, float *act, float *prod) {
    gated_silu(gate, up, n, act, prod, bn_exp_w8);
}

static void gated_silu_w16(const float *gate, const float *up, int64_t n, float *act, float *prod) {
    gated_silu(gate, up, n, act, prod, bn_exp_w16);
}

/* bitnet.cpp of March, ggml.c, ggml_compute_forward_mul_mat, I2_S branch. */
static void rescale_march(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                          float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = ((float)acc[i] - sum) / activation_scale * weight_scale;
}

/* bitnet.cpp's main, llamafile/sgemm.cpp, tinyBLAS_I2S_AVX. A scale of 0 makes it 0 * inf. */
static void rescale_main(const int32_t *acc, int64_t n, float sum, float activation_scale, float weight_scale,
                         float *out) {
    const float factor = weight_scale / activation_scale;
    for (int64_t i = 0; i < n; i++) out[i] = ((float)acc[i] - sum) * factor;
}

/* bitnet.cpp's main, vec.h, ggml_vec_scale_f16 and ggml_vec_mad_f16: binary32 operations whose
 * results are kept in binary16. */
static void weigh_half(float factor, const uint16_t *v, float weight, int64_t n, float *a) {
    for (int64_t i = 0; i < n; i++) {
        const float scaled = factor == 1.0f ? a[i] : bn_round_half(a[i] * factor);
        a[i] = bn_round_half(fmaf(bn_half_to_float(v[i]), weight, scaled));
    }
}

/* The same as AVX512-FP16 computes it, by steps of 128; what fills no step as above. */
static void weigh_half_sums(float factor, const uint16_t *v, float weight, int64_t n, float *a) {
    const float half_factor = bn_round_half(factor), half_weight = bn_round_half(weight);
    const int64_t full = n - n % 128;
    for (int64_t i = 0; i < full; i++) {
        const float scaled = factor == 1.0f ? a[i] : bn_round_half(a[i] * half_factor);
        a[i] = bn_fma_half(bn_half_to_float(v[i]), half_weight, scaled);
    }
    weigh_half(factor, v + full, weight, n - full, a + full);
}

static void multiply_add(const float *a, int64_t lda, int64_t n_rows, const float *b, int64_t k, int64_t n,
                         float *c, int64_t ldc) {
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < n; j++) c[r * ldc + j] = fmaf(b[i * n + j], a[r * lda + i], c[r * ldc + j]);
}

/* The error of the copy is measured, not derived: e is rounded once, its square and their sum at
 * most n times, which the factor 1 + n 2^-24 covers; 1e-15 covers squares that underflow. */
static void screen_row(const uint16_t *row, int64_t n, int8_t *codes, float *scale, float *error, float *norm) {
    float top = 0;
    for (int64_t i = 0; i < n; i++) {
        const float magnitude = fabsf(bn_half_to_float(row[i]));
        if (magnitude > top || isnan(magnitude)) top = magnitude; /* a NaN stays */
    }
    const float step = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
    float lanes[8] = {0};
    int32_t squares = 0;
    for (int64_t i = 0; i < n; i++) {
        const float a = bn_half_to_float(row[i]), c = rintf(a * inverse);
        const int32_t code = fabsf(c) <= 127.0f ? (int32_t)c : 0;
        const float e = fmaf(-step, (float)code, a);
        lanes[i % 8] = fmaf(e, e, lanes[i % 8]);
        squares += code * code;
        codes[i] = (int8_t)code;
    }
    bn_finish_screen_row(top, sum_halving(lanes, 8), squares, n, scale, error, norm);
}

static void screen_dots(const int8_t *codes, int64_t n_rows, const int16_t *x, int64_t n, int32_t *out) {
    for (int64_t r = 0; r < n_rows; r++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < n; i++) sum += codes[r * n + i] * x[i];
        out[r] = sum;
    }
}

static void to_f16(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = bn_float_to_half(x[i]);
}

static void from_f16(const uint16_t *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = bn_half_to_float(x[i]);
}

const bn_kernels bn_kernels_scalar = {
    .name = "scalar",
    .description = "portable C, the specification of the others",
    .available = always,
    .tile_rows = 4,
    .tile_bytes = 16 << 10,
    .tile_cols = 16,
    .i2s_dot = i2s_dot,
    .quantize = {quantize_unfused, quantize_fused, quantize_main},
    .quantize_blocks = {bn_scalar_quantize_blocks, bn_scalar_quantize_blocks_fused},
    .blocks_dot = {blocks_dot_unfused, blocks_dot_fused},
    .dots_f16 = {dots_f16_w8, dots_f16_w16, dots_half_sums},
    .dots_tiled = {dots_tiled_w8, dots_tiled_w16},
    BN_TABLE_KERNELS(bn_scalar),
    .softmax = {softmax_w8, softmax_w16},
    .exponentials = {exponentials_w8, exponentials_w16},
    .rope = {[BN_ROPE_HALVES] = rope_halves, [BN_ROPE_ADJACENT] = rope_adjacent},
    .gated = {[BN_RELU_SQUARED] = {gated_relu_squared, gated_relu_squared},
              [BN_SILU] = {gated_silu_w8, gated_silu_w16},
              [BN_GELU] = {bn_gated_gelu, bn_gated_gelu}},
    .rescale = {rescale_march, rescale_main},
    .weigh_half = {weigh_half, weigh_half_sums},
    .multiply_add = multiply_add,
    .screen_row = screen_row,
    .screen_dots = screen_dots,
    .to_f16 = to_f16,
    .from_f16 = from_f16,
};
