"""What a sweep is, and what its cells depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crossval.errors import BadInputError
from crossval.sweep import plan
from crossval.sweep.plan import Sweep


def test_the_kernel_of_the_environment_is_an_input(model_path: Path, monkeypatch) -> None:
    made = Sweep((model_path,), ("a",), reference="spec")
    before = made.file(made.cells[0])
    monkeypatch.setenv("BITNET_KERNEL", "scalar")
    assert made.file(made.cells[0]) != before


def test_a_library_in_another_folder_of_the_build_is_an_input(tmp_path: Path) -> None:
    """A tree as CMake leaves it: the kernels are in ggml's folder."""
    for name in ("src/libllama.so", "ggml/src/libggml.so", "ggml/src/ggml-cpu/libggml-cpu.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = {path.name for path in plan._parts(tmp_path / "src/libllama.so")}
    assert found == {"libllama.so", "libggml.so", "libggml-cpu.so"}


@pytest.mark.parametrize(
    "words",
    [
        {"prompts": ("a", "a")},
        {"prompts": ("a\0b",)},
        {"prompts": ("a" * 100_001,)},
        {"prompts": ()},
        {"prompts": ("a",), "candidates": ("nothing",)},
        {"prompts": ("a",), "candidates": ("llama.cpp:/old/llama.cpp", "llama.cpp:/new/llama.cpp")},
    ],
)
def test_what_is_no_sweep(model_path: Path, words: dict[str, Any]) -> None:
    with pytest.raises(BadInputError):
        Sweep((model_path,), **words)


def test_candidates_without_kernels_are_compared_once(model_path: Path) -> None:
    made = Sweep((model_path,), ("a",), ("bitnet_py", "spec"), ("scalar", "avx2"))
    assert [(cell.candidate, cell.kernel) for cell in made.cells] == [(0, "scalar"), (0, "avx2"), (1, None)]
