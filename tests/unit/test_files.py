"""Temporary files and folders: gone when their block ends, and those of killed processes with the next one."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from crossval.files import temporary, write_atomically

HOLD = """
import sys
from pathlib import Path
from crossval.files import temporary
with temporary(Path(sys.argv[1]), ".x.", is_folder=bool(int(sys.argv[2]))) as made:
    if made.is_dir():
        (made / "inside").touch()
    print(made.name, flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hold(folder: Path, *, is_folder: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder), str(int(is_folder))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_killed_process_left_goes_with_the_next_and_what_a_living_one_has_stays(
    tmp_path: Path, is_folder: bool
) -> None:
    held, killed = hold(tmp_path, is_folder=is_folder), hold(tmp_path, is_folder=is_folder)
    assert held.stdout is not None
    assert killed.stdout is not None
    alive, left = held.stdout.readline().strip(), killed.stdout.readline().strip()
    killed.kill()
    killed.communicate()
    assert names(tmp_path) == sorted([alive, left])
    with temporary(tmp_path, ".x.") as made:
        assert names(tmp_path) == sorted([alive, made.name])
    assert names(tmp_path) == [alive]
    held.communicate("")
    assert names(tmp_path) == []


def test_only_names_that_are_made_here_are_removed(tmp_path: Path) -> None:
    kept = [".x.original", ".x.crossval", ".x.UPPER.crossval", ".y.abc.crossval", "x.abc.crossval"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".x.link.crossval").symlink_to(tmp_path / kept[0])
    (tmp_path / ".x.abc.crossval").touch()
    with temporary(tmp_path, ".x."):
        pass
    assert names(tmp_path) == sorted([*kept, ".x.link.crossval"])


@pytest.mark.parametrize("error", [FileNotFoundError("mine"), BlockingIOError("mine"), KeyboardInterrupt()])
def test_whatever_ends_the_block_passes_and_nothing_is_left(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with temporary(tmp_path, ".x.", is_folder=True) as made:
            (made / "inside").touch()
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == []


def test_a_file_system_without_locks_is_written_and_nothing_there_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    (tmp_path / ".r.json.abc.crossval").touch()
    monkeypatch.setattr(fcntl, "flock", none)
    write_atomically(tmp_path / "r.json", b"x")
    assert names(tmp_path) == [".r.json.abc.crossval", "r.json"]


def test_what_can_never_be_locked_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossval.files._lock", lambda *_, **__: None)
    with pytest.raises(OSError, match="opened again"):
        write_atomically(tmp_path / "r.json", b"x")
    assert names(tmp_path) == []


def test_a_name_of_any_length_that_a_file_may_have_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"
    assert names(tmp_path) == [path.name]
