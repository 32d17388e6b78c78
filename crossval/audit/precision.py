"""Which floating-point format an engine really computes in, found from everything it recorded.

A value of binary32 is one of bfloat16's with a chance of 2^-16, one of binary16's with 2^-13. An engine whose
recorded tensors hold nothing else rounds to that format, whatever it states. That is one property of
the engine, not a fault of its first operation; it is found once, said once, and everything is then judged at its
unit roundoff. Nine of ten tensors have to be in it: a mistake in one operation may leave more digits there, and is
named as an exception. What rounds in fewer places is a fault in those places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from bitnet_py.errors import listed
from crossval.audit.bounds import Arithmetic
from crossval.audit.products import Products
from crossval.formats import BF16, F16, F32, FORMATS, Dtype, Format
from crossval.model import taps
from crossval.model.config import SpecConfig
from crossval.model.kinds import Embedding, Gelu, Scale
from crossval.model.op import Op
from crossval.model.reference_graph import ZERO_ROWS
from crossval.passes import Numerics, TapArray
from crossval.receipts.party import compute_dtypes

NARROW = (BF16, F16)
"""In the order they are tried: most values of bfloat16 are of binary16, too, and not the other way round."""
MIN_DISTINCT = 16
"""Different values, without zero and the sign, that make a tensor evidence: 16 of binary32 fit by chance once in
2^208. Attention weights of one token and the outputs of dead neurons have fewer."""
MIN_TAPS = 3
MIN_VALUES = 256
"""Least evidence for a property of the engine: tensors, and values in them."""
OF_TABLES = (Embedding, Gelu, Scale)
"""Kinds whose results may have few digits whatever the engine computes in: rows of a table in F16, llama.cpp's
GELU, which is one, and both times a constant."""
LEAST_IN_FORMAT = Fraction(9, 10)
"""Of the tensors that say anything: one operation of 19 in all layers may have more digits, or a layer of ten."""
MOST_NAMED = 5
_PROBE = 64
"""Values looked at first: they are enough to recognise a tensor of binary32."""


class Shape(Protocol):
    """The part of a model's shape that its arithmetic depends on: ``SpecConfig``, ``TraceModel``."""

    @property
    def n_heads(self) -> int:
        """Query heads."""

    @property
    def head_dim(self) -> int:
        """Width of one."""


Scope = Literal["all", "some", "recorded", "mixed"]


@dataclass(frozen=True)
class Precision:
    """The 16-bit format of an engine, or of some of its tensors."""

    dtype: Dtype
    scope: Scope
    """``all``: the recorded tensors that say anything, but for ``exceptions``; ``some``: the operations in
    ``ops``, in all layers and passes, and no others, which changes nothing for the audit; ``recorded``: every
    tensor was recorded in it, but what the engine computes with has more digits; ``mixed``: the operations in
    ``ops``, for which the engine states it."""
    declared: bool
    """Whether the engine states so itself, and what it recorded agrees."""
    unit_roundoff: float
    """Relative error of one rounding that the bounds were made with: the format's, or binary32's."""
    n_taps: int
    """Recorded tensors that say anything, each counted once per pass."""
    n_in_format: int
    """Of these, how many hold values of the format only."""
    n_values: int
    """Values in those."""
    ops: tuple[str, ...] = ()
    """With ``some`` and ``mixed``: the operations whose outputs are in the format."""
    exceptions: tuple[str, ...] = ()
    """With ``all``: full names of the tensors that hold other values in some pass, in execution order."""

    def to_json(self) -> dict[str, Any]:
        """Return it as the receipt's ``audit.*.precision``."""
        data = {**asdict(self), "ops": list(self.ops), "exceptions": list(self.exceptions)}
        return data if self.exceptions else {name: value for name, value in data.items() if name != "exceptions"}


@dataclass
class _Seen:
    """Tensors of one operation so far; by format, those that hold values of it only, and their values."""

    n_taps: int = 0
    n_held: Counter[Dtype] = field(default_factory=Counter)
    n_values: Counter[Dtype] = field(default_factory=Counter)
    others: dict[Dtype, set[str]] = field(default_factory=lambda: {form.name: set() for form in NARROW})
    """Full names of those that hold other values."""


@dataclass
class Survey:
    """Looks at everything one engine recorded, pass by pass."""

    numerics: Numerics = field(default_factory=Numerics)
    """What the engine states."""
    ops: Sequence[Op] = tuple(taps.OPS.values())
    """Of the model."""
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def add(self, recorded: Mapping[str, TapArray]) -> None:
        """Take in the tensors of one pass, by full tap name; each is to be given once.

        Of an engine that states binary32, one stored in 16 bits says how it was stored and nothing more.
        """
        told_nothing = {op.name for op in self.ops if isinstance(op.kind, OF_TABLES)}
        for name, tap in recorded.items():
            op = taps.op_of(name)
            if tap.dtype != "f32" and self.numerics.formats == {"f32"} and self.numerics.compute_dtype == "f32":
                continue
            if op.name not in told_nothing and _says_something(tap.array):
                seen = self._seen.setdefault(op.name, _Seen())
                seen.n_taps += 1
                for form in NARROW:
                    if form.holds(tap.array.reshape(-1)[:_PROBE]) and form.holds(tap.array):
                        seen.n_held[form.name] += 1
                        seen.n_values[form.name] += tap.array.size
                    else:
                        seen.others[form.name].add(name)

    def found(self) -> Precision | None:
        """Return the format the tensors are in, or the one the engine states; None: it is binary32."""
        stated = self.numerics.compute_dtype or "f32"
        if self.numerics.op_dtypes:
            return self._mixed()
        for form in NARROW:
            every = self._over(form, self._seen)
            if every.n_in_format >= LEAST_IN_FORMAT * every.n_taps and _is_evidence(every):
                return replace(every, declared=stated == form.name and not every.exceptions)
        if stated != "f32":
            every = self._over(FORMATS[stated], self._seen)
            return replace(every, declared=every.n_in_format == every.n_taps)
        for form in NARROW:
            whole = [name for name, seen in self._seen.items() if seen.n_held[form.name] == seen.n_taps]
            some = self._over(form, whole)
            if _is_evidence(some):
                ops = tuple(sorted(whole, key=list(taps.OPS).index))
                return replace(some, scope="some", unit_roundoff=F32.unit_roundoff, ops=ops, exceptions=())
        return None

    def _mixed(self) -> Precision | None:
        """Return whether the operations for which a 16-bit format is stated hold values of it."""
        judged = Arithmetic(self.numerics, 1)
        forms = {name: judged.of(op).format for name, op in taps.OPS.items()}
        narrow = [name for name in forms if forms[name] is not F32]
        if not narrow:
            return None
        widest = max((forms[name] for name in narrow), key=lambda form: form.unit_roundoff)
        seen = {name: self._seen[name] for name in narrow if name in self._seen}
        n_taps, n_held = (
            sum(one.n_taps for one in seen.values()),
            sum(one.n_held[forms[name].name] for name, one in seen.items()),
        )
        return Precision(
            widest.name,
            "mixed",
            n_held == n_taps,
            widest.unit_roundoff,
            n_taps,
            n_held,
            sum(one.n_values[forms[name].name] for name, one in seen.items()),
            tuple(narrow),
        )

    def _over(self, form: Format, names: Collection[str]) -> Precision:
        """Count what the operations of these names hold in a format, out of all tensors."""
        return Precision(
            form.name,
            "all",
            False,
            form.unit_roundoff,
            n_taps=sum(seen.n_taps for seen in self._seen.values()),
            n_in_format=sum(self._seen[name].n_held[form.name] for name in names),
            n_values=sum(self._seen[name].n_values[form.name] for name in names),
            exceptions=tuple(
                sorted(
                    set().union(*(seen.others[form.name] for seen in self._seen.values())),
                    key=taps.execution_index,
                )
            ),
        )


def _is_evidence(found: Precision) -> bool:
    return found.n_in_format >= MIN_TAPS and found.n_values >= MIN_VALUES


def _says_something(array: npt.NDArray[np.float32]) -> bool:
    """Return whether a tensor has enough different values, as seen from a sample."""
    flat = array.reshape(-1)
    return any(_n_distinct(values) >= MIN_DISTINCT for values in (flat[:_PROBE], flat))


def _n_distinct(values: npt.NDArray[np.float32]) -> int:
    """Return how many different magnitudes are among some thousands of the finite values that are not zero."""
    sizes = np.abs(values)
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return np.unique(sizes[:: max(1, sizes.size // 4096)]).size


def differs(found: Precision) -> bool:
    """Return whether the finding changes what counts as agreement, which the engine does not state."""
    return found.scope != "some" and not found.declared


def arithmetic_of(
    numerics: Numerics, found: Precision | None, model: Shape, products: Products | None = None
) -> Arithmetic:
    """Return the arithmetic an engine is judged by: what it states, and what was found."""
    numerics = numerics if products is None else products.stated_in(numerics)
    follows = isinstance(model, SpecConfig) and model.follows is not None
    stated = Arithmetic(
        numerics,
        model.n_heads,
        head_dim=model.head_dim,
        head_table=model.head_type if isinstance(model, SpecConfig) else "F16",
        zero_rows_nan=follows and numerics.generation in ZERO_ROWS,
    )
    if found is None or found.scope in ("some", "mixed"):
        return stated
    if found.scope == "recorded":
        return replace(stated, numerics=replace(numerics, compute_dtype=None), recorded=FORMATS[found.dtype])
    return replace(stated, numerics=replace(numerics, compute_dtype=found.dtype))


def storing(arithmetic: Arithmetic, op: Op, recorded: Mapping[str, TapArray]) -> Arithmetic:
    """Return the arithmetic of an operation, and what its output and inputs in a pass were stored in."""
    names = [taps.state_source(name) if taps.is_state(name) else name for name in op.inputs]
    forms = [lost(recorded[name], taps.op_of(name), arithmetic) for name in names if name in recorded]
    inputs = max(forms, key=lambda form: form.unit_roundoff, default=F32)
    return arithmetic.of(op).storing(inputs, lost(recorded[op.output], op, arithmetic))


def of_json(data: Mapping[str, Any] | None) -> Precision | None:
    """Return the finding of a receipt that is valid by the schema."""
    if data is None:
        return None
    return Precision(**{**data, "ops": tuple(data["ops"]), "exceptions": tuple(data.get("exceptions", ()))})


def lost(tap: TapArray, op: Op, arithmetic: Arithmetic) -> Format:
    """Return what a tensor was stored in, where that has fewer digits than it was computed or is read with."""
    had = {arithmetic.of(op).format.name, arithmetic.numerics.kv_dtype if op.appends_to is not None else None}
    return F32 if tap.dtype in had else FORMATS[tap.dtype]


# --- in words -------------------------------------------------------------------------------------------------


def within(receipt: Mapping[str, Any]) -> str | None:
    """Return what agreement in a receipt is within: the format with the fewest digits of both; None: binary32."""
    used = compute_dtypes(receipt)
    return next((form.label for form in NARROW if form.name in used), None)


def sentence(found: Mapping[str, Any]) -> str:
    """Return a finding of a receipt as a sentence."""
    form, taken = FORMATS[found["dtype"]], f"{found['n_in_format']} of {found['n_taps']} tensors"
    if found["scope"] == "some":
        return (
            f"in all layers and passes {', '.join(found['ops'])} hold values of {form.label} only ({taken}); the "
            "others have more digits, so it is judged at binary32"
        )
    if found["scope"] == "recorded":
        return (
            f"every tensor was recorded in {form.label} ({taken}, {found['n_values']} values), but sums and "
            "products do not come out in it: the engine computes with more digits. int8 codes do not follow from "
            "such a record; record binary32"
        )
    if found["scope"] == "mixed":
        how = f"{', '.join(found['ops'])} are computed in 16 bits, as this engine states: {taken} hold just that"
        return f"{how}; each is judged in its own format, the widest unit roundoff is {form.unit_roundoff:.3g}"
    if found["declared"]:
        how = f"this engine computes in {form.label}, as it states: {taken}, {found['n_values']} values"
    elif found["n_in_format"] == found["n_taps"]:
        how = (
            f"this engine rounds everything to {form.label} and does not state so: {taken}, "
            f"{found['n_values']} values"
        )
    elif found["n_in_format"] >= LEAST_IN_FORMAT * found["n_taps"]:
        names = list(found["exceptions"])
        how = (
            f"this engine rounds everything to {form.label} ({taken}) but for {listed(names, MOST_NAMED)}, "
            "which hold more digits"
        )
    else:
        how = f"this engine states that it computes in {form.label}, but only {taken} hold just that"
    u = form.unit_roundoff
    return (
        f"{how}; judged at its unit roundoff {u:.3g}. Not seen at this precision: a norm off by less than "
        f"{6 * u:.2g} of its values, a projection by {2 * u:.2g} (rounded scales: {4 * u:.2g}), a sum or product "
        f"by {u:.2g}"
    )
