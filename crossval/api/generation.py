"""Two engines compared token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from crossval.api.request import Request, Say, silent
from crossval.compare.greedy import compare_greedy, merge_greedy, name_near_ties
from crossval.compare.rows import GreedyResult
from crossval.diagnose import findings
from crossval.engines.session import Given, Prompt, Session, check_prompt
from crossval.errors import BadInputError
from crossval.examine.greedy_audit import GreedyAudit, audit_differing, audit_prompt
from crossval.examine.greedy_receipt import GREEDY, GreedyExamined
from crossval.examine.greedy_verdict import PromptAudit, joint
from crossval.examine.resume import Resume
from crossval.files import read_limited
from crossval.model.weights import SpecWeights
from crossval.passes import Runner, n_after
from crossval.receipts.file import Receipt
from crossval.receipts.kind import build
from crossval.schema import parse_json
from crossval.terms import Progress

MAX_PROMPTS_BYTES = 16 << 20
MAX_PROMPTS = 100_000


def greedy(
    prompts: str | Sequence[Given],
    model: str | Path | None = None,
    *,
    candidate: str = "bitnet_py",
    reference: str = "auto",
    n_threads: int | None = None,
    template: str = "raw",
    n_steps: int = 32,
    journal: str | Path | None = None,
    audit: bool = True,
    follow_reference_graph: bool = False,
    tap_map: str | Path | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> Receipt:
    """Generate ``n_steps`` tokens greedily with two engines per prompt and compare them, free-running and forced.

    ``prompts``: texts, or token ids, which are fed as they are. ``journal``: a file to which every
    finished prompt is appended; prompts that it holds are not run again. ``audit``: recompute every
    operation of both engines in the first prompt's pass and one decoded token (beside the
    specification in every prompt with other tokens, as far as these go); without it, equal
    tokens leave the verdict ``incomplete``. ``follow_reference_graph``: our engine computes what
    the other engine's generation does, even where that is not the model. ``tap_map``: what the
    engines of traces call their tensors, as in ``compare_engines``.

    Raises:
        BadInputError, ModelError: an unusable prompt, model, tap map, trace or journal.
        UnavailableError, EngineCrashError: from the engines.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise BadInputError("no prompt; comparing nothing is not a comparison")
    if len(texts) > MAX_PROMPTS:
        raise BadInputError(f"{len(texts)} prompts; a receipt holds {MAX_PROMPTS}")
    for text in texts:
        check_prompt(text)
    request = Request(
        GREEDY, model, candidate, reference, n_threads, template, progress=progress, say=say,
        follow_reference_graph=follow_reference_graph, tap_map=tap_map,
    )  # fmt: skip
    checked = request.load_model()
    checked.require_tokens("generate tokens")
    weights = SpecWeights(checked.path) if audit else None  # before the run: the model may have no specification
    with (
        request.session(checked, as_run=True) as session,
        Resume(None if journal is None else Path(journal), session, template, n_steps) as resume,
        request.unavailable(session, n_steps=n_steps),
        _told(request, resume, len(texts)),
    ):
        result, encoded, engines = _compare_all(request, session, resume, texts, n_steps)
        found = None
        if weights is not None:
            if follow_reference_graph:
                weights = weights.following(engines[0][1].identity.numerics.generation)
            found = audit_prompt(*engines[0], result.prompts[0], weights, progress=progress)
        parties = tuple(one.identity.name for one in engines[0])
        facts = request.facts(session, encoded, n_steps=n_steps)
        facts = replace(facts, compute=resume.compute(facts.compute))
        if found is None or weights is None:
            return build(GREEDY, GreedyExamined(result, {}, parties=parties), facts)
        told = _told_of(request, 0, encoded, found)
        notes, further = list(found.notes), []
        for index, later in audit_differing(engines, result, weights, found, progress=progress):
            further.append(_told_of(request, index, encoded, later))
            notes += later.notes
        result = _with_audits(result, told, further)
        examined = GreedyExamined(result, told.audits, told.diagnoses, parties, tuple(further))
        return build(GREEDY, examined, replace(facts, notes=[*facts.notes, *notes]))


def _told_of(request: Request, index: int, encoded: Sequence[Prompt], found: GreedyAudit) -> PromptAudit:
    """Return the audits of a prompt as a receipt holds them."""
    command = request.command(encoded[index], n_after(found.passes, len(encoded[index].token_ids)))
    diagnoses = [findings.to_json(one, command) for one in found.findings]
    return PromptAudit(index, found.passes, found.audits, diagnoses)


def _compare_all(
    request: Request, session: Session, resume: Resume, texts: Sequence[Given], n_steps: int
) -> tuple[GreedyResult, list[Prompt], list[tuple[Runner, Runner]]]:
    """Compare every prompt, or take it from the journal; also return the engines of each."""
    results, encoded, engines = [], [], []
    for index, text in enumerate(texts):
        ours, theirs, one = request.open_prompt(session, text, n_steps - 1)
        encoded.append(one)
        engines.append((ours, theirs))
        found = resume.take(one, ours, theirs)
        if found is None:
            found = compare_greedy(
                ours,
                theirs,
                one.token_ids,
                n_steps,
                n_layers=session.model.config.n_layers,
                text=one.text,
                progress=of_prompt(request.progress, index, len(texts)),
            )
            resume.keep(found, ours, theirs)
        results.append(found)
    resume.finish()
    n_taken = None if resume.path is None else resume.n_taken
    return replace(merge_greedy(results), from_journal=n_taken), encoded, engines


def _with_audits(result: GreedyResult, first: PromptAudit, further: Sequence[PromptAudit]) -> GreedyResult:
    """Return the result in the light of the audits: only correct engines have near ties."""
    if set(joint(first.audits, further).values()) == {"clean"}:
        result = name_near_ties(result)
    if all(audit is None for audit in first.audits.values()):
        return result
    return replace(result, audited=first.passes)


def of_prompt(report: Progress, index: int, n_prompts: int) -> Progress:
    """Return the callback for one of several prompts: the bar counts prompts, the words count tokens."""
    if n_prompts == 1:
        return report
    return lambda what, done, total: report(
        f"prompt {index + 1} of {n_prompts}, {what} {done}/{total}", index, n_prompts
    )


@contextmanager
def _told(request: Request, resume: Resume, n_prompts: int) -> Iterator[None]:
    """When a run with a journal is interrupted, report what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if resume.path is not None:
            kept = f"{resume.n_done} of {n_prompts} prompts are in {resume.path}"
            request.say(f"{kept}; rerun the same command to resume")
        raise


def read_prompts(path: str | Path) -> list[Given]:
    """Return the prompts in a file: one per line, or JSON lines (``.jsonl``); lines of whitespace are skipped.

    A JSON line is a string, or an object with a ``prompt``, or with ``tokens``, a list of token ids.

    Raises:
        BadInputError: unreadable, not UTF-8, a JSON line without a prompt, or no prompts.
    """
    path = Path(path)
    try:
        text = read_limited(path, "prompts", MAX_PROMPTS_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path}: not UTF-8 at byte {error.start}") from error
    # str.splitlines would also cut at characters that belong inside a prompt (U+2028, form feed).
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        found: list[Given] = [_json_prompt(line, f"{path}:{number}") for number, line in lines]
    else:
        found = [line for _, line in lines]
    if not found:
        raise BadInputError(f"{path} has no prompts")
    return found


def _json_prompt(line: str, where: str) -> Given:
    value = parse_json(line.encode(), where)
    if isinstance(value, dict):
        value = value.get("tokens") if "prompt" not in value else value["prompt"]
        if isinstance(value, list) and value and all(type(one) is int and one >= 0 for one in value):
            return tuple(value)
    if not isinstance(value, str) or not value:
        raise BadInputError(
            f'{where}: expected a string, or an object like {{"prompt": "text"}} or {{"tokens": [1]}}'
        )
    return value
