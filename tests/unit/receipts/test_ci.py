"""What the gate found, in the formats of CI systems."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from xml.etree import ElementTree

from crossval.receipts import ci
from crossval.receipts.policy import GateCheck


@dataclass
class One:
    receipt: str
    checks: list[GateCheck] = field(default_factory=list)
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and all(check.passed for check in self.checks)


GOOD = One("good.json", [GateCheck("digest", True, "as stated"), GateCheck("verdict", True, "parity")])
BAD = One("a|b:c,<d>.json", [GateCheck("digest", True, "fine"), GateCheck("bitwise", False, "line 1\n100 % | x")])
UNREAD = One("broken.json", error="broken.json: not JSON \x07")
ALL = (GOOD, BAD, UNREAD)


def test_junit_has_a_suite_per_receipt_and_a_case_per_check() -> None:
    root = ElementTree.fromstring(ci.junit(ALL))
    found = [(s.get("name"), s.get("tests"), s.get("failures"), s.get("errors")) for s in root]
    assert found == [("good.json", "2", "0", "0"), (BAD.receipt, "2", "1", "0"), ("broken.json", "1", "0", "1")]
    (failure,) = root.iter("failure")
    assert "100 % | x" in str(failure.get("message"))
    (error,) = root.iter("error")
    assert "not JSON" in str(error.get("message"))


def test_markdown_has_a_line_per_receipt_whatever_its_text() -> None:
    lines = ci.markdown(ALL).splitlines()
    assert lines[0] == "### crossval gate: 1 of 3 receipts pass"
    assert len(lines) == 4 + len(ALL)
    assert lines[4] == "| good.json | pass |  |"
    assert lines[5] == r"| a\|b:c,&lt;d>.json | **FAIL** | bitwise: line 1 100 % \| x |"
    assert "**FAIL**" in lines[6]


def test_each_failed_check_is_one_workflow_command_that_text_cannot_end() -> None:
    commands = list(ci.workflow_commands(ALL))
    assert len(commands) == 2
    assert commands[0].startswith("::error file=a|b%3Ac%2C<d>.json,title=crossval gate::")
    assert commands[0].endswith("bitwise: line 1%0A100 %25 | x")
    assert all("\n" not in command for command in commands)


def test_the_badge_is_green_only_when_everything_passes() -> None:
    assert json.loads(ci.badge([GOOD]))["color"] == "brightgreen"
    assert json.loads(ci.badge(ALL))["message"] == "failing"
    assert json.loads(ci.badge([]))["message"] == "failing"
