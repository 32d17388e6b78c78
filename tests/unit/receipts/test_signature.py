"""Signed receipts: made and checked by a library; anything else than the signed receipt does not pass."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from crossval.receipts import file, signature
from crossval.receipts.file import seal
from tests.support import receipt_samples as samples
from tests.support.signing import keys
from tests.support.strangers import error_line, run

pytest.importorskip("securesystemslib", reason="needs securesystemslib: pip install -e '.[sign]'")


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A receipt, its signer's private and public key; the envelope is beside the receipt."""
    path = tmp_path / "receipt.json"
    file.write(path, samples.layers_receipt())
    private, public = keys(tmp_path, "signer")
    result = run("sign", path, "--key", private)
    assert (result.exit_code, result.stdout.strip()) == (0, f"{path}.intoto.jsonl")
    return path, private, public


def passes(path: Path, *public: Path) -> bool:
    check = signature.check(path, file.read(path), public)
    assert "\n" not in check.detail
    return check.passed


def test_the_gate_asks_for_a_signature(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, _, public = signed
    _, other = keys(tmp_path, "other")
    assert run("gate", path, "--require-signature", public).exit_code == 0
    assert run("gate", path, "--require-signature", other, "--require-signature", public).exit_code == 0
    assert run("gate", path, "--require-signature", other).exit_code == 1
    signature.envelope_path(path).unlink()
    refused = run("gate", path, "--require-signature", public)
    assert refused.exit_code == 1
    assert "No such file" in refused.stdout
    assert run("gate", path).exit_code == 0


def test_only_what_was_signed_passes(signed: tuple[Path, Path, Path]) -> None:
    path, _, public = signed
    made, envelope = file.read(path), signature.envelope_path(path)
    assert passes(path, public)
    file.write(path, seal({**made, "notes": ["x"]}))
    assert not passes(path, public)
    path.write_text(file.to_text(made))  # the same contents, laid out otherwise
    assert not passes(path, public)
    file.write(path, made)
    assert passes(path, public)
    good = envelope.read_text()
    value = json.loads(good)
    payload = json.loads(base64.b64decode(value["payload"]))
    assert payload["_type"] == "https://in-toto.io/Statement/v1"
    changed = base64.b64encode(json.dumps({**payload, "predicate": {}}).encode()).decode()
    for broken in (
        json.dumps({**value, "payload": changed}),
        json.dumps({**value, "payloadType": "text/plain"}),
        json.dumps({**value, "signatures": []}),
        json.dumps({**value, "signatures": [{"keyid": "0", "sig": "AA=="}]}),
        "",
        "[]",
        "{}",
        "x" * 2_000_000,
    ):
        envelope.write_text(broken)
        assert not passes(path, public), broken[:100]
    envelope.write_text(good)
    assert passes(path, public)


@pytest.mark.parametrize("statement", [b"[]", b'{"_type": "x"}', b"x", b'{"subject": []}'])
def test_a_signed_statement_of_another_kind_does_not_pass(
    statement: bytes, signed: tuple[Path, Path, Path]
) -> None:
    from cryptography.hazmat.primitives import serialization
    from securesystemslib import dsse, signer

    path, private, public = signed
    envelope = dsse.Envelope(statement, signature.PAYLOAD_TYPE, {})
    envelope.sign(signer.CryptoSigner(serialization.load_pem_private_key(private.read_bytes(), None)))
    signature.envelope_path(path).write_text(json.dumps(envelope.to_dict()))
    assert not passes(path, public)


def test_keys_that_are_none(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    path, private, public = signed
    other, other_public = keys(tmp_path, "other", "Ed448")
    for key in (public, other, tmp_path / "missing", path):
        assert run("sign", path, "--key", key).exit_code == 4
        assert "key" in error_line(run("sign", path, "--key", key))
    for key in (private, other_public, tmp_path / "missing", path):
        assert run("gate", path, "--require-signature", key).exit_code == 4


def test_what_contradicts_itself_is_not_signed(signed: tuple[Path, Path, Path]) -> None:
    path, private, _ = signed
    made = dict(file.read(path))
    for forged in (seal({**made, "verdict": "candidate_defect"}), {**made, "notes": ["x"]}):
        file.write(path, forged)
        refused = run("sign", path, "--key", private)
        assert refused.exit_code == 4
        assert "contradicts itself" in error_line(refused)
