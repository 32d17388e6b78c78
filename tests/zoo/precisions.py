"""Engines that compute otherwise than the model defines, or in fewer digits: healthy, and with 20 faults.

Each engine is run twice, stating how it computes and not; each fault is put into one layer of it. What must
follow: no healthy engine is called defective, and every fault is found on its side, in its layer and operation,
with the right name or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

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

HEALTHY: Mapping[str, str] = {
    **{
        name: "deviates"
        for name in ENGINES
        if name.startswith("float") or name.endswith(("to bfloat16", "to binary16"))
    },
    "tensors stored in binary16": "incomplete",
}
"""Verdict on a healthy engine, where it is not parity."""


class AnyFault(Protocol):
    """One mistake, where it shows first, and its names: with wildcards; of no other name it is the right one."""

    @property
    def name(self) -> str: ...

    @property
    def op(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Fault:
    """One that the NumPy engine makes."""

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


def _with(op: str, **changed: float) -> Mistake:
    return Mistake("", (op,), lambda call: call.right(*call.inputs, **changed))


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
    Fault("RoPE base 500000", _with("q_rope", base=5e5), ("*base*",)),
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
    fault: AnyFault | None
    verdict: str
    place: str | None
    """Full name of the first wrong operation."""
    said: str | None
    """The cause that was named."""
    found: tuple[str, ...]
    """How the engine computes, as the audit says."""

    @property
    def good(self) -> bool:
        """Whether a healthy engine is not called defective, or a fault is in its place and not misnamed."""
        if self.fault is None:
            return self.verdict == HEALTHY.get(self.engine, "parity")
        return self.right_place and self.naming != "wrong"

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


STATED_EVERY = 10
"""Every so many faults are tried in an engine that states how it computes, too: others in each engine."""
Case = tuple[str, bool, Fault | None]
"""Engine, whether it states how it computes, and the fault; None: healthy."""


def cases() -> Iterator[Case]:
    """Yield what is tried: every engine healthy, stating or not; every fault, unstated; some stated, too."""
    for number, name in enumerate(ENGINES):
        yield from ((name, states, None) for states in (False, True))
        yield from ((name, False, fault) for fault in FAULTS)
        yield from ((name, True, fault) for fault in FAULTS[number % STATED_EVERY :: STATED_EVERY])


N_CASES = len(list(cases()))


def outcomes(model: Path, tried: Iterable[Case] | None = None) -> Iterator[Outcome]:
    """Judge every engine beside ``bitnet_py``, as ``crossval layers`` does."""
    with BitnetPyRunner(model, n_threads=1) as reference:
        for name, states, fault in cases() if tried is None else tried:
            made = None if fault is None else in_layers(fault.mistake, [LAYER])
            # recorded once: sums of floats need not come out alike in every run
            engine = Replay(NarrowEngine(model, replace(ENGINES[name], states=states), made=made).record(PLANS))
            reference.reset()
            found = judge(engine, reference, PROMPT, model, n_decode=N_DECODE, diagnosed=fault is not None)
            yield outcome_of(name, states, fault, found)


def outcome_of(name: str, states: bool, fault: AnyFault | None, judged: Judged) -> Outcome:
    """Return what was said of an engine."""
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


# --- as a page ------------------------------------------------------------------------------------------------

HEAD = """# Mistakes in engines of other precisions

Generated by `python -m tests.zoo --precisions > docs/precisions-zoo.md`;
`tests/parity/test_precisions.py` repeats a sample of it with every run of the tests. How such
engines are judged: [precision.md](precision.md).

Each engine computes the shipped model in NumPy, a prompt and one decoded token, and is compared
with `bitnet_py` as `crossval layers` does it. {n} faults are put into layer {layer} of {n_layers}, one at a
time, into an engine that states nothing; every {every}th, others for each engine, also into one that
states how it computes. *Place*: the candidate is wrong, in this layer, in this operation first. A
name is *right* or *wrong*; none is given where the precision does not allow it, or the fault has
none.
"""


def document(results: Sequence[Outcome]) -> str:
    """Return the page."""
    head = HEAD.format(n=len(FAULTS), layer=LAYER, n_layers=4, every=STATED_EVERY)
    return "\n".join([head, *tables(results, ENGINES, FAULTS, {"unstated": False, "stated": True})])


def tables(
    results: Sequence[Outcome], engines: Iterable[str], faults: Iterable[AnyFault], states: Mapping[str, bool]
) -> Iterator[str]:
    """Yield the lines of two tables, by engine and by fault; ``states``: columns of healthy ones that state."""
    healthy = [f"healthy, {word}" for word in states]
    columns = ["engine", *healthy, "faults", "place right", "name right", "no name", "wrong"]
    yield _cells(*columns)
    yield "|" + "---|" * len(columns)
    for name in engines:
        yield _row(name, [one for one in results if one.engine == name], states.values())
    yield from ("", "| fault | first wrong | engines | place right | names given |", "|---|---|---|---|---|")
    for fault in faults:
        yield _fault_row(fault, [one for one in results if one.fault == fault])


def _row(name: str, results: Sequence[Outcome], states: Iterable[bool]) -> str:
    healthy = {one.states: f"`{one.verdict}`" for one in results if one.fault is None}
    faulty = [one for one in results if one.fault is not None]
    names = Counter(one.naming for one in faulty)
    cells = [name, *(healthy[one] for one in states), len(faulty), sum(one.right_place for one in faulty)]
    return _cells(*cells, *(names[kind] for kind in ("right", "undetermined", "wrong")))


def _fault_row(fault: AnyFault, results: Sequence[Outcome]) -> str:
    names = Counter(one.said for one in results if one.said is not None)
    said = ", ".join(f"{name} ({n})" for name, n in names.most_common()) or "none"
    return _cells(fault.name, f"`{fault.op}`", len(results), sum(one.right_place for one in results), said)


def _cells(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
