"""``crossval bench``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bitnet_py._native import kernel_families
from bitnet_py.model import DEFAULT_UBATCH, available_cores
from crossval.bench.engine import BitnetPyProcess, Engine
from crossval.bench.measures import BOUNDED, Work
from crossval.bench.receipt import BENCH
from crossval.bench.rounds import BenchRun, run_bench
from crossval.bitnet_cpp import library
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.cli import comparison as run
from crossval.cli.options import model_option, output_options
from crossval.engines.session import is_fallback
from crossval.errors import BadInputError, UnavailableError
from crossval.model.file import ModelFile
from crossval.passes import EngineIdentity, Numerics
from crossval.receipts.kind import RunFacts, build, build_unavailable
from crossval.receipts.party import REFERENCE_NAME, Compute, Party
from crossval.terms import Side

MAX_TOKENS = 100_000
MAX_SEED = 2**53 - 1
"""JSON readers keep integers up to here."""


def _ratio_options(function: Any) -> Any:
    """Add ``--min-NAME-ratio`` of every measure that a bound can be asked of."""
    for name in reversed(BOUNDED):
        function = click.option(
            f"--min-{name.replace('_', '-')}-ratio",
            f"min_{name}_ratio",
            type=click.FloatRange(0, 1e6, min_open=True),
            metavar="R",
            help=f"Least ratio of our speed to the reference's: {name.replace('_', ' ')}. Default: any.",
        )(function)
    return function


def _kernel(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    known = [family.name for family in kernel_families()]
    if value is not None and value not in known:
        raise click.BadParameter(f"{value!r} is no kernel family; the C library has {', '.join(known)}")
    return value


@click.command("bench")
@click.option(
    "--prompt-tokens",
    "n_prompt",
    type=click.IntRange(1, MAX_TOKENS),
    default=128,
    show_default=True,
    metavar="N",
    help="Length of the prompt.",
)
@click.option(
    "--decode",
    "n_decode",
    type=click.IntRange(1, MAX_TOKENS),
    default=16,
    show_default=True,
    metavar="N",
    help="Tokens to decode after it.",
)
@click.option(
    "--rounds",
    "n_rounds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    metavar="N",
    help="Rounds that count; one more, the first, warms up.",
)
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Threads of each engine. Default: as many as there are cores to use.",
)
@click.option(
    "--kernel",
    callback=_kernel,
    metavar="NAME",
    help="Kernel family of our engine. Default: the best of this CPU.",
)
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Of the token ids.")
@click.option(
    "--reference",
    type=click.Choice(["auto", "bitnet.cpp"]),
    default="auto",
    show_default=True,
    help="Live bitnet.cpp; a recorded one has no speed.",
)
@_ratio_options
@model_option
@output_options
def command(
    n_prompt: int,
    n_decode: int,
    n_rounds: int,
    n_threads: int | None,
    kernel: str | None,
    seed: int,
    reference: str,
    model_path: Path | None,
    receipt_path: Path | None,
    as_json: bool,
    **min_ratios: float | None,
) -> None:
    """Measure our engine and live bitnet.cpp side by side, and check that they compute the same meanwhile.

    Prompt, decoding, first token of a fresh process, memory, and the weights read beside what this machine can
    read. Both engines run in every round, in turn, on the same tokens; read the ratios, for machines are noisy.
    Exit 0 when everything was measured, all logits are equal in every bit and no ratio is below what was asked
    for; 1 when not; 3 without bitnet.cpp.

    \b
    Example:
      crossval bench
      crossval bench --model model.gguf --threads 4 --min-decode-ratio 1 --receipt bench.json
    """
    n_threads = n_threads or available_cores()
    request = run.Request("bench", model_path, "bitnet_py", reference, n_threads, None, receipt_path, as_json)
    asked = {name: min_ratios[f"min_{name}_ratio"] for name in BOUNDED}
    with run.progress() as report:
        model = run.load_model(request, report)
        work = Work(seed, n_prompt, n_decode, n_rounds, n_threads, model.config.vocab_size)
        if work.n_context > model.config.context_length:
            raise BadInputError(
                f"this needs {work.n_context} tokens, the model's context holds {model.config.context_length}"
            )
        with _unavailable_receipt(model, request, work):
            _require_reference()
            opener = Opener(model.path, work, kernel)
            done = run_bench(opener, work, kernel=kernel, min_ratios=asked, progress=report)
    run.finish(build(BENCH, done.findings, _context(model, request, done)), request)


def _require_reference() -> None:
    """Refuse to begin without live bitnet.cpp.

    Raises:
        UnavailableError: there is none.
    """
    if library.find_library() is None:
        raise UnavailableError(
            "bitnet.cpp is not built here, and what is recorded of it has no speed; "
            "run `make fetch-cpp` (or set BITNET_CPP_DIR or BITNET_CPP_LIB)"
        )


@contextmanager
def _unavailable_receipt(model: ModelFile, request: run.Request, work: Work) -> Iterator[None]:
    """Leave a receipt that says so when bitnet.cpp cannot be had, then let the error go on."""
    try:
        yield
    except UnavailableError as error:
        if request.as_json or request.receipt_path is not None:
            ours = Party("unavailable", EngineIdentity("bitnet_py"), note="not opened")
            theirs = Party("unavailable", EngineIdentity(REFERENCE_NAME), note=str(error))
            facts = _facts(model, request, work, ours, theirs, Compute("none"))
            run.publish(build_unavailable(BENCH, facts), request)
        raise


def _context(model: ModelFile, request: run.Request, done: BenchRun) -> RunFacts:
    counters = tuple({"name": c.name, "calls": int(c.calls), "bytes": int(c.bytes)} for c in done.counters)
    ours, theirs = done.identities["candidate"], done.identities["reference"]
    fallback = done.findings.kernel is None and is_fallback(ours.settings.get("kernel"))
    compute = Compute("real", fallback, counters)
    return _facts(model, request, done.findings.work, Party("live", ours), Party("live", theirs), compute)


def _facts(
    model: ModelFile, request: run.Request, work: Work, ours: Party, theirs: Party, compute: Compute
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
class Opener:
    """Starts engines for one benchmark: same threads, same longest pass, no more context than is needed."""

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
