"""Edit any field of a receipt: the gate must fail.

With a digest recomputed by the forger it still fails, unless the field is one of those that nothing else in a
receipt depends on; these are listed here and in docs/receipts.md.
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

UNPROVABLE = (
    # Who, where and when: facts about the world that the rows cannot contradict.
    "created_at",
    "tool.version",
    "tool.commit",
    "tool.dirty",
    "host.cpu_model",
    "host.machine",
    "host.isa_flags",
    "host.isa_flags.*",
    "host.n_cores",
    "host.n_cores_usable",
    "host.os",
    "host.libc",
    "host.python",
    # Without it, an engine that states its lanes computes as March 2026's: the same statement.
    "candidate.numerics.generation",
    "reference.numerics.generation",
    "model.sha256",
    "model.file_name",
    "model.size_bytes",
    "model.architecture",
    "model.quantization",
    "model.shape.n_heads",
    "model.shape.n_kv_heads",
    "model.shape.head_dim",
    "model.shape.dim",
    "model.shape.hidden_dim",
    "model.shape.context_length",
    "model.shape.rope_base",
    "model.shape.rms_eps",
    "tokenizer.model",
    "tokenizer.pre",
    "tokenizer.digest",
    "tokenizer.engines_agree",
    "prompt.text",
    "prompt.template",
    "prompt.token_ids",
    "prompt.token_ids.*",
    "candidate.version",
    "candidate.source_commit",
    "candidate.source_digest",
    "candidate.library_digest",
    "candidate.compiler",
    "candidate.flags",
    "candidate.trace_digest",
    "candidate.note",
    "candidate.settings",
    "reference.status",
    "reference.version",
    "reference.source_commit",
    "reference.source_digest",
    "reference.library_digest",
    "reference.compiler",
    "reference.flags",
    "reference.trace_digest",
    "reference.note",
    "reference.settings",
    "settings.n_threads",
    "settings.full",
    "settings.n_decode",
    "settings.n_steps",
    "settings.reference",
    "settings.candidate",
    "notes",
    # Counters: plausible numbers cannot be told from true ones.
    "compute.kernels",
    "compute.kernels.*",
    "compute.kernels.*.name",
    "compute.kernels.*.calls",
    "compute.kernels.*.bytes",
    # Measurements with nothing else to check them against.
    "results.passes.*.token_ids.*",
    "results.rows.*.max_ulp",
    "results.rows.*.max_abs",
    "results.rows.*.token_nmse.*",
    "results.rows.*.worst_token",
    "results.rows.*.worst_token_nmse",
    "results.rows.*.worst_token_cosine",
    "results.rows.*.note",
    # Of the candidate single operations are edited, of the reference a segment: its ratio is of a whole token, not
    # of the element shown. Where a bound was not needed, nothing depends on it.
    "audit.candidate.rows.*.flips",
    "audit.candidate.rows.*.note",
    "audit.candidate.rows.*.worst.bound",
    "audit.candidate.rows.*.worst.index.*",
    "audit.candidate.rows.*.worst.token",
    "audit.reference.rows.*.flips",
    "audit.reference.rows.*.n_ops",
    "audit.reference.rows.*.n_segments",
    "audit.reference.rows.*.note",
    "audit.reference.rows.*.ratio",
    "audit.reference.rows.*.tap",
    "audit.reference.rows.*.worst.bound",
    "audit.reference.rows.*.worst.expected",
    "audit.reference.rows.*.worst.index.*",
    "audit.reference.rows.*.worst.n_ops",
    "audit.reference.rows.*.worst.recorded",
    "audit.reference.rows.*.worst.token",
    # Two runs of the reference, and what the specification made of states that the receipt does not hold. A floor
    # that no differing row is measured with changes no multiple.
    "floors.table.floors.*.rel_l2",
    "floors.table.floors.*.worst_token_rel_l2",
    "floors.table.floors.*.n_different",
    "floors.table.unmeasured.*.*",
    "causal.noise_kl",
    "causal.effects.*.candidate_own_kl",
    "causal.effects.*.reference_own_kl",
    "results.prompts.*.text",
    "results.prompts.*.prompt_ids",
    "results.prompts.*.prompt_ids.*",
    "results.prompts.*.why_incomplete",
    "results.prompts.*.steps.*.explanation",
    "results.prompts.*.steps.*.logits.note",
    "results.prompts.*.steps.*.logits.pass_kind",
)
"""Fields that can be changed alone, with a recomputed digest, without this receipt failing the gate."""


UNPROVABLE_IN_SMOKE = (
    # Nothing is compared number by number, so nothing depends on layers and lanes.
    "candidate.numerics.simd_width",
    "candidate.numerics.fused_quantizer",
    "reference.numerics.simd_width",
    "reference.numerics.fused_quantizer",
    "model.shape.n_layers",
    # The command's own demand; the gate has another.
    "thresholds.min_correct.correct",
    "thresholds.min_correct.of",
    "results.suite.name",
    # The vocabulary is not in the receipt: which tokens make which text, and which are special.
    "results.special_ids",
    "results.special_ids.*",
    "results.rows.*.token_ids",
    "results.rows.*.token_ids.*",
    "results.rows.*.text",
)
"""Fields of a smoke receipt that can be changed beyond those."""
UNPROVABLE_IN_SMOKE_ALONE = (
    # The other engine took no part: nothing says which it would have been, or how it reads the prompts.
    "candidate.numerics.simd_width",
    "candidate.numerics.fused_quantizer",
    "reference.name",
    "reference.numerics.simd_width",
    "reference.numerics.fused_quantizer",
    "results.rows.*.prompt_ids",
    "results.rows.*.prompt_ids.*",
    "results.rows.*.text",
    "results.rows.*.token_ids",
    "results.rows.*.token_ids.*",
    "results.special_ids",
    "results.special_ids.*",
    "results.suite.name",
)
"""Fields of a smoke receipt of one engine that can be changed beyond those of a comparison."""
UNPROVABLE_IN_SELFTEST = (
    # No engine is compared with another build; end to end a small fault is parity or divergence.
    "candidate.numerics.fused_quantizer",
    "candidate.numerics.simd_width",
    "reference.numerics.fused_quantizer",
    "reference.numerics.simd_width",
    "results.rows.*.found.comparison",
)
"""Fields of a selftest receipt that can be changed beyond those of a comparison."""

UNPROVABLE_IN_METAMORPHIC = (
    # Whether numbers are stated decides which checks there are, not which numbers. Of checks held to a bound, how
    # many values differ, by how much, and where the most is measured and follows from nothing.
    "candidate.numerics.fused_quantizer",
    "candidate.numerics.simd_width",
    "reference.numerics.fused_quantizer",
    "reference.numerics.simd_width",
    "results.rows.*.n_different",
    "results.rows.*.where",
    "results.rows.*.worst",
)
"""Fields of a metamorphic receipt that can be changed beyond those of a comparison."""

UNPROVABLE_IN_BENCH = (
    # The ratios asked for are the command's own demand; the gate has another. Who the further references are,
    # where threads ran and what idle ones did are facts about the world. Times and bytes are not here: a list of
    # ratios per round, or a median, follows from each of them.
    "results.references.*.reference.compiler",
    "results.references.*.reference.flags",
    "results.references.*.reference.library_digest",
    "results.references.*.reference.name",
    "results.references.*.reference.note",
    "results.references.*.reference.settings",
    "results.references.*.reference.source_commit",
    "results.references.*.reference.source_digest",
    "results.references.*.reference.trace_digest",
    "results.references.*.reference.version",
    "results.references.*.search.candidate.idle",
    "results.references.*.search.candidate.not_pinned",
    "results.references.*.search.candidate.tried.*.cores.*",
    "results.references.*.search.reference.idle",
    "results.references.*.search.reference.not_pinned",
    "results.references.*.search.reference.tried.*.cores.*",
    "results.references.*.word",
    "results.search.candidate.idle",
    "results.search.candidate.not_pinned",
    "results.search.candidate.tried.*.cores.*",
    "results.search.reference.idle",
    "results.search.reference.not_pinned",
    "results.search.reference.tried.*.cores.*",
    "thresholds.min_ratios.decode",
    "thresholds.min_ratios.greedy",
    "thresholds.min_ratios.prefill",
)
"""Fields of a benchmark's receipt that can be changed beyond those of a comparison."""

UNPROVABLE_IN_TOKENS = (
    # Nothing is computed. The lines of a file are not in the receipt, and times follow from nothing.
    "candidate.numerics.fused_quantizer",
    "candidate.numerics.simd_width",
    "reference.numerics.fused_quantizer",
    "reference.numerics.simd_width",
    "model.shape.n_layers",
    "results.corpus.digest",
    "results.corpus.name",
    "results.elapsed_s.candidate",
    "results.elapsed_s.reference",
)
"""Fields of a tokens receipt that can be changed beyond those of a comparison."""

UNPROVABLE_APART = (
    # The engines round differently already; another difference is as good. What differs within bounds is measured.
    "candidate.numerics.simd_width",
    "candidate.numerics.fused_quantizer",
    "reference.numerics.simd_width",
    "reference.numerics.fused_quantizer",
    "results.prompts.*.steps.*.candidate_margin",
    "results.prompts.*.steps.*.reference_margin",
    "results.prompts.*.steps.*.logits.max_abs",
    "results.prompts.*.steps.*.logits.max_ulp",
)
"""Fields of a greedy receipt of engines that round differently that can be changed beyond those."""

UNPROVABLE_IN_WEIGHTS = (
    # Which files the checkpoint had, what tensors and keys are called, what a float tensor's values are like.
    "results.checkpoint",
    "results.checkpoint.*",
    "results.checkpoint.*.name",
    "results.checkpoint.*.sha256",
    "results.keys.*.key",
    "results.rows.*.compared.criterion",
    "results.rows.*.expected.largest",
    "results.rows.*.expected.source",
    "results.rows.*.facts.stored_bytes",
    "results.rows.*.facts.values.max",
    "results.rows.*.facts.values.min",
    "results.rows.*.facts.values.n_negative",
    "results.rows.*.facts.values.rms",
    "results.rows.*.name",
)
"""Fields of a weights receipt that can be changed beyond those of a comparison."""

UNPROVABLE_IN_SCORE = (
    # Equal logits are equal whoever computes them. Of the text there is a digest, and with a BOS windows of
    # any length score the same tokens.
    "candidate.numerics.fused_quantizer",
    "candidate.numerics.simd_width",
    "reference.numerics.fused_quantizer",
    "reference.numerics.simd_width",
    "model.shape.n_layers",
    "results.text.bos_id",
    "results.text.n_context",
    "results.text.sha256",
)
"""Fields of a score receipt that can be changed beyond those of a comparison."""

BY_KIND = {
    "greedy apart": UNPROVABLE_APART,
    "smoke": UNPROVABLE_IN_SMOKE,
    "smoke alone": UNPROVABLE_IN_SMOKE_ALONE,
    "selftest": UNPROVABLE_IN_SELFTEST,
    "metamorphic": UNPROVABLE_IN_METAMORPHIC,
    "bench": UNPROVABLE_IN_BENCH,
    "tokens": UNPROVABLE_IN_TOKENS,
    "weights": UNPROVABLE_IN_WEIGHTS,
    "score": UNPROVABLE_IN_SCORE,
}
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
    found = escaped(set(RECEIPTS) - set(BY_KIND))
    assert found - set(UNPROVABLE) == set(), "escapes the gate and is not listed"
    assert set(UNPROVABLE) - found == set(), "listed, but the gate catches every edit of it"


@pytest.mark.long
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=EXTRA if kind == "bench" else ()) for kind in BY_KIND])
def test_so_it_is_in_other_kinds(kind: str) -> None:
    beyond = escaped([kind]) - set(UNPROVABLE)
    assert beyond - set(BY_KIND[kind]) == set(), f"escapes the gate in a {kind} receipt and is not listed"
    assert set(BY_KIND[kind]) - beyond == set(), f"listed for {kind}, but the gate catches every edit of it"


@pytest.mark.parametrize("name", RECEIPTS)
def test_the_library_refuses_what_is_refused(name: str) -> None:
    """Of every 157st edit; receipts are checked by a function made of the schema."""
    whole = schema.validator("receipt.v1")
    some = [made for _, made in islice(mutants(name), 0, None, 157)]
    judged = [VALID(made) for made in some]
    assert judged == [whole.is_valid(made) for made in some]
    assert {True, False} == set(judged)


@pytest.mark.parametrize(
    ("mark", "fields"),
    [("unprovable", UNPROVABLE), *((f"unprovable in {kind}", fields) for kind, fields in BY_KIND.items())],
)
def test_the_documentation_lists_exactly_these_fields(mark: str, fields: tuple[str, ...]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "receipts.md").read_text(encoding="utf-8")
    listed = re.search(rf"<!-- {mark} -->\n```\n(.*?)\n```", page, re.S)
    assert listed is not None
    assert sorted(listed.group(1).split()) == sorted(fields)


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
