"""Dumps of llama.cpp's own tools: the values that were printed beside an engine's, and saved logits as a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crossval.bitnet_cpp import printed
from crossval.bitnet_cpp.capture import PassShape, tap_array
from crossval.bitnet_cpp.printed import DECIMALS, Printed
from crossval.engines.tap_maps import FAMILY, OPERATION, load
from crossval.errors import BadInputError
from crossval.files import read_limited
from crossval.model import taps
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray
from crossval.terms import LOGITS
from crossval.traces.read import TraceInfo, TraceModel
from crossval.traces.tap_map import TapMap
from crossval.traces.write import TraceWriter

MAX_DUMP_BYTES = 256 << 20
UNIT = 10.0**-DECIMALS
"""The last digit that is printed."""


# --- printed values -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrintedTap:
    """The printed values of one tap beside an engine's."""

    tap: str
    n_values: int
    """Printed, and given by the engine."""
    n_alike: int
    """Those that the engine's values print as, digit by digit."""
    n_beyond: int
    """Those that are more than one unit of the last digit away."""
    max_abs: float | None
    """Largest difference between what is printed and the engine's value; None: one of the two is not finite."""


@dataclass(frozen=True)
class Dump:
    """A printed dump, as far as its tensors are taps; in execution order."""

    tap_map: str
    """Whose node names it has."""
    flash_attention: bool
    tensors: dict[str, Printed]

    @property
    def numerics(self) -> Numerics:
        """What can be told of the arithmetic: the generation, by its node names."""
        generation = FAMILY[self.tap_map].generation
        return Numerics(generation=generation, flash_attention=self.flash_attention or None)


def read_dump(path: str | Path, architecture: str | None) -> Dump:
    """Read what ``llama-eval-callback`` or ``llama-debug`` printed.

    Raises:
        BadInputError: it is no such dump, holds no tap or several passes, or is cut off.
    """
    text = read_limited(Path(path), "dump", MAX_DUMP_BYTES).decode("utf-8", "replace")
    every = list(printed.parse(text, str(path)))
    maps = [load(name) for name in FAMILY]
    found = [(_tensors(every, one, architecture, str(path)), one.name) for one in maps]
    tensors, name = max(found, key=lambda one: len(one[0]))  # of maps that fit alike, the first
    if not tensors:
        raise BadInputError(f"{path}: none of its {len(every)} tensors is a tap of architecture {architecture}")
    ordered = {tap: tensors[tap] for tap in sorted(tensors, key=taps.execution_index)}
    return Dump(name, any(one.op == "FLASH_ATTN_EXT" for one in every), ordered)


def _tensors(
    every: Sequence[Printed], tap_map: TapMap, architecture: str | None, where: str
) -> dict[str, Printed]:
    found: dict[str, tuple[int, Printed]] = {}
    for one in every:
        named = f"{one.node}{OPERATION}{one.op}"
        for tap, rank, _ in tap_map.targets(named, architecture) or tap_map.targets(one.node, architecture):
            before = found.get(tap)
            if before is not None and before[0] == rank and tap in taps.INPUT_TAPS:
                raise BadInputError(
                    f"{where}: it holds several passes; dump the prompt alone, without a warm-up run"
                )
            if before is None or rank >= before[0]:
                found[tap] = (rank, one)
    return {tap: one for tap, (_, one) in found.items()}


def beside(dump: Dump, record: PassRecord, head_dim: int) -> list[PrintedTap]:
    """Compare what was printed with an engine's pass over the same tokens; taps that it lacks are left out.

    Raises:
        BadInputError: the dump is of another number of tokens.
    """
    n_tokens = len(record.plan.token_ids)
    shape = PassShape(n_tokens, n_tokens, head_dim)
    rows: list[PrintedTap] = []
    for tap, one in dump.tensors.items():
        given = record.taps.get(tap)
        if given is None:
            continue
        kind = taps.parse(tap).tap
        try:
            values, known = (tap_array(kind, array.astype(np.float32), shape) for array in (one.values, one.known))
        except ValueError as error:
            raise BadInputError(f"the dump is not one of these {n_tokens} tokens: {error}") from error
        every = tuple(range(n_tokens))
        of_dump, of_engine = values.rows or every, given.rows or every
        both = [row for row in of_dump if row in of_engine]
        if both:
            theirs, is_known = (taps.take_rows(tap, one.array, of_dump, both) for one in (values, known))
            ours = taps.take_rows(tap, given.array, of_engine, both)
            rows.append(_beside(tap, theirs, ours, is_known.astype(bool), both))
    return rows


def _beside(
    tap: str, theirs: npt.NDArray[np.float32], ours: npt.NDArray[np.float32], known: npt.NDArray[np.bool_],
    positions: Sequence[int],
) -> PrintedTap:  # fmt: skip
    seen = taps.visible(tap, theirs.shape, positions)
    known = known if seen is None else known & seen
    shown, exact = theirs[known].astype(np.float64), ours[known].astype(np.float64)
    alike = np.array([f"{a:.{DECIMALS}f}" == f"{b:.{DECIMALS}f}" for a, b in zip(shown, exact, strict=True)], bool)
    with np.errstate(invalid="ignore"):
        off = np.where(alike, 0.0, np.abs(shown - exact))
    # a float32 holds what was printed to half a unit in its last place, which is below a digit only if small
    beyond = ~(off <= 1.5 * UNIT + np.spacing(np.abs(shown).astype(np.float32)))
    worst = float(np.max(np.nan_to_num(off, nan=np.inf), initial=0.0))
    n_alike, n_beyond = int(alike.sum()), int(beyond.sum())
    return PrintedTap(tap, len(shown), n_alike, n_beyond, worst if np.isfinite(worst) else None)


# --- saved logits ---------------------------------------------------------------------------------------------


def import_logits(
    path: str | Path, model: TraceModel, out_dir: str | Path, *, overwrite: bool = False
) -> TraceInfo:
    """Write the logits that ``llama-debug --save-logits`` saved as a trace: the prompt's last token, nothing else.

    ``path``: ``llamacpp-NAME.bin``, float32; its tokens are in ``llamacpp-NAME-tokens.bin`` beside it, int32.

    Raises:
        BadInputError: either file is missing or does not fit the model, or the trace cannot be written.
    """
    path = Path(path)
    _refuse_text(path)
    tokens_path = path.with_name(f"{path.stem}-tokens.bin")
    data = read_limited(path, "logits", 4 * model.vocab_size)
    if len(data) != 4 * model.vocab_size:
        raise BadInputError(
            f"{path} holds {len(data)} bytes, the logits of {model.vocab_size} tokens are {4 * model.vocab_size}"
        )
    ids = np.frombuffer(_whole(read_limited(tokens_path, "tokens", MAX_DUMP_BYTES), tokens_path), "<i4")
    if not len(ids) or ids.min() < 0 or ids.max() >= model.vocab_size:
        raise BadInputError(f"{tokens_path}: its tokens are not of a vocabulary of {model.vocab_size}")
    token_ids = tuple(map(int, ids))
    logits = np.frombuffer(data, "<f4").astype(np.float32).reshape(1, -1)
    record = PassRecord(PassPlan("prefill", token_ids, 0), {LOGITS: TapArray(logits, (len(token_ids) - 1,))})
    with TraceWriter(out_dir, model, overwrite=overwrite) as writer:
        writer.add_pass(record)
        return writer.finish(
            engine=EngineIdentity("llama.cpp"),
            prompt_ids=token_ids,
            notes=[f"imported from {path.name}, which llama-debug saved; its build is not known"],
        )


def _refuse_text(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
    except OSError as error:
        raise BadInputError(f"cannot read logits {path}: {error.strerror or error}") from error
    if any(word in start for word in (b"ggml_debug:", b"common_debug_cb_eval:")):
        raise BadInputError(
            f"{path} is printed text: it holds the values at the corners of each tensor, which make no trace; "
            f"compare them with `crossval printed {path.name} --prompt TEXT`"
        )


def _whole(data: bytes, path: Path) -> bytes:
    if len(data) % 4:
        raise BadInputError(f"{path} holds {len(data)} bytes, which are not whole token ids")
    return data
