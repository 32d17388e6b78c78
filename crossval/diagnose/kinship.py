"""Operations that go wrong together or look alike: shared code, tensors taken for each other, synonyms."""

from __future__ import annotations

from crossval.model.taps import BITLINEARS, NORMS

SHARED: tuple[tuple[str, frozenset[str]], ...] = (
    ("queries and keys", frozenset({"q_rope", "k_rope"})),
    ("queries and keys", frozenset({"q", "k"})),
    ("queries, keys and values", frozenset({"q", "k", "v"})),
    ("gate and up", frozenset({"ffn_gate", "ffn_up"})),
    ("gate, up and down", frozenset({"ffn_gate", "ffn_up", "ffn_down"})),
    ("every BitLinear", BITLINEARS),
    ("both norms of the stream", frozenset({"attn_norm", "ffn_norm"})),
    ("both sub-norms", frozenset({"attn_sub_norm", "ffn_sub_norm"})),
    ("every norm", NORMS),
    ("keys and values", frozenset({"kq", "kqv_out"})),
    ("both residual connections", frozenset({"ffn_inp", "l_out"})),
)
"""Operations that share code in most engines, so that a mistake in it is made in all of them."""

SAME: dict[tuple[str, str], tuple[str, str]] = {
    ("ffn_out", "SiLU gate"): ("ffn_act", "SiLU"),
    ("ffn_out", "gate without activation"): ("ffn_act", "no activation"),
    ("ffn_act", "already multiplied by up"): ("ffn_out", "activation on both"),
    ("attn_o_out", "norm before it skipped"): ("attn_sub_norm", "norm skipped"),
    ("ffn_down", "norm before it skipped"): ("ffn_sub_norm", "norm skipped"),
    ("q", "already rotated"): ("q_rope", "rotated twice"),
    ("k", "already rotated"): ("k_rope", "rotated twice"),
    ("kq", "q rotated again"): ("q_rope", "rotated twice"),
    ("kq", "k rotated again"): ("k_rope", "rotated twice"),
    ("kq", "q not rotated"): ("q_rope", "not rotated"),
    ("kq", "k not rotated"): ("k_rope", "not rotated"),
    ("kqv_out", "RoPE applied to V"): ("v", "RoPE applied to V"),
    ("kq", "scaled here already"): ("kq_soft_max", "scale 1/head_dim"),
    **{
        (made, f"output rounded to {form}"): (read, f"{cache} rounded to {form}")
        for made, read, cache in (("k_rope", "kq", "k_cache"), ("v", "kqv_out", "v_cache"))
        for form in ("F16", "BF16", "truncated BF16")
    },
}
"""One mistake seen at two operations: the first is called what the second is, when both fit."""

SWAPPED: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "keys and values, each the other's",
        {"k": "weights of this.attn_v.weight", "v": "weights of this.attn_k.weight"},
    ),
    (
        "both norms of the stream, each the other's",
        {"attn_norm": "norm weight of this.ffn_norm.weight", "ffn_norm": "norm weight of this.attn_norm.weight"},
    ),
)
"""Two tensors taken for each other: two mistakes with one cause."""
