"""Two engines scored on a text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from bitnet_py import score as scoring
from bitnet_py.gguf import GGUFFile
from bitnet_py.tokenizer import Tokenizer
from crossval.api.request import Request, Say, silent
from crossval.engines.registry import live_word
from crossval.engines.session import Prompt
from crossval.engines.words import TRACE
from crossval.errors import BadInputError, UsageError
from crossval.passes import Runner, tokenizer_rules
from crossval.receipts.file import Receipt
from crossval.receipts.kind import build
from crossval.score.receipt import SCORE
from crossval.score.run import ScoreResult, Text, compare_scores
from crossval.terms import SIDES, Progress, Side


def score_text(
    text: str | bytes,
    model: str | Path | None = None,
    *,
    candidate: str = "bitnet_py",
    reference: str = "bitnet.cpp",
    n_context: int | None = None,
    n_threads: int | None = None,
    follow_reference_graph: bool = False,
    progress: Progress = silent,
    say: Say = silent,
) -> Receipt:
    """Score a text with two engines, and compare the logits that predict every token bit by bit.

    The text is read as plain text and cut into windows by the rule of ``bitnet_py.score``. Both
    engines are fed the reference's tokens, one per pass. ``n_context``: tokens of a window, by
    default as many as both engines hold. ``follow_reference_graph``: our engine computes what the
    other engine's generation does, even where that is not the model.

    Raises:
        UsageError: a trace instead of an engine.
        BadInputError, InputError, ModelError: an unusable text, model or context.
        UnavailableError, EngineCrashError: from the engines.
    """
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    plain = scoring.decoded(data)
    request = Request(
        SCORE, model, candidate, live_word(reference), n_threads, progress=progress, say=say,
        follow_reference_graph=follow_reference_graph,
    )  # fmt: skip
    checked = request.load_model()
    with request.session(checked, as_run=True) as session:
        if any(word.name == TRACE for word in session.words.values()):
            raise UsageError("a text is scored by live engines, not by a trace of another prompt")
        with request.unavailable(session):
            ours, theirs = session.open()
        runners: dict[Side, Runner] = {"candidate": ours, "reference": theirs}
        n_context = _context(n_context, checked.config.context_length, list(runners.values()))
        ids = {
            side: runner.tokenize(plain, add_bos=False, parse_special=False) for side, runner in runners.items()
        }
        bos = {side: _bos(runner, plain, ids[side]) for side, runner in runners.items()}
        agree = ids["candidate"] == ids["reference"] and bos["candidate"] == bos["reference"]
        pieces = scoring.windows(ids["reference"], bos["reference"], n_context)
        rules = tokenizer_rules({side: runner.identity.numerics for side, runner in runners.items()})
        with GGUFFile.open(checked.path) as gguf:
            tokenizer = Tokenizer.from_gguf(gguf, rules)
        result = ScoreResult(
            text=Text(
                sha256=hashlib.sha256(data).hexdigest(),
                n_bytes=len(data),
                n_scored_bytes=scoring.scored_bytes(data, ids["reference"], bos["reference"], tokenizer),
                n_context=n_context,
                bos_id=bos["reference"],
            ),
            scored=compare_scores(runners, pieces, progress),
            engines={side: runners[side].identity for side in SIDES},
            tokenizers_agree=agree,
        )
        note = None if agree else "the tokenizers disagree; both engines were fed the reference's tokens"
        prompt = Prompt(None, tuple(ids["reference"]), agree, note)
        return build(SCORE, result, request.facts(session, [prompt]))


def _context(asked: int | None, limit: int, runners: Sequence[Runner]) -> int:
    """Return the tokens of a window: what was asked for, or what the model and both engines hold."""
    held = [limit, *(n for one in runners if isinstance(n := one.identity.settings.get("n_ctx"), int))]
    if asked is None:
        return min(held)
    if asked > min(held):
        raise BadInputError(f"windows of {asked} tokens do not fit: the engines hold {min(held)}")
    return asked


def _bos(runner: Runner, text: str, ids: Sequence[int]) -> int | None:
    """Return the token that an engine's tokenizer puts before a text whose tokens are ``ids``."""
    given = runner.tokenize(text, add_bos=True, parse_special=False)
    return given[0] if len(given) > len(ids) and given[1 : 1 + len(ids)] == list(ids) else None
