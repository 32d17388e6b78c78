/* The LM head: the logits of a pass, or the largest of them, from the normed hidden states. */
#ifndef BN_HEAD_H
#define BN_HEAD_H

#include "pass.h"

/* Within a pass, by every thread: from n_rows rows of result_norm, of which each thread has
 * written rows thread, thread + n_threads, ..., the logits (or the largest ones) that the pass
 * asks for. */
void bn_head(const bn_run *run, int64_t n_rows);

/* The product that a build of an arithmetic takes for a table that is not of F16: BN_DOTS_*. `packed`: main has
 * packed the table for groups of 8 rows, which it does with those of Q4_0. */
int32_t bn_table_dots_of(int32_t type, const bn_arithmetic *arithmetic, int tiled, int packed);

/* Once, when arithmetic and model are known: which products the head takes. */
void bn_choose_head(bn_engine *engine);

/* Before a pass that searches: checks what it asks for, allocates what the search needs. */
int bn_reserve_search(bn_engine *engine, const bn_top *top);

void bn_free_search(bn_engine *engine);

#endif
