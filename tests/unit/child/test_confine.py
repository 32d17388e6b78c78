"""What a process that loads somebody's library cannot do: tried in one, before and after it is confined."""

from __future__ import annotations

import ctypes
import errno
import json
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crossval.child.confine import WRITABLE

LOCAL = "no sockets but local ones"
LACKING = {"udp 6", "ring", "32-bit"}
PROBE = """
import ctypes, json, os, resource, socket, sys, time
from crossval.child.confine import confine

folder, port = sys.argv[1], int(sys.argv[2])

def attempt(action):
    try:
        action()
    except BaseException as error:
        return type(error).__name__
    return "done"

def of_family(family, kind):
    return attempt(lambda: socket.socket(family, kind).close())

libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "failed")

def tries():
    return {
        "write": attempt(lambda: open(folder + "/new", "w").close()),
        "change": attempt(lambda: open(folder + "/old", "r+").close()),
        "truncate": attempt(lambda: os.truncate(folder + "/old", 1)),
        "remove": attempt(lambda: os.unlink(min(file.path for file in os.scandir(folder)))),
        "folder": attempt(lambda: (os.mkdir(folder + "/d"), os.rmdir(folder + "/d"))),
        "read": attempt(lambda: open(folder + "/old").read()),
        "null": attempt(lambda: open(os.devnull, "w").close()),
        "connect": attempt(lambda: socket.create_connection(("127.0.0.1", port)).close()),
        "udp": of_family(socket.AF_INET, socket.SOCK_DGRAM),
        "udp 6": of_family(socket.AF_INET6, socket.SOCK_DGRAM),
        "tcp": of_family(socket.AF_INET, socket.SOCK_STREAM),
        "ring": attempt(lambda: call(425, 1, ctypes.create_string_buffer(120))),
        "32-bit": attempt(lambda: call(0x40000000 + 39)),
        "local": of_family(socket.AF_UNIX, socket.SOCK_STREAM),
        "kernel": of_family(socket.AF_NETLINK, socket.SOCK_RAW),
        "pair": attempt(lambda: [end.close() for end in socket.socketpair()]),
        "program": attempt(lambda: __import__("subprocess").run(["true"], check=True)),
        "signal": attempt(lambda: os.kill(os.getppid(), 0)),
        "thread": attempt(lambda: __import__("threading").Thread(target=int).start()),
    }

before = tries()
filters = libc.prctl(21, 0, 0, 0, 0) >= 0
began = time.process_time()
said = confine(1 << 30)
cpu_s = time.process_time() - began
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps({
    "before": before, "after": tries(), "said": said, "cpu_s": cpu_s,
    "core": resource.getrlimit(resource.RLIMIT_CORE), "data": resource.getrlimit(resource.RLIMIT_DATA),
    "filters": filters,
    "no_new_privileges": status["NoNewPrivs"].strip(), "memory": attempt(lambda: bytearray(1 << 46)),
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("confined")
    for name in ("a1", "a2", "old"):
        (folder / name).write_text("old")
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", PROBE, str(folder), str(server.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_everything_could_be_done_before(found: dict[str, Any]) -> None:
    """But what this kernel may lack: IPv6, io_uring, x86_64's calls with 32-bit pointers."""
    assert {action for action, became in found["before"].items() if became != "done"} <= LACKING


def test_limits_that_every_kernel_has(found: dict[str, Any]) -> None:
    assert found["said"][:3] == ["no core file", "private memory", "no new privileges"]
    assert (found["core"], found["no_new_privileges"], found["memory"]) == ([0, 0], "1", "MemoryError")
    assert 1 << 30 < found["data"][0] == found["data"][1] < 1 << 46


def test_what_is_said_to_be_forbidden_is(found: dict[str, Any]) -> None:
    after, said = found["after"], found["said"]
    forbidden = {
        **dict.fromkeys(("write", "change", "remove", "folder"), "files read-only"),
        **dict.fromkeys(("udp", "tcp", *LACKING), LOCAL),
        "signal": "no signals to others",
    }
    for action, words in forbidden.items():
        assert after[action] == ("PermissionError" if words in said else found["before"][action]), action
    refused = "no TCP" in said or LOCAL in said
    assert after["connect"] == ("PermissionError" if refused else found["before"]["connect"])
    stay = ("read", "null", "thread", "local", "kernel", "pair", "program")
    assert {after[name] for name in stay} == {"done"}
    assert WRITABLE[0] == "/dev/null"


def test_what_the_kernel_offers_is_in_force(found: dict[str, Any]) -> None:
    version = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)
    offered = {1: "files read-only", 4: "no TCP", 6: "no signals to others"}
    filters = [LOCAL] if found["filters"] and platform.machine() in ("x86_64", "aarch64") else []
    assert found["said"][3:] == [words for since, words in offered.items() if version >= since] + filters
    assert found["before"]["truncate"] == "done"
    assert found["after"]["truncate"] == ("PermissionError" if version >= 3 else "done")


def test_it_costs_next_to_nothing(found: dict[str, Any]) -> None:
    assert found["cpu_s"] < 0.02


INT_80 = """
import ctypes, mmap
from crossval.child.confine import confine

page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
getpid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(getpid(), flush=True)
print("no sockets but local ones" in confine(1 << 30), getpid())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the calls of a 32-bit x86 program")
def test_calls_of_another_machine_are_no_way_around_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INT_80], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    before, _, after = done.stdout.partition("\n")
    if done.returncode == -signal.SIGSEGV and not before:
        pytest.skip("this kernel runs no 32-bit programs")
    assert int(before) > 0
    assert after.split() in (["True", str(-errno.EACCES)], ["False", before])
