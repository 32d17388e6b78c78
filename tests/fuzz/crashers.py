"""The smallest input of every kind of crash that a search has found, by target; each is a test for ever."""

from __future__ import annotations

import copy
import json
from typing import Any

from tests.fuzz.seeds import MANIFEST, header, receipts
from tests.support.gguf_bytes import model_container

_TEXT: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
_POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, _TEXT],
    "pair": [_TEXT],
    "special_tokens": {},
}
_TOKENIZER: dict[str, Any] = {
    **dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder")),
    "version": "1.0",
    "added_tokens": [],
    "post_processor": _POST_PROCESSOR,
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}


def _bench_of_no_setting() -> bytes:
    made = copy.deepcopy(next(one for one in receipts() if one.kind == "bench"))
    made["results"]["search"]["candidate"]["chosen"]["decode"] = 99
    return json.dumps(made).encode()


CRASHERS: dict[str, dict[str, bytes]] = {
    "receipt": {
        "showing a benchmark in a setting that was not tried": _bench_of_no_setting(),
    },
    "gguf": {
        "describing the tensors of a file without tensors": b"GGUF\x03\0\0\0" + bytes(16),
    },
    "gguf-spec": {
        "a line separator in a tensor's name, in an error": header(model_container()).replace(
            b"blk.0.attn_output", b"blk.0\x1cattn_output"
        ),
    },
    "checkpoint": {
        "a panic of the tokenizers package, no Exception": json.dumps({"tokenizer.json": _TOKENIZER}).encode(),
    },
    "manifest": {
        "nested deeper than Python's stack": b"[" * 3000,
        "a path with a NUL": json.dumps({**MANIFEST, "source": {**MANIFEST["source"], "path": "\0"}}).encode(),
    },
}
"""Target -> what went wrong -> input."""
