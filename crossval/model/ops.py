"""The specification: BitNet b1.58 (2B-4T) as one table of operations in NumPy float64.

``op_table(config)`` lists every operation of the graph; ``forward`` executes it in order, and that *is* the
forward pass: there is no second copy of a formula. Each function takes the op's input arrays, then its weights,
so the same function also recomputes one op from what an engine recorded.

What is exact and what is not, by the model's definition: the only rounding is the int8 activation quantiser
inside BitLinear. Everything else is real arithmetic, carried in float64: no float16 anywhere (the KV state
keeps float64), RoPE with the exact frequencies ``base^(-2i/head_dim)``. Weights are the numbers in the file.

Sources: "The Era of 1-bit LLMs" (arXiv 2402.17764) and "BitNet b1.58 2B4T Technical Report" (arXiv 2504.12285)
for BitLinear, sub-norms and squared ReLU; RMSNorm arXiv 1910.07467 eq. 4; RoPE arXiv 2104.09864 eq. 34 on
split halves (NeoX); grouped-query attention arXiv 2305.13245. Shares no code with any engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

HEAD_CHUNK_ROWS = 4096
"""Vocabulary rows of the head widened to float64 at a time (4096 x 2560 x 8 bytes = 84 MB)."""


@dataclass(frozen=True)
class SpecConfig:
    """Shape and hyper-parameters the graph depends on."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    hidden_dim: int
    vocab_size: int
    context_length: int
    rope_base: float
    rms_eps: float
    attn_sub_norm: bool = True
    """Whether the attention output is normed before its projection."""
    ffn_sub_norm: bool = True
    """Whether the gated activation is normed before the down projection."""
    tied_head: bool = True
    """Whether the head multiplies with ``token_embd.weight``; otherwise with ``output.weight``."""


@dataclass(frozen=True)
class TernaryMatrix:
    """A BitLinear weight: ``signs`` float32 ``(rows, cols)`` of -1, 0, +1, times one ``scale``."""

    signs: npt.NDArray[np.float32]
    scale: float


Weight = npt.NDArray[np.floating[Any]] | TernaryMatrix
"""A norm vector ``(n,)``, an embedding or head table ``(vocab_size, dim)``, or a ternary matrix."""


class WeightSource(Protocol):
    """Weights by GGUF tensor name; a dict will do, a file may decode on demand."""

    def __getitem__(self, name: str, /) -> Weight: ...


CONTEXT_INPUTS = ("token_ids", "positions")
"""What operations read that is part of the pass and no tensor."""
_STATE_SOURCES = {"k_cache": "k_rope", "v_cache": "v"}


def is_state(name: str) -> bool:
    """Return whether an input is KV state, which has cells and not tokens."""
    return name.rpartition(".")[2] in _STATE_SOURCES


def state_source(name: str) -> str:
    """Return the tap whose rows of all passes so far make up a KV state."""
    layer, _, state = name.rpartition(".")
    return f"{layer}.{_STATE_SOURCES[state]}"


# --- the operations -------------------------------------------------------------------------------------------


def embed(token_ids: IntArray, table: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Look up the embedding row of each token: ``(n_tokens, dim)``."""
    return table[token_ids].astype(np.float64)


def rms_norm(x: FloatArray, weight: FloatArray, *, eps: float) -> FloatArray:
    """Divide each row by its root mean square and scale: ``x / sqrt(mean(x^2) + eps) * weight``."""
    mean_square: FloatArray = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def quantize_activations(x: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Quantise each token row to int8 by its largest magnitude.

    ``scale = 127 / max(max|x|, 1e-5)``, ``code = clip(round_half_even(x * scale), -128, 127)``.

    Returns:
        codes int8, shaped as ``x``; scale float64, last axis 1. A row with NaN has a NaN scale.
    """
    absmax: FloatArray = np.max(np.abs(x), axis=-1, keepdims=True)
    scale = 127.0 / np.maximum(absmax, 1e-5)
    with np.errstate(invalid="ignore"):  # a NaN has no code; it survives in the scale
        codes = np.clip(np.rint(x * scale), -128, 127).astype(np.int8)
    return codes, scale


def accumulate(codes: npt.NDArray[np.int8], weight: TernaryMatrix) -> npt.NDArray[np.int32]:
    """Return the exact integer sums ``codes @ signs.T``, ``(n_tokens, rows)``.

    Computed by a floating-point matrix product, which is exact in any order of summation: every partial sum is
    an integer of at most ``128 * cols``, and float32 holds all integers to 2^24 (cols < 131072), float64 to 2^53.
    """
    exact = np.float32 if 128 * codes.shape[-1] < 2**24 else np.float64
    product: npt.NDArray[np.floating[Any]] = codes.astype(exact) @ weight.signs.T.astype(exact, copy=False)
    return product.astype(np.int32)


def bitlinear(x: FloatArray, weight: TernaryMatrix) -> FloatArray:
    """Multiply by a ternary matrix in int8: quantise, accumulate, rescale; ``(n_tokens, rows)``."""
    codes, scale = quantize_activations(x)
    return accumulate(codes, weight) / scale * weight.scale


def bitlinear_heads(x: FloatArray, weight: TernaryMatrix, *, n_heads: int) -> FloatArray:
    """Project with ``bitlinear`` and split into heads: ``(n_tokens, n_heads, head_dim)``."""
    y = bitlinear(x, weight)
    return y.reshape(y.shape[0], n_heads, -1)


def rope(x: FloatArray, positions: IntArray, *, base: float) -> FloatArray:
    """Rotate the pairs ``(i, i + head_dim/2)`` of every head by ``position * base^(-2i/head_dim)``."""
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half, dtype=np.float64) / half)
    angle = positions[:, None, None] * frequency  # (n_tokens, 1, half): the same for all heads
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def attention_scores(q: FloatArray, k: FloatArray) -> FloatArray:
    """Return every query times every key, unscaled and unmasked: ``(n_heads, n_tokens, n_kv)``.

    ``q`` ``(n_tokens, n_heads, head_dim)``, ``k`` ``(n_kv, n_kv_heads, head_dim)``.
    """
    scores: FloatArray = q.transpose(1, 0, 2) @ _per_query_head(k, q.shape[1]).transpose(0, 2, 1)
    return scores


def causal_softmax(scores: FloatArray, positions: IntArray, *, scale: float) -> FloatArray:
    """Turn scores into attention weights over the keys at or before each token's own position."""
    key_positions = np.arange(scores.shape[-1])
    visible = key_positions <= positions[:, None]  # (n_tokens, n_kv); a token always sees itself
    scaled = np.where(visible, scores * scale, -np.inf)
    weights: FloatArray = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    total: FloatArray = weights.sum(axis=-1, keepdims=True)
    return weights / total


def attend(weights: FloatArray, v: FloatArray) -> FloatArray:
    """Sum the values by attention weight and merge the heads: ``(n_tokens, n_heads * head_dim)``."""
    per_head: FloatArray = weights @ _per_query_head(v, weights.shape[0])
    merged: FloatArray = per_head.transpose(1, 0, 2).reshape(weights.shape[1], -1)
    return merged


def _per_query_head(kv: FloatArray, n_heads: int) -> FloatArray:
    """Give query head ``h`` its key/value head ``h // (n_heads / n_kv_heads)``: ``(n_heads, n_kv, head_dim)``."""
    n_kv_heads = kv.shape[1]
    per_head: FloatArray = np.repeat(kv, n_heads // n_kv_heads, axis=1).transpose(1, 0, 2)
    return per_head


def squared_relu(gate: FloatArray) -> FloatArray:
    """Return ``max(gate, 0)^2``."""
    positive = np.maximum(gate, 0.0)
    return positive * positive


def multiply(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the elementwise product."""
    return a * b


def add(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the elementwise sum (a residual connection)."""
    return a + b


def head(x: FloatArray, table: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Multiply with every row of the head table: logits ``(n_tokens, vocab_size)``."""
    starts = range(0, table.shape[0], HEAD_CHUNK_ROWS)
    return np.concatenate([x @ table[s : s + HEAD_CHUNK_ROWS].astype(np.float64).T for s in starts], axis=-1)


# --- the table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """One row of the table: ``output = function(*inputs, *weights)``.

    What else belongs to an operation is found by its ``name``: bounds in ``crossval.audit.bounds``, ways to get
    it wrong in ``crossval.diagnose.variants``.
    """

    name: str
    """What the op is, the same in every layer: the tap's name without its layer."""
    output: str
    """Full name of the tap it computes."""
    inputs: tuple[str, ...]
    """What it reads: full tap names, ``token_ids``, ``positions``, or KV state (see ``appends_to``)."""
    weights: tuple[str, ...]
    """GGUF tensor names of its weights."""
    function: Callable[..., FloatArray]
    """Takes the inputs, then the weights; every function works row by row of ``output``."""
    appends_to: str | None = None
    """KV state that grows by this output: all rows of this tap in all passes so far, oldest first."""
    last_row_only: bool = False
    """In the forward pass, computed for the last token only: nothing after it needs the others."""

    def parameter(self, name: str) -> Any:
        """Return a hyper-parameter: ``eps`` of norms, ``base`` of RoPE, ``scale`` of softmax, ``n_heads``.

        Raises:
            KeyError: the operation has no such parameter.
        """
        keywords: Mapping[str, Any] = getattr(self.function, "keywords", {})
        return keywords[name]

    def apply(self, values: Mapping[str, npt.NDArray[Any]], weights: WeightSource) -> FloatArray:
        """Compute the output in float64 from ``values`` (by input name) and ``weights`` (by tensor name)."""
        arrays = [_widen(values[name]) for name in self.inputs]
        return self.function(*arrays, *(weights[name] for name in self.weights))


def _widen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(np.float64, copy=False) if array.dtype.kind == "f" else array


def op_table(config: SpecConfig) -> tuple[Op, ...]:
    """List every operation of the model in execution order."""
    norm = partial(rms_norm, eps=config.rms_eps)
    last = f"blk.{config.n_layers - 1}.l_out"
    head_table = "token_embd.weight" if config.tied_head else "output.weight"
    ops = [Op("inp_embd", "inp_embd", ("token_ids",), ("token_embd.weight",), embed)]
    for layer in range(config.n_layers):
        ops += _layer_ops(config, layer, x="inp_embd" if layer == 0 else f"blk.{layer - 1}.l_out")
    ops.append(Op("result_norm", "result_norm", (last,), ("output_norm.weight",), norm, last_row_only=True))
    ops.append(Op("result_output", "result_output", ("result_norm",), (head_table,), head, last_row_only=True))
    return tuple(ops)


def _layer_ops(config: SpecConfig, layer: int, x: str) -> list[Op]:
    """List the operations of one transformer layer whose input is the tap ``x``."""
    norm = partial(rms_norm, eps=config.rms_eps)
    rotate = partial(rope, base=config.rope_base)
    to_heads = partial(bitlinear_heads, n_heads=config.n_heads)
    to_kv_heads = partial(bitlinear_heads, n_heads=config.n_kv_heads)
    softmax = partial(causal_softmax, scale=1.0 / np.sqrt(config.head_dim))

    def tap(name: str) -> str:
        return f"blk.{layer}.{name}"

    def op(name: str, inputs: Sequence[str], tensor: str | None, function: Callable[..., FloatArray]) -> Op:
        weights = () if tensor is None else (f"blk.{layer}.{tensor}.weight",)
        state = {"k_rope": tap("k_cache"), "v": tap("v_cache")}.get(name)
        return Op(name, tap(name), tuple(inputs), weights, function, appends_to=state)

    attn_sub_norm = [op("attn_sub_norm", [tap("kqv_out")], "attn_sub_norm", norm)] if config.attn_sub_norm else []
    ffn_sub_norm = [op("ffn_sub_norm", [tap("ffn_out")], "ffn_sub_norm", norm)] if config.ffn_sub_norm else []
    return [
        op("attn_norm", [x], "attn_norm", norm),
        op("q", [tap("attn_norm")], "attn_q", to_heads),
        op("k", [tap("attn_norm")], "attn_k", to_kv_heads),
        op("v", [tap("attn_norm")], "attn_v", to_kv_heads),
        op("q_rope", [tap("q"), "positions"], None, rotate),
        op("k_rope", [tap("k"), "positions"], None, rotate),
        op("kq", [tap("q_rope"), tap("k_cache")], None, attention_scores),
        op("kq_soft_max", [tap("kq"), "positions"], None, softmax),
        op("kqv_out", [tap("kq_soft_max"), tap("v_cache")], None, attend),
        *attn_sub_norm,
        op("attn_o_out", [tap("attn_sub_norm" if attn_sub_norm else "kqv_out")], "attn_output", bitlinear),
        op("ffn_inp", [tap("attn_o_out"), x], None, add),
        op("ffn_norm", [tap("ffn_inp")], "ffn_norm", norm),
        op("ffn_gate", [tap("ffn_norm")], "ffn_gate", bitlinear),
        op("ffn_up", [tap("ffn_norm")], "ffn_up", bitlinear),
        op("ffn_act", [tap("ffn_gate")], None, squared_relu),
        op("ffn_out", [tap("ffn_act"), tap("ffn_up")], None, multiply),
        *ffn_sub_norm,
        op("ffn_down", [tap("ffn_sub_norm" if ffn_sub_norm else "ffn_out")], "ffn_down", bitlinear),
        op("l_out", [tap("ffn_down"), tap("ffn_inp")], None, add),
    ]


# --- executing it ---------------------------------------------------------------------------------------------


@dataclass
class KVState:
    """What a sequence leaves behind for its next pass: rotated keys and values of every layer, float64."""

    n_tokens: int = 0
    arrays: dict[str, FloatArray] = field(default_factory=dict)


def forward(
    table: Sequence[Op], weights: WeightSource, token_ids: Sequence[int], state: KVState
) -> Iterator[tuple[Op, FloatArray]]:
    """Execute the table on the next tokens of a sequence; yield each op with its output, in order.

    Values are dropped after their last use, so memory is bounded by one layer whatever the model. ``state``
    changes only when the pass has run to its end.
    """
    last_use = {name: i for i, op in enumerate(table) for name in op.inputs}
    values: dict[str, npt.NDArray[Any]] = {
        "token_ids": np.asarray(token_ids, dtype=np.int64),
        "positions": np.arange(state.n_tokens, state.n_tokens + len(token_ids), dtype=np.int64),
    }
    grown: dict[str, FloatArray] = {}
    for i, op in enumerate(table):
        if op.last_row_only:
            values.update({name: values[name][-1:] for name in op.inputs})
        output = op.apply(values, weights)
        values[op.output] = output
        if op.appends_to is not None:
            past = state.arrays.get(op.appends_to)
            grown[op.appends_to] = output if past is None else np.concatenate([past, output])
            values[op.appends_to] = grown[op.appends_to]
        yield op, output
        for name in (*op.inputs, op.output):
            if last_use.get(name, i) <= i:
                values.pop(name, None)
    state.arrays.update(grown)
    state.n_tokens += len(token_ids)
