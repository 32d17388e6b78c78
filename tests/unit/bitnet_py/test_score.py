"""``bitnet score`` against a plain recomputation: one token at a time, log-softmax written out."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from bitnet_py import cli
from bitnet_py.errors import InputError, ModelError
from bitnet_py.model import Model
from bitnet_py.score import negative_log_likelihood, perplexity, score, windows

TEXT = b"the old river <|eot_id|> ran\n\xc3\xa9 42"


def bitnet(*args, stdin=None):
    return CliRunner().invoke(cli.main, ["score", *map(str, args)], input=stdin)


def log_loss(row, target):
    row = row.astype(np.longdouble)
    return float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])


def plain_nll(model, text, n_context, bos):
    """The same figures from the definition: every token's context a prompt of its own, another token behind it.

    That token makes it a pass of several rows, whose head rounds otherwise than that of one row.
    """
    ids = model.tokenizer.encode(text.decode(), add_bos=False, parse_special=False)
    todo = ids if bos is not None else ids[1:]
    found = []
    for n, target in enumerate(todo):
        begun = n - n % (n_context - 1)
        n_window = min(n_context - 1, len(todo) - begun)
        context = [bos if bos is not None else ids[begun], *todo[begun:n]]
        prompt = [*context, 0] if n_window > 1 else context
        rows = model.forward(prompt, model.new_cache(), logits="all").logits
        found.append(log_loss(rows[len(context) - 1], target))
    return np.array(found)


@pytest.mark.parametrize("n_context", [2, 5, 64])
def test_every_token_is_scored_once_given_its_window(tiny_model, n_context):
    v = tiny_model.tokenizer.vocabulary
    found = score(tiny_model, TEXT, n_context)
    expected = plain_nll(tiny_model, TEXT, n_context, v.bos_id)
    assert v.add_bos
    assert found.nll.size == len(tiny_model.tokenizer.encode(TEXT.decode(), add_bos=False, parse_special=False))
    np.testing.assert_allclose(found.nll, expected, rtol=1e-13)
    assert found.n_windows == math.ceil(expected.size / (n_context - 1))
    assert found.n_bytes == len(TEXT)
    assert found.bits_per_byte == pytest.approx(found.nll.sum() / math.log(2) / len(TEXT), rel=1e-15)


def test_passes_of_a_window_continue_each_other(make_model):
    with Model.from_gguf(make_model(), n_threads=1, n_ubatch=3) as model:
        ids = model.tokenizer.encode(TEXT.decode(), parse_special=False)
        rows = model.forward(ids[:-1], model.new_cache(), logits="all").logits
        expected = [log_loss(row, target) for row, target in zip(rows, ids[1:], strict=True)]
        np.testing.assert_allclose(score(model, TEXT).nll, expected, rtol=1e-13)


def test_without_bos_the_first_token_is_only_context(tiny_model, monkeypatch):
    vocabulary = tiny_model.tokenizer.vocabulary
    object.__setattr__(vocabulary, "add_bos", False)
    ids = tiny_model.tokenizer.encode(TEXT.decode(), parse_special=False)
    found = score(tiny_model, TEXT, 5)
    np.testing.assert_allclose(found.nll, plain_nll(tiny_model, TEXT, 5, None), rtol=1e-13)
    assert found.nll.size == len(ids) - 1
    assert found.n_bytes == len(TEXT) - len(tiny_model.tokenizer.token_bytes(ids[0]))
    with pytest.raises(InputError, match="one token and the vocabulary adds no BOS"):
        score(tiny_model, tiny_model.tokenizer.decode_bytes(ids[:1]))


def test_windows_cover_a_text_without_gap_or_overlap():
    ids = list(range(100, 110))
    for bos in (7, None):
        for n_context in range(2, 13):
            pieces = windows(ids, bos, n_context)
            scored = [token for one in pieces for token in one.scored]
            assert scored == (ids if bos is not None else ids[1:])
            assert all(len(one.inputs) == len(one.scored) <= n_context - 1 for one in pieces)
            before = {token: previous for previous, token in pairwise(ids)}
            assert all(one.first == (bos if bos is not None else before[one.scored[0]]) for one in pieces)


def test_likelihoods_of_extreme_logits():
    row = np.array([1e30, 0, -1e30], np.float32)
    assert negative_log_likelihood(row, 0) == 0
    assert negative_log_likelihood(row, 1) == float(row[0])
    assert negative_log_likelihood(np.full(8, 3e38, np.float32), 5) == pytest.approx(
        math.log(8), rel=1e-7, abs=1e25
    )
    assert negative_log_likelihood(np.zeros(8, np.float32), 5) == math.log(8)
    with pytest.raises(ModelError, match="not finite"):
        negative_log_likelihood(np.array([0, np.nan], np.float32), 0)
    assert perplexity(1e6) == math.inf


def test_the_command_prints_what_the_function_returns(tiny_model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    found = score(tiny_model, TEXT, 8)
    words = ("--model", tiny_model.path, "--threads", 1, "--context", 8)
    given = json.loads(bitnet(*words, "--json", "-", stdin=TEXT).stdout)
    assert given == {
        "model": str(tiny_model.path),
        "n_scored": found.nll.size,
        "n_bytes": len(TEXT),
        "n_windows": found.n_windows,
        "n_context": 8,
        "mean_nll": found.mean_nll,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
    }
    shown = bitnet(*words, path).stdout.split("\n")
    assert shown[0] == f"tokens scored  {found.nll.size} in {found.n_windows} windows of up to 8"
    assert shown[1:3] == [
        f"mean NLL       {found.mean_nll:.6f} nats per token",
        f"perplexity     {found.perplexity:.4f}",
    ]
    assert shown[3] == f"bits per byte  {found.bits_per_byte:.4f} over {len(TEXT)} bytes"


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (b"", (), "the text is empty"),
        (b"ab\xff", (), "not UTF-8 at byte 2"),
        (b"a", ("--context", 99999), "windows of 99999 tokens do not fit the model's context of"),
        (None, (), "no-such-file"),
    ],
)
def test_an_unusable_text_is_one_clear_line(make_model, text, words, message):
    result = bitnet("--model", make_model(), *words, "no-such-file" if text is None else "-", stdin=text)
    assert result.exit_code == 4, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_one_token_is_scored_after_bos(make_model):
    assert bitnet("--model", make_model(), "-", stdin=b"a").stdout.startswith("tokens scored  1 in 1 window of")
