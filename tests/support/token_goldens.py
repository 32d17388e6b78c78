"""Token ids of live bitnet.cpp over the corpus, recorded: ``python -m tests.support.token_goldens MARCH MAIN``.

``MARCH`` and ``MAIN`` are libllama of the two generations. The file holds, per text, the different lists of ids
that any vocabulary gave (of a long one their digest, of a refused one nothing), and per vocabulary, generation and
mode which of them each text got.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitnet_py.arithmetic import GENERATIONS
from crossval.bitnet_cpp.vocabulary import LiveVocabulary, Refused
from crossval.tokens.compare import MODES
from crossval.tokens.corpus import shipped
from crossval.tokens.party import Ids
from tests.support import vocabularies

PATH = Path(__file__).resolve().parents[1] / "data" / "tokens_goldens.json.xz"
_LONGEST = 2000
"""Texts with more tokens than this are kept by digest."""


def stored(ids: Ids) -> Any:
    """Return what the file keeps of a text's ids."""
    if isinstance(ids, Refused):
        return None
    if len(ids) <= _LONGEST:
        return list(ids)
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in ids)).hexdigest()[:16]


@lru_cache(maxsize=1)
def load() -> dict[str, Any]:
    """Return the recorded goldens."""
    data: dict[str, Any] = json.loads(lzma.decompress(PATH.read_bytes()))
    return data


def record(libraries: Sequence[str]) -> dict[str, Any]:
    """Run every vocabulary through the live libraries, in the order of ``GENERATIONS``."""
    corpus = shipped()
    table: list[list[Any]] = [[] for _ in corpus.texts]
    runs: dict[str, dict[str, dict[str, list[int]]]] = {}
    recorded_with: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in vocabularies.KINDS:
            path = vocabularies.write(Path(folder) / "vocabulary.gguf", kind)
            for generation in vocabularies.known_to(kind):
                library = libraries[GENERATIONS.index(generation)]
                with LiveVocabulary(path, library) as live:
                    assert live.facts["generation"] == generation
                    recorded_with[generation] = sorted(live.facts["files"].values())
                    for mode, special in MODES.items():
                        texts = [text.data for text in corpus.texts]
                        found = live.tokenize_each(texts, add_bos=special, parse_special=special)
                        run = [_place(table[n], stored(ids)) for n, ids in enumerate(found)]
                        runs.setdefault(kind, {}).setdefault(generation, {})[mode] = run
    return {"corpus": corpus.digest, "recorded_with": recorded_with, "table": table, "runs": runs}


def _place(different: list[Any], ids: Any) -> int:
    if ids not in different:
        different.append(ids)
    return different.index(ids)


def main(argv: Sequence[str]) -> None:
    """Record, and write the file."""
    text = json.dumps(record(argv), separators=(",", ":"))
    PATH.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{PATH}: {len(text)} bytes, {PATH.stat().st_size} compressed")


if __name__ == "__main__":
    main(sys.argv[1:])
