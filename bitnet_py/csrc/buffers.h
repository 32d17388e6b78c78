/* What an engine allocates for its passes: activations and the rotary table. Both only grow. */
#ifndef BN_BUFFERS_H
#define BN_BUFFERS_H

#include "engine.h"

/* Room for a pass of n_tokens tokens that ends at position n_used (exclusive); BN_OK or
 * BN_ERR_MEMORY. */
int bn_reserve_buffers(bn_engine *engine, int32_t n_tokens, int32_t n_used);
void bn_free_buffers(bn_engine *engine);

#endif
