/* Scalar: products of rows of a table with one row of the LM head's input, and how that is rounded. The
 * specification of these kernels in every family, compiled without auto-vectorisation. */
#include "kernels.h"
#include "numerics.h"
#include "tables.h"

/* Halving tree: lane l with lane l + W/2, then W/4, ... 1. */
static float sum_halving(float *lanes, int width) {
    for (int half = width / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

static float float_at(const uint8_t *row, int64_t i) {
    float x;
    memcpy(&x, row + i * (int64_t)sizeof x, sizeof x);
    return x;
}

static float bfloat_at(const uint8_t *row, int64_t i) {
    return bn_float((uint32_t)row[2 * i] << 16 | (uint32_t)row[2 * i + 1] << 24);
}

typedef float (*value_fn)(const uint8_t *row, int64_t i);

/* Four accumulators of W lanes, joined as bitnet.cpp ggml_vec_dot_f32 does, like its binary16 dot. */
static inline float dot_f32(const uint8_t *row, int64_t n, const float *x, int width) {
    float lanes[4][16] = {{0}};
    for (int64_t i = 0; i < n; i += 4 * width)
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < width; l++) {
                const int64_t e = i + j * width + l;
                lanes[j][l] = fmaf(float_at(row, e), x[e], lanes[j][l]);
            }
    for (int l = 0; l < width; l++) {
        lanes[0][l] += lanes[2][l];
        lanes[1][l] += lanes[3][l];
        lanes[0][l] += lanes[1][l];
    }
    if (width == 16) return sum_halving(lanes[0], 16);
    float t[4];
    for (int l = 0; l < 4; l++) t[l] = lanes[0][l] + lanes[0][l + 4];
    return (t[0] + t[1]) + (t[2] + t[3]);
}

/* llamafile sgemm: one accumulator of W lanes. */
static inline float dot_tiled(const uint8_t *row, int64_t n, const float *x, int width, value_fn value) {
    float lanes[16] = {0};
    for (int64_t i = 0; i < n; i += width)
        for (int l = 0; l < width; l++) lanes[l] = fmaf(value(row, i + l), x[i + l], lanes[l]);
    return sum_halving(lanes, width);
}

/* ggml_vec_dot_bf16 without AVX512-BF16; products of two bfloat16 numbers are exact in binary32. W = 16: two
 * accumulators, reduced one by one; W = 8: four. */
static inline float dot_bf16(const uint8_t *row, int64_t n, const float *x, int width) {
    float lanes[4][16] = {{0}};
    for (int64_t i = 0; i < n; i += 32)
        for (int e = 0; e < 32; e++)
            lanes[e / width][e % width] = fmaf(bfloat_at(row, i + e), x[i + e], lanes[e / width][e % width]);
    if (width == 16) return (float)((double)sum_halving(lanes[0], 16) + (double)sum_halving(lanes[1], 16));
    for (int l = 0; l < 8; l++) lanes[0][l] = (lanes[0][l] + lanes[2][l]) + (lanes[1][l] + lanes[3][l]);
    return sum_halving(lanes[0], 8);
}

/* The instruction vdpbf16ps: a lane takes the products of two neighbours, that of the odd one first, each rounded;
 * what is subnormal counts as zero. Two accumulators of 16 lanes, or one in llamafile sgemm. */
static float flushed(float x) { return fabsf(x) < 0x1p-126f ? 0.0f * x : x; }

static inline float dot_bf16_pairs(const uint8_t *row, int64_t n, const float *x, int n_sums) {
    float lanes[2][16] = {{0}};
    for (int64_t i = 0; i < n; i += 32)
        for (int l = 0; l < 16; l++) {
            float *sum = &lanes[i / 32 % n_sums][l];
            for (int64_t e = i + 2 * l + 1; e >= i + 2 * l; e--)
                *sum = flushed(fmaf(flushed(bfloat_at(row, e)), flushed(x[e]), *sum));
        }
    if (n_sums == 1) return sum_halving(lanes[0], 16);
    return (float)((double)sum_halving(lanes[0], 16) + (double)sum_halving(lanes[1], 16));
}

/* llama.cpp ggml-cpu/arch/x86/quants.c, ggml_vec_dot_*_q8_0 and ggml_vec_dot_*_q8_K (AVX2 in every build; sgemm of
 * Q8_0, Q4_0 and Q5_0 is the same): every block gives exact sums in 8 lanes, which are multiplied with both steps
 * and added. Lane l takes the elements whose number modulo 32 is 4 l to 4 l + 3. Where the codes are stored with
 * an `offset` and multiplied with it (the ternary types; Q6_K in main), the lane is less the offset times the
 * elements of the l-th group of 32. Product and sum are rounded apart unless `fused`. */
static inline float dot_blocks(int32_t type, const uint8_t *row, int64_t n, const bn_table_input *x, int offset,
                               int fused) {
    enum { LANES = 8 };
    const bn_table_format *format = &bn_table_formats[type];
    float lanes[LANES] = {0};
    for (int64_t b = 0; b < n / format->values; b++) {
        bn_table_block block;
        bn_table_decode(type, row + b * format->bytes, &block);
        const int8_t *q = x->q + b * format->values;
        int32_t sums[LANES] = {0};
        for (int i = 0; i < format->values; i++) {
            const int32_t scaled = block.scales[i / BN_TABLE_SCALED] * q[i];
            sums[i % 32 / 4] += scaled * (block.codes[i] + offset);
            sums[i / 32] -= scaled * offset;
        }
        const float factor = block.d * x->steps[b];
        for (int l = 0; l < LANES; l++) {
            const float sum = (float)sums[l];
            lanes[l] = fused ? fmaf(factor, sum, lanes[l]) : factor * sum + lanes[l];
        }
    }
    return sum_halving(lanes, LANES);
}

/* main, ggml-cpu/arch/x86/repack.cpp, ggml_gemv_q4_0_8x8_q8_0: the sum of a whole block, in one accumulator. */
static float dot_packed(const uint8_t *row, int64_t n, const bn_table_input *x) {
    float total = 0;
    for (int64_t b = 0; b < n / 32; b++) {
        bn_table_block block;
        bn_table_decode(BN_TABLE_Q4_0, row + b * bn_table_formats[BN_TABLE_Q4_0].bytes, &block);
        int32_t sum = 0;
        for (int i = 0; i < 32; i++) sum += block.codes[i] * x->q[b * 32 + i];
        total = fmaf((float)sum, block.d * x->steps[b], total);
    }
    return total;
}

#define DEFINE(name, type, expression)                                                                            \
    void name(const uint8_t *rows, int64_t n_rows, int64_t n, const bn_table_input *x, float *out) {              \
        for (int64_t r = 0; r < n_rows; r++, rows += bn_table_row_bytes(type, n)) {                               \
            const uint8_t *row = rows;                                                                            \
            out[r] = expression;                                                                                  \
        }                                                                                                         \
    }
DEFINE(bn_scalar_f32_w8, BN_TABLE_F32, dot_f32(row, n, x->x, 8))
DEFINE(bn_scalar_f32_w16, BN_TABLE_F32, dot_f32(row, n, x->x, 16))
DEFINE(bn_scalar_f32_tiled_w8, BN_TABLE_F32, dot_tiled(row, n, x->x, 8, float_at))
DEFINE(bn_scalar_f32_tiled_w16, BN_TABLE_F32, dot_tiled(row, n, x->x, 16, float_at))
DEFINE(bn_scalar_bf16_w8, BN_TABLE_BF16, dot_bf16(row, n, x->x, 8))
DEFINE(bn_scalar_bf16_w16, BN_TABLE_BF16, dot_bf16(row, n, x->x, 16))
DEFINE(bn_scalar_bf16_pairs, BN_TABLE_BF16, dot_bf16_pairs(row, n, x->x, 2))
DEFINE(bn_scalar_bf16_tiled_w8, BN_TABLE_BF16, dot_tiled(row, n, x->x, 8, bfloat_at))
DEFINE(bn_scalar_bf16_tiled_w16, BN_TABLE_BF16, dot_tiled(row, n, x->x, 16, bfloat_at))
DEFINE(bn_scalar_bf16_tiled_pairs, BN_TABLE_BF16, dot_bf16_pairs(row, n, x->x, 1))
DEFINE(bn_scalar_q8_0, BN_TABLE_Q8_0, dot_blocks(BN_TABLE_Q8_0, row, n, x, 0, 1))
DEFINE(bn_scalar_q4_0, BN_TABLE_Q4_0, dot_blocks(BN_TABLE_Q4_0, row, n, x, 0, 1))
DEFINE(bn_scalar_q4_0_packed, BN_TABLE_Q4_0, dot_packed(row, n, x))
DEFINE(bn_scalar_q5_0, BN_TABLE_Q5_0, dot_blocks(BN_TABLE_Q5_0, row, n, x, 0, 1))
DEFINE(bn_scalar_q6_k, BN_TABLE_Q6_K, dot_blocks(BN_TABLE_Q6_K, row, n, x, 0, 1))
DEFINE(bn_scalar_q6_k_main, BN_TABLE_Q6_K, dot_blocks(BN_TABLE_Q6_K, row, n, x, 32, 1))
DEFINE(bn_scalar_q3_k, BN_TABLE_Q3_K, dot_blocks(BN_TABLE_Q3_K, row, n, x, 0, 1))
DEFINE(bn_scalar_tq1_0, BN_TABLE_TQ1_0, dot_blocks(BN_TABLE_TQ1_0, row, n, x, 1, 0))
DEFINE(bn_scalar_tq1_0_fused, BN_TABLE_TQ1_0, dot_blocks(BN_TABLE_TQ1_0, row, n, x, 1, 1))
DEFINE(bn_scalar_tq2_0, BN_TABLE_TQ2_0, dot_blocks(BN_TABLE_TQ2_0, row, n, x, 1, 0))
DEFINE(bn_scalar_tq2_0_fused, BN_TABLE_TQ2_0, dot_blocks(BN_TABLE_TQ2_0, row, n, x, 1, 1))

/* bitnet.cpp ggml-quants.c, quantize_row_q8_0 (AVX2): the codes are divided by the step before it is rounded. */
void bn_scalar_quantize_q8_0(const float *x, int64_t n, int8_t *q, float *steps) {
    for (int64_t b = 0; b < n / 32; b++, x += 32, q += 32) {
        float top = 0;
        for (int i = 0; i < 32; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
        const float inverse = top != 0.0f ? 127.0f / top : 0.0f;
        steps[b] = bn_round_half(top / 127.0f);
        for (int i = 0; i < 32; i++) {
            const float code = rintf(x[i] * inverse);
            q[i] = fabsf(code) <= 127.0f ? (int8_t)code : 0;
            if (!(fabsf(code) <= 127.0f)) steps[b] = NAN; /* a value that is not finite must show */
        }
    }
}
