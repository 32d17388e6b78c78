"""Engines that were held to the reference's graph instead of the model: what a receipt says of it."""

from __future__ import annotations

from collections.abc import Iterator

from crossval.model.reference_graph import differences
from crossval.receipts.file import Receipt
from crossval.receipts.policy import GateCheck, Policy


def followed_graph(receipt: Receipt) -> str | None:
    """Return what both engines were held to instead of the model, in words; None: to the model."""
    if not receipt["settings"].get("follow_reference_graph"):
        return None
    generation = receipt["reference"]["numerics"].get("generation")
    return " and ".join(differences(receipt["model"]["architecture"], generation)) or None


def demands(receipt: Receipt, policy: Policy) -> Iterator[GateCheck]:
    """Check that the engines were held to the model, or that another graph is accepted."""
    graph = followed_graph(receipt)
    if graph is not None:
        yield GateCheck("graph", policy.allow_reference_graph, f"the reference's, not the model: it has {graph}")
