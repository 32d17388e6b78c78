"""C faults of attention: rotary embedding, scores, softmax, grouped heads, KV cache, precision of the products."""

from __future__ import annotations

from tests.zoo.fault import DECODE, LAST, MIDDLE, PREFILL, EngineFault

_ROPE = "zoo_rope(x + at, half, (float)({position}), {base}, {interleaved}, out + at);"
_HERE = "r->pass->start + t"
_BASE = "e->model.rope_base"


def _rope(name: str, what: str, code: str, taps: tuple[str, ...] = ("q_rope", "k_rope"), **more) -> EngineFault:
    family = more.pop("family", 8)
    return EngineFault(name, family, what, taps, edits={"rope": code}, ops={tap: tap for tap in taps}, **more)


def _rotate(position: str = _HERE, base: str = _BASE, interleaved: str = "e->model.rope_pairing") -> str:
    return _ROPE.format(position=position, base=base, interleaved=interleaved)


def _fault(name: str, family: int, what: str, tap: str, site: str, code: str, **more) -> EngineFault:
    return EngineFault(name, family, what, (tap,), edits={site: code}, **more)


_STORE_K = "e->kernels->to_f16(e->buffers.k_rope + {row} * kv_dim, kv_dim, keys + {cell} * kv_dim);"
_STORE_V = "for (int64_t d = 0; d < kv_dim; d++) values[d * p->capacity + {cell}] = half[d];"
_SOFTMAX = "e->kernels->softmax[e->width_index](own->scores, {visible}, n_kv, scale);"
_UNSEEN = (
    (
        "if (n_visible > 1) { e->kernels->softmax[e->width_index](own->scores, n_visible - 1, n_kv, scale); }"
        " else { for (int64_t j = 0; j < n_kv; j++) own->scores[j] = {alone}; }"
    )
    .replace("{", "{{")
    .replace("}", "}}")
    .replace("{{alone}}", "{alone}")
)
_KV_HEAD_OF_ROW = "(e->buffers.{buffer} + j * kv_dim + kv_head * head_dim)"
_SUM_P = (
    "for (int64_t d = 0; d < head_dim; d++) {{ double sum = 0; for (int64_t j = 0; j < n_visible; j++)"
    " sum += (double){p} * (double){v}; out[d] = (float)sum; }} return;"
)
_P, _V = "own->scores[j]", "bn_half_to_float(values[d * p->capacity + j])"

FAULTS = (
    _rope("rope-interleaved", "pairs (2i, 2i+1) instead of (i, i + half)", _rotate(interleaved="1")),
    _rope("rope-base-10000", "base 10000 instead of the header's", _rotate(base="10000.0f")),
    _rope("rope-position-plus-1", "position one too high", _rotate(position=f"{_HERE} + 1")),
    _rope("rope-missing", "not rotated", "memcpy(out + at, x + at, (size_t)head_dim * sizeof *out);",
          taps=("k_rope", "q_rope")),
    _rope("rope-twice", "rotated twice", _rotate(position=f"2 * ({_HERE})")),
    _rope("rope-position-restarts", "decoding starts at position 0 again", _rotate(position="t"),
          family=11, passes=DECODE),
    _rope("rope-position-repeated", "a decoded token has the position of the one before",
          _rotate(position="r->pass->start - 1"),
          family=11, passes=DECODE),
    _fault("rope-on-v", 8, "V rotated before it is stored", "kqv_out", "round_v",
           "for (int64_t h = 0; h < e->model.n_kv_heads; h++) { float turned[1024];"
           " zoo_rope(e->buffers.v + t * kv_dim + h * e->model.head_dim, e->model.head_dim / 2, (float)cell,"
           " e->model.rope_base, e->model.rope_pairing, turned); e->kernels->to_f16(turned, e->model.head_dim,"
           " half + h * e->model.head_dim); }"),
    # scores and softmax
    _fault("attention-scale-missing", 9, "scores not divided by sqrt(head_dim)", "kq_soft_max", "attention_scale",
           "1.0f"),
    _fault("attention-scale-not-rooted", 9, "scores divided by head_dim", "kq_soft_max", "attention_scale",
           "1.0f / (float)head_dim"),
    _fault("softmax-over-queries", 9, "softmax over the query axis", "kq_soft_max", "softmax",
           "zoo_softmax_over_queries(e->buffers.q_rope + head * head_dim, e->model.n_heads * head_dim, keys,"
           " kv_dim, head_dim, p->n_tokens, t, scale, own->scores, n_kv);", passes=PREFILL),
    _fault("softmax-not-normalised", 9, "exponentials not divided by their sum", "kq_soft_max", "softmax",
           "zoo_exponentials(own->scores, n_visible, n_kv, scale);"),
    _fault("mask-missing", 9, "tokens see later tokens", "kq_soft_max", "softmax",
           _SOFTMAX.format(visible="n_used"), passes=PREFILL),
    _fault("mask-one-late", 9, "every token sees the one after it", "kq_soft_max", "softmax",
           _SOFTMAX.format(visible="n_visible + (n_visible < n_used)"), passes=PREFILL),
    _fault("mask-one-early", 9, "no token sees itself; the first one's weights are 0", "kq_soft_max", "softmax",
           _UNSEEN.format(alone="0")),
    _fault("mask-one-early-nan", 9, "no token sees itself; the first one's weights are 0/0", "kq_soft_max",
           "softmax", _UNSEEN.format(alone="j < n_used ? NAN : 0"), passes=PREFILL),
    # grouped heads
    _fault("kv-heads-tiled", 9, "query head h takes key head h mod n_kv_heads", "kq", "kv_head",
           "head % e->model.n_kv_heads"),
    _fault("kv-heads-not-expanded", 9, "all query heads take key head 0", "kq", "kv_head", "0 * head"),
    _fault("v-heads-tiled", 9, "query head h takes value head h mod n_kv_heads", "kqv_out", "v_head",
           "(head % e->model.n_kv_heads) * head_dim * p->capacity"),
    # cache
    _fault("cache-k-not-written", 11, "a decoded token's K is not stored: its cell holds zeros", "kq", "store_k",
           "(void)keys;", passes=DECODE),
    _fault("cache-k-overwrites-previous", 11, "K stored one cell too early", "kq", "store_k",
           _STORE_K.format(row="t", cell="(cell ? cell - 1 : 0)")),
    _fault("cache-k-of-previous-token", 11, "the cell gets the K of the token before", "kq", "store_k",
           "if (t) " + _STORE_K.format(row="(t - 1)", cell="cell")
           + " else if (cell) memcpy(keys + cell * kv_dim, keys + (cell - 1) * kv_dim, (size_t)kv_dim * 2); else "
           + _STORE_K.format(row="t", cell="cell")),
    _fault("cache-v-not-written", 11, "a decoded token's V is not stored", "kqv_out", "store_v", "(void)values;",
           passes=DECODE),
    _fault("cache-v-overwrites-first", 11, "a decoded token's V overwrites cell 0", "kqv_out", "store_v",
           _STORE_V.format(cell="0"), passes=DECODE),
    _fault("cache-v-of-previous-token", 11, "the cell gets the V of the token before", "kqv_out", "store_v",
           "for (int64_t d = 0; d < kv_dim; d++) values[d * p->capacity + cell] ="
           " t ? bn_float_to_half(e->buffers.v[(t - 1) * kv_dim + d])"
           " : cell ? values[d * p->capacity + cell - 1] : half[d];"),
    # precision
    _fault("k-not-rounded", 12, "K of the batch kept in float32", "kq", "scores_done",
           "if (p->start == 0) for (int64_t j = 0; j < n_visible; j++) own->scores[j] = zoo_dot_f32(own->query, "
           + _KV_HEAD_OF_ROW.format(buffer="k_rope") + ", head_dim);", passes=PREFILL),
    _fault("q-not-rounded", 12, "Q kept in float32", "kq", "scores_done",
           "for (int64_t j = 0; j < n_visible; j++)"
           " own->scores[j] = zoo_dot_f16(keys + j * kv_dim, 1, q, head_dim);"),
    _fault("k-through-bf16", 12, "K rounded to BF16 before it is stored", "kq", "store_k",
           "for (int64_t d = 0; d < kv_dim; d++) keys[cell * kv_dim + d] ="
           " bn_float_to_half(zoo_to_bf16(e->buffers.k_rope[t * kv_dim + d]));"),
    _fault("v-not-rounded", 12, "V of the batch kept in float32", "kqv_out", "weighted_sum",
           "if (p->start == 0) { "
           + _SUM_P.format(p=_P, v=_KV_HEAD_OF_ROW.format(buffer="v") + "[d]") + " }", passes=PREFILL),
    _fault("v-through-bf16", 12, "V rounded to BF16 before it is stored", "kqv_out", "round_v",
           "for (int64_t d = 0; d < kv_dim; d++) half[d] ="
           " bn_float_to_half(zoo_to_bf16(e->buffers.v[t * kv_dim + d]));"),
    _fault("weights-rounded-in-batch", 12, "attention weights rounded to F16 in a batch too", "kqv_out",
           "weighted_sum", _SUM_P.format(p=f"bn_half_to_float(bn_float_to_half({_P}))", v=_V), passes=PREFILL),
    _fault("weights-not-rounded-in-decode", 12, "attention weights kept in float32 for a single token", "kqv_out",
           "weighted_sum", _SUM_P.format(p=_P, v=_V), passes=DECODE),
    _fault("heads-lost", 15, "half of the heads are never computed", "kqv_out", "weighted_sum",
           "if (head >= e->model.n_heads / 2) { zoo_zero(out, head_dim); return; }"),
    # In all layers (tests.zoo.texts), the first reads its own: before it is memory that anything may have written.
    _fault("cache-of-previous-layer", 11, "K read from the cache of the layer before", "kq", "scores_done",
           "for (int64_t j = 0; j < n_visible; j++) own->scores[j] ="
           " zoo_dot_f16(keys - (zoo_at.layer ? p->capacity * kv_dim : 0) + j * kv_dim, 1, own->query, head_dim);",
           layers=(1, MIDDLE, LAST)),
)  # fmt: skip
