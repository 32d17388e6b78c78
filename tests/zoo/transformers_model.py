"""The Hugging Face port, healthy and with faults in one layer, in binary32, bfloat16 and binary16.

The model is transformers' own; a fault replaces one module of a layer, changes its weights, or what it is called
with. Needs PyTorch and transformers. What must follow is what ``precisions`` says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.models.bitnet.modeling_bitnet import eager_attention_forward

from crossval.engines import tap_maps
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.record import trace_model
from crossval.torch.hooked import HookedModel
from crossval.torch.huggingface import DTYPES, from_gguf
from crossval.torch.recorder import identity, versions
from tests.support.judged import judge
from tests.zoo.detect import Replay
from tests.zoo.precisions import LAYER, N_DECODE, PLANS, PROMPT, Outcome, outcome_of, tables
from tests.zoo.recording import Recording

ENGINES = {f"transformers:{name}": name for name in DTYPES}
Change = Callable[[Any], None]
"""Puts a fault into a decoder layer."""


@dataclass(frozen=True)
class Fault:
    """One mistake, the operation that is wrong first, and its names: with wildcards; none: every name is wrong."""

    name: str
    op: str
    change: Change
    names: tuple[str, ...] = ()


def _put(path: str, make: Callable[[Any], Any]) -> Change:
    """Return a change that replaces a module, or another attribute, by what ``make`` makes of it."""

    def change(layer: Any) -> None:
        parent, _, name = path.rpartition(".")
        owner = layer.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def _skipped(path: str) -> Change:
    return _put(path, lambda _: nn.Identity())


class _LayerNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Any) -> Any:
        wide = x.float()
        return self.norm((wide - wide.mean(-1, keepdim=True)).to(x.dtype))


def _other_weight(layer: Any) -> None:
    layer.post_attention_layernorm.weight = layer.input_layernorm.weight


def _called_with(name: str, make: Callable[[dict[str, Any]], Any]) -> Change:
    """Return a change of an argument that the attention is called with; ``make`` gets all of them."""

    def change(layer: Any) -> None:
        def hook(_: Any, args: Any, given: dict[str, Any]) -> Any:
            return args, {**given, name: make(given)}

        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)

    return change


def _turned(make: Callable[[Any, Any], tuple[Any, Any]]) -> Change:
    return _called_with("position_embeddings", lambda given: make(*given["position_embeddings"]))


def _other_base(given: dict[str, Any]) -> tuple[Any, Any]:
    cos, _ = given["position_embeddings"]
    half = cos.shape[-1] // 2
    angles = given["position_ids"][..., None] * 5e5 ** (-torch.arange(half, dtype=torch.float64) / half)
    return tuple(turn(angles).repeat(1, 1, 2).to(cos.dtype) for turn in (torch.cos, torch.sin))


def _sees_next(given: dict[str, Any]) -> Any:
    """Rows move up by one; the last query sees what it saw."""
    mask = given["attention_mask"]
    return torch.cat([mask[..., 1:, :], mask[..., -1:, :]], dim=-2)


def _attention(name: str, function: Callable[..., Any]) -> Change:
    """Return a change of the attention function of a layer."""

    def change(layer: Any) -> None:
        AttentionInterface.register(name, function)
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation_internal = name

    return change


def _other_keys(module: Any, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any:
    return eager_attention_forward(module, q, k.flip(1), v, mask, **given)


def _other_values(module: Any, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any:
    return eager_attention_forward(module, q, k, v.flip(1), mask, **given)


def _without_residual(attention: bool) -> Change:
    def change(layer: Any) -> None:
        def forward(hidden_states: Any, **given: Any) -> Any:
            mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **given)
            x = mixed if attention else hidden_states + mixed
            out = layer.mlp(layer.post_attention_layernorm(x))
            return x + out if attention else out

        layer.forward = forward

    return change


def _gate_is_up(layer: Any) -> None:
    layer.mlp.gate_proj.load_state_dict(layer.mlp.up_proj.state_dict())


def _gate_and_up_swapped(layer: Any) -> None:
    layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def _scaled(layer: Any) -> None:
    layer.self_attn.v_proj.weight_scale.mul_(1.19)


def _row_of_zeros(layer: Any) -> None:
    layer.self_attn.q_proj.weight[5].zero_()


def _quantised(path: str, levels: float, *, per_tensor: bool = False) -> Change:
    """Return a change of the number of levels, or of what shares a scale."""

    def change(layer: Any) -> None:
        module = layer.get_submodule(path)

        def forward(x: Any) -> Any:
            wide = x.float().abs()
            scale = levels / (wide.amax() if per_tensor else wide.amax(-1, keepdim=True)).clamp(min=1e-5)
            given = ((x.float() * scale).round().clamp(-128, 127) / scale).to(x.dtype)
            return nn.functional.linear(given, module.weight) * module.weight_scale

        module.forward = forward

    return change


NORMS = {
    "attn_norm": "input_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
_TURNS = ("*RoPE*", "*rotat*", "*position*")
FAULTS: tuple[Fault, ...] = (
    *(Fault(f"{op} skipped", op, _skipped(path), ("norm skipped",)) for op, path in NORMS.items()),
    Fault("attn_norm as LayerNorm", "attn_norm", _put("input_layernorm", _LayerNorm), ("LayerNorm*", "*mean*")),
    Fault("ffn_norm with attn_norm's weight", "ffn_norm", _other_weight, ("*attn_norm*",)),
    Fault("eps 0.1", "ffn_norm", _put("post_attention_layernorm.variance_epsilon", lambda _: 0.1), ("*eps*",)),
    Fault("SiLU", "ffn_act", _put("mlp.act_fn", lambda _: nn.SiLU()), ("SiLU",)),
    Fault("ReLU", "ffn_act", _put("mlp.act_fn", lambda _: nn.ReLU()), ("*ReLU*", "*square*")),
    Fault("scores not scaled", "kq_soft_max", _put("self_attn.scaling", lambda _: 1.0), ("*scale*", "*temp*")),
    Fault("no mask", "kq_soft_max", _called_with("attention_mask", lambda _: None), ("*mask*",)),
    Fault("mask sees the next token", "kq_soft_max", _called_with("attention_mask", _sees_next), ("*mask*",)),
    Fault("scores of other heads", "kq", _attention("other keys", _other_keys), ("*head*",)),
    Fault("values of other heads", "kqv_out", _attention("other values", _other_values), ("*head*",)),
    Fault("another RoPE base", "q_rope", _called_with("position_embeddings", _other_base), ("*base*",)),
    Fault("RoPE skipped", "q_rope", _turned(lambda cos, sin: (cos * 0 + 1, sin * 0)), _TURNS),
    Fault("RoPE turns the other way", "q_rope", _turned(lambda cos, sin: (cos, -sin)), (*_TURNS, "*sign*")),
    Fault("gate with up's matrix", "ffn_gate", _gate_is_up, ("*ffn_up*",)),
    Fault("gate and up swapped", "ffn_gate", _gate_and_up_swapped, ("*ffn_up*",)),
    Fault("no attention residual", "ffn_inp", _without_residual(True), ("*residual*",)),
    Fault("no feed-forward residual", "l_out", _without_residual(False), ("*residual*",)),
    Fault("scale of V 19 % off", "v", _scaled, ("*times 1.19",)),
    Fault("a row of Q zero", "q", _row_of_zeros, ("*zero*", "*never written*")),
    Fault("128 levels", "q", _quantised("self_attn.q_proj", 128), ("128 levels*",)),
    Fault("one scale for all tokens", "ffn_down", _quantised("mlp.down_proj", 127, per_tensor=True),
        ("per-tensor*",)),
)  # fmt: skip
Case = tuple[str, Fault | None]
"""Engine and fault; None: healthy."""
CASES: tuple[Case, ...] = tuple((engine, fault) for engine in ENGINES for fault in (None, *FAULTS))


def outcomes(model: Path, tried: Iterable[Case] = CASES) -> Iterator[Outcome]:
    """Judge each beside ``bitnet_py``, as ``crossval layers`` does."""
    with BitnetPyRunner(model, n_threads=1) as reference:
        for engine, fault in tried:
            reference.reset()
            candidate = Replay(_recorded(model, ENGINES[engine], fault))
            found = judge(candidate, reference, PROMPT, model, n_decode=N_DECODE, diagnosed=fault is not None)
            yield outcome_of(engine, True, fault, found)


def _recorded(path: Path, dtype: str, fault: Fault | None) -> Recording:
    torch.compiler.set_stance("force_eager")
    try:
        model = from_gguf(path, dtype)
        if fault is not None:
            fault.change(model.model.layers[LAYER])
        with HookedModel(model, tap_maps.load("huggingface"), trace_model(path)) as hooked:
            passes = [hooked.eval(plan.token_ids) for plan in PLANS]
        return Recording(identity(model, hooked), passes)
    finally:
        torch.compiler.set_stance("default")


# --- as a page ------------------------------------------------------------------------------------------------

LEAST_IN_PLACE = 0.95
"""Share of an engine's faults that have to be found in their place: 16 bits hide some."""
HEAD = """# Mistakes in Hugging Face's model

Is a mistake in one layer of transformers' model found, in binary32 and in 16 bits? Generated by
`python -m tests.zoo --transformers > docs/transformers-zoo.md`;
`tests/parity/test_transformers_zoo.py` repeats a sample of it where PyTorch is installed. Seen with
{versions}.

The model of transformers is built from the shipped file's weights (class `autobitlinear`), runs a
prompt and one decoded token, and is compared with `bitnet_py` as `crossval layers` does it. Each of
{n} faults is put into layer {layer} of 4: a module is replaced, its weights changed, or what it is called
with. Columns as in [precisions-zoo.md](precisions-zoo.md); what its formats change is in
[pytorch.md](pytorch.md#what-transformers-computes-differently). The eps of 0.1 changes its norm by
0.3 % at most, which is less than one rounding to bfloat16 ([precision.md](precision.md)).
"""


def document(results: Sequence[Outcome]) -> str:
    """Return the page."""
    missed = [one for one in results if one.fault is not None and not one.right_place]
    return "\n".join(
        [
            HEAD.format(n=len(FAULTS), layer=LAYER, versions=versions()),
            *tables(results, ENGINES, FAULTS, {"stated": True}),
            "",
            "Not found in its place: "
            + (", ".join(f"{one.fault.name} in `{one.engine}` (`{one.verdict}`)" for one in missed) or "none")
            + ".",
        ]
    )


def good(results: Sequence[Outcome]) -> bool:
    """Return whether no healthy engine is called defective, no name is wrong, and nearly all places are right."""
    faulty = [one for one in results if one.fault is not None]
    by_engine = [[one.right_place for one in faulty if one.engine == engine] for engine in ENGINES]
    return (
        all(one.good for one in results if one.fault is None)
        and all(one.naming != "wrong" for one in faulty)
        and all(sum(places) >= LEAST_IN_PLACE * len(places) for places in by_engine)
    )
