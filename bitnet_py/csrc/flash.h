/* Flash attention as bitnet.cpp's main computes it: scores, softmax and weighted sum as one
 * operation, whose rounding depends on how many tokens a pass has. */
#ifndef BN_FLASH_H
#define BN_FLASH_H

#include "pass.h"

/* Within a pass, by every thread: from q_rope and the cache to kqv. */
void bn_flash_attention(const bn_run *run, int32_t layer);

#endif
