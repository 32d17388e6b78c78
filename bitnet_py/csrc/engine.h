/* The engine's state, shared by engine.c (life cycle) and forward.c (one pass). */
#ifndef BN_ENGINE_H
#define BN_ENGINE_H

#include "bitnet.h"
#include "kernels.h"
#include "screen.h"
#include "threads.h"

#include <stddef.h>

/* Activations of one pass. "[n]" is the number of tokens the buffers hold room for. */
typedef struct {
    float *x;           /* [n][dim]        residual stream: layer input, then layer output */
    float *attn_norm;   /* [n][dim] */
    float *q, *q_rope;  /* [n][dim] */
    float *k, *k_rope;  /* [n][kv_dim] */
    float *v;           /* [n][kv_dim] */
    float *kqv;         /* [n][dim] */
    float *attn_sub;    /* [n][dim] */
    float *attn_out;    /* [n][dim] */
    float *ffn_inp;     /* [n][dim] */
    float *ffn_norm;    /* [n][dim] */
    float *gate, *up;   /* [n][hidden_dim] */
    float *act, *prod;  /* [n][hidden_dim] */
    float *ffn_sub;     /* [n][hidden_dim] */
    float *down;        /* [n][dim] */
    float *result_norm; /* [n][dim] */
    float *head_in;     /* [n][dim]        result_norm as the head multiplies it */
    int8_t *q8;         /* [n][max(dim, hidden_dim)] quantised activations, row stride = the row's length */
    float *q8_scale;    /* [n]             127 / absmax */
    int32_t *q8_sum;    /* [n]             sum of the row of q8 */
    uint16_t *half;     /* [n][kv_dim]     V in binary16, before it is stored transposed */
} bn_buffers;

/* Private to one member of the team. */
typedef struct {
    float *query;   /* [BN_HEADS_AT_ONCE][head_dim] */
    float *scores;  /* [BN_HEADS_AT_ONCE][n_kv padded] */
    uint16_t *half; /* [max(BN_HEADS_AT_ONCE * max(n_kv padded, head_dim), dim)] */
    int32_t *acc;   /* [tile_cols of the kernels][BN_TILE_ROWS] */
} bn_private;

enum { BN_TILE_ROWS = 64 };

/* Heads that share keys and values and are attended together: what is read is converted to binary32 once for all.
 */
enum { BN_HEADS_AT_ONCE = 4 };

/* Operations that are counted. */
enum {
    BN_COUNT_I2S_GEMV,
    BN_COUNT_I2S_GEMM,
    BN_COUNT_QUANTIZE,
    BN_COUNT_ATTENTION,
    BN_COUNT_HEAD_F16,
    BN_COUNT_HEAD_SCREEN,
    BN_COUNT_RMS_NORM,
    BN_COUNT_ROPE,
    BN_COUNTERS
};

struct bn_engine {
    bn_model model;
    bn_layer *layers;      /* model.layers points here */
    int64_t ternary_bytes; /* of all layers */
    int64_t bytes_per_thread;
    int32_t kv_dim, width_index, simd_width, fused_quantizer;
    const bn_kernels *kernels;
    bn_team *team;

    void *arena; /* bn_buffers and bn_private live in it */
    int32_t arena_tokens;
    int64_t arena_cells;
    bn_buffers buffers;
    bn_private *members; /* [team size] */

    bn_search search;       /* z and upper are allocated with the first pass that searches */
    bn_found *found;        /* [team size] */
    int32_t has_head_input; /* whether head_in holds the last output row of a pass */

    float *rope_cos, *rope_sin; /* [rope_positions][head_dim / 2] */
    int32_t rope_positions;

    uint64_t calls[BN_COUNTERS], bytes[BN_COUNTERS];
    char counter_names[BN_COUNTERS][32];
};

static inline int64_t bn_pad32(int64_t n) { return (n + 31) / 32 * 32; }

/* Run by engine.c on validated arguments; the buffers are large enough. */
void bn_forward(bn_engine *engine, const bn_pass *pass);
void bn_build_screen(bn_engine *engine, int64_t first_row, int64_t n_rows, const bn_screen *out);
void bn_last_logits(bn_engine *engine, int64_t first_row, int64_t n_rows, float *logits);

#endif
