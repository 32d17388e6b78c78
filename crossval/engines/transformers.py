"""Hugging Face transformers as a runner: its model, built from the GGUF file's own weights, in a child process."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from bitnet_py.arithmetic import Generation
from crossval.child.client import EngineProcess, array_of
from crossval.engines.file_tokenizer import FileTokenizer
from crossval.errors import BadInputError, UnavailableError
from crossval.formats import Dtype
from crossval.passes import EngineIdentity, Numerics, PassPlan, PassRecord, TapArray, pass_kind

NAME = "transformers"
CHILD = "crossval.torch.serve"
HOW_TO_GET = "run `pip install 'bitnet-parity[hf]'`"
PACKAGES = ("torch", "transformers")
CHOICES = "DTYPE"
"""What may stand after the name, where words are listed: a format, and after + the class of ternary matrices."""
_DTYPES: dict[str, Dtype] = {"f32": "f32", "bf16": "bf16", "f16": "f16"}
_LINEAR_CLASSES = ("bitlinear", "autobitlinear")


def parse_choices(text: str | None) -> tuple[Dtype, str | None]:
    """Return format and class of ``f32``, ``bf16``, ``bf16+bitlinear``.

    Raises:
        BadInputError: it is none of these.
    """
    dtype, plus, linear_class = (text or "f32").partition("+")
    if dtype not in _DTYPES or (plus and linear_class not in _LINEAR_CLASSES):
        raise BadInputError(
            f"{NAME}:{text}: expected {' or '.join(_DTYPES)}, alone or with +{' or +'.join(_LINEAR_CLASSES)}"
        )
    return _DTYPES[dtype], linear_class or None


class TransformersRunner(EngineProcess):
    """The model in a child process. ``result_output`` is of the last token; every other tap of all tokens.

    ``dtype``: what it computes in. ``linear_class``: of ternary matrices (``bitlinear``, ``autobitlinear``); None:
    that of published checkpoints. ``rules``: by whose rules text is read (``passes.tokenizer_rules``).
    ``timeout_s`` limits each load and each pass.
    """

    status: Literal["live", "recorded"] = "live"
    plan: tuple[PassPlan, ...] | None = None

    def __init__(
        self,
        model_path: str | Path,
        rules: Generation = "march",
        *,
        dtype: Dtype = "f32",
        linear_class: str | None = None,
        n_threads: int = 2,
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__(NAME, CHILD, timeout_s)
        self._path = Path(model_path)
        self._asked = {"dtype": dtype, "linear_class": linear_class, "n_threads": n_threads}
        self._identity = EngineIdentity(NAME, numerics=Numerics(compute_dtype=dtype, kv_dtype=dtype))
        self._tokenizer = FileTokenizer(self._path, rules)

    @property
    def identity(self) -> EngineIdentity:
        """Versions, digests of the source and the library, and how it computes; complete after entering."""
        return self._identity

    def __enter__(self) -> TransformersRunner:
        require()
        self.start()
        try:
            what = f"loading {self._path.name}"
            facts = self.request("load", {"model": str(self._path.resolve()), **self._asked}, what=what).header
            self._identity = EngineIdentity(
                NAME,
                version=facts["version"],
                source_digest=facts["source_digest"],
                library_digest=facts["library_digest"],
                numerics=self._identity.numerics,
                settings={
                    **facts["settings"],
                    "tokenizer": "bitnet_py.tokenizer (a model built from the file has none of its own)",
                    "tokenizer_rules": self._tokenizer.rules,
                },
            )
        except BaseException:
            self.close()
            raise
        return self

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Return token ids by ``bitnet_py``'s tokenizer: the model is built from the file, which has no other.

        Raises:
            BadInputError: the model's tokenizer metadata is missing or unusable.
        """
        return self._tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def eval(self, token_ids: Sequence[int], select: Collection[str]) -> PassRecord:
        """Run one pass; ``elapsed_s`` includes the copying.

        Raises:
            BadInputError: no tokens, or tokens the model cannot take.
            EngineCrashError: the process failed; the runner is closed.
        """
        ids = [int(token) for token in token_ids]
        if not ids:
            raise BadInputError("a pass needs at least one token")
        plan = PassPlan(pass_kind(len(ids), self._n_past), tuple(ids), self._n_past)
        answer = self.run_pass(ids, {"select": sorted(select)})
        rows: dict[str, Any] = answer.header["rows"]
        taps = {
            name: TapArray(array_of(answer, name, "float32"), tuple(rows[name]) if name in rows else None)
            for name in answer.arrays
        }
        return PassRecord(plan, taps, float(answer.header["elapsed_s"]))

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def require() -> None:
    """Check, without importing them, that PyTorch and transformers are installed.

    Raises:
        UnavailableError: one is not.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed; {HOW_TO_GET}")
