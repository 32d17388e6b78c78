/* AMX: the product of ternary weights with many columns on the tile unit; everything else is
 * AVX-512's and AVX2's. Same results as kernels_scalar.c: integers have no rounding. */
#include "kernels_avx2.h"
#include "kernels_avx512vnni.h"
#include "cpu_x86.h"

#include <immintrin.h>
#include <string.h>

/* A tile has up to 16 rows of 64 bytes. One instruction adds to C[16 columns of x][16 rows of w]
 * the products of A[16 columns of x][64 elements] and B[16 groups of 4 elements][16 rows of w]:
 * A is read as it lies in memory, B is the weights, unpacked and transposed. Two by two tiles of C
 * stay in the unit while a stretch of the elements passes:
 *
 *   0, 1   C of the first 16 columns and both blocks of 16 rows     4, 5   A of the first and second 16 columns
 *   2, 3   C of the second 16 columns                               6, 7   B of the first and second 16 rows
 */
enum { SIDE = 16, TILE_BYTES = 1024, TILE_ELEMENTS = 64, BLOCKS_PER_STRETCH = 8 };
enum { TILES_PER_STRETCH = 2 * BLOCKS_PER_STRETCH };

/* Number of columns from which unpacking and transposing the weights pays off. */
enum { FEWEST_COLS = 8 };

/* Intel SDM, "TILECFG". */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} tile_shapes;

/* Shapes of the eight tiles for n_cols columns of x and n_rows rows of w, each at most 32. A
 * tile without rows may not be used. */
static void set_shapes(int n_cols, int n_rows) {
    const int cols[2] = {n_cols < SIDE ? n_cols : SIDE, n_cols < SIDE ? 0 : n_cols - SIDE};
    const int rows[2] = {n_rows < SIDE ? n_rows : SIDE, n_rows < SIDE ? 0 : n_rows - SIDE};
    tile_shapes s;
    memset(&s, 0, sizeof s);
    s.palette = 1;
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++) {
            if (!cols[i] || !rows[j]) continue;
            s.rows[2 * i + j] = (uint8_t)cols[i];
            s.bytes_per_row[2 * i + j] = (uint16_t)(4 * rows[j]);
        }
        s.rows[4 + i] = (uint8_t)cols[i];
        s.bytes_per_row[4 + i] = cols[i] ? TILE_ELEMENTS : 0;
        s.rows[6 + i] = rows[i] ? SIDE : 0;
        s.bytes_per_row[6 + i] = (uint16_t)(4 * rows[i]);
    }
    /* gcc 12 assumes that the instruction reads only the first eight bytes, and may drop the
     * stores after them */
    __asm__ volatile("" : : "r"(&s) : "memory");
    _tile_loadconfig(&s);
}

/* In every group of four 32-bit values: v[i] becomes value i of v[0], v[1], v[2], v[3]. */
static inline void turn_4x4(__m512i v[4]) {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c);
    v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d);
    v[3] = _mm512_unpackhi_epi64(b, d);
}

/* One block (128 elements, 32 bytes) of up to 16 rows as two tiles B. The packed bytes are
 * transposed: four of them, shifted by 6, 4, 2 and 0, are four neighbours of each quarter of the
 * block. Rows past n_rows repeat the last: the tile's shape leaves them out. */
static inline void unpack_block(const uint8_t *w, int64_t stride, int n_rows, uint8_t *tiles) {
    const uint8_t *row[SIDE];
    for (int r = 0; r < SIDE; r++) row[r] = w + (r < n_rows ? r : n_rows - 1) * stride;
    __m512i first[4], second[4], turned[8];
    for (int i = 0; i < 4; i++) {
        first[i] = bn_load_2x256(row[i], row[4 + i]);
        second[i] = bn_load_2x256(row[8 + i], row[12 + i]);
    }
    turn_4x4(first);
    turn_4x4(second);
    for (int i = 0; i < 4; i++) {
        turned[i] = _mm512_shuffle_i32x4(first[i], second[i], 0x88);
        turned[4 + i] = _mm512_shuffle_i32x4(first[i], second[i], 0xdd);
    }
    const __m512i mask = _mm512_set1_epi8(3);
    for (int i = 0; i < 8; i++) {
        uint8_t *at = tiles + 64 * i;
        _mm512_store_si512(at, _mm512_and_si512(_mm512_srli_epi16(turned[i], 6), mask));
        _mm512_store_si512(at + 512, _mm512_and_si512(_mm512_srli_epi16(turned[i], 4), mask));
        _mm512_store_si512(at + TILE_BYTES, _mm512_and_si512(_mm512_srli_epi16(turned[i], 2), mask));
        _mm512_store_si512(at + TILE_BYTES + 512, _mm512_and_si512(turned[i], mask));
    }
}

/* One stretch of up to 32 columns times up to 32 rows; acc continues unless it is the first
 * stretch. */
static inline __attribute__((always_inline)) void multiply(const int8_t *x, int64_t ldx, int more_cols,
                                                           uint8_t tiles[2][TILES_PER_STRETCH * TILE_BYTES],
                                                           int more_rows, int64_t n_tiles, int is_first,
                                                           int32_t *acc, int64_t ldacc) {
    const int64_t step = ldacc * (int64_t)sizeof *acc;
    int32_t *below = acc + SIDE * ldacc;
    if (is_first) {
        _tile_zero(0);
        if (more_rows) _tile_zero(1);
        if (more_cols) _tile_zero(2);
        if (more_rows && more_cols) _tile_zero(3);
    } else {
        _tile_loadd(0, acc, step);
        if (more_rows) _tile_loadd(1, acc + SIDE, step);
        if (more_cols) _tile_loadd(2, below, step);
        if (more_rows && more_cols) _tile_loadd(3, below + SIDE, step);
    }
    for (int64_t t = 0; t < n_tiles; t++) {
        const int8_t *a = x + t * TILE_ELEMENTS;
        _tile_loadd(4, a, ldx);
        _tile_loadd(6, tiles[0] + t * TILE_BYTES, 64);
        _tile_dpbsud(0, 4, 6);
        if (more_rows) {
            _tile_loadd(7, tiles[1] + t * TILE_BYTES, 64);
            _tile_dpbsud(1, 4, 7);
        }
        if (more_cols) {
            _tile_loadd(5, a + SIDE * ldx, ldx);
            _tile_dpbsud(2, 5, 6);
            if (more_rows) _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, acc, step);
    if (more_rows) _tile_stored(1, acc + SIDE, step);
    if (more_cols) _tile_stored(2, below, step);
    if (more_rows && more_cols) _tile_stored(3, below + SIDE, step);
}

/* Up to 32 rows times all columns. */
static void multiply_rows(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                          int32_t *acc, int64_t ldacc) {
    uint8_t tiles[2][TILES_PER_STRETCH * TILE_BYTES] __attribute__((aligned(64)));
    const int64_t stride = k / 4, n_blocks = k / 128;
    const int more_rows = n_rows > SIDE;
    int shaped = 0; /* columns that the tiles are shaped for */
    for (int64_t b0 = 0; b0 < n_blocks; b0 += BLOCKS_PER_STRETCH) {
        const int64_t n = n_blocks - b0 < BLOCKS_PER_STRETCH ? n_blocks - b0 : BLOCKS_PER_STRETCH;
        for (int64_t b = 0; b < n; b++) {
            const uint8_t *block = w + (b0 + b) * 32;
            unpack_block(block, stride, more_rows ? SIDE : n_rows, tiles[0] + 2 * b * TILE_BYTES);
            if (more_rows)
                unpack_block(block + SIDE * stride, stride, n_rows - SIDE, tiles[1] + 2 * b * TILE_BYTES);
        }
        /* gcc 12 does not know that loading a tile reads memory, and might store what was
         * unpacked after it */
        __asm__ volatile("" : : "r"(tiles) : "memory");
        for (int c = 0; c < n_cols; c += 2 * SIDE) {
            const int cols = n_cols - c < 2 * SIDE ? n_cols - c : 2 * SIDE;
            if (cols != shaped) set_shapes(cols, n_rows);
            shaped = cols;
            multiply(x + c * ldx + b0 * 128, ldx, cols > SIDE, tiles, more_rows, 2 * n, b0 == 0, acc + c * ldacc,
                     ldacc);
        }
    }
}

static void i2s_dot(const uint8_t *w, int64_t k, int n_rows, const int8_t *x, int64_t ldx, int n_cols,
                    int32_t *acc) {
    if (n_cols < FEWEST_COLS) {
        bn_avx512_i2s_dot(w, k, n_rows, x, ldx, n_cols, acc);
        return;
    }
    for (int r = 0; r < n_rows; r += 2 * SIDE)
        multiply_rows(w + r * (k / 4), k, n_rows - r < 2 * SIDE ? n_rows - r : 2 * SIDE, x, ldx, n_cols, acc + r,
                      n_rows);
    _tile_release();
}

const bn_kernels bn_kernels_amx = {
    .name = "amx",
    .description = "AMX-INT8 granted by the operating system, AVX-512 F, BW, VL and VNNI",
    .available = bn_x86_has_amx,
    .tile_rows = SIDE,
    .tile_bytes = 64 << 10,
    .tile_cols = 512,
    .i2s_dot = i2s_dot,
    .dots_f16 = {bn_avx2_dots_f16_w8, bn_avx512_dots_f16_w16, bn_avx2_dots_half_sums},
    .dots_tiled = {bn_avx2_dots_tiled_w8, bn_avx512_dots_tiled_w16},
    BN_AVX2_KERNELS,
};
