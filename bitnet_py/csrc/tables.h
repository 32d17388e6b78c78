/* The embedding and the LM head as a file stores them: rows of a type of ggml, decoded.
 *
 * Every value of a type in blocks is d * scale * code: d is one binary16 number a block, scale an
 * integer for 16 values (1 where a type has none), code an integer. Layouts: ggml-common.h and
 * ggml-quants.c of llama.cpp, `dequantize_row_*`.
 */
#ifndef BN_TABLES_H
#define BN_TABLES_H

#include "bitnet.h"

/* How the LM head rounds its input before it multiplies with a table of a type. */
enum {
    BN_INPUT_F32,
    BN_INPUT_BF16,
    BN_INPUT_F16,
    BN_INPUT_Q8_0, /* int8 in blocks of 32, the step of each in binary16 */
    BN_INPUT_Q8_K, /* int8 in blocks of 256, the step of each in binary32: bn_quantize_blocks_fn */
};

typedef struct {
    int32_t values, bytes; /* of a block; values: 1, 32 or 256 */
    int32_t input;
    const char *operation; /* of the product, in counters */
} bn_table_format;

extern const bn_table_format bn_table_formats[BN_TABLE_TYPES];

enum { BN_TABLE_SCALED = 16, BN_TABLE_MOST_VALUES = 256 };

/* One block, decoded. */
typedef struct {
    float d;
    int16_t scales[BN_TABLE_MOST_VALUES / BN_TABLE_SCALED];
    int8_t codes[BN_TABLE_MOST_VALUES];
} bn_table_block;

static inline int64_t bn_table_row_bytes(int32_t type, int64_t n) {
    return n / bn_table_formats[type].values * bn_table_formats[type].bytes;
}

static inline const uint8_t *bn_table_row(const bn_table *table, int64_t row, int64_t n) {
    return (const uint8_t *)table->rows + row * bn_table_row_bytes(table->type, n);
}

/* Of a type in blocks. */
void bn_table_decode(int32_t type, const uint8_t *block, bn_table_block *out);

/* The n values of a row, in binary32: exact, but that a value of Q6_K is one rounding. */
void bn_table_widen(int32_t type, const uint8_t *row, int64_t n, float *out);

#endif
