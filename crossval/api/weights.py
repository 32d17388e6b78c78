"""A model file compared with its checkpoint; no engine runs."""

from __future__ import annotations

from pathlib import Path

from bitnet_py.gguf import GGUFFile
from crossval.api.request import silent
from crossval.engines.model_file import describe
from crossval.passes import EngineIdentity
from crossval.receipts.file import Receipt
from crossval.receipts.kind import RunFacts, build
from crossval.receipts.party import REFERENCE_NAME, Compute, Party
from crossval.terms import Progress
from crossval.weights.receipt import WEIGHTS
from crossval.weights.run import examine_file


def check_weights(model: str | Path, *, against: str | Path | None = None, progress: Progress = silent) -> Receipt:
    """Read every tensor of a model file, and compare tensors and header with a Hugging Face checkpoint.

    ``against``: the checkpoint, a folder or one .safetensors file beside its ``config.json``; None:
    nothing is compared, so that the verdict is at best ``incomplete``.

    Raises:
        ModelError, BadInputError: an unusable model file or checkpoint.
    """
    path = Path(model)
    with GGUFFile.open(path) as gguf:
        described = describe(gguf)
    result = examine_file(path, None if against is None else Path(against), progress)
    facts = RunFacts(
        model=described.facts,
        tokenizer={**described.tokenizer, "engines_agree": None},
        text=None,
        template=None,
        token_ids=(),
        candidate=Party("unused", EngineIdentity("bitnet_py")),
        reference=Party("unused", EngineIdentity(REFERENCE_NAME)),
        compute=Compute("none"),
        notes=described.notes,
    )
    return build(WEIGHTS, result, facts)
