"""What the comparing commands share: check the model, open the engines, emit the receipt, exit."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bitnet_py.template import get_template
from crossval.cli import views
from crossval.cli.app import EXIT_OF_VERDICT
from crossval.cli.options import model_or_default
from crossval.diagnose import findings, repro
from crossval.diagnose.findings import Finding
from crossval.engines.session import Prompt, Session, encode
from crossval.errors import BadInputError, UnavailableError
from crossval.examine.examination import examine as examine_engines
from crossval.model.file import ModelFile, check_model, missing_tokens
from crossval.passes import Runner
from crossval.receipts import evidence
from crossval.receipts import file as receipt
from crossval.receipts.evidence import Context, Kind
from crossval.reports import render
from crossval.terms import SIDES

Report = Callable[[str, int, int], None]
ENVIRONMENT = ("BITNET_KERNEL", "BITNET_LIBRARY", "BITNET_CPP_LIB")
MAX_PROMPT_NOTES = 5
REPRO_DIR = "repro"
"""Where the command in a diagnosis writes its reproducer."""


@dataclass(frozen=True)
class Request:
    """The options every comparison has."""

    kind: Kind
    model_path: Path | None
    candidate: str
    reference: str
    n_threads: int | None
    template: str | None
    receipt_path: Path | None
    as_json: bool
    repro_dir: Path | None = None
    floors: bool = False
    causal: bool = False

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the receipt's ``settings``; engines given as directories are named without their path."""
        words = {"candidate": _plain_word(self.candidate), "reference": _plain_word(self.reference)}
        return {"n_threads": self.n_threads, **words, "floors": self.floors, "causal": self.causal, **more}

    def command(self, text: str | None, n_decode: int, full: bool) -> str:
        """Return the command line that writes the reproducer of this comparison's finding; files without paths."""
        model = model_or_default(self.model_path).name
        given: list[str] = []
        if self.kind == "diff":
            words = ["diff", _plain_word(self.candidate), _plain_word(self.reference)]
        else:
            words = ["layers", "--prompt", text or ""]
            given += ["--candidate", _plain_word(self.candidate), "--reference", _plain_word(self.reference)]
            given += [] if self.template in (None, "raw") else ["--template", str(self.template)]
            given += [] if self.n_threads is None else ["--threads", str(self.n_threads)]
        given += ["--decode", str(n_decode), *(["--full"] if full else []), "--repro", REPRO_DIR]
        return shlex.join([*_environment(), "crossval", *words, "--model", model, *given])


def _environment() -> list[str]:
    """Return the variables that choose libraries and kernels, as words before a command; files without paths."""
    held = ((name, os.environ.get(name, "")) for name in ENVIRONMENT)
    return [f"{name}={Path(value).name}" for name, value in held if value]


def _plain_word(word: str) -> str:
    return Path(word).name if Path(word).is_dir() else word


def load_model(request: Request, report: Report) -> ModelFile:
    """Check the model and the template's tokens.

    Raises:
        ModelError: the model is unusable.
        BadInputError: the model lacks a special token of the template.
    """
    path = model_or_default(request.model_path)
    report("checking the model", 0, 1)
    model = check_model(path)
    report("checking the model", 1, 1)
    if request.template is not None:
        missing = missing_tokens(path, get_template(request.template).special_tokens)
        if missing:
            raise BadInputError(
                f"{path.name} has no token {missing[0]!r}, which template {request.template} needs"
            )
    return model


def open_prompt(session: Session, request: Request, text: str) -> tuple[Runner, Runner, Prompt]:
    """Open both engines for a prompt and tokenize it.

    Raises:
        BadInputError: the prompt is empty, not Unicode, or too long.
        UnavailableError, EngineCrashError: from the engines.
    """
    check_text(text)
    rendered = render_prompt(request, text)
    candidate, reference = session.open(rendered)
    prompt = encode(candidate, reference, text, rendered, session.model.config.context_length)
    return candidate, reference, prompt


def compare_prompt(
    request: Request, text: str, *, n_decode: int | None, full: bool = False, plain_words: bool = False
) -> NoReturn:
    """Run one prompt through both engines, examine what they computed, show it, and exit.

    Raises:
        CrossvalError: bad input, an engine that is missing or crashed, a repro that cannot be written.
    """
    views.check_words(request)
    check_text(text)
    with progress() as report:
        model = load_model(request, report)
        with (
            Session(model, request.candidate, request.reference, request.n_threads) as session,
            unavailable_receipt(session, request, full=full, n_decode=n_decode),
        ):
            ours, theirs, prompt = open_prompt(session, request, text)
            made = examine(session, request, (ours, theirs), prompt, report, n_decode=n_decode, full=full)
    finish(made, request, plain_words=plain_words)


def render_prompt(request: Request, text: str) -> str:
    """Return the prompt as it is tokenized: put into the chat template."""
    return get_template(request.template or "raw").render(text)


def check_text(text: str) -> None:
    """Refuse an empty prompt and bytes that are not UTF-8.

    Raises:
        BadInputError: either of them.
    """
    if not text:
        raise BadInputError("the prompt is empty; give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"the prompt is not valid UTF-8 at character {error.start}") from error


def context(session: Session, request: Request, prompts: list[Prompt], **settings: Any) -> Context:
    """Return everything the receipt says beside the results, after the run."""
    return Context(
        model=session.model.facts,
        tokenizer={**session.model.tokenizer, "engines_agree": _agree(prompts)},
        text=prompts[0].text if prompts else None,
        template=request.template,
        token_ids=prompts[0].token_ids if prompts else (),
        candidate=session.candidate,
        reference=session.reference,
        compute=session.compute(),
        settings=request.settings(**settings),
        notes=[*session.model.notes, *_prompt_notes(prompts)],
    )


def examine(
    session: Session,
    request: Request,
    engines: tuple[Runner, Runner],
    prompt: Prompt,
    report: Report,
    *,
    n_decode: int | None,
    full: bool,
) -> receipt.Receipt:
    """Compare and audit candidate and reference, write the reproducer asked for, and return the receipt.

    Raises:
        BadInputError, UnavailableError, EngineCrashError: from traces and engines.
        BadInputError: the reproducer cannot be written.
    """
    if request.repro_dir is not None:
        repro.check_writable(request.repro_dir)
    views.check_reference(request, engines[1], prompt)
    model = session.model
    found = examine_engines(
        *engines,
        prompt.token_ids,
        model.path,
        n_decode=n_decode,
        full=full,
        progress=report,
    )
    done = sum(plan.kind == "decode" for plan in found.result.plan)
    facts = context(session, request, [prompt], full=full, n_decode=done)
    command = request.command(prompt.text, done, full)
    diagnosis = [findings.to_json(one, command) for one in found.findings]
    if request.repro_dir is not None:
        _write_reproducers(found.findings, engines, request.repro_dir)
    seen, notes = views.make(request, session, found.captures, prompt, found.result, report)
    facts = replace(facts, notes=[*facts.notes, *notes])
    return evidence.build(request.kind, found.result, facts, found.audits_json(), diagnosis, seen)


def _write_reproducers(found: Sequence[Finding], engines: tuple[Runner, Runner], directory: Path) -> None:
    """Write a reproducer of each finding and say on stderr where it is, or why there is none."""
    names = dict(zip(SIDES, (engine.identity.name for engine in engines), strict=True))
    if not found:
        click.echo("no reproducer: no operation is guilty", err=True)
    for number, one in enumerate(found):
        why = repro.why_not(one)
        if why is not None:
            click.echo(f"no reproducer of the {one.side}: {why}", err=True)
            continue
        folder = directory / one.side if number else directory
        click.echo(f"reproducer of the {one.side}: {repro.write(one, names[one.side], folder)}", err=True)


def _prompt_notes(prompts: list[Prompt]) -> list[str]:
    notes = [prompt.note for prompt in prompts if prompt.note]
    more = len(notes) - MAX_PROMPT_NOTES
    return notes if more <= 0 else [*notes[:MAX_PROMPT_NOTES], f"the same of {more} more prompts"]


def _agree(prompts: list[Prompt]) -> bool | None:
    answers = [prompt.tokenizers_agree for prompt in prompts]
    if False in answers:
        return False
    return None if not answers or None in answers else True


@contextmanager
def unavailable_receipt(session: Session, request: Request, **settings: Any) -> Iterator[None]:
    """Leave a receipt that says so when the reference cannot be had, then let the error go on."""
    try:
        yield
    except UnavailableError as error:
        if request.as_json or request.receipt_path is not None:
            facts = Context(
                model=session.model.facts,
                tokenizer={**session.model.tokenizer, "engines_agree": None},
                text=None,
                template=request.template,
                token_ids=(),
                candidate=session.candidate,
                reference=session.unavailable(str(error)),
                compute=session.compute(),
                settings=request.settings(**settings),
                notes=list(session.model.notes),
            )
            publish(evidence.build_unavailable(request.kind, facts), request)
        raise


def publish(made: receipt.Receipt, request: Request) -> None:
    """Write the receipt where it was asked for, and to stdout in JSON mode."""
    if request.receipt_path is not None:
        receipt.write(request.receipt_path, made)
    if request.as_json:
        write_json(receipt.to_text(made))


def write_json(text: str) -> None:
    """Write to stdout as UTF-8, whatever the locale says."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()


def finish(made: receipt.Receipt, request: Request, *, plain_words: bool = False) -> NoReturn:
    """Publish the receipt, show the tables (or the finding in plain words), and exit by the verdict."""
    publish(made, request)
    if not request.as_json:
        console = render.console()
        show = render.show_triage if plain_words else render.show_receipt
        show(console, made)
        if request.receipt_path is not None:
            render.show_path(console, "receipt", request.receipt_path)
    raise click.exceptions.Exit(EXIT_OF_VERDICT[made["verdict"]] or views.exit_code(made))


@contextmanager
def progress() -> Iterator[Report]:
    """Yield a progress callback (what, done, total): a bar on a terminal's stderr, silence anywhere else."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        task = bars.add_task("", total=1)
        yield lambda what, done, total: bars.update(
            task, description=render.plain(what), completed=done, total=total
        )
