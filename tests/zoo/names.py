"""Which diagnosis is correct for each fault: names as ``diagnose.search`` reports them, with wildcards.

Faults that are not listed have no name anywhere: for them every name is a wrong one. ``{previous}``, ``{layer}``
and ``{next}`` stand for the layer of the case and its neighbours, ``{tap}`` and ``{tensor}`` for its operation's.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from crossval.model import taps
from crossval.selftest.damage import TENSORS
from tests.zoo.fault import Case
from tests.zoo.faults import bitnet, llama
from tests.zoo.models import SHAPE

_NEXT_MATRIX = "weights of blk.{next}.{tensor}.weight"
_ZERO_FEATURES = "feature* zero"
_LEFT_OVER_ZERO = "tokens 4 to 7 (exclusive) zero"
"""Of one batch of seven tokens nothing more can be said: the four before may be a group or a limit."""
_EPS_GROUP = "wrong or misplaced eps"
"""Where value and place of eps cannot be told apart."""
_EPS = ("eps 1e-06", _EPS_GROUP)

RIGHT: dict[str, str | tuple[str, ...]] = {
    # weights: layout, code table, block, scale
    "codes-sequential-high-first": "codes read four in a row",
    "codes-sequential-low-first": "codes read four in a row, low bits first",
    "file-read-sequentially": "codes read four in a row",
    "file-read-sequentially-low-first": "codes read four in a row, low bits first",
    "table-minus2-to-2": "code table -2, -1, +1",
    "table-thirds": "code table -1, -0.33, +0.33",
    "table-zero-plus-minus": "code table 0, +1, -1",
    "file-table-zero-plus-minus": "code table 0, +1, -1",
    "offset-forgotten": "code table 0, 1, 2",
    "file-signs-inverted": "code table +1, 0, -1",
    "block-of-64": "block of 64",
    "file-blocks-of-64": "block of 64",
    "weight-scale-ignored": "weight scale ignored",
    "file-scale-one": "weight scale ignored",
    "weight-scale-twice": "weight scale applied twice",
    "file-scale-twice": "weight scale applied twice",
    "weight-scale-inverted": "weight scale inverted",
    "file-scale-inverted": "weight scale inverted",
    "file-scale-doubled": "output times 2",
    "file-scale-halved": "output times 0.5",
    "file-scale-of-k": "scale of blk.{layer}.attn_[kv].weight",
    # activation quantisation
    "input-scale-one-at-rescale": "input scale not undone",
    "row-scale-of-first-row": "sums rescaled by the first row's input scale",
    "row-scale-of-previous-row": "sums rescaled by the previous row's input scale",
    "activations-not-quantised": "no activation quantisation",
    "input-scale-fixed": "input scale 1.0",
    "quantiser-truncates": "truncation",
    "quantiser-rounds-half-up": "round half up",
    "quantiser-per-tensor": "per-tensor absmax",
    # FFN
    "act-silu": "SiLU",
    "act-gelu": "GELU",
    "act-relu": "plain ReLU",
    "act-square": "square without ReLU",
    "act-on-up": "activation on up",
    "gate-and-up-swapped": "weights of blk.{layer}.ffn_up.weight",
    "file-gate-and-up-swapped": "weights of blk.{layer}.ffn_up.weight",
    "gate-times-gate": "multiplied by gate",
    # norms
    "norm-layer-norm": "LayerNorm",
    "final-norm-layer-norm": "LayerNorm",
    "norm-eps-outside": ("eps outside the root", _EPS_GROUP),
    "final-norm-eps-outside": ("eps outside the root", _EPS_GROUP),
    "norm-eps-hard-coded": _EPS,
    "final-norm-eps-hard-coded": _EPS,
    "file-eps-1e-6": _EPS,
    "norm-weight-missing": "norm weight not applied",
    "final-norm-weight-missing": "norm weight not applied",
    "norm-weight-plus-1": "norm weight + 1",
    "final-norm-weight-plus-1": "norm weight + 1",
    "sub-norm-skipped": "norm skipped",
    "file-norms-swapped": "norm weight of blk.{layer}.ffn_norm.weight",
    "file-norm-of-another-layer": "norm weight of blk.{next}.{tensor}.weight",
    "file-final-norm-of-a-layer": "norm weight of blk.0.attn_norm.weight",
    # RoPE
    "rope-interleaved": "interleaved pairs",
    "rope-base-10000": "RoPE base 10000",
    "file-rope-base-10000": "RoPE base 10000",
    "rope-position-plus-1": "position +1",
    "rope-missing": "not rotated",
    "rope-twice": "rotated twice",
    "rope-on-v": "RoPE applied to V",
    "rope-on-v-in-place": "RoPE applied to V",
    # attention
    "attention-scale-missing": "no scale",
    "attention-scale-not-rooted": "scale 1/head_dim",
    "softmax-over-queries": "softmax over queries",
    "softmax-not-normalised": "not normed",
    "mask-missing": "mask missing",
    "mask-one-late": "mask off by one: a token sees the next",
    "mask-one-early": "mask off by one: a token does not see itself*",
    "mask-one-early-nan": "mask off by one: a token does not see itself*",
    "kv-heads-tiled": "GQA heads tiled",
    "v-heads-tiled": "GQA heads tiled",
    "kv-heads-not-expanded": "all heads read kv head 0",
    # projections
    "q-of-another-layer": _NEXT_MATRIX,
    "k-of-another-layer": _NEXT_MATRIX,
    "v-of-another-layer": _NEXT_MATRIX,
    "file-of-another-layer": _NEXT_MATRIX,
    "file-transposed": "weights transposed",
    "file-k-and-v-swapped": "weights of blk.{layer}.attn_v.weight",
    "embedding-transposed": "embedding table transposed",
    "file-embedding-transposed": "embedding table transposed",
    "embedding-row-one-off": "row of token id +1",
    "head-transposed": "head table transposed",
    "head-tied-by-mistake": "head of token_embd.weight",
    # KV cache
    "rope-position-restarts": "positions restart*",
    "rope-position-repeated": "position -1",
    "cache-k-not-written": "own cells not written",
    "cache-v-not-written": "own cells not written",
    "cache-k-overwrites-previous": "own cells stored one too early",
    "cache-k-of-previous-token": ("own cells hold the token before", "every cell holds the token before"),
    "cache-v-of-previous-token": ("own cells hold the token before", "every cell holds the token before"),
    "cache-of-previous-layer": "KV positions all read as those of layer {previous}",
    # one decoded token in cell 0 is a cache that starts again at cell 0
    "cache-v-overwrites-first": ("cell 0 overwritten by the newest", "cache restarts at cell 0"),
    "batch-remainder-zero": _LEFT_OVER_ZERO,
    "batch-remainder-repeated": "tokens 4 to 7 (exclusive) hold the one before",
    "trace-batch-remainder-zero": _LEFT_OVER_ZERO,
    "trace-stale-row": "token 6 holds the one before",
    "trace-stale-pass": "output stale",
    # precision
    "k-not-rounded": "F16 rounding of k_cache missing",
    "q-not-rounded": "F16 rounding of q_rope missing",
    "v-not-rounded": "F16 rounding of v_cache missing",
    "k-through-bf16": "k_cache rounded to BF16",
    "v-through-bf16": "v_cache rounded to BF16",
    "weights-rounded-in-batch": "F16 rounding of kq_soft_max added",
    "weights-not-rounded-in-decode": "F16 rounding of kq_soft_max missing",
    "head-input-not-rounded": "F16 rounding of result_norm missing",
    "head-input-through-bf16": "result_norm rounded to BF16",
    "file-embedding-bf16-bits": "embedding BF16 read as F16",
    "file-embedding-through-bf16": "output rounded to BF16",
    "trace-rounded-to-f16": "output rounded to F16",
    "trace-rounded-to-bf16": "output rounded to BF16",
    # residuals
    "residual-skipped-after-attention": "residual skipped",
    "residual-skipped-after-ffn": "residual skipped",
    "residual-doubled-after-attention": "residual doubled",
    "residual-doubled-after-ffn": "residual doubled",
    "residual-of-normed-after-attention": "residual after the norm",
    "residual-of-normed-after-ffn": "residual after the norm",
    # input
    "input-shifted-right": ("row of the token before", "every token holds the one before"),
    "input-shifted-left": ("row of the token after", "every token holds the one after"),
    "trace-token-ids-shifted": "row of token id -1",
    # kernels
    "empty-kernel": "-1 times the activation sum",
    "rows-swapped": "tokens 1, 2 hold the results of tokens 2, 1",
    "trace-rows-swapped": "tokens 1, 2 hold the results of tokens 2, 1",
    "accumulator-16-bit": "16-bit sum wraps",
    "thread-slice-lost": _ZERO_FEATURES,
    "trace-thread-slice-lost": _ZERO_FEATURES,
    "heads-lost": _ZERO_FEATURES,
    "last-row-unwritten": _ZERO_FEATURES,
    "head-rows-mod-4-unwritten": _ZERO_FEATURES,
    "head-thread-slice-lost": _ZERO_FEATURES,
    "trace-logits-shifted": "logits shifted by +1",
    "trace-one-in-ten-thousand": "output times 1.0001",
    "trace-of-another-layer": ("holds the values of blk.{next}.{tap}", "another tensor"),
}

OPEN = frozenset({"rope-position-restarts"})
"""Faults that ought to have a name but are left ``undetermined`` at the first of their places."""


_OF_BASE: Mapping[str, Mapping[str, str]] = {
    llama.PLAIN: llama.RIGHT,
    llama.EXTRAS: llama.RIGHT,
    bitnet.BASE: bitnet.RIGHT,
    bitnet.SCALED: bitnet.RIGHT,
}


def patterns(case: Case) -> tuple[str, ...]:
    """Return the correct names for a case; none: it has no name."""
    own = _OF_BASE.get(case.fault.base, {})
    right = own.get(case.fault.name, RIGHT.get(case.fault.name, ()))
    layer = case.layer or 0
    tap = taps.parse(case.tap).tap
    near = {"previous": layer - 1, "layer": layer, "next": (layer + 1) % SHAPE.n_layers}
    place = {**near, "tensor": TENSORS.get(tap, tap), "tap": tap}
    return tuple(one.format(**place) for one in ((right,) if isinstance(right, str) else right))


def is_right(case: Case, name: str) -> bool:
    """Return whether a diagnosis names the fault."""
    return any(fnmatchcase(name, pattern) for pattern in patterns(case))
