"""The vocabulary that the whole package shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Side = Literal["candidate", "reference"]
"""The engine under test, and what it is compared with."""
SIDES: tuple[Side, ...] = ("candidate", "reference")

Generation = Literal["march", "main", "mainline"]
"""Whose arithmetic: bitnet.cpp of March 2026, bitnet.cpp's main since July 2026, mainline llama.cpp."""

UNREAD = "not read"
"""Quantisation of a model file whose weights were not read."""

PassFail = Literal["pass", "fail", "incomplete"]
"""Verdict on engines that are checked independently, on a benchmark, and on the self-test."""

LOGITS = "result_output"
"""Name of the tap that holds the logits."""

Progress = Callable[[str, int, int], None]
"""Called with (current activity, steps done, total steps)."""

OUTPUT_IGNORED = frozenset({"bitnet", "bitnet-25", "bitnet-b1.58"})
"""Architectures of which bitnet.cpp ignores ``output.weight``."""
SEPARATE_OUTPUT_NOTE = (
    "this model has its own output.weight, which bitnet.cpp ignores: it multiplies the final norm with "
    "token_embd.weight, so logits of an engine that uses output.weight differ from the reference's by that alone"
)
