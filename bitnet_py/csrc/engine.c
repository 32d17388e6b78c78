/* Life cycle of an engine, and what it does for its caller: checks, then a pass. */
#include "bitnet.h"
#include "buffers.h"
#include "error.h"
#include "families.h"
#include "forward.h"
#include "gelu.h"
#include "head.h"
#include "tables.h"

#include <stdlib.h>
#include <string.h>

int bn_abi_version(void) { return BN_ABI_VERSION; }

static int matrix_ok(const bn_matrix *m, int64_t rows, int64_t cols) {
    return m->data && m->rows == rows && m->cols == cols && cols % 128 == 0 && m->factor > 0;
}

static int table_ok(const bn_table *table, int64_t dim) {
    return table->type >= 0 && table->type < BN_TABLE_TYPES && dim % bn_table_formats[table->type].values == 0;
}

/* Whether norms that come together do. */
static int norms_ok(const bn_layer *l) {
    const int own = l->attn_q_norm_in != NULL;
    return own == !!l->attn_k_norm_in && own == !!l->attn_v_norm_in && own == !!l->ffn_gate_norm_in &&
           own == !!l->ffn_up_norm_in && !l->q_norm == !l->k_norm && !l->attn_post_norm == !l->ffn_post_norm;
}

static int same_norms(const bn_layer *a, const bn_layer *b) {
    return !a->attn_q_norm_in == !b->attn_q_norm_in && !a->q_norm == !b->q_norm &&
           !a->attn_post_norm == !b->attn_post_norm;
}

/* NULL, or a description of what is wrong. */
static const char *model_problem(const bn_model *m) {
    if (m->n_layers <= 0 || m->n_heads <= 0 || m->n_kv_heads <= 0 || m->head_dim <= 0 || m->dim <= 0 ||
        m->hidden_dim <= 0 || m->vocab_size <= 0)
        return "the model has a dimension below 1";
    if (m->head_dim % 2 || m->n_heads % m->n_kv_heads || m->n_heads > INT32_MAX / m->head_dim)
        return "head_dim must be even and n_heads a multiple of n_kv_heads";
    if (m->activation < 0 || m->activation >= BN_ACTIVATIONS) return "unknown activation";
    if (m->rope_pairing < 0 || m->rope_pairing >= BN_ROPE_PAIRINGS) return "unknown RoPE pairing";
    if (!(m->rope_scale > 0)) return "rope_scale must be above 0";
    if (!(m->embedding_scale > 0) || !(m->query_scale >= 0)) return "a scale of the model is out of range";
    if (!m->token_embd.rows || !m->output.rows || !m->output_norm || !m->layers)
        return "a tensor of the model is missing";
    const int64_t dim = m->dim, q_dim = (int64_t)m->n_heads * m->head_dim;
    const int64_t kv_dim = (int64_t)m->n_kv_heads * m->head_dim, hidden = m->hidden_dim;
    if (!table_ok(&m->token_embd, dim) || !table_ok(&m->output, dim))
        return "the embedding or the LM head has an unknown type, or rows that are no whole blocks";
    for (int32_t i = 0; i < m->n_layers; i++) {
        const bn_layer *l = &m->layers[i];
        if (!l->attn_norm || !l->ffn_norm || !matrix_ok(&l->q, q_dim, dim) || !matrix_ok(&l->k, kv_dim, dim) ||
            !matrix_ok(&l->v, kv_dim, dim) || !matrix_ok(&l->o, dim, q_dim) || !matrix_ok(&l->gate, hidden, dim) ||
            !matrix_ok(&l->up, hidden, dim) || !matrix_ok(&l->down, dim, hidden))
            return "the model's dimensions and tensors do not agree";
        if (!norms_ok(l) || (i && !same_norms(l, m->layers))) return "the norms of the layers do not agree";
    }
    return NULL;
}

static int has_whole_blocks(const bn_model *m) {
    return m->dim % BN_BLOCK == 0 && m->hidden_dim % BN_BLOCK == 0 && m->n_heads * m->head_dim % BN_BLOCK == 0;
}

/* NULL, or a description of what is wrong with an arithmetic. */
static const char *arithmetic_problem(const bn_arithmetic *a) {
    if (a->generation < 0 || a->generation >= BN_GENERATIONS) return "unknown generation";
    if (a->simd_width != 8 && a->simd_width != 16) return "simd_width must be 8 or 16";
    if (a->generation == BN_MAIN && a->fused_quantizer && !a->block_quantizer)
        return "the fused quantiser is March's, or works in blocks";
    if (a->fused_sums && !a->block_quantizer) return "fused sums are those of blocks";
    if (a->generation != BN_MAIN && (a->half_sums || a->flash_attention || a->follow_reference))
        return "binary16 sums, flash attention and following the reference are main's";
    if (a->half_sums && a->simd_width != 16) return "binary16 sums come with 16 lanes";
    if (a->bfloat_pairs && a->simd_width != 16) return "pairs of bfloat16 come with 16 lanes";
    if (a->attention_threads < 1 || a->attention_threads > 1024)
        return "attention_threads must be between 1 and 1024";
    return NULL;
}

/* What the arithmetic means for the kernels and for the model. */
static void choose_arithmetic(bn_engine *e, const bn_arithmetic *a) {
    const int is_main = a->generation == BN_MAIN;
    e->arithmetic = *a;
    e->width_index = BN_WIDTH_INDEX(a->simd_width);
    e->dot = a->half_sums ? BN_DOT_HALF_SUMS : e->width_index;
    e->quantizer = is_main ? BN_QUANTIZE_MAIN : a->fused_quantizer ? BN_QUANTIZE_MARCH_FUSED : BN_QUANTIZE_MARCH;
    /* bitnet.cpp's main has no squared ReLU: it computes those models with SiLU */
    const int has_none = a->follow_reference && e->model.activation == BN_RELU_SQUARED;
    e->activation = has_none ? BN_SILU : e->model.activation;
    bn_choose_head(e);
    bn_gelu_prepare();
    e->cell_multiple = is_main ? 256 : 32; /* llama.cpp, llama_kv_cache::get_n_kv; llama_kv_cache_get_padding */
}

int bn_engine_create(const bn_model *model, const bn_options *options, bn_engine **out) {
    *out = NULL;
    const char *problem = arithmetic_problem(&options->arithmetic);
    if (problem) return bn_fail(BN_ERR_ARGUMENT, problem);
    if (options->n_threads < 1 || options->n_threads > 1024)
        return bn_fail(BN_ERR_ARGUMENT, "n_threads must be between 1 and 1024");
    if (options->bytes_per_thread < 1) return bn_fail(BN_ERR_ARGUMENT, "bytes_per_thread must be at least 1");
    problem = model_problem(model);
    if (!problem && options->arithmetic.block_quantizer && !has_whole_blocks(model))
        problem = "activations in blocks need rows of a multiple of 256";
    if (problem) return bn_fail(BN_ERR_ARGUMENT, problem);
    const bn_kernels *kernels = bn_select_kernels(options->kernel);
    if (!kernels) return BN_ERR_UNAVAILABLE;

    bn_engine *e = calloc(1, sizeof *e);
    if (!e) return bn_fail(BN_ERR_MEMORY, "out of memory");
    e->model = *model;
    e->q_dim = model->n_heads * model->head_dim;
    e->kv_dim = model->n_kv_heads * model->head_dim;
    choose_arithmetic(e, &options->arithmetic);
    e->bytes_per_thread = options->bytes_per_thread;
    e->kernels = kernels;
    e->layers = malloc((size_t)model->n_layers * sizeof *e->layers);
    e->threads = calloc((size_t)options->n_threads, sizeof *e->threads);
    if (!e->layers || !e->threads) {
        bn_engine_free(e);
        return bn_fail(BN_ERR_MEMORY, "out of memory");
    }
    memcpy(e->layers, model->layers, (size_t)model->n_layers * sizeof *e->layers);
    e->model.layers = e->layers;
    const int64_t rows = 2 * ((int64_t)e->q_dim + e->kv_dim) + 3 * (int64_t)model->hidden_dim; /* of length dim */
    e->ternary_bytes = model->n_layers * model->dim * rows / 4;
    e->pool = bn_pool_create(options->n_threads);
    if (!e->pool) {
        bn_engine_free(e);
        return bn_fail(BN_ERR_THREAD, "could not start the worker threads");
    }
    bn_counters_init(&e->counters, kernels, model->output.type);
    *out = e;
    return BN_OK;
}

void bn_engine_free(bn_engine *e) {
    if (!e) return;
    bn_pool_free(e->pool);
    bn_free_buffers(e);
    bn_free_search(e);
    free(e->threads);
    free(e->layers);
    free(e);
}

const char *bn_engine_kernel(const bn_engine *e) { return e->kernels->name; }

int bn_engine_counters(const bn_engine *e, bn_counter *out, int capacity, int *count) {
    *count = BN_COUNTERS;
    for (int i = 0; i < BN_COUNTERS && i < capacity; i++) out[i] = e->counters.of[i];
    return BN_OK;
}

int bn_engine_forward(bn_engine *e, const bn_pass *pass) {
    if (pass->n_tokens < 1 || pass->start < 0) return bn_fail(BN_ERR_ARGUMENT, "a pass needs at least one token");
    if (pass->start > INT32_MAX / 2 - pass->n_tokens) return bn_fail(BN_ERR_ARGUMENT, "position out of range");
    if (pass->capacity % e->cell_multiple || pass->capacity < (int64_t)pass->start + pass->n_tokens) {
        bn_set_error("the cache is too small for this pass, or not a multiple of %d cells", e->cell_multiple);
        return BN_ERR_ARGUMENT;
    }
    if (pass->n_outputs != 0 && pass->n_outputs != 1 && pass->n_outputs != pass->n_tokens)
        return bn_fail(BN_ERR_ARGUMENT, "n_outputs must be 0, 1 or n_tokens");
    if (!pass->tokens || !pass->k_cache || !pass->v_cache ||
        (pass->n_outputs && !pass->logits && !pass->top && !pass->pooled))
        return bn_fail(BN_ERR_ARGUMENT, "a buffer of the pass is missing");
    if (pass->pooling < 0 || pass->pooling >= BN_POOLINGS || !pass->pooling != !pass->pooled)
        return bn_fail(BN_ERR_ARGUMENT, "unknown pooling, or one without its buffer");
    if (pass->pooling && (pass->n_outputs != pass->n_tokens || e->arithmetic.generation != BN_MAIN))
        return bn_fail(BN_ERR_ARGUMENT, "pooling needs every token as an output, and the arithmetic of main");
    if (pass->top && (pass->n_outputs != 1 || pass->logits))
        return bn_fail(
            BN_ERR_ARGUMENT,
            "a search for the largest logits needs exactly one output row, and no buffer for all logits");
    for (int32_t i = 0; i < pass->n_tokens; i++) {
        if (pass->tokens[i] < 0 || pass->tokens[i] >= e->model.vocab_size) {
            bn_set_error("token id %d is outside the vocabulary of %d", pass->tokens[i], e->model.vocab_size);
            return BN_ERR_ARGUMENT;
        }
    }
    e->has_head_input = 0; /* the buffers may move even when something fails below */
    int status = bn_reserve_buffers(e, pass->n_tokens, pass->start + pass->n_tokens);
    if (!status && pass->top) status = bn_reserve_search(e, pass->top);
    if (status) return status;
    bn_forward(e, pass);
    e->has_head_input = pass->n_outputs == 1 && (pass->logits || pass->top);
    return BN_OK;
}
