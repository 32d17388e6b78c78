"""The faults of the self-test, where they are injected into a model of a given shape, and what must be found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from crossval.diagnose.diagnosis import UNDETERMINED
from crossval.examine.verdict import Verdict
from crossval.model import taps
from crossval.passes import PassKind
from crossval.selftest import alter, damage
from crossval.selftest.alter import Change, Feed
from crossval.selftest.damage import Damage
from crossval.terms import SIDES, Side

How = Literal["healthy", "file", "output"]
Where = Literal["first", "middle", "last", "model"]
Shape = Mapping[str, Any]
"""A receipt's ``model.shape``."""

HEALTHY_LENGTHS = (1, 4, 7, 16, 33)
"""Tokens of the prompts of healthy runs, on which nothing may be found."""
FAULT_LENGTH = 7
"""Tokens of the prompt of every fault: a batch with a remainder modulo 4."""
N_DECODE = 1
DEFECT: dict[Side, Verdict] = {"candidate": "candidate_defect", "reference": "reference_defect"}


@dataclass(frozen=True)
class Expected:
    """What the harness has to report."""

    verdict: Verdict
    layer: int | None = None
    op: str | None = None
    pass_kind: PassKind | None = None
    names: tuple[str, ...] = ()
    """Correct names of the cause; empty: nothing is to be found."""


@dataclass(frozen=True)
class Fault:
    """One fault, and where it is injected."""

    name: str
    what: str
    """In words."""
    op: str
    """Tap, without layer, that is first wrong."""
    where: Where
    names: tuple[str, ...] = (UNDETERMINED,)
    """Correct diagnoses; ``{layer}`` stands for the layer, ``{next}`` for the one after it, ``{tensor}`` for the
    tensor of the operation. A fault without a name must be left undetermined."""
    pass_kind: PassKind = "prefill"
    """Kind of the first wrong pass."""
    damage: Damage | None = None
    """Modifies a copy of the model file."""
    change: Change | None = None
    """Changes one output."""
    feed: Feed | None = None
    """Changes the tokens that are run."""
    fits: Callable[[Shape], bool] = field(default=lambda shape: True)
    """Whether a model of this shape can have the fault."""

    @property
    def how(self) -> How:
        """Return the layer in which it is injected."""
        return "file" if self.damage is not None else "output"


@dataclass(frozen=True)
class Case:
    """One comparison of the self-test."""

    how: How
    fault: str | None
    what: str
    side: Side | None
    """Which engine has the fault; None: both are healthy."""
    n_prompt: int
    expected: Expected
    n_decode: int = N_DECODE

    @property
    def tap(self) -> str:
        """Full name of the tap that is first wrong."""
        assert self.expected.op is not None
        return str(taps.TapName(self.expected.layer, self.expected.op))


def _square(shape: Shape) -> bool:
    return bool(shape["n_heads"] * shape["head_dim"] == shape["dim"])


def _several_layers(shape: Shape) -> bool:
    return bool(shape["n_layers"] > 1)


def _next_ids(ids: Sequence[int]) -> list[int]:
    return [token + 1 for token in ids] if len(ids) > 1 else list(ids)


def _header(name: str, key: str, in_shape: str, op: str, value: float, names: tuple[str, str]) -> Fault:
    """Return the fault of an engine that uses its own number instead of the header's."""
    return Fault(
        f"file-{name}-{value:g}",
        f"{value:g} instead of the header's {name}",
        op,
        "first",
        names,
        damage=damage.of_header(key, value),
        fits=lambda shape: not math.isclose(shape[in_shape], value, rel_tol=1e-6),
    )


FAULTS: tuple[Fault, ...] = (
    Fault("file-read-sequentially", "four consecutive codes per byte, high bits first", "ffn_up", "first",
          ("codes read four in a row",),
          damage=damage.of_codes(lambda p: damage.read_sequentially(p, (6, 4, 2, 0)))),
    Fault("file-table-zero-plus-minus", "codes mean 0, +1, -1", "q", "middle",
          ("code table 0, +1, -1",), damage=damage.of_codes(damage.zero_plus_minus)),
    Fault("file-blocks-of-64", "blocks of 64 codes, as on ARM", "ffn_down", "last",
          ("block of 64",), damage=damage.of_codes(damage.blocks_of_64)),
    Fault("file-scale-one", "the matrix's scale is not applied", "v", "first",
          ("weight scale ignored",), damage=damage.of_scale(lambda s: 1.0)),
    Fault("file-scale-inverted", "divided by the matrix's scale", "attn_o_out", "last",
          ("weight scale inverted",), damage=damage.of_scale(np.reciprocal)),
    Fault("file-of-another-layer", "the matrix of the next layer", "k", "middle",
          ("weights of blk.{next}.{tensor}.weight",), damage=damage.of_next_layer, fits=_several_layers),
    Fault("file-transposed", "x·W instead of W·x", "q", "last",
          ("weights transposed",), damage=damage.of_codes(damage.transposed), fits=_square),
    Fault("file-gate-and-up-swapped", "gate and up change places", "ffn_gate", "first",
          ("weights of blk.{layer}.ffn_up.weight",), damage=damage.swap("ffn_gate", "ffn_up")),
    Fault("file-norms-swapped", "attn_norm and ffn_norm change places", "attn_norm", "middle",
          ("norm weight of blk.{layer}.ffn_norm.weight",), damage=damage.swap("attn_norm", "ffn_norm")),
    _header("rope-base", "rope.freq_base", "rope_base", "q_rope", 10000.0,
            ("RoPE base 10000", "wrong RoPE base")),
    _header("rope-base", "rope.freq_base", "rope_base", "q_rope", 500000.0,
            ("RoPE base 500000", "wrong RoPE base")),
    _header("eps", "attention.layer_norm_rms_epsilon", "rms_eps", "attn_norm", 1e-6,
            ("eps 1e-06", "wrong or misplaced eps")),
    Fault("file-embedding-transposed", "the embedding table is read as (dim, vocab_size)", "inp_embd", "model",
          ("embedding table transposed",), damage=damage.of_embedding(damage.table_transposed)),
    Fault("output-token-ids-shifted", "token ids of the prompt one too high", "inp_embd", "model",
          ("row of token id +1",), feed=_next_ids),
    Fault("output-rounded-to-f16", "passed on in F16", "l_out", "middle",
          ("output rounded to F16",), change=alter.through_f16),
    Fault("output-rounded-to-bf16", "passed on in BF16", "kqv_out", "first",
          ("output rounded to BF16",), "decode", change=alter.through_bf16),
    Fault("output-batch-remainder-zero", "the last n_tokens mod 4 rows of a batch are 0", "k_rope", "first",
          ("last n mod 4 tokens zero",), change=alter.zero_remainder),
    Fault("output-thread-slice-lost", "half of the features are 0", "ffn_norm", "middle",
          ("features {half} to {dim} (exclusive) zero",), change=alter.lose_half),
    Fault("output-logits-shifted", "every logit one token id too high", "result_output", "model",
          ("logits shifted by +1",), change=alter.shift_features),
    Fault("output-nan", "one NaN", "ffn_norm", "last", pass_kind="decode", change=alter.set_value(3, math.nan)),
    Fault("output-row-missing", "one token's row is missing", "kq_soft_max", "first", change=alter.lose_row),
    Fault("output-sign-flipped", "the largest value of the last token has the other sign", "v", "middle",
          change=alter.flip_sign),
    Fault("output-one-in-ten-thousand", "every value 0.01 % too large", "ffn_inp", "last",
          ("output times 1.0001",), "decode", change=alter.one_in_ten_thousand),
)  # fmt: skip


def cases(shape: Shape) -> tuple[Case, ...]:
    """Return what the self-test runs on a model of this shape: healthy engines first, then every fault that fits,
    alternately in the candidate and in the reference."""
    room = shape["context_length"] - N_DECODE
    healthy = [
        Case("healthy", None, f"prompt of {n} tokens", None, n, Expected("parity"))
        for n in HEALTHY_LENGTHS
        if n <= room
    ]
    fitting = [fault for fault in FAULTS if fault.fits(shape) and room >= FAULT_LENGTH]
    return (*healthy, *(_case(fault, shape, SIDES[index % 2]) for index, fault in enumerate(fitting)))


def fault_of(case: Case, shape: Shape) -> Fault:
    """Return the fault of a case."""
    (fault,) = (fault for fault in FAULTS if fault.name == case.fault and fault.fits(shape))
    return fault


def prompt_length(shape: Shape) -> int:
    """Return how many tokens the longest prompt has; the others are prefixes of it."""
    return max((case.n_prompt for case in cases(shape)), default=0)


def _case(fault: Fault, shape: Shape, side: Side) -> Case:
    n_layers = max(1, shape["n_layers"])
    layers: dict[Where, int | None] = {"first": 0, "middle": n_layers // 2, "last": n_layers - 1, "model": None}
    layer = layers[fault.where]
    place = {
        "layer": layer,
        "next": None if layer is None else (layer + 1) % n_layers,
        "tensor": damage.TENSORS.get(fault.op, fault.op),
        "dim": shape["dim"],
        "half": shape["dim"] // 2,
    }
    names = tuple(name.format(**place) for name in fault.names)
    expected = Expected(DEFECT[side], layer, fault.op, fault.pass_kind, names)
    return Case(fault.how, fault.name, fault.what, side, FAULT_LENGTH, expected)
