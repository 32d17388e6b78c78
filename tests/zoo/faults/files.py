"""Weight faults: the candidate runs on a damaged copy of the model file, as if it read the right one wrongly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from crossval import taps
from tests.zoo.fault import FIRST, PREFILL, WeightFault
from tests.zoo.models import SHAPE, TENSORS, DamagedModel, codes, pack

Codes = npt.NDArray[np.uint8]

TOKENS = "token_ids"
"""In place of a tap: the fault changes what the text is tokenised into."""
ALL = ("ffn_up", "q", "k", "v", "attn_o_out", "ffn_gate", "ffn_down")
SOME = ("q", "ffn_down", "v")


def tensor(tap: str) -> str:
    """Return the tensor whose values the operation of a tap reads."""
    name = taps.parse(tap)
    return f"blk.{name.layer}.{TENSORS.get(name.tap, name.tap)}.weight"


def _neighbour(tap: str) -> str:
    """Return the same tap of the next layer."""
    name = taps.parse(tap)
    assert name.layer is not None
    return f"blk.{(name.layer + 1) % SHAPE.n_layers}.{name.tap}"


def _codes(change):
    def damage(model: DamagedModel, tap: str) -> None:
        packed = model.packed(tensor(tap))
        packed[:] = change(packed)

    return damage


def _scale(change):
    def damage(model: DamagedModel, tap: str) -> None:
        scale = model.scale(tensor(tap))
        scale[:] = change(scale)

    return damage


def _sequential(packed: Codes, shifts: tuple[int, ...]) -> Codes:
    """Return what a reader of four consecutive codes per byte sees, packed so that a right reader sees it."""
    read = packed[:, :, None] >> np.array(shifts, np.uint8) & 3
    return pack(read.reshape(packed.shape[0], -1))


def _packed_sequentially(packed: Codes) -> Codes:
    """Pack four consecutive codes per byte: what a converter with the wrong layout writes."""
    quads = codes(packed).reshape(packed.shape[0], -1, 4)
    return (quads << np.array([6, 4, 2, 0], np.uint8)).sum(2, dtype=np.uint8)


def _blocks_of_64(packed: Codes) -> Codes:
    groups = packed.reshape(packed.shape[0], -1, 1, 16)
    read = groups >> np.array([6, 4, 2, 0], np.uint8)[:, None] & 3
    return pack(read.reshape(packed.shape[0], -1))


def _scale_of_k(model: DamagedModel, tap: str) -> None:
    other = "attn_k" if "attn_k" not in tensor(tap) else "attn_v"
    model.scale(tensor(tap))[:] = model.scale(f"blk.{taps.parse(tap).layer}.{other}.weight")


def _of_next_layer(model: DamagedModel, tap: str) -> None:
    model.raw(tensor(tap))[:] = model.raw(tensor(_neighbour(tap)))


def _swap(first: str, second: str):
    def damage(model: DamagedModel, tap: str) -> None:
        layer = taps.parse(tap).layer
        a, b = (model.raw(f"blk.{layer}.{name}.weight") for name in (first, second))
        a[:], b[:] = b.copy(), a.copy()

    return damage


def _transpose(packed: Codes) -> Codes:
    return pack(np.ascontiguousarray(codes(packed).T))


def _embedding(change):
    def damage(model: DamagedModel, tap: str) -> None:
        table = model.f16("token_embd.weight")
        table[:] = change(table.copy())

    return damage


def _bf16_bits(table: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    return (table.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.float16)


def _through_bf16(table: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    return (table.astype(np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32).astype(np.float16)


def _final_norm_of_a_layer(model: DamagedModel, tap: str) -> None:
    model.raw("output_norm.weight")[:] = model.raw("blk.0.attn_norm.weight")


def _header(key: str, old: float, new: float):
    """Change a float32 of the file's header: an engine that has its own number there."""

    def value(number: float) -> bytes:
        return f"bitnet-b1.58.{key}".encode() + (6).to_bytes(4, "little") + np.float32(number).tobytes()

    return lambda model, tap: model.replace_once(value(old), value(new))


def _no_bos(model: DamagedModel, tap: str) -> None:
    key = b"tokenizer.ggml.add_bos_token\7\0\0\0"
    model.replace_once(key + b"\1", key + b"\0")


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
          _codes(lambda p: _sequential(p, (6, 4, 2, 0)))),
    _file("read-sequentially-low-first", 1, "four consecutive codes per byte, low bits first", ALL,
          _codes(lambda p: _sequential(p, (0, 2, 4, 6)))),
    _file("packed-sequentially", 1, "the converter packed four consecutive codes per byte", SOME,
          _codes(_packed_sequentially)),
    _file("table-zero-plus-minus", 2, "codes mean 0, +1, -1", ALL, _codes(lambda p: pack((codes(p) + 1) % 3))),
    _file("signs-inverted", 2, "codes mean +1, 0, -1", SOME, _codes(lambda p: pack(2 - codes(p)))),
    _file("blocks-of-64", 3, "blocks of 64 codes, as on ARM", ALL, _codes(_blocks_of_64)),
    _file("scale-one", 4, "the matrix's scale is not applied", ALL, _scale(lambda s: 1.0)),
    _file("scale-twice", 4, "the matrix's scale is applied twice", SOME, _scale(lambda s: s * s)),
    _file("scale-inverted", 4, "divided by the matrix's scale", SOME, _scale(lambda s: 1 / s)),
    _file("scale-doubled", 4, "twice the scale", SOME, _scale(lambda s: 2 * s)),
    _file("scale-halved", 4, "half the scale", SOME, _scale(lambda s: s / 2)),
    _file("scale-of-k", 4, "the scale of attn_k (for attn_k itself: of attn_v)", ALL, _scale_of_k),
    _file("of-another-layer", 10, "the matrix of the next layer", ALL, _of_next_layer),
    _file("transposed", 10, "x·W instead of W·x", ("attn_o_out", "q"), _codes(_transpose)),
    _file("gate-and-up-swapped", 6, "gate and up change places", ("ffn_gate",), _swap("ffn_gate", "ffn_up")),
    _file("k-and-v-swapped", 10, "K and V change places", ("k",), _swap("attn_k", "attn_v")),
    _file("norms-swapped", 7, "the weights of attn_norm and ffn_norm change places", ("attn_norm",),
          _swap("attn_norm", "ffn_norm")),
    _file("norm-of-another-layer", 7, "the norm's weight of the next layer",
          ("ffn_norm", "attn_norm", "attn_sub_norm", "ffn_sub_norm"), _of_next_layer),
    _file("embedding-bf16-bits", 12, "BF16 bits in the F16 embedding", ("inp_embd",), _embedding(_bf16_bits),
          layers=()),
    _file("embedding-through-bf16", 12, "the embedding was rounded to BF16", ("inp_embd",),
          _embedding(_through_bf16), layers=()),
    _file("embedding-transposed", 10, "the embedding table is read as (dim, vocab_size)", ("inp_embd",),
          _embedding(lambda t: t.reshape(t.shape[::-1]).T), layers=()),
    _file("head-not-tied", 10, "the head has its own random table", ("result_output",), lambda model, tap: None,
          source="untied", layers=()),
    _file("final-norm-of-a-layer", 7, "the final norm has the weight of an attn_norm", ("result_norm",),
          _final_norm_of_a_layer,
          layers=()),
    _file("rope-base-10000", 8, "base 10000 instead of the header's", ("q_rope",),
          _header("rope.freq_base", SHAPE.rope_base, 10000.0), layers=(FIRST,)),
    _file("eps-1e-6", 7, "eps 1e-6 instead of the header's", ("attn_norm",),
          _header("attention.layer_norm_rms_epsilon", SHAPE.rms_eps, 1e-6), layers=(FIRST,)),
    _file("bos-missing", 14, "no BOS before the prompt", (TOKENS,), _no_bos, layers=(), passes=PREFILL),
    _file("pre-tokeniser-default", 14, "pre-tokeniser `default` instead of `llama-bpe`", (TOKENS,),
          lambda model, tap: None, source="pre-default", layers=(), passes=PREFILL),
    _file("pre-tokeniser-not-named", 14, "the file does not name its pre-tokeniser (the official GGUF)", (TOKENS,),
          lambda model, tap: None, source="pre-none", layers=(), passes=PREFILL),
    _file("special-tokens-as-text", 14, "special tokens are split like text", (TOKENS,), _without_special_tokens,
          layers=(), passes=PREFILL),
)  # fmt: skip
