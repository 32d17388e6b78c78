"""Digests of the model and the goldens that ship with crossval, pinned in ``policies/shipped.json``.

Renew with ``python -m crossval.receipts.shipped > crossval/receipts/policies/shipped.json`` after ``make record``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from bitnet_py.resources import default_model_path
from crossval.receipts.file import Receipt
from crossval.receipts.party import joint_digest
from crossval.receipts.policy import POLICIES

PINS = POLICIES / "shipped.json"


@functools.cache
def _pins() -> dict[str, Any]:
    pins: dict[str, Any] = json.loads(PINS.read_text(encoding="utf-8"))
    return pins


def models() -> set[str]:
    """Return the sha256 of the shipped model."""
    return {_pins()["model"]}


def trace_digests(receipt: Receipt) -> set[str]:
    """Return the digest of the shipped golden of a receipt's prompt, or of all its prompts."""
    prompts = receipt["results"].get("prompts") or [{"prompt_ids": receipt["prompt"]["token_ids"]}]
    asked = [one["prompt_ids"] for one in prompts]
    found = set()
    for goldens in _pins()["goldens"].values():
        digests = [golden["sha256"] for ids in asked for golden in goldens if golden["prompt_ids"] == ids]
        if len(digests) == len(asked):
            found.add(joint_digest(digests))
    return found


def pins(model: Path) -> dict[str, Any]:
    """Return what ``shipped.json`` has to hold for a model and its goldens, a series for each way to run.

    Raises:
        OSError, ValueError: a file cannot be read.
    """
    series: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(model.parent.glob(f"{model.stem}.goldens*/*/trace.json")):
        data = file.read_bytes()
        way = "-as-run" if file.parent.name.startswith("flash-") else ""
        golden = {
            "name": file.parent.name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "prompt_ids": json.loads(data)["prompt"]["token_ids"],
        }
        series.setdefault(file.parents[1].name + way, []).append(golden)
    return {"model": hashlib.sha256(model.read_bytes()).hexdigest(), "goldens": series}


if __name__ == "__main__":
    print(
        re.sub(
            r"\[[\d,\s]+\]", lambda ids: " ".join(ids[0].split()), json.dumps(pins(default_model_path()), indent=1)
        )
    )
