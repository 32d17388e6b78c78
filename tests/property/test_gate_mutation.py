"""Edit any field of a receipt: the gate must fail.

With a digest recomputed by the forger it still fails, unless the field is one of those that nothing else in a
receipt depends on; these are listed in docs/receipts.md.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossval import registry, schema
from crossval.cli import cli
from crossval.compare import rows as compare
from crossval.compare.receipt import metrics, row_to_json, statuses
from crossval.compare.rows import TapRow
from crossval.json_schema.predicate import predicate
from crossval.model import taps, tolerance
from crossval.passes import PassPlan, TapArray, pass_kind
from crossval.receipts import file as receipt
from crossval.receipts import gate
from crossval.receipts.party import Party
from crossval.receipts.policy import Policy
from tests.support import receipt_samples as samples
from tests.support.extra import EXTRA
from tests.support.weights_samples import weights_receipt

VALID = predicate(schema.load("receipt.v1"))
COARSE = [*taps.of_model(2, outline=True)[1:]]
IN_FIRST = [name for name in taps.of_model(2) if name.startswith("blk.0.")]
FINE = sorted([*taps.of_model(2, outline=True), *IN_FIRST[:9]], key=taps.execution_index)
OUTLINE = samples.audit_result(names=COARSE, plan=samples.PLAN[:2])
PARTLY = samples.audit_result(names=FINE, plan=samples.PLAN[:2])
EXACT = samples.layers_result(plan=samples.PLAN[:2])
INEXACT = samples.layers_result(
    {
        (0, "blk.1.l_out"): 1e-4,
        (0, "result_norm"): 1e-4,
        (1, "blk.0.attn_norm"): 1e-4,
        (1, "blk.1.l_out"): 1e-4,
        (1, "result_output"): 1e-2,
    },
    plan=samples.PLAN[:2],
)
RECEIPTS = {
    "exact": samples.build(
        samples.layers_result(plan=samples.PLAN[:2]),
        samples.context(settings={"n_threads": 2, "n_decode": 1, "n_steps": None, "full": False}),
        samples.audits(OUTLINE, OUTLINE),
    ),
    "inexact": samples.build(
        samples.layers_result(
            {(0, "blk.0.l_out"): 1e-4, (0, "blk.1.ffn_inp"): 1e-4, (0, "blk.1.l_out"): 1e-4},
            plan=samples.PLAN[:2],
        ),
        samples.context(settings={"n_threads": 2, "n_decode": 1, "n_steps": None, "full": False}),
        samples.audits(PARTLY, OUTLINE),
    ),
    "exact with views": samples.build(
        EXACT,
        samples.context(settings={"n_threads": 2, "n_decode": 1, "n_steps": None, "full": False}),
        samples.audits(OUTLINE, OUTLINE),
        {"floors": samples.floors_of(EXACT), "causal": samples.causal_of(0.0, [0.0] * 3, own=[(1e-5, 1e-5)] * 3)},
    ),
    "inexact with views": samples.build(
        INEXACT,
        samples.context(settings={"n_threads": 2, "n_decode": 1, "n_steps": None, "full": False}),
        samples.audits(OUTLINE, OUTLINE),
        {
            "floors": samples.floors_of(INEXACT, samples.floor_table([("blk.1.kq", "2 threads")])),
            "causal": samples.causal_of(0.01, [0.0, 0.0, 0.0099]),
        },
    ),
    "greedy": samples.greedy_receipt(),
    "greedy of old": samples.unaudited(
        samples.greedy_receipt(reference=Party("recorded", samples.THEIRS, trace_digest="e" * 64)), "parity"
    ),
    "greedy apart": samples.greedy_receipt(inexact_at=0, policy="independent"),
    "greedy later": samples.later_receipt(),
    "smoke": samples.smoke_receipt(
        samples.smoke_answer(3, text=" warm.", token_ids=(81, 61, samples.EOS)),
        samples.smoke_answer(3, "reference", text="\x07", token_ids=(5,) * 24, finish="limit"),
    ),
    "smoke alone": samples.one_sided("candidate"),
    "selftest": samples.selftest_receipt(),
    "metamorphic": samples.metamorphic_receipt(),
    "tokens": samples.tokens_receipt(),
    "bench": samples.bench_receipt(samples.bench_findings(pairs=(samples.bench_pair(), samples.bench_further()))),
    "weights": weights_receipt(),
    "score": samples.score_receipt(),
}

PAGE = (Path(__file__).parents[2] / "docs" / "receipts.md").read_text(encoding="utf-8")
LISTED = {
    kind.strip(): {field for field in fields.splitlines() if not field.startswith("#")}
    for kind, fields in re.findall(r"<!-- unprovable(?: in)?(.*?) -->\n```\n(.*?)\n```", PAGE, re.S)
}
UNPROVABLE = LISTED.pop("")
"""What can be changed alone, with a recomputed digest, in a receipt of any kind; ``LISTED``: of one kind."""
TAPS = frozenset(taps.of_model(2))
SHOWN_ROWS = {"smoke": (0, 4, 6, 7), "selftest": (0, 9, -1), "metamorphic": (0, 1, 2, 3, -1)}
SHOWN_FIELDS = {
    "greedy": ("audit", "diagnosis", "results", "verdict", "digest"),
    "greedy apart": ("candidate", "reference", "thresholds", "results", "parity"),
    "smoke alone": ("candidate", "reference", "results"),
}
COMPARED_ROWS = (0, 2, 3)
"""An exact one, and of what differs after the first: a tensor within a layer, and a layer's output, which keeps
every token."""
SPEC = "specification"
POLICY = Policy(reference_names=(SPEC,))
FLOOR_ROWS = (0, 23, 121, 127)
"""An exact one, and of what differs: attention scores, a layer, the logits."""
AUDIT_ROWS = {"candidate": (0, 4, 7), "reference": (0,)}
"""Single operations: the embedding, V with a flip, attention scores; a segment that is a whole layer."""


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field, containers too."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))


def pattern(path: tuple[Any, ...]) -> str:
    return ".".join("*" if isinstance(part, int) else part for part in path)


def other_values(value: Any) -> list[Any]:
    """Return plausible other values of the same and of other types."""
    return [
        other for other in _variations(value) if receipt.canonical_json(other) != receipt.canonical_json(value)
    ]


def _variations(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value, None, int(value)]
    if isinstance(value, int):
        return [value + 1, value - 1, value * 2 + 3, None, str(value)]
    if isinstance(value, float):
        return [value + 0.001, value * 0.9 + 0.01, 0.0, None]
    if isinstance(value, str):
        words = [
            "live",
            "recorded",
            "sleeps",
            "stopped",
            "parity",
            "divergence",
            "equal",
            "within",
            "same",
            "independent",
        ]
        words = [*words, "prefill", "decode"] if value.isalpha() else ["2025-01-01T00:00:00Z"]
        words += ["blk.0.kqv_out", "blk.1.l_out", "result_norm"] if value in TAPS else []
        words += ["result_norm, token 2", "blk.1.l_out, token 1", "blk.0.q"] if ", token " in value else []
        swapped = re.sub("[0-9a-f]", lambda m: "1" if m.group() != "1" else "2", value)
        return ["", value + "x", swapped, None, *words]
    if value is None:
        return [0, 1.5, "x", True, "ab" * 32]
    if isinstance(value, list):
        return [[], value[:-1], [*value, value[-1] if value else "x"], None]
    return [{}, {**value, "unknown": 1}, None]


def at(original: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        original = original[part]
    return original


def not_at_an_end(around: Any, index: Any) -> bool:
    """Return whether this is one of the inner elements of a list of plain values."""
    plain = isinstance(around, list) and not any(isinstance(one, (dict, list)) for one in around)
    return plain and 0 < index < len(around) - 1


def put(original: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with one field replaced; all else is shared."""
    if not path:
        return value
    changed = copy.copy(original)
    changed[path[0]] = put(original[path[0]], path[1:], value)
    return changed


def without(original: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy with one field or element removed; all else is shared."""
    changed = copy.copy(original)
    if len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = without(original[path[0]], path[1:])
    return changed


def accepted(made: receipt.Receipt) -> bool:
    """Return whether the gate passes this receipt in a file: it is valid by the schema, and all checks pass."""
    return VALID(made) and gate.passed(registry.judge(made, POLICY if made["reference"]["name"] == SPEC else None))


def mutants(name: str) -> Iterator[tuple[str, receipt.Receipt]]:
    original = RECEIPTS[name]
    n_rows = len(original["results"].get("rows", ()))
    shown = {index % n_rows for index in SHOWN_ROWS.get(name, COMPARED_ROWS)} if n_rows else set()
    for path in leaves(original):
        # The rest of a receipt with views is like that of the others; of floors, a few stand for all.
        if name.endswith("with views") and path[0] not in ("floors", "causal", "settings"):
            continue
        # So is the rest of a greedy receipt: one of old stands for what does not depend on audits and rounding.
        if path[0] not in SHOWN_FIELDS.get(name, original):
            continue
        # Audits of a later prompt are listed as those of the first, and nothing else is tried in that receipt.
        later = path[:2] == ("results", "further")
        if later != (name == "greedy later"):
            continue
        place = path[3:] if later and len(path) > 3 else path
        if path[:3] == ("floors", "table", "floors") and len(path) > 3 and path[3] not in FLOOR_ROWS:
            continue
        if place[0] == "audit" and len(place) > 3 and (name == "exact" or place[3] not in AUDIT_ROWS[place[1]]):
            continue
        # Rows are alike: one that is equal and two that are not stand for all; of answers, one of each class.
        if path[:2] == ("results", "rows") and len(path) > 2 and path[2] not in shown:
            continue
        # Of plain values in a list, repeated measurements and token ids, the first and the last stand for all.
        if len(path) > 1 and not_at_an_end(at(original, path[:-1]), path[-1]):
            continue
        if "steps" in path and len(path) > 4 and (path[2], path[4]) not in ((0, 0), (1, 1)):
            continue
        value = at(original, path)
        yield pattern(place), without(original, path)
        for other in other_values(value):
            yield pattern(place), put(original, path, other)


@pytest.mark.parametrize("name", RECEIPTS)
def test_the_originals_pass(name: str) -> None:
    assert accepted(RECEIPTS[name])


@pytest.mark.parametrize("name", RECEIPTS)
def test_any_edit_breaks_the_digest(name: str) -> None:
    """Of each field, the first edit and the last: a digest is of all that there is."""
    ends: dict[str, list[receipt.Receipt]] = {}
    for where, made in mutants(name):
        ends[where] = [*ends.get(where, [])[:1], made]
    assert len(ends) > 10
    for where, edited in ends.items():
        for made in edited:
            assert receipt.digest(made) != made.get("digest"), f"{where} can be edited unseen"


def escaped(names: Iterable[str]) -> set[str]:
    """Return the fields of these receipts of which an edit passes the gate, given a digest of what it makes.

    Such a digest fits by construction, so it is not computed.
    """
    found: set[str] = set()
    with patch.object(gate, "digest", lambda made: made["digest"]):
        for name in names:
            for where, made in mutants(name):
                if where != "digest" and where not in found and accepted(made):
                    found.add(where)
    return found


@pytest.mark.long
def test_an_edit_with_a_new_digest_is_caught_by_the_other_fields_unless_listed() -> None:
    found = escaped(set(RECEIPTS) - set(LISTED))
    assert found - UNPROVABLE == set(), "escapes the gate and is not listed"
    assert UNPROVABLE - found == set(), "listed, but the gate catches every edit of it"


@pytest.mark.long
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=EXTRA if kind == "bench" else ()) for kind in LISTED])
def test_so_it_is_in_other_kinds(kind: str) -> None:
    beyond = escaped([kind]) - UNPROVABLE
    assert beyond - LISTED[kind] == set(), f"escapes the gate in a {kind} receipt and is not listed"
    assert LISTED[kind] - beyond == set(), f"listed for {kind}, but the gate catches every edit of it"


@pytest.mark.parametrize("name", RECEIPTS)
def test_the_library_refuses_what_is_refused(name: str) -> None:
    """Of every 157st edit; receipts are checked by a function made of the schema."""
    whole = schema.validator("receipt.v1")
    some = [made for _, made in islice(mutants(name), 0, None, 157)]
    judged = [VALID(made) for made in some]
    assert judged == [whole.is_valid(made) for made in some]
    assert {True, False} == set(judged)


PATHS = {name: list(leaves(made)) for name, made in RECEIPTS.items()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_command_refuses_edited_files(data: st.DataObject, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(RECEIPTS)))
    path = data.draw(st.sampled_from(PATHS[name]))
    value = at(RECEIPTS[name], path)
    made = put(RECEIPTS[name], path, data.draw(st.sampled_from(other_values(value))))
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(made), encoding="utf-8")
    result = CliRunner().invoke(cli, ["gate", str(file)])
    assert result.exit_code in (1, 4), result.output


@settings(max_examples=60, deadline=None)
@given(
    noise=st.sampled_from([0.0, 1e-7, 1e-4, 0.1, 3.0]),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e20]),
    n_tokens=st.integers(1, 4),
    start=st.integers(0, 5),
    zeros=st.sets(st.integers(0, 3)),
    tap=st.sampled_from(
        ["inp_embd", "blk.0.q", "blk.1.kq", "blk.1.kq_soft_max", "blk.0.ffn_out", "result_output"]
    ),
    seed=st.integers(0, 1000),
)
def test_honest_metrics_never_contradict_each_other(
    noise: float, scale: float, n_tokens: int, start: int, zeros: set[int], tap: str, seed: int
) -> None:
    plan = PassPlan(pass_kind(n_tokens, start), tuple(range(n_tokens)), start)
    random = np.random.default_rng(seed)
    shape = samples.trace.expected_shape(tap, samples.TRACE_MODEL, plan, None)
    theirs = (random.standard_normal(shape) * scale).astype(np.float32)
    axis = taps.token_axis(tap)
    for token in zeros & set(range(n_tokens)):
        theirs[(slice(None),) * axis + (token,)] = 0.0
    ours = (theirs + random.standard_normal(shape) * scale * noise).astype(np.float32)
    held = tolerance.tolerance_for(tap, 2, "same")
    row = compare.compare_tap(tap, 0, plan, TapArray(ours), TapArray(theirs), held)
    assert isinstance(row, TapRow)
    made = {"results": {"rows": [row_to_json(row)]}, "model": samples.MODEL}
    assert metrics(made) == []
    assert statuses(made) == []
