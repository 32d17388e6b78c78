"""``crossval smoke``."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import click

from crossval.cli import comparison as run
from crossval.cli.engines import SIDES, engine_option, live_word, open_sides, unavailable_receipt, without_unused
from crossval.cli.options import compare_options
from crossval.engines.session import Prompt, Session
from crossval.model.file import ModelFile
from crossval.receipts.kind import RunFacts, build
from crossval.smoke import ask as smoke
from crossval.smoke import receipt as smoke_receipt
from crossval.smoke import suite
from crossval.smoke.answers import Answer, MinCorrect, SmokeResult

SMALL_MODEL_BYTES = 64 << 20


def _read_share(ctx: click.Context, param: click.Parameter, value: str) -> MinCorrect:
    """Return the share in ``7/10`` or ``0.7``; none and more than all are no shares."""
    whole = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", value)
    share = None
    if whole is not None:
        share = MinCorrect(int(whole[1]), int(whole[2]))
    elif re.fullmatch(r"[01]?\.[0-9]{1,6}|1", value):
        share = MinCorrect(*Fraction(value).as_integer_ratio())
    if share is None or not 0 < share.correct <= share.of:
        raise click.BadParameter(f"{value!r} is neither N/M nor a fraction above 0 and up to 1, as 7/10 or 0.7")
    return share


@click.command("smoke")
@click.option(
    "--suite",
    "suite_word",
    default="fixed",
    show_default=True,
    metavar="fixed|long|everyday|FILE",
    help="Ten questions or 500 for the shipped model, everyday questions for others, or JSON lines of your own.",
)
@engine_option("Who is asked; with both, their texts are also held against each other.")
@click.option(
    "--min-correct",
    callback=_read_share,
    default="7/10",
    show_default=True,
    metavar="N/M",
    help="Least share of correct answers of each engine, as 7/10 or 0.7.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 100_000),
    default=24,
    show_default=True,
    metavar="N",
    help="Longest answer, in tokens.",
)
@compare_options
def command(
    suite_word: str,
    engine: str,
    min_correct: MinCorrect,
    max_tokens: int,
    model_path: Path | None,
    reference: str,
    candidate: str,
    n_threads: int | None,
    template: str,
    receipt_path: Path | None,
    as_json: bool,
) -> None:
    """Ask the model questions and count correct, coherent and garbled answers.

    Shows in seconds whether an engine still makes sense; where it goes wrong is for `crossval layers` to say.
    Exit 0 when every engine asked answers enough questions correctly, 1 when one does not.

    \b
    Example:
      crossval smoke
      crossval smoke --suite long --engine both --min-correct 0.95 --receipt smoke.json
    """
    sides = SIDES[engine]
    request = run.Request("smoke", model_path, candidate, reference, n_threads, template, receipt_path, as_json)
    questions = suite.load_suite(suite_word)
    with run.progress() as report:
        model = run.load_model(request, report)
        decoder = smoke.Decoder.of_model(model.path)
        limits = smoke.Limits(max_tokens, model.config.context_length)
        words = (candidate, live_word(reference))
        with Session(model, *words, n_threads or _own_threads(model)) as session:
            with unavailable_receipt(session, request, sides, n_steps=max_tokens):
                runners = open_sides(session, sides)
            given = [
                smoke.answer_suite(
                    runners[side],
                    side,
                    questions,
                    decoder,
                    limits,
                    render=lambda text: run.render_prompt(request, text),
                    progress=report,
                )
                for side in sides
            ]
            result = SmokeResult(
                suite=questions.name,
                suite_digest=questions.digest,
                n_prompts=len(questions.prompts),
                sides=sides,
                answers=tuple(answer for row in zip(*given, strict=True) for answer in row),
                min_correct=min_correct,
                stop_ids=tuple(sorted(decoder.stop_ids)),
                special_ids=tuple(sorted(decoder.special_ids)),
            )
            made = build(smoke_receipt.SMOKE, result, _context(session, request, result, max_tokens))
    run.finish(made, request)


def _own_threads(model: ModelFile) -> int | None:
    """Return 1 for a small model: its threads would wait for each other longer than they compute."""
    return 1 if model.facts["size_bytes"] <= SMALL_MODEL_BYTES else None


def _context(session: Session, request: run.Request, result: SmokeResult, max_tokens: int) -> RunFacts:
    first = result.answers[0]
    agree = smoke_receipt.tokenizers_agree(result)
    prompt = Prompt(first.prompt.prompt, first.prompt_ids, agree, _tokenizer_note(result.answers, agree))
    facts = run.context(session, request, [prompt], n_steps=max_tokens)
    return without_unused(facts, result.sides)


def _tokenizer_note(answers: tuple[Answer, ...], agree: bool | None) -> str | None:
    if agree is not False:
        return None
    ids: dict[str, tuple[int, ...]] = {}
    for answer in answers:
        if ids.setdefault(answer.prompt.id, answer.prompt_ids) != answer.prompt_ids:
            return (
                f"the tokenizers disagree, first on prompt {answer.prompt.id!r}; each engine was fed its own ids"
            )
    return None
