"""``crossval sign``."""

from __future__ import annotations

from pathlib import Path

import click

from crossval.cli.options import PATH
from crossval.errors import BadInputError
from crossval.receipts import file as receipt
from crossval.receipts import gate, signature
from crossval.registry import KINDS
from crossval.sweep import check, summary


@click.command("sign")
@click.argument("path", type=PATH, metavar="RECEIPT")
@click.option("--key", type=PATH, required=True, metavar="PEM", help="Private ed25519 key (PKCS #8).")
@click.option("-o", "--output", type=PATH, metavar="OUT", help="Default: RECEIPT.intoto.jsonl, read by the gate.")
def command(path: Path, key: Path, output: Path | None) -> None:
    """Sign a receipt, or a sweep's summary: an in-toto statement in a DSSE envelope beside it.

    What is signed is the file's sha256 and the receipt's digest. A receipt that contradicts itself
    is not signed; whether it passes a policy is for the gate to say.

    \b
    Example:
      openssl genpkey -algorithm ed25519 -out key.pem
      openssl pkey -in key.pem -pubout -out key.pub
      crossval sign my-receipt.json --key key.pem
      crossval gate my-receipt.json --require-signature key.pub
    """
    if summary.is_summary(path):
        made = summary.read(path)
        wrong = check.contradictions(path, made)
    else:
        made = receipt.read(path)
        found = {} if made["thresholds"] is None else gate.complaints(KINDS[made.kind].kind, made)
        wrong = [f"{name}: {complaints[0]}" for name, complaints in found.items() if complaints]
        if made["digest"] != receipt.digest(made):
            wrong.insert(0, "its digest is not that of its contents")
    if wrong:
        raise BadInputError(f"{path}: not signed, it contradicts itself: {wrong[0]}")
    click.echo(signature.sign(path, made, key, output))
