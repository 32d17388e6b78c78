"""What a library is asked for when a model is loaded, and what its runner states of it; without a real library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitnet_py.convert import convert
from bitnet_py.ggml_types import GGMLType
from crossval.bitnet_cpp import runner as cpp_runner
from crossval.bitnet_cpp.abi import TABLES, Library
from crossval.bitnet_cpp.engine import Engine
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.errors import BadInputError, UnavailableError
from tests.support.c_compiler import compile_library, needs_compiler

BY_GENERATION = {table.generation: table for table in TABLES}
OFF, ON = 0, 1


def constant(value: int) -> Callable[..., int]:
    return lambda *_: value


class StandIn(Library):
    """A library whose functions answer for a small model; ``contexts``: the parameters of those it made."""

    def __init__(self, generation: str) -> None:
        self.table = BY_GENERATION[generation]
        self.contexts: list[Any] = []
        arch = next(iter(self.table.graphs))
        context, model = self.table.context_params, self.table.model_params

        def metadata(_model: int, key: bytes, buffer: Any, _size: int) -> int:
            if key != b"general.architecture":
                return -1
            buffer.value = arch.encode()
            return len(arch)

        def new_context(_model: int, params: Any) -> int:
            self.contexts.append(params)
            return len(self.contexts)

        answers: dict[str, Any] = {
            "default_model_params": lambda: model.struct(),
            "default_context_params": lambda: context.struct(**dict.fromkeys(self._flash(), -1)),
            "new_context": new_context,
            "metadata": metadata,
            "model_tensor": lambda _model, _name: 0,
        }
        numbers = {"n_ctx_train": 4096, "n_embd": 128, "n_vocab": 300, "n_ctx": 2048, "n_ubatch": 512}
        self._functions = {
            role: answers.get(role) or constant(numbers.get(role, 2)) for role in self.table.functions
        }

    def _flash(self) -> list[str]:
        return [] if self.table.flash_attention is None else [self.table.flash_attention]


def loaded(generation: str, flash_attention: bool | None) -> tuple[StandIn, dict[str, Any]]:
    library = StandIn(generation)
    engine = Engine(stack_bytes=8 << 20, library=library)
    options = {"n_ctx": None, "n_ubatch": 512, "n_threads": 2}
    return library, engine.load("m.gguf", {}, flash_attention=flash_attention, **options)


@pytest.mark.parametrize("generation", ["main", "mainline"])
@pytest.mark.parametrize(("asked", "set_to"), [(False, OFF), (True, ON), (None, ON)])
def test_flash_attention_is_never_left_to_the_library(generation, asked, set_to):
    """By itself, with -1, it decides on loading; scores would then be missing without a word."""
    library, facts = loaded(generation, asked)
    assert [params.flash_attn_type for params in library.contexts] == [set_to]
    assert facts["flash_attention"] is bool(set_to)


def test_the_first_generation_has_no_flash_attention_to_ask_for():
    for asked in (False, None):
        assert loaded("march", asked)[1]["flash_attention"] is None
    with pytest.raises(UnavailableError, match=r"flash attention of bitnet\.cpp .* is not supported here"):
        loaded("march", True)


@needs_compiler
@pytest.mark.parametrize("generation", ["main", "mainline"])
def test_emptying_the_cache_clears_its_values_too(tmp_path, generation):
    """A NaN that stayed in a masked cell would reach the next sequence: 0 times NaN."""
    code = """
        static int seen = -1;
        void * llama_get_memory(void * context) { return (char *) context + 1; }
        void llama_memory_clear(void * memory, _Bool values) { seen = values ? (int) (long) memory : -2; }
        int found(void) { return seen; }
    """
    shared = ctypes.CDLL(str(compile_library(tmp_path / "lib.so", code)))
    table = BY_GENERATION[generation]
    functions = {role: table.functions[role] for role in ("memory", "clear_memory")}
    library = Library(shared, SimpleNamespace(functions=functions))  # type: ignore[arg-type]  # no more of it is used
    library.empty_cache(41)
    assert shared.found() == 42


FACTS = {
    "generation": "main",
    "engine": "bitnet.cpp",
    "files": {"libllama.so": "ab" * 32},
    "simd_width": 8,
    "fused_quantizer": False,
    "binary16_sums": False,
    "in_blocks": {"fused_quantizer": True, "fused_sums": True},
    "system_info": "stand-in",
    "title": "bitnet.cpp main",
    "architectures": ["bitnet", "bitnet-b1.58"],
}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The loads that runners ask their child for; it answers as a library of main would."""
    asked: list[dict[str, Any]] = []

    def request(self: BitnetCppRunner, name: str, params: dict[str, Any], *, what: str) -> SimpleNamespace:
        asked.append(params)
        return SimpleNamespace(header=loaded("main", params["flash_attention"])[1])

    monkeypatch.setattr(BitnetCppRunner, "start", lambda self: None)
    monkeypatch.setattr(BitnetCppRunner, "request", request)
    monkeypatch.setattr(cpp_runner, "open_in", lambda child, library: FACTS)
    return asked


def test_an_architecture_that_the_generation_lacks_is_refused_before_it_is_loaded(requests, make_model):
    model = make_model(arch="llama")
    with pytest.raises(BadInputError, match="llama") as refused, BitnetCppRunner(model, library="libllama.so"):
        pass
    assert "bitnet.cpp main" in str(refused.value)
    assert not requests


def test_scores_are_captured_unless_flash_attention_is_asked_for(requests, make_model):
    with BitnetCppRunner(make_model(), library="libllama.so") as runner:
        assert runner.identity.numerics.flash_attention is False
    assert [one["flash_attention"] for one in requests] == [False]


@pytest.mark.parametrize(("flash_attention", "threads"), [(False, None), (True, 2), (None, 2)])
def test_threads_are_stated_where_bits_depend_on_them(requests, make_model, flash_attention, threads):
    with BitnetCppRunner(make_model(), library="libllama.so", flash_attention=flash_attention) as runner:
        assert runner.identity.numerics.attention_threads == threads


def test_the_quantiser_is_that_of_the_matrices(requests, make_model, tmp_path: Path):
    by_row = make_model(dim=256, hidden_dim=256, n_layers=1)
    convert(by_row, tmp_path / "blocks.gguf", GGMLType.TQ2_0)
    stated = []
    for path in (by_row, tmp_path / "blocks.gguf"):
        with BitnetCppRunner(path, library="libllama.so") as runner:
            numerics = runner.identity.numerics
        stated.append((numerics.quantizer_block, numerics.fused_quantizer, numerics.fused_sums))
    assert stated == [(None, False, None), (256, True, True)]
