"""Finding a built library, and when its manifest is trusted."""

from __future__ import annotations

import json

import pytest

from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp.library import LIBRARY_VARIABLE
from crossval.errors import UnavailableError


def test_the_configured_library_comes_first_and_must_exist(tmp_path, monkeypatch):
    built = tmp_path / "build/lib/libllama.so"
    built.parent.mkdir(parents=True)
    built.touch()
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path / "build")
    found = cpp_library.find_library()
    assert found is not None
    assert (found.path, found.origin, found.manifest) == (built, "build", None)

    ready = tmp_path / "ready.so"
    monkeypatch.setenv(LIBRARY_VARIABLE, str(ready))
    with pytest.raises(UnavailableError, match=r"BITNET_CPP_LIB=.*no such file"):
        cpp_library.find_library()
    ready.touch()
    found = cpp_library.find_library()
    assert found is not None
    assert (found.path, found.origin) == (ready, LIBRARY_VARIABLE)


def test_no_library_says_how_to_get_one_and_what_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_library, "default_build_dir", lambda: tmp_path)
    assert cpp_library.find_library() is None
    with pytest.raises(
        UnavailableError, match=r"make fetch-cpp.*BITNET_CPP_DIR.*BITNET_CPP_LIB.*--reference spec"
    ):
        cpp_library.require_library()


def test_a_manifest_is_believed_for_the_files_it_lists_only(tmp_path):
    manifest = {
        "version": 1,
        "source": {"commit": "c" * 40, "digest": "d"},
        "compiler": {"version": "clang"},
        "cmake": {"flags": "f"},
        "libraries": {"libggml.so": "1", "libllama.so": "2"},
    }
    path = tmp_path / cpp_library.MANIFEST_NAME
    path.write_text(json.dumps(manifest))
    files = {str(tmp_path / "libggml.so"): "1", str(tmp_path / "libllama.so"): "2"}
    found = cpp_library.manifest_for(files)
    assert found is not None
    assert found.source_commit == "c" * 40
    assert cpp_library.manifest_for({**files, str(tmp_path / "libllama.so"): "3"}) is None
    assert cpp_library.manifest_for({str(tmp_path / "libllama.so"): "2"}) is None
    for broken in (
        "",
        "[]",
        "{}",
        json.dumps({**manifest, "version": 2}),
        json.dumps({**manifest, "libraries": []}),
    ):
        path.write_text(broken)
        assert cpp_library.manifest_for(files) is None


def test_the_combined_digest_depends_on_names_and_contents_not_on_places():
    one = cpp_library.combined_digest({"/a/libllama.so": "1", "/b/libggml.so": "2"})
    assert one == cpp_library.combined_digest({"/c/libggml.so": "2", "/c/libllama.so": "1"})
    assert one != cpp_library.combined_digest({"/a/libllama.so": "2", "/b/libggml.so": "1"})
