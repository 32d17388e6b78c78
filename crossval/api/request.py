"""The request for a comparison, and what every receipt states besides its results."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bitnet_py import _native
from bitnet_py.chat_template import AUTO, FileTemplate
from bitnet_py.gguf import GGUFFile
from bitnet_py.model import KERNEL_VARIABLE
from bitnet_py.resources import default_model_path
from bitnet_py.template import Template, get_template
from bitnet_py.token_ids import check_ids
from crossval.bitnet_cpp.library import variables_in_use
from crossval.engines import tap_maps
from crossval.engines.model_file import ModelFile, check_model, missing_tokens
from crossval.engines.registry import find_word
from crossval.engines.session import Given, Prompt, Session, check_prompt, encode
from crossval.errors import BadInputError, UnavailableError, UsageError
from crossval.passes import Runner
from crossval.receipts.kind import Kind, RunFacts, build_unavailable
from crossval.receipts.party import Party, rules_between, same_engine
from crossval.terms import SIDES, Progress, Side

Say = Callable[[str], None]
"""Called with a line to show."""
SAME_ENGINE_NOTE = (
    "candidate and reference have {}: that they agree shows only that one engine gives the same twice"
)
MAX_PROMPT_NOTES = 5
REPRO_DIR = "repro"
"""Directory to which the command in a diagnosis writes its reproducer."""


def silent(*_: object) -> None:
    """Ignore a progress report or a line."""


@dataclass(frozen=True)
class Request:
    """The model and the engines of a comparison, and its options."""

    kind: Kind[Any]
    """Kind of the receipt."""
    model: str | Path | None = None
    candidate: str = "bitnet_py"
    reference: str = "auto"
    n_threads: int | None = None
    template: str | None = None
    n_decode: int | None = None
    full: bool = False
    floors: bool = False
    causal: bool = False
    repro_dir: str | Path | None = None
    progress: Progress = silent
    say: Say = silent
    follow_reference_graph: bool = False
    tap_map: str | Path | None = None

    def load_model(self) -> ModelFile:
        """Check the model and the template's tokens.

        Raises:
            ModelError: the model is unusable.
            BadInputError: the model lacks a special token of the template.
        """
        path = default_model_path() if self.model is None else Path(self.model)
        self.progress("checking the model", 0, 1)
        model = check_model(path)
        self.progress("checking the model", 1, 1)
        for warning in model.warnings:
            self.say(f"warning: {warning}")
        missing = missing_tokens(path, self._template.special_tokens)
        if missing:
            raise BadInputError(f"{path.name} has no token {missing[0]!r}, which template {self.template} needs")
        return model

    def session(self, model: ModelFile, *, as_run: bool = False) -> Session:
        """Return the session of both engines, none of them open yet; ``as_run``: see ``Session``."""
        return Session(
            model,
            self.candidate,
            self.reference,
            self.n_threads,
            follow_reference_graph=self.follow_reference_graph,
            as_run=as_run,
            tap_map=None if self.tap_map is None else tap_maps.load(self.tap_map),
        )

    def render(self, text: str) -> str:
        """Return a text in the chat template, as it is tokenized."""
        return self._template.render(text)

    def as_fed(self, given: Given, model: ModelFile) -> Given:
        """Return a prompt that is a text in its chat template, token ids as they are.

        Raises:
            UsageError: token ids, and a template, which applies to text.
            InputError: token ids that are not in the vocabulary.
        """
        if isinstance(given, str):
            return self.render(given)
        if self.template not in (None, "raw"):
            raise UsageError(f"template {self.template} applies to text: token ids are fed as they are")
        check_ids(given, model.config.vocab_size, model.path.name)
        return tuple(given)

    @cached_property
    def _template(self) -> Template | FileTemplate:
        if self.template != AUTO:
            return get_template(self.template or "raw")
        with GGUFFile.open(default_model_path() if self.model is None else Path(self.model)) as gguf:
            return get_template(AUTO, gguf.metadata)

    def open_prompt(self, session: Session, given: Given, n_after: int) -> tuple[Runner, Runner, Prompt]:
        """Open candidate and reference for a prompt and tokenize it; ``n_after`` tokens will be read after it.

        Raises:
            BadInputError: the prompt is empty, not Unicode, or too long.
            InputError: token ids that are not in the vocabulary.
            UnavailableError, EngineCrashError: from the engines.
        """
        check_prompt(given)
        rendered = self.as_fed(given, session.model)
        candidate, reference = session.open(rendered)
        prompt = encode(candidate, reference, given, rendered, session.model.config.context_length, n_after)
        return candidate, reference, prompt

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the receipt's ``settings``; of a path in an engine's word only the last part is stated."""
        return {
            "n_threads": self.n_threads,
            **{str(side): word for side, word in self.plain_words().items()},
            "floors": self.floors,
            "causal": self.causal,
            "follow_reference_graph": self.follow_reference_graph,
            **more,
        }

    def plain_words(self) -> dict[Side, str]:
        """Return the words of both engines as receipts state them."""
        given: dict[Side, str] = {"candidate": self.candidate, "reference": self.reference}
        return {side: find_word(side, text).plain for side, text in given.items()}

    def command(self, prompt: Prompt, n_decode: int) -> str:
        """Return the command that writes the reproducer of this comparison's finding, to be pasted into a shell.

        Paths are those that were given, so it runs in the folder in which this command ran.
        """
        given: list[str] = []
        if self.kind.name == "diff":
            words = ["diff", self.candidate, self.reference]
        else:
            ids = ",".join(map(str, prompt.token_ids))
            read = ["--tokens", ids] if prompt.text is None else ["--prompt", prompt.text]
            words = ["layers", *(["=".join(read)] if read[1].startswith("-") else read)]
            given += ["--candidate", self.candidate, "--reference", self.reference]
            given += ["--follow-reference-graph"] if self.follow_reference_graph else []
            given += [] if self.template in (None, "raw") else ["--template", str(self.template)]
            given += [] if self.n_threads is None else ["--threads", str(self.n_threads)]
        given += [] if self.tap_map is None else ["--tap-map", str(self.tap_map)]
        given += ["--decode", str(n_decode), *(["--full"] if self.full else []), "--repro", REPRO_DIR]
        named = [] if self.model is None else ["--model", str(self.model)]
        return " ".join([*_environment(), shlex.join(["crossval", *words, *named, *given])])

    def facts(
        self, session: Session, prompts: Sequence[Prompt], sides: tuple[Side, ...] = SIDES, **settings: Any
    ) -> RunFacts:
        """Return everything that the receipt states besides the results, after the run of ``sides``."""
        parties: dict[Side, Party] = {"candidate": session.candidate, "reference": session.reference}
        for side in set(SIDES) - set(sides):
            parties[side] = Party("unused", parties[side].identity)
        return RunFacts(
            model=session.model.facts,
            tokenizer={
                **session.model.tokenizer,
                "engines_agree": _agree(prompts),
                "rules": rules_between(parties),
            },
            text=prompts[0].text if prompts else None,
            template=None if prompts and prompts[0].text is None else self.template,
            token_ids=prompts[0].token_ids if prompts else (),
            compute=session.compute(),
            settings=self.settings(**settings),
            notes=[
                *session.model.notes,
                *session.trace_notes(),
                *self._template_notes(),
                *_engine_notes(parties),
                *_prompt_notes(prompts),
            ],
            **parties,
        )

    def _template_notes(self) -> list[str]:
        template = self._template
        if not isinstance(template, FileTemplate):
            return []
        return [f"template {AUTO} is the model file's own, sha256 {template.digest}"]

    @contextmanager
    def unavailable(self, session: Session, sides: tuple[Side, ...] = SIDES, **settings: Any) -> Iterator[None]:
        """Attach to an ``UnavailableError`` from the block the receipt that states which engine is missing."""
        try:
            yield
        except UnavailableError as error:
            facts = self.facts(session, (), sides, **settings)
            side = session.failed or ("reference" if "reference" in sides else "candidate")
            if side == "reference":
                missing = Party("unavailable", facts.reference.identity, note=str(error))
                facts = replace(facts, reference=missing)
            else:
                missing = Party("unavailable", facts.candidate.identity, note=str(error))
                facts = replace(facts, candidate=missing)
            error.receipt = build_unavailable(self.kind, facts)
            raise


def _environment() -> list[str]:
    """Return the variables that choose libraries and kernels, as a shell sets them before a command."""
    names = (KERNEL_VARIABLE, _native.LIBRARY_VARIABLE, *variables_in_use())
    held = ((name, os.environ.get(name, "")) for name in names)
    return [f"{name}={shlex.quote(value)}" for name, value in held if value]


def _engine_notes(parties: Mapping[Side, Party]) -> list[str]:
    """Return a note where both parties are one engine."""
    if not all(party.status in ("live", "recorded") for party in parties.values()):
        return []
    candidate, reference = parties["candidate"], parties["reference"]
    why = same_engine(candidate.to_json(), reference.to_json())
    return [] if why is None else [SAME_ENGINE_NOTE.format(why)]


def _prompt_notes(prompts: Sequence[Prompt]) -> list[str]:
    notes = [prompt.note for prompt in prompts if prompt.note]
    more = len(notes) - MAX_PROMPT_NOTES
    return notes if more <= 0 else [*notes[:MAX_PROMPT_NOTES], f"the same of {more} more prompts"]


def _agree(prompts: Sequence[Prompt]) -> bool | None:
    answers = [prompt.tokenizers_agree for prompt in prompts]
    if False in answers:
        return False
    return None if not answers or None in answers else True
