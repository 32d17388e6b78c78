"""Faults of embedding models: the graph of a model with one operation wrong, run on the model's file.

Each is written as an edit of the graph (another formula, input or weight), apart from the variants that have to
name it. The engine rounds every tensor to binary32 and states nothing about itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_py.synth import write_model
from bitnet_py.synth_config import SynthConfig
from crossval.model.graphs import op_table
from crossval.model.kinds import Kind
from crossval.model.op import KVState, Op, forward
from crossval.model.weights import SpecWeights
from crossval.passes import EngineIdentity, PassPlan, PassRecord, TapArray
from tests.zoo.recording import Recording

IDS = (5, 90, 17, 299, 4, 63, 120, 8, 201)
LAYER = 1
_SHAPE: dict[str, Any] = {
    "n_layers": 3, "dim": 384, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 512, "vocab_size": 400,
    "head_dim": 128, "norms": "f16", "seed": 11,
}  # fmt: skip
MODELS = {
    "qwen3": SynthConfig(arch="qwen3", pooling="mean", **_SHAPE),
    "qwen3-last": SynthConfig(arch="qwen3", pooling="last", **_SHAPE),
    "qwen3-plain": SynthConfig(arch="qwen3", pooling="cls", sub_norms=False, **_SHAPE),
    "gemma3": SynthConfig(arch="gemma3", pooling="mean", **_SHAPE),
}
"""A root of dim that no format holds, heads wider than ``dim / n_heads``."""
Array = np.ndarray


@dataclass(frozen=True)
class Wrong(Kind):
    """Another formula in place of an operation's; weights as they are in the file."""

    other: Callable[..., Array]

    def compute(self, *arrays: Any) -> Array:
        return self.other(*arrays)


@dataclass(frozen=True)
class Fault:
    """One mistake: which operation, how it is changed, and what it may be called."""

    name: str
    op: str
    """Tap without its layer."""
    edit: Callable[[Op], Op]
    right: frozenset[str]
    """Names that are right; finding none is right, too, where the faults leave the choice open."""
    models: tuple[str, ...] = ("qwen3", "gemma3")


def formula(function: Callable[..., Array]) -> Callable[[Op], Op]:
    """Replace the formula; it is given inputs, then weights."""
    return lambda op: replace(op, kind=Wrong(function))


def reading(*taps: str) -> Callable[[Op], Op]:
    """Let it read other taps of its layer."""
    return lambda op: replace(op, inputs=tuple(f"blk.{op.layer}.{tap}" for tap in taps))


def weighted(tensor: str) -> Callable[[Op], Op]:
    """Let it use another tensor of its layer."""
    return lambda op: replace(op, weights=(f"blk.{op.layer}.{tensor}.weight",))


def beside(taps: Sequence[str], function: Callable[..., Array]) -> Callable[[Op], Op]:
    """Give another formula more taps of its layer, after its own inputs."""
    return lambda op: replace(
        op, inputs=(*op.inputs, *(f"blk.{op.layer}.{tap}" for tap in taps)), kind=Wrong(function)
    )


def rms(x: Array, axis: Any = -1) -> Array:
    return np.sqrt(np.mean(x * x, axis=axis, keepdims=True) + 1e-5)


def rotated(x: Array) -> Array:
    n, _, d = x.shape
    angle = np.arange(n)[:, None, None] * 500000.0 ** (-2.0 * np.arange(d // 2) / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)


def erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x)


def half(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float64)


def bfloat16(x: float) -> float:
    bits = np.float32(x).view(np.uint32)
    return float(((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32))


ROOT = math.sqrt(_SHAPE["dim"])
GEMMA = ("gemma3",)
WITH_NORMS = ("qwen3", "gemma3")
MEAN = ("qwen3", "gemma3")


def _named(*names: str) -> frozenset[str]:
    return frozenset(names)


def _of_norms() -> Iterator[Fault]:
    skipped = formula(lambda x, w: x)
    for name, tensor, other in (
        ("attn_q_norm_in", "attn_q_norm_in", "attn_k_norm_in"),
        ("attn_k_norm_in", "attn_k_norm_in", "attn_v_norm_in"),
        ("attn_v_norm_in", "attn_v_norm_in", "attn_q_norm_in"),
        ("ffn_gate_norm_in", "ffn_gate_norm_in", "ffn_up_norm_in"),
        ("ffn_up_norm_in", "ffn_up_norm_in", "ffn_gate_norm_in"),
    ):
        yield Fault(f"{tensor} skipped", name, skipped, _named("norm skipped"), WITH_NORMS)
        wrong = f"norm weight of blk.{LAYER}.{other}.weight"
        yield Fault(f"{tensor} of another matrix", name, weighted(other), _named(wrong), WITH_NORMS)
    for matrix, norm in (("q", "attn_norm"), ("ffn_up", "ffn_norm")):
        right = _named("norm before it skipped")
        yield Fault(f"{matrix} reads {norm}", matrix, reading(norm), right, WITH_NORMS)
    yield Fault("attn_output_norm_in skipped", "attn_sub_norm", skipped, _named("norm skipped"), WITH_NORMS)
    yield Fault("ffn_down_norm_in skipped", "ffn_sub_norm", skipped, _named("norm skipped"), WITH_NORMS)
    for head in ("q_norm", "k_norm"):
        yield Fault(f"{head} skipped", head, skipped, _named("norm skipped"), tuple(MODELS))
        at_once = formula(lambda x, w: x / rms(x, (1, 2)) * w)
        yield Fault(f"{head} over all heads", head, at_once, _named("all heads normed at once"))
        late = formula(lambda x, w: rotated(x) / rms(x) * w)
        yield Fault(f"{head} after RoPE", head, late, _named("normed after RoPE"))
    swapped = _named(f"norm weight of blk.{LAYER}.attn_k_norm.weight")
    yield Fault("head norm of the keys", "q_norm", weighted("attn_k_norm"), swapped)
    plus = formula(lambda x, w: x / rms(x) * (w + 1))
    minus = formula(lambda x, w: x / rms(x) * (w - 1))
    for norm in ("attn_norm", "q_norm", "ffn_post_norm"):
        yield Fault(f"Gemma's 1 doubled in {norm}", norm, plus, _named("norm weight + 1"), GEMMA)
        yield Fault(f"Gemma's 1 missing in {norm}", norm, minus, _named("norm weight - 1"), GEMMA)
    for norm, stream in (("attn_post_norm", "l_out"), ("ffn_post_norm", "ffn_inp")):
        yield Fault(f"{norm} skipped", norm, skipped, _named("norm skipped"), GEMMA)

        def late_edit(op: Op, stream: str = stream) -> Op:
            layer = LAYER - 1 if stream == "l_out" else LAYER
            whole = Wrong(lambda x, y, w: (x + y) / rms(x + y) * w)
            return replace(op, inputs=(*op.inputs, f"blk.{layer}.{stream}"), kind=whole)

        yield Fault(f"{norm} with the residual", norm, late_edit, _named("normed with its residual"), GEMMA)


def _of_constants() -> Iterator[Fault]:
    for name, factor, right in (
        ("missing", 1.0, "embedding not scaled"),
        ("in bfloat16", bfloat16(ROOT), "embedding scale rounded to BF16"),
        ("applied twice", ROOT * ROOT, "embedding scaled twice"),
        ("an integer", 19.0, "embedding scale rounded down"),
    ):
        edit = formula(lambda x, factor=factor: x * factor)
        yield Fault(f"embedding scale {name}", "inp_scaled", edit, _named(right), GEMMA)
    for name, factor, right in (
        ("missing", 1.0, "query scale missing"),
        ("by dim / n_heads", (_SHAPE["dim"] // 4) ** -0.5, "query scale by dim / n_heads"),
        ("1 / head_dim", 1 / 128, "query scale 1/head_dim"),
    ):
        edit = formula(lambda x, factor=factor: x * factor)
        yield Fault(f"query scale {name}", "q_scaled", edit, _named(right), GEMMA)
    again = _named("scaled again")

    def scores(kq: Array, positions: Array) -> Array:
        seen = np.arange(kq.shape[-1]) <= positions[:, None]
        e = np.where(seen, np.exp(kq / math.sqrt(128)), 0.0)
        return e / e.sum(-1, keepdims=True)

    yield Fault("scores scaled again", "kq_soft_max", formula(scores), again, GEMMA)


def _of_gates() -> Iterator[Fault]:
    exact = formula(lambda x: x / 2 * (1 + erf(x / math.sqrt(2))))
    table = formula(lambda x: half(half(x) / 2 * (1 + erf(half(x) / math.sqrt(2)))))
    yield Fault("GELU by erf", "ffn_act", exact, _named("GELU"), GEMMA)
    yield Fault("GELU by erf in a table", "ffn_act", table, _named("GELU by a table"), GEMMA)
    silu = formula(lambda x: x / (1 + np.exp(-x)))
    yield Fault("SiLU for GELU", "ffn_act", silu, _named("SiLU"), GEMMA)
    relu = formula(lambda x: np.maximum(x, 0) ** 2)
    yield Fault("squared ReLU for SiLU", "ffn_act", relu, _named("squared ReLU"), ("qwen3", "qwen3-plain"))


def _of_pooling() -> Iterator[Fault]:
    last, first = "pooled as the last token", "pooled as the first token"
    mean = "pooled as the mean of all tokens"
    yield Fault("last for mean", "pooled", formula(lambda s, p: s[p]), _named(last), MEAN)
    yield Fault("first for mean", "pooled", formula(lambda s, p: s[p * 0]), _named(first), MEAN)
    for model in ("qwen3-last", "qwen3-plain"):
        of_all = formula(lambda s, p: s.mean(0, keepdims=True))
        yield Fault(f"mean in {model}", "pooled", of_all, _named(mean), (model,))
    right = "mean without the last token"
    yield Fault("EOS left out", "pooled", formula(lambda s, p: s[:-1].mean(0, keepdims=True)), _named(right), MEAN)
    right = "mean without the first token"
    yield Fault("BOS left out", "pooled", formula(lambda s, p: s[1:].mean(0, keepdims=True)), _named(right), MEAN)
    right = "sum instead of mean"
    yield Fault("sum", "pooled", formula(lambda s, p: s.sum(0, keepdims=True)), _named(right), MEAN)

    def unnormed(op: Op) -> Op:
        end = f"blk.{_SHAPE['n_layers'] - 1}.l_out"
        return replace(op, inputs=(end,), kind=Wrong(lambda x: x.mean(0, keepdims=True)), last_row_only=False)

    yield Fault("pooled before the norm", "pooled", unnormed, _named("pooled before the final norm"), MEAN)
    unnormed_vector = formula(lambda x: x)
    yield Fault("not normalised", "embedding", unnormed_vector, _named("not normalised"), tuple(MODELS))
    by_mean = formula(lambda x: x / np.sqrt(np.mean(x * x, -1, keepdims=True)))
    yield Fault("RMS for L2", "embedding", by_mean, _named("divided by the root mean square"))
    by_square = formula(lambda x: x / np.sum(x * x, -1, keepdims=True))
    yield Fault("squared norm", "embedding", by_square, _named("divided by the squared norm"))


FAULTS: tuple[Fault, ...] = (*_of_norms(), *_of_constants(), *_of_gates(), *_of_pooling())
CASES = tuple((fault, model) for fault in FAULTS for model in fault.models)


def write(model: str, folder: Path) -> Path:
    """Write one of ``MODELS`` with gates loud enough to tell activation functions apart."""
    path = folder / f"{model}.gguf"
    if not path.exists():
        write_model(path, MODELS[model])
    return path


def run(weights: SpecWeights, fault: Fault | None) -> tuple[str, Recording]:
    """Return the tap that is wrong (""), and what the engine computes."""
    ops, wrong = list(op_table(weights.config)), ""
    for i, op in enumerate(ops):
        if fault is not None and op.name == fault.op and op.layer in (None, LAYER):
            ops[i], wrong = fault.edit(op), op.output
    assert fault is None or wrong, f"{fault} changes nothing"
    plan, taps = PassPlan("prefill", IDS, 0), {}
    for op, output in forward(_rounded(ops), weights, IDS, KVState()):
        rows = (len(IDS) - 1,) if output.shape[op.token_axis] < len(IDS) else None
        taps[op.output] = TapArray(np.ascontiguousarray(output, np.float32), rows)
    return wrong, Recording(EngineIdentity("wrong graph"), [PassRecord(plan, taps)])


@dataclass(frozen=True)
class Rounded(Kind):
    """A formula whose result is rounded to binary32, which the next operation reads."""

    exact: Kind

    def compute(self, *arrays: Any) -> Array:
        with np.errstate(all="ignore"):
            return self.exact.compute(*arrays).astype(np.float32).astype(np.float64)


def _rounded(ops: Sequence[Op]) -> list[Op]:
    return [replace(op, kind=Rounded(op.kind)) for op in ops]
