"""``crossval metamorphic``: command, receipt and gate."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from crossval import registry
from crossval.cli import cli
from crossval.engines.bitnet_py import BitnetPyRunner
from crossval.engines.model_file import check_model
from crossval.errors import UnavailableError
from crossval.model import taps
from crossval.passes import Numerics, PassRecord, TapArray
from crossval.receipts import file as receipt
from crossval.receipts.file import Receipt
from crossval.repeat.metamorphic.cases import MetamorphicOptions, required
from crossval.repeat.metamorphic.receipt import STATES
from crossval.repeat.metamorphic.relations import enough_tokens, run_metamorphic
from crossval.repeat.metamorphic.scope import Form, compared_taps, n_values
from crossval.traces.read import TraceModel
from tests.support.extra import sampled

LENGTHS = (1, 2, 5)
SHAPE = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "dim", "hidden_dim", "vocab_size")
ARGUMENTS = ["--lengths", "1,2,5", "--thread-counts", "1,2"]


@pytest.fixture(scope="module")
def model_path(make_model: Callable[..., Path]) -> Path:
    return make_model(n_layers=2, dim=128, n_heads=2, n_kv_heads=1, hidden_dim=256, vocab_size=301, seed=5)


def run(model: Path, *arguments: Any) -> Result:
    words = [str(word) for word in ("metamorphic", "--model", model, *ARGUMENTS, *arguments)]
    return CliRunner().invoke(cli, words, prog_name="crossval")


@pytest.fixture(scope="module")
def good(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Receipt:
    path = tmp_path_factory.mktemp("metamorphic") / "r.json"
    result = run(model_path, "--receipt", path)
    assert result.exit_code == 0, result.output
    assert "PASS  candidate: " in result.output
    assert CliRunner().invoke(cli, ["gate", str(path)]).exit_code == 0
    return receipt.read(path)


def failures(made: Receipt) -> list[str]:
    return [check.name for check in registry.judge(receipt.seal(made)) if not check.passed]


def test_a_right_engine_passes_and_everything_asked_for_is_there(good: Receipt) -> None:
    rows = good["results"]["rows"]
    assert good["verdict"] == "pass"
    assert {row["name"] for row in rows} == {
        "one_by_one", "prefix", "split", "reset", "capture", "threads", "kernels",
    }  # fmt: skip
    assert good["coverage"]["required"] == good["coverage"]["compared"] == len(rows)
    assert good["results"]["summary"]["candidate"]["ok"] == len(rows)
    assert good["reference"]["status"] == "unused"
    assert failures(good) == []


MARCH, UNSTATED = Numerics(8, False), Numerics()
MAIN = Numerics(16, False, generation="main", flash_attention=False)


@pytest.mark.parametrize(
    ("numerics", "shape", "lengths"),
    sampled(
        product(
            (MARCH, UNSTATED, MAIN),
            ({"n_heads": 1, "n_kv_heads": 1}, {"n_heads": 2, "n_kv_heads": 1}),
            [(1,), (2,), (1, 2, 5), (33, 4), (7,)],
        ),
        4,
        tuple,
    ),
)
def test_what_is_required_is_what_is_made(make_model, lengths, shape, numerics):
    stated, main = numerics.simd_width is not None, numerics.generation == "main"

    class Engine(BitnetPyRunner):
        @property
        def identity(self):
            identity = super().identity
            return identity if stated else identity.__class__(identity.name, settings=identity.settings)

    model = make_model(n_layers=2, dim=128, hidden_dim=256, vocab_size=301, **shape)
    options = MetamorphicOptions(lengths, (1, 2), ("scalar",))
    result = run_metamorphic(
        lambda **asked: Engine(model, numerics=numerics, **asked),
        enough_tokens([], 301, options.n_tokens),
        n_layers=2,
        options=options,
    )
    assert result.verdict == "holds", [c for c in result.checks if c.status != "ok"]
    made = [(check.name, check.case, check.expectation) for check in result.checks]
    wanted = list(required(options, stated=stated, scores_vary=main or shape["n_heads"] == 1))
    assert made == [one.key for one in wanted]
    facts = check_model(model).facts["shape"]
    shape_of = TraceModel(sha256="", **{name: facts[name] for name in SHAPE})
    form = Form.of(shape["n_heads"], numerics)
    compared = {taps.parse(name).tap for one in wanted for name in compared_taps(one, 2, form)}
    assert compared == set(taps.of_graph(None)) - ({"ffn_act"} if main else set())
    counts = [n_values(one, shape_of, "last layer", form, sub_norms=True, scope="all") for one in wanted]
    assert [check.n_compared for check in result.checks] == counts
    assert result.n_required == len(made)


def test_an_engine_that_depends_on_the_pass_fails(model_path, tmp_path, monkeypatch):
    whole = BitnetPyRunner.eval

    def wrong(self: Any, token_ids: Any, select: Any) -> PassRecord:
        record = whole(self, token_ids, select)
        taps = dict(record.taps)
        if len(token_ids) > 4 and "blk.0.v" in taps:
            taps["blk.0.v"] = TapArray(taps["blk.0.v"].array + np.float32(1), taps["blk.0.v"].rows)
        return PassRecord(record.plan, taps)

    monkeypatch.setattr(BitnetPyRunner, "eval", wrong)
    path = tmp_path / "r.json"
    result = run(model_path, "--receipt", path)
    assert result.exit_code == 1, result.output
    assert "blk.0.v" in result.output
    assert "FAIL  candidate: " in result.output
    made = receipt.read(path)
    failed = {row["name"] for row in made["results"]["rows"] if row["status"] == "failed"}
    assert failed == {"one_by_one", "prefix", "split"}
    assert failures(made) == ["verdict"]


def test_what_cannot_be_run_is_incomplete(model_path, tmp_path):
    path = tmp_path / "r.json"
    result = run(model_path, "--candidate", "spec", "--receipt", path)
    assert result.exit_code == 3, result.output
    made = receipt.read(path)
    unchecked = {row["name"] for row in made["results"]["rows"] if row["status"] == "unchecked"}
    assert unchecked == {"threads"}  # only bitnet_py has kernels to choose
    assert "verdict" in failures(made)


def test_the_first_element_that_differs_is_shown_in_both_runs(model_path, tmp_path, monkeypatch):
    whole = BitnetPyRunner.eval

    def wrong(self: Any, token_ids: Any, select: Any) -> PassRecord:
        record = whole(self, token_ids, select)
        taken = record.taps.get("blk.0.v")
        if taken is None or self.identity.settings["n_threads"] != 2:
            return record
        array = taken.array.copy()
        array[-1, 0, 7] += np.float32(100)
        return PassRecord(record.plan, {**record.taps, "blk.0.v": TapArray(array, taken.rows)})

    monkeypatch.setattr(BitnetPyRunner, "eval", wrong)
    path = tmp_path / "r.json"
    result = run(model_path, "--threads", "1", "--receipt", path)
    assert result.exit_code == 1, result.output
    assert "failed     candidate: threads, 2 threads: " in result.output
    made = receipt.read(path)
    (row,) = [row for row in made["results"]["rows"] if row["status"] == "failed"]
    ours, usual = row["element"]["values"]
    assert ours - usual == pytest.approx(100, abs=1e-4)
    assert row["element"]["index"] == [0, 7]
    place = f"blk.0.v, token {row['element']['token']}, pass 0"
    assert row["where"] == place
    assert f"{place}, element 0, 7: {ours:.9g} so, {usual:.9g} as usual" in result.output
    assert failures(made) == ["verdict"]


def test_kernels_that_are_named(model_path, tmp_path):
    path = tmp_path / "r.json"
    result = run(model_path, "--kernels", "scalar,scalar", "--receipt", path)
    assert result.exit_code == 0, result.output
    made = receipt.read(path)
    assert made["thresholds"]["kernels"] == ["scalar"]
    assert [row["case"] for row in made["results"]["rows"] if row["name"] == "kernels"] == ["scalar"]
    assert failures(made) == []


def test_a_kernel_that_this_cpu_lacks_is_left_open(model_path, tmp_path, monkeypatch):
    opened = BitnetPyRunner.__enter__

    def lacking(self: BitnetPyRunner) -> BitnetPyRunner:
        if self._options["kernel"] == "scalar":
            raise UnavailableError("this CPU lacks it")
        return opened(self)

    monkeypatch.setattr(BitnetPyRunner, "__enter__", lacking)
    path = tmp_path / "r.json"
    result = run(model_path, "--kernels", "scalar", "--receipt", path)
    assert result.exit_code == 3, result.output
    assert "kernels, scalar: not checked (cannot be run: this CPU lacks it)" in result.output
    assert set(failures(receipt.read(path))) == {"verdict", "relations of the candidate"}


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("--lengths", "1"), "prefix, split"),
        (("--threads", "2", "--thread-counts", "2"), "threads (only 2, with which everything else was run)"),
    ],
)
def test_a_receipt_that_shows_less_than_every_relation_is_refused(model_path, tmp_path, arguments, missing):
    path = tmp_path / "r.json"
    result = run(model_path, *arguments, "--receipt", path)
    assert result.exit_code == 0, result.output
    checks = {check.name: check for check in registry.judge(receipt.read(path)) if not check.passed}
    assert list(checks) == ["relations of the candidate"]
    assert checks["relations of the candidate"].detail == f"not shown: {missing}"


@pytest.mark.parametrize("engine", ["reference", "both"])
def test_a_reference_that_is_not_there_is_said_to_be_missing(model_path, tmp_path, monkeypatch, engine):
    monkeypatch.setattr("crossval.bitnet_cpp.library.find_library", lambda: None)
    path = tmp_path / "r.json"
    result = run(model_path, "--engine", engine, "--receipt", path)
    assert result.exit_code == 3, result.output
    assert "what is recorded of it cannot be run in another way; run `make fetch-cpp`" in result.stderr
    made = receipt.read(path)
    assert (made["verdict"], made["results"]["rows"]) == ("incomplete", [])
    assert failures(made)


def test_a_trace_cannot_be_run_again(shipped_model):
    golden = next(iter(sorted(shipped_model.with_suffix(".goldens").iterdir())))
    result = CliRunner().invoke(cli, ["metamorphic", "--candidate", str(golden)])
    assert result.exit_code == 3, result.output
    assert "the candidate is a recorded trace of one prompt and cannot be run in another way" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lengths", ""),
        ("--lengths", "0"),
        ("--lengths", "1,,2"),
        ("--lengths", "-1"),
        ("--lengths", "99999999999999"),
        ("--thread-counts", "x"),
        ("--kernels", "mmx"),
        ("--kernels", ""),
        ("--kernels", "scalar", "--engine", "reference"),
        ("--engine", "none"),
    ],
)
def test_wrong_words_are_a_usage_error(model_path, arguments):
    result = run(model_path, *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


def test_more_tokens_than_the_context_holds(make_model):
    model = make_model(n_layers=1, dim=128, n_heads=2, n_kv_heads=1, hidden_dim=256, context_length=16)
    result = CliRunner().invoke(cli, ["metamorphic", "--model", str(model)])
    assert result.exit_code == 4, result.output
    assert "the model's context holds 16" in result.stderr


def test_a_prompt_begins_the_tokens(model_path, tmp_path):
    path = tmp_path / "r.json"
    result = run(model_path, "--prompt", "Hello", "--receipt", path)
    assert result.exit_code == 0, result.output
    made = receipt.read(path)
    with BitnetPyRunner(model_path) as runner:
        ids = runner.tokenize("Hello")
    assert made["prompt"]["token_ids"][: len(ids)] == ids
    assert made["prompt"]["text"] == "Hello"


def forged(good: Receipt, change: Callable[[Receipt], None]) -> list[str]:
    made = copy.deepcopy(good)
    change(made)
    return failures(made)


def _drop(made: Receipt) -> None:
    del made["results"]["rows"][3]


def _empty(made: Receipt) -> None:
    made["results"]["rows"] = []


def _flip(made: Receipt) -> None:
    made["results"]["rows"][0]["status"] = "unchecked"


def _differ(made: Receipt) -> None:
    made["results"]["rows"][0]["n_different"] = 1


def _nothing(made: Receipt) -> None:
    for row in made["results"]["rows"]:
        row["n_compared"] = 0


def _softer(made: Receipt) -> None:
    row = next(row for row in made["results"]["rows"] if row["expectation"] == "bits")
    row["expectation"] = "floor"


def _beyond(made: Receipt) -> None:
    next(row for row in made["results"]["rows"] if row["expectation"] == "floor")["worst"] = 1.5


def _shorter(made: Receipt) -> None:
    made["thresholds"]["lengths"] = [1]


def _recorded(made: Receipt) -> None:
    made["candidate"]["status"] = "recorded"


def _unused(made: Receipt) -> None:
    made["candidate"]["status"] = "unused"


def _count(made: Receipt) -> None:
    made["results"]["summary"]["candidate"]["ok"] += 1


def _one_value(made: Receipt) -> None:
    made["results"]["rows"][0]["n_compared"] = 1


def _few_values(made: Receipt) -> None:
    for row in made["results"]["rows"]:
        row.update(n_compared=min(row["n_compared"], 4), n_different=min(row["n_different"], 2))


def _wider(made: Receipt) -> None:
    made["model"]["shape"]["dim"] *= 2


def _deeper(made: Receipt) -> None:
    made["model"]["shape"]["n_layers"] += 1


def _beyond_reason(made: Receipt) -> None:
    made["model"]["shape"]["n_layers"] = 2**53 - 1


def _decoded(made: Receipt) -> None:
    made["thresholds"]["n_decode"] += 1


def _nowhere(made: Receipt) -> None:
    next(row for row in made["results"]["rows"] if row["expectation"] == "floor")["where"] = "blk.7.l_out, token 0"


def _not_compared(made: Receipt) -> None:
    next(row for row in made["results"]["rows"] if row["expectation"] == "floor")["where"] = "blk.0.q, token 0"


def _later_token(made: Receipt) -> None:
    next(row for row in made["results"]["rows"] if row["expectation"] == "floor")["where"] = (
        "blk.0.kqv_out, token 9"
    )


def _another_pass(made: Receipt) -> None:
    row = next(row for row in made["results"]["rows"] if row["case"] == "2 tokens, all layers")
    assert row["where"].endswith((", token 0, pass 0", ", token 1, passes 0 and 1"))
    row["where"] = row["where"].partition(", pass")[0] + ", passes 0 and 2"


def _outline(made: Receipt) -> None:
    made["thresholds"]["taps"] = "outline"


def _unsaid(made: Receipt) -> None:
    del made["thresholds"]["taps"]


def _element(made: Receipt) -> None:
    made["results"]["rows"][0]["element"] = {"token": 0, "index": [0], "values": [1.0, 2.0]}


def _missing(made: Receipt) -> None:
    made["results"]["rows"][1]["missing"] = ["blk.1.q"]  # of a check of layer 0


def _note(made: Receipt) -> None:
    made["results"]["rows"][0]["note"] = "so it goes"


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_one_value, "values"),
        (_few_values, "values"),
        (_wider, "values"),
        (_deeper, "values"),
        (_beyond_reason, "values"),
        (_decoded, "values"),
        (_nowhere, "values"),
        (_not_compared, "values"),
        (_later_token, "values"),
        (_another_pass, "values"),
        (_outline, "values"),
        (_unsaid, "values"),
        (_element, "row status"),
        (_missing, "values"),
        (_note, "row status"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).strip("_"),
)
def test_what_was_compared_follows_from_model_and_passes(good, change, check):
    assert check in forged(good, change)


@pytest.mark.parametrize(
    "change",
    [_drop, _empty, _flip, _differ, _nothing, _softer, _beyond, _shorter, _recorded, _unused, _count],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_receipt_that_says_otherwise_is_refused(good, change):
    assert forged(good, change)


def test_a_failed_engine_cannot_be_made_to_pass(good):
    def fail(made: Receipt) -> None:
        row = made["results"]["rows"][0]
        row.update(n_different=3, status="failed", where="blk.0.v, token 0", worst=0.5)
        made["results"]["summary"]["candidate"].update(
            {"verdict": "violated", "ok": len(made["results"]["rows"]) - 1, "failed": 1}
        )

    assert "verdict" in forged(good, fail)
    assert json.dumps(good)  # unchanged
    assert set(STATES) < set(good["results"]["summary"]["candidate"])
