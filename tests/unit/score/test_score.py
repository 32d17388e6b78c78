"""``crossval score``: two engines over a text, one of them altered in one logit of one token."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

import crossval
from bitnet_py.score import score
from crossval import registry
from crossval.engines import bitnet_py as ours
from crossval.engines import session
from crossval.errors import BadInputError, UsageError
from crossval.passes import Numerics, TapArray
from crossval.receipts.policy import Policy
from crossval.score.run import Text
from crossval.terms import LOGITS, SIDES
from tests.support import receipt_samples as samples
from tests.support.strangers import error_line, run

TEXT = "the old river ran\n42"


class Altered(ours.BitnetPyRunner):
    """Ours, as the reference; in pass ``at`` the logit of token 3 is one step away, or tokens are others."""

    at: int | None = None
    other_tokens = False

    def __enter__(self):
        self.n = -1
        return super().__enter__()

    def eval(self, token_ids, select):
        made = super().eval(token_ids, select)
        self.n += 1
        if self.n == self.at:
            row = made.taps[LOGITS].array.copy()
            row[0, 3] = np.nextafter(row[0, 3], np.float32(np.inf))
            made.taps[LOGITS] = TapArray(row, (0,))
        return made

    def tokenize(self, text, **options):
        return super().tokenize(text, **options)[: -1 if self.other_tokens else None]


@pytest.fixture
def altered(monkeypatch, model_path, tmp_path):
    """Return ``altered(*words, **changes)``: run the command with a changed engine as the reference."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def command(*words, **changes):
        kind = type("Changed", (Altered,), changes)
        monkeypatch.setattr(session, "open_reference", lambda _word, path, _prompt, **_: kind(path, n_threads=1))
        options = ("--text", text, "--model", model_path, "--threads", "1", "--reference", "bitnet_py")
        return run("score", *options, *words)

    return command


def one_by_one(model, n_context):
    """The definition, each token a pass of its own, as engines of a comparison get them."""
    found, cache = [], model.new_cache()
    for n, target in enumerate(model.tokenizer.encode(TEXT, add_bos=False)):
        if n % (n_context - 1) == 0:
            cache.reset()
            before = model.tokenizer.bos_id
        row = model.forward([before], cache).logits[-1].astype(np.longdouble)
        found.append(float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]))
        before = target
    return np.array(found)


def test_equal_logits_are_counted_for_every_token(altered, tiny_model):
    result = altered("--json", "--context", "8")
    assert result.exit_code == 0, result.output
    receipt = json.loads(result.stdout)
    made, text = receipt["results"], receipt["results"]["text"]
    expected, alone = one_by_one(tiny_model, 8), score(tiny_model, TEXT.encode(), 8)
    assert made["n_scored"] == made["n_equal_logits"] == made["n_equal_nll"] == alone.nll.size
    assert (text["n_scored_bytes"], text["n_bytes"], text["n_context"]) == (len(TEXT), len(TEXT), 8)
    assert text["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert made["first_difference"] is None
    assert (receipt["verdict"], receipt["parity"]["logits_exact_match_rate"]) == ("pass", 1.0)
    assert any("only that one engine gives the same twice" in note for note in receipt["notes"])
    for side in SIDES:
        figures = made["figures"][side]
        np.testing.assert_allclose([row["nll"][side] for row in made["rows"]], expected, rtol=1e-13)
        assert figures["mean_nll"] == pytest.approx(expected.mean(), rel=1e-13)
        assert figures["perplexity"] == pytest.approx(np.exp(expected.mean()), rel=1e-12)
        assert figures["bits_per_byte"] == pytest.approx(expected.sum() / np.log(2) / len(TEXT), rel=1e-13)


def test_one_bit_of_one_logit_is_seen(altered, tmp_path):
    out = tmp_path / "score.json"
    result = altered("--json", "--receipt", out, at=5)
    assert result.exit_code == 1, result.output
    receipt = json.loads(result.stdout)
    made = receipt["results"]
    assert receipt["verdict"] == "fail"
    assert made["n_equal_logits"] == made["n_scored"] - 1
    assert (made["first_difference"]["position"], made["first_difference"]["n_different"]) == (5, 1)
    assert made["digests"]["candidate"] != made["digests"]["reference"]
    shown = altered(at=5).stdout
    assert f"equal in every bit for {made['n_scored'] - 1} of {made['n_scored']} scored tokens" in shown
    assert "scored token 5" in shown
    assert "FAIL" in shown
    assert "PARITY" not in shown
    judged = run("gate", out, "--reference-name", "bitnet_py")
    assert judged.exit_code == 1
    assert "FAIL" in judged.stdout


def test_other_tokens_are_a_difference(altered):
    result = altered(other_tokens=True)
    assert result.exit_code == 1, result.output
    assert "the tokenizers disagree" in result.stdout


def test_the_specification_is_compared_but_shows_no_fault(model_path, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a river")
    result = run("score", "--text", path, "--model", model_path, "--reference", "spec", "--threads", "1")
    assert result.exit_code == 3, result.output
    assert "do not state the same" in result.stdout


def test_a_text_from_standard_input(model_path, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a river")
    words = [sys.executable, "-m", "crossval", "score", "--model", model_path, "--reference", "spec", "--json"]
    with path.open("rb") as stdin:
        done = subprocess.run([*words, "--text", "-"], stdin=stdin, capture_output=True, check=False)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["results"]["text"]["n_bytes"] == 7


def test_what_cannot_be_scored(model_path, golden, tmp_path):
    def failed(*words, code=4):
        result = run("score", "--model", model_path, *words)
        assert result.exit_code == code, result.output
        return error_line(result)

    path = tmp_path / "text.txt"
    for text, message in ((b"", "the text is empty"), (b"ab\xff", "not UTF-8 at byte 2")):
        path.write_bytes(text)
        assert message in failed("--text", path)
    path.write_bytes(b"some text")
    assert "no-such-file" in failed("--text", tmp_path / "no-such-file")
    assert "the engines hold" in failed("--text", path, "--reference", "spec", "--context", "99999")
    assert "make fetch-cpp" in failed("--text", path, code=3)
    with pytest.raises(UsageError, match="live engines"):
        crossval.score_text("some text", model_path, reference=str(golden))
    with pytest.raises(BadInputError, match="the engines hold"):
        crossval.score_text("some text", model_path, reference="spec", n_context=99999)


# The receipt


def failed(receipt, policy=None):
    return [check.name for check in registry.judge(receipt, policy) if not check.passed]


def test_a_receipt_of_equal_logits_passes():
    made = samples.score_receipt()
    assert (made["verdict"], failed(made)) == ("pass", [])
    assert failed(made, Policy(require_bitwise=True, tolerance="same", min_logit_match=1.0)) == []
    assert made["results"]["figures"]["candidate"]["mean_nll"] == 12.125 / 6


def test_a_receipt_of_unequal_logits_does_not():
    made = samples.score_receipt(samples.score_result(n_different=(0, 0, 3, 0, 1, 0)))
    assert made["verdict"] == "fail"
    assert failed(made, Policy(require_bitwise=True, min_logit_match=0.9)) == ["verdict", "logit match", "bitwise"]


def test_unequal_logits_of_engines_that_round_otherwise_show_no_fault():
    other = dataclasses.replace(samples.THEIRS, numerics=Numerics(simd_width=16, fused_quantizer=False))
    result = samples.score_result(
        n_different=(0, 0, 3, 0, 1, 0), engines={"candidate": samples.OURS, "reference": other}
    )
    made = samples.score_receipt(result, reference=samples.Party("live", other))
    assert made["verdict"] == "incomplete"
    assert any("do not state the same arithmetic" in note for note in made["notes"])


FORGED = {
    "a perplexity": ("summary", ("results", "figures", "candidate", "perplexity"), 3.0),
    "a count": ("summary", ("results", "n_equal_logits"), 5),
    "a likelihood": ("tokens", ("results", "rows", 1, "nll", "candidate"), 0.5),
    "a likelihood below 0": ("tokens", ("results", "rows", 1, "nll", "candidate"), -0.5),
    "a token": ("structure", ("results", "rows", 1, "token_id"), 62),
    "a digest": ("tokens", ("results", "digests", "candidate"), "3" * 64),
    "more logits than there are": ("tokens", ("results", "rows", 1, "n_different"), 301),
    "a hidden difference": ("first difference", ("results", "rows", 1, "n_different"), 1),
    "no BOS": ("structure", ("results", "text", "bos_id"), None),
    "another text": ("structure", ("prompt", "token_ids"), [81, 61]),
    "a window that no engine holds": ("structure", ("results", "text", "n_context"), 100_000),
    "fewer bytes": ("structure", ("results", "text", "n_scored_bytes"), 18),
    "a criterion": ("thresholds", ("thresholds", "least_equal"), 0.5),
    "a recorded engine": ("structure", ("reference", "status"), "recorded"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_field_contradicts_the_others(name):
    check, path, value = FORGED[name]
    assert check in failed(samples.forge(samples.score_receipt(), *path, value))


def test_a_first_difference_that_is_not_the_first():
    made = samples.score_receipt(samples.score_result(n_different=(0, 0, 3, 0, 1, 0)))
    for path, value in (("position", 4), ("n_different", 1), ("largest_difference", -1.0)):
        assert "first difference" in failed(samples.forge(made, "results", "first_difference", path, value))


def test_text_without_bos_is_scored_from_its_second_token_on():
    ids = samples.SCORED_IDS
    result = samples.score_result(text=Text("ab" * 32, 19, 17, 4, None))
    scored = dataclasses.replace(result.scored, tokens=result.scored.tokens[1:])
    made = samples.score_receipt(dataclasses.replace(result, scored=scored), token_ids=ids)
    assert failed(made) == []
