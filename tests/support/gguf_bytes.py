"""Build GGUF files byte by byte, valid or deliberately broken; shares no code with the reader or the writer."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_FORMATS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "B", 10: "<Q", 11: "<q", 12: "<d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, item: object) -> bytes:
    """Encode a typed value, type first; arrays are ``(element type, items)``."""
    if kind == ARRAY:
        element, items = item  # type: ignore[misc]
        body = b"".join(string(i) if element == STRING else struct.pack(_FORMATS[element], i) for i in items)
        return struct.pack("<IIQ", ARRAY, element, len(items)) + body
    return struct.pack("<I", kind) + (string(item) if kind == STRING else struct.pack(_FORMATS[kind], item))  # type: ignore[arg-type]


@dataclass
class Tensor:
    """One entry of the table; ``shape`` in NumPy order, ``data`` as in the file, ``offset`` None = next free."""

    name: str | bytes
    shape: Sequence[int]
    type: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None


@dataclass
class Container:
    """A GGUF file in parts; ``to_bytes`` puts them together without checking anything."""

    keys: list[tuple[str, int, object]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    alignment: int = 32

    def with_key(self, key: str, kind: int, item: object) -> Container:
        """Replace or add a key."""
        self.keys = [entry for entry in self.keys if entry[0] != key] + [(key, kind, item)]
        return self

    def without(self, *names: str) -> Container:
        """Drop keys and tensors by name."""
        self.keys = [entry for entry in self.keys if entry[0] not in names]
        self.tensors = [tensor for tensor in self.tensors if tensor.name not in names]
        return self

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def to_bytes(self) -> bytes:
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        out = bytearray(self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys))
        for key, kind, item in self.keys:
            out += string(key) + value(kind, item)
        position = 0
        places: list[tuple[int, bytes]] = []
        for tensor in self.tensors:
            offset = position if tensor.offset is None else tensor.offset
            dims = tuple(tensor.shape)[::-1]
            n_dims = len(dims) if tensor.n_dims is None else tensor.n_dims
            out += string(tensor.name) + struct.pack("<I", n_dims) + struct.pack(f"<{len(dims)}Q", *dims)
            out += struct.pack("<IQ", tensor.type, offset)
            places.append((offset, tensor.data))
            position = -(-(position + len(tensor.data)) // self.alignment) * self.alignment
        out += bytes(-len(out) % self.alignment)
        return bytes(out) + _lay_out(places)


def _lay_out(places: Iterable[tuple[int, bytes]]) -> bytes:
    """Place the data at its offsets; absurdly large offsets are left out."""
    body = bytearray()
    for offset, data in places:
        if offset < 1 << 24:
            body.extend(bytes(max(0, offset + len(data) - len(body))))
            body[offset : offset + len(data)] = data
    return bytes(body)


def small_container() -> Container:
    """Return a small valid container with every kind of value and three tensors."""
    return Container(
        keys=[
            ("general.architecture", STRING, "bitnet-b1.58"),
            ("count", U32, 7),
            ("signed", I32, -7),
            ("big", U64, 1 << 40),
            ("ratio", F32, 0.5),
            ("flag", BOOL, 1),
            ("words", ARRAY, (STRING, ["a", "", "\u0120the", "x" * 40])),
            ("numbers", ARRAY, (I32, [1, -2, 3])),
            ("switches", ARRAY, (BOOL, [1, 0])),
            ("empty", ARRAY, (F32, [])),
        ],
        tensors=[
            Tensor("norm", (8,), 0, struct.pack("<8f", *range(8))),
            Tensor("embd", (2, 3), 1, bytes(range(12))),
            Tensor("w", (2, 128), 36, bytes([0x55] * 64) + struct.pack("<f", 0.25) + bytes(28)),
        ],
    )


def model_container(**overrides: object) -> Container:
    """Return a complete one-layer model: dim 128, 2 heads, 1 KV head, hidden 256, 4 tokens."""
    arch = str(overrides.get("arch", "bitnet-b1.58"))
    keys: list[tuple[str, int, object]] = [
        ("general.architecture", STRING, arch),
        *(
            (f"{arch}.{key}", U32, number)
            for key, number in (
                ("context_length", 64),
                ("embedding_length", 128),
                ("block_count", 1),
                ("feed_forward_length", 256),
                ("attention.head_count", 2),
                ("attention.head_count_kv", 1),
            )
        ),
        (f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "c", "d"])),
    ]
    dim, hidden = 128, 256
    norms = {"attn_norm": dim, "attn_sub_norm": dim, "ffn_norm": dim, "ffn_sub_norm": hidden}
    matrices = {
        "attn_q": (dim, dim),
        "attn_k": (64, dim),
        "attn_v": (64, dim),
        "attn_output": (dim, dim),
        "ffn_gate": (hidden, dim),
        "ffn_up": (hidden, dim),
        "ffn_down": (dim, hidden),
    }
    tensors = [Tensor("token_embd.weight", (4, dim), 1, struct.pack("<512e", *([0.5] * 512)))]
    tensors += [
        Tensor(f"blk.0.{n}.weight", (w,), 0, struct.pack(f"<{w}f", *([1.0] * w))) for n, w in norms.items()
    ]
    tensors += [
        Tensor(f"blk.0.{n}.weight", (r, c), 36, bytes([0x86]) * (r * c // 4) + struct.pack("<f", 0.25) + bytes(28))
        for n, (r, c) in matrices.items()
    ]
    tensors.append(Tensor("output_norm.weight", (dim,), 0, struct.pack(f"<{dim}f", *([1.0] * dim))))
    return Container(keys=keys, tensors=tensors)
