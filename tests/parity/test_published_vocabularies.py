"""llama.cpp's published vocabulary tests: texts and token ids that lie beside its vocabulary files.

They are read where a checkout of bitnet.cpp has them; nothing of them is copied.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitnet_py.arithmetic import Generation
from bitnet_py.errors import TokenizerError
from bitnet_py.gguf import GGUFFile
from bitnet_py.tokenizer import Tokenizer
from crossval.bitnet_cpp import source as cpp_source
from crossval.bitnet_cpp.remedies import SOURCE_VARIABLE
from tests.parity.conftest import MISSING_CHECKOUT

pytestmark = pytest.mark.live

MODELS = Path("3rdparty/llama.cpp/models")
SEPARATOR = "\n__ggml_vocab_test__\n"
SUPPORTED = ("falcon", "gpt-2", "llama-spm", "mpt", "phi-3", "refact", "starcoder")
UNSUPPORTED = ("bert-bge", "deepseek-coder", "deepseek-llm")
WITHOUT_FILE = ("command-r", "llama-bpe", "qwen2")
"""llama.cpp publishes texts and ids of these, but not the vocabulary."""


@pytest.fixture(scope="module")
def checkout() -> tuple[Path, Generation]:
    """The folder of vocabularies in a checkout, and its generation."""
    named = os.environ.get(SOURCE_VARIABLE)
    if not named or not (Path(named) / MODELS).is_dir():
        pytest.skip(MISSING_CHECKOUT)
    generation: Generation = (
        "main" if cpp_source.describe(Path(named), "directory").generation == "main" else "march"
    )
    return Path(named) / MODELS, generation


def tokenizer_of(checkout: tuple[Path, Generation], name: str) -> Tokenizer:
    folder, generation = checkout
    with GGUFFile.open(folder / f"ggml-vocab-{name}.gguf") as gguf:
        return Tokenizer.from_gguf(gguf, generation)


@pytest.mark.parametrize("name", SUPPORTED)
def test_ids(checkout: tuple[Path, Generation], name: str) -> None:
    path = checkout[0] / f"ggml-vocab-{name}.gguf.inp"
    texts = path.read_text(encoding="utf-8").split(SEPARATOR)
    lines = path.with_suffix(".out").read_text(encoding="utf-8").splitlines()
    assert len(texts) - 1 == len(lines) > 40
    tokenizer = tokenizer_of(checkout, name)
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == [int(i) for i in line.split()], text


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_vocabularies_of_other_kinds_are_refused_by_name(checkout: tuple[Path, Generation], name: str) -> None:
    with pytest.raises(TokenizerError, match=r"is 'bert'; expected|'deepseek-.*' .* is not supported"):
        tokenizer_of(checkout, name)


def test_the_others_have_no_vocabulary_file(checkout: tuple[Path, Generation]) -> None:
    folder, _ = checkout
    known = {*SUPPORTED, *UNSUPPORTED}
    published = {path.name.removeprefix("ggml-vocab-").removesuffix(".gguf") for path in folder.glob("*.gguf")}
    with_tests = {path.name.removeprefix("ggml-vocab-").removesuffix(".gguf.inp") for path in folder.glob("*.inp")}
    assert published & with_tests == known
    assert with_tests - published >= set(WITHOUT_FILE)
