"""The source of bitnet.cpp: its digest, and fetching it, with a local repository standing in for upstream."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from crossval.bitnet_cpp import source as cpp_source
from crossval.errors import UnavailableError
from tests.support.bitnet_cpp_tree import FILES, write_tree

ROOT = Path(__file__).resolve().parents[3]


def test_the_source_digest_sees_content_and_names_only(source, tmp_path):
    digest = cpp_source.source_digest(source)
    copy = shutil.copytree(source, tmp_path / "elsewhere")
    (copy / "README.md").write_text("not compiled")
    (copy / "include/notes.ini").write_text("not compiled")
    assert cpp_source.source_digest(copy) == digest
    (copy / "include/ggml-bitnet.h").write_text("#define STANDIN 2\n")
    assert cpp_source.source_digest(copy) != digest
    (copy / "include/ggml-bitnet.h").write_text(FILES["include/ggml-bitnet.h"])
    (copy / "src/extra.h").write_text("")
    assert cpp_source.source_digest(copy) != digest


def test_a_checkout_that_compiles_as_it_is_is_used_as_it_is(source, tmp_path):
    (source / cpp_source.LUT_HEADER).write_text("")
    mad = source / cpp_source.MAD_SOURCE
    mad.write_text(mad.read_text().replace("int8_t * y_col", "const int8_t * y_col"))
    assert cpp_source.buildable_tree(source, tmp_path / "shadow") == (source, ())


@pytest.mark.parametrize("missing", ["CMakeLists.txt", "3rdparty/llama.cpp/src/llama.cpp"])
def test_an_incomplete_checkout_is_named(source, missing):
    (source / missing).unlink()
    with pytest.raises(UnavailableError, match=f"not a complete checkout.*lacks {missing}"):
        cpp_source.describe(source, "directory")


# Fetching


def git(directory: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(directory), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def repository(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    git(path, "init", "--quiet")
    return path


def commit(path: Path) -> str:
    git(path, "add", "--all")
    git(path, "commit", "--quiet", "--message", "stand-in")
    return git(path, "rev-parse", "HEAD")


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """A stand-in for upstream with its nested submodule, which git is told to use for the real address."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, so fetching cannot be tested")
    remotes = tmp_path / "remotes"
    configuration = {
        "protocol.file.allow": "always",
        "user.name": "test",
        "user.email": "test@example.org",
        f"url.{remotes}/.insteadOf": "https://github.com/",
    }
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(configuration)))
    for i, (key, value) in enumerate(configuration.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{i}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{i}", value)
    nested = repository(remotes / "example/llama.cpp")
    write_tree(nested, f"{cpp_source.NESTED_SUBMODULE}/")
    commit(nested)
    outer = repository(remotes / "microsoft/BitNet")
    write_tree(outer)
    shutil.rmtree(outer / "3rdparty")
    git(outer, "submodule", "--quiet", "add", "https://github.com/example/llama.cpp", cpp_source.NESTED_SUBMODULE)
    commit(outer)
    return outer


@pytest.fixture
def project(tmp_path, upstream):
    """A clone of a project that has the stand-in as a submodule, not initialised."""
    origin = repository(tmp_path / "origin")
    git(origin, "submodule", "--quiet", "add", cpp_source.UPSTREAM_URL, cpp_source.SUBMODULE)
    commit(origin)
    git(tmp_path, "clone", "--quiet", str(origin), "project")
    return tmp_path / "project"


def test_the_submodule_is_fetched_with_its_own(project, upstream, tmp_path):
    fetched = cpp_source.fetch(project, tmp_path / "unused")
    assert fetched == project / cpp_source.SUBMODULE
    described = cpp_source.describe(fetched, "submodule")
    assert described.commit == git(upstream, "rev-parse", "HEAD")
    assert described.llama_cpp_commit == git(upstream / cpp_source.NESTED_SUBMODULE, "rev-parse", "HEAD")
    assert described.dirty is False
    (fetched / "CMakeLists.txt").write_text("# changed\n")
    assert cpp_source.describe(fetched, "submodule").dirty is True


def test_the_submodule_is_put_back_to_the_pinned_commit(project, upstream, tmp_path):
    pinned = git(upstream, "rev-parse", "HEAD")
    (upstream / "new.txt").write_text("later\n")
    later = commit(upstream)
    fetched = cpp_source.fetch(project, tmp_path / "unused")
    git(fetched, "checkout", "--quiet", later)
    assert cpp_source.git_commit(cpp_source.fetch(project, tmp_path / "unused")) == pinned


def test_without_a_checkout_the_pinned_commit_is_fetched_once(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_source, "PINNED_COMMIT", git(upstream, "rev-parse", "HEAD"))
    fetched = cpp_source.fetch(None, tmp_path / "cache")
    assert fetched == tmp_path / "cache"
    assert (fetched / cpp_source.NESTED_SUBMODULE / "src/llama.cpp").is_file()
    shutil.rmtree(upstream)
    assert cpp_source.fetch(None, tmp_path / "cache") == fetched


def test_no_network_is_explained_with_what_git_said(project, upstream, tmp_path):
    shutil.rmtree(upstream)
    with pytest.raises(
        UnavailableError, match=r"(?s)git submodule update.*no network\?.*works without it.*git said:"
    ):
        cpp_source.fetch(project, tmp_path / "unused")


def test_the_pinned_commit_is_the_one_the_repository_records():
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--stage", "--", cpp_source.SUBMODULE],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not done.stdout:
        pytest.skip("not a git checkout of the project, so there is no submodule entry to compare with")
    assert done.stdout.split()[1] == cpp_source.PINNED_COMMIT
    assert f"url = {cpp_source.UPSTREAM_URL}\n" in (ROOT / ".gitmodules").read_text()
