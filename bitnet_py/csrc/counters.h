/* How often each operation ran, and how much it read; stored as the public bn_counter. */
#ifndef BN_COUNTERS_H
#define BN_COUNTERS_H

#include "bitnet.h"
#include "kernels.h"

enum {
    BN_COUNT_I2S_GEMV,
    BN_COUNT_I2S_GEMM,
    BN_COUNT_QUANTIZE,
    BN_COUNT_ATTENTION,
    BN_COUNT_HEAD,
    BN_COUNT_HEAD_SCREEN,
    BN_COUNT_RMS_NORM,
    BN_COUNT_ROPE,
    BN_COUNTERS
};

typedef struct {
    bn_counter of[BN_COUNTERS];
    char names[BN_COUNTERS][32]; /* what of[i].name points to */
} bn_counters;

/* All zero; the names follow from the kernels and from the type of the LM head. */
void bn_counters_init(bn_counters *counters, const bn_kernels *kernels, int32_t head_type);

static inline void bn_count(bn_counters *counters, int which, uint64_t bytes) {
    counters->of[which].calls++;
    counters->of[which].bytes += bytes;
}

#endif
