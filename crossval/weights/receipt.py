"""Receipts of kind ``weights``: tensors and keys as JSON and back, and what must follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from bitnet_py import layout_evidence
from bitnet_py.ggml_types import BLOCK_LAYOUT, GGMLType, tensor_size_bytes
from bitnet_py.projections import PROJECTIONS
from bitnet_py.tensor_facts import FLOATS, TensorFacts, ValueFacts
from crossval.passes import EngineIdentity
from crossval.receipts.file import Receipt
from crossval.receipts.kind import Amount, Kind, Summary
from crossval.receipts.once import once
from crossval.receipts.party import REFERENCE_NAME, Party
from crossval.terms import SIDES
from crossval.weights import judge, scales
from crossval.weights.blocks import CRITERIA
from crossval.weights.readings import HOW
from crossval.weights.rows import CheckpointFile, Compared, Expected, KeyRow, Match, TensorRow, WeightsResult

CRITERION = {
    "min_layout_mean": layout_evidence.MIN_MEAN,
    "max_layout_share": layout_evidence.MAX_SHARE,
    "max_chance": scales.MAX_CHANCE,
    "padding_bytes": judge.PADDING,
}
SHAPE_KEYS = {
    "context_length": "context_length",
    "embedding_length": "dim",
    "block_count": "n_layers",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_base",
    "attention.layer_norm_rms_epsilon": "rms_eps",
    "vocab_size": "vocab_size",
}
"""Key of the header -> its value in ``model.shape``."""
NOBODY = {
    "candidate": Party("unused", EngineIdentity("bitnet_py")).to_json(),
    "reference": Party("unused", EngineIdentity(REFERENCE_NAME)).to_json(),
}
TERNARY = tuple(kind.name for kind in PROJECTIONS.values())


def to_json(result: WeightsResult) -> dict[str, Any]:
    """Return the fields of the receipt that hold the results."""
    results = {
        "checkpoint": [asdict(file) for file in result.files],
        "not_compared": list(result.not_compared),
        "rows": [_row_to_json(row) for row in result.rows],
        "keys": [asdict(row) for row in result.keys],
        **derived(result),
    }
    return {"thresholds": dict(CRITERION), "results": results}


def _row_to_json(row: TensorRow) -> dict[str, Any]:
    data = asdict(row)
    if row.facts is not None:
        del data["facts"]["name"]
        data["facts"] |= {"shape": list(row.facts.shape)}
        if row.facts.histogram is not None:
            data["facts"]["histogram"] = list(row.facts.histogram)
    if row.expected is not None:
        data["expected"]["shape"] = list(row.expected.shape)
    if row.compared is not None:
        matches = [{"tensor": match.tensor, "how": list(match.how)} for match in row.compared.matches]
        data["compared"]["matches"] = matches
    return data


def derived(result: WeightsResult) -> dict[str, Any]:
    """Return the findings, and what the file itself shows of its layout."""
    means = layout_evidence.means(judge.layout_evidence_of(result))
    return {
        "findings": [asdict(one) for one in judge.findings(result)],
        "layout": {"established": judge.layout(result), "means": means or None},
    }


@once
def from_json(receipt: Receipt) -> WeightsResult:
    """Return the result in a valid ``weights`` receipt; findings are recomputed, not read."""
    results = receipt["results"]
    return WeightsResult(
        rows=tuple(map(_row_from_json, results["rows"])),
        keys=tuple(KeyRow(**row) for row in results["keys"]),
        files=tuple(CheckpointFile(**file) for file in results["checkpoint"]),
        not_compared=tuple(results["not_compared"]),
    )


def _row_from_json(row: Mapping[str, Any]) -> TensorRow:
    facts, expected, compared = row["facts"], row["expected"], row["compared"]
    if facts is not None:
        values, histogram = facts["values"], facts["histogram"]
        facts = TensorFacts(
            **{
                **facts,
                "name": row["name"],
                "shape": tuple(facts["shape"]),
                "histogram": None if histogram is None else tuple(histogram),
                "values": None if values is None else ValueFacts(**values),
            }
        )
    if expected is not None:
        expected = Expected(**{**expected, "shape": tuple(expected["shape"])})
    if compared is not None:
        matches = tuple(Match(one["tensor"], tuple(one["how"])) for one in compared["matches"])
        compared = Compared(**{**compared, "matches": matches})
    return TensorRow(row["name"], facts, expected, compared, row["skipped"], row["copy_of"])


def summarize(result: WeightsResult) -> Summary:
    """Return verdict and coverage; ``exact_match_rate`` is the fraction of equal values."""
    required, compared = judge.coverage(result)
    pairs = [row.compared for row in result.rows if row.compared is not None]
    n_values = sum(one.n_values for one in pairs)
    n_equal = sum(one.n_values - one.n_different for one in pairs)
    return Summary(judge.verdict(result), required, compared, n_equal / n_values if n_values else None)


def notes(result: WeightsResult) -> list[str]:
    """Return what was not compared besides tensors."""
    if not result.has_checkpoint:
        return ["no checkpoint was given: codes, scales and values were compared with nothing"]
    return [f"not compared: {why}" for why in result.not_compared]


def thresholds(receipt: Receipt) -> list[str]:
    """Check that this version's criteria were applied."""
    return [
        f"thresholds.{name} is {receipt['thresholds'][name]}, this version requires {value}"
        for name, value in CRITERION.items()
        if receipt["thresholds"][name] != value
    ]


def structure(receipt: Receipt) -> list[str]:
    """Check that no engine takes part, and that the rows are those of this model."""
    complaints = [
        f"{side} states an engine, but none takes part" for side in SIDES if receipt[side] != NOBODY[side]
    ]
    if receipt["prompt"] != {"text": None, "template": None, "token_ids": []}:
        complaints.append("a prompt is stated, but no engine takes part")
    if receipt["tokenizer"]["engines_agree"] is not None:
        complaints.append("tokenizer.engines_agree is stated, but no engine takes part")
    result, model = from_json(receipt), receipt["model"]
    for what, names in (("tensor", [row.name for row in result.rows]), ("key", [row.key for row in result.keys])):
        if len(set(names)) != len(names):
            complaints.append(f"a {what} occurs twice")
    there = {row.name: row.facts for row in result.rows if row.facts is not None}
    if sum(facts.stored_bytes for facts in there.values()) > model["size_bytes"]:
        complaints.append("the tensors take more bytes than the file has")
    if (judge.HEAD in there) != model["separate_output"]:
        complaints.append(f"model.separate_output is {model['separate_output']}, the rows say otherwise")
    table = there.get("token_embd.weight")
    if table is not None and table.shape[0] != model["shape"]["vocab_size"] and not result.has_checkpoint:
        complaints.append(
            f"the vocabulary has {model['shape']['vocab_size']} tokens, the embedding {table.shape[0]}"
        )
    if receipt["tokenizer"]["vocab_size"] != model["shape"]["vocab_size"]:
        complaints.append("tokenizer.vocab_size is not the model's")
    for row in result.keys:
        stated = model["shape"].get(SHAPE_KEYS.get(row.key.removeprefix(f"{model['architecture']}.")))
        if stated is not None and stated != row.found:
            complaints.append(f"key {row.key} is {row.found}, model.shape says {stated}")
        if row.detail is not None and row.found == row.expected:
            complaints.append(f"key {row.key}: a detail of a difference that there is not")
        if row.key == "general.architecture" and row.found != model["architecture"]:
            complaints.append(f"key {row.key} is {row.found}, model.architecture says {model['architecture']}")
    if not result.has_checkpoint and any(row.expected is not None for row in result.rows):
        complaints.append("tensors of a checkpoint are stated, but none was given")
    return complaints


def tensors(receipt: Receipt) -> list[str]:
    """Check that every row is possible: sizes, counts, matches."""
    result = from_json(receipt)
    layout = derived(result)["layout"]
    if receipt["results"]["layout"] != layout:
        return [f"results.layout is not what the rows give: {layout['established'] or 'undetermined'}"]
    known = {row.name for row in result.rows if row.expected is not None} | {"output.weight", "token_embd.weight"}
    return [f"{row.name}: {what}" for row in result.rows for what in _conflicts(row, known)]


def _conflicts(row: TensorRow, known: set[str]) -> Iterator[str]:
    facts, expected, compared = row.facts, row.expected, row.compared
    if facts is None and expected is None:
        yield "neither the file nor the checkpoint has it"
    if facts is not None:
        yield from _impossible(facts)
    if row.copy_of is not None and (expected is not None or row.name != judge.HEAD):
        yield "called a copy, but the checkpoint has it"
    if compared is None:
        if facts is not None and expected is not None and row.skipped is None:
            yield "both have it, but it was not compared"
        return
    if facts is None or expected is None or row.skipped is not None:
        yield "compared, although one lacks it or it was skipped"
        return
    if compared.n_values != math.prod(expected.shape):
        yield f"compared.n_values is {compared.n_values}, its shape has {math.prod(expected.shape)}"
    if not 0 <= compared.n_at_ties <= compared.n_different <= compared.n_values:
        yield "more values differ than there are"
    if (expected.scale is not None) != (expected.role == "matrix"):
        yield "only matrices have a scale"
    if (expected.largest is not None) != (expected.role == "matrix" and expected.dtype != "uint8"):
        yield "only matrices of float weights have a largest weight"
    allowed = (
        CRITERIA.get(facts.type, (None,))
        if expected.role == "table" and facts.shape == expected.shape
        else (None,)
    )
    if compared.criterion not in allowed:
        yield f"compared by {compared.criterion}, a {expected.role} of type {facts.type} is not"
    if compared.matches and compared.n_different == compared.n_at_ties:
        yield "readings explain a difference that there is not"
    for match in compared.matches:
        if match.tensor not in known or not set(match.how) <= HOW.keys() or match == Match(row.name, ()):
            yield f"no such reading: {match.tensor}, {', '.join(match.how)}"
    if (
        facts.histogram is not None
        and facts.shape == expected.shape
        and not compared.n_different
        and facts.histogram[3]
    ):
        yield "code 3 in a matrix equal to the checkpoint's"


def _impossible(facts: TensorFacts) -> Iterator[str]:
    ggml_type = GGMLType.__members__.get(facts.type)
    known = ggml_type is not None and ggml_type in BLOCK_LAYOUT
    declared = tensor_size_bytes(facts.shape, GGMLType[facts.type]) if known else None
    if facts.declared_bytes != declared:
        yield f"declared_bytes is {facts.declared_bytes}, type and shape give {declared}"
    if facts.stored_bytes < facts.declared_bytes:
        yield "fewer bytes are stored than declared"
    n_values = math.prod(facts.shape)
    if facts.histogram is not None and (facts.type not in TERNARY or sum(facts.histogram) != n_values):
        yield f"the histogram is not that of {n_values} codes"
    if facts.histogram is None and (facts.scale is not None or facts.layout_z is not None or facts.type == "I2_S"):
        yield "codes without a histogram, or a scale without codes"
    values = facts.values
    if (values is not None) != (facts.type in [kind.name for kind in FLOATS]):
        yield "values are stated of tensors of single numbers only"
    if values is not None:
        if values.n_invalid + values.n_negative > n_values:
            yield "more values are counted than there are"
        stated = [one is not None for one in (values.min, values.max, values.rms)]
        if stated != [values.n_invalid < n_values] * 3:
            yield "minimum, maximum and RMS are stated where there is a finite value"
        if values.min is not None and values.max is not None and values.rms is not None:
            largest = max(abs(values.min), abs(values.max))
            if values.min > values.max or values.rms > largest * (1 + 1e-9):
                yield "minimum, maximum and RMS contradict each other"
            if (values.n_negative > 0) != (values.min < 0):
                yield "the count of negative values contradicts the minimum"


def amount(receipt: Receipt) -> Amount:
    """Return how much was compared."""
    compared = receipt["coverage"]["compared"]
    return Amount(compared, None, f"{compared} tensors and keys")


WEIGHTS = Kind[WeightsResult](
    name="weights",
    counted="values",
    to_json=to_json,
    from_json=from_json,
    summarize=summarize,
    derived=derived,
    notes=notes,
    same_tokens=False,
    computes=False,
    one_sided=True,
    checks={"thresholds": thresholds, "structure": structure, "tensors": tensors},
    amount=amount,
)
