from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from crossval import files
from crossval.errors import BadInputError
from crossval.files import file_sha256
from crossval.receipts import provenance

X86 = """processor\t: 0
model name\t: Example CPU @ 3.0GHz
flags\t\t: fpu sse4_2 avx avx2 fma f16c made_up

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu avx512f
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd40\n"


def git(root: Path, *args: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, "-C", str(root), *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "crossval").mkdir(parents=True)
    (root / "crossval" / "__init__.py").write_text("")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "one")
    return root


def test_git_state_of_a_clean_checkout_is_its_head(checkout: Path) -> None:
    assert provenance.git_state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("name", ["crossval/__init__.py", "crossval/new.py"])
def test_a_changed_or_new_source_file_makes_it_dirty(checkout: Path, name: str) -> None:
    (checkout / name).write_text("changed = True\n")
    assert provenance.git_state(checkout)[1] is True


def test_it_only_reads_the_repository(checkout: Path) -> None:
    """Git would write the index again, and leave its lock where it is killed meanwhile."""
    os.utime(checkout / "crossval/__init__.py", (1, 1))
    before = (checkout / ".git/index").read_bytes()
    assert provenance.git_state(checkout)[1] is False
    assert (checkout / ".git/index").read_bytes() == before


def test_a_changed_readme_does_not_make_it_dirty(checkout: Path) -> None:
    (checkout / "README.md").write_text("notes")
    assert provenance.git_state(checkout)[1] is False


def test_git_state_ignores_a_surrounding_repository(checkout: Path) -> None:
    inner = checkout / "site-packages"
    (inner / "crossval").mkdir(parents=True)
    assert provenance.git_state(inner) == (None, None)


def test_git_state_ignores_a_repository_that_does_not_track_the_package(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(tmp_path, "init", "-q", str(other))
    assert provenance.git_state(other) == (None, None)


def test_git_state_is_not_fooled_by_git_environment_variables(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = provenance.git_state(checkout)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert provenance.git_state(checkout) == expected


def test_git_state_without_git_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(checkout) == (None, None)


def test_host_facts_read_the_first_x86_cpu(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(X86)
    facts = provenance.host_facts(path)
    assert facts["cpu_model"] == "Example CPU @ 3.0GHz"
    assert facts["isa_flags"] == ["sse4_2", "avx", "avx2", "fma", "f16c"]


def test_host_facts_read_arm_features(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(ARM)
    facts = provenance.host_facts(path)
    assert (facts["cpu_model"], facts["isa_flags"]) == ("0xd40", ["asimd", "asimddp", "i8mm"])


def test_host_facts_without_cpuinfo_still_name_the_machine(tmp_path: Path) -> None:
    facts = provenance.host_facts(tmp_path / "missing")
    assert facts["cpu_model"]
    assert facts["isa_flags"] == []
    assert facts["n_cores"] >= facts["n_cores_usable"] >= 1


def test_file_sha256_equals_hashlib(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"abc" * 5000)
    assert file_sha256(path) == hashlib.sha256(b"abc" * 5000).hexdigest()


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_file_sha256_of_no_file_is_bad_input(tmp_path: Path, what: str) -> None:
    path = tmp_path if what == "directory" else tmp_path / "missing.gguf"
    with pytest.raises(BadInputError, match=r"cannot read"):
        file_sha256(path)


@pytest.fixture
def cached_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_CACHE_MIN_BYTES", 1)
    monkeypatch.setattr(files, "_CACHE_SETTLED_S", -1.0)
    path = tmp_path / "big.gguf"
    path.write_bytes(b"first")
    return path


def test_a_large_file_is_hashed_once_and_again_after_a_change(cached_model: Path) -> None:
    first = file_sha256(cached_model)
    (entry,) = json.loads(files.cache_path().read_text()).values()
    assert entry == first
    stat = cached_model.stat()
    time.sleep(0.05)  # more than the granularity of a file system's clock
    cached_model.write_bytes(b"other")
    os.utime(cached_model, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and mtime: ctime still tells
    assert file_sha256(cached_model) == hashlib.sha256(b"other").hexdigest()


def test_the_cache_is_really_used(cached_model: Path) -> None:
    file_sha256(cached_model)
    entries = json.loads(files.cache_path().read_text())
    files.cache_path().write_text(json.dumps(dict.fromkeys(entries, "f" * 64)))
    assert file_sha256(cached_model) == "f" * 64


def test_a_file_written_just_now_is_not_remembered(cached_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CACHE_SETTLED_S", 3600.0)
    file_sha256(cached_model)
    assert not files.cache_path().exists()


@pytest.mark.parametrize("content", ["not json", "[]", '{"key": 1}'])
def test_a_broken_cache_is_ignored(cached_model: Path, content: str) -> None:
    files.cache_path().parent.mkdir(parents=True)
    files.cache_path().write_text(content)
    assert file_sha256(cached_model) == hashlib.sha256(b"first").hexdigest()


def test_write_atomically_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    files.write_atomically(path, b"1")
    files.write_atomically(path, b"2")
    assert path.read_bytes() == b"2"
    assert [entry.name for entry in path.parent.iterdir()] == ["out.json"]


def test_write_atomically_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    path.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_tool_facts_name_this_checkout() -> None:
    facts = provenance.tool_facts()
    root = Path(provenance.__file__).resolve().parents[2]
    assert facts["commit"] == provenance.git_state(root)[0]
    assert set(facts) == {"name", "version", "commit", "dirty"}
