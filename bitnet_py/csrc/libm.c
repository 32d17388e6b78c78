/* A fingerprint of the C library's powf, cosf and sinf, which RoPE uses directly. */
#include "bitnet.h"
#include "numerics.h"

static uint64_t mix(uint64_t digest, float value) {
    return (digest ^ bn_bits(value)) * 0x100000001b3u; /* FNV-1a */
}

uint64_t bn_libm_digest(void) {
    static const float bases[] = {10000.0f, 500000.0f};
    static const int head_dims[] = {64, 128};
    uint64_t digest = 0xcbf29ce484222325u;
    for (int b = 0; b < 2; b++) {
        for (int h = 0; h < 2; h++) {
            const float ratio = powf(bases[b], -2.0f / (float)head_dims[h]);
            digest = mix(digest, ratio);
            for (int position = 0; position < 4096; position += 13) {
                float theta = (float)position;
                for (int i = 0; i < head_dims[h] / 2; i++) {
                    digest = mix(mix(digest, cosf(theta)), sinf(theta));
                    theta *= ratio;
                }
            }
        }
    }
    return digest;
}
