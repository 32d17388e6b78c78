"""``crossval fetch-model`` against a stand-in for ``huggingface_hub``: no network, every call counted."""

from __future__ import annotations

import hashlib
import sys
import types

import pytest

from tests.support.strangers import error_line, run

REPO = "someone/a-model"
CONTENT = b"GGUF and so on"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """The parts of ``huggingface_hub`` that the command uses; ``fail``: what listing or downloading raises."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []
        self.names, self.stated, self.fail = ["README.md", "model.gguf"], DIGEST, {}
        self.errors = types.ModuleType("huggingface_hub.errors")
        plain = {
            "HfHubHTTPError": OSError,
            "HFValidationError": ValueError,
            "OfflineModeIsEnabled": ConnectionError,
        }
        for name, base in {**plain, "LocalEntryNotFoundError": FileNotFoundError}.items():
            setattr(self.errors, name, type(name, (base,), {}))
        self.errors.RepositoryNotFoundError = type("RepositoryNotFoundError", (self.errors.HfHubHTTPError,), {})
        self.errors.GatedRepoError = type("GatedRepoError", (self.errors.RepositoryNotFoundError,), {})
        self.module = types.ModuleType("huggingface_hub")
        self.module.HfApi, self.module.hf_hub_download = (lambda: self), self.download

    def model_info(self, repo, *, files_metadata):
        self.calls.append(("list", repo))
        if "list" in self.fail:
            raise self.fail["list"]
        lfs = types.SimpleNamespace(sha256=self.stated) if files_metadata and self.stated else None
        siblings = [types.SimpleNamespace(rfilename=name, lfs=lfs) for name in self.names]
        return types.SimpleNamespace(sha=COMMIT, siblings=siblings)

    def download(self, repo, name, *, revision, local_dir=None):
        self.calls.append(("download", repo, name, revision, local_dir))
        if "download" in self.fail:
            raise self.fail["download"]
        path = self.folder / name.replace("/", "-")
        path.write_bytes(CONTENT)
        return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made.module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", made.errors)
    return made


def fetch(*words):
    return run("fetch-model", REPO, *words)


def test_the_only_model_file_is_fetched_and_nothing_else(hub, tmp_path):
    result = fetch("--to", tmp_path / "here")
    assert result.exit_code == 0, result.output
    assert hub.calls == [("list", REPO), ("download", REPO, "model.gguf", COMMIT, str(tmp_path / "here"))]
    assert result.stdout.splitlines() == [
        f"file    {tmp_path / 'model.gguf'}",
        f"from    {REPO}, commit {COMMIT}",
        f"size    {len(CONTENT)} bytes",
        f"sha256  {DIGEST} (the hub states the same; not known to crossval)",
    ]


def test_a_file_by_name_goes_to_the_shared_cache(hub):
    hub.names = ["a.gguf", "b/c.gguf"]
    assert fetch("--file", "b/c.gguf", "--sha256", DIGEST).stdout.splitlines()[-1] == (
        f"sha256  {DIGEST} (the hub states the same, as asked for)"
    )
    assert hub.calls[1:] == [("download", REPO, "b/c.gguf", COMMIT, None)]


def test_a_digest_that_nobody_states_is_not_called_checked(hub):
    hub.stated = None
    assert fetch().stdout.splitlines()[-1] == f"sha256  {DIGEST} (the hub states none; not known to crossval)"


def test_another_digest_is_an_error(hub):
    result = fetch("--sha256", "0" * 64)
    assert result.exit_code == 4
    assert f"has sha256 {DIGEST}, expected is {'0' * 64}: do not use" in error_line(result)
    hub.stated = "1" * 64
    result = fetch("--sha256", DIGEST)
    assert result.exit_code == 4
    assert f"the hub states {'1' * 64}" in error_line(result)


@pytest.mark.parametrize(
    ("names", "words", "message"),
    [
        (["a.gguf", "b.gguf"], (), "has 2 GGUF files, choose one with --file: a.gguf, b.gguf"),
        (["a.bin"], (), "has no GGUF file; it has a.bin"),
        ([], (), "has no GGUF file; it has no files"),
        ([f"{n}.gguf" for n in range(10)], ("--file", "x.gguf"), "has no file x.gguf; it has 0.gguf, 1.gguf"),
    ],
)
def test_a_file_that_is_not_there_downloads_nothing(hub, names, words, message):
    hub.names = names
    result = fetch(*words)
    assert result.exit_code == 4
    assert message in error_line(result)
    assert hub.calls == [("list", REPO)]


ConnectError = type("ConnectError", (Exception,), {"__module__": "httpx"})
LaterConnectError = type("ConnectError", (Exception,), {"__module__": "httpx2._exceptions"})


@pytest.mark.parametrize("when", ["list", "download"])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConnectError("no route\nto host"), 3, "the model hub cannot be reached from here"),
        (LaterConnectError("no route"), 3, "the model hub cannot be reached from here"),
        (ConnectionResetError("reset"), 3, "the model hub cannot be reached from here"),
        ("LocalEntryNotFoundError", 3, "the model hub cannot be reached from here"),
        ("OfflineModeIsEnabled", 3, "HF_HUB_OFFLINE is set"),
        ("HfHubHTTPError", 3, "the model hub refused"),
        ("GatedRepoError", 3, "asks for an account"),
        ("RepositoryNotFoundError", 4, "there is no model repository"),
        ("HFValidationError", 4, "there is no model repository"),
        (NotADirectoryError(20, "Not a directory"), 4, "cannot write"),
        (KeyError("surprise"), 5, "this is a bug in crossval"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(hub, when, error, code, message):
    hub.fail[when] = getattr(hub.errors, error)("first line\nsecond line") if isinstance(error, str) else error
    result = fetch()
    assert result.exit_code == code, result.output
    assert message in error_line(result)


@pytest.mark.parametrize("name", ["huggingface_hub", "huggingface_hub.errors"])
def test_without_the_extra_one_line_says_what_to_install(hub, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    result = fetch()
    assert result.exit_code == 3
    assert error_line(result) == "error: huggingface_hub is not installed: pip install bitnet-parity[hub]"


@pytest.mark.parametrize("words", [(), (REPO, "--sha256", "abc"), (REPO, "--sha256", DIGEST.upper())])
def test_usage(words):
    assert run("fetch-model", *words).exit_code == 2


def test_the_real_library_has_what_the_command_uses():
    """Names only: a stand-in with other ones would show nothing."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is missing: pip install .[hub]")
    errors = pytest.importorskip("huggingface_hub.errors")
    stand_in = Hub(None)
    assert [name for name in vars(stand_in.errors) if name[0].isupper() and not hasattr(errors, name)] == []
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError)
    assert callable(hub.HfApi.model_info)
    assert callable(hub.hf_hub_download)
