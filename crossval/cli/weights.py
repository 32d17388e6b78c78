"""``crossval weights``."""

from __future__ import annotations

from typing import Any

import click

import crossval
from crossval.cli.options import PATH, file, receipt_command
from crossval.receipts.file import Receipt


@receipt_command(
    "weights",
    click.argument("model", type=PATH),
    file(
        "--against", "against", "Hugging Face checkpoint: a folder, or one .safetensors file beside config.json."
    ),
)
def command(say: object, **options: Any) -> Receipt:
    """Compare a model file with the checkpoint it was made from, before any inference.

    Every code, scale, norm, table and key is compared. A tensor that differs is read in every known
    wrong way (layout, code table, order of rows, another tensor); a cause is named when exactly one
    gives every value. Without --against the file is described and checked by itself, and the exit
    code is at best 3. Exit 0 when all is equal, 1 when something is wrong.

    \b
    Example:
      crossval weights model.gguf --against bitnet-b1.58-2B-4T-bf16/
      crossval weights model.gguf
    """
    return crossval.check_weights(**options)
