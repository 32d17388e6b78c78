#include "gelu.h"
#include "kernels.h"
#include "numerics.h"

#include <pthread.h>

static uint16_t table[1 << 16]; /* by the bits of x in binary16 */
static pthread_once_t filled = PTHREAD_ONCE_INIT;

/* bitnet.cpp's main, ggml-cpu.c, ggml_cpu_init, and vec.h, ggml_gelu_f32: every product is rounded, the inner sum
 * in one rounding with the last of them. tanhf is the C library's. */
static void fill(void) {
    for (uint32_t i = 0; i < 1 << 16; i++) {
        const float x = bn_half_to_float((uint16_t)i);
        const float inner = 0.79788456080286535587989211986876f * x * fmaf(0.044715f * x, x, 1.0f);
        table[i] = bn_float_to_half(0.5f * x * (1.0f + tanhf(inner)));
    }
}

void bn_gelu_prepare(void) { pthread_once(&filled, fill); }

/* vec.h, ggml_vec_gelu_f32. */
static float gelu(float x) {
    if (x <= -10.0f) return 0.0f;
    return x >= 10.0f ? x : bn_half_to_float(table[bn_float_to_half(x)]);
}

void bn_gated_gelu(const float *gate, const float *up, int64_t n, float *act, float *prod) {
    for (int64_t i = 0; i < n; i++) {
        act[i] = gelu(gate[i]);
        prod[i] = act[i] * up[i];
    }
}
