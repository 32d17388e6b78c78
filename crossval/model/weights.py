"""Weights and hyper-parameters for the specification, read without the engine's code.

The container is read by the ``gguf`` package, extended by the one tensor type it lacks, I2_S, which is decoded by
formulas written from the format's definition; the package decodes all others. If the engine misreads a scale,
a block or a header key, the specification does not repeat the error. Only the safety checks of the container and
of the header's ranges (``GGUFFile``, ``ModelConfig``) come from ``bitnet_py``: they run first, so that a hostile
file is rejected before the ``gguf`` package, which trusts lengths, reads it; none of their values is used.
"""

from __future__ import annotations

import copy
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGUFValueType
from gguf.gguf_reader import ReaderField

from bitnet_py.config import ModelConfig
from bitnet_py.errors import BitnetError
from bitnet_py.gguf import GGUFFile
from crossval.errors import BadInputError
from crossval.model.config import IMPLIED, MAY_HAVE, SpecConfig, may_pool
from crossval.model.graphs import op_table
from crossval.model.kinds import BitLinear, Embedding, Pooling, RmsNorm, Rope, TernaryMatrix, Weight
from crossval.model.reference_graph import followed
from crossval.model.tables import TABLE_TYPES, TABLES, DecodedTable, decode
from crossval.model.ternary import BLOCK_TYPES, I2_S, I2_S_TAIL_BYTES, decode_blocks, decode_floats, decode_i2_s

BIASED = ("attn_q", "attn_k", "attn_v", "attn_output")
"""Matrices that may have a bias."""
PLAIN_TYPES = ("F16", "F32")
"""Types of which the values are read where they lie."""
POOLINGS: Mapping[int, Pooling | None] = {0: None, 1: "mean", 2: "cls", 3: "last"}
"""Value of the key ``pooling_type`` -> how tokens are pooled."""
MOST_SPARE = 2
"""Matrices of one shape whose memory is reused: a layer has no more of one shape."""
DECODED_BUDGET_BYTES = 256 << 20
"""Models whose matrices fit into this are decoded once; larger ones at every use, one matrix at a time."""


class _Reader(GGUFReader):  # type: ignore[misc]  # the package is untyped
    """``GGUFReader`` that also maps I2_S tensors, as raw bytes, and reads arrays in one step.

    Arrays hold the vocabulary, which is not needed here; the package would make one object per entry.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.i2_s: dict[str, tuple[tuple[int, int], npt.NDArray[np.uint8]]] = {}
        """Name to shape ``(rows, cols)`` and bytes."""
        super().__init__(path)
        self._types = {tensor.name: tensor.tensor_type.name for tensor in self.tensors}
        self.blocks = {
            tensor.name: (tensor.tensor_type, np.asarray(tensor.data))
            for tensor in self.tensors
            if tensor.tensor_type in BLOCK_TYPES and tensor.name not in TABLES
        }
        """Name to type and bytes ``(rows, bytes of a row)``."""
        self.tables = {
            t.name: (t.tensor_type, np.asarray(t.data))
            for t in self.tensors
            if t.name in TABLES and t.tensor_type.name in TABLE_TYPES and t.tensor_type.name not in PLAIN_TYPES
        }
        """The same of embedding and LM head, where they have to be decoded."""
        self.floats = {
            t.name: np.asarray(t.data)
            for t in self.tensors
            if t.name not in TABLES and t.tensor_type.name in PLAIN_TYPES and len(t.shape) > 1
        }
        """Name to values of matrices that are stored in floating point."""
        coded = {*self.blocks, *self.tables, *self.floats}
        self.plain = {t.name: np.asarray(t.data) for t in self.tensors if t.name not in coded}

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if GGUFValueType(raw_type) is not GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        element = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if element is GGUFValueType.STRING:
            end = _skip_strings(memoryview(self.data), start, count)
            values = self.data[start:end]
        else:
            values = self._get(start, self.gguf_scalar_to_np[element], count)
            end = start + values.nbytes
        return end - orig_offs, [values], [0], [GGUFValueType.ARRAY, element]

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        known = []
        for field in fields:
            _, name, _, dims, raw_type, offset = field.parts
            if int(raw_type[0]) != I2_S:
                known.append(field)
                continue
            rows, cols = (int(d) for d in dims[::-1])
            start = start_offs + int(offset[0])
            size_bytes = rows * cols // 4 + I2_S_TAIL_BYTES
            self.i2_s[bytes(name).decode()] = (rows, cols), np.asarray(self.data[start : start + size_bytes])
        super()._build_tensors(start_offs, known)

    def type_name(self, tensor: str) -> str:
        """Return ggml's name of a tensor's type."""
        return "I2_S" if tensor in self.i2_s else self._types[tensor]

    def ternary_shapes(self) -> dict[str, tuple[int, int]]:
        """Return ``(rows, cols)`` of every ternary matrix."""
        shapes = {name: shape for name, (shape, _) in self.i2_s.items()}
        shapes |= {name: values.shape for name, values in self.floats.items()}
        for name, (kind, data) in self.blocks.items():
            elements, size_bytes = GGML_QUANT_SIZES[kind]
            shapes[name] = (int(data.shape[0]), data.shape[1] // size_bytes * elements)
        return shapes

    def table_shapes(self) -> dict[str, tuple[int, int]]:
        """Return ``(rows, cols)`` of the tables that have to be decoded."""
        shapes = {}
        for name, (kind, data) in self.tables.items():
            elements, size_bytes = GGML_QUANT_SIZES[kind]
            shapes[name] = (int(data.shape[0]), data.shape[1] // size_bytes * elements)
        return shapes

    def scalar(self, key: str, default: Any = None) -> Any:
        """Return a number from the header (the first, where a key has one value per layer)."""
        field = self.fields.get(key)
        return default if field is None else field.parts[field.data[0]][0].item()

    def string(self, key: str) -> str:
        """Return a string from the header."""
        field = self.fields[key]
        return bytes(field.parts[field.data[0]]).decode()


def _skip_strings(data: memoryview, offset: int, count: int) -> int:
    """Return the offset after ``count`` strings (u64 length, then that many bytes)."""
    for _ in range(count):
        offset += 8 + struct.unpack_from("<Q", data, offset)[0]
    return offset


class SpecWeights:
    """The weights of one GGUF file by tensor name, decoded when asked for; satisfies ``WeightSource``.

    Norms are float64 vectors; the embedding and head tables are views into the mapped file where their type allows
    it (``crossval.model.tables``); ternary matrices are decoded one at a time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map and check the file.

        Raises:
            BadInputError: unreadable, malformed, or not a model the specification defines.
        """
        self.path = os.fspath(path)
        _check_container(self.path)
        try:
            self._reader = _Reader(self.path)
        except (ValueError, KeyError, IndexError, struct.error, OSError) as error:
            raise self._error("file", "GGUF as the gguf package reads it", error) from error
        self._decoded: dict[str, TernaryMatrix] = {}
        self._tables: dict[str, DecodedTable] = {}
        self._shapes = self._reader.ternary_shapes()
        decoded_bytes = sum(4 * rows * cols for rows, cols in self._shapes.values())
        self._spare: dict[tuple[int, ...], list[npt.NDArray[np.float32]]] = {}
        self._lock = threading.Lock()
        self._keep = decoded_bytes <= DECODED_BUDGET_BYTES
        self.config = self._read_config()
        self._check_tensors()

    def __getitem__(self, name: str, /) -> Weight:
        """Return a weight by its GGUF name.

        Raises:
            KeyError: the model has no such tensor.
            BadInputError: its values are unusable (not finite, undefined code).
        """
        if name in self._shapes:
            return self._ternary(name)
        if name in self._reader.tables:
            return self._table(name)
        array = self._reader.plain[name]
        if array.ndim > 1:
            return array
        vector = array.astype(np.float64)
        if not np.isfinite(vector).all():
            raise self._error(f"tensor {name}", "finite values", "NaN or infinity")
        return vector

    def following(self, generation: str | None) -> SpecWeights:
        """Return the same weights in the graph that a generation of bitnet.cpp computes of them."""
        config = followed(self.config, generation)
        if config == self.config:
            return self
        other = copy.copy(self)
        other.config = config
        return other

    def reuse(self, weights: Iterable[Weight]) -> None:
        """Decode the next matrices into the memory of these, which are no longer read: new memory costs more time.

        The pages of the file that were read are released.
        """
        spare: dict[tuple[int, ...], list[npt.NDArray[np.float32]]] = {}
        for weight in weights:
            if isinstance(weight, TernaryMatrix) and not self._keep:
                spare.setdefault(weight.signs.shape, []).append(weight.signs)
        with self._lock:
            self._spare = {shape: found[:MOST_SPARE] for shape, found in spare.items()}
        self._reader.data._mmap.madvise(mmap.MADV_DONTNEED)

    def _table(self, name: str) -> DecodedTable:
        with self._lock:
            if name not in self._tables:
                kind, data = self._reader.tables[name]
                try:
                    self._tables[name] = decode(data, kind)
                except ValueError as error:
                    raise self._error(f"tensor {name}", f"{kind.name} weights", error) from error
            return self._tables[name]

    def _ternary(self, name: str) -> TernaryMatrix:
        if name in self._decoded:
            return self._decoded[name]
        shape = self._shapes[name]
        with self._lock:
            spare = self._spare.get(shape)
            out = spare.pop() if spare else None
        try:
            signs, scale = self._decode(name, shape, out)
        except ValueError as error:
            raise self._error(f"tensor {name}", f"{self._reader.type_name(name)} weights", error) from error
        values = self._reader.plain.get(_factor_of(name))
        factor = 1.0 if values is None else float(values[0])
        if not (np.isfinite(scale * factor) and scale > 0 and factor > 0):
            found = scale if values is None else f"{scale} times {factor}"
            raise self._error(f"tensor {name}, scale", "a finite number above 0", found)
        matrix = TernaryMatrix(signs, scale * factor, factor)
        if self._keep:
            self._decoded[name] = matrix
        return matrix

    def _decode(
        self, name: str, shape: tuple[int, int], out: npt.NDArray[np.float32] | None
    ) -> tuple[npt.NDArray[np.float32], float]:
        if name in self._reader.floats:
            return decode_floats(self._reader.floats[name], out)
        if name in self._reader.blocks:
            kind, blocks = self._reader.blocks[name]
            return decode_blocks(blocks, kind, shape, out)
        data, n_packed = self._reader.i2_s[name][1], shape[0] * shape[1] // 4
        scale = float(data[n_packed : n_packed + 4].view("<f4")[0])
        return decode_i2_s(data[:n_packed], *shape, out), scale

    def _read_config(self) -> SpecConfig:
        reader = self._reader
        arch = reader.string("general.architecture")
        names = {*self._shapes, *reader.plain, *reader.tables}
        tables = reader.table_shapes() | {
            name: reader.plain[name].shape for name in TABLES if name in reader.plain
        }
        if "token_embd.weight" not in tables:
            raise self._error("tensor token_embd.weight", f"{' or '.join(TABLE_TYPES)} values", "no such tensor")
        head = "output.weight" if "output.weight" in names else "token_embd.weight"
        may_have = MAY_HAVE.get(arch, frozenset())
        n_heads = reader.scalar(f"{arch}.attention.head_count")
        dim = reader.scalar(f"{arch}.embedding_length")
        return SpecConfig(
            n_layers=reader.scalar(f"{arch}.block_count"),
            n_heads=n_heads,
            n_kv_heads=reader.scalar(f"{arch}.attention.head_count_kv", n_heads),
            head_dim=reader.scalar(f"{arch}.attention.key_length", dim // n_heads),
            dim=dim,
            hidden_dim=reader.scalar(f"{arch}.feed_forward_length"),
            vocab_size=int(tables["token_embd.weight"][0]),
            context_length=reader.scalar(f"{arch}.context_length"),
            # llama.cpp's default where the key is absent; both keys are float32 by definition of the format.
            rope_base=float(np.float32(reader.scalar(f"{arch}.rope.freq_base", 10000.0))),
            rms_eps=float(np.float32(reader.scalar(f"{arch}.attention.layer_norm_rms_epsilon"))),
            rope_scale=self._rope_scale(arch),
            rope_factors="rope_freqs" in may_have and "rope_freqs.weight" in names,
            biases=frozenset(name for name in BIASED if "bias" in may_have and f"blk.0.{name}.bias" in names),
            input_norms="input_norms" in may_have and any(name.endswith("_norm_in.weight") for name in names),
            pooling=self._pooling(arch) if may_pool(arch) else None,
            attn_sub_norm="blk.0.attn_sub_norm.weight" in names,
            ffn_sub_norm="blk.0.ffn_sub_norm.weight" in names,
            tied_head=head == "token_embd.weight",
            head_type=reader.type_name(head),
            architecture=arch,
            **IMPLIED[arch],
        )

    def _pooling(self, arch: str) -> Pooling | None:
        """Return how tokens are pooled; None: they are not."""
        number = self._reader.scalar(f"{arch}.pooling_type", 0)
        if number not in POOLINGS:
            kinds = ", ".join(f"{at} ({name or 'none'})" for at, name in POOLINGS.items())
            raise self._error(f"key {arch}.pooling_type", kinds, number)
        return POOLINGS[number]

    def _rope_scale(self, arch: str) -> float:
        """Return 1 / the factor of linear RoPE scaling, a float32 in the file; 1 where none is set."""
        reader = self._reader
        if f"{arch}.rope.scaling.type" in reader.fields and reader.string(f"{arch}.rope.scaling.type") == "none":
            return 1.0
        old = reader.scalar(f"{arch}.rope.scale_linear", 0.0)
        return 1.0 / float(np.float32(reader.scalar(f"{arch}.rope.scaling.factor", old) or 1.0))

    def _check_tensors(self) -> None:
        """Require exactly the tensors of the graph: an extra one would be silently ignored."""
        expected = _expected_shapes(self.config)
        if "scale" in MAY_HAVE.get(self.config.architecture, ()):
            expected.update({name: (1,) for name in map(_factor_of, self._shapes) if name in self._reader.plain})
        ternary = {op.weights[0] for op in op_table(self.config) if isinstance(op.kind, BitLinear)}
        found: dict[str, tuple[int, ...]] = dict(self._shapes)
        found.update({name: data.shape for name, data in self._reader.plain.items()})
        found.update(self._reader.table_shapes())
        for name in sorted(expected.keys() | found.keys()):
            if name not in expected:
                raise self._error(f"tensor {name}", "no such tensor (the graph has no use for it)", found[name])
            if name not in found:
                raise self._error(f"tensor {name}", f"shape {expected[name]}", "no such tensor")
            tables = " or ".join(TABLE_TYPES)
            want = (
                "I2_S or TQ1_0 or TQ2_0 or F16 or F32"
                if name in ternary
                else tables
                if name in TABLES
                else "F16 or F32"
            )
            have = self._reader.type_name(name)
            if have not in want.split(" or "):
                raise self._error(f"tensor {name}, type", want, have)
            if found[name] != expected[name]:
                raise self._error(f"tensor {name}, shape", expected[name], found[name])

    def _error(self, what: str, expected: object, found: object) -> BadInputError:
        return BadInputError(
            f"{self.path}: {what}: expected {expected}, found {found}; "
            "the specification cannot run this model: convert it again from its original weights"
        )


class SpareWeights:
    """The weights of a file, used one at a time: each matrix reuses the memory of the last one of its shape."""

    def __init__(self, weights: SpecWeights) -> None:
        self._weights = weights
        self._last: dict[tuple[int, ...], TernaryMatrix] = {}

    def __getitem__(self, name: str, /) -> Weight:
        """Return a weight, valid until another is asked for."""
        self._weights.reuse(self._last.values())
        weight = self._weights[name]
        if isinstance(weight, TernaryMatrix):
            self._last[weight.signs.shape] = weight
        return weight


def _check_container(path: str) -> None:
    try:
        with GGUFFile.open(path) as gguf:
            ModelConfig.from_gguf(gguf)
    except BitnetError as error:
        raise BadInputError(str(error)) from error


def _factor_of(matrix: str) -> str:
    """Return the tensor that holds another factor of a matrix."""
    return matrix.removesuffix(".weight") + ".scale"


def _expected_shapes(config: SpecConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the graph: matrices and tables ``(rows, cols)``, vectors ``(n,)``."""
    ops = op_table(config)
    width = {"token_ids": config.vocab_size, **{op.output: op.n_features(config) for op in ops}}
    shapes: dict[str, tuple[int, ...]] = {}
    for op in (op for op in ops if op.weights):
        n_in, n_out = width[op.inputs[0]], width[op.output]
        for name in op.weights:
            if isinstance(op.kind, RmsNorm):
                shapes[name] = op.shape(config, 1, 1)[-1:]
            elif name.endswith(".bias"):
                shapes[name] = (n_out,)
            elif isinstance(op.kind, Rope):
                shapes[name] = (config.head_dim // 2,)
            else:
                shapes[name] = (n_in, n_out) if isinstance(op.kind, Embedding) else (n_out, n_in)
    return shapes
