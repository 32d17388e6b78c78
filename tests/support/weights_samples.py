"""A receipt of kind ``weights`` to test with: three tensors and six keys, all as the checkpoint has them."""

from __future__ import annotations

from typing import Any

from bitnet_py.layout_evidence import FOUR_ROWS
from bitnet_py.tensor_facts import TensorFacts, ValueFacts
from crossval.passes import EngineIdentity
from crossval.receipts.file import Receipt
from crossval.receipts.kind import build
from crossval.receipts.party import Compute, Party
from crossval.weights.receipt import WEIGHTS
from crossval.weights.rows import CheckpointFile, Compared, Expected, KeyRow, TensorRow, WeightsResult
from tests.support import receipt_samples as samples

LAYOUT_NAMES = ("i2_s", "sequential", "sequential, low bits first", "blocks of 64", "strides reversed")
Z = dict.fromkeys((*LAYOUT_NAMES, FOUR_ROWS), 0.5) | {"i2_s": 1.5}
ROWS = (
    TensorRow(
        "token_embd.weight",
        TensorFacts("token_embd.weight", "F16", (300, 128), 76800, 76800, values=ValueFacts(0, 7, -1.5, 2.0, 0.5)),
        Expected("model.embed_tokens.weight", "table", (300, 128), "bfloat16"),
        Compared(38400, 0, 0),
    ),
    TensorRow(
        "blk.0.attn_norm.weight",
        TensorFacts("blk.0.attn_norm.weight", "F32", (128,), 512, 544, values=ValueFacts(0, 0, 0.5, 1.5, 1.0)),
        Expected("model.layers.0.input_layernorm.weight", "norm", (128,), "bfloat16"),
        Compared(128, 0, 0),
    ),
    TensorRow(
        "blk.0.attn_q.weight",
        TensorFacts("blk.0.attn_q.weight", "I2_S", (128, 128), 4128, 4128, (5000, 6384, 5000, 0), 0.25, None, Z),
        Expected("model.layers.0.self_attn.q_proj.weight", "matrix", (128, 128), "bfloat16", 0.25, 1.0),
        Compared(16384, 2, 2),
    ),
)
KEYS = (
    KeyRow("general.architecture", "bitnet-b1.58", "bitnet-b1.58"),
    KeyRow("bitnet-b1.58.block_count", 2, 2),
    KeyRow("bitnet-b1.58.context_length", 512, 512),
    KeyRow("bitnet-b1.58.rope.freq_base", 10000.0, 10000.0),
    KeyRow("tokenizer.ggml.pre", "llama-bpe", "llama-bpe"),
    KeyRow("tokenizer.chat_template", "9 characters, sha256 0123", None, "note"),
)
FILES = (CheckpointFile("config.json", "12" * 32), CheckpointFile("model.safetensors", "34" * 32))


def weights_result(**changes: Any) -> WeightsResult:
    given: dict[str, Any] = {"rows": ROWS, "keys": KEYS, "files": FILES}
    return WeightsResult(**{**given, **changes})


def weights_receipt(**changes: Any) -> Receipt:
    context = samples.context(
        text=None,
        template=None,
        token_ids=(),
        tokenizer={**samples.TOKENIZER, "engines_agree": None},
        candidate=Party("unused", EngineIdentity("bitnet_py")),
        reference=Party("unused", EngineIdentity("bitnet.cpp")),
        compute=Compute("none"),
        settings={},
    )
    return build(WEIGHTS, weights_result(**changes), context)
