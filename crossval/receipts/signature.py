"""Signed receipts: an in-toto statement in a DSSE envelope beside the file, ed25519 (docs/trust.md).

Envelope, keys and signatures are those of ``securesystemslib`` (extra ``sign``); nothing here computes any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256, read_limited, write_atomically
from crossval.receipts.file import Receipt, digest
from crossval.receipts.policy import GateCheck
from crossval.schema import one_line, parse_json

SUFFIX = ".intoto.jsonl"
"""Not ``.json``: ``crossval gate receipts/*.json`` is for receipts."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:bitnet-parity:receipt:v1"
HOW_TO_GET = "pip install 'bitnet-parity[sign]'"
_MAX_BYTES = 1 << 20
_MAX_KEY_BYTES = 1 << 16


def envelope_path(receipt: Path) -> Path:
    """Return where the signature of a receipt's file is."""
    return receipt.with_name(receipt.name + SUFFIX)


def sign(path: Path, made: Receipt, key: Path, output: Path | None = None) -> Path:
    """Sign a receipt that was read from a file; return the path of the envelope.

    ``key``: an ed25519 private key, PEM (PKCS #8), without passphrase.

    Raises:
        BadInputError: the key cannot be read, is of another kind, or the envelope cannot be written.
        UnavailableError: the library is not installed.
    """
    dsse, signer = _library()
    private = _key(key, private=True)
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": path.name, "digest": {"sha256": file_sha256(path)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {name: made[name] for name in ("kind", "verdict", "digest", "created_at", "tool")},
    }
    envelope = dsse.Envelope(json.dumps(statement, sort_keys=True).encode(), PAYLOAD_TYPE, {})
    envelope.sign(signer.CryptoSigner(private))
    target = output or envelope_path(path)
    try:
        write_atomically(target, (json.dumps(envelope.to_dict()) + "\n").encode())
    except OSError as error:
        raise BadInputError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def check(path: Path, made: Receipt, keys: Sequence[Path]) -> GateCheck:
    """Return the check that one of the keys signed this receipt, in the envelope beside its file.

    Raises:
        BadInputError: a key cannot be read or is of another kind.
        UnavailableError: the library is not installed.
    """
    dsse, signer = _library()
    accepted = [signer.SSlibKey.from_crypto(_key(key, private=False)) for key in keys]
    try:
        file = envelope_path(path)
        envelope = dsse.Envelope.from_dict(parse_json(read_limited(file, "signature", _MAX_BYTES), str(file)))
        signers = envelope.verify(accepted, 1)
        if envelope.payload_type != PAYLOAD_TYPE:
            return GateCheck("signature", False, f"signed is {envelope.payload_type!r:.80}, no statement")
        statement = parse_json(envelope.payload, f"{file}: statement")
        stated = (statement["_type"], statement["predicateType"], statement["predicate"]["digest"])
        subjects = [one["digest"]["sha256"] for one in statement["subject"]]
    except BadInputError as error:
        return GateCheck("signature", False, one_line(error))
    except Exception as error:  # the library raises many kinds on malformed envelopes
        return GateCheck("signature", False, f"{type(error).__name__}: {one_line(error)}")
    if stated != (STATEMENT_TYPE, PREDICATE_TYPE, digest(made)) or subjects != [file_sha256(path)]:
        return GateCheck("signature", False, "what was signed is another receipt, or another statement")
    return GateCheck("signature", True, f"by key {next(iter(signers))[:16]}")


def _library() -> tuple[Any, Any]:
    try:
        from securesystemslib import dsse, signer
    except ImportError as error:
        raise UnavailableError(f"signatures need securesystemslib: {HOW_TO_GET}") from error
    return dsse, signer


def _key(path: Path, *, private: bool) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UnavailableError(f"signatures need cryptography: {HOW_TO_GET}") from error
    what, data = "private key" if private else "public key", read_limited(path, "key", _MAX_KEY_BYTES)
    try:
        found: Any = (
            serialization.load_pem_private_key(data, None) if private else serialization.load_pem_public_key(data)
        )
    except Exception as error:  # not PEM, encrypted, of an unknown kind
        raise BadInputError(f"{path}: not a {what} in PEM: {one_line(error, 120)}") from error
    if not isinstance(found, ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey):
        raise BadInputError(f"{path}: not an ed25519 {what}")
    return found
