"""How much memory a cell takes at most, and how much there is."""

from __future__ import annotations

import os
from pathlib import Path

from crossval import capture
from crossval.bitnet_cpp.engine import DEFAULT_N_CTX
from crossval.model.weights import DECODED_BUDGET_BYTES, SpecWeights
from crossval.passes import PassPlan, pass_kind

PROCESS_BYTES = 256 << 20
"""Interpreters with NumPy, harness and engine's child; measured 128 MB with a model of 1 MB, tensors included."""
MAX_PASS = 512
"""Tokens of the longest pass of engines that were not asked for another."""
CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of this process's group, in versions 2 and 1."""


def needed_bytes(model: Path, prompt: str, n_after: int) -> int:
    """Return what a comparison takes at most: both engines, their tensors, and the specification.

    Tokens of the prompt are counted as its bytes and one more: no tokenizer gives more. The file counts twice,
    because an engine may repack it.

    Raises:
        BadInputError, ModelError: the model is unusable.
    """
    config = SpecWeights(model).config
    n_prompt = min(len(prompt.encode(errors="replace")) + 1, config.context_length)
    plans = [PassPlan("prefill", (0,) * n_prompt, 0)]
    plans += [PassPlan(pass_kind(1, n_prompt + n), (0,), n_prompt + n) for n in range(n_after)]
    n_context = min(config.context_length, max(DEFAULT_N_CTX, n_prompt + n_after))
    cache = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * n_context
    outputs = 4 * min(MAX_PASS, n_context) * max(config.vocab_size, config.hidden_dim, config.dim)
    matrices = config.n_layers * (3 * config.dim * config.hidden_dim + 4 * config.dim * config.dim)
    decoded = min(8 * matrices, max(DECODED_BUDGET_BYTES, 8 * config.dim * config.hidden_dim))
    engine = model.stat().st_size + cache + outputs + capture.held_bytes(config, plans)
    return PROCESS_BYTES + 2 * engine + decoded


def available_bytes() -> int:
    """Return the memory that new processes can take here, within the limit of their control group."""
    free = [_available()]
    for limit, used in CGROUP_LIMITS:
        found = _number(limit)
        if found is not None:
            free.append(max(found - (_number(used) or 0), 0))
    return min(free)


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such group, or "max"
        return None
