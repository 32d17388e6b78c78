"""Describe a GGUF file for people and machines: what ``bitnet inspect`` shows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import click
import numpy as np

from bitnet_py.config import ModelConfig
from bitnet_py.errors import BitnetError
from bitnet_py.gguf import GGUFFile
from bitnet_py.string_array import StringArray

MAX_ITEMS = 16
"""Longer arrays are shown by their length and first entries."""
_N_FIRST = 4


def describe(gguf: GGUFFile) -> tuple[dict[str, Any], BitnetError | None]:
    """Return ``gguf`` as plain JSON values, and why this engine cannot run it (None: it can).

    Keys: ``path``, ``version``, ``size_bytes``, ``config`` (None when unusable), ``metadata``,
    ``tensors``, ``n_parameters``. Numbers that JSON cannot express (NaN, infinity) become strings.
    """
    problem: BitnetError | None = None
    config: dict[str, Any] | None = None
    try:
        config = asdict(ModelConfig.from_gguf(gguf))
    except BitnetError as error:
        problem = error
    tensors = [
        {"name": t.name, "type": t.type.name, "shape": list(t.shape), "size_bytes": t.size_bytes}
        for t in gguf.tensors.values()
    ]
    return {
        "path": str(gguf.path),
        "version": gguf.version,
        "size_bytes": gguf.size_bytes,
        "n_parameters": sum(math.prod(t.shape) for t in gguf.tensors.values()),
        "config": config,
        "metadata": {key: _plain(value) for key, value in gguf.metadata.items()},
        "tensors": tensors,
    }, problem


def print_description(description: dict[str, Any]) -> None:
    """Print what ``describe`` returned as tables; text from the file is escaped, to be safe on a terminal."""
    size_mb = description["size_bytes"] / 1e6
    click.echo(f"{description['path']}: GGUF version {description['version']}, {size_mb:.1f} MB")
    click.echo(f"{len(description['tensors'])} tensors, {description['n_parameters']:,} parameters")
    for title in ("config", "metadata"):
        if description[title]:
            click.echo(f"\n{title}")
            width = max(len(_escape(key)) for key in description[title])
            for key, value in description[title].items():
                click.echo(f"  {_escape(key):<{width}}  {_escape(json.dumps(value))}")
    if description["tensors"]:
        click.echo("\ntensors")
        width = max(len(_escape(t["name"])) for t in description["tensors"])
        for tensor in description["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            name, size = f"{_escape(tensor['name']):<{width}}", f"{tensor['size_bytes']:>13,} B"
            click.echo(f"  {name}  {tensor['type']:<5}  {shape:>16}  {size}")
    if description.get("verified"):
        click.echo("\nverified: every weight is usable, the tokenizer builds")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | StringArray):
        if len(value) > MAX_ITEMS:
            return {"length": len(value), "first": [_plain(item) for item in value[:_N_FIRST]]}
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _escape(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
