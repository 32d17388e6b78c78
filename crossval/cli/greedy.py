"""``crossval greedy``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click

from crossval.audit.summary import audit_verdict
from crossval.cli import comparison as run
from crossval.cli.options import compare_options
from crossval.compare.greedy import compare_greedy, merge_greedy, name_near_ties
from crossval.compare.rows import GreedyResult
from crossval.diagnose import findings
from crossval.engines.session import Prompt, Session
from crossval.errors import BadInputError
from crossval.examine.greedy_audit import GreedyAudit, audit_prompt
from crossval.examine.greedy_receipt import GREEDY, GreedyExamined
from crossval.examine.resume import Resume
from crossval.model.weights import SpecWeights
from crossval.passes import Runner
from crossval.receipts.file import Receipt
from crossval.receipts.kind import RunFacts, build
from crossval.schema import parse_json

MAX_PROMPTS_BYTES = 16 << 20
MAX_RECEIPT_STEPS = 50_000
"""Of all prompts together: a step takes 1.0 to 1.3 kB of a receipt, which is read up to 64 MiB."""


@click.command("greedy")
@click.option("--prompt", metavar="TEXT", help="Text both engines continue.")
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Many prompts: one per line, or JSON lines (*.jsonl: strings, or objects with a `prompt`).",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 100_000),
    default=32,
    show_default=True,
    help="Tokens to generate per prompt.",
)
@click.option(
    "--journal",
    "journal_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append every finished prompt to this file; prompts that are already there are not run again.",
)
@click.option(
    "--no-audit",
    "audited",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Do not check the arithmetic: saves a run of each engine, and seconds to minutes of a large model, but "
    "leaves the verdict incomplete (exit 3) where tokens agree.",
)
@compare_options
def command(
    prompt: str | None,
    prompts_path: Path | None,
    steps: int,
    journal_path: Path | None,
    audited: bool,
    model_path: Path | None,
    reference: str,
    candidate: str,
    n_threads: int | None,
    template: str,
    receipt_path: Path | None,
    as_json: bool,
) -> None:
    """Generate greedily with two engines and compare token by token.

    Free-running (each engine follows its own choices) and teacher-forced (both read the reference's tokens);
    where tokens differ, says whether the logits agree within their bounds. Equal tokens alone are no parity:
    engines that state the same arithmetic must give the same logits bit for bit, and in the first prompt's pass
    and one decoded token every operation of both engines is recomputed from its own inputs, for which each engine
    runs again. With --journal, a run that was stopped goes on when the same command is given again.

    \b
    Example:
      crossval greedy --steps 32 --prompt "What is 2+2?"
      crossval greedy --steps 32 --prompts prompts.txt --journal run.jsonl --receipt r.json
    """
    if (prompt is None) == (prompts_path is None):
        raise click.UsageError("give either --prompt TEXT or --prompts FILE")
    texts = [prompt] if prompt is not None else read_prompts(Path(str(prompts_path)))
    request = run.Request("greedy", model_path, candidate, reference, n_threads, template, receipt_path, as_json)
    for text in texts:
        run.check_text(text)
    if (as_json or receipt_path is not None) and len(texts) * steps > MAX_RECEIPT_STEPS:
        raise BadInputError(
            f"{len(texts)} prompts of {steps} steps make a receipt too large to be read; "
            f"ask for {MAX_RECEIPT_STEPS} steps at most, or for no receipt"
        )
    with run.progress() as report:
        model = run.load_model(request, report)
        weights = SpecWeights(model.path) if audited else None  # before the run: it may be a model without audit
        with (
            Session(model, candidate, reference, n_threads) as session,
            Resume(journal_path, session, template, steps) as resume,
        ):
            with run.unavailable_receipt(session, request, n_steps=steps), _told(resume, len(texts)):
                compared = _compare_all(session, request, texts, steps, resume, report)
                result, found = compared.result, None
                if weights is not None:
                    found = audit_prompt(*compared.engines, result.prompts[0], weights, progress=report)
                    result = _with_audit(result, found)
            facts = run.context(session, request, compared.prompts, n_steps=steps)
            facts = replace(facts, compute=resume.compute(facts.compute))
            made = _receipt(request, result, facts, found)
    run.finish(made, request)


@dataclass(frozen=True)
class _Compared:
    """Every prompt's comparison; ``engines`` are the candidate and the reference of the first one."""

    result: GreedyResult
    prompts: list[Prompt]
    engines: tuple[Runner, Runner]


def _compare_all(
    session: Session, request: run.Request, texts: list[str], steps: int, resume: Resume, report: run.Report
) -> _Compared:
    """Compare every prompt, or take it from the journal."""
    results, encoded, engines = [], [], []
    for index, text in enumerate(texts):
        ours, theirs, one = run.open_prompt(session, request, text)
        encoded.append(one)
        engines.append((ours, theirs))
        found = resume.take(one, ours, theirs)
        if found is None:
            found = compare_greedy(
                ours,
                theirs,
                one.token_ids,
                steps,
                n_layers=session.model.config.n_layers,
                text=text,
                progress=_of_prompt(report, index, len(texts)),
            )
            resume.keep(found, ours, theirs)
        results.append(found)
    resume.finish()
    n_taken = None if resume.path is None else resume.n_taken
    return _Compared(replace(merge_greedy(results), from_journal=n_taken), encoded, engines[0])


def _with_audit(result: GreedyResult, found: GreedyAudit) -> GreedyResult:
    """Return the result as the audits let it be read: only right engines have near ties."""
    if all(audit_verdict(audit) == "clean" for audit in found.audits.values()):
        result = name_near_ties(result)
    if all(audit is None for audit in found.audits.values()):
        return result
    return replace(result, audited=found.passes)


def _receipt(request: run.Request, result: GreedyResult, facts: RunFacts, found: GreedyAudit | None) -> Receipt:
    if found is None:
        return build(GREEDY, GreedyExamined(result, {}), facts)
    n_decode = sum(one.kind == "decode" for one in found.passes)
    command_line = request.command(result.prompts[0].text, n_decode, False)
    diagnosis = [findings.to_json(one, command_line) for one in found.findings]
    facts = replace(facts, notes=[*facts.notes, *found.notes])
    return build(GREEDY, GreedyExamined(result, found.audits, diagnosis), facts)


def _of_prompt(report: run.Report, index: int, n_prompts: int) -> run.Report:
    """Return the callback for one of several prompts: the bar counts prompts, the words count tokens."""
    if n_prompts == 1:
        return report
    return lambda what, done, total: report(
        f"prompt {index + 1} of {n_prompts}, {what} {done}/{total}", index, n_prompts
    )


@contextmanager
def _told(resume: Resume, n_prompts: int) -> Iterator[None]:
    """When a run with a journal is interrupted, say what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if resume.path is not None:
            kept = f"{resume.n_done} of {n_prompts} prompts are in {resume.path}"
            click.echo(f"{kept}; the same command goes on from there", err=True)
        raise


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file; blank lines do not count.

    Raises:
        BadInputError: unreadable, not UTF-8, a JSON line without a prompt, or no prompt at all.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROMPTS_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise BadInputError(f"cannot read prompts {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path}: not UTF-8 at byte {error.start}") from error
    if len(data) > MAX_PROMPTS_BYTES:
        raise BadInputError(f"{path}: larger than {MAX_PROMPTS_BYTES} bytes")
    # str.splitlines would also cut at characters that belong inside a prompt (U+2028, form feed).
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        found = [_json_prompt(line, f"{path}:{number}") for number, line in lines]
    else:
        found = [line for _, line in lines]
    if not found:
        raise BadInputError(f"{path} holds no prompt")
    return found


def _json_prompt(line: str, where: str) -> str:
    value = parse_json(line.encode(), where)
    if isinstance(value, dict):
        value = value.get("prompt")
    if not isinstance(value, str) or not value:
        raise BadInputError(f'{where}: expected a string, or an object like {{"prompt": "text"}}')
    return value
