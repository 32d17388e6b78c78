"""Limits of a process that loads somebody's library, which the kernel holds and the process cannot lift.

They are set before the engine's process executes and stay in force in it (as root, it can still raise the limit
of memory); standard library only. What a kernel
does not offer is left out, and ``confine`` returns what is in force (docs/trust.md).
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
from collections.abc import Sequence

WRITABLE = ("/dev/null", "/dev/shm")
"""What may be written: LLVM's OpenMP registers itself in the second. Open descriptors (pipes, log) stay usable."""
CONFINED_VARIABLE = "CROSSVAL_CONFINED"
"""Says what is in force in the words of ``confine``, to the program that was executed."""
_PR_SET_NO_NEW_PRIVS = 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System calls of Landlock: the same numbers on every architecture."""
_GET_VERSION, _PATH_BENEATH = 1, 1
_WRITE_FILE = 1 << 1
_MAKE_AND_REMOVE = sum(1 << bit for bit in range(4, 13))
_SINCE = ((2, 1 << 13), (3, 1 << 14))
"""Version of Landlock -> further accesses that write: renaming to another folder, truncating."""
_TCP = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_NET_SINCE, _SCOPE_SINCE = 4, 6
_PR_SET_SECCOMP, _FILTER = 22, 2
_SET_MODE_FILTER, _SPEC_ALLOW = 1, 4
_SYSTEM_CALLS = {"x86_64": (0xC000003E, 41, 317), "aarch64": (0xC00000B7, 198, 277)}
"""Machine -> how seccomp names its system calls, and the numbers of ``socket`` and ``seccomp``."""
_IO_URING_SETUP = 425
"""Opens a way to make sockets without that call; the same number on every architecture."""
_X32 = 0x40000000
"""From here on x86_64 numbers its calls with 32-bit pointers."""
_LOCAL = (1, 16)
"""Families of sockets that stay, to processes and to the kernel of this machine: AF_UNIX, AF_NETLINK."""
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
"""The four instructions that the filter needs, as the kernel numbers them."""
_NUMBER_AT, _MACHINE_AT, _ARGUMENT_AT = 0, 4, 16
"""Bytes from the start of the description of a call (``struct seccomp_data``)."""
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_so", ctypes.c_uint8),
        ("if_not", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Filter(ctypes.Structure):
    _fields_ = (("n", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32))


def confine(reserve_bytes: int) -> list[str]:
    """Confine this process and everything it starts; return what is in force, in words.

    ``reserve_bytes``: what private memory may take beside all of the machine's, for the stacks of threads.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    limited = ["no core file", _limit_memory(reserve_bytes)]
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return limited
    return [*limited, "no new privileges", *_landlock(libc, WRITABLE), *_local_sockets(libc)]


def _limit_memory(reserve_bytes: int) -> str:
    """Limit private memory to the machine's: mapped model files do not count, however large."""
    n_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + reserve_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    n_bytes = n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return "private memory"


def _local_sockets(libc: ctypes.CDLL) -> list[str]:
    """Forbid to make sockets of any family but local ones, whatever the protocol: TCP, UDP, raw packets."""
    if os.uname().machine not in _SYSTEM_CALLS or sys.maxsize < 1 << 32:
        return []
    machine, new_socket, seccomp = _SYSTEM_CALLS[os.uname().machine]
    # instruction, its number, and how many to skip if it holds and if it does not; the last two answer
    program = [
        (_LOAD, _MACHINE_AT, 0, 0),
        (_EQUAL, machine, 0, 8),
        (_LOAD, _NUMBER_AT, 0, 0),
        (_AT_LEAST, _X32, 6, 0),
        (_EQUAL, _IO_URING_SETUP, 5, 0),
        (_EQUAL, new_socket, 0, 3),
        (_LOAD, _ARGUMENT_AT, 0, 0),
        (_EQUAL, _LOCAL[0], 1, 0),
        (_EQUAL, _LOCAL[1], 0, 1),
        (_RETURN, _ALLOW, 0, 0),
        (_RETURN, _REFUSE, 0, 0),
    ]
    instructions = [_Instruction(code, if_so, if_not, k) for code, k, if_so, if_not in program]
    made = _Filter(len(program), (_Instruction * len(program))(*instructions))
    # the call can keep speculative execution as it is, which older kernels slow down with a filter
    forbidden = (
        libc.syscall(seccomp, _SET_MODE_FILTER, _SPEC_ALLOW, ctypes.byref(made)) == 0
        or libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(made), 0, 0) == 0
    )
    return ["no sockets but local ones"] if forbidden else []


def _landlock(libc: ctypes.CDLL, writable: Sequence[str]) -> list[str]:
    """Forbid to write files, to use TCP and to signal other processes, as far as this kernel can."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    if version < 1:
        return []
    files = _WRITE_FILE | _MAKE_AND_REMOVE | sum(bit for since, bit in _SINCE if version >= since)
    rules = _Ruleset(
        files,
        _TCP if version >= _NET_SINCE else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPE_SINCE else 0,
    )
    known = 8 if version < _NET_SINCE else 16 if version < _SCOPE_SINCE else 24
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(known), 0)
    if ruleset < 0:
        return []
    try:
        for path in writable:
            _allow(libc, ruleset, path, files)
        if libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            return []
    finally:
        os.close(ruleset)
    return [
        "files read-only",
        *(["no TCP"] if version >= _NET_SINCE else []),
        *(["no signals to others"] if version >= _SCOPE_SINCE else []),
    ]


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, files: int) -> None:
    """Allow to write a file or below a folder; what does not exist needs no permission."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        allowed = files if os.path.isdir(path) else files & (_WRITE_FILE | 1 << 14)
        rule = _PathBeneath(allowed, fd)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(fd)
