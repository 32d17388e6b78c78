/* AVX2: products of rows of a table with one row of the LM head's input. Same results as kernels_scalar_tables.c
 * bit for bit; see there for what each computes. */
#include "kernels_avx2.h"
#include "tables.h"

#include <string.h>

/* A row is one stream from memory; see BN_PREFETCH_HALF. */
enum { AHEAD = 1024 };

static inline void prefetch(const uint8_t *at) { _mm_prefetch((const char *)(at + AHEAD), _MM_HINT_T0); }

static inline float half_at(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, sizeof half);
    return _cvtsh_ss(half);
}

/* ---- F32 and BF16: `n_sums` vectors of 8 lanes ---------------------------------------------------------------
 */

typedef __m256 (*load_fn)(const uint8_t *row, int64_t i);

static inline __m256 load_f32(const uint8_t *row, int64_t i) { return _mm256_loadu_ps((const float *)row + i); }

static inline __m256 load_bf16(const uint8_t *row, int64_t i) {
    const __m128i half = _mm_loadu_si128((const __m128i *)(row + 2 * i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline __attribute__((always_inline)) void sum_lanes(const uint8_t *row, int64_t n, const float *x,
                                                            int n_sums, load_fn load, __m256 sums[8]) {
    for (int s = 0; s < n_sums; s++) sums[s] = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8 * n_sums)
        for (int s = 0; s < n_sums; s++) {
            const int64_t e = i + 8 * s;
            if (s % 2 == 0) prefetch(row + (load == load_f32 ? 4 : 2) * e);
            sums[s] = _mm256_fmadd_ps(load(row, e), _mm256_loadu_ps(x + e), sums[s]);
        }
}

static inline __attribute__((always_inline)) float dot_f32(const uint8_t *row, int64_t n, const float *x,
                                                           int is_wide) {
    __m256 s[8];
    sum_lanes(row, n, x, is_wide ? 8 : 4, load_f32, s);
    if (!is_wide) return bn_sum_paired_8(_mm256_add_ps(_mm256_add_ps(s[0], s[2]), _mm256_add_ps(s[1], s[3])));
    const __m256 low = _mm256_add_ps(_mm256_add_ps(s[0], s[4]), _mm256_add_ps(s[2], s[6]));
    const __m256 high = _mm256_add_ps(_mm256_add_ps(s[1], s[5]), _mm256_add_ps(s[3], s[7]));
    return bn_sum_halving_8(_mm256_add_ps(low, high));
}

static inline __attribute__((always_inline)) float dot_tiled(const uint8_t *row, int64_t n, const float *x,
                                                             int is_wide, load_fn load) {
    __m256 s[8];
    sum_lanes(row, n, x, is_wide ? 2 : 1, load, s);
    return bn_sum_halving_8(is_wide ? _mm256_add_ps(s[0], s[1]) : s[0]);
}

static inline __attribute__((always_inline)) float dot_bf16(const uint8_t *row, int64_t n, const float *x,
                                                            int is_wide) {
    __m256 s[8];
    sum_lanes(row, n, x, 4, load_bf16, s);
    if (!is_wide) return bn_sum_halving_8(_mm256_add_ps(_mm256_add_ps(s[0], s[2]), _mm256_add_ps(s[1], s[3])));
    const float first = bn_sum_halving_8(_mm256_add_ps(s[0], s[1]));
    return (float)((double)first + (double)bn_sum_halving_8(_mm256_add_ps(s[2], s[3])));
}

/* What is subnormal becomes zero. */
static inline __m256 flushed(__m256 x) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    const __m256 is_small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
    return _mm256_andnot_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), is_small), x);
}

/* 8 lanes of 16: elements 2 l (`odd` 0) or 2 l + 1 of 16 elements from i on. */
static inline __m256 bf16_parity(const uint8_t *row, int64_t i, int odd) {
    const __m256i pairs = bn_load_256(row + 2 * i);
    const __m256i wide =
        odd ? _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)) : _mm256_slli_epi32(pairs, 16);
    return flushed(_mm256_castsi256_ps(wide));
}

static inline __m256 f32_parity(const float *x, int odd) {
    const __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + 8);
    const __m256 mixed = odd ? _mm256_shuffle_ps(low, high, 0xdd) : _mm256_shuffle_ps(low, high, 0x88);
    return flushed(_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8)));
}

static inline __attribute__((always_inline)) float dot_bf16_pairs(const uint8_t *row, int64_t n, const float *x,
                                                                  int n_sums) {
    __m256 s[4];
    for (int i = 0; i < 2 * n_sums; i++) s[i] = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 32 * n_sums)
        for (int j = 0; j < 2 * n_sums; j++) {
            const int64_t e = i + 16 * j;
            if (j % 2 == 0) prefetch(row + 2 * e);
            for (int odd = 1; odd >= 0; odd--)
                s[j] = flushed(_mm256_fmadd_ps(bf16_parity(row, e, odd), f32_parity(x + e, odd), s[j]));
        }
    const float first = bn_sum_halving_8(_mm256_add_ps(s[0], s[1]));
    if (n_sums == 1) return first;
    return (float)((double)first + (double)bn_sum_halving_8(_mm256_add_ps(s[2], s[3])));
}

/* ---- blocks of 32 ----------------------------------------------------------------------------------------------
 */

typedef __m256i (*codes_fn)(const uint8_t *block);

static inline __m256i codes_q8_0(const uint8_t *block) { return bn_load_256(block + 2); }

static inline __m256i nibbles(const uint8_t *at) {
    const __m128i packed = _mm_loadu_si128((const __m128i *)at);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), _mm256_set1_epi8(15));
}

static inline __m256i codes_q4_0(const uint8_t *block) {
    return _mm256_sub_epi8(nibbles(block + 2), _mm256_set1_epi8(8));
}

static inline __m256i codes_q5_0(const uint8_t *block) {
    uint32_t bits;
    memcpy(&bits, block + 2, sizeof bits);
    const __m256i bytes =
        _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits),
                            _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i own = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, own), own);
    /* a code without its fifth bit is 16 less */
    return _mm256_sub_epi8(nibbles(block + 6), _mm256_andnot_si256(is_set, _mm256_set1_epi8(16)));
}

static inline __attribute__((always_inline)) float dot_q8_0(const uint8_t *row, int64_t n, const bn_table_input *x,
                                                            int bytes, codes_fn codes) {
    const __m256i one = _mm256_set1_epi16(1);
    __m256 lanes = _mm256_setzero_ps();
    for (int64_t b = 0; b < n / 32; b++, row += bytes) {
        prefetch(row);
        const __m256i w = codes(row), q = bn_load_256(x->q + 32 * b);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(q, w));
        const __m256 factor = _mm256_set1_ps(half_at(row) * x->steps[b]);
        lanes = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, one)), lanes);
    }
    return bn_sum_halving_8(lanes);
}

/* One accumulator: its additions wait for one another, so several rows are multiplied side by side. */
enum { PACKED_ROWS = 8 };

static inline int32_t block_q4_0(const uint8_t *block, const int8_t *q) {
    const __m256i w = codes_q4_0(block);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(bn_load_256(q), w));
    return bn_sum_i32x8(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

void bn_avx2_q4_0_packed(const uint8_t *rows, int64_t n_rows, int64_t n, const bn_table_input *x, float *out) {
    const int64_t stride = bn_table_row_bytes(BN_TABLE_Q4_0, n);
    for (int64_t r = 0; r < n_rows; r += PACKED_ROWS) {
        const int here = (int)(n_rows - r < PACKED_ROWS ? n_rows - r : PACKED_ROWS);
        float totals[PACKED_ROWS] = {0};
        for (int64_t b = 0; b < n / 32; b++)
            for (int i = 0; i < here; i++) {
                const uint8_t *block = rows + (r + i) * stride + b * 18;
                const float sum = (float)block_q4_0(block, x->q + 32 * b);
                const __m128 factor = _mm_set_ss(half_at(block) * x->steps[b]);
                totals[i] = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(sum), factor, _mm_set_ss(totals[i])));
            }
        for (int i = 0; i < here; i++) out[r + i] = totals[i];
    }
}

/* ---- blocks of 256 ---------------------------------------------------------------------------------------------
 */

/* Sums of 32 codes times input, those of the first 16 times one scale, those of the last times another. `pairs`:
 * sums of two in 16 bits. */
static inline __m256i scaled(__m256i pairs, const int8_t *scales) {
    return _mm256_madd_epi16(pairs,
                             _mm256_set_m128i(_mm_set1_epi16((short)scales[1]), _mm_set1_epi16((short)scales[0])));
}

/* Codes at or above 0 times input, less `offset` times input: 16 bits hold 2 * 127 * (63 + 32). */
static inline __m256i offset_pairs(__m256i codes, __m256i q, int offset) {
    return _mm256_sub_epi16(_mm256_maddubs_epi16(codes, q),
                            _mm256_maddubs_epi16(_mm256_set1_epi8((char)offset), q));
}

/* Lane g of the result: the eight lanes of groups[g] added up. */
static inline __m256i sum_each(const __m256i groups[8]) {
    __m256i halves[2];
    for (int i = 0; i < 2; i++)
        halves[i] = _mm256_hadd_epi32(_mm256_hadd_epi32(groups[4 * i], groups[4 * i + 1]),
                                      _mm256_hadd_epi32(groups[4 * i + 2], groups[4 * i + 3]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(halves[0], halves[1], 0x20),
                            _mm256_permute2x128_si256(halves[0], halves[1], 0x31));
}

static inline __attribute__((always_inline)) __m256i q6_k(const uint8_t *block, const int8_t *q, int is_main) {
    const __m256i low4 = _mm256_set1_epi8(15), low2 = _mm256_set1_epi8(3), offset = _mm256_set1_epi8(32);
    const int8_t *scales = (const int8_t *)block + 192;
    __m256i sums = _mm256_setzero_si256(), offsets[8];
    for (int part = 0; part < 2; part++) {
        const __m256i high = bn_load_256(block + 128 + 32 * part);
        for (int g = 0; g < 4; g++) {
            const __m256i low = bn_load_256(block + 64 * part + 32 * (g % 2));
            const __m256i codes =
                _mm256_or_si256(_mm256_and_si256(g < 2 ? low : _mm256_srli_epi16(low, 4), low4),
                                _mm256_slli_epi16(_mm256_and_si256(_mm256_srli_epi16(high, 2 * g), low2), 4));
            const int group = 4 * part + g;
            const __m256i v = bn_load_256(q + 32 * group);
            const __m256i pairs = is_main ? _mm256_maddubs_epi16(codes, v) : offset_pairs(codes, v, 32);
            sums = _mm256_add_epi32(sums, scaled(pairs, scales + 2 * group));
            if (is_main) offsets[group] = scaled(_mm256_maddubs_epi16(offset, v), scales + 2 * group);
        }
    }
    return is_main ? _mm256_sub_epi32(sums, sum_each(offsets)) : sums;
}

static inline __m256i sums_q6_k(const uint8_t *block, const int8_t *q) { return q6_k(block, q, 0); }
static inline __m256i sums_q6_k_main(const uint8_t *block, const int8_t *q) { return q6_k(block, q, 1); }

static inline __m256i sums_q3_k(const uint8_t *block, const int8_t *q) {
    const __m256i low2 = _mm256_set1_epi8(3), one = _mm256_set1_epi8(1), high = bn_load_256(block);
    int8_t scales[16];
    for (int s = 0; s < 16; s++)
        scales[s] = (int8_t)((block[96 + s % 8] >> (4 * (s / 8)) & 15) +
                             ((block[104 + s % 4] >> (2 * (s / 4)) & 3) << 4) - 32);
    __m256i sums = _mm256_setzero_si256();
    for (int group = 0; group < 8; group++) {
        const __m256i low = bn_load_256(block + 32 + 32 * (group / 4));
        const __m256i bit = _mm256_and_si256(_mm256_srli_epi16(high, group), one);
        const __m256i codes = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 2 * (group % 4)), low2),
                                              _mm256_slli_epi16(bit, 2));
        const __m256i pairs = offset_pairs(codes, bn_load_256(q + 32 * group), 4);
        sums = _mm256_add_epi32(sums, scaled(pairs, scales + 2 * group));
    }
    return sums;
}

/* Codes plus 1. */
static inline __m256i sums_tq2_0(const uint8_t *block, const int8_t *q) {
    __m256i sums = _mm256_setzero_si256();
    for (int group = 0; group < 8; group++) {
        const __m256i packed = bn_load_256(block + 32 * (group / 4));
        const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(packed, 2 * (group % 4)), _mm256_set1_epi8(3));
        sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, bn_load_256(q + 32 * group)));
    }
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

/* Five codes a byte: byte * 3^i modulo 256, times 3, its bits 8 and 9. */
static inline __m256i tq1_0_codes(__m256i bytes, int power) {
    const __m256i factor = _mm256_set1_epi16((short)power), mask = _mm256_set1_epi16(255);
    __m256i even = _mm256_and_si256(bytes, mask), odd = _mm256_srli_epi16(bytes, 8);
    even = _mm256_and_si256(_mm256_mullo_epi16(even, factor), mask);
    odd = _mm256_and_si256(_mm256_mullo_epi16(odd, factor), mask);
    const __m256i three = _mm256_set1_epi16(3);
    even = _mm256_srli_epi16(_mm256_mullo_epi16(even, three), 8);
    odd = _mm256_srli_epi16(_mm256_mullo_epi16(odd, three), 8);
    return _mm256_or_si256(even, _mm256_slli_epi16(odd, 8));
}

static inline __m256i sums_tq1_0(const uint8_t *block, const int8_t *q) {
    static const int powers[] = {1, 3, 9, 27, 81};
    __m256i sums = _mm256_setzero_si256();
    const __m256i first = bn_load_256(block);
    for (int i = 0; i < 5; i++)
        sums =
            _mm256_add_epi16(sums, _mm256_maddubs_epi16(tq1_0_codes(first, powers[i]), bn_load_256(q + 32 * i)));
    int32_t last;
    memcpy(&last, block + 48, sizeof last);
    const __m256i middle = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(block + 32)));
    __m256i codes[5];
    for (int i = 0; i < 5; i++) codes[i] = tq1_0_codes(middle, powers[i]);
    /* the last 16 values: four codes of each of four bytes */
    const __m256i quads = _mm256_set1_epi32(last);
    __m128i end = _mm256_castsi256_si128(tq1_0_codes(quads, 1));
    end = _mm_blend_epi32(end, _mm256_castsi256_si128(tq1_0_codes(quads, 3)), 2);
    end = _mm_blend_epi32(end, _mm256_castsi256_si128(tq1_0_codes(quads, 9)), 4);
    end = _mm_blend_epi32(end, _mm256_castsi256_si128(tq1_0_codes(quads, 27)), 8);
    const __m256i joined[] = {_mm256_blend_epi32(codes[0], codes[1], 0xf0),
                              _mm256_blend_epi32(codes[2], codes[3], 0xf0),
                              _mm256_inserti128_si256(codes[4], end, 1)};
    for (int i = 0; i < 3; i++)
        sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(joined[i], bn_load_256(q + 160 + 32 * i)));
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

typedef __m256i (*sums_fn)(const uint8_t *block, const int8_t *q);

static inline __attribute__((always_inline)) float dot_q8_k(const uint8_t *row, int64_t n, const bn_table_input *x,
                                                            int bytes, int at_d, int is_ternary, int fused,
                                                            sums_fn sums) {
    __m256 lanes = _mm256_setzero_ps();
    for (int64_t b = 0; b < n / BN_BLOCK; b++, row += bytes) {
        for (int line = 0; line < bytes; line += 64) prefetch(row + line);
        __m256i sum = sums(row, x->q + b * BN_BLOCK);
        if (is_ternary) sum = _mm256_sub_epi32(sum, bn_load_256(x->groups + b * (BN_BLOCK / BN_GROUP)));
        const __m256 factor = _mm256_set1_ps(half_at(row + at_d) * x->steps[b]), whole = _mm256_cvtepi32_ps(sum);
        lanes = fused ? _mm256_fmadd_ps(factor, whole, lanes) : _mm256_add_ps(_mm256_mul_ps(factor, whole), lanes);
    }
    return bn_sum_halving_8(lanes);
}

#define DEFINE(name, type, expression)                                                                            \
    void name(const uint8_t *rows, int64_t n_rows, int64_t n, const bn_table_input *x, float *out) {              \
        const int64_t stride = bn_table_row_bytes(type, n);                                                       \
        for (int64_t r = 0; r < n_rows; r++) {                                                                    \
            const uint8_t *row = rows + r * stride;                                                               \
            out[r] = expression;                                                                                  \
        }                                                                                                         \
    }
DEFINE(bn_avx2_f32_w8, BN_TABLE_F32, dot_f32(row, n, x->x, 0))
DEFINE(bn_avx2_f32_w16, BN_TABLE_F32, dot_f32(row, n, x->x, 1))
DEFINE(bn_avx2_f32_tiled_w8, BN_TABLE_F32, dot_tiled(row, n, x->x, 0, load_f32))
DEFINE(bn_avx2_f32_tiled_w16, BN_TABLE_F32, dot_tiled(row, n, x->x, 1, load_f32))
DEFINE(bn_avx2_bf16_w8, BN_TABLE_BF16, dot_bf16(row, n, x->x, 0))
DEFINE(bn_avx2_bf16_w16, BN_TABLE_BF16, dot_bf16(row, n, x->x, 1))
DEFINE(bn_avx2_bf16_pairs, BN_TABLE_BF16, dot_bf16_pairs(row, n, x->x, 2))
DEFINE(bn_avx2_bf16_tiled_w8, BN_TABLE_BF16, dot_tiled(row, n, x->x, 0, load_bf16))
DEFINE(bn_avx2_bf16_tiled_w16, BN_TABLE_BF16, dot_tiled(row, n, x->x, 1, load_bf16))
DEFINE(bn_avx2_bf16_tiled_pairs, BN_TABLE_BF16, dot_bf16_pairs(row, n, x->x, 1))
DEFINE(bn_avx2_q8_0, BN_TABLE_Q8_0, dot_q8_0(row, n, x, 34, codes_q8_0))
DEFINE(bn_avx2_q4_0, BN_TABLE_Q4_0, dot_q8_0(row, n, x, 18, codes_q4_0))
DEFINE(bn_avx2_q5_0, BN_TABLE_Q5_0, dot_q8_0(row, n, x, 22, codes_q5_0))
DEFINE(bn_avx2_q6_k, BN_TABLE_Q6_K, dot_q8_k(row, n, x, 210, 208, 0, 1, sums_q6_k))
DEFINE(bn_avx2_q6_k_main, BN_TABLE_Q6_K, dot_q8_k(row, n, x, 210, 208, 0, 1, sums_q6_k_main))
DEFINE(bn_avx2_q3_k, BN_TABLE_Q3_K, dot_q8_k(row, n, x, 110, 108, 0, 1, sums_q3_k))
DEFINE(bn_avx2_tq1_0, BN_TABLE_TQ1_0, dot_q8_k(row, n, x, 54, 52, 1, 0, sums_tq1_0))
DEFINE(bn_avx2_tq1_0_fused, BN_TABLE_TQ1_0, dot_q8_k(row, n, x, 54, 52, 1, 1, sums_tq1_0))
DEFINE(bn_avx2_tq2_0, BN_TABLE_TQ2_0, dot_q8_k(row, n, x, 66, 64, 1, 0, sums_tq2_0))
DEFINE(bn_avx2_tq2_0_fused, BN_TABLE_TQ2_0, dot_q8_k(row, n, x, 66, 64, 1, 1, sums_tq2_0))
