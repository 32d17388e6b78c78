"""Engines that compute otherwise than the model defines, or in fewer digits: healthy, and with 20 faults.

Each engine is run twice, stating how it computes and not; each fault is put into one layer of it. What must
follow: no healthy engine is called defective, and every fault is found on its side, in its layer and operation,
with the right name or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from crossval.diagnose.diagnosis import UNDETERMINED
from crossval.engines.bitnet_py import BitnetPyRunner
from tests.support.faulty_engine import CODE
from tests.support.judged import Judged, judge
from tests.support.narrow_engine import NarrowEngine, Style, plans
from tests.support.numpy_bitnet.engine import Call, Mistake
from tests.support.numpy_bitnet.mistakes import MISTAKES, NORMS, in_layers, levels, skipped
from tests.support.numpy_bitnet.styles import Array
from tests.zoo.detect import Replay

PROMPT = (1019, 273, 271, 220, 17, 10)
"""What is 2+"""
N_DECODE = 1
PLANS = plans(PROMPT, (220,))
LAYER = 2

ENGINES: Mapping[str, Style] = {
    "binary32": Style("f32"),
    "bfloat16": Style("bf16"),
    "bfloat16, quantiser and norms in it, too": Style("bf16", scale="narrow", norm="narrow"),
    "binary16": Style("f16", scale="narrow"),
    "float activations": Style("f32", activations="none"),
    "float activations in bfloat16": Style("bf16", activations="none", weights="bf16"),
    "weights dequantised to binary32": Style("f32", weights="f32"),
    "weights dequantised to bfloat16": Style("f32", weights="bf16"),
    "weights dequantised to binary16": Style("f32", weights="f16"),
    "float activations, weights in bfloat16": Style("f32", activations="none", weights="bf16"),
    "tensors stored in binary16": Style("f32", stored="f16"),
}


@dataclass(frozen=True)
class Fault:
    """One mistake, where it shows first, and its names: with wildcards; of no other name it is the right one."""

    name: str
    mistake: Mistake
    names: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        """The operation that is wrong first."""
        return self.mistake.ops[0]


def _other_heads(call: Call) -> Array:
    heads = call.engine.kv_heads()
    return call.right(*call.inputs, heads=heads[::-1])


def _matrix_of(other: str) -> Mistake:
    def code(call: Call) -> Array:
        return call.right(*call.inputs, matrix=call.engine.model.matrix(f"blk.{call.layer}.{other}"))

    return Mistake("", ("ffn_gate",), code)


def _quantised(op: str, quantise: object) -> Mistake:
    return Mistake("", (op,), lambda call: call.right(*call.inputs, quantise=quantise))


def _of(name: str, *ops: str) -> Mistake:
    return replace(CODE.get(name) or MISTAKES[name], ops=ops)


FAULTS: tuple[Fault, ...] = (
    *(Fault(f"{op} skipped", Mistake("", (op,), skipped), ("norm skipped",)) for op in NORMS),
    Fault("attn_norm as LayerNorm", _of("LayerNorm", "attn_norm"), ("LayerNorm*", "*mean*",)),
    Fault("ffn_norm with attn_norm's weight", _of("another norm's weight", "ffn_norm"), ("*attn_norm*",)),
    Fault("SiLU", _of("SiLU", "ffn_act"), ("SiLU",)),
    Fault("scores scaled by sqrt 2", _of("KQ scale x sqrt 2", "kq_soft_max"), ("*scale*", "*temperature*")),
    Fault("mask sees the next token", _of("mask sees the next token", "kq_soft_max"), ("*mask*",)),
    Fault("scores of other heads", Mistake("", ("kq",), _other_heads), ("*head*",)),
    Fault("values of other heads", Mistake("", ("kqv_out",), _other_heads), ("*head*",)),
    Fault("RoPE base 10000", _of("RoPE base 10000", "q_rope"), ("*base*",)),
    Fault("RoPE skipped", Mistake("", ("k_rope",), skipped), ("*RoPE*", "*rotat*", "*position*")),
    Fault("gate with up's matrix", _matrix_of("ffn_up"), ("*ffn_up*",)),
    Fault("no attention residual", _of("no attention residual", "ffn_inp"), ("*residual*",)),
    Fault("no feed-forward residual", _of("no feed-forward residual", "l_out"), ("*residual*",)),
    Fault("V 19 % wrong", _of("V 19 % wrong", "v")),
    Fault("128 levels", _quantised("q", levels(128)), ("128 levels*",)),
    Fault("one scale for all tokens", _quantised("ffn_down", levels(per_tensor=True)), ("per-tensor*",)),
    Fault("codes four in a row", _of("four codes in a row", "attn_o_out"), ("codes read four in a row*",)),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What was said of one engine, healthy or with a fault."""

    engine: str
    states: bool
    fault: Fault | None
    verdict: str
    place: str | None
    """Full name of the first wrong operation."""
    said: str | None
    """The cause that was named."""
    found: tuple[str, ...]
    """How the engine computes, as the audit says."""

    @property
    def right_place(self) -> bool:
        """Whether side, layer and operation are right."""
        assert self.fault is not None
        return self.verdict == "candidate_defect" and self.place == f"blk.{LAYER}.{self.fault.op}"

    @property
    def naming(self) -> str:
        """``right``, ``wrong`` or ``undetermined``."""
        assert self.fault is not None
        if self.said is None:
            return "undetermined"
        named = self.right_place and any(fnmatchcase(self.said, one) for one in self.fault.names)
        return "right" if named else "wrong"


def outcomes(
    model: Path,
    engines: Sequence[str] = tuple(ENGINES),
    faults: Sequence[Fault | None] = (None, *FAULTS),
    stating: Sequence[bool] = (False, True),
) -> Iterator[Outcome]:
    """Judge every engine beside ``bitnet_py``, as ``crossval layers`` does."""
    with BitnetPyRunner(model, n_threads=1) as reference:
        for name in engines:
            for states in stating:
                for fault in faults:
                    style = replace(ENGINES[name], states=states)
                    made = None if fault is None else in_layers(fault.mistake, [LAYER])
                    # recorded once: sums of floats need not come out alike in every run
                    engine = Replay(NarrowEngine(model, style, made=made).record(PLANS))
                    reference.reset()
                    found = judge(engine, reference, PROMPT, model, n_decode=N_DECODE, diagnosed=fault is not None)
                    yield _outcome(name, states, fault, found)


def _outcome(name: str, states: bool, fault: Fault | None, judged: Judged) -> Outcome:
    audit = judged.found.audits["candidate"]
    cause = judged.finding.diagnosis.name if judged.finding else UNDETERMINED
    found = [] if audit.precision is None else [f"{audit.precision.dtype} {audit.precision.scope}"]
    found += [] if audit.products is None else list(audit.products.deviations)
    return Outcome(
        name, states, fault, judged.verdict,
        None if judged.guilty is None else judged.guilty.tap,
        None if cause == UNDETERMINED else cause,
        tuple(found),
    )  # fmt: skip
