"""``crossval metamorphic``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bitnet_py._native import kernel_families
from crossval.cli import comparison as run
from crossval.cli.engines import SIDES, engine_option, live_word, open_sides, unavailable_receipt, without_unused
from crossval.cli.options import compare_options
from crossval.engines.registry import open_candidate, open_reference
from crossval.engines.session import Prompt, Session
from crossval.errors import BadInputError
from crossval.passes import Runner
from crossval.receipts.kind import build
from crossval.repeat.metamorphic.cases import LENGTHS, THREAD_COUNTS, Options
from crossval.repeat.metamorphic.receipt import METAMORPHIC, MetamorphicFindings
from crossval.repeat.metamorphic.suite import enough_tokens, run_metamorphic
from crossval.terms import Side

MAX_LENGTH = 4096


class Counts(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """Numbers of at least 1, separated by commas, as a tuple without repetitions."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers.

        Raises:
            click.BadParameter: anything else.
        """
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isascii() and word.isdigit() and 1 <= int(word[:9]) <= MAX_LENGTH for word in words):
            self.fail(f"{value!r} is no list of numbers from 1 to {MAX_LENGTH}, as 1,2,33", param, ctx)
        return tuple(dict.fromkeys(int(word) for word in words))


def _kernels(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the families named; one that this CPU lacks is left for the checks to say so."""
    if value is None:
        return None
    names = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
    known = [family.name for family in kernel_families()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no kernel family; the C library has {', '.join(known)}")
    return names


def _runnable() -> tuple[str, ...]:
    return tuple(family.name for family in kernel_families() if family.available)


@click.command("metamorphic")
@click.option("--prompt", metavar="TEXT", help="Text the checks begin with. Default: arbitrary tokens.")
@engine_option("Who is checked; with both, each against itself.")
@click.option(
    "--lengths",
    type=Counts(),
    default=",".join(map(str, LENGTHS)),
    show_default=True,
    help="Prompt lengths in tokens.",
)
@click.option(
    "--thread-counts",
    type=Counts(),
    default=",".join(map(str, THREAD_COUNTS)),
    show_default=True,
    help="Numbers of threads.",
)
@click.option(
    "--kernels",
    callback=_kernels,
    metavar="NAME,NAME,...",
    help="Kernel families of the candidate. Default: all that this CPU runs.",
)
@compare_options
def command(
    prompt: str | None,
    engine: str,
    lengths: tuple[int, ...],
    thread_counts: tuple[int, ...],
    kernels: tuple[str, ...] | None,
    model_path: Path | None,
    reference: str,
    candidate: str,
    n_threads: int | None,
    template: str,
    receipt_path: Path | None,
    as_json: bool,
) -> None:
    """Check an engine against itself: the same work done another way must give the same.

    A prompt at once and token by token, at any length, in two passes, after another sequence, by other numbers of
    threads and by every kernel of this CPU. Needs no second engine. Exit 0 when everything holds, 1 when something
    does not, 3 when something could not be checked.

    \b
    Example:
      crossval metamorphic
      crossval metamorphic --engine both --receipt metamorphic.json && crossval gate metamorphic.json
    """
    sides = SIDES[engine]
    request = run.Request(
        "metamorphic", model_path, candidate, reference, n_threads, template, receipt_path, as_json
    )
    if prompt is not None:
        run.check_text(prompt)
    if kernels and "candidate" not in sides:
        raise click.BadParameter("only the candidate has kernel families", param_hint="--kernels")
    options = Options(lengths, thread_counts, (kernels or _runnable()) if "candidate" in sides else ())
    with run.progress() as report:
        model = run.load_model(request, report)
        longest = model.config.context_length
        if options.n_tokens > longest:
            raise BadInputError(
                f"these lengths need {options.n_tokens} tokens, the model's context holds {longest}"
            )
        with Session(model, candidate, live_word(reference), n_threads) as session:
            with unavailable_receipt(session, request, sides):
                runners = open_sides(session, sides, recorded_cannot="be run in another way")
            text = None if prompt is None else run.render_prompt(request, prompt)
            ids = [] if text is None else list(runners[sides[0]].tokenize(text))[: options.n_tokens]
            tokens = enough_tokens(ids, model.config.vocab_size, options.n_tokens)
            results = tuple(
                run_metamorphic(
                    _Opener(session, side, runners[side]),
                    tokens,
                    n_layers=model.config.n_layers,
                    side=side,
                    options=options if side == "candidate" else replace(options, kernels=()),
                    progress=report,
                )
                for side in sides
            )
            facts = run.context(session, request, [Prompt(prompt, tokens, None)])
            found = MetamorphicFindings(options, results)
            made = build(METAMORPHIC, found, without_unused(facts, sides))
    run.finish(made, request)


class _Opener:
    """Gives the session's engine as it is, and the same engine opened anew with an option."""

    def __init__(self, session: Session, side: Side, runner: Runner) -> None:
        self.session, self.side, self.runner = session, side, runner

    def __call__(self, **option: Any) -> AbstractContextManager[Runner]:
        if not option:
            return nullcontext(self.runner)
        word, path = self.session.words[self.side == "reference"], self.session.model.path
        option = {"n_threads": self.session.n_threads, **option}
        if self.side == "reference":
            return open_reference(word, path, **option)
        return open_candidate(word, path, numerics=self.runner.identity.numerics, **option)
