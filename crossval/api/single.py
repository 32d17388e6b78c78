"""Engines checked independently: answers, consistency, recording a trace; and the harness's
self-test."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bitnet_py._native import kernel_families
from crossval.api.request import Request, silent
from crossval.compare.layers import DEFAULT_N_DECODE
from crossval.engines import registry
from crossval.engines.model_file import ModelFile
from crossval.engines.record import record_trace, trace_model
from crossval.engines.session import Given, Prompt, Session, check_prompt, compute_of, encode
from crossval.engines.words import EngineWord
from crossval.errors import BadInputError, UsageError
from crossval.examine.layers_receipt import LAYERS
from crossval.model.taps import outline_taps
from crossval.passes import EngineIdentity, Runner, tokenizer_rules
from crossval.receipts.file import Receipt
from crossval.receipts.kind import RunFacts, build
from crossval.receipts.party import REFERENCE_NAME, Party
from crossval.repeat.metamorphic.cases import LENGTHS, THREAD_COUNTS, MetamorphicOptions
from crossval.repeat.metamorphic.receipt import METAMORPHIC, MetamorphicFindings
from crossval.repeat.metamorphic.relations import enough_tokens, run_metamorphic
from crossval.selftest import catalogue, trials
from crossval.selftest.receipt import SELFTEST
from crossval.smoke import ask
from crossval.smoke.answers import Answer, MinCorrect, SmokeResult
from crossval.smoke.receipt import SMOKE, tokenizers_agree
from crossval.smoke.suite import load_suite
from crossval.terms import Progress, Side
from crossval.traces.read import TraceInfo

Which = Literal["candidate", "reference", "both"]
ENGINES: dict[str, tuple[Side, ...]] = {
    "candidate": ("candidate",),
    "reference": ("reference",),
    "both": ("candidate", "reference"),
}
"""Value of ``--engine`` -> the sides that run."""
SMALL_MODEL_BYTES = 64 << 20
"""Model size up to which threads would wait for each other longer than they compute."""
SELFTEST_NOTE = (
    "bitnet_py is both engines, as the reference with its scalar kernels; a fault is in the model file that one "
    "of them reads (file-) or in its output (output-)"
)


def smoke_test(
    model: str | Path | None = None,
    *,
    suite: str = "fixed",
    engine: Which = "candidate",
    min_correct: MinCorrect = MinCorrect(),  # noqa: B008  # frozen
    max_tokens: int = 24,
    candidate: str = "bitnet_py",
    reference: str = "auto",
    n_threads: int | None = None,
    template: str = "raw",
    progress: Progress = silent,
) -> Receipt:
    """Ask engines the questions of a suite and classify their answers.

    ``suite``: ``fixed``, ``long``, ``everyday`` or a file of JSON lines. ``min_correct``: the
    fraction of correct answers at which an engine passes. ``max_tokens``: the longest answer.

    Raises:
        BadInputError, ModelError: an unusable suite, model or trace.
        UnavailableError, EngineCrashError: from the engines; a recorded trace cannot answer other
        prompts.
    """
    sides = ENGINES[engine]
    questions = load_suite(suite)
    request = Request(SMOKE, model, candidate, reference, n_threads, template, progress=progress)
    checked = request.load_model()
    checked.require_tokens("generate an answer")
    limits = ask.Limits(max_tokens, checked.config.context_length)
    live = registry.live_word(reference)
    with Session(checked, candidate, live, n_threads or _own_threads(checked)) as session:
        with request.unavailable(session, sides, n_steps=max_tokens):
            runners = _open_sides(session, sides, "answer other prompts")
        rules = tokenizer_rules({side: runner.identity.numerics for side, runner in runners.items()})
        decoder = ask.Decoder.of_model(checked.path, rules)
        given = [
            ask.answer_suite(
                runners[side], side, questions, decoder, limits, render=request.render, progress=progress
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
        first, agree = result.answers[0], tokenizers_agree(result)
        note = _tokenizer_note(result.answers) if agree is False else None
        prompt = Prompt(first.prompt.prompt, first.prompt_ids, agree, note)
        return build(SMOKE, result, request.facts(session, [prompt], sides, n_steps=max_tokens))


def _own_threads(model: ModelFile) -> int | None:
    return 1 if model.facts["size_bytes"] <= SMALL_MODEL_BYTES else None


def _tokenizer_note(answers: tuple[Answer, ...]) -> str | None:
    """Return a note on the first prompt on which two tokenizers disagree."""
    ids: dict[str, tuple[int, ...]] = {}
    for answer in answers:
        if ids.setdefault(answer.prompt.id, answer.prompt_ids) != answer.prompt_ids:
            return (
                f"the tokenizers disagree, first on prompt {answer.prompt.id!r}; each engine was fed its own ids"
            )
    return None


def metamorphic(
    model: str | Path | None = None,
    *,
    prompt: Given | None = None,
    engine: Which = "candidate",
    lengths: Sequence[int] = LENGTHS,
    thread_counts: Sequence[int] = THREAD_COUNTS,
    kernels: Sequence[str] | None = None,
    candidate: str = "bitnet_py",
    reference: str = "auto",
    n_threads: int | None = None,
    template: str = "raw",
    progress: Progress = silent,
) -> Receipt:
    """Check engines against themselves: the same work done in another way must give the same result.

    ``prompt``: what the checks start with, a text or token ids; None: arbitrary tokens.
    ``lengths``: prompt lengths in tokens. ``kernels``: kernel families of ``bitnet_py``; None: all
    that this CPU runs.

    Raises:
        UsageError: ``kernels`` without ``bitnet_py``.
        BadInputError, ModelError: an unusable prompt or model, or lengths that its context does not
        hold.
        UnavailableError, EngineCrashError: from the engines; a recorded trace cannot be run in
        another way.
    """
    sides = ENGINES[engine]
    if prompt is not None:
        check_prompt(prompt)
    asked: dict[Side, str] = {"candidate": candidate, "reference": reference}
    with_kernels = [side for side in sides if registry.row_of(registry.find_word(side, asked[side])).has_kernels]
    if kernels and not with_kernels:
        raise UsageError("--kernels: only bitnet_py has kernel families")
    runnable = tuple(family.name for family in kernel_families() if family.available)
    lengths, thread_counts = (tuple(dict.fromkeys(values)) for values in (lengths, thread_counts))
    options = MetamorphicOptions(lengths, thread_counts, (kernels or runnable) if with_kernels else ())
    request = Request(METAMORPHIC, model, candidate, reference, n_threads, template, progress=progress)
    checked = request.load_model()
    checked.require_tokens("check that passes of other lengths give the same")
    fed: Given = () if prompt is None else request.as_fed(prompt, checked)
    longest = checked.config.context_length
    if options.n_tokens > longest:
        raise BadInputError(f"these lengths need {options.n_tokens} tokens, the model's context holds {longest}")
    with Session(checked, candidate, registry.live_word(reference), n_threads) as session:
        with request.unavailable(session, sides):
            runners = _open_sides(session, sides, "be run in another way")
        ids = runners[sides[0]].tokenize(fed) if isinstance(fed, str) else list(fed)
        tokens = enough_tokens(ids[: options.n_tokens], checked.config.vocab_size, options.n_tokens)
        results = tuple(
            run_metamorphic(
                _Reopen(session, side, runners[side]),
                tokens,
                n_layers=checked.config.n_layers,
                architecture=checked.config.arch,
                input_norms=checked.input_norms,
                side=side,
                options=options if side in with_kernels else replace(options, kernels=()),
                progress=progress,
            )
            for side in sides
        )
        text = prompt if isinstance(prompt, str) else None
        facts = request.facts(session, [Prompt(text, tokens, None)], sides)
        return build(METAMORPHIC, MetamorphicFindings(options, results), facts)


@dataclass(frozen=True)
class _Reopen:
    """Gives the session's engine as it is, and another instance of it opened with an option."""

    session: Session
    side: Side
    runner: Runner

    def __call__(self, **option: Any) -> AbstractContextManager[Runner]:
        return self.session.reopen(self.side, **option) if option else nullcontext(self.runner)


def _open_sides(session: Session, sides: tuple[Side, ...], recorded_cannot: str) -> dict[Side, Runner]:
    """Return the requested engines, each able to run any prompt; ``recorded_cannot``: for messages.

    Raises:
        UnavailableError: bitnet.cpp is not built, or an engine is a recorded trace.
    """
    if "reference" in sides and session.words["reference"] == EngineWord("bitnet.cpp", "bitnet.cpp"):
        registry.require_bitnet_cpp(f"cannot {recorded_cannot}", ", or use --engine candidate")
    runners = session.open_sides(sides)
    for side, runner in runners.items():
        ask.require_any_prompt(runner, side, recorded_cannot)
    return runners


def record(
    prompt: Given,
    out_dir: str | Path,
    model: str | Path | None = None,
    *,
    engine: str = "bitnet.cpp",
    n_decode: int | None = None,
    outline: bool = False,
    template: str = "raw",
    n_threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> TraceInfo:
    """Record an engine's taps for one prompt as a trace in ``out_dir``, and return what ``trace.json`` holds.

    ``n_decode`` None: 4, of an embedding model 0. ``outline``: layer outputs and logits only. ``overwrite``:
    replace an earlier trace.

    Raises:
        BadInputError, ModelError: an unusable prompt, model or directory.
        UnavailableError, EngineCrashError: from the engine.
    """
    check_prompt(prompt)
    request = Request(LAYERS, model, template=template, progress=progress)
    checked = request.load_model()
    if n_decode is None:
        n_decode = DEFAULT_N_DECODE if checked.pooling is None else 0
    rendered = request.as_fed(prompt, checked)
    with registry.open_live(engine, checked.path, n_threads=n_threads) as runner:
        encoded = encode(runner, runner, prompt, rendered, checked.config.context_length, n_decode)
        select = outline_taps(checked.config.n_layers) if outline else None
        return record_trace(
            runner,
            trace_model(checked.path),
            out_dir,
            prompt_ids=encoded.token_ids,
            prompt_text=rendered if isinstance(rendered, str) else None,
            n_decode=n_decode,
            select_prefill=select,
            select_decode=select,
            n_decode_full=0 if outline else n_decode,
            notes=checked.notes,
            overwrite=overwrite,
            progress=progress,
        )


def self_test(model: str | Path | None = None, *, progress: Progress = silent) -> Receipt:
    """Inject known faults into the model file or the output of our engine, and check that each is found.

    Raises:
        BadInputError, ModelError: the model is unusable, or a fault cannot be injected into it.
    """
    checked = Request(SELFTEST, model, progress=progress).load_model()
    with trials.open_bench(checked) as opened:
        result = trials.run(opened, progress=progress)
        engine = opened.healthy["candidate"]
        facts = RunFacts(
            model=checked.facts,
            tokenizer={**checked.tokenizer, "engines_agree": None},
            text=None,
            template=None,
            token_ids=opened.prompt_ids,
            candidate=Party("live", engine.identity),
            reference=Party("unused", EngineIdentity(REFERENCE_NAME)),
            compute=compute_of(engine),
            settings={"candidate": "bitnet_py", "n_decode": catalogue.N_DECODE},
            notes=[*checked.notes, SELFTEST_NOTE],
        )
        return build(SELFTEST, result, facts)
