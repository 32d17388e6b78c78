"""Record a trace from a running engine: a *golden* when the engine is real bitnet.cpp."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from bitnet_py.config import ModelConfig
from bitnet_py.errors import BitnetError
from bitnet_py.gguf import GGUFFile
from crossval.capture import Feed, check_pooled, check_whole, greedy_token
from crossval.engines.model_file import form_facts
from crossval.errors import BadInputError, UnavailableError
from crossval.files import file_sha256
from crossval.model import taps
from crossval.passes import Runner, longest_pass
from crossval.terms import LOGITS, Progress
from crossval.traces.read import TraceInfo, TraceModel
from crossval.traces.write import TraceWriter


def trace_model(model_path: str | Path) -> TraceModel:
    """Return identity and shape of a GGUF file as traces state them (hashes the file).

    Raises:
        BadInputError: the file cannot be read or is not a model of this architecture.
    """
    path = Path(model_path)
    try:
        with GGUFFile.open(path) as gguf:
            config = ModelConfig.from_gguf(gguf)
            form = form_facts(config, gguf.tensors)
    except BitnetError as error:
        raise BadInputError(str(error)) from error
    return TraceModel(
        sha256=file_sha256(path),
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        vocab_size=config.vocab_size,
        file_name=path.name,
        architecture=config.arch,
        **form,
    )


def record_trace(
    runner: Runner,
    model: TraceModel,
    out_dir: str | Path,
    *,
    prompt_ids: Sequence[int],
    prompt_text: str | None = None,
    n_decode: int = 0,
    select_prefill: Collection[str] | None = None,
    select_decode: Collection[str] | None = None,
    n_decode_full: int = 0,
    notes: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TraceInfo:
    """Run a prompt and ``n_decode`` greedily decoded tokens on an entered runner and write the trace.

    ``select_prefill`` and ``select_decode`` default to every tap, and to the outline that every comparison needs
    (``taps.outline_taps``); the first ``n_decode_full`` decode passes get ``select_prefill``. The logits are
    always recorded. Taps of sub-norms that the model lacks may be absent, and what the engine states to compute
    inside another operation; any other selected tap must be given.

    Raises:
        BadInputError: empty prompt, unknown tap, unusable logits, or the directory cannot hold a trace.
        UnavailableError: the engine does not give a selected tap.
        EngineCrashError: from the runner.
    """
    if not prompt_ids:
        raise BadInputError("the prompt has no tokens; there is nothing to record")
    if n_decode < 0:
        raise BadInputError(f"the number of decoded tokens must not be negative, got {n_decode}")
    full = _selection(model, taps.all_taps(model.n_layers) if select_prefill is None else select_prefill)
    coarse = _selection(model, taps.outline_taps(model.n_layers) if select_decode is None else select_decode)
    feed = Feed(tuple(map(int, prompt_ids)), n_decode, None, longest_pass(runner))
    if model.pooling is not None:
        check_pooled(n_decode)
        check_whole(feed)
    token: int | None = None
    runner.reset()
    with TraceWriter(out_dir, model, overwrite=overwrite) as writer:
        while (plan := feed.next_plan(token)) is not None:
            index = len(feed.done) - 1
            if progress is not None:
                progress("recording", index, feed.n_required)
            select = full if index < feed.n_prompt_passes + n_decode_full else coarse
            record = runner.eval(plan.token_ids, select)
            _check_complete(runner, model, index, select, record.taps)
            writer.add_pass(record)
            token = greedy_token(record)
        if feed.ended is not None:
            raise BadInputError(f"pass {len(feed.done) - 1}: {feed.ended}; nothing was recorded")
        if progress is not None:
            progress("recording", feed.n_required, feed.n_required)
        return writer.finish(
            engine=runner.identity, prompt_ids=feed.prompt_ids, prompt_text=prompt_text, notes=notes
        )


def _selection(model: TraceModel, names: Collection[str]) -> frozenset[str]:
    """Return the selection plus the logits, with every name checked against the model."""
    known = frozenset(taps.all_taps(model.n_layers))
    unknown = sorted(set(names) - known)
    if unknown:
        raise BadInputError(f"this model has no tap {unknown[0]!r}; `blk.0.l_out` is an example of one")
    return frozenset(names) | {LOGITS}


def _check_complete(
    runner: Runner, model: TraceModel, index: int, select: Collection[str], given: Collection[str]
) -> None:
    inside = runner.identity.numerics.inside_others(model.architecture, bool(model.input_norms))
    missing = [
        name
        for name in select
        if name not in given and not taps.is_optional(name) and taps.parse(name).tap not in inside
    ]
    if missing:
        raise UnavailableError(
            f"{runner.identity.name} did not give {len(missing)} of {len(select)} selected taps in pass {index}, "
            f"including {sorted(missing)[0]}; select fewer taps"
        )
