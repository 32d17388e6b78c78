/* What kernels_amx.c uses of AMX, written out in C from the Intel SDM (LDTILECFG,
 * TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBSUD). What the instructions refuse ends the
 * program: tiles without a shape, shapes that do not fit each other, a palette other than 1.
 * Which shapes a pass uses, what it reads and where it writes is thus tested on every x86-64 CPU
 * with AVX2. */
#ifndef BN_EMULATED_AMX_H
#define BN_EMULATED_AMX_H

#include "emulated_avx512.h"

#define bn_x86_has_amx bn_x86_has_avx2

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_release emulated_tile_release
#define _tile_zero emulated_tile_zero
#define _tile_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_dpbsud emulated_tile_dpbsud

typedef struct {
    int rows, bytes_per_row;
    uint8_t data[16][64];
} emulated_tile;

static _Thread_local struct {
    int is_configured;
    emulated_tile tile[8];
} emulated_unit;

static inline emulated_tile *emulated_shaped(int number) {
    emulated_tile *t = &emulated_unit.tile[number];
    if (!emulated_unit.is_configured || !t->rows || !t->bytes_per_row) abort();
    return t;
}

/* A kernel that leaves the unit in use makes every later switch of threads save it. */
__attribute__((destructor)) static void emulated_unit_is_released(void) {
    if (emulated_unit.is_configured) abort();
}

static inline void _tile_release(void) { memset(&emulated_unit, 0, sizeof emulated_unit); }

static inline void _tile_loadconfig(const void *at) {
    uint8_t bytes[64];
    memcpy(bytes, at, sizeof bytes);
    _tile_release();
    if (bytes[0] != 1 || bytes[1] != 0) abort();
    for (int i = 2; i < 16; i++)
        if (bytes[i]) abort();
    for (int t = 0; t < 16; t++) {
        const int bytes_per_row = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8, rows = bytes[48 + t];
        if (rows > 16 || bytes_per_row > 64 || !rows != !bytes_per_row || (t >= 8 && rows)) abort();
        if (t < 8) emulated_unit.tile[t] = (emulated_tile){.rows = rows, .bytes_per_row = bytes_per_row};
    }
    emulated_unit.is_configured = 1;
}

static inline void _tile_zero(int number) {
    emulated_tile *t = emulated_shaped(number);
    memset(t->data, 0, sizeof t->data);
}

static inline void _tile_loadd(int number, const void *base, int64_t stride) {
    emulated_tile *t = emulated_shaped(number);
    memset(t->data, 0, sizeof t->data);
    for (int r = 0; r < t->rows; r++)
        memcpy(t->data[r], (const char *)base + r * stride, (size_t)t->bytes_per_row);
}

static inline void _tile_stored(int number, void *base, int64_t stride) {
    const emulated_tile *t = emulated_shaped(number);
    for (int r = 0; r < t->rows; r++) memcpy((char *)base + r * stride, t->data[r], (size_t)t->bytes_per_row);
}

/* c[m][n] += sum over k and j of a[m][4 k + j] (signed) * b[k][4 n + j] (unsigned). */
static inline void _tile_dpbsud(int c_number, int a_number, int b_number) {
    emulated_tile *c = emulated_shaped(c_number);
    const emulated_tile *a = emulated_shaped(a_number), *b = emulated_shaped(b_number);
    if (c_number == a_number || c_number == b_number || a_number == b_number) abort();
    if (c->rows != a->rows || c->bytes_per_row != b->bytes_per_row || a->bytes_per_row != 4 * b->rows) abort();
    /* whole rows of 16 numbers: beyond its own bytes a tile holds zeros, and they are not stored */
    for (int m = 0; m < c->rows; m++) {
        __m512i sums, unsigned_bytes;
        memcpy(&sums, c->data[m], sizeof sums);
        for (int k = 0; k < b->rows; k++) {
            int32_t four;
            memcpy(&four, &a->data[m][4 * k], sizeof four);
            memcpy(&unsigned_bytes, b->data[k], sizeof unsigned_bytes);
            const __m256i signed_bytes = _mm256_set1_epi32(four);
            sums = _mm512_dpbusd_epi32(sums, unsigned_bytes, _mm512_broadcast_i64x4(signed_bytes));
        }
        memcpy(c->data[m], &sums, sizeof sums);
    }
}

#endif
