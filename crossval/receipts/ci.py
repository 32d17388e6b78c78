"""What the gate found, in the formats that CI systems show: JUnit, Markdown, annotations, a badge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Protocol
from xml.etree import ElementTree

from crossval.receipts.policy import GateCheck
from crossval.schema import one_line

BADGE = {True: ("passing", "brightgreen"), False: ("failing", "red")}


class Judged(Protocol):
    """A receipt that the gate judged."""

    @property
    def receipt(self) -> str:
        """Path, as given."""

    @property
    def checks(self) -> Sequence[GateCheck]:
        """Every check that was made; none where the receipt could not be read."""

    @property
    def error(self) -> str | None:
        """Why it could not be judged."""

    @property
    def passed(self) -> bool:
        """Whether it was read and every check passed."""


def junit(judged: Sequence[Judged]) -> str:
    """Return JUnit XML: a suite per receipt, a case per check; an unreadable receipt is one case with an error."""
    root = ElementTree.Element("testsuites", name="crossval gate")
    for one in judged:
        failures = sum(not check.passed for check in one.checks)
        errors = int(one.error is not None)
        counts = {"tests": len(one.checks) + errors, "failures": failures, "errors": errors}
        facts = {"name": one.receipt, **{name: str(count) for name, count in counts.items()}}
        suite = ElementTree.SubElement(root, "testsuite", facts)
        if one.error is not None:
            case = ElementTree.SubElement(suite, "testcase", classname=one.receipt, name="read")
            ElementTree.SubElement(case, "error", message=_xml(one.error))
        for check in one.checks:
            case = ElementTree.SubElement(suite, "testcase", classname=one.receipt, name=check.name)
            if not check.passed:
                ElementTree.SubElement(case, "failure", message=_xml(check.detail))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(judged: Sequence[Judged]) -> str:
    """Return a summary for a pull request: a line per receipt, and every check that failed."""
    n_passed = sum(one.passed for one in judged)
    lines = [f"### crossval gate: {n_passed} of {len(judged)} receipts pass", "", "| receipt | result | why |"]
    lines.append("|---|---|---|")
    for one in judged:
        reasons = "<br>".join(map(_cell, _reasons(one)))
        lines.append(f"| {_cell(one.receipt)} | {'pass' if one.passed else '**FAIL**'} | {reasons} |")
    return "\n".join(lines) + "\n"


def workflow_commands(judged: Sequence[Judged]) -> Iterator[str]:
    """Yield a GitHub workflow command for each receipt that does not pass."""
    for one in judged:
        for reason in _reasons(one):
            title = _command("crossval gate", ":", ",")
            yield f"::error file={_command(one.receipt, ':', ',')},title={title}::{_command(reason)}"


def badge(judged: Sequence[Judged]) -> str:
    """Return the JSON of a badge, in the schema of shields.io's endpoint; nothing judged is a failure."""
    message, colour = BADGE[bool(judged) and all(one.passed for one in judged)]
    return json.dumps({"schemaVersion": 1, "label": "bitnet parity", "message": message, "color": colour}) + "\n"


def _reasons(one: Judged) -> list[str]:
    if one.error is not None:
        return [one.error]
    return [f"{check.name}: {check.detail}" for check in one.checks if not check.passed]


def _cell(text: str) -> str:
    """Return text as Markdown shows it in a table, whatever is in it."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for sign in "|`*_[]":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped


def _xml(text: str) -> str:
    """Return text without the control characters that XML cannot hold."""
    return "".join(char if char >= " " else " " for char in text)


def _command(text: str, *separators: str) -> str:
    """Return text as a value within a workflow command."""
    for sign in ("%", "\r", "\n", *separators):
        text = text.replace(sign, f"%{ord(sign):02X}")
    return text
