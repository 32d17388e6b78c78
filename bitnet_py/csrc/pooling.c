#include "pooling.h"

#include <math.h>

/* bitnet.cpp's main, llama-graph.cpp, build_pooling: the mean is the product of a column of the rows with a column
 * of 1 / n, by ggml_vec_dot_f32: whole steps of four accumulators, then one by one, fused. */
static float mean(const float *column, const float *weights, int64_t n, int width) {
    const int64_t full = n - n % (4 * width);
    const bn_table_input x = {weights, NULL, NULL, NULL};
    float sum = 0;
    (width == 16 ? bn_scalar_f32_w16 : bn_scalar_f32_w8)((const uint8_t *)column, 1, full, &x, &sum);
    for (int64_t i = full; i < n; i++) sum = fmaf(column[i], weights[i], sum);
    return sum;
}

void bn_pooling(const bn_run *r) {
    const bn_engine *e = r->engine;
    const bn_pass *p = r->pass;
    const int64_t dim = e->model.dim, n = p->n_tokens;
    const float *rows = e->buffers.result_norm;
    int64_t lo, hi;
    bn_share(dim, 16, r->thread, r->n_threads, &lo, &hi);
    if (p->pooling != BN_POOL_MEAN) {
        const float *row = p->pooling == BN_POOL_LAST ? rows + (n - 1) * dim : rows;
        for (int64_t d = lo; d < hi; d++) p->pooled[d] = row[d];
        return;
    }
    float *column = e->threads[r->thread].scores, *weights = column + n; /* room for BN_HEADS_AT_ONCE times n */
    for (int64_t t = 0; t < n; t++) weights[t] = 1.0f / (float)n;
    for (int64_t d = lo; d < hi; d++) {
        for (int64_t t = 0; t < n; t++) column[t] = rows[t * dim + d];
        p->pooled[d] = mean(column, weights, n, e->arithmetic.simd_width);
    }
}
