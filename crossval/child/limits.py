"""Process limits bitnet.cpp needs: a large stack on every thread, and batches that fit it.

bitnet.cpp keeps the result of an I2_S matrix product on the stack of the thread that computes it
(``ggml.c`` ``ggml_compute_forward_mul_mat``: ``float tmp[rows * n_tokens]``); with the usual 8 MiB one thread and
512 tokens of a 2B-4T shape end in SIGSEGV. The main thread takes its stack limit from RLIMIT_STACK, threads
of glibc read it when the process starts, OpenMP runtimes have variables of their own. So the limits have to
be in place before the process starts: the child sets them and executes itself again.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterable, MutableMapping

STACK_BYTES = 64 << 20
"""Stack asked for, per thread: 512 tokens of 24,000 rows on one thread. Memory is used as it is touched."""

STACK_VARIABLE = "CROSSVAL_CPP_STACK"
"""Set by the child for its second start: the stack size in bytes that is in force."""

_RESERVE_BYTES = 1 << 20


def apply(wanted_bytes: int = STACK_BYTES) -> int:
    """Set the stack limit and forbid core files; return the stack size now in force, in bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    size = wanted_bytes if hard == resource.RLIM_INFINITY else min(wanted_bytes, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (size, hard))
    _, core_hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, core_hard))
    return size


def set_thread_stack(environment: MutableMapping[str, str], size_bytes: int) -> None:
    """Ask the OpenMP runtimes (LLVM's, GNU's) for stacks of the same size."""
    kib = f"{size_bytes // 1024}K"
    for variable in ("OMP_STACKSIZE", "KMP_STACKSIZE", "GOMP_STACKSIZE"):
        environment.pop(variable, None)
    environment["OMP_STACKSIZE"] = kib
    environment[STACK_VARIABLE] = str(size_bytes)


def stack_in_force() -> int | None:
    """Return the stack size the process was started with by ``set_thread_stack``, or None."""
    value = os.environ.get(STACK_VARIABLE, "")
    return int(value) if value.isdecimal() else None


def max_ubatch(stack_bytes: int, row_counts: Iterable[int], n_threads: int) -> int:
    """Return the longest batch whose I2_S matrix products fit the stack of one thread.

    ``row_counts``: rows of the model's I2_S matrices. A thread's share is ``rows / n_threads`` rounded to
    multiples of 4 at both ends. A quarter of the stack, at least 1 MiB, is left to everything else.
    """
    usable = stack_bytes - max(_RESERVE_BYTES, stack_bytes // 4)
    rows = max((math.ceil(count / n_threads) + 4 for count in row_counts), default=4)
    return max(0, usable // (4 * rows))
