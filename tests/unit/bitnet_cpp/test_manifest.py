"""When the manifest beside a library is believed."""

from __future__ import annotations

import json
import shutil

from crossval.bitnet_cpp import manifest as cpp_manifest

MANIFEST = {
    "version": 1,
    "source": {"commit": "c" * 40, "digest": "d", "path": "/src/of/it"},
    "compiler": {"version": "clang"},
    "cmake": {"flags": "f", "cache": {"GGML_OPENMP": "ON"}},
    "libraries": {"libggml.so": "1", "libllama.so": "2"},
}


def write(build, manifest=MANIFEST, **cache):
    """Write what a build leaves in its directory; return the loaded files."""
    facts = {
        "CMAKE_CACHEFILE_DIR": build / "cmake", "CMAKE_HOME_DIRECTORY": "/src/of/it", "GGML_OPENMP": "ON", **cache,
    }  # fmt: skip
    (build / "lib").mkdir(parents=True, exist_ok=True)
    (build / "cmake").mkdir(exist_ok=True)
    lines = [f"{name}:INTERNAL={value}\n" for name, value in facts.items() if value is not None]
    (build / "cmake/CMakeCache.txt").write_text("# CMake\n" + "".join(lines))
    (build / "lib" / cpp_manifest.MANIFEST_NAME).write_text(json.dumps(manifest))
    return {str(build / "lib" / name): digest for name, digest in MANIFEST["libraries"].items()}


def test_a_manifest_is_believed_for_the_files_it_lists_only(tmp_path):
    files = write(tmp_path)
    found = cpp_manifest.manifest_for(files)
    assert found is not None
    assert found.source_commit == "c" * 40
    llama = str(tmp_path / "lib/libllama.so")
    assert cpp_manifest.manifest_for({**files, llama: "3"}) is None
    assert cpp_manifest.manifest_for({llama: "2"}) is None
    for broken in ("", "[]", "[" * 3000, "{}", {**MANIFEST, "version": 2}, {**MANIFEST, "libraries": []}):
        path = tmp_path / "lib" / cpp_manifest.MANIFEST_NAME
        path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
        assert cpp_manifest.manifest_for(files) is None


def test_a_manifest_is_believed_where_its_build_was_made_only(tmp_path):
    """One written by hand, or copied with its library, has no record of CMake that agrees with it."""
    built = tmp_path / "build"
    assert cpp_manifest.manifest_for(write(built)) is not None
    assert cpp_manifest.manifest_for(write(built, CMAKE_HOME_DIRECTORY=built / "source")) is not None
    for other in (
        {"CMAKE_CACHEFILE_DIR": tmp_path / "elsewhere/cmake"},
        {"CMAKE_HOME_DIRECTORY": "/another/source"},
        {"GGML_OPENMP": "OFF"},
        {"GGML_OPENMP": None},
        {"CMAKE_CACHEFILE_DIR": None},
    ):
        assert cpp_manifest.manifest_for(write(built, **other)) is None
    for cmake in ({"flags": "f", "cache": {}}, {"flags": "f"}, {"flags": "f", "cache": []}):
        assert cpp_manifest.manifest_for(write(built, {**MANIFEST, "cmake": cmake})) is None
    files = write(built)
    (built / "cmake/CMakeCache.txt").unlink()
    assert cpp_manifest.manifest_for(files) is None
    shutil.rmtree(built / "cmake")
    assert cpp_manifest.manifest_for(files) is None


def test_the_combined_digest_depends_on_names_and_contents_not_on_places():
    one = cpp_manifest.combined_digest({"/a/libllama.so": "1", "/b/libggml.so": "2"})
    assert one == cpp_manifest.combined_digest({"/c/libggml.so": "2", "/c/libllama.so": "1"})
    assert one != cpp_manifest.combined_digest({"/a/libllama.so": "2", "/b/libggml.so": "1"})
