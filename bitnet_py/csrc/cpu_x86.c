#include "cpu_x86.h"

#ifdef __linux__
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cpuid.h>
#include <pthread.h>
#include <stdint.h>

enum { FMA = 1 << 12, OSXSAVE = 1 << 27, F16C = 1 << 29 };          /* leaf 1, ecx */
enum { AVX2 = 1 << 5, AVX512F = 1 << 16, AVX512BW = 1 << 30 };      /* leaf 7, ebx */
static const uint32_t AVX512VL = 1u << 31;                          /* leaf 7, ebx */
enum { AVX512_VNNI = 1 << 11 };                                     /* leaf 7, ecx */
enum { AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };                    /* leaf 7, edx */
enum { STATE_AVX = 0x6, STATE_AVX512 = 0xe6, STATE_AMX = 0x60000 }; /* XCR0 */

typedef struct {
    uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx;
    uint64_t state;
    int tiles_granted;
} features;

static features f;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* A process may use the tiles only after Linux has agreed to save them
 * (Documentation/arch/x86/xstate.rst). Old kernels refuse, as does any kernel if a thread has a
 * signal stack that could not hold them. */
static int ask_for_tiles(void) {
#ifdef SYS_arch_prctl
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0;
#else
    return 0;
#endif
}

static void ask(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    f.leaf1_ecx = c;
    if (c & OSXSAVE) {
        uint32_t low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        f.state = ((uint64_t)high << 32) | low;
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        f.leaf7_ebx = b;
        f.leaf7_ecx = c;
        f.leaf7_edx = d;
        f.tiles_granted = (d & AMX_TILE) && ask_for_tiles();
    }
}

int bn_x86_has_avx2(void) {
    pthread_once(&once, ask); /* a virtual machine takes microseconds for each CPUID */
    return (f.leaf1_ecx & FMA) && (f.leaf1_ecx & F16C) && (f.leaf7_ebx & AVX2) &&
           (f.state & STATE_AVX) == STATE_AVX;
}

int bn_x86_has_avx512vnni(void) {
    return bn_x86_has_avx2() && (f.leaf7_ebx & AVX512F) && (f.leaf7_ebx & AVX512BW) && (f.leaf7_ebx & AVX512VL) &&
           (f.leaf7_ecx & AVX512_VNNI) && (f.state & STATE_AVX512) == STATE_AVX512;
}

int bn_x86_has_amx(void) {
    return bn_x86_has_avx512vnni() && (f.leaf7_edx & AMX_TILE) && (f.leaf7_edx & AMX_INT8) &&
           (f.state & STATE_AMX) == STATE_AMX && f.tiles_granted;
}
