"""Two engines compared and audited tap by tap."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crossval.api import views
from crossval.api.request import Request, Say, silent
from crossval.diagnose import findings, repro
from crossval.diagnose.findings import Finding
from crossval.engines.model_file import ModelFile
from crossval.engines.recorded import RecordedRunner
from crossval.engines.session import Given, Prompt, Session, check_prompt
from crossval.errors import BadInputError
from crossval.examine.examination import examine
from crossval.examine.layers_receipt import DIFF, LAYERS, DefaultRun, Examined, has_default_run
from crossval.passes import Runner, n_after
from crossval.receipts.file import Receipt
from crossval.receipts.kind import build
from crossval.receipts.party import REFERENCE_NAME
from crossval.terms import SIDES, Progress

NO_DEFAULT_RUN = (
    "captured without flash attention, which this engine has on by default; the default run was not "
    "checked, because a trace cannot be run again"
)
Engines = tuple[Runner, Runner]
"""Candidate and reference, both entered."""


def compare_engines(
    prompt: Given,
    model: str | Path | None = None,
    *,
    candidate: str = "bitnet_py",
    reference: str = "auto",
    n_threads: int | None = None,
    template: str = "raw",
    n_decode: int | None = None,
    full: bool = False,
    floors: bool = False,
    causal: bool = False,
    repro_dir: str | Path | None = None,
    follow_reference_graph: bool = False,
    tap_map: str | Path | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> Receipt:
    """Run a prompt through two engines, compare and audit them tap by tap, and diagnose what is wrong.

    ``prompt``: a text, or token ids, which are fed as they are. ``n_decode``: tokens decoded after
    it; None: 4, or fewer where a trace holds fewer.
    ``full``: compare every operation of every layer. ``floors`` and ``causal``: measure both as
    well (docs/numerics.md). ``repro_dir``: write a reproducer of each finding there.
    ``follow_reference_graph``: our engine computes what the other engine's generation does, even
    where that is not the model. ``tap_map``: what the engines of traces call their tensors, a file or
    the name of a shipped map (docs/tap-maps.md).

    Raises:
        UsageError: ``floors`` with a reference or a prompt that cannot run in another way.
        BadInputError, ModelError: unusable prompt, model, trace or directory.
        UnavailableError, EngineCrashError: from the engines.
    """
    request = Request(
        LAYERS, model, candidate, reference, n_threads, template, n_decode, full, floors, causal, repro_dir,
        progress, say, follow_reference_graph, tap_map,
    )  # fmt: skip
    views.check_words(request)
    check_prompt(prompt)
    checked = request.load_model()
    if floors:
        checked.require_tokens("be fed token by token to measure floors")
    with request.session(checked) as session, request.unavailable(session, full=full, n_decode=n_decode):
        ours, theirs, encoded = request.open_prompt(session, prompt, n_decode or 0)
        return _examined(request, session, (ours, theirs), encoded)


def compare_traces(
    candidate: str | Path,
    reference: str | Path,
    model: str | Path | None = None,
    *,
    n_decode: int | None = None,
    full: bool = False,
    causal: bool = False,
    repro_dir: str | Path | None = None,
    tap_map: str | Path | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> Receipt:
    """Compare and audit two traces of one model over the same tokens; no engine is needed.

    ``n_decode``: decoded tokens to compare; None: all that the shorter trace holds. The rest as in
    ``compare_engines``.

    Raises:
        BadInputError, ModelError: an unusable model, trace or directory, or traces of different
        prompts.
    """
    for path in (candidate, reference):
        if not Path(path).is_dir():
            raise BadInputError(f"{path} is not a directory with a trace")
    ours, theirs = map(_as_path, (candidate, reference))
    request = Request(
        DIFF, model, ours, theirs, n_decode=n_decode, full=full, causal=causal, repro_dir=repro_dir,
        progress=progress, say=say, tap_map=tap_map,
    )  # fmt: skip
    with request.session(request.load_model()) as session:
        engines = session.open()
        if n_decode is None:
            request = replace(request, n_decode=min(map(_n_decode, engines)))
        return _examined(request, session, engines, _shared_prompt(*engines))


def _as_path(trace: str | Path) -> str:
    """Return a trace's path as it was given, and so that it is no engine's word."""
    return os.path.join(*([] if os.path.isabs(trace) else [os.curdir]), os.path.normpath(trace))


def audit_trace(
    trace: str | Path,
    model: str | Path | None = None,
    *,
    n_decode: int | None = None,
    full: bool = False,
    tap_map: str | Path | None = None,
    progress: Progress = silent,
) -> Receipt:
    """Check every operation of one trace against the specification; no other engine is needed.

    The receipt is that of ``compare_engines`` with the trace as the candidate and the specification as
    the reference. ``tap_map``: as there.

    Raises:
        BadInputError, ModelError: an unusable model or trace.
    """
    if not Path(trace).is_dir():
        raise BadInputError(f"{trace} is not a directory with a trace")
    request = Request(
        LAYERS, model, _as_path(trace), "spec", n_decode=n_decode, full=full, progress=progress,
        tap_map=tap_map,
    )  # fmt: skip
    with request.session(request.load_model()) as session:
        ours, theirs = session.open()
        return _examined(request, session, (ours, theirs), _prompt_of(ours))


def _examined(request: Request, session: Session, engines: Engines, prompt: Prompt) -> Receipt:
    """Compare and audit candidate and reference, write the requested reproducers, and return the receipt.

    Raises:
        BadInputError, UnavailableError, EngineCrashError: from traces and engines.
        BadInputError: the reproducer cannot be written.
    """
    if request.repro_dir is not None:
        repro.check_writable(Path(request.repro_dir))
    views.check_reference(request, engines[1], prompt)
    model = session.model
    found = examine(
        *engines,
        prompt.token_ids,
        model.path,
        n_decode=request.n_decode,
        full=request.full,
        progress=request.progress,
        follow_reference_graph=request.follow_reference_graph,
    )
    found_plan = found.result.plan
    n_decoded = n_after(found_plan, len(prompt.token_ids))
    facts = request.facts(session, [prompt], full=request.full, n_decode=n_decoded)
    command = request.command(prompt, n_decoded)
    diagnosis = [findings.to_json(one, command) for one in found.findings]
    _write_reproducers(request, found.findings, engines)
    seen, notes = views.make(request, session, found.captures, prompt, found.result)
    examined = Examined(found.result, found.audits_json(), diagnosis, seen)
    del found  # its tensors
    default_run = None
    if request.kind is LAYERS and any(has_default_run(one.identity.numerics.to_json()) for one in engines):
        if all(one.status == "live" for one in engines):
            default_run = _default_run(request, model, prompt, n_decoded)
        else:
            notes.append(NO_DEFAULT_RUN)
    facts = replace(facts, notes=[*facts.notes, *_lengths_note(engines, len(found_plan)), *notes])
    return build(request.kind, replace(examined, default_run=default_run), facts)


def _default_run(request: Request, model: ModelFile, prompt: Prompt, n_decode: int) -> DefaultRun:
    """Compare and audit both engines as people run them, with flash attention, over the same prompt.

    Raises:
        UnavailableError, EngineCrashError: from the engines.
    """
    with request.session(model, as_run=True) as session:
        engines = session.open(prompt.text or prompt.token_ids)
        found = examine(
            *engines,
            prompt.token_ids,
            model.path,
            n_decode=n_decode,
            full=request.full,
            progress=request.progress,
            follow_reference_graph=request.follow_reference_graph,
        )
        numerics = {side: engine.identity.numerics.to_json() for side, engine in zip(SIDES, engines, strict=True)}
        command = request.command(prompt, n_decode)
        diagnosis = [findings.to_json(one, command) for one in found.findings]
        is_bitnet_cpp = engines[-1].identity.name == REFERENCE_NAME
        return DefaultRun(numerics, Examined(found.result, found.audits_json(), diagnosis), is_bitnet_cpp)


def _write_reproducers(request: Request, found: Sequence[Finding], engines: Engines) -> None:
    """Write a reproducer of each finding and report where it is, or why there is none."""
    if request.repro_dir is None:
        return
    if not found:
        request.say("no reproducer: no operation is wrong")
    names = dict(zip(SIDES, (engine.identity.name for engine in engines), strict=True))
    for number, one in enumerate(found):
        why = repro.why_not(one)
        if why is not None:
            request.say(f"no reproducer of the {one.side}: {why}")
            continue
        folder = Path(request.repro_dir, one.side) if number else Path(request.repro_dir)
        request.say(f"reproducer of the {one.side}: {repro.write(one, names[one.side], folder)}")


def _prompt_of(trace: Runner) -> Prompt:
    """Return the prompt that was recorded."""
    assert isinstance(trace, RecordedRunner)
    return Prompt(trace.info.prompt_text, trace.info.prompt_ids, None)


def _shared_prompt(ours: Runner, theirs: Runner) -> Prompt:
    """Return the prompt of the second trace, which the first must share.

    Raises:
        BadInputError: it does not.
    """
    first, second = _prompt_of(ours), _prompt_of(theirs)
    if first.token_ids != second.token_ids:
        places = [runner.trace.directory for runner in (ours, theirs) if isinstance(runner, RecordedRunner)]
        pairs = zip(first.token_ids, second.token_ids, strict=False)
        n_same = next(
            (at for at, (a, b) in enumerate(pairs) if a != b), min(map(len, (first.token_ids, second.token_ids)))
        )
        raise BadInputError(
            f"the traces were recorded with different prompts, which differ from token {n_same} on: "
            f"{_from(first, n_same)} in {places[0]}, {_from(second, n_same)} in {places[1]}"
        )
    return second


def _lengths_note(engines: Engines, n_compared: int) -> list[str]:
    """Return a note where two traces do not hold the same number of passes."""
    held = [len(engine.plan) for engine in engines if engine.plan is not None]
    if len(held) < 2 or held[0] == held[1]:
        return []
    return [
        f"the candidate's trace holds {held[0]} passes and the reference's {held[1]}: the first {n_compared} were "
        "compared, and nothing is shown about the others"
    ]


def _from(prompt: Prompt, at: int) -> str:
    ids = prompt.token_ids
    return f"{list(ids[at : at + 8])} of {len(ids)} tokens"


def _n_decode(runner: Runner) -> int:
    return n_after(runner.plan or (), len(_prompt_of(runner).token_ids))
