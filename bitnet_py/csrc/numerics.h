/* Scalar building blocks shared by every kernel family: binary16 conversion and the exponential
 * that bitnet.cpp's softmax uses. Each is bit-exact by construction: no step here may be
 * contracted or reordered. */
#ifndef BN_NUMERICS_H
#define BN_NUMERICS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t bn_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float bn_float(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline float bn_half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t exponent = (h >> 10) & 0x1f;
    uint32_t mantissa = h & 0x3ff;
    if (exponent == 0x1f) return bn_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) {
        /* zero or subnormal: mantissa * 2^-24, exact in binary32 */
        const float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    return bn_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

/* Round to nearest even, subnormals kept, overflow to infinity, NaN stays a quiet NaN. */
static inline uint16_t bn_float_to_half(float x) {
    const uint32_t u = bn_bits(x);
    const uint16_t sign = (uint16_t)((u >> 16) & 0x8000);
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* >= 65520 rounds to infinity */
    if (magnitude < 0x38800000u) {
        /* below 2^-14: adding 0.5 aligns the binary16 subnormal grid with the last bit of a
         * binary32 */
        const float aligned = bn_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (bn_bits(aligned) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1;
    return (uint16_t)(sign | ((magnitude + 0xfffu + odd - 0x38000000u) >> 13));
}

/* To bfloat16, to nearest even, and back; NaN stays one. */
static inline float bn_round_bfloat(float x) {
    const uint32_t u = bn_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return x;
    return bn_float((u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u);
}

static inline float bn_round_half(float x) { return bn_half_to_float(bn_float_to_half(x)); }

/* a * b + c with one rounding to binary16; all three hold binary16 values. The product is exact in
 * binary32. The sum is rounded to odd there: where it is not exact and its last bit is even, the
 * neighbour on the side of the exact sum is taken. Binary32 has more than two bits more than
 * binary16, so that rounding again gives what rounding the exact sum would (Boldo and Melquiond,
 * "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
 */
static inline float bn_fma_half(float a, float b, float c) {
    const float product = a * b, sum = product + c;
    const float of_c = sum - product;
    const float error = (product - (sum - of_c)) + (c - of_c); /* exact; NaN unless all is finite */
    uint32_t u = bn_bits(sum);
    if ((error < 0 || error > 0) && !(u & 1)) u += (error > 0) == (sum > 0) ? 1u : ~0u;
    return bn_round_half(bn_float(u));
}

/* bitnet.cpp ggml.c, ggml_v_expf. Both variants share the argument reduction; they differ in the
 * last steps. */
typedef struct {
    float n, b, u, h;
} bn_exp_reduced;

static inline bn_exp_reduced bn_exp_reduce(float x) {
    bn_exp_reduced r;
    const float z = fmaf(x, 0x1.715476p+0f, 0x1.8p23f);
    r.n = z - 0x1.8p23f;
    r.b = fmaf(-r.n, 0x1.7f7d1cp-20f, fmaf(-r.n, 0x1.62e4p-1f, x));
    r.u = r.b * r.b;
    r.h = fmaf(fmaf(0x1.0e4020p-7f, r.b, 0x1.573e2ep-5f), r.u, fmaf(0x1.555e66p-3f, r.b, 0x1.fffdb6p-2f));
    return r;
}

static inline float bn_exp2_int(int n) { return bn_float((uint32_t)(n + 127) << 23); }

/* AVX-512 variant: j * 2^n with one rounding. Splitting n keeps the first factor exact. */
static inline float bn_exp_w16(float x) {
    const bn_exp_reduced r = bn_exp_reduce(x);
    if (isnan(x)) return NAN; /* the same bits in every kernel family */
    if (!(fabsf(r.n) <= 192)) return r.n <= 0 ? 0.0f : INFINITY;
    const float j = fmaf(r.h, r.u, fmaf(0x1.ffffecp-1f, r.b, 1.0f));
    const int n = (int)r.n, n1 = n / 2, n2 = n - n1;
    return j * bn_exp2_int(n1) * bn_exp2_int(n2);
}

/* AVX2 variant. */
static inline float bn_exp_w8(float x) {
    const bn_exp_reduced r = bn_exp_reduce(x);
    if (isnan(x)) return NAN; /* the same bits in every kernel family */
    if (!(fabsf(r.n) <= 192)) return r.n <= 0 ? 0.0f : INFINITY;
    const float j = fmaf(r.h, r.u, 0x1.ffffecp-1f * r.b);
    const int n = (int)r.n;
    if (n >= -126 && n <= 126) return fmaf(bn_exp2_int(n), j, bn_exp2_int(n));
    const int e1 = n <= 0 ? -125 : 127;
    const float s1 = bn_exp2_int(e1), s2 = bn_exp2_int(n - e1);
    return fmaf(s2, j, s2) * s1;
}

/* The last step of a screen's row, the same in every kernel family: turns what was measured into
 * upper bounds. A row that is not finite gets bounds that are not finite. */
static inline void bn_finish_screen_row(float top, float error_squares, int32_t code_squares, int64_t n,
                                        float *scale, float *error, float *norm) {
    *scale = top / 127.0f;
    *error = (float)(sqrt((double)error_squares) * (1.0 + (double)n * 0x1p-24)) * (1.0f + 0x1p-22f) + 1e-15f;
    *norm = (float)((double)*scale * sqrt((double)code_squares)) * (1.0f + 0x1p-22f);
}

#endif
