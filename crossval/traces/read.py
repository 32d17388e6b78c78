"""Traces on disk: what one engine computed for one token sequence (docs/trace-format.md).

A trace is a directory: ``trace.json`` (who, which model, which tokens, which taps) and one
``pass-NNNN.safetensors`` per pass with the arrays. Reading is lazy: ``Trace.open`` reads
``trace.json`` only; a pass file is hashed and checked when the first of its taps is accessed.
Everything is checked before it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, permutations
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from crossval.errors import BadInputError
from crossval.files import check_regular, file_sha256, read_limited
from crossval.formats import Dtype
from crossval.model import taps
from crossval.model.taps import shape_hint
from crossval.passes import EngineIdentity, Numerics, PassPlan, TapArray, check_rows, pass_kind
from crossval.schema import one_line, parse_json, validate_trace
from crossval.traces import dtypes
from crossval.traces.tap_map import PLAIN, Entry, Resolved, TapMap, WrongShape, counted, resolve

FORMAT = "crossval-trace"
FORMAT_VERSION = 1
TRACE_FILE = "trace.json"
MAX_TRACE_JSON_BYTES = 32 << 20

USE_A_MAP = "name what they are with --tap-map (docs/tap-maps.md)"
SHAPE_FIELDS = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "hidden_dim", "vocab_size")
"""The fields from which the shape of every tap follows."""


@dataclass(frozen=True)
class TraceModel:
    """The model a trace belongs to: its identity, and its shape, from which every tap's shape follows."""

    sha256: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    hidden_dim: int
    vocab_size: int
    file_name: str | None = None
    architecture: str | None = None
    input_norms: bool | None = None
    """Whether every matrix norms its own input; None: no."""
    pooling: str | None = None
    """How the vectors of tokens become one of the text; None: they do not."""

    @classmethod
    def of_receipt(cls, receipt: Mapping[str, Any]) -> TraceModel:
        """Return the model of a receipt that is valid by the schema."""
        model = receipt["model"]
        form = {name: model.get(name) for name in ("architecture", "input_norms", "pooling")}
        return cls(sha256=model["sha256"], **{name: model["shape"][name] for name in SHAPE_FIELDS}, **form)


def check_model(recorded: TraceModel, model: TraceModel) -> None:
    """Check that a trace is one of a model.

    Raises:
        ValueError: it is of another file, or states another shape.
    """
    if recorded.sha256 != model.sha256:
        raise ValueError(
            f"it was recorded from another model ({recorded.file_name or 'unnamed'}, sha256 "
            f"{recorded.sha256[:12]}…) than {model.file_name or 'this one'} ({model.sha256[:12]}…)"
        )
    for name in SHAPE_FIELDS:
        stated, real = getattr(recorded, name), getattr(model, name)
        if stated != real:
            raise ValueError(f"model.{name} is {stated}, {model.file_name or 'the model'} has {real}")


_VALID: set[bytes] = set()
"""sha256 of every ``trace.json`` that was valid by the schema: a command opens the same one many times."""


@dataclass(frozen=True)
class TraceTap:
    """One recorded tap of a pass, as ``trace.json`` states it."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    source: str = ""
    """Name of the tensor that holds it."""
    entry: Entry = PLAIN
    """How the tap is made of that tensor."""
    dtype: Dtype = "f32"
    """What that tensor is stored in."""


@dataclass(frozen=True)
class TracePass:
    """One recorded pass, as ``trace.json`` states it."""

    plan: PassPlan
    file: str
    sha256: str
    taps: Mapping[str, TraceTap]
    tensors: Mapping[str, tuple[int, ...]]
    """Every tensor of the file, those included that are no taps: name -> shape."""
    dtypes: Mapping[str, Dtype]
    """What each of these is stored in."""
    elapsed_s: float | None = None


@dataclass(frozen=True)
class TraceInfo:
    """The contents of ``trace.json``, checked."""

    engine: EngineIdentity
    model: TraceModel
    prompt_text: str | None
    prompt_ids: tuple[int, ...]
    passes: tuple[TracePass, ...]
    notes: tuple[str, ...] = ()
    created_at: str | None = None
    ignored: tuple[str, ...] = ()
    """Names of tensors that the tap map says to ignore, or replaces by another name of the same tap."""
    unknown: tuple[str, ...] = ()
    """Names of tensors that are neither taps nor in the tap map: they are not compared."""

    @property
    def plan(self) -> tuple[PassPlan, ...]:
        """The passes as plans, in order."""
        return tuple(recorded.plan for recorded in self.passes)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens the engine was fed, in order."""
        return tuple(token for plan in self.plan for token in plan.token_ids)


def pass_file_name(index: int) -> str:
    """Return the file name of a pass."""
    return f"pass-{index:04d}.safetensors"


def tensor_key(index: int, tap: str) -> str:
    """Return the name of a tap inside its pass file."""
    return f"p{index}.{tap}"


def expected_shape(name: str, model: TraceModel, plan: PassPlan, rows: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape that a tap must have, given the model, the pass and the rows it covers.

    Raises:
        ValueError: the tap is not in the vocabulary, or of a layer the model does not have.
    """
    tap = taps.parse(name)
    if tap.layer is not None and tap.layer >= model.n_layers:
        raise ValueError(f"{name}: the model has {model.n_layers} layers")
    n_rows = len(plan.token_ids) if rows is None else len(rows)
    return taps.OPS[tap.tap].shape(model, n_rows, plan.start + len(plan.token_ids))


class Trace:
    """A trace opened for reading. Arrays are read when asked for and not kept."""

    def __init__(self, directory: Path, info: TraceInfo) -> None:
        self.directory = directory
        self.info = info
        self._digest_checked: set[int] = set()

    @classmethod
    def open(cls, directory: str | Path, tap_map: TapMap | None = None, model: TraceModel | None = None) -> Trace:
        """Read and check ``trace.json``; pass files are checked when they are first read.

        ``tap_map``: what the engine calls its tensors; ``model``: the model that it has to be a trace of.

        Raises:
            BadInputError: missing, malformed, contradicting itself, or of another model; the message names the
            field.
        """
        root = Path(directory)
        path = root / TRACE_FILE
        try:
            check_regular(path)
        except BadInputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise BadInputError(
                f"{root} holds no finished trace (no {TRACE_FILE}); it is written last, by `crossval record`"
            ) from error
        data = read_limited(path, "trace", MAX_TRACE_JSON_BYTES)
        return cls(root, parse_info(data, str(path), tap_map, model))

    def taps(self, index: int) -> Mapping[str, TapArray]:
        """Return the taps of a pass, name -> array, each read from disk on access.

        Raises:
            BadInputError: (on access) the pass file is missing, truncated, or not what
            ``trace.json`` says.
        """
        return _LazyTaps(self, index)

    def verify(self) -> None:
        """Read every pass file once: digest, names, shapes, types and sizes.

        Raises:
            BadInputError: anything missing, malformed or different from what ``trace.json`` says.
        """
        for index in range(len(self.info.passes)):
            self._digest_checked.discard(index)
            self._open_pass(index)

    def _open_pass(self, index: int) -> Any:
        recorded = self.info.passes[index]
        path = self.directory / recorded.file
        if index not in self._digest_checked:
            check_regular(path)
            found = file_sha256(path)
            if found != recorded.sha256:
                raise BadInputError(
                    f"{path}: sha256 is {found[:12]}…, trace.json says {recorded.sha256[:12]}…; "
                    "the file was changed or cut after the trace was written, record it again"
                )
        try:
            file: Any = safe_open(str(path), framework="numpy")
            keys = set(file.keys())
            expected = {tensor_key(index, name): (name, shape) for name, shape in recorded.tensors.items()}
            if keys != set(expected):
                odd = sorted(keys ^ set(expected))[0]
                where = "trace.json" if odd in keys else "the file"
                raise BadInputError(f"{path}: tensor {odd!r} is missing from {where}")
            if index not in self._digest_checked:
                for key, (name, stated) in expected.items():
                    part, form = file.get_slice(key), dtypes.NAME_OF[recorded.dtypes[name]]
                    dtype, shape = part.get_dtype(), tuple(part.get_shape())
                    if dtype != form or shape != stated:
                        raise BadInputError(
                            f"{path}: tensor {key!r} is {dtype} {shape}, trace.json says {form} {stated}"
                        )
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInputError(f"{path}: not a usable safetensors file: {one_line(error)}") from error
        self._digest_checked.add(index)
        return file


class _LazyTaps(Mapping[str, TapArray]):
    """The taps of one pass; the file is opened on the first access and arrays are not kept."""

    def __init__(self, trace: Trace, index: int) -> None:
        self._trace = trace
        self._index = index
        self._taps = trace.info.passes[index].taps
        self._file: Any = None

    def __getitem__(self, name: str) -> TapArray:
        tap = self._taps[name]
        if self._file is None:
            self._file = self._trace._open_pass(self._index)
        where, key = self._trace.directory / pass_file_name(self._index), tensor_key(self._index, tap.source)
        try:
            array = dtypes.read_bf16(where, key) if tap.dtype == "bf16" else self._file.get_tensor(key)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise BadInputError(f"{where}: cannot read {name}: {one_line(error)}") from error
        array = tap.entry.apply(dtypes.widened(array, tap.dtype), tap.shape, self._trace.info.model)
        return TapArray(np.ascontiguousarray(array, dtype=np.float32), tap.rows, tap.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._taps

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __len__(self) -> int:
        return len(self._taps)


def parse_info(
    data: bytes, where: str, tap_map: TapMap | None = None, against: TraceModel | None = None
) -> TraceInfo:
    """Parse and check the bytes of a ``trace.json``; ``against``: the model that it has to be a trace of.

    Raises:
        BadInputError: not strict JSON, against the schema, contradicting itself, or of another model; the
        message names the field.
    """
    value = parse_json(data, where)
    digest = hashlib.sha256(data).digest()
    if digest not in _VALID:
        validate_trace(value, where)
        _VALID.add(digest)
    try:
        _check_text(value)
        return _info(value, tap_map, against)
    except ValueError as problem:
        raise BadInputError(f"{where}: {one_line(problem)}") from problem


def _info(value: dict[str, Any], tap_map: TapMap | None, against: TraceModel | None) -> TraceInfo:
    model = _model(value["model"])
    if against is not None:
        check_model(model, against)
    architecture = model.architecture if against is None else against.architecture
    resolved: dict[tuple[str, ...], Resolved] = {}
    engine = _engine(value["engine"])
    unheard = [name for name in engine.numerics.fused if name not in taps.LAYER_TAPS]
    if unheard:
        raise ValueError(f"engine.numerics.fused: no layer has an operation {unheard[0]!r}")
    prompt_ids = tuple(map(int, value["prompt"]["token_ids"]))
    passes: list[TracePass] = []
    start = 0
    ends = accumulate(len(item["token_ids"]) for item in value["passes"])
    keys_of = dict(enumerate(ends))
    for index, item in enumerate(value["passes"]):
        names = tuple(dict.fromkeys(entry["name"] for entry in item["taps"]))
        if names not in resolved:
            resolved[names] = resolve(names, tap_map, architecture)
        passes.append(_pass(item, index, start, model, keys_of, resolved[names].found))
        start += len(passes[-1].plan.token_ids)
    contradictions = (tap for one in passes for tap in one.taps if taps.parse(tap).tap in engine.numerics.fused)
    if (tap := next(contradictions, None)) is not None:
        raise ValueError(
            f"{tap} is recorded, and engine.numerics.fused says that it exists only inside a kernel: leave one of "
            "them out"
        )
    unknown = tuple(dict.fromkeys(name for one in resolved.values() for name in one.unknown))
    if not any(one.taps for one in passes):
        raise ValueError(f"none of its tensors is a tap: {', '.join(counted(unknown)[:4])}; {USE_A_MAP}")
    fed = tuple(token for p in passes for token in p.plan.token_ids)
    if fed[: len(prompt_ids)] != prompt_ids[: len(fed)]:
        raise ValueError("prompt.token_ids are not what the passes were fed first")
    if len(fed) < len(prompt_ids):
        raise ValueError(f"the passes cover {len(fed)} tokens of a prompt of {len(prompt_ids)}")
    return TraceInfo(
        engine=engine,
        model=model,
        prompt_text=value["prompt"].get("text"),
        prompt_ids=prompt_ids,
        passes=tuple(passes),
        ignored=tuple(dict.fromkeys(name for one in resolved.values() for name in one.ignored)),
        unknown=unknown,
        notes=tuple(value.get("notes", ())),
        created_at=value.get("created_at"),
    )


def _model(value: dict[str, Any]) -> TraceModel:
    # JSON may write an integer as 2.0.
    whole: dict[str, Any] = {name: int(one) if isinstance(one, float) else one for name, one in value.items()}
    return TraceModel(**whole)


def _engine(value: dict[str, Any]) -> EngineIdentity:
    numerics = Numerics.from_json(value.get("numerics", {}))
    taps.check_op_names(name for name, _ in numerics.op_dtypes)
    return EngineIdentity(
        **{key: item for key, item in value.items() if key not in ("numerics", "settings")},
        numerics=numerics,
        settings=dict(value.get("settings", {})),
    )


def _pass(
    item: dict[str, Any],
    index: int,
    start: int,
    model: TraceModel,
    keys_of: Mapping[int, int],
    known: Mapping[str, tuple[str, Entry]],
) -> TracePass:
    where = f"passes.{index}"
    ids = tuple(map(int, item["token_ids"]))
    if int(item["start"]) != start:
        raise ValueError(f"{where}.start is {item['start']}, the passes before it hold {start} tokens")
    if max(ids) >= model.vocab_size:
        raise ValueError(f"{where}.token_ids: {max(ids)} is outside the vocabulary of {model.vocab_size}")
    kind = pass_kind(len(ids), start)
    if item["kind"] != kind:
        raise ValueError(
            f"{where}.kind is {item['kind']!r}; {len(ids)} token(s) from position {start} are {kind!r}"
        )
    if item["file"] != pass_file_name(index):
        raise ValueError(f"{where}.file is {item['file']!r}, expected {pass_file_name(index)!r}")
    plan = PassPlan(kind, ids, start)
    tensors: dict[str, tuple[int, ...]] = {}
    stored: dict[str, Dtype] = {}
    rows_of: dict[str, tuple[int, ...] | None] = {}
    for entry in item["taps"]:
        source = entry["name"]
        if source in tensors:
            raise ValueError(f"{where}: {source} is listed twice")
        tensors[source] = tuple(map(int, entry["shape"]))
        stored[source] = dtypes.OF_NAME[entry["dtype"]]
        rows_of[source] = None if entry.get("rows") is None else tuple(map(int, entry["rows"]))
        check_rows(f"{where}: {source}", rows_of[source], len(ids))
    recorded = {}
    for name, (source, one) in known.items():
        expected = expected_shape(name, model, plan, rows_of[source])
        _check_shape(where, name, source, tensors[source], expected, one, model, keys_of)
        recorded[name] = TraceTap(name, expected, rows_of[source], source, one, stored[source])
    return TracePass(plan, item["file"], item["sha256"], recorded, tensors, stored, item.get("elapsed_s"))


def _check_shape(
    where: str,
    name: str,
    source: str,
    stored: tuple[int, ...],
    expected: tuple[int, ...],
    entry: Entry,
    model: TraceModel,
    keys_of: Mapping[int, int],
) -> None:
    called = name if source == name else f"{source}, which is {name},"
    try:
        entry.check(stored, expected, model)
    except WrongShape as error:
        given = f"{where}: {called} has shape {list(stored)}, the model and rows give {list(expected)}"
        why = shape_hint(name, error.shape, expected, keys_of)
        orders = [
            order for order in permutations(range(len(error.shape))) if _ordered(error.shape, order) == expected
        ]
        if why and len(orders) == 1:
            why += f'; or give a tap map with the step {{"transpose": {list(orders[0])}}}'
        raise ValueError(f"{given}: {why}" if why else given) from error
    except ValueError as error:
        raise ValueError(f"{where}: {called} has shape {list(stored)}: {error}") from error


def _ordered(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in order)


def _check_text(value: Any) -> None:
    """Reject lone surrogates, which JSON escapes can express but valid text cannot contain."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            item.encode("utf-8")
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
