"""Read a model file, and its checkpoint where one is given, and return what was found."""

from __future__ import annotations

from pathlib import Path

from bitnet_py.checkpoint_model import CheckpointModel
from bitnet_py.gguf import GGUFFile
from crossval.files import file_sha256
from crossval.terms import Progress
from crossval.weights.compare import compare_tensors, read_file
from crossval.weights.header import compare_config, compare_template, compare_tokenizer
from crossval.weights.rows import CheckpointFile, WeightsResult


def examine_file(path: Path, checkpoint: Path | None, progress: Progress) -> WeightsResult:
    """Read every tensor and key of a model file and compare them with the checkpoint's.

    Raises:
        ModelError: a file or a checkpoint that cannot be read.
        BadInputError: a file changed while it was read.
    """
    with GGUFFile.open(path) as gguf:
        if checkpoint is None:
            return WeightsResult(tuple(read_file(gguf, progress)), (), ())
        with CheckpointModel.open(checkpoint) as model:
            rows = compare_tensors(gguf, model, progress)
            folder = model.checkpoint.folder
            keys = compare_config(gguf.metadata, model.header)
            further, why = compare_tokenizer(gguf, folder, model.header.vocab_size)
            keys += [*further, compare_template(gguf, folder)]
            parts = sorted({folder / "config.json", *model.checkpoint.files.values()})
        files = tuple(CheckpointFile(part.name, file_sha256(part)) for part in parts)
        return WeightsResult(tuple(rows), tuple(keys), files, tuple(why))
