"""The script of a reproducer: one formula per kind of operation, written out, with nothing but NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crossval.model.kinds import (
    Add,
    Attend,
    AttentionScores,
    BitLinear,
    Embedding,
    Gelu,
    Head,
    Kind,
    L2Norm,
    Multiply,
    Pool,
    RmsNorm,
    Rope,
    Scale,
    Silu,
    Softmax,
    SquaredRelu,
)

INPUT_NAMES: dict[type[Kind], tuple[str, ...]] = {
    RmsNorm: ("x", "weight"),
    Rope: ("x", "position", "factors"),
    AttentionScores: ("q", "k"),
    Softmax: ("scores", "position"),
    Attend: ("weights", "v"),
    SquaredRelu: ("gate",),
    Silu: ("gate",),
    Gelu: ("gate",),
    Scale: ("x",),
    Pool: ("states", "position"),
    L2Norm: ("x",),
    Multiply: ("a", "b"),
    Add: ("a", "b"),
}
"""Names of inputs, then weights, in the script and in ``inputs.npz``; the other kinds have their own cuts."""


@dataclass(frozen=True)
class Facts:
    """What a script states and computes with."""

    tap: str
    kind: type[Kind]
    engine: str
    pass_index: int
    pass_kind: str
    position: int
    cause: str
    constants: Mapping[str, Any]
    shape: tuple[int, ...]
    sampled: bool
    """Whether only some output features are kept; ``features`` in ``inputs.npz`` lists them."""


def render(facts: Facts) -> str:
    """Return the script as text."""
    formula = _formula(facts.kind, facts.constants).strip("\n")
    body = "\n".join(f"    {line}" if line else "" for line in formula.splitlines())
    kept = ", for the output features farthest off" if facts.sampled else ""
    title = (
        f"{facts.tap} of {facts.engine}: pass {facts.pass_index} ({facts.pass_kind}), position {facts.position}"
    )
    return _SCRIPT.format(
        title=_plain(title),
        kept=kept,
        cause=_plain(facts.cause),
        shape=facts.shape,
        head=next((text for name, text in _HELPERS.items() if f"{name}(" in body), ""),
        body=body,
        pick='feature = int(given["features"][at[-1]])\n    ' if facts.sampled else "",
        where="feature" if facts.sampled else "at",
        what="feature" if facts.sampled else "index",
    )


def _plain(text: str) -> str:
    """Return text that is safe inside a docstring."""
    return "".join(char if char.isprintable() and char not in '\\"' else "?" for char in text)


_SCRIPT = '''\
"""{title}.

One operation on one token{kept}, exactly as the engine recorded it.
Diagnosis: {cause}

    python repro.py              checks the recorded output
    python repro.py fixed.npy    checks another output, float32 of shape {shape}

Exits 0 when every value is within its error bound, 1 when one is not. Needs NumPy only.
"""

import sys
from pathlib import Path

import numpy as np

given = np.load(Path(__file__).with_name("inputs.npz"))

{head}
def correct():
    """Compute the output from the recorded inputs, in float64."""
{body}


def main():
    expected, bound = correct(), given["bound"]
    output = np.load(sys.argv[1]) if len(sys.argv) > 1 else given["recorded"]
    if output.shape != expected.shape:
        print(f"wrong: shape {{output.shape}}, expected {{expected.shape}}")
        return 1
    off = np.abs(output.astype(np.float64) - expected)
    beyond = ~(off <= bound)
    if not beyond.any():
        print(f"correct: all {{output.size}} values are within their bounds")
        return 0
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(beyond & np.isfinite(off), off / bound, np.where(beyond, np.inf, 0.0))
    at = tuple(int(i) for i in np.unravel_index(np.argmax(times), times.shape))
    print(f"wrong: {{int(beyond.sum())}} of {{output.size}} values are outside their bounds")
    {pick}values = f"{{float(output[at])!r}}, correct is {{float(expected[at])!r}}"
    print(f"worst: {what} {{{where}}}: {{values}}, {{times[at]:.3g}} times the bound")
    return 1


if __name__ == "__main__":
    sys.exit(main())
'''

_HELPERS = {
    "bf16": '''
def bf16(x):
    """Round to bfloat16, as this engine does before it multiplies."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)

''',
    "f16": '''
def f16(x):
    """Round to binary16, as this engine does before it multiplies."""
    return x.astype(np.float32).astype(np.float16).astype(np.float64)

''',
}
"""What a script needs to round as the engine does; longer names first."""
ROUNDINGS = (None, *_HELPERS)
"""Names of the roundings of an input that a script can make."""


_FORMULAS: dict[type[Kind], str] = {
    Embedding: """
# The token's row of token_embd.weight; F16 widened is exact.
return given["table_row"].astype(np.float64)
""",
    RmsNorm: """
# RMSNorm: x / sqrt(mean(x^2) + eps) * weight
x, weight, eps = {x}, given["weight"].astype(np.float64), {eps!r}
return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
""",
    BitLinear: """
# BitLinear: int8 activations of the token, ternary weights, exact integer sums, one scale each.
x, signs = {x}, given["signs"].astype(np.int64)
scale = {quantise}
scaled = x * scale{rounded}
codes = np.clip(np.rint(scaled), -128, 127).astype(np.int64)
return (codes @ signs.T) / scale * {weight_scale!r} + given.get("bias", 0.0)
""",
    Rope: """
# RoPE (NeoX): the pairs (i, i + head_dim/2) rotated by position * scale * base^(-2i/head_dim) / factors[i]
x, position, base, scale = {x}, {position!r}, {base!r}, {scale!r}
half = x.shape[-1] // 2
angle = position * scale * base ** (-np.arange(half) / half) / given.get("factors", 1.0)
first, second = x[..., :half], x[..., half:]
cos, sin = np.cos(angle), np.sin(angle)
return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
""",
    AttentionScores: """
# Scores: every query head times the keys of its group, unscaled; (n_heads, 1, n_keys)
q, k = {q}, {k}  # (1, n_heads, head_dim), (n_keys, n_kv_heads, head_dim)
k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
return np.einsum("thd,khd->htk", q, k)
""",
    Softmax: """
# Softmax over the keys at or before the token's own position; the others are exactly zero
scores, position, scale = {scores}, {position!r}, {scale!r}
scaled = np.where(np.arange(scores.shape[-1]) <= position, scores * scale, -np.inf)
weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
return weights / weights.sum(axis=-1, keepdims=True)
""",
    Attend: """
# Values summed by attention weight, heads side by side
weights, v = {weights}, {v}  # (n_heads, 1, n_keys), (n_keys, n_kv_heads, head_dim)
v = np.repeat(v, weights.shape[0] // v.shape[1], axis=1)
return np.einsum("htk,khd->thd", weights, v).reshape(1, -1)
""",
    SquaredRelu: """
# Squared ReLU
return np.maximum({gate}, 0.0) ** 2
""",
    Silu: """
# SiLU
gate = {gate}
return gate * np.exp(np.minimum(gate, 0.0)) / (1.0 + np.exp(-np.abs(gate)))
""",
    Gelu: """
# GELU by its tanh approximation: gate * sigmoid(2 u)
gate = {gate}
twice = 2.0 * np.sqrt(2.0 / np.pi) * gate * (1.0 + 0.044715 * gate * gate)
return gate * np.exp(np.minimum(twice, 0.0)) / (1.0 + np.exp(-np.abs(twice)))
""",
    Scale: """
# The product with a constant of the model
return {x} * {factor!r}
""",
    Pool: """
# One vector of the text up to this token: the mean of its states, the last one or the first
states, position = {states}, {position!r}
pooled = dict(mean=states[: position + 1].mean(axis=0), last=states[position], cls=states[0])
return pooled[{pooling!r}][None]
""",
    L2Norm: """
# Divided by its Euclidean norm
x = {x}
norm = np.linalg.norm(x, axis=-1, keepdims=True)
return x / np.where(norm > 0, norm, 1.0)
""",
    Multiply: """
# The activated gate times the up projection
return {a} * {b}
""",
    Add: """
# The residual connection
return {a} + {b}
""",
    Head: """
# The LM head: the final norm (as the engine multiplies it) times rows of the table
return {x} @ given["table_rows"].astype(np.float64).T
""",
}
"""Kind -> formula. ``{x}`` reads an input in float64; the other fields are constants."""


_LOW_BITLINEAR = """
# BitLinear: what this engine's format or quantiser makes of the activations ("multiplied": int8 codes, or
# activations brought back from them, in their units) times ternary weights; one scale each.
multiplied, signs = given["multiplied"], given["signs"].astype(np.float64)
return multiplied @ signs.T / {scale!r} * {weight_scale!r} + given.get("bias", 0.0)
"""
_ADJACENT_ROPE = """
# RoPE: the pairs (2i, 2i + 1) rotated by position * scale * base^(-2i/head_dim) / factors[i]
x, position, base, scale = {x}, {position!r}, {base!r}, {scale!r}
half = x.shape[-1] // 2
angle = position * scale * base ** (-np.arange(half) / half) / given.get("factors", 1.0)
first, second = x[..., ::2], x[..., 1::2]
cos, sin = np.cos(angle), np.sin(angle)
return np.stack([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(x.shape)
"""


def _formula(kind: type[Kind], constants: Mapping[str, Any]) -> str:
    """Return the formula of an operation with its constants filled in."""
    formula, fields = _FORMULAS[kind], dict(constants)
    if kind is Rope and constants["pairing"] == "adjacent":
        formula = _ADJACENT_ROPE
    elif kind is Softmax:
        fields["scale"] = float(constants["scale"])
    elif kind is BitLinear and "scale" in constants:
        formula = _LOW_BITLINEAR
    elif kind is BitLinear:
        scale = "127.0 / max(np.abs(x).max(), 1e-5)"
        in_f32 = f"np.float64(np.float32({scale}))  # this engine keeps it in binary32"
        rounded = "\nscaled = scaled.astype(np.float32)  # and the product too"
        fields["quantise"] = in_f32 if constants["scale_in_f32"] else scale
        fields["rounded"] = rounded if constants["product_in_f32"] else ""
    for name in INPUT_NAMES.get(kind, ("x",)):
        dtype = constants.get(f"{name}_in")
        read = f'{dtype}(given["{name}"])' if dtype else f'given["{name}"].astype(np.float64)'
        fields.setdefault(name, read)
    return formula.format(**fields)
