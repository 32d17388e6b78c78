"""The source of bitnet.cpp: its digest, and fetching it, with a local repository standing in for upstream."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from crossval.bitnet_cpp import source as cpp_source
from crossval.errors import UnavailableError
from tests.support.bitnet_cpp_tree import FILES, MAIN, write_tree

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
    described = cpp_source.describe(source, "directory")
    assert cpp_source.buildable_tree(described, tmp_path / "shadow") == (source, ())


def test_main_needs_no_adaptation(tmp_path):
    source = write_tree(tmp_path / "main", files=MAIN)
    described = cpp_source.describe(source, "directory")
    assert not (source / cpp_source.LUT_HEADER).exists()
    assert cpp_source.buildable_tree(described, tmp_path / "shadow") == (source, ())


def change(source: Path, name: str, old: str, new: str) -> None:
    path = source / cpp_source.NESTED_SUBMODULE / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_generation_follows_from_what_the_headers_declare(source, tmp_path):
    assert cpp_source.generation_of(source) == "march"
    main = write_tree(tmp_path / "main", files=MAIN)
    assert cpp_source.generation_of(main) == "main"
    change(main, "ggml/include/ggml.h", "GGML_TYPE_I2_S", "GGML_TYPE_OTHER")
    assert cpp_source.generation_of(main) == "mainline"
    change(source, "include/llama.h", "llama_kv_cache_clear", "llama_kv_self_clear")
    with pytest.raises(UnavailableError, match=r"no known generation.*llama_kv_cache_clear, llama_memory_clear"):
        cpp_source.describe(source, "directory")


def test_a_checkout_of_llama_cpp_alone_is_one_too(tmp_path):
    source = write_tree(tmp_path, f"{cpp_source.NESTED_SUBMODULE}/", MAIN)
    digest = cpp_source.describe(source, "directory").digest
    (source / "ggml/part.c").write_text("int part(void) { return 4; }\n")
    assert cpp_source.describe(source, "directory").digest != digest


@pytest.mark.parametrize(
    "missing",
    ["CMakeLists.txt", *(f"3rdparty/llama.cpp/{name}" for name in ("src/llama.cpp", "include/llama.h"))],
)
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


def test_describing_a_checkout_only_reads_it(upstream):
    """Git would write the index again, and leave its lock where it is killed meanwhile."""
    os.utime(upstream / "CMakeLists.txt", (1, 1))
    before = (upstream / ".git/index").read_bytes()
    assert cpp_source.describe(upstream, "directory").dirty is False
    assert (upstream / ".git/index").read_bytes() == before


def test_the_submodule_is_put_back_to_the_pinned_commit(project, upstream, tmp_path):
    pinned = git(upstream, "rev-parse", "HEAD")
    (upstream / "new.txt").write_text("later\n")
    later = commit(upstream)
    fetched = cpp_source.fetch(project, tmp_path / "unused")
    git(fetched, "checkout", "--quiet", later)
    assert cpp_source.git_commit(cpp_source.fetch(project, tmp_path / "unused")) == pinned


def test_without_a_checkout_the_pinned_commit_is_fetched_once(upstream, tmp_path, monkeypatch):
    monkeypatch.setitem(cpp_source.PINNED, "march", git(upstream, "rev-parse", "HEAD"))
    fetched = cpp_source.fetch(None, tmp_path / "cache")
    assert fetched == tmp_path / "cache"
    assert (fetched / cpp_source.NESTED_SUBMODULE / "src/llama.cpp").is_file()
    shutil.rmtree(upstream)
    assert cpp_source.fetch(None, tmp_path / "cache") == fetched


def test_a_short_commit_is_found_in_the_history(project, upstream, tmp_path, monkeypatch):
    monkeypatch.setitem(cpp_source.PINNED, "main", git(upstream, "rev-parse", "--short=7", "HEAD"))
    pinned = git(upstream, "rev-parse", "HEAD")
    (upstream / "new.txt").write_text("later\n")
    commit(upstream)
    fetched = cpp_source.fetch(project, tmp_path / "cache", "main")
    assert fetched == tmp_path / "cache"
    assert cpp_source.git_commit(fetched) == pinned
    shutil.rmtree(upstream)
    assert cpp_source.fetch(project, tmp_path / "cache", "main") == fetched


def test_what_has_no_pinned_commit_is_not_downloaded(tmp_path):
    with pytest.raises(UnavailableError, match="no pinned commit of the generation mainline"):
        cpp_source.fetch(None, tmp_path / "cache", "mainline")


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
