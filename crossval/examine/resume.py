"""A greedy comparison over many prompts that can be resumed: what its journal holds, and when that is used.

An entry counts only for the run that wrote it: same model, engines, steps, template, tool and machine (first line
of the journal), same prompt with the same token ids, same recorded traces. It must pass every check that the gate
makes of a prompt in a receipt. The engines are opened and every prompt is encoded again, whether or not it is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from crossval.compare.receipt import ROW_CHECKS, thresholds, tolerance_policy
from crossval.compare.rows import GreedyResult, choose_policy
from crossval.engines.session import Prompt, Session, trace_digest
from crossval.errors import BadInputError
from crossval.examine.greedy_receipt import prompt_from_json, prompt_to_json, structure
from crossval.model.tolerance import describe
from crossval.passes import Runner
from crossval.receipts import provenance
from crossval.receipts.file import Receipt
from crossval.receipts.journal import Journal
from crossval.receipts.party import Compute
from crossval.schema import validate_part

FORMAT = "crossval greedy journal, version 2"
_KERNEL_FIELDS = ("name", "calls", "bytes")
_CHECKS = (thresholds, structure, *ROW_CHECKS.values())

Kernels = dict[str, tuple[int, int]]
"""Name of a kernel -> calls, bytes."""


class Resume:
    """Gives the prompts that a journal holds and takes those that were run; without a path it does neither."""

    def __init__(self, path: Path | None, session: Session, template: str | None, steps: int) -> None:
        self.path = path
        self.n_done = 0
        """Prompts that the journal holds by now."""
        self.n_taken = 0
        """Of these, prompts that were there already."""
        self._session = session
        self._template = template
        self._steps = steps
        self._journal: Journal | None = None
        self._entries: Iterator[tuple[str, dict[str, Any]]] = iter(())
        self._earlier: Kernels = {}
        self._counted: Kernels = {}

    def __enter__(self) -> Resume:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._journal is not None:
            self._journal.close()

    def take(self, prompt: Prompt, candidate: Runner, reference: Runner) -> GreedyResult | None:
        """Return the next prompt's result when the journal holds it, else None: then run it and ``keep`` it.

        Raises:
            BadInputError: the journal belongs to another run or holds something that cannot be this prompt's.
        """
        if self.path is None:
            return None
        if self._journal is None:
            self._journal = Journal(self.path, self._header(candidate, reference))
            self._entries = self._journal.entries()
        found = next(self._entries, None)
        if found is None:
            self._counted = _kernels(self._session.compute())
            return None
        where, entry = found
        result = self._believe(where, entry, prompt, candidate, reference)
        self.n_taken += 1
        self.n_done += 1
        return result

    def keep(self, result: GreedyResult, candidate: Runner, reference: Runner) -> None:
        """Append the result of the prompt that was run.

        Raises:
            BadInputError: the journal cannot be written.
        """
        if self._journal is None:
            return
        used = _add(_kernels(self._session.compute()), self._counted, sign=-1)
        data = prompt_to_json(result.prompts[0])
        validate_part(data, "greedy_prompt", "result of this prompt")
        self._journal.append(
            {
                "index": self.n_done,
                "prompt": data,
                "traces": _traces(candidate, reference),
                "kernels": _to_json(used, sorted(used)),
            }
        )
        self.n_done += 1

    def finish(self) -> None:
        """Check that the journal holds no more prompts than were asked for.

        Raises:
            BadInputError: it does.
        """
        if next(self._entries, None) is not None:
            raise BadInputError(f"journal {self.path} holds more than the {self.n_done} prompts asked for")

    def compute(self, compute: Compute) -> Compute:
        """Return what computed the candidate's numbers, the journal's prompts included."""
        if not self._earlier:
            return compute
        total = _add(self._earlier, _kernels(compute))
        order = [str(kernel["name"]) for kernel in compute.kernels]
        order += sorted(set(total) - set(order))
        return replace(compute, kernels=tuple(_to_json(total, order)))

    def _header(self, candidate: Runner, reference: Runner) -> dict[str, Any]:
        tap_map = self._session.tap_map
        return {
            "format": FORMAT,
            "model": {"sha256": self._session.model.sha256},
            "tokenizer": {"digest": self._session.model.tokenizer["digest"]},
            "settings": {
                "n_steps": self._steps,
                "template": self._template,
                "n_threads": self._session.n_threads,
                **({"follow_reference_graph": True} if self._session.follow_reference_graph else {}),
                **({} if tap_map is None else {"tap_map": tap_map.digest or tap_map.name}),
            },
            "candidate": {"status": candidate.status, **candidate.identity.to_json()},
            "reference": {"status": reference.status, **reference.identity.to_json()},
            "thresholds": describe(choose_policy(candidate.identity, reference.identity)),
            "tool": provenance.tool_facts(),
            "host": provenance.host_facts(),
        }

    def _believe(
        self, where: str, entry: dict[str, Any], prompt: Prompt, candidate: Runner, reference: Runner
    ) -> GreedyResult:
        if set(entry) != {"index", "prompt", "traces", "kernels"}:
            raise BadInputError(f"{where}: not an entry of this journal: it has other fields")
        if entry["index"] != self.n_done or isinstance(entry["index"], bool):
            raise BadInputError(f"{where}: prompt {self.n_done} is expected here")
        data = entry["prompt"]
        validate_part(data, "greedy_prompt", where)
        if data["text"] != prompt.text:
            raise BadInputError(
                f"{where}: prompt {self.n_done} was another one; use the same prompts, or another file"
            )
        if data["prompt_ids"] != list(prompt.token_ids):
            raise BadInputError(f"{where}: its token ids are not those of the prompt")
        if entry["traces"] != _traces(candidate, reference):
            raise BadInputError(f"{where}: made with another recorded trace")
        complaints = self._complaints(data, prompt)
        if complaints:
            raise BadInputError(f"{where}: {complaints[0]}")
        self._count(where, entry["kernels"])
        found = prompt_from_json(data)
        policy = choose_policy(candidate.identity, reference.identity)
        return GreedyResult((found,), describe(policy))

    def _complaints(self, data: Mapping[str, Any], prompt: Prompt) -> list[str]:
        """Make the checks of the prompt that the gate makes of a receipt."""
        session = self._session
        part = Receipt(
            {
                "kind": "greedy",
                "model": session.model.facts,
                "tokenizer": session.model.tokenizer,
                "prompt": {"text": prompt.text, "token_ids": list(prompt.token_ids)},
                "candidate": session.candidate.to_json(),
                "reference": session.reference.to_json(),
                "settings": {"n_steps": self._steps},
                "results": {"prompts": [data]},
            }
        )
        part["thresholds"] = describe(tolerance_policy(part))
        return [what for check in _CHECKS for what in check(part)]

    def _count(self, where: str, kernels: Any) -> None:
        """Add what the entry says of kernels, which must be those of the open engine."""
        known = {str(kernel["name"]) for kernel in self._session.compute().kernels}
        if not isinstance(kernels, list) or not all(_is_kernel(one) for one in kernels):
            raise BadInputError(f"{where}: kernels are not a list of name, calls and bytes")
        names = [one["name"] for one in kernels]
        if len(set(names)) != len(names) or set(names) != known:
            raise BadInputError(f"{where}: kernels are not those of the candidate")
        if kernels and not any(one["calls"] for one in kernels):
            raise BadInputError(f"{where}: no kernel ran")
        self._earlier = _add(self._earlier, {one["name"]: (one["calls"], one["bytes"]) for one in kernels})


def _is_kernel(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and set(one) == set(_KERNEL_FIELDS)
        and isinstance(one["name"], str)
        and all(type(one[name]) is int and 0 <= one[name] < 1 << 53 for name in ("calls", "bytes"))
    )


def _kernels(compute: Compute) -> Kernels:
    return {str(one["name"]): (int(one["calls"]), int(one["bytes"])) for one in compute.kernels}


def _add(one: Kernels, other: Kernels, sign: int = 1) -> Kernels:
    """Return calls and bytes of both by kernel; those of ``other`` subtracted with ``sign`` -1."""
    total = dict(one)
    for name, (calls, n_bytes) in other.items():
        before = one.get(name, (0, 0))
        total[name] = (before[0] + sign * calls, before[1] + sign * n_bytes)
    return total


def _to_json(kernels: Kernels, order: Sequence[str]) -> list[dict[str, Any]]:
    return [dict(zip(_KERNEL_FIELDS, (name, *kernels[name]), strict=True)) for name in order]


def _traces(candidate: Runner, reference: Runner) -> dict[str, str | None]:
    return {"candidate": trace_digest(candidate), "reference": trace_digest(reference)}
