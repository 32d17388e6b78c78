"""bitnet.cpp or llama.cpp as a runner: its shared library in a child process, its graph's nodes as taps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from bitnet_py import overrides
from bitnet_py.errors import BitnetError
from bitnet_py.ggml_types import GGMLType
from bitnet_py.gguf import GGUFFile
from bitnet_py.tq import TQ_TYPES
from crossval.bitnet_cpp import library as cpp_library
from crossval.bitnet_cpp.engine import unknown_graph
from crossval.bitnet_cpp.manifest import combined_digest, manifest_for
from crossval.bitnet_cpp.pooled import NOTE as NORMALISED_NOTE
from crossval.child.client import EngineProcess, array_of
from crossval.child.command import child_command
from crossval.child.process import ChildProcess
from crossval.child.protocol import Frame, joined
from crossval.errors import BadInputError, EngineCrashError, UnavailableError
from crossval.model import taps
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray, pass_kind
from crossval.terms import LOGITS

CHILD = "crossval.bitnet_cpp.limits"
"""Sets the limits, then executes ``crossval.bitnet_cpp.serve``."""
OUTPUT_WEIGHT_NOTE = "ignored: bitnet.cpp multiplies the head with token_embd.weight"

_OPEN_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class LoadedModel:
    """What the library reports about the model it loaded, and the limits in force."""

    arch: str
    n_layers: int
    vocab_size: int
    dim: int
    n_heads: int
    head_dim: int
    n_ctx_train: int
    n_ctx: int
    n_ubatch: int
    has_vocab: bool
    has_output_weight: bool


class BitnetCppRunner(EngineProcess):
    """A library of the llama.cpp family as a ``crossval.passes.Runner``; its generation is found on entering.

    ``library``: path of a libllama; None: what ``cpp_library.find_library`` finds. ``n_ctx``:
    tokens the KV cache holds; None: 2048 or the model's context if shorter. ``n_ubatch``: longest
    pass; lowered further when the child's stack cannot hold bitnet.cpp's intermediate results
    (``crossval.bitnet_cpp.limits``), never raised. A pass is one call of the engine and is never
    split here: a longer one is a ``BadInputError``. ``flash_attention``: off by default, because
    scores and softmax are no tensors when it is on, although newer generations turn it on by
    themselves; None: as the generation does. ``timeout_s`` limits each load and each pass. After an
    ``EngineCrashError`` the runner is closed.
    """

    status: Literal["live", "recorded"] = "live"
    plan: tuple[PassPlan, ...] | None = None

    def __init__(
        self,
        model_path: str | Path,
        *,
        library: str | Path | None = None,
        n_threads: int = 2,
        n_ctx: int | None = None,
        n_ubatch: int = 512,
        flash_attention: bool | None = False,
        timeout_s: float = 600.0,
    ) -> None:
        if n_threads < 1 or n_ubatch < 1 or (n_ctx is not None and n_ctx < 1):
            raise BadInputError("n_threads, n_ubatch and n_ctx must be at least 1")
        super().__init__("bitnet.cpp", CHILD, timeout_s)
        self._model_path = Path(model_path)
        self._library = Path(library) if library is not None else None
        self._requested = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "n_threads": n_threads}
        self._requested["flash_attention"] = flash_attention
        self._model: LoadedModel | None = None
        self._identity = EngineIdentity(name="bitnet.cpp")

    @property
    def identity(self) -> EngineIdentity:
        """Identity, with build facts of the library actually loaded; complete after entering."""
        return self._identity

    @property
    def model(self) -> LoadedModel:
        """Return what bitnet.cpp reports about the model; only after entering."""
        self.live()
        assert self._model is not None
        return self._model

    def __enter__(self) -> BitnetCppRunner:
        _check_gguf(self._model_path)
        library = self._library or cpp_library.require_library().path
        child = self.start()
        try:
            facts = open_in(child, library)
            header = _header(self._model_path)
            if header.architecture is not None and header.architecture not in facts["architectures"]:
                title, known = facts["title"], facts["architectures"]
                raise BadInputError(unknown_graph(self._model_path, header.architecture, title, known))
            replaced = overrides_of(self._model_path)
            model = {"model": str(self._model_path.resolve()), "overrides": replaced, **self._requested}
            model["input_norms"] = any(name.endswith("_norm_in.weight") for name in header.types)
            loaded = self.request("load", model, what=f"loading {self._model_path.name}").header
            self._model = LoadedModel(**{field.name: loaded[field.name] for field in fields(LoadedModel)})
            types = header.types
            if any(kind in TQ_TYPES for name, kind in types.items() if name.startswith("blk.")):
                facts = {**facts, **facts["in_blocks"], "activation_quantization": "q8_k"}
            if GGMLType.BF16 not in (types.get("token_embd.weight"), types.get("output.weight")):
                facts = {**facts, "bfloat_pairs": None}
            self._identity = _identity(facts, loaded)
        except BaseException:
            self.close()
            raise
        return self

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of ``llama_tokenize``; BOS only if the model's own settings add one."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(f"the text is not valid Unicode: {error.reason} at {error.start}") from error
        params = {"add_bos": add_bos, "parse_special": parse_special}
        what = f"tokenizing {len(text)} characters"
        answer = self.request("tokenize", params, arrays=joined([data]), what=what)
        ids: list[int] = array_of(answer, "token_ids", "int32").tolist()
        return ids

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass; without taps other than ``result_output`` no callback is installed.

        ``elapsed_s`` is the time of ``llama_decode`` in the child; with capture it includes the
        copying.

        Raises:
            BadInputError: no tokens, a token outside the vocabulary, a pass longer than
                ``n_ubatch``, a sequence longer than ``n_ctx``, an unknown tap.
            EngineCrashError: bitnet.cpp failed; the runner is closed.
        """
        ids = [int(token) for token in token_ids]
        self._check_pass(ids, self._n_past)
        captured = self._check_select(select)
        plan = PassPlan(pass_kind(len(ids), self._n_past), tuple(ids), self._n_past)
        answer = self.run_pass(ids, {"select": captured})
        taken = _tap_arrays(answer, set(select), len(ids))
        return PassRecord(plan, taken, elapsed_s=float(answer.header["elapsed_s"]))

    def eval_each(self, token_ids: Sequence[int]) -> list[PassRecord]:
        """As ``EngineProcess.eval_each``, after checking the tokens against vocabulary and context."""
        for index, token in enumerate(token_ids):
            self._check_pass([int(token)], self._n_past + index)
        return super().eval_each(token_ids)

    def _check_pass(self, ids: list[int], n_past: int) -> None:
        model = self.model
        if not ids:
            raise BadInputError("a pass needs at least one token")
        bad = next((token for token in ids if not 0 <= token < model.vocab_size), None)
        if bad is not None:
            raise BadInputError(f"token id {bad} is outside the vocabulary of {model.vocab_size} tokens")
        if len(ids) > model.n_ubatch:
            raise BadInputError(
                f"a pass of {len(ids)} tokens is longer than bitnet.cpp's ubatch of {model.n_ubatch}; "
                "use a shorter prompt, split it into several passes, or raise n_ubatch"
            )
        if n_past + len(ids) > model.n_ctx:
            raise BadInputError(
                f"{n_past} + {len(ids)} tokens do not fit bitnet.cpp's context of {model.n_ctx}; "
                f"use fewer tokens or raise n_ctx (the model allows {model.n_ctx_train})"
            )

    def _check_select(self, select: Collection[str]) -> list[str]:
        for name in select:
            try:
                parsed = taps.parse(name)
            except ValueError as error:
                raise BadInputError(str(error)) from error
            if parsed.layer is not None and parsed.layer >= self.model.n_layers:
                raise BadInputError(f"tap {name}: the model has {self.model.n_layers} layers")
        return sorted(set(select) - {LOGITS})


def start_child() -> ChildProcess:
    """Start the process that loads bitnet.cpp.

    Raises:
        UnavailableError: it cannot be started.
    """
    return ChildProcess("bitnet.cpp", child_command(CHILD))


def open_library(path: Path) -> dict[str, Any]:
    """Load a library in its own child process, check it, and return what ``Engine.open`` found.

    Raises:
        UnavailableError: it cannot be loaded, or is not of bitnet.cpp's llama.cpp generation.
    """
    with start_child() as child:
        return open_in(child, path)


def open_in(child: ChildProcess, library: Path) -> dict[str, Any]:
    """Load a library in a process that was started for it, and return what ``Engine.open`` found.

    Raises:
        UnavailableError: it cannot be loaded, or is of no known generation.
    """
    if not library.is_file():
        raise UnavailableError(f"{library}: no such library")
    cpp_library.check_shared_object(library)
    what = f"the checks of the library {library}"
    try:
        return child.request(
            "open", {"library": str(library.resolve())}, what=what, timeout_s=_OPEN_TIMEOUT_S
        ).header
    except EngineCrashError as error:
        raise UnavailableError(f"{library} is not a usable bitnet.cpp library: {error}") from error


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInputError(f"cannot read the model {path}: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise BadInputError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")


def overrides_of(path: Path) -> dict[str, Any]:
    """Return the metadata values that ``--override`` replaces, with the types they have in the file.

    Raises:
        BadInputError: one of them does not fit the file.
    """
    if not overrides.notes():
        return {}
    try:
        with GGUFFile.open(path) as gguf:
            return overrides.typed(gguf.metadata)
    except BitnetError as error:
        raise BadInputError(str(error)) from error


@dataclass(frozen=True)
class _Header:
    """What of a file's header decides how the library computes."""

    architecture: str | None = None
    types: Mapping[str, GGMLType] = field(default_factory=dict)
    """Of every tensor: some decide how the library rounds what they are multiplied with."""


def _header(path: Path) -> _Header:
    try:
        with GGUFFile.open(path) as gguf:
            architecture = gguf.metadata.get("general.architecture")
            known = architecture if isinstance(architecture, str) else None
            return _Header(known, {name: info.type for name, info in gguf.tensors.items()})
    except BitnetError:  # the library will say what is wrong with it
        return _Header()


def _identity(facts: Mapping[str, Any], loaded: Mapping[str, Any]) -> EngineIdentity:
    settings: dict[str, Any] = {name: loaded[name] for name in ("n_threads", "n_ctx", "n_ubatch")}
    if loaded["ubatch_limit"] is not None:
        settings["ubatch_limit"] = loaded["ubatch_limit"]
    if loaded["has_output_weight"]:
        settings["output.weight"] = OUTPUT_WEIGHT_NOTE
    if loaded["is_pooled"]:
        settings["embedding"] = NORMALISED_NOTE
    return identity_of(facts, _numerics(facts, loaded), settings)


def identity_of(facts: Mapping[str, Any], numerics: Numerics, settings: Mapping[str, Any]) -> EngineIdentity:
    """Describe a build: digests of the files actually mapped, the rest from a manifest that lists them."""
    files: dict[str, str] = facts["files"]
    manifest = manifest_for(files)
    mapped = {f"sha256 {Path(path).name}": digest for path, digest in files.items()}
    return EngineIdentity(
        name=facts["engine"],
        source_commit=manifest.source_commit if manifest else None,
        source_digest=manifest.source_digest if manifest else None,
        library_digest=combined_digest(files),
        compiler=manifest.compiler if manifest else None,
        flags=manifest.flags if manifest else None,
        numerics=numerics,
        settings={**settings, "system_info": facts["system_info"], "confined": facts.get("confined"), **mapped},
    )


def _numerics(facts: Mapping[str, Any], loaded: Mapping[str, Any]) -> Numerics:
    """Return what was found of the rounding; the first generation has neither of the last two choices."""
    flash = loaded["flash_attention"]
    return Numerics(
        facts["simd_width"],
        facts["fused_quantizer"],
        generation=facts["generation"],
        binary16_sums=facts["binary16_sums"],
        flash_attention=flash,
        attention_threads=loaded["n_threads"] if flash else None,
        activation_quantization=facts.get("activation_quantization"),
        fused_sums=facts.get("fused_sums"),
        bfloat_pairs=facts["bfloat_pairs"],
    )


def _tap_arrays(answer: Frame, select: set[str], n_tokens: int) -> dict[str, TapArray]:
    rows = answer.header.get("rows", {})
    taken = {}
    for name in answer.arrays:
        if name in select:
            kept = (n_tokens - 1,) if name == LOGITS else rows.get(name)
            array = array_of(answer, name, "float32")
            taken[name] = TapArray(array, tuple(kept) if kept is not None else None)
    return taken
