"""Ask an engine the questions of a suite: greedy, through its KV cache, one prompt after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_py.arithmetic import Generation
from bitnet_py.gguf import GGUFFile
from bitnet_py.special_tokens import TokenKind
from bitnet_py.tokenizer import Tokenizer
from crossval.bitnet_cpp.remedies import BUILD
from crossval.capture import greedy_token
from crossval.errors import BadInputError, UnavailableError
from crossval.passes import Runner, cut_prompt, longest_pass
from crossval.smoke.answers import Answer, Finish
from crossval.smoke.suite import SmokePrompt, Suite
from crossval.terms import LOGITS, Progress, Side

_TEXT_KINDS = (TokenKind.NORMAL, TokenKind.USER_DEFINED)


@dataclass(frozen=True)
class Decoder:
    """The model's own vocabulary, which ends generation and turns tokens into text for all engines alike."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    special_ids: frozenset[int]
    """Tokens that are not text: control, unknown, unused."""

    @classmethod
    def of_model(cls, path: Path, rules: Generation) -> Decoder:
        """Read the vocabulary of a model file, by the rules of a generation of bitnet.cpp.

        Raises ``ModelError`` or ``TokenizerError``.
        """
        with GGUFFile.open(path) as gguf:
            tokenizer = Tokenizer.from_gguf(gguf, rules)
        kinds = enumerate(tokenizer.vocabulary.kinds)
        special = frozenset(token for token, kind in kinds if kind not in _TEXT_KINDS)
        return cls(tokenizer, tokenizer.eos_ids, special)

    def text(self, token_ids: list[int]) -> str:
        """Return the text of tokens; special ones are spelt out, bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(token_ids, skip_special=False)


@dataclass(frozen=True)
class Limits:
    """How far an answer may go: tokens generated, and positions of the context (prompt included)."""

    max_tokens: int
    context_length: int


def answer_suite(
    runner: Runner,
    side: Side,
    suite: Suite,
    decoder: Decoder,
    limits: Limits,
    *,
    render: Callable[[str], str] = str,
    progress: Progress | None = None,
) -> list[Answer]:
    """Return the engine's answer to every prompt of a suite; ``render`` puts a prompt into its chat template.

    Raises:
        UnavailableError: the runner replays a trace.
        BadInputError: a prompt has no tokens, is longer than the context, or the engine rejects it.
        EngineCrashError: from the runner.
    """
    require_any_prompt(runner, side)
    report = progress or (lambda *_: None)
    what = f"{side} {runner.identity.name}"
    answers = []
    for index, prompt in enumerate(suite.prompts):
        report(what, index, len(suite.prompts))
        try:
            answers.append(_answer(runner, side, prompt, render(prompt.prompt), decoder, limits))
        except BadInputError as error:
            raise BadInputError(f"suite {suite.name}, prompt {prompt.id!r}: {error}") from error
    report(what, len(answers), len(suite.prompts))
    return answers


def require_any_prompt(runner: Runner, side: Side, cannot: str = "answer other prompts") -> None:
    """Check that a runner can run any tokens.

    Raises:
        UnavailableError: it is a recorded trace, which ``cannot``.
    """
    if runner.plan is not None:
        live = "--candidate bitnet_py" if side == "candidate" else f"--reference bitnet.cpp (`{BUILD}` builds it)"
        raise UnavailableError(f"the {side} is a recorded trace of one prompt and cannot {cannot}; use {live}")


def _answer(
    runner: Runner, side: Side, prompt: SmokePrompt, rendered: str, decoder: Decoder, limits: Limits
) -> Answer:
    prompt_ids = runner.tokenize(rendered)
    room = room_of(limits.context_length, runner.identity.settings.get("n_ctx"))
    if not prompt_ids:
        raise BadInputError("the prompt has no tokens")
    if len(prompt_ids) > room:
        raise BadInputError(f"the prompt has {len(prompt_ids)} tokens, the engine's context holds {room}")
    runner.reset()
    *before, last = cut_prompt(prompt_ids, longest_pass(runner))
    for piece in before:
        runner.eval(piece.token_ids, ())
    tokens: list[int] = []
    pending: Sequence[int] = last.token_ids
    finish: Finish | None = None
    while finish is None:
        token = greedy_token(runner.eval(pending, (LOGITS,)))
        if token is None:
            finish = "invalid"
            break
        tokens.append(token)
        pending = [token]
        if token in decoder.stop_ids:
            finish = "stop"
        elif prompt.stop == "newline" and first_line(decoder.text(tokens)) is not None:
            finish = "newline"
        elif len(tokens) == limits.max_tokens:
            finish = "limit"
        elif len(prompt_ids) + len(tokens) > room:
            finish = "context"
    text = decoder.text(tokens[:-1] if finish == "stop" else tokens)
    if finish == "newline":
        text = first_line(text) or ""
    return Answer(prompt, side, tuple(prompt_ids), tuple(tokens), finish, text)


def room_of(context_length: int, n_ctx: object) -> int:
    """Return how many positions an engine has: the model's context, or less when its cache holds less."""
    return min(context_length, n_ctx) if isinstance(n_ctx, int) else context_length


def first_line(text: str) -> str | None:
    """Return ``text`` up to the first newline after something other than whitespace; None if there is none."""
    start = len(text) - len(text.lstrip())
    end = text.find("\n", start)
    return text[:end] if end >= 0 else None
