"""Weight faults: the candidate runs on a modified copy of the model file, as if it misread the original."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from crossval.model import taps
from crossval.selftest.damage import (
    Codes,
    DamagedModel,
    blocks_of_64,
    codes,
    of_codes,
    of_embedding,
    of_header,
    of_next_layer,
    of_scale,
    pack,
    read_sequentially,
    swap,
    table_transposed,
    tensor,
    transposed,
    zero_plus_minus,
)
from tests.zoo.fault import FIRST, PREFILL, WeightFault
from tests.zoo.models import SHAPE

TOKENS = "token_ids"
"""Used instead of a tap: the fault changes what the text is tokenised into."""
ALL = ("ffn_up", "q", "k", "v", "attn_o_out", "ffn_gate", "ffn_down")
SOME = ("q", "ffn_down", "v")


def _packed_sequentially(packed: Codes) -> Codes:
    """Pack four consecutive codes per byte: what a converter with the wrong layout writes."""
    quads = codes(packed).reshape(packed.shape[0], -1, 4)
    return (quads << np.array([6, 4, 2, 0], np.uint8)).sum(2, dtype=np.uint8)


def _scale_of_k(model: DamagedModel, tap: str) -> None:
    other = "attn_k" if "attn_k" not in tensor(tap) else "attn_v"
    model.scale(tensor(tap))[:] = model.scale(f"blk.{taps.parse(tap).layer}.{other}.weight")


def _bf16_bits(table: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    return (table.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.float16)


def _through_bf16(table: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    return (table.astype(np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32).astype(np.float16)


def _final_norm_of_a_layer(model: DamagedModel, tap: str) -> None:
    model.raw("output_norm.weight")[:] = model.raw("blk.0.attn_norm.weight")


def _no_bos(model: DamagedModel, tap: str) -> None:
    model.change_after(b"tokenizer.ggml.add_bos_token\7\0\0\0", 1, np.zeros_like)


def _without_special_tokens(model: DamagedModel, tap: str) -> None:
    """Turn control tokens (type 3) into normal ones (1): their text is then split like any other."""
    types = b"tokenizer.ggml.token_type\11\0\0\0\5\0\0\0" + SHAPE.vocab_size.to_bytes(8, "little")
    model.change_after(
        types, 4 * SHAPE.vocab_size, lambda data: np.where(data.view("<i4") == 3, 1, data.view("<i4"))
    )


def _file(name: str, family: int, what: str, taps_: tuple[str, ...], damage, **more) -> WeightFault:
    return WeightFault(f"file-{name}", family, what, taps_, damage=damage, **more)


FAULTS = (
    _file("read-sequentially", 1, "four consecutive codes per byte, high bits first", ALL,
          of_codes(lambda p: read_sequentially(p, (6, 4, 2, 0)))),
    _file("read-sequentially-low-first", 1, "four consecutive codes per byte, low bits first", ALL,
          of_codes(lambda p: read_sequentially(p, (0, 2, 4, 6)))),
    _file("packed-sequentially", 1, "the converter packed four consecutive codes per byte", SOME,
          of_codes(_packed_sequentially)),
    _file("table-zero-plus-minus", 2, "codes mean 0, +1, -1", ALL, of_codes(zero_plus_minus)),
    _file("signs-inverted", 2, "codes mean +1, 0, -1", SOME, of_codes(lambda p: pack(2 - codes(p)))),
    _file("blocks-of-64", 3, "blocks of 64 codes, as on ARM", ALL, of_codes(blocks_of_64)),
    _file("scale-one", 4, "the matrix's scale is not applied", ALL, of_scale(lambda s: 1.0)),
    _file("scale-twice", 4, "the matrix's scale is applied twice", SOME, of_scale(lambda s: s * s)),
    _file("scale-inverted", 4, "divided by the matrix's scale", SOME, of_scale(lambda s: 1 / s)),
    _file("scale-doubled", 4, "twice the scale", SOME, of_scale(lambda s: 2 * s)),
    _file("scale-halved", 4, "half the scale", SOME, of_scale(lambda s: s / 2)),
    _file("scale-of-k", 4, "the scale of attn_k (for attn_k itself: of attn_v)", ALL, _scale_of_k),
    _file("of-another-layer", 10, "the matrix of the next layer", ALL, of_next_layer),
    _file("transposed", 10, "x·W instead of W·x", ("attn_o_out", "q"), of_codes(transposed)),
    _file("gate-and-up-swapped", 6, "gate and up change places", ("ffn_gate",), swap("ffn_gate", "ffn_up")),
    _file("k-and-v-swapped", 10, "K and V change places", ("k",), swap("attn_k", "attn_v")),
    _file("norms-swapped", 7, "the weights of attn_norm and ffn_norm change places", ("attn_norm",),
          swap("attn_norm", "ffn_norm")),
    _file("norm-of-another-layer", 7, "the norm's weight of the next layer",
          ("ffn_norm", "attn_norm", "attn_sub_norm", "ffn_sub_norm"), of_next_layer),
    _file("embedding-bf16-bits", 12, "BF16 bits in the F16 embedding", ("inp_embd",), of_embedding(_bf16_bits),
          layers=()),
    _file("embedding-through-bf16", 12, "the embedding was rounded to BF16", ("inp_embd",),
          of_embedding(_through_bf16), layers=()),
    _file("embedding-transposed", 10, "the embedding table is read as (dim, vocab_size)", ("inp_embd",),
          of_embedding(table_transposed), layers=()),
    _file("head-not-tied", 10, "the head has its own random table", ("result_output",), lambda model, tap: None,
          source="untied", layers=()),
    _file("final-norm-of-a-layer", 7, "the final norm has the weight of an attn_norm", ("result_norm",),
          _final_norm_of_a_layer,
          layers=()),
    _file("rope-base-10000", 8, "base 10000 instead of the header's", ("q_rope",),
          of_header("rope.freq_base", 10000.0), layers=(FIRST,)),
    _file("eps-1e-6", 7, "eps 1e-6 instead of the header's", ("attn_norm",),
          of_header("attention.layer_norm_rms_epsilon", 1e-6), layers=(FIRST,)),
    _file("bos-missing", 14, "no BOS before the prompt", (TOKENS,), _no_bos, layers=(), passes=PREFILL),
    _file("pre-tokeniser-default", 14, "pre-tokeniser `default` instead of `llama-bpe`", (TOKENS,),
          lambda model, tap: None, source="pre-default", layers=(), passes=PREFILL),
    _file("pre-tokeniser-not-named", 14, "the file does not name its pre-tokeniser (the official GGUF)", (TOKENS,),
          lambda model, tap: None, source="pre-none", layers=(), passes=PREFILL),
    _file("special-tokens-as-text", 14, "special tokens are split like text", (TOKENS,), _without_special_tokens,
          layers=(), passes=PREFILL),
)  # fmt: skip
