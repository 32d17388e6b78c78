/* Single kernels of the public interface, for tests and benchmarks. */
#include "bitnet.h"
#include "error.h"
#include "families.h"
#include "gelu.h"
#include "head.h"
#include "numerics.h"
#include "screen.h"
#include "tables.h"

#include <stdlib.h>

static int check(int ok, const char *what) {
    if (!ok) bn_set_error("%s", what);
    return ok;
}

int bn_kernel_i2s_dot(const char *kernel, const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int n_cols,
                      int32_t *acc) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(k > 0 && k % 128 == 0 && n_rows >= 0 && n_cols >= 0, "k must be a positive multiple of 128"))
        return BN_ERR_ARGUMENT;
    kernels->i2s_dot(w, k, n_rows, x, k, n_cols, acc);
    return BN_OK;
}

int bn_kernel_quantize(const char *kernel, int quantizer, const float *x, int64_t n, int8_t *q, float *scale,
                       int32_t *sum) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(quantizer >= 0 && quantizer < BN_QUANTIZERS, "unknown quantizer")) return BN_ERR_ARGUMENT;
    kernels->quantize[quantizer](x, n, q, scale, sum);
    return BN_OK;
}

int bn_kernel_blocks(const char *kernel, int fused_quantizer, int fused_sums, const uint8_t *w, int64_t k,
                     int n_rows, float weight_scale, const float *x, int n_cols, float *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(k > 0 && k % BN_BLOCK == 0 && n_rows >= 0 && n_cols >= 0, "k must be a positive multiple of 256"))
        return BN_ERR_ARGUMENT;
    const int64_t n = k * n_cols;
    int8_t *q = malloc((size_t)n + 1);
    float *steps = malloc(((size_t)n / BN_BLOCK + 1) * sizeof *steps);
    int32_t *groups = malloc(((size_t)n / BN_GROUP + 1) * sizeof *groups);
    const bn_blocks blocks = {q, steps, groups};
    const int has_memory = q && steps && groups;
    if (has_memory) {
        kernels->quantize_blocks[!!fused_quantizer](x, n, q, steps, groups);
        kernels->blocks_dot[!!fused_sums](w, k, n_rows, weight_scale, &blocks, n_cols, out, n_rows);
    }
    free(q);
    free(steps);
    free(groups);
    return has_memory ? BN_OK : bn_fail(BN_ERR_MEMORY, "out of memory for quantised activations");
}

int bn_kernel_dots(const char *kernel, int simd_width, int shape, const uint16_t *a, int64_t lda, int64_t n_rows,
                   const float *b, int64_t ldb, int64_t n_cols, int64_t n, float *out, int64_t ldo) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(simd_width == 8 || simd_width == 16, "simd_width must be 8 or 16") ||
        !check(shape == 0 || (shape == 1 && n % simd_width == 0) || shape == 2,
               "shape must be 0, 2, or 1 with n % simd_width == 0") ||
        !check(n > 0 && n_rows >= 0 && n_cols >= 0, "n must be positive, rows and columns not negative"))
        return BN_ERR_ARGUMENT;
    const int w = BN_WIDTH_INDEX(simd_width);
    const bn_dots_fn dots = shape == 1 ? kernels->dots_tiled[w] : kernels->dots_f16[shape ? BN_DOT_HALF_SUMS : w];
    dots(a, lda, n_rows, b, ldb, n_cols, n, out, ldo);
    return BN_OK;
}

int bn_kernel_softmax(const char *kernel, int simd_width, float *row, int64_t n_visible, int64_t n_padded,
                      float scale) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(simd_width == 8 || simd_width == 16, "simd_width must be 8 or 16") ||
        !check(n_visible > 0 && n_padded >= n_visible && n_padded % 32 == 0,
               "n_padded must be a multiple of 32 that holds the visible scores, at least one"))
        return BN_ERR_ARGUMENT;
    kernels->softmax[BN_WIDTH_INDEX(simd_width)](row, n_visible, n_padded, scale);
    return BN_OK;
}

int bn_kernel_rope(const char *kernel, int pairing, const float *x, const float *cos, const float *sin, int half,
                   float *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(pairing >= 0 && pairing < BN_ROPE_PAIRINGS, "unknown RoPE pairing")) return BN_ERR_ARGUMENT;
    kernels->rope[pairing](x, cos, sin, half, out);
    return BN_OK;
}

int bn_kernel_gated(const char *kernel, int simd_width, int activation, const float *gate, const float *up,
                    int64_t n, float *act, float *prod) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(simd_width == 8 || simd_width == 16, "simd_width must be 8 or 16") ||
        !check(activation >= 0 && activation < BN_ACTIVATIONS, "unknown activation"))
        return BN_ERR_ARGUMENT;
    bn_gelu_prepare();
    kernels->gated[activation][BN_WIDTH_INDEX(simd_width)](gate, up, n, act, prod);
    return BN_OK;
}

int bn_kernel_rescale(const char *kernel, int generation, const int32_t *acc, int64_t n, float sum,
                      float activation_scale, float weight_scale, float *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(generation >= 0 && generation < BN_GENERATIONS, "unknown generation")) return BN_ERR_ARGUMENT;
    kernels->rescale[generation](acc, n, sum, activation_scale, weight_scale, out);
    return BN_OK;
}

int bn_kernel_exponentials(const char *kernel, int simd_width, float *row, int64_t n, float top, double *sum) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(simd_width == 8 || simd_width == 16, "simd_width must be 8 or 16") ||
        !check(n >= 0 && n % simd_width == 0, "n must be a multiple of simd_width"))
        return BN_ERR_ARGUMENT;
    *sum = kernels->exponentials[BN_WIDTH_INDEX(simd_width)](row, n, top);
    return BN_OK;
}

int bn_kernel_weigh_half(const char *kernel, int half_sums, float factor, const uint16_t *v, float weight,
                         int64_t n, float *a) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    kernels->weigh_half[half_sums != 0](factor, v, weight, n, a);
    return BN_OK;
}

int bn_kernel_multiply_add(const char *kernel, const float *a, int64_t lda, int64_t n_rows, const float *b,
                           int64_t k, int64_t n, float *c, int64_t ldc) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    kernels->multiply_add(a, lda, n_rows, b, k, n, c, ldc);
    return BN_OK;
}

int bn_kernel_screen_row(const char *kernel, const uint16_t *row, int64_t n, int8_t *codes, float *scale,
                         float *error, float *norm) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(n >= 0 && n % 32 == 0 && n <= BN_MAX_SCREEN_DIM,
               "n must be a multiple of 32 that a screen can hold"))
        return BN_ERR_ARGUMENT;
    kernels->screen_row(row, n, codes, scale, error, norm);
    return BN_OK;
}

int bn_kernel_screen_dots(const char *kernel, const int8_t *codes, int64_t n_rows, const int16_t *x, int64_t n,
                          int32_t *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(n >= 0 && n % 32 == 0 && n_rows >= 0, "n must be a multiple of 32")) return BN_ERR_ARGUMENT;
    kernels->screen_dots(codes, n_rows, x, n, out);
    return BN_OK;
}

int bn_kernel_top(const char *kernel, int simd_width, const uint16_t *rows, int64_t n_rows, int64_t dim,
                  const float *b, bn_top *top) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(simd_width == 8 || simd_width == 16, "simd_width must be 8 or 16") ||
        !check(dim > 0 && dim % 32 == 0 && dim <= BN_MAX_SCREEN_DIM,
               "dim must be a multiple of 32 that a screen can hold") ||
        !check(top->n >= 1 && top->n <= BN_MAX_TOP && top->n <= n_rows,
               "n must be between 1 and 256, and the rows"))
        return BN_ERR_ARGUMENT;
    bn_search search = {kernels,
                        kernels->dots_f16[BN_WIDTH_INDEX(simd_width)],
                        rows,
                        n_rows,
                        dim,
                        b,
                        top->screen,
                        malloc((size_t)dim * sizeof(int16_t)),
                        malloc((size_t)n_rows * sizeof(double)),
                        0,
                        0,
                        0,
                        top->n};
    bn_found *found = malloc(2 * sizeof *found);
    int status = BN_ERR_MEMORY;
    if (check(search.z && search.upper && found, "out of memory")) {
        /* the work of two threads, one after the other, so that the merge is also tested */
        bn_search_prepare(&search);
        bn_search_screen(&search, 0, n_rows / 2, &found[0]);
        bn_search_screen(&search, n_rows / 2, n_rows, &found[1]);
        bn_search_rescore(&search, 0, n_rows / 2, found, 2, &found[0]);
        bn_search_rescore(&search, n_rows / 2, n_rows, found, 2, &found[1]);
        bn_search_merge(&search, found, 2, top);
        status = BN_OK;
    }
    free(search.z);
    free(search.upper);
    free(found);
    return status;
}

static int table_ok(int type, int64_t n) {
    return check(type >= 0 && type < BN_TABLE_TYPES, "unknown type of a table") &&
           check(n > 0 && n % 128 == 0 && n % bn_table_formats[type].values == 0,
                 "n must be a positive multiple of 128 and of the type's block");
}

int bn_kernel_table(const char *kernel, int type, const bn_arithmetic *arithmetic, int is_tiled, int packed,
                    const uint8_t *rows, int64_t n_rows, int64_t n, const float *x, int64_t n_cols, float *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!table_ok(type, n) || !check(type != BN_TABLE_F16, "rows of F16 are multiplied by bn_kernel_dots") ||
        !check(arithmetic->simd_width == 8 || arithmetic->simd_width == 16, "simd_width must be 8 or 16"))
        return BN_ERR_ARGUMENT;
    const bn_table_dots_fn dots = kernels->table_dots[bn_table_dots_of(type, arithmetic, is_tiled, packed)];
    const int32_t input = bn_table_formats[type].input;
    float *values = malloc((size_t)n * sizeof *values), *steps = malloc((size_t)n * sizeof *steps);
    int32_t *groups = malloc((size_t)n * sizeof *groups);
    int8_t *q = malloc((size_t)n);
    const int allocated = check(values && steps && groups && q, "out of memory");
    for (int64_t c = 0; allocated && c < n_cols; c++, x += n, out += n_rows) {
        for (int64_t i = 0; i < n; i++) values[i] = input == BN_INPUT_BF16 ? bn_round_bfloat(x[i]) : x[i];
        if (input == BN_INPUT_Q8_0) kernels->quantize_q8_0(x, n, q, steps);
        if (input == BN_INPUT_Q8_K) kernels->quantize_blocks[arithmetic->fused_quantizer](x, n, q, steps, groups);
        const bn_table_input one = {values, q, steps, groups};
        dots(rows, n_rows, n, &one, out);
    }
    free(values);
    free(steps);
    free(groups);
    free(q);
    return allocated ? BN_OK : BN_ERR_MEMORY;
}

int bn_table_values(int type, const uint8_t *row, int64_t n, float *out) {
    if (!table_ok(type, n)) return BN_ERR_ARGUMENT;
    bn_table_widen(type, row, n, out);
    return BN_OK;
}

int bn_kernel_to_f16(const char *kernel, const float *x, int64_t n, uint16_t *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    kernels->to_f16(x, n, out);
    return BN_OK;
}

int bn_kernel_from_f16(const char *kernel, const uint16_t *x, int64_t n, float *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    kernels->from_f16(x, n, out);
    return BN_OK;
}
