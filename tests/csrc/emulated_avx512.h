/* What kernels_avx512vnni.c and kernels_amx.c use of AVX-512, written out in AVX2 and plain C
 * from the definitions in Intel's intrinsics guide. Test builds put this header in front of
 * those files (test_build.cmake), so that its bounds, its indices and its rounding order are
 * tested on every x86-64 CPU with AVX2. An intrinsic that is missing here does not compile. What
 * only a CPU with AVX-512 can show is whether the compiler's own intrinsics do the same. */
#ifndef BN_EMULATED_AVX512_H
#define BN_EMULATED_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    __m256i half[2];
} emulated_m512i;

typedef struct {
    __m256 half[2];
} emulated_m512;

typedef struct {
    __m256d half[2];
} emulated_m512d;

/* Some compilers have macros where an argument must be a constant. */
#undef _mm512_extractf64x4_pd
#undef _mm512_extracti64x4_epi64
#undef _mm512_inserti64x4
#undef _mm512_shuffle_i32x4

#define bn_x86_has_avx512vnni bn_x86_has_avx2
#define __m512 emulated_m512
#define __m512d emulated_m512d
#define __m512i emulated_m512i
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_ps emulated_add_ps
#define _mm512_and_si512 emulated_and_si512
#define _mm512_broadcast_i64x4 emulated_broadcast_i64x4
#define _mm512_castps512_ps256 emulated_castps512_ps256
#define _mm512_castps_pd emulated_castps_pd
#define _mm512_castsi256_si512 emulated_castsi256_si512
#define _mm512_castsi512_si256 emulated_castsi512_si256
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_extractf64x4_pd emulated_extractf64x4_pd
#define _mm512_extracti64x4_epi64 emulated_extracti64x4_epi64
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_inserti64x4 emulated_inserti64x4
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_setzero_ps emulated_setzero_ps
#define _mm512_setzero_si512 emulated_setzero_si512
#define _mm512_shuffle_i32x4 emulated_shuffle_i32x4
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_store_si512 emulated_store_si512
#define _mm512_unpackhi_epi32 emulated_unpackhi_epi32
#define _mm512_unpackhi_epi64 emulated_unpackhi_epi64
#define _mm512_unpacklo_epi32 emulated_unpacklo_epi32
#define _mm512_unpacklo_epi64 emulated_unpacklo_epi64
#define _mm512_zextsi256_si512 emulated_zextsi256_si512

/* ---- integers ------------------------------------------------------------------------------------------- */

static inline __m512i _mm512_loadu_si512(const void *p) {
    const __m256i *at = p;
    return (__m512i){{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}

static inline __m512i _mm512_setzero_si512(void) {
    return (__m512i){{_mm256_setzero_si256(), _mm256_setzero_si256()}};
}

static inline __m512i _mm512_set1_epi8(char value) {
    return (__m512i){{_mm256_set1_epi8(value), _mm256_set1_epi8(value)}};
}

/* The upper half is undefined; here it is never zero, so that a kernel that counts on it is
 * seen. */
static inline __m512i _mm512_castsi256_si512(__m256i low) { return (__m512i){{low, _mm256_set1_epi8(0x55)}}; }

static inline __m512i _mm512_zextsi256_si512(__m256i low) { return (__m512i){{low, _mm256_setzero_si256()}}; }

static inline __m512i _mm512_inserti64x4(__m512i a, __m256i b, int which) {
    a.half[which] = b;
    return a;
}

static inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return (__m512i){{_mm256_and_si256(a.half[0], b.half[0]), _mm256_and_si256(a.half[1], b.half[1])}};
}

static inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return (__m512i){{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}

static inline __m512i _mm512_srli_epi16(__m512i a, int bits) {
    return (__m512i){{_mm256_srli_epi16(a.half[0], bits), _mm256_srli_epi16(a.half[1], bits)}};
}

static inline __m256i _mm512_castsi512_si256(__m512i a) { return a.half[0]; }

static inline __m256i _mm512_extracti64x4_epi64(__m512i a, int which) { return a.half[which]; }

static inline __m512i _mm512_broadcast_i64x4(__m256i a) { return (__m512i){{a, a}}; }

/* Faults where the address is not a multiple of 64, as the instruction does. */
static inline void _mm512_store_si512(void *p, __m512i a) {
    if ((uintptr_t)p % 64) abort();
    memcpy(p, &a, sizeof a);
}

#define emulated_unpack(name)                                                                                     \
    static inline __m512i emulated_##name(__m512i a, __m512i b) {                                                 \
        return (__m512i){{_mm256_##name(a.half[0], b.half[0]), _mm256_##name(a.half[1], b.half[1])}};             \
    }
emulated_unpack(unpackhi_epi32) emulated_unpack(unpackhi_epi64) emulated_unpack(unpacklo_epi32)
    emulated_unpack(unpacklo_epi64)

    /* Two 128-bit lanes of a, then two of b, two bits of `which` each. */
    static inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
    __m128i from[2][4], to[4];
    memcpy(from[0], &a, sizeof a);
    memcpy(from[1], &b, sizeof b);
    for (int l = 0; l < 4; l++) to[l] = from[l / 2][which >> (2 * l) & 3];
    memcpy(&a, to, sizeof a);
    return a;
}

/* Each lane gains four products of an unsigned and a signed byte, nothing saturates on the way: bytes 0 and 2 of
 * each lane as 16-bit numbers, and then 1 and 3. */
static inline __m256i emulated_dpbusd_half(__m256i sum, __m256i u, __m256i s) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

static inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    return (__m512i){{emulated_dpbusd_half(sum.half[0], a.half[0], b.half[0]),
                      emulated_dpbusd_half(sum.half[1], a.half[1], b.half[1])}};
}

static inline int _mm512_reduce_add_epi32(__m512i a) {
    uint32_t lanes[16], total = 0;
    memcpy(lanes, &a, sizeof a);
    for (int l = 0; l < 16; l++) total += lanes[l];
    return (int)total;
}

/* ---- floats --------------------------------------------------------------------------------------------- */

static inline __m512 _mm512_loadu_ps(const void *p) {
    const float *at = p;
    return (__m512){{_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}};
}

static inline __m512 _mm512_setzero_ps(void) { return (__m512){{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }

static inline __m512 _mm512_cvtph_ps(__m256i a) {
    return (__m512){{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}};
}

static inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    return (__m512){{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
}

static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return (__m512){
        {_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
}

static inline __m256 _mm512_castps512_ps256(__m512 a) { return a.half[0]; }

static inline __m512d _mm512_castps_pd(__m512 a) {
    return (__m512d){{_mm256_castps_pd(a.half[0]), _mm256_castps_pd(a.half[1])}};
}

static inline __m256d _mm512_extractf64x4_pd(__m512d a, int which) { return a.half[which]; }

#endif
