/* One vector from the rows of a pass. */
#ifndef BN_POOLING_H
#define BN_POOLING_H

#include "pass.h"

/* Within a pass, by every thread: writes `pooled` from the rows of result_norm, one per token. */
void bn_pooling(const bn_run *run);

#endif
