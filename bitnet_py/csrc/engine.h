/* The engine's state. */
#ifndef BN_ENGINE_H
#define BN_ENGINE_H

#include "bitnet.h"
#include "counters.h"
#include "kernels.h"
#include "screen.h"
#include "thread_pool.h"

/* Activations of one pass. "[n]" is the number of tokens the buffers have room for. */
typedef struct {
    float *x;           /* [n][dim]        residual stream: layer input, then layer output */
    float *embd;        /* [n][dim]        the embedding before it is scaled */
    float *attn_norm;   /* [n][dim] */
    float *inputs[3];   /* [n][dim]        of Q, K and V, and of gate and up, where each has a norm of its own */
    float *q, *q_rope;  /* [n][q_dim] */
    float *k, *k_rope;  /* [n][kv_dim] */
    float *q_norm;      /* [n][q_dim] */
    float *k_norm;      /* [n][kv_dim] */
    float *q_scaled;    /* [n][q_dim] */
    float *v;           /* [n][kv_dim] */
    float *kqv;         /* [n][q_dim] */
    float *attn_sub;    /* [n][q_dim] */
    float *attn_out;    /* [n][dim] */
    float *attn_post;   /* [n][dim] */
    float *ffn_inp;     /* [n][dim] */
    float *ffn_norm;    /* [n][dim] */
    float *gate, *up;   /* [n][hidden_dim] */
    float *act, *prod;  /* [n][hidden_dim] */
    float *ffn_sub;     /* [n][hidden_dim] */
    float *down;        /* [n][dim] */
    float *ffn_post;    /* [n][dim] */
    float *result_norm; /* [n][dim] */
    float *head_in;     /* [n][dim]        result_norm as the LM head multiplies it */
    int8_t *q8;         /* [n][max(dim, q_dim, hidden_dim)] quantised activations, row stride = the row's length;
                         * with inputs of their own [3][n_tokens of the pass][dim] */
    float *q8_scale;    /* [n], [3 n]      127 / absmax */
    int32_t *q8_sum;    /* [n], [3 n]      sum of the row of q8 */
    float *steps;       /* [q8 / 32]       in blocks: what one unit of q8 stands for */
    int32_t *groups;    /* [q8 / 32]       in blocks: sums of 32 */
    uint16_t *half;     /* [n][kv_dim]     V in binary16, before it is stored transposed */
} bn_buffers;

/* Heads that share keys and values and are attended together: what is read is converted to
 * binary32 once for all of them.
 */
enum { BN_HEADS_AT_ONCE = 4 };

/* Flash attention, tiled: some queries of heads that share keys, times 64 cells at a time. */
enum { BN_FLASH_CELLS = 64, BN_FLASH_QUERIES = 16 };
enum { BN_FLASH_ROWS = BN_HEADS_AT_ONCE * BN_FLASH_QUERIES };

/* Private buffers of flash attention; NULL without it. */
typedef struct {
    float *query;  /* [BN_FLASH_ROWS][head_dim] */
    float *keys;   /* [head_dim][BN_FLASH_CELLS] */
    float *values; /* [BN_FLASH_CELLS][head_dim] */
    float *scores; /* [BN_FLASH_ROWS][BN_FLASH_CELLS] */
    float *sums;   /* [BN_FLASH_ROWS][head_dim]       weighted sums of values so far */
    float *part;   /* [head_dim]                      the same of one part of the cells */
} bn_flash;

/* Private buffers of one thread. */
typedef struct {
    float *query;   /* [BN_HEADS_AT_ONCE][head_dim] */
    float *scores;  /* [BN_HEADS_AT_ONCE][n_kv padded] */
    uint16_t *half; /* [max(BN_HEADS_AT_ONCE * max(n_kv padded, head_dim), dim)] */
    int32_t *acc;   /* [tile_cols of the kernels][BN_TILE_ROWS] */
    bn_flash flash;
} bn_private;

enum { BN_TILE_ROWS = 64 };

struct bn_engine {
    bn_model model;
    bn_layer *layers;      /* model.layers points here */
    int64_t ternary_bytes; /* of all layers */
    int64_t bytes_per_thread;
    int32_t q_dim, kv_dim;
    bn_arithmetic arithmetic;
    int32_t quantizer, dot, width_index, activation; /* the kernels that follow from it */
    int32_t head_dots[2];  /* of a table that is not of F16: BN_DOTS_* for one row of input, and for several */
    int32_t cell_multiple; /* attention takes the cells of the cache in groups of so many */
    const bn_kernels *kernels;
    bn_pool *pool;

    void *arena; /* holds what bn_buffers and bn_private point to */
    int32_t arena_tokens;
    int64_t arena_cells;
    bn_buffers buffers;
    bn_private *threads; /* [pool size] */

    bn_search search;       /* z and upper are allocated with the first pass that searches */
    bn_found *found;        /* [pool size] */
    int32_t has_head_input; /* whether head_in holds the last output row of a pass */

    float *rope_cos, *rope_sin; /* [rope_positions][head_dim / 2] */
    int32_t rope_positions;

    bn_counters counters;
};

/* Q as attention multiplies it with K. */
static inline const float *bn_query(const bn_engine *e) {
    return e->model.query_scale > 0 ? e->buffers.q_scaled : e->buffers.q_rope;
}

static inline int64_t bn_pad(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#endif
