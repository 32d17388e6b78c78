#include "counters.h"

#include <stdio.h>

static const struct {
    const char *operation;
    int32_t quantized, reads_weights;
} OPERATIONS[BN_COUNTERS] = {
    [BN_COUNT_I2S_GEMV] = {"i2s_gemv", 1, 1},    [BN_COUNT_I2S_GEMM] = {"i2s_gemm", 1, 1},
    [BN_COUNT_QUANTIZE] = {"quantize_i8", 0, 0}, [BN_COUNT_ATTENTION] = {"attention", 0, 0},
    [BN_COUNT_HEAD_F16] = {"head_f16", 0, 1},    [BN_COUNT_HEAD_SCREEN] = {"head_screen", 0, 1},
    [BN_COUNT_RMS_NORM] = {"rms_norm", 0, 1},    [BN_COUNT_ROPE] = {"rope", 0, 0},
};

void bn_counters_init(bn_counters *counters, const bn_kernels *kernels) {
    for (int i = 0; i < BN_COUNTERS; i++) {
        const char *family = i == BN_COUNT_RMS_NORM ? bn_kernels_scalar.name : kernels->name;
        snprintf(counters->names[i], sizeof counters->names[i], "%s_%s", OPERATIONS[i].operation, family);
        counters->of[i] = (bn_counter){.name = counters->names[i],
                                       .operation = OPERATIONS[i].operation,
                                       .family = family,
                                       .quantized = OPERATIONS[i].quantized,
                                       .reads_weights = OPERATIONS[i].reads_weights};
    }
}
