/* Arithmetic that the faults need and a right engine does not have. Plain loops, binary64 where it matters not. */
#ifndef ZOO_WRONG_H
#define ZOO_WRONG_H

#include "engine.h"
#include "numerics.h"

#include <math.h>
#include <string.h>

/* ---- weights: I2_S bytes read in another order ------------------------------------------------------------- */

enum { ZOO_STRIDED_64, ZOO_SEQUENTIAL_HIGH_FIRST, ZOO_SEQUENTIAL_LOW_FIRST };

/* Which element the right reading finds where this one finds element i. */
static inline int64_t zoo_moved(int64_t i, int layout) {
    const int64_t byte = layout == ZOO_STRIDED_64 ? i / 64 * 16 + i % 16 : i / 4;
    const int64_t code = layout == ZOO_STRIDED_64              ? i % 64 / 16
                         : layout == ZOO_SEQUENTIAL_HIGH_FIRST ? i % 4
                                                               : 3 - i % 4;
    return byte / 32 * 128 + code * 32 + byte % 32;
}

/* The tile of accumulators again: the activations move to the codes that the other reading gives them. */
static inline void zoo_dots(bn_i2s_dot_fn dot, const bn_matrix *m, int64_t row, int n_rows, const int8_t *x,
                            int n_cols, int layout, int32_t *acc) {
    const int64_t n = m->cols;
    int8_t moved[n_cols * n];
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0, to = zoo_moved(i, layout); c < n_cols; c++) moved[c * n + to] = x[c * n + i];
    dot(m->data + row * (n / 4), n, n_rows, moved, n, n_cols, acc);
}

static inline int zoo_code(const uint8_t *row, int64_t i) {
    return row[i / 128 * 32 + i % 32] >> (6 - 2 * (i % 128 / 32)) & 3;
}

static inline float zoo_table_dot(const bn_matrix *m, int64_t row, const int8_t *x, const float *table) {
    double sum = 0;
    for (int64_t i = 0; i < m->cols; i++) sum += (double)table[zoo_code(m->data + row * (m->cols / 4), i)] * x[i];
    return (float)sum;
}

static inline float zoo_float_dot(const bn_matrix *m, int64_t row, const float *x) {
    double sum = 0;
    for (int64_t i = 0; i < m->cols; i++)
        sum += (double)(zoo_code(m->data + row * (m->cols / 4), i) - 1) * (double)x[i];
    return (float)sum;
}

/* ---- activations ------------------------------------------------------------------------------------------ */

/* The float rows behind the int8 rows of the current BitLinear. */
enum { ZOO_MAX_ROWS = 64 };
static const float *zoo_rows[ZOO_MAX_ROWS];

static inline float zoo_absmax(const float *x, int64_t n) {
    float top = 0;
    for (int64_t i = 0; i < n; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    return top;
}

static inline void zoo_quantize(const float *x, int64_t n, float scale, float (*to_integer)(float), int8_t *q,
                                float *scale_out, int32_t *sum) {
    *sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const float v = to_integer(x[i] * scale);
        q[i] = (int8_t)(v > 127 ? 127 : v < -128 ? -128 : v);
        *sum += q[i];
    }
    *scale_out = scale;
}

static inline float zoo_half_up(float x) { return floorf(x + 0.5f); }

/* ---- norms ------------------------------------------------------------------------------------------------ */

static inline float zoo_mean_square(const float *x, int64_t n, float centre) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += ((double)x[i] - (double)centre) * ((double)x[i] - (double)centre);
    return (float)(sum / (double)n);
}

static inline float zoo_mean(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i];
    return (float)(sum / (double)n);
}

/* out = (x - centre) * factor * (weight + plus); without weight: no product */
static inline void zoo_norm(const float *x, float centre, float factor, const float *weight, float plus, int64_t n,
                            float *out) {
    for (int64_t i = 0; i < n; i++) {
        const float normed = (x[i] - centre) * factor;
        out[i] = weight ? normed * (weight[i] + plus) : normed;
    }
}

/* ---- rotary embedding ------------------------------------------------------------------------------------- */

static inline void zoo_rope_factors(const float *x, int64_t half, float position, float base, int interleaved,
                                    const float *factors, int multiplied, float *out) {
    const float ratio = powf(base, -1.0f / (float)half);
    float theta = position;
    for (int64_t i = 0; i < half; i++, theta *= ratio) {
        const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
        const float factor = factors ? factors[i] : 1.0f, angle = multiplied ? theta * factor : theta / factor;
        const float x0 = x[first], x1 = x[second], c = cosf(angle), s = sinf(angle);
        out[first] = x0 * c - x1 * s;
        out[second] = x0 * s + x1 * c;
    }
}

static inline void zoo_rope(const float *x, int64_t half, float position, float base, int interleaved,
                            float *out) {
    zoo_rope_factors(x, half, position, base, interleaved, NULL, 0, out);
}

/* ---- precision -------------------------------------------------------------------------------------------- */

static inline float zoo_to_bf16(float x) {
    const uint32_t u = bn_bits(x);
    return bn_float((u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u);
}

static inline float zoo_dot_f32(const float *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return (float)sum;
}

static inline float zoo_dot_f16(const uint16_t *a, int64_t stride, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)bn_half_to_float(a[i * stride]) * (double)b[i];
    return (float)sum;
}

/* ---- attention -------------------------------------------------------------------------------------------- */

/* Query times key, both rounded to binary16. */
static inline float zoo_score(const float *query, const uint16_t *key, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)bn_half_to_float(bn_float_to_half(query[i])) * (double)bn_half_to_float(key[i]);
    return (float)sum;
}

/* Softmax without the division by the sum. */
static inline void zoo_exponentials(float *row, int64_t n_visible, int64_t n_padded, float scale) {
    float top = -INFINITY;
    for (int64_t i = 0; i < n_visible; i++) top = row[i] * scale > top ? row[i] * scale : top;
    for (int64_t i = 0; i < n_padded; i++) row[i] = i < n_visible ? (float)exp((double)(row[i] * scale - top)) : 0;
}

/* Softmax of a batch's scores over the query axis: for every key, over the tokens that see it. `keys` of one head;
 * `row` holds token t's scores and becomes its weights. Only for passes that start a sequence. */
static inline void zoo_softmax_over_queries(const float *queries, int64_t query_stride, const uint16_t *keys,
                                            int64_t key_stride, int64_t head_dim, int64_t n_tokens, int64_t t,
                                            float scale, float *row, int64_t n_padded) {
    for (int64_t j = 0; j < n_padded; j++) {
        if (j > t) {
            row[j] = 0;
            continue;
        }
        double total = 0;
        for (int64_t s = j; s < n_tokens; s++)
            total += exp((double)zoo_score(queries + s * query_stride, keys + j * key_stride, head_dim) *
                         (double)scale);
        row[j] = (float)(exp((double)row[j] * (double)scale) / total);
    }
}

/* ---- lost work -------------------------------------------------------------------------------------------- */

/* Zeroes what the second of two threads would have written of rows [n] of every token. */
static inline void zoo_lose_slice(float *y, int64_t n_tokens, int64_t n, int64_t multiple) {
    int64_t lo, hi;
    bn_share(n, multiple, 1, 2, &lo, &hi);
    for (int64_t t = 0; t < n_tokens; t++)
        for (int64_t i = lo; i < hi; i++) y[t * n + i] = 0;
}

static inline void zoo_zero(float *y, int64_t n) { memset(y, 0, (size_t)n * sizeof *y); }

static inline void zoo_swap_rows(float *y, int64_t a, int64_t b, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float kept = y[a * n + i];
        y[a * n + i] = y[b * n + i];
        y[b * n + i] = kept;
    }
}

#endif
