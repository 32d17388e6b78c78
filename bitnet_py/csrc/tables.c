#include "tables.h"
#include "numerics.h"

const bn_table_format bn_table_formats[BN_TABLE_TYPES] = {
    [BN_TABLE_F16] = {1, 2, BN_INPUT_F16, "head_f16"},
    [BN_TABLE_F32] = {1, 4, BN_INPUT_F32, "head_f32"},
    [BN_TABLE_BF16] = {1, 2, BN_INPUT_BF16, "head_bf16"},
    [BN_TABLE_Q8_0] = {32, 34, BN_INPUT_Q8_0, "head_q8_0"},
    [BN_TABLE_Q4_0] = {32, 18, BN_INPUT_Q8_0, "head_q4_0"},
    [BN_TABLE_Q5_0] = {32, 22, BN_INPUT_Q8_0, "head_q5_0"},
    [BN_TABLE_Q6_K] = {256, 210, BN_INPUT_Q8_K, "head_q6_k"},
    [BN_TABLE_Q3_K] = {256, 110, BN_INPUT_Q8_K, "head_q3_k"},
    [BN_TABLE_TQ1_0] = {256, 54, BN_INPUT_Q8_K, "head_tq1_0"},
    [BN_TABLE_TQ2_0] = {256, 66, BN_INPUT_Q8_K, "head_tq2_0"},
};

static float half_at(const uint8_t *at) { return bn_half_to_float((uint16_t)(at[0] | at[1] << 8)); }

/* [d][32 codes] */
static void decode_q8_0(const uint8_t *b, bn_table_block *out) {
    out->d = half_at(b);
    memcpy(out->codes, b + 2, 32);
}

/* [d][16 bytes]: codes of values i and 16 + i in the low and the high half of byte i, plus 8 */
static void decode_q4_0(const uint8_t *b, bn_table_block *out) {
    out->d = half_at(b);
    for (int i = 0; i < 16; i++) {
        out->codes[i] = (int8_t)((b[2 + i] & 15) - 8);
        out->codes[16 + i] = (int8_t)((b[2 + i] >> 4) - 8);
    }
}

/* [d][4 bytes: bit i of 32 is the fifth of code i][16 bytes as in Q4_0], plus 16 */
static void decode_q5_0(const uint8_t *b, bn_table_block *out) {
    out->d = half_at(b);
    for (int i = 0; i < 32; i++) {
        const int low = i < 16 ? b[6 + i] & 15 : b[6 + i - 16] >> 4;
        const int high = b[2 + i / 8] >> (i % 8) & 1;
        out->codes[i] = (int8_t)((low | high << 4) - 16);
    }
}

/* [128 bytes: low 4 bits][64 bytes: high 2 bits][16 scales][d], plus 32. Of each 128 values, value
 * 32 g + i has its low bits in byte i (g even) or 32 + i (g odd) of 64, in the low half for g < 2, and
 * its high bits at bit 2 g of byte i of 32. */
static void decode_q6_k(const uint8_t *b, bn_table_block *out) {
    out->d = half_at(b + 208);
    for (int i = 0; i < 16; i++) out->scales[i] = (int8_t)b[192 + i];
    for (int i = 0; i < 256; i++) {
        const int part = i / 128, g = i % 128 / 32, at = i % 32;
        const int low = b[64 * part + 32 * (g % 2) + at] >> (g < 2 ? 0 : 4) & 15;
        const int high = b[128 + 32 * part + at] >> (2 * g) & 3;
        out->codes[i] = (int8_t)((low | high << 4) - 32);
    }
}

/* [32 bytes: high bits][64 bytes: low 2 bits][12 bytes: 16 scales of 6 bits, plus 32][d]. Value 128 p +
 * 32 g + i has its low bits at bit 2 g of byte 32 p + i and its high bit at bit 4 p + g of byte i, both
 * plus 4. Scale s has its low bits in half s / 8 of byte s % 8, its high bits at bit 2 (s / 4) of byte
 * 8 + s % 4. */
static void decode_q3_k(const uint8_t *b, bn_table_block *out) {
    const uint8_t *packed = b + 96;
    out->d = half_at(b + 108);
    for (int s = 0; s < 16; s++) {
        const int low = packed[s % 8] >> (4 * (s / 8)) & 15, high = packed[8 + s % 4] >> (2 * (s / 4)) & 3;
        out->scales[s] = (int16_t)((low | high << 4) - 32);
    }
    for (int i = 0; i < 256; i++) {
        const int p = i / 128, g = i % 128 / 32, at = i % 32;
        const int low = b[32 + 32 * p + at] >> (2 * g) & 3, high = b[at] >> (4 * p + g) & 1;
        out->codes[i] = (int8_t)((low | high << 2) - 4);
    }
}

/* See bitnet_py/tq.py for both. */
static void decode_tq1_0(const uint8_t *b, bn_table_block *out) {
    static const struct {
        int first, n_bytes, n_codes, value;
    } parts[] = {{0, 32, 5, 0}, {32, 16, 5, 160}, {48, 4, 4, 240}};
    out->d = half_at(b + 52);
    for (int p = 0; p < 3; p++)
        for (int i = 0; i < parts[p].n_bytes; i++) {
            uint8_t digits = b[parts[p].first + i];
            for (int c = 0; c < parts[p].n_codes; c++, digits = (uint8_t)(digits * 3))
                out->codes[parts[p].value + c * parts[p].n_bytes + i] = (int8_t)((digits * 3 >> 8) - 1);
        }
}

static void decode_tq2_0(const uint8_t *b, bn_table_block *out) {
    out->d = half_at(b + 64);
    for (int i = 0; i < 256; i++)
        out->codes[i] = (int8_t)((b[i / 128 * 32 + i % 32] >> (2 * (i % 128 / 32)) & 3) - 1);
}

void bn_table_decode(int32_t type, const uint8_t *block, bn_table_block *out) {
    static void (*const decoders[BN_TABLE_TYPES])(const uint8_t *, bn_table_block *) = {
        [BN_TABLE_Q8_0] = decode_q8_0,   [BN_TABLE_Q4_0] = decode_q4_0, [BN_TABLE_Q5_0] = decode_q5_0,
        [BN_TABLE_Q6_K] = decode_q6_k,   [BN_TABLE_Q3_K] = decode_q3_k, [BN_TABLE_TQ1_0] = decode_tq1_0,
        [BN_TABLE_TQ2_0] = decode_tq2_0,
    };
    for (int i = 0; i < BN_TABLE_MOST_VALUES / BN_TABLE_SCALED; i++) out->scales[i] = 1;
    decoders[type](block, out);
}

void bn_table_widen(int32_t type, const uint8_t *row, int64_t n, float *out) {
    const bn_table_format *format = &bn_table_formats[type];
    if (type == BN_TABLE_F32) {
        memcpy(out, row, (size_t)n * sizeof *out);
        return;
    }
    if (type == BN_TABLE_BF16 || type == BN_TABLE_F16) {
        for (int64_t i = 0; i < n; i++)
            out[i] = type == BN_TABLE_F16 ? half_at(row + 2 * i)
                                          : bn_float((uint32_t)row[2 * i] << 16 | (uint32_t)row[2 * i + 1] << 24);
        return;
    }
    bn_table_block block;
    for (int64_t first = 0; first < n; first += format->values, row += format->bytes) {
        bn_table_decode(type, row, &block);
        for (int i = 0; i < format->values; i++) /* d * scale has at most 19 bits */
            out[first + i] = block.d * (float)block.scales[i / BN_TABLE_SCALED] * (float)block.codes[i];
    }
}
