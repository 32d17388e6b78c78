"""Our engine and live bitnet.cpp measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bitnet_py.model import DEFAULT_UBATCH, available_cores
from crossval.api.request import Request, silent
from crossval.bench.engine import BitnetPyProcess, Engine
from crossval.bench.measures import BOUNDED, Work
from crossval.bench.receipt import BENCH
from crossval.bench.rounds import run_bench
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.engines import registry
from crossval.engines.model_file import ModelFile
from crossval.engines.session import is_fallback, kernel_counts
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import EngineIdentity, Numerics
from crossval.receipts.file import Receipt
from crossval.receipts.kind import RunFacts, build, build_unavailable
from crossval.receipts.party import REFERENCE_NAME, Compute, Party
from crossval.terms import Progress, Side


def bench_engines(
    model: str | Path | None = None,
    *,
    n_prompt: int = 128,
    n_decode: int = 16,
    n_rounds: int = 5,
    n_threads: int | None = None,
    kernel: str | None = None,
    seed: int = 0,
    reference: str = "auto",
    min_ratios: Mapping[str, float | None] | None = None,
    progress: Progress = silent,
) -> Receipt:
    """Measure our engine and live bitnet.cpp alternately on the same tokens, and compare their logits.

    ``n_rounds``: measured rounds, after one warm-up round. ``n_threads``: of each engine; None: all
    usable cores. ``min_ratios``: minimum ratio of our speed to the
    reference's, by name of the measure.

    Raises:
        BadInputError, ModelError: an unusable model, or more tokens than its context holds.
        UnavailableError: no live bitnet.cpp.
        EngineCrashError: from the engines.
    """
    n_threads = n_threads or available_cores()
    request = Request(BENCH, model, reference=reference, n_threads=n_threads, progress=progress)
    bounds = {name: (min_ratios or {}).get(name) for name in BOUNDED}
    checked = request.load_model()
    work = Work(seed, n_prompt, n_decode, n_rounds, n_threads, checked.config.vocab_size)
    if work.n_context > checked.config.context_length:
        raise BadInputError(
            f"this needs {work.n_context} tokens, the model's context holds {checked.config.context_length}"
        )
    try:
        registry.require_bitnet_cpp("has no speed")
        done = run_bench(
            _Open(checked.path, work, kernel), work, kernel=kernel, min_ratios=bounds, progress=progress
        )
    except UnavailableError as error:
        ours = Party("unavailable", EngineIdentity("bitnet_py"), note="not opened")
        theirs = Party("unavailable", EngineIdentity(REFERENCE_NAME), note=str(error))
        error.receipt = build_unavailable(BENCH, _facts(checked, request, work, ours, theirs, Compute("none")))
        raise
    ours, theirs = (Party("live", done.identities[side]) for side in ("candidate", "reference"))
    fallback = kernel is None and is_fallback(ours.identity.settings.get("kernel"))
    compute = Compute("real", fallback, kernel_counts(done.counters))
    return build(BENCH, done.findings, _facts(checked, request, work, ours, theirs, compute))


def _facts(
    model: ModelFile, request: Request, work: Work, ours: Party, theirs: Party, compute: Compute
) -> RunFacts:
    return RunFacts(
        model=model.facts,
        tokenizer={**model.tokenizer, "engines_agree": None},
        text=None,
        template=None,
        token_ids=work.prompt_ids,
        candidate=ours,
        reference=theirs,
        compute=compute,
        settings=request.settings(n_decode=work.n_decode),
        notes=list(model.notes),
    )


@dataclass(frozen=True)
class _Open:
    """Starts engines for one benchmark: same threads, same longest pass, no larger context than needed."""

    path: Path
    work: Work
    kernel: str | None

    def __call__(self, side: Side, reference: EngineIdentity | None) -> AbstractContextManager[Engine]:
        """Return an engine, not yet started."""
        n_ubatch = max(DEFAULT_UBATCH, self.work.n_prompt)
        if side == "reference":
            return BitnetCppRunner(
                self.path, n_threads=self.work.n_threads, n_ctx=self.work.n_context, n_ubatch=n_ubatch
            )
        numerics = Numerics() if reference is None else reference.numerics
        return BitnetPyProcess(
            self.path, n_threads=self.work.n_threads, numerics=numerics, kernel=self.kernel, n_ubatch=n_ubatch
        )
