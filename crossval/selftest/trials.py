"""Run the self-test: every case through comparison, audit, arbitration and diagnosis as in ``crossval layers``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.model_file import ModelFile
from crossval.errors import BadInputError
from crossval.examine import examination as examine
from crossval.examine.examination import Examination
from crossval.examine.verdict import AGREEMENT, arbitrate
from crossval.files import temporary
from crossval.model import taps
from crossval.passes import Runner
from crossval.selftest import catalogue, damage
from crossval.selftest.alter import Altered
from crossval.selftest.catalogue import Case
from crossval.selftest.receipt import Found, Row, SelftestResult
from crossval.terms import SIDES, Progress, Side

TEXT = (
    "What is 2+2? The sun is warm and the water is cold; seven birds sat on the old wall, and none of them "
    "knew how far it was to the sea."
)
"""Text of the prompts, tokenized with the model's own vocabulary; repeated where it is too short."""
SMALL_MODEL_BYTES = 64 << 20
"""Model size up to which threads would wait for each other longer than they compute."""
_OPTIONS: dict[Side, dict[str, Any]] = {"candidate": {}, "reference": {"kernel": "scalar"}}
"""Our engine is both sides; as the reference it runs its scalar kernels, so that two codes are compared."""


@dataclass(frozen=True)
class Bench:
    """What every case needs: the model, its prompt and a healthy engine of either side."""

    model: ModelFile
    prompt_ids: tuple[int, ...]
    healthy: dict[Side, BitnetPyRunner]
    folder: Path


@contextmanager
def open_bench(model: ModelFile) -> Iterator[Bench]:
    """Open the healthy engines.

    Raises:
        ModelError: the engine cannot run the model.
        BadInputError: its context is too small for any prompt.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(temporary(Path(tempfile.gettempdir()), "crossval-selftest-", is_folder=True))
        healthy = {side: stack.enter_context(_engine(model, model.path, side)) for side in SIDES}
        yield Bench(model, _prompt(healthy["candidate"], model), healthy, folder)


def _engine(model: ModelFile, path: Path, side: Side) -> BitnetPyRunner:
    small = model.facts["size_bytes"] <= SMALL_MODEL_BYTES
    return BitnetPyRunner(path, n_threads=1 if small else None, **_OPTIONS[side])


def _prompt(engine: Runner, model: ModelFile) -> tuple[int, ...]:
    n_tokens = catalogue.prompt_length(model.facts["shape"])
    ids = engine.tokenize(TEXT)
    if not n_tokens or not ids:
        raise BadInputError(f"{model.path.name}: no prompt fits into its context or its vocabulary")
    # The highest id cannot be shifted up.
    fitting = [token for token in ids if token + 1 < model.config.vocab_size]
    return tuple((fitting * n_tokens)[:n_tokens])


def run(bench: Bench, cases: Sequence[Case] | None = None, progress: Progress | None = None) -> SelftestResult:
    """Run every case of the catalogue, or those given.

    Raises:
        BadInputError: a fault cannot be put into this model, or the specification cannot run it.
        UnavailableError, EngineCrashError: from the engine.
    """
    shape = bench.model.facts["shape"]
    cases = catalogue.cases(shape) if cases is None else cases
    report = progress or (lambda *_: None)
    rows = []
    for index, case in enumerate(cases):
        report(f"self-test: {case.fault or case.what}", index, len(cases))
        rows.append(Row(case, _found(bench, case)))
    report("self-test", len(cases), len(cases))
    return SelftestResult(tuple(rows), shape)


def _found(bench: Bench, case: Case) -> Found:
    with _engines(bench, case) as engines:
        return read(
            examine.examine(
                engines["candidate"],
                engines["reference"],
                bench.prompt_ids[: case.n_prompt],
                bench.model.path,
                n_decode=case.n_decode,
                # an altered output stands for a wrong result, although nothing reads it
                question_recording=False,
            )
        )


@contextmanager
def _engines(bench: Bench, case: Case) -> Iterator[dict[Side, Runner]]:
    """Yield both engines, the one of the case's side with its fault."""
    engines: dict[Side, Runner] = {**bench.healthy}
    if case.side is None:
        yield engines
        return
    fault = catalogue.fault_of(case, bench.model.facts["shape"])
    if fault.damage is None:
        healthy = bench.healthy[case.side]
        yield {**engines, case.side: Altered(healthy, case.tap, fault.pass_kind, fault.change, fault.feed)}
        return
    path = bench.folder / "damaged.gguf"
    fault.damage(damage.damaged_copy(bench.model.path, path), case.tap)
    with _engine(bench.model, path, case.side) as faulty:
        yield {**engines, case.side: faulty}


def read(examination: Examination) -> Found:
    """Return the result of an examination as a row of the self-test."""
    audits = {side: result.verdict for side, result in examination.audits.items()}
    status = examination.result.verdict
    verdict = arbitrate(AGREEMENT[status], audits["candidate"], audits["reference"])
    if not examination.findings:
        return Found(status, audits["candidate"], audits["reference"], verdict)
    first = examination.findings[0]
    place = taps.parse(first.check.tap)
    return Found(
        status,
        audits["candidate"],
        audits["reference"],
        verdict,
        place.layer,
        place.tap,
        first.check.pass_kind,
        first.diagnosis.name,
    )
