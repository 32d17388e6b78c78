"""Engines measured side by side: ours and live builds of bitnet.cpp and llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from bitnet_py.model import DEFAULT_UBATCH
from crossval.api.request import Request, silent
from crossval.bench.engine import BitnetPyProcess, Engine
from crossval.bench.figures import Further
from crossval.bench.measures import BOUNDED, Work
from crossval.bench.receipt import BENCH
from crossval.bench.rounds import Task, run_bench
from crossval.bench.stage import Entrant
from crossval.bench.threads import usable_cores
from crossval.child.client import EngineProcess
from crossval.engines import registry
from crossval.engines.model_file import ModelFile
from crossval.engines.session import is_fallback, kernel_counts
from crossval.engines.words import EngineWord
from crossval.errors import BadInputError, UnavailableError, UsageError
from crossval.passes import EngineIdentity, Numerics
from crossval.receipts.file import Receipt
from crossval.receipts.kind import RunFacts, build, build_unavailable
from crossval.receipts.party import PATH_OF_NAME, Compute, Party
from crossval.terms import Progress, Side

OURS = "bitnet_py"
MAX_REFERENCES = 8


def bench_engines(
    model: str | Path | None = None,
    *,
    n_prompt: int = 128,
    n_decode: int = 16,
    n_rounds: int = 9,
    n_threads: int | None = None,
    kernel: str | None = None,
    seed: int = 0,
    candidate: str = OURS,
    reference: str | Sequence[str] = "auto",
    min_ratios: Mapping[str, float | None] | None = None,
    follow_reference_graph: bool = False,
    progress: Progress = silent,
) -> Receipt:
    """Measure live engines in turn on the same tokens, and compare their logits.

    ``n_rounds``: measured rounds, after one warm-up round. ``n_threads``: of each engine; None: for
    each engine and measure the number, and the placement, that is fastest here. ``reference``: one or
    several. ``min_ratios``: minimum ratio of the candidate's speed to every reference's, by name of
    the measure. ``follow_reference_graph``: our engine computes what the other engine's generation
    does, even where that is not the model.

    Raises:
        UsageError: an engine that is not run live, or one kernel for an engine that has no choice.
        BadInputError, ModelError: an unusable model, or more tokens than its context holds.
        UnavailableError: an engine is not here.
        EngineCrashError: from the engines.
    """
    names = [reference] if isinstance(reference, str) else list(reference)
    if not 1 <= len(names) <= MAX_REFERENCES:
        raise UsageError(f"{len(names)} references; between 1 and {MAX_REFERENCES} can be measured")
    ours, *theirs = _live("candidate", candidate), *(_live("reference", name) for name in names)
    if kernel is not None and ours.name != OURS:
        raise UsageError(f"--kernel chooses a kernel family of {OURS}; the candidate is {ours.plain}")
    request = Request(
        BENCH, model, candidate, names[0], n_threads, progress=progress,
        follow_reference_graph=follow_reference_graph,
    )  # fmt: skip
    checked = request.load_model()
    work = Work(seed, n_prompt, n_decode, n_rounds, n_threads or len(usable_cores()), checked.config.vocab_size)
    if work.n_context > checked.config.context_length:
        raise BadInputError(
            f"this needs {work.n_context} tokens, the model's context holds {checked.config.context_length}"
        )
    follows = [registry.row_of(word).follows for word in (ours, *theirs)]
    bounds = {name: (min_ratios or {}).get(name) for name in BOUNDED}
    task = Task(work, checked.config.n_layers, follows[0], tuple(follows[1:]), n_threads, kernel, bounds)
    start = _Start(checked.path, work, kernel, ours, theirs, follow_reference_graph)
    try:
        if "auto" in names:
            registry.require_bitnet_cpp("has no speed")
        done = run_bench(start, task, progress)
    except UnavailableError as error:
        parties = start.unavailable(str(error))
        facts = _facts(checked, request, work, parties, Compute("none"))
        error.receipt = build_unavailable(BENCH, facts)
        raise
    first, *others = done.identities
    further = [
        Further(word.plain, Party("live", one["reference"]), one["candidate"].numerics)
        for word, one in zip(theirs[1:], others, strict=True)
    ]
    pairs = done.findings.pairs
    pairs = (pairs[0], *(replace(pair, further=one) for pair, one in zip(pairs[1:], further, strict=True)))
    path = PATH_OF_NAME.get(first["candidate"].name, "none")
    fallback = path == "real" and kernel is None and is_fallback(first["candidate"].settings.get("kernel"))
    facts = _facts(
        checked,
        request,
        work,
        {side: Party("live", identity) for side, identity in first.items()},
        Compute(path, fallback, kernel_counts(done.counters)),
    )
    return build(BENCH, replace(done.findings, pairs=pairs), facts)


def _live(side: Side, text: str) -> EngineWord:
    """Return the word of an engine that can be measured.

    Raises:
        BadInputError: no engine.
        UsageError: a trace or the specification.
    """
    word = registry.find_word(side, registry.live_word(text))
    why = registry.row_of(word).one_way
    if why is not None:
        raise UsageError(f"{side} {text}: only live engines have a speed")
    return word


def _facts(
    model: ModelFile, request: Request, work: Work, parties: Mapping[Side, Party], compute: Compute
) -> RunFacts:
    return RunFacts(
        model=model.facts,
        tokenizer={**model.tokenizer, "engines_agree": None},
        text=None,
        template=None,
        token_ids=work.prompt_ids,
        candidate=parties["candidate"],
        reference=parties["reference"],
        compute=compute,
        settings=request.settings(n_decode=work.n_decode),
        notes=list(model.notes),
    )


@dataclass
class _Start:
    """Starts engines for one benchmark: same longest pass, no larger context than needed."""

    path: Path
    work: Work
    kernel: str | None
    candidate: EngineWord
    references: list[EngineWord]
    follow_reference_graph: bool
    last: Side = field(default="reference", init=False)
    """The side started last: of an engine that is not here."""

    def __call__(self, entrant: Entrant, n_threads: int) -> AbstractContextManager[Engine]:
        """Return an engine, not yet started."""
        self.last = entrant.side
        word = self.candidate if entrant.side == "candidate" else self.references[entrant.index]
        n_ubatch = max(DEFAULT_UBATCH, self.work.n_prompt)
        if word.name == OURS:
            return BitnetPyProcess(
                self.path,
                n_threads=n_threads,
                numerics=entrant.numerics or Numerics(),
                follow_reference_graph=self.follow_reference_graph,
                kernel=self.kernel if entrant.side == "candidate" else None,
                n_ubatch=n_ubatch,
            )
        asked = registry.Asked(
            word,
            self.path,
            numerics=entrant.numerics,
            n_threads=n_threads,
            n_ubatch=n_ubatch,
            n_ctx=self.work.n_context,
            as_run=True,
        )
        runner = registry.row_of(word).open(asked)
        if not isinstance(runner, EngineProcess):
            raise UsageError(f"{entrant.side} {word.plain} does not run in a process of its own")
        return cast(AbstractContextManager[Engine], runner)

    def unavailable(self, note: str) -> dict[Side, Party]:
        """Return both parties where one, the last, is not here."""
        words: dict[Side, EngineWord] = {"candidate": self.candidate, "reference": self.references[0]}
        return {
            side: Party(
                "unavailable",
                EngineIdentity(registry.engine_name(word)),
                note=note if side == self.last else "not opened",
            )
            for side, word in words.items()
        }
