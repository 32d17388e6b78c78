#include "checks.h"

#include <math.h>
#include <string.h>

static void check_i2s_dot(const char *kernel) {
    static const int blocks[] = {1, 2, 3, 11, 16, 17, 20, 33}, rows[] = {1, 3, 4, 6, 7, 9, 19, 35};
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 8; j++) {
            const int k = 128 * blocks[i], n_rows = rows[j], n_cols = between(1, blocks[i] < 16 ? 70 : 20);
            const uint8_t *w = random_codes((int64_t)n_rows * k / 4);
            int8_t *x = room((int64_t)n_cols * k, 1, between(0, 15));
            for (int64_t e = 0; e < (int64_t)n_cols * k; e++) x[e] = (int8_t)random_bits();
            const int64_t n = (int64_t)n_rows * n_cols;
            int32_t *got = room(n, sizeof *got, 1), *expected = room(n, sizeof *expected, 0);
            require(!bn_kernel_i2s_dot(kernel, w, k, n_rows, x, n_cols, got), "i2s_dot");
            require(!bn_kernel_i2s_dot("scalar", w, k, n_rows, x, n_cols, expected), "i2s_dot");
            require(!memcmp(got, expected, (size_t)n * sizeof *got), "i2s_dot differs from scalar");
            release(0);
        }
    }
}

static void check_dots(const char *kernel) {
    static const int lengths[] = {1, 7, 16, 31, 32, 33, 48, 63, 64, 65, 100, 128, 144, 300, 1111, 2112};
    for (int i = 0; i < 16; i++) {
        for (int n_rows = 1; n_rows < 10; n_rows++) {
            for (int width = 8; width <= 16; width += 8) {
                for (int shape = 0; shape < 3; shape++) {
                    /* the tiled dot takes whole groups of lanes, the dot in binary16 has 32 lanes anyway */
                    if ((shape == 1 && lengths[i] % width) || (shape == 2 && width == 8)) continue;
                    const int n = lengths[i], n_cols = between(1, 9), lda = n + between(0, 5);
                    const int ldb = n + between(0, 5);
                    const uint16_t *a = random_halves((int64_t)(n_rows - 1) * lda + n);
                    const float *b = random_floats((int64_t)(n_cols - 1) * ldb + n, 0.0f, 1.0f);
                    const int64_t ldo = n_rows + between(0, 3), size = n_cols * ldo;
                    float *got = room(size, sizeof *got, 1), *expected = room(size, sizeof *expected, 0);
                    memset(got, 0, (size_t)size * sizeof *got);
                    memset(expected, 0, (size_t)size * sizeof *expected);
                    require(!bn_kernel_dots(kernel, width, shape, a, lda, n_rows, b, ldb, n_cols, n, got, ldo),
                            "dots");
                    require(
                        !bn_kernel_dots("scalar", width, shape, a, lda, n_rows, b, ldb, n_cols, n, expected, ldo),
                        "dots");
                    require(!memcmp(got, expected, (size_t)size * sizeof *got), "dots differ from scalar");
                    release(0);
                }
            }
        }
    }
}

static void check_quantize(const char *kernel) {
    for (int n = 1; n < 140; n++) {
        for (int quantizer = 0; quantizer < BN_QUANTIZERS; quantizer++) {
            const float *x = random_floats(n, 0.0f, n % 7 ? 3.0f : 0.0f);
            int8_t *got = room(n, 1, n % 16), *expected = room(n, 1, 0);
            float scales[2];
            int32_t sums[2];
            require(!bn_kernel_quantize(kernel, quantizer, x, n, got, &scales[0], &sums[0]), "quantize");
            require(!bn_kernel_quantize("scalar", quantizer, x, n, expected, &scales[1], &sums[1]), "quantize");
            require(!memcmp(got, expected, (size_t)n) && scales[0] == scales[1] && sums[0] == sums[1],
                    "quantize differs from scalar");
            release(0);
        }
    }
}

static void check_softmax(const char *kernel) {
    for (int n = 1; n < 100; n++) {
        for (int width = 8; width <= 16; width += 8) {
            const int padded = (n + 31) / 32 * 32 + 32 * between(0, 1);
            const float *scores = random_floats(n, 0.0f, n % 5 ? 10.0f : 1000.0f);
            float *got = room(padded, sizeof *got, n % 4), *expected = room(padded, sizeof *expected, 0);
            memcpy(got, scores, (size_t)n * sizeof *got);
            memcpy(expected, scores, (size_t)n * sizeof *expected);
            require(!bn_kernel_softmax(kernel, width, got, n, padded, 0.125f), "softmax");
            require(!bn_kernel_softmax("scalar", width, expected, n, padded, 0.125f), "softmax");
            require(!memcmp(got, expected, (size_t)padded * sizeof *got), "softmax differs from scalar");
            release(0);
        }
    }
}

static void check_elementwise(const char *kernel) {
    for (int n = 1; n < 70; n++) {
        const float *x = random_floats(2 * n, 0.0f, 70000.0f), *c = random_floats(n, 0.0f, 1.0f);
        const float *s = random_floats(n, 0.0f, 1.0f);
        const uint16_t *halves = random_halves(n);
        float *got = room(2 * n, sizeof *got, 1), *expected = room(2 * n, sizeof *expected, 0);
        uint16_t *got_halves = room(n, sizeof *got_halves, 1), *expected_halves = room(n, sizeof *got_halves, 0);
        for (int pairing = 0; pairing < BN_ROPE_PAIRINGS; pairing++) {
            require(!bn_kernel_rope(kernel, pairing, x, c, s, n, got), "rope");
            require(!bn_kernel_rope("scalar", pairing, x, c, s, n, expected), "rope");
            require(!memcmp(got, expected, 2 * (size_t)n * sizeof *got), "rope differs from scalar");
        }
        require(!bn_kernel_to_f16(kernel, x, n, got_halves), "to_f16");
        require(!bn_kernel_to_f16("scalar", x, n, expected_halves), "to_f16");
        require(!memcmp(got_halves, expected_halves, (size_t)n * sizeof *halves), "to_f16 differs from scalar");
        require(!bn_kernel_from_f16(kernel, halves, n, got + n), "from_f16");
        require(!bn_kernel_from_f16("scalar", halves, n, expected + n), "from_f16");
        require(!memcmp(got + n, expected + n, (size_t)n * sizeof *got), "from_f16 differs from scalar");
        release(0);
    }
    for (int n = 1; n < 40; n++) {
        const float *gate = random_floats(n, 0.0f, 3.0f), *up = random_floats(n, 0.0f, 3.0f);
        float *got = room(n, sizeof *got, 1), *more = room(n, sizeof *got, 2);
        float *expected = room(n, sizeof *got, 0), *expected_more = room(n, sizeof *got, 3);
        int32_t *acc = room(n, sizeof *acc, 1);
        for (int i = 0; i < n; i++) acc[i] = between(-100000, 100000);
        for (int way = 0; way < 2 * BN_ACTIVATIONS; way++) {
            const int activation = way / 2, width = way % 2 ? 16 : 8;
            require(!bn_kernel_gated(kernel, width, activation, gate, up, n, got, more), "gated");
            require(!bn_kernel_gated("scalar", width, activation, gate, up, n, expected, expected_more), "gated");
            require(!memcmp(got, expected, (size_t)n * sizeof *got) &&
                        !memcmp(more, expected_more, (size_t)n * sizeof *got),
                    "gated differs from scalar");
        }
        for (int generation = 0; generation < BN_GENERATIONS; generation++) {
            require(!bn_kernel_rescale(kernel, generation, acc, n, 7.0f, 3.5f, 0.3f, got), "rescale");
            require(!bn_kernel_rescale("scalar", generation, acc, n, 7.0f, 3.5f, 0.3f, expected), "rescale");
            require(!memcmp(got, expected, (size_t)n * sizeof *got), "rescale differs from scalar");
        }
        release(0);
    }
}

static void check_flash(const char *kernel) {
    for (int n = 1; n < 300; n += between(1, 9)) {
        const uint16_t *v = random_halves(n), *a = random_halves(n);
        float *got = room(n, sizeof *got, 1), *expected = room(n, sizeof *got, 0);
        for (int half_sums = 0; half_sums < 2; half_sums++) {
            for (int cell = 0; cell < 3; cell++) {
                const float factor = cell == 1 ? 0.7f : 1.0f, weight = cell == 1 ? 1.0f : 0.3f;
                if (cell == 0)
                    require(!bn_kernel_from_f16("scalar", a, n, got) &&
                                !bn_kernel_from_f16("scalar", a, n, expected),
                            "from_f16");
                require(!bn_kernel_weigh_half(kernel, half_sums, factor, v, weight, n, got), "weigh_half");
                require(!bn_kernel_weigh_half("scalar", half_sums, factor, v, weight, n, expected), "weigh_half");
                require(!memcmp(got, expected, (size_t)n * sizeof *got), "weigh_half differs from scalar");
            }
        }
        release(0);
    }
    for (int n_rows = 1; n_rows < 10; n_rows++) {
        const int k = between(1, 70), n = between(1, 70), lda = k + between(0, 3), ldc = n + between(0, 3);
        const float *a = random_floats((int64_t)(n_rows - 1) * lda + k, 0.0f, 1.0f);
        const float *b = random_floats((int64_t)k * n, 0.0f, 1.0f);
        const int64_t size = (int64_t)(n_rows - 1) * ldc + n;
        float *got = room(size, sizeof *got, 1), *expected = room(size, sizeof *got, 0);
        memset(got, 0, (size_t)size * sizeof *got);
        memset(expected, 0, (size_t)size * sizeof *got);
        require(!bn_kernel_multiply_add(kernel, a, lda, n_rows, b, k, n, got, ldc), "multiply_add");
        require(!bn_kernel_multiply_add("scalar", a, lda, n_rows, b, k, n, expected, ldc), "multiply_add");
        require(!memcmp(got, expected, (size_t)size * sizeof *got), "multiply_add differs from scalar");
        release(0);
    }
    for (int n = 16; n < 200; n += 16) {
        for (int width = 8; width <= 16; width += 8) {
            const float *scores = random_floats(n, 0.0f, n % 5 ? 10.0f : 1000.0f);
            float *got = room(n, sizeof *got, 1), *expected = room(n, sizeof *got, 0);
            memcpy(got, scores, (size_t)n * sizeof *got);
            memcpy(expected, scores, (size_t)n * sizeof *got);
            double sums[2];
            require(!bn_kernel_exponentials(kernel, width, got, n, 20.0f, &sums[0]), "exponentials");
            require(!bn_kernel_exponentials("scalar", width, expected, n, 20.0f, &sums[1]), "exponentials");
            require(!memcmp(got, expected, (size_t)n * sizeof *got) && sums[0] == sums[1],
                    "exponentials differ from scalar");
            release(0);
        }
    }
}

static void check_screen(const char *kernel) {
    for (int n_rows = 1; n_rows < 40; n_rows += between(1, 4)) {
        const int n = 32 * between(1, 9), n_best = between(1, n_rows);
        const uint16_t *rows = random_halves((int64_t)n_rows * n);
        const float *y = random_floats(n, 0.0f, 2.0f);
        int8_t *codes[2];
        float *numbers[2][3];
        for (int side = 0; side < 2; side++) {
            codes[side] = room((int64_t)n_rows * n, 1, side * 5);
            for (int i = 0; i < 3; i++) numbers[side][i] = room(n_rows, sizeof(float), side);
            for (int r = 0; r < n_rows; r++)
                require(!bn_kernel_screen_row(side ? kernel : "scalar", rows + r * n, n, codes[side] + r * n,
                                              &numbers[side][0][r], &numbers[side][1][r], &numbers[side][2][r]),
                        "screen_row");
        }
        require(!memcmp(codes[0], codes[1], (size_t)n_rows * (size_t)n), "screen_row differs from scalar");
        for (int i = 0; i < 3; i++)
            require(!memcmp(numbers[0][i], numbers[1][i], (size_t)n_rows * sizeof(float)),
                    "screen_row's bounds differ from scalar");
        int16_t *z = room(n, sizeof *z, 1);
        for (int i = 0; i < n; i++) z[i] = (int16_t)between(-6000, 6000);
        int32_t *got = room(n_rows, sizeof *got, 1), *expected = room(n_rows, sizeof *got, 0);
        require(!bn_kernel_screen_dots(kernel, codes[1], n_rows, z, n, got), "screen_dots");
        require(!bn_kernel_screen_dots("scalar", codes[1], n_rows, z, n, expected), "screen_dots");
        require(!memcmp(got, expected, (size_t)n_rows * sizeof *got), "screen_dots differs from scalar");

        const bn_screen screen = {codes[1], numbers[1][0], numbers[1][1], numbers[1][2]};
        bn_top top = {&screen, n_best, room(n_best, sizeof(int32_t), 1), room(n_best, sizeof(float), 1), 0};
        float *logits = room(n_rows, sizeof *logits, 1);
        require(!bn_kernel_top(kernel, 8, rows, n_rows, n, y, &top), "top");
        require(!bn_kernel_dots("scalar", 8, 0, rows, n, n_rows, y, n, 1, n, logits, n_rows), "dots");
        for (int i = 0; i < n_best; i++) {
            int larger = 0;
            for (int r = 0; r < n_rows; r++)
                larger += logits[r] > top.logits[i] || (logits[r] == top.logits[i] && r < top.ids[i]);
            require(larger == i && logits[top.ids[i]] == top.logits[i], "top is not that of all rows");
        }
        release(0);
    }
}

/* Rows that end where their buffer ends. */
static void check_table(const char *kernel) {
    static const struct {
        int type, values, bytes, at; /* of a block; where its binary16 number is */
    } formats[] = {
        {BN_TABLE_F32, 1, 4, -1},       {BN_TABLE_BF16, 1, 2, -1},     {BN_TABLE_Q8_0, 32, 34, 0},
        {BN_TABLE_Q4_0, 32, 18, 0},     {BN_TABLE_Q5_0, 32, 22, 0},    {BN_TABLE_Q6_K, 256, 210, 208},
        {BN_TABLE_Q3_K, 256, 110, 108}, {BN_TABLE_TQ1_0, 256, 54, 52}, {BN_TABLE_TQ2_0, 256, 66, 64},
    };
    static const bn_arithmetic arithmetics[] = {
        {BN_MARCH, 8}, {BN_MARCH, 16, 1}, {BN_MAIN, 8}, {BN_MAIN, 16, .bfloat_pairs = 1}};
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        for (int i = 0; i < 12; i++) {
            const int n = 256 * between(1, 4), n_rows = between(1, 5), n_cols = between(1, 3);
            const int64_t n_bytes = (int64_t)n_rows * n / formats[f].values * formats[f].bytes;
            uint8_t *rows = room(n_bytes, 1, formats[f].values == 1 ? 0 : between(0, 15));
            for (int64_t b = 0; b < n_bytes; b++) rows[b] = (uint8_t)random_bits();
            for (int64_t b = 0; b < n_bytes; b += formats[f].bytes) /* a finite number */
                rows[b + (formats[f].at < 0 ? formats[f].bytes - 1 : formats[f].at + 1)] &= 0xbb;
            const float *x = random_floats((int64_t)n * n_cols, 0.0f, 2.0f);
            float *got = room(n_rows * n_cols, sizeof *got, 1), *expected = room(n_rows * n_cols, sizeof *got, 0);
            for (int a = 0; a < 8; a++) {
                require(!bn_kernel_table(kernel, formats[f].type, &arithmetics[a / 2], a % 2, i % 2, rows, n_rows,
                                         n, x, n_cols, got),
                        "table");
                require(!bn_kernel_table("scalar", formats[f].type, &arithmetics[a / 2], a % 2, i % 2, rows,
                                         n_rows, n, x, n_cols, expected),
                        "table");
                require(!memcmp(got, expected, (size_t)(n_rows * n_cols) * sizeof *got),
                        "table differs from scalar");
            }
            release(0);
        }
    }
}

void check_kernels(const char *family) {
    check_i2s_dot(family);
    check_dots(family);
    check_quantize(family);
    check_softmax(family);
    check_elementwise(family);
    check_flash(family);
    check_screen(family);
    check_table(family);
}
