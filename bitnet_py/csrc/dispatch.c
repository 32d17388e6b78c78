/* Runtime choice of the kernel family, the thread-local last error, and single kernels for tests. */
#include "bitnet.h"
#include "kernels.h"
#include "screen.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local char last_error[512];

void bn_set_error(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
}

int bn_abi_version(void) { return BN_ABI_VERSION; }

const char *bn_last_error(void) { return last_error; }

const bn_kernels *const bn_all_kernels[] = {
#if defined(__x86_64__) && !defined(BN_SCALAR_ONLY)
#ifdef BN_HAVE_AMX
    &bn_kernels_amx,
#endif
    &bn_kernels_avx512vnni,
    &bn_kernels_avx2,
#endif
    &bn_kernels_scalar,
};
const int bn_all_kernels_count = sizeof bn_all_kernels / sizeof bn_all_kernels[0];

const bn_kernels *bn_select_kernels(const char *name) {
    for (int i = 0; i < bn_all_kernels_count; i++) {
        const bn_kernels *kernels = bn_all_kernels[i];
        if (name && strcmp(name, kernels->name) != 0) continue;
        if (kernels->available()) return kernels;
        if (name) {
            bn_set_error("kernel '%s' needs %s, which this CPU or operating system does not offer", name,
                         kernels->description);
            return NULL;
        }
    }
    char known[128] = "";
    for (int i = 0; i < bn_all_kernels_count; i++) {
        strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
        strncat(known, bn_all_kernels[i]->name, sizeof known - strlen(known) - 1);
    }
    bn_set_error("unknown kernel '%s'; this build has %s", name ? name : "", known);
    return NULL;
}

int bn_kernel_count(void) { return bn_all_kernels_count; }

int bn_kernel_info(int index, const char **name, const char **description, int *available) {
    if (index < 0 || index >= bn_all_kernels_count) {
        bn_set_error("kernel index %d is outside 0..%d", index, bn_all_kernels_count - 1);
        return BN_ERR_ARGUMENT;
    }
    *name = bn_all_kernels[index]->name;
    *description = bn_all_kernels[index]->description;
    *available = bn_all_kernels[index]->available();
    return BN_OK;
}

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

int bn_kernel_quantize(const char *kernel, const float *x, int64_t n, int fused, int8_t *q, float *scale,
                       int32_t *sum) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    kernels->quantize(x, n, fused, q, scale, sum);
    return BN_OK;
}

int bn_kernel_dots(const char *kernel, int simd_width, int shape, const uint16_t *a, int64_t lda, int64_t n_rows,
                   const float *b, int64_t ldb, int64_t n_cols, int64_t n, float *out, int64_t ldo) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    if (!check(simd_width == 8 || simd_width == 16, "simd_width must be 8 or 16") ||
        !check(shape == 0 || (shape == 1 && n % simd_width == 0),
               "shape must be 0, or 1 with n % simd_width == 0") ||
        !check(n > 0 && n_rows >= 0 && n_cols >= 0, "n must be positive, rows and columns not negative"))
        return BN_ERR_ARGUMENT;
    const int w = BN_WIDTH_INDEX(simd_width);
    (shape ? kernels->dots_tiled[w] : kernels->dots_f16[w])(a, lda, n_rows, b, ldb, n_cols, n, out, ldo);
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

int bn_kernel_rope(const char *kernel, const float *x, const float *cos, const float *sin, int half, float *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    kernels->rope(x, cos, sin, half, out);
    return BN_OK;
}

int bn_kernel_gated_relu_squared(const char *kernel, const float *gate, const float *up, int64_t n, float *act,
                                 float *prod) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    kernels->gated_relu_squared(gate, up, n, act, prod);
    return BN_OK;
}

int bn_kernel_rescale(const char *kernel, const int32_t *acc, int64_t n, float sum, float activation_scale,
                      float weight_scale, float *out) {
    const bn_kernels *kernels = bn_select_kernels(kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;
    kernels->rescale(acc, n, sum, activation_scale, weight_scale, out);
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
        /* two members, one after the other: what is merged is tested too */
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
