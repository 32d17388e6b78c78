"""When the manifest beside a library is believed."""

from __future__ import annotations

import json

from crossval.bitnet_cpp import manifest as cpp_manifest


def test_a_manifest_is_believed_for_the_files_it_lists_only(tmp_path):
    manifest = {
        "version": 1,
        "source": {"commit": "c" * 40, "digest": "d"},
        "compiler": {"version": "clang"},
        "cmake": {"flags": "f"},
        "libraries": {"libggml.so": "1", "libllama.so": "2"},
    }
    path = tmp_path / cpp_manifest.MANIFEST_NAME
    path.write_text(json.dumps(manifest))
    files = {str(tmp_path / "libggml.so"): "1", str(tmp_path / "libllama.so"): "2"}
    found = cpp_manifest.manifest_for(files)
    assert found is not None
    assert found.source_commit == "c" * 40
    assert cpp_manifest.manifest_for({**files, str(tmp_path / "libllama.so"): "3"}) is None
    assert cpp_manifest.manifest_for({str(tmp_path / "libllama.so"): "2"}) is None
    for broken in (
        "",
        "[]",
        "[" * 3000,
        '{"version": 1, "version": 1}',
        "{}",
        json.dumps({**manifest, "version": 2}),
        json.dumps({**manifest, "libraries": []}),
    ):
        path.write_text(broken)
        assert cpp_manifest.manifest_for(files) is None


def test_the_combined_digest_depends_on_names_and_contents_not_on_places():
    one = cpp_manifest.combined_digest({"/a/libllama.so": "1", "/b/libggml.so": "2"})
    assert one == cpp_manifest.combined_digest({"/c/libggml.so": "2", "/c/libllama.so": "1"})
    assert one != cpp_manifest.combined_digest({"/a/libllama.so": "2", "/b/libggml.so": "1"})
