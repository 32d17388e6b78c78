#include "counters.h"
#include "tables.h"

#include <stdio.h>

static const struct {
    const char *operation;
    int32_t quantized, reads_weights;
} OPERATIONS[BN_COUNTERS] = {
    [BN_COUNT_I2S_GEMV] = {"i2s_gemv", 1, 1},
    [BN_COUNT_I2S_GEMM] = {"i2s_gemm", 1, 1},
    [BN_COUNT_QUANTIZE] = {"quantize_i8", 0, 0},
    [BN_COUNT_ATTENTION] = {"attention", 0, 0},
    [BN_COUNT_HEAD] = {NULL, 0, 1},
    [BN_COUNT_HEAD_SCREEN] = {"head_screen", 0, 1},
    [BN_COUNT_RMS_NORM] = {"rms_norm", 0, 1},
    [BN_COUNT_ROPE] = {"rope", 0, 0},
};

void bn_counters_init(bn_counters *counters, const bn_kernels *kernels, int32_t head_type) {
    for (int i = 0; i < BN_COUNTERS; i++) {
        const char *family = i == BN_COUNT_RMS_NORM ? bn_kernels_scalar.name : kernels->name;
        const char *operation =
            i == BN_COUNT_HEAD ? bn_table_formats[head_type].operation : OPERATIONS[i].operation;
        snprintf(counters->names[i], sizeof counters->names[i], "%s_%s", operation, family);
        counters->of[i] = (bn_counter){.name = counters->names[i],
                                       .operation = operation,
                                       .family = family,
                                       .quantized = OPERATIONS[i].quantized,
                                       .reads_weights = OPERATIONS[i].reads_weights};
    }
}
