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
from bitnet_py.layout_evidence import MIN_MEAN, established, means
from bitnet_py.string_array import StringArray
from bitnet_py.tensor_facts import tensor_facts

MAX_ITEMS = 16
"""Longer arrays are shown by their length and first entries."""
MAX_TEXT = 1 << 16
"""Longer texts are shown by their length and first characters."""
_N_FIRST = 4
_N_FIRST_CHARACTERS = 64


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


def describe_deep(gguf: GGUFFile) -> dict[str, Any]:
    """Return what every tensor holds, as plain JSON values, and which layout of the codes the file shows.

    ``layout`` is None where the file does not establish one (``layout_evidence``); ``layout_means``
    holds the statistic of each.
    """
    facts = list(tensor_facts(gguf))
    scores = [one.layout_z for one in facts if one.layout_z is not None]
    tensors = []
    for one in facts:
        data = asdict(one)
        del data["layout_z"]
        tensors.append({name: value for name, value in data.items() if value is not None})
    return {"tensors": tensors, "layout": established(scores), "layout_means": means(scores)}


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
    if "deep" in description:
        _print_deep(description["deep"])
    if description.get("verified"):
        click.echo("\nverified: every weight is usable, the tokenizer builds")


def _print_deep(deep: dict[str, Any]) -> None:
    """Print codes, scales and values of every tensor, and the layout."""
    click.echo("\nvalues")
    width = max((len(_escape(one["name"])) for one in deep["tensors"]), default=0)
    for one in deep["tensors"]:
        gap = one["stored_bytes"] - one["declared_bytes"]
        parts = [f"{gap} bytes more than declared"] if gap else []
        if "histogram" in one:
            total = sum(one["histogram"])
            shares = ", ".join(
                f"{code}: {count / total:.2%}" for code, count in enumerate(one["histogram"]) if count
            )
            scale = f"{one['scale']:.9g}" if "scale" in one else "not finite"
            parts.insert(0, f"codes {shares}; scale {scale}")
        if "values" in one:
            parts.insert(0, _values(one["values"]))
        click.echo(f"  {_escape(one['name']):<{width}}  {'; '.join(parts)}")
    scores = ", ".join(f"{name} {mean:.3g}" for name, mean in deep["layout_means"].items())
    found = deep["layout"] or "undetermined"
    click.echo(f"\nlayout of the codes: {found} by the file alone ({scores or 'no norms'}; {MIN_MEAN:g} needed)")


def _values(values: dict[str, Any]) -> str:
    invalid = f"{values['n_invalid']} not finite" if values["n_invalid"] else ""
    if values["min"] is None:
        return invalid
    shown = f"{values['min']:.4g} to {values['max']:.4g}, RMS {values['rms']:.4g}"
    return f"{shown}, {invalid}" if invalid else shown


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | StringArray):
        if len(value) > MAX_ITEMS:
            return {"length": len(value), "first": [_plain(item) for item in value[:_N_FIRST]]}
        return [_plain(item) for item in value]
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return {"length": len(value), "first": value[:_N_FIRST_CHARACTERS]}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _escape(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
