"""The graphs of the architectures that the specification defines: one file each, listing operations in order.

To add one: a file with its ``operations``, and a line in ``GRAPHS``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import takewhile

from crossval.errors import BadInputError
from crossval.model.config import SpecConfig
from crossval.model.graphs import bitnet, gemma3, llama, qwen3
from crossval.model.op import Op

GRAPHS: dict[str, Callable[[SpecConfig], tuple[Op, ...]]] = {
    "bitnet-b1.58": bitnet.operations,
    "bitnet-25": bitnet.operations,
    "bitnet": bitnet.operations,
    "llama": llama.operations,
    "qwen3": qwen3.operations,
    "gemma3": gemma3.operations,
}
"""``general.architecture`` of a model file -> function that lists its operations."""


@lru_cache(maxsize=8)
def op_table(config: SpecConfig) -> tuple[Op, ...]:
    """List every operation of a model in execution order.

    Raises:
        BadInputError: no graph for its architecture.
    """
    if config.architecture not in GRAPHS:
        raise BadInputError(
            f"architecture {config.architecture!r}: expected {' or '.join(GRAPHS)}; "
            "the specification defines no other"
        )
    return GRAPHS[config.architecture](config)


def before_layers(config: SpecConfig) -> tuple[Op, ...]:
    """List the operations before the layers; the output of the last one is what the first layer reads."""
    return tuple(takewhile(lambda op: op.layer is None, op_table(config)))
