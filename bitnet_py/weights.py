"""Typed views of every tensor of a BitNet model, checked by name for type, shape and usable values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitnet_py.config import ModelConfig
from bitnet_py.errors import ModelError, clip, model_error
from bitnet_py.gguf import GGMLType, GGUFFile
from bitnet_py.projections import PROJECTIONS, repack
from bitnet_py.quants import find_invalid_code
from bitnet_py.tables import TABLE_TYPES, Table, find_unusable, view
from bitnet_py.tq import TQ_TYPES

F32Array = npt.NDArray[np.float32]

SUB_NORMS = {"attn_sub_norm": "attn_sub_norm", "ffn_sub_norm": "ffn_sub_norm"}
"""Field of ``LayerWeights`` -> name in the file of a norm that a model has in every layer or nowhere."""
INPUT_NORMS = {
    "attn_q_norm_in": "attn_q_norm_in",
    "attn_k_norm_in": "attn_k_norm_in",
    "attn_v_norm_in": "attn_v_norm_in",
    "attn_sub_norm": "attn_output_norm_in",
    "ffn_gate_norm_in": "ffn_gate_norm_in",
    "ffn_up_norm_in": "ffn_up_norm_in",
    "ffn_sub_norm": "ffn_down_norm_in",
}
"""The same where every matrix may norm its own input; bitnet.cpp takes single ones, and ignores some of them."""

PLAIN = (GGMLType.F32,)
NORM_TYPES = (GGMLType.F32, GGMLType.F16)
"""Types of the weights of norms; F16 is widened."""

_CHUNK_BYTES = 16 << 20
_NOT_TERNARY = "no BitNet matrix, or a damaged file: convert or download it again"
_ORDINARY = "no 1.58-bit model, or one that was quantised again: give its I2_S file"
_ONE_TYPE = "convert the model again with one type for all matrices"
_DAMAGED = "the file is damaged or was badly converted: convert or download it again"


@dataclass(frozen=True, eq=False)
class I2SMatrix:
    """A ternary matrix ``(rows, cols)``: codes uint8 ``(rows * cols // 4,)`` as in ``quants``, one scale.

    A view into the mapped file; of another type (``projections``) it is a copy, packed anew.
    """

    data: npt.NDArray[np.uint8]
    rows: int
    cols: int
    scale: float
    """A float32 value, finite and above 0."""
    name: str = ""
    """Name of the tensor, for error messages."""
    factor: float = 1.0
    """Applied to the product after its own rounding: the tensor ``.scale``, a float32 value above 0."""
    bias: F32Array | None = None
    """``(rows,)``, added after that."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer. The norms are float32, and None where the model has none."""

    attn_norm: F32Array
    """``(dim,)``."""
    q: I2SMatrix
    """``(q_dim, dim)``."""
    k: I2SMatrix
    """``(kv_dim, dim)``."""
    v: I2SMatrix
    """``(kv_dim, dim)``."""
    o: I2SMatrix
    """``(dim, q_dim)``."""
    attn_sub_norm: F32Array | None
    """``(q_dim,)``."""
    ffn_norm: F32Array
    """``(dim,)``."""
    gate: I2SMatrix
    """``(hidden_dim, dim)``."""
    up: I2SMatrix
    """``(hidden_dim, dim)``."""
    down: I2SMatrix
    """``(dim, hidden_dim)``."""
    ffn_sub_norm: F32Array | None
    """``(hidden_dim,)``."""
    attn_q_norm_in: F32Array | None = None
    """``(dim,)``, as the other norms of a matrix's own input."""
    attn_k_norm_in: F32Array | None = None
    attn_v_norm_in: F32Array | None = None
    ffn_gate_norm_in: F32Array | None = None
    ffn_up_norm_in: F32Array | None = None
    q_norm: F32Array | None = None
    """``(head_dim,)``."""
    k_norm: F32Array | None = None
    """``(head_dim,)``."""
    attn_post_norm: F32Array | None = None
    """``(dim,)``."""
    ffn_post_norm: F32Array | None = None
    """``(dim,)``."""


@dataclass(frozen=True, eq=False)
class Weights:
    """All tensors of a model, read-only views into the mapped file; matrices of a type but I2_S are copies."""

    config: ModelConfig
    token_embd: Table
    """``(vocab_size, dim)``, as stored (``tables``)."""
    output: Table | None
    """The same of a separate LM head, None if the head is ``token_embd``."""
    output_norm: F32Array
    layers: tuple[LayerWeights, ...]
    path: Path
    token_embd_type: GGMLType = GGMLType.F16
    head_type: GGMLType = GGMLType.F16
    """Of ``head``."""
    rope_factors: F32Array | None = None
    """``(head_dim / 2,)``: divisors of the angles of RoPE, the tensor ``rope_freqs.weight``."""

    @property
    def head(self) -> Table:
        """Return the matrix of the LM head: ``output``, or ``token_embd`` when tied."""
        return self.token_embd if self.output is None else self.output

    @classmethod
    def load(cls, gguf: GGUFFile) -> Weights:
        """Look up, check and map every tensor; fast: only norms and scales are read (types but I2_S: everything).

        Raises:
            ModelError: a tensor is missing, unknown to this engine, of another type or shape, or a
                norm or scale is not usable.
        """
        return _Loader(gguf).load()

    def matrices(self) -> Iterator[I2SMatrix]:
        """Yield every ternary matrix, layer by layer."""
        for layer in self.layers:
            yield from (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)

    def check_finite(self) -> None:
        """Scan the whole file in chunks: no NaN or infinity in embedding and head, no code 3 in ternary matrices.

        Norms and scales were already checked by ``load``.

        Raises:
            ModelError: names the tensor and the first bad element.
        """
        self._check_table("token_embd.weight", self.token_embd, self.token_embd_type)
        if self.output is not None:
            self._check_table("output.weight", self.output, self.head_type)
        for ternary in self.matrices():
            for start in range(0, ternary.data.size, _CHUNK_BYTES):
                bad = find_invalid_code(ternary.data[start : start + _CHUNK_BYTES])
                if bad is not None:
                    byte = start + bad
                    what = f"tensor {ternary.name}, byte {byte} (row {byte * 4 // ternary.cols})"
                    raise model_error(self.path, what, expected="codes 0, 1, 2", found="code 3", remedy=_DAMAGED)

    def _check_table(self, name: str, table: Table, kind: GGMLType) -> None:
        step = max(1, _CHUNK_BYTES // (table.nbytes // len(table)))
        for start in range(0, len(table), step):
            bad = find_unusable(table[start : start + step], kind)
            if bad is not None:
                row, col, value = bad
                what = f"tensor {name}, element {(start + row, col)}"
                raise model_error(self.path, what, expected="a finite value", found=value, remedy=_DAMAGED)


class _Loader:
    """Looks up tensors by name and remembers which ones it has seen."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf
        self.config = ModelConfig.from_gguf(gguf)
        self.left = set(gguf.tensors)

    def error(self, name: str, expected: object, found: object, remedy: str = _DAMAGED) -> ModelError:
        return model_error(self.gguf.path, f"tensor {name}", expected=expected, found=found, remedy=remedy)

    def take(
        self, name: str, types: tuple[GGMLType, ...], shape: tuple[int, ...], remedy: str | None = None
    ) -> npt.NDArray[np.uint8]:
        info, wanted = self.gguf.tensors.get(name), " or ".join(ggml_type.name for ggml_type in types)
        if info is None:
            raise self.error(name, f"{wanted} {shape}", "no such tensor", "the model is incomplete")
        self.left.discard(name)
        if info.type not in types:
            as_type = f"convert the model again with this tensor as {types[0].name}"
            raise self.error(name, f"type {wanted}", info.type.name, remedy or as_type)
        if info.shape != shape:
            raise self.error(
                name, f"shape {shape}", info.shape, "its keys and its tensors disagree: convert again"
            )
        return self.gguf.data(name)

    def vector(self, name: str, width: int, types: tuple[GGMLType, ...] = PLAIN) -> F32Array:
        data = self.take(name, types, (width,))
        is_half = self.gguf.tensors[name].type is GGMLType.F16
        values = data.view("<f2").astype(np.float32) if is_half else data.view("<f4")
        values.flags.writeable = False
        finite = np.isfinite(values)
        if not finite.all():
            index = int(np.argmin(finite))
            raise self.error(f"{name}, element {index}", "a finite value", values[index])
        return values

    def norm(self, name: str, width: int) -> F32Array:
        return self.vector(name, width, NORM_TYPES)

    def optional(
        self, name: str, width: int, types: tuple[GGMLType, ...] = PLAIN, *, known: bool = True
    ) -> F32Array | None:
        """Return a vector that the model may lack; one that its architecture does not know is left."""
        return self.vector(name, width, types) if known and name in self.gguf.tensors else None

    def positive(self, name: str, width: int, *, known: bool) -> F32Array | None:
        values = self.optional(name, width, known=known)
        if values is not None and not (values > 0).all():
            index = int(np.argmin(values > 0))
            raise self.error(f"{name}, element {index}", "a value above 0", values[index])
        return values

    def table(self, name: str) -> Table:
        shape = (self.config.vocab_size, self.config.dim)
        data = self.take(name, TABLE_TYPES, shape)
        return view(data, self.gguf.tensors[name].type, shape[0])

    def ternary(self, name: str, rows: int, cols: int) -> I2SMatrix:
        data = self.take(name, tuple(PROJECTIONS.values()), (rows, cols), _ORDINARY)
        ggml_type = self.gguf.tensors[name].type
        if ggml_type is not GGMLType.I2_S:
            try:
                packed, scale = repack(data, ggml_type, cols)
            except ModelError as error:
                raise ModelError(f"{self.gguf.path}: tensor {name}: {error}; {_NOT_TERNARY}") from None
            packed.flags.writeable = False
            return I2SMatrix(packed, rows, cols, scale, name)
        n_bytes = rows * cols // 4
        scale = float(data[n_bytes : n_bytes + 4].view("<f4")[0])
        if not (np.isfinite(scale) and scale > 0):
            raise self.error(f"{name}, scale", "a finite value above 0", scale)
        return I2SMatrix(data[:n_bytes], rows, cols, scale, name)

    def projection(self, name: str, rows: int, cols: int, *, biased: bool = False) -> I2SMatrix:
        """Return a matrix with what follows its product, as far as the architecture has it."""
        known = self.config.architecture
        factor = self.positive(f"{name}.scale", 1, known=known.scales)
        bias = self.optional(f"{name}.bias", rows, known=known.biases and biased)
        matrix = self.ternary(f"{name}.weight", rows, cols)
        return replace(matrix, factor=1.0 if factor is None else float(factor[0]), bias=bias)

    def optional_norms(self) -> dict[str, str]:
        """Return field -> name in the file of the norms that the model has in every layer or nowhere."""
        known = self.config.architecture
        return INPUT_NORMS if known.input_norms else SUB_NORMS if known.sub_norms else {}

    def own_norms(self, blk: str) -> dict[str, F32Array]:
        """Return the norms that only some architectures have, and these always."""
        known, dim, head_dim = self.config.architecture, self.config.dim, self.config.head_dim
        norms = {}
        if known.head_norms:
            norms["q_norm"] = self.norm(blk + "attn_q_norm.weight", head_dim)
            norms["k_norm"] = self.norm(blk + "attn_k_norm.weight", head_dim)
        if known.post_norms:
            norms["attn_post_norm"] = self.norm(blk + "post_attention_norm.weight", dim)
            norms["ffn_post_norm"] = self.norm(blk + "post_ffw_norm.weight", dim)
        return norms

    def layer(self, index: int) -> LayerWeights:
        config = self.config
        dim, q_dim, kv_dim, hidden_dim = config.dim, config.q_dim, config.kv_dim, config.hidden_dim
        blk = f"blk.{index}."
        widths = {"attn_sub_norm": q_dim, "ffn_sub_norm": hidden_dim}
        optional = {
            field: self.optional(f"{blk}{name}.weight", widths.get(field, dim), NORM_TYPES)
            for field, name in self.optional_norms().items()
        }
        return LayerWeights(
            attn_norm=self.norm(blk + "attn_norm.weight", dim),
            q=self.projection(blk + "attn_q", q_dim, dim, biased=True),
            k=self.projection(blk + "attn_k", kv_dim, dim, biased=True),
            v=self.projection(blk + "attn_v", kv_dim, dim, biased=True),
            o=self.projection(blk + "attn_output", dim, q_dim, biased=True),
            ffn_norm=self.norm(blk + "ffn_norm.weight", dim),
            gate=self.projection(blk + "ffn_gate", hidden_dim, dim),
            up=self.projection(blk + "ffn_up", hidden_dim, dim),
            down=self.projection(blk + "ffn_down", dim, hidden_dim),
            **({"attn_sub_norm": None, "ffn_sub_norm": None} | optional | self.own_norms(blk)),
        )

    def load(self) -> Weights:
        head = "output.weight" if "output.weight" in self.gguf.tensors else "token_embd.weight"
        weights = Weights(
            config=self.config,
            token_embd=self.table("token_embd.weight"),
            output=None if head == "token_embd.weight" else self.table(head),
            output_norm=self.norm("output_norm.weight", self.config.dim),
            layers=tuple(self.layer(i) for i in range(self.config.n_layers)),
            path=self.gguf.path,
            token_embd_type=self.gguf.tensors["token_embd.weight"].type,
            head_type=self.gguf.tensors[head].type,
            rope_factors=self.positive(
                "rope_freqs.weight", self.config.head_dim // 2, known=self.config.architecture.rope_factors
            ),
        )
        self.check_optional_norms(weights.layers)
        self.check_biases(weights.layers)
        self.check_one_quantiser(weights)
        self.check_nothing_left()
        return weights

    def check_optional_norms(self, layers: tuple[LayerWeights, ...]) -> None:
        names = self.optional_norms()
        present = {
            f"blk.{i}.{name}.weight": getattr(layer, field) is not None
            for i, layer in enumerate(layers)
            for field, name in names.items()
        }
        if any(present.values()) and not all(present.values()):
            missing = [name for name, there in present.items() if not there]
            which = "both sub-norms" if names is SUB_NORMS else f"all {len(names)} norms of inputs"
            expected = f"{which} in every layer, or none at all"
            raise self.error(missing[0], expected, f"{len(missing)} of {len(present)} missing")

    def check_biases(self, layers: tuple[LayerWeights, ...]) -> None:
        for kind in ("q", "k", "v", "o"):
            without = [layer for layer in layers if getattr(layer, kind).bias is None]
            if 0 < len(without) < len(layers):
                name = getattr(without[0], kind).name.replace(".weight", ".bias")
                raise self.error(name, "a bias in every layer, or in none", f"{len(without)} without")

    def check_one_quantiser(self, weights: Weights) -> None:
        """Reject a mixture of I2_S and block types: llama.cpp multiplies them with other activations."""
        types = {matrix.name: self.gguf.tensors[matrix.name].type for matrix in weights.matrices()}
        first = next(iter(types.values()))
        for name, ggml_type in types.items():
            if (ggml_type in TQ_TYPES) != (first in TQ_TYPES):
                raise self.error(name, f"type {first.name}, as others have", ggml_type.name, _ONE_TYPE)

    def check_nothing_left(self) -> None:
        """Reject tensors that the engine would otherwise silently ignore (biases of the FFN, experts)."""
        if self.left:
            name = min(self.left)
            more = f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
            raise model_error(
                self.gguf.path,
                "tensor table",
                expected=f"only the tensors of {self.config.arch} with {self.config.n_layers} layers",
                found=f"unsupported tensor {clip(name)}{more}",
                remedy="the engine would ignore it and compute something else: convert the model without it",
            )
