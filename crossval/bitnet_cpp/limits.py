"""Process limits of bitnet.cpp: a large stack on every thread, batches that fit it, and few rights.

bitnet.cpp keeps the result of an I2_S matrix product on the stack of the thread that computes it
(``ggml.c`` ``ggml_compute_forward_mul_mat``: ``float tmp[rows * n_tokens]``); with the usual 8 MiB
one thread and 512 tokens of a 2B-4T shape end in SIGSEGV. The main thread takes its stack limit
from RLIMIT_STACK, threads of glibc read it when the process starts, OpenMP runtimes have variables
of their own. So the limits have to be in place before the process starts: the child sets them and
executes the server.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterable
from typing import NoReturn

from crossval.child.command import child_command
from crossval.child.confine import CONFINED_VARIABLE, confine

STACK_BYTES = 64 << 20
"""Requested stack per thread: 512 tokens of 24,000 rows on one thread. Memory is used only as it
is touched."""
_RESERVE_BYTES = 1 << 20
MAX_STACKS = 1024
"""As many threads as can be asked for."""


def main(argv: list[str]) -> NoReturn:
    """Set a large stack, confine the process (``child.confine``), then execute ``crossval.bitnet_cpp.serve``.

    ``argv``: descriptors of requests, responses and lifeline; the server gets these and the stack
    size in bytes.
    """
    for fd in argv:
        os.set_inheritable(int(fd), True)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    size_bytes = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (size_bytes, hard))
    confined = confine(MAX_STACKS * size_bytes)
    # The OpenMP runtimes, LLVM's and GNU's: both read the first, and their own variables would win.
    environment = {**os.environ, "OMP_STACKSIZE": f"{size_bytes // 1024}K", CONFINED_VARIABLE: ", ".join(confined)}
    for variable in ("KMP_STACKSIZE", "GOMP_STACKSIZE"):
        environment.pop(variable, None)
    command = [*child_command("crossval.bitnet_cpp.serve"), *argv, str(size_bytes)]
    os.execve(command[0], command, environment)


def max_ubatch(stack_bytes: int, row_counts: Iterable[int], n_threads: int) -> int:
    """Return the longest batch whose I2_S matrix products fit the stack of one thread.

    ``row_counts``: rows of the model's I2_S matrices. A thread's share is ``rows / n_threads``
    rounded to multiples of 4 at both ends. A quarter of the stack, at least 1 MiB, is left for
    everything else.
    """
    usable = stack_bytes - max(_RESERVE_BYTES, stack_bytes // 4)
    rows = max((math.ceil(count / n_threads) + 4 for count in row_counts), default=4)
    return max(0, usable // (4 * rows))
