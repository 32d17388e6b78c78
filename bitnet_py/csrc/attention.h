/* Attention: the KV cache of a pass, and scores, softmax and weighted sum as three operations. */
#ifndef BN_ATTENTION_H
#define BN_ATTENTION_H

#include "pass.h"

/* Within a pass, by every thread: stores K (after RoPE) and V of the tokens thread, thread +
 * n_threads, ... in the cache. */
void bn_store_kv(const bn_run *run, int32_t layer);

/* Within a pass, by every thread: from q_rope and the cache to kqv. */
void bn_attention(const bn_run *run, int32_t layer);

/* Number of heads from `head` on, before `end`, that share keys; at most BN_HEADS_AT_ONCE. */
int64_t bn_heads_together(const bn_engine *engine, int64_t head, int64_t end);

#endif
