"""Where in the engine's sources faults can be put: in ``forward.c``, ``attention.c`` and ``head.c``.

Each text must occur exactly once in the three together. When these files change, only the texts here change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["statement", "expression", "before", "after", "function"]


@dataclass(frozen=True)
class Site:
    """A place in the source, and how a fault's code replaces it.

    ``statement``: the code runs instead of the text; ``expression``: it is evaluated instead; ``before`` and
    ``after``: it runs there in addition (``after`` the head of a function it may return); ``function``: it is in
    ``zoo_damage``, called with every tensor that is recorded before the next operation reads it.
    """

    kind: Kind
    text: str


SITES = {
    # operations on one row
    "norm_rows": Site("after", "    const float eps = r->engine->model.rms_eps;\n"),
    "quantize_row": Site(
        "after",
        "static void quantize_row(const bn_run *r, const float *x, int64_t n, int64_t row) {\n"
        "    bn_engine *e = r->engine;\n",
    ),
    "quantized": Site("before", "    bn_count_once(r, BN_COUNT_QUANTIZE, 0);"),
    # BitLinear
    "i2s_dot": Site(
        "statement",
        "e->kernels->i2s_dot(m->data + row * (m->cols / 4), m->cols, n_rows, b->q8 + (first + t) * m->cols,\n"
        "                                m->cols, n_cols, acc);",
    ),
    "row_scale": Site("expression", "b->q8_scale[first + t + c]"),
    "rescale": Site("statement", "rescale(acc + c * n_rows, n_rows, sum, s, m->scale, out);"),
    "factor": Site("statement", "y[i] *= m->factor;"),
    "bias": Site("statement", "y[i] += m->bias[row + i];"),
    "bitlinear_done": Site("before", "    bn_count_once(r, n_tokens == 1 ? BN_COUNT_I2S_GEMV"),
    "q_matrix": Site("expression", "&w->q"),
    "k_matrix": Site("expression", "&w->k"),
    "v_matrix": Site("expression", "&w->v"),
    "gate_matrix": Site("expression", "&w->gate"),
    "up_matrix": Site("expression", "&w->up"),
    "activation": Site(
        "statement",
        "activate(b->gate + t * hidden, b->up + t * hidden, hidden, b->act + t * hidden, b->prod + t * hidden);",
    ),
    # attention
    "rope": Site("statement", "rotate(x + at, cosines, sines, (int)half, out + at);"),
    "store_k": Site(
        "statement", "e->kernels->to_f16(e->buffers.k_rope + t * kv_dim, kv_dim, keys + cell * kv_dim);"
    ),
    "round_v": Site("statement", "e->kernels->to_f16(e->buffers.v + t * kv_dim, kv_dim, half);"),
    "store_v": Site("statement", "for (int64_t d = 0; d < kv_dim; d++) values[d * p->capacity + cell] = half[d];"),
    "kv_head": Site("expression", "head / (e->model.n_heads / e->model.n_kv_heads)"),
    "v_head": Site("expression", "kv_head * head_dim * p->capacity"),
    "scores_done": Site("before", "        if (kq_tap) memcpy("),
    "attention_scale": Site("expression", "1.0f / sqrtf((float)head_dim)"),
    "softmax": Site(
        "statement", "e->kernels->softmax[e->width_index](scores, n_visible, n_kv, scale);"
    ),
    "weighted_sum": Site(
        "after", "    float *out = e->buffers.kqv + (t * e->model.n_heads + head) * head_dim;\n"
    ),
    # residuals
    "ffn_inp": Site(
        "statement", "add_rows(r, attended, b->x + skipped, n_rows * dim, b->ffn_inp);"
    ),
    "l_out": Site("statement", "add_rows(r, fed, b->ffn_inp, n_rows * dim, b->x);"),
    # the ends
    "embed": Site(
        "statement",
        "bn_table_widen(table->type, bn_table_row(table, r->pass->tokens[t], dim), dim, e->buffers.x + t * dim);",
    ),
    "head_input": Site(
        "statement",
        "{\n            uint16_t *half = e->threads[r->thread].half;\n"
        "            e->kernels->to_f16(normed, dim, half);\n"
        "            e->kernels->from_f16(half, dim, input);\n        }",
    ),
    "head_done": Site("before", "    bn_count_once(r, BN_COUNT_HEAD, (uint64_t)(vocab * bn_table_row_bytes("),
    "damage": Site("function", ""),
}  # fmt: skip

PLACES = (
    ("embed(r);", None, "inp_embd"),
    ("int64_t apart = prepare(r, b->x, w->attn_norm, qkv_norms, 3, n, b->attn_norm);", "layer", "attn_norm"),
    ("bitlinear(r, &w->q,", "layer", "q"),
    ("bitlinear(r, &w->k,", "layer", "k"),
    ("bitlinear(r, &w->v,", "layer", "v"),
    ("rope_rows(r, q,", "layer", "q_rope"),
    ("rope_rows(r, k,", "layer", "k_rope"),
    ("bn_attention(r, layer);", "layer", "kq"),
    ("norm_and_quantize(r, b->kqv,", "layer", "attn_sub_norm"),
    ("bitlinear(r, &w->o,", "layer", "attn_o_out"),
    ("add_rows(r, attended,", "layer", "ffn_inp"),
    ("apart = prepare(r, b->ffn_inp, w->ffn_norm, ffn_norms, 2, n_rows, b->ffn_norm);", "layer", "ffn_norm"),
    ("bitlinear(r, &w->gate,", "layer", "ffn_gate"),
    ("bitlinear(r, &w->up,", "layer", "ffn_up"),
    (
        "for (int64_t t = r->thread; t < n_rows; t += r->n_threads)\n        activate(",
        "layer",
        "ffn_act",
    ),
    ("norm_and_quantize(r, b->prod,", "layer", "ffn_sub_norm"),
    ("bitlinear(r, &w->down,", "layer", "ffn_down"),
    ("add_rows(r, fed,", "layer", "l_out"),
    ("norm_rows(r, b->x, e->model.output_norm,", None, "result_norm"),
    ("for (int64_t row = lo; row < hi; row += 16)\n        multiply_rows(", None, "result_output"),
)
"""Statements before which a thread notes where it is: text, layer expression, tap that the statement computes."""

ALWAYS = (
    ("e->kernels->quantize[e->quantizer](x, n,", "zoo_rows[row % ZOO_MAX_ROWS] = x;\n    "),
    ("return n < end - head ? n : end - head;", "n = 1; /* a fault's code is about one head */\n    "),
)
"""Code that runs before a statement in any case; it changes no result."""

DAMAGEABLE = (
    "inp_embd", "q", "k", "v", "q_rope", "kqv_out", "attn_o_out", "ffn_inp", "ffn_gate", "ffn_up", "ffn_down",
    "l_out", "result_output",
)  # fmt: skip
"""Taps that are recorded before anything reads them: changing one there is a fault of the running engine."""
