"""``crossval selftest``."""

from __future__ import annotations

from pathlib import Path

import click

from crossval.cli import comparison as run
from crossval.cli.options import model_option, output_options
from crossval.engines.session import is_fallback
from crossval.passes import EngineIdentity
from crossval.receipts.kind import RunFacts, build
from crossval.receipts.party import REFERENCE_NAME, Compute, Party
from crossval.selftest import catalogue
from crossval.selftest import trials as selftest
from crossval.selftest.receipt import SELFTEST
from crossval.selftest.trials import Bench

NOTE = (
    "bitnet_py is both engines, as the reference with its scalar kernels; a fault is in the model file that one "
    "of them reads (file-) or in what it hands out (output-)"
)


@click.command("selftest")
@model_option
@output_options
def command(model_path: Path | None, receipt_path: Path | None, as_json: bool) -> None:
    """Check on this machine that crossval finds known faults, and finds none where there is none.

    Puts faults into the model file or the output of our engine, in turn as candidate and as reference, and asks
    for a verdict as `crossval layers` reaches it: side, layer, operation and cause must be right. Needs neither a
    compiler nor bitnet.cpp. Exit 0 when every fault is found in its place and every healthy run is parity, else 1.

    \b
    Example:
      crossval selftest
      crossval selftest --receipt selftest.json && crossval gate selftest.json
    """
    request = run.Request("selftest", model_path, "bitnet_py", "none", None, None, receipt_path, as_json)
    with run.progress() as report:
        model = run.load_model(request, report)
        with selftest.open_bench(model) as bench:
            result = selftest.run(bench, progress=report)
            made = build(SELFTEST, result, _context(bench))
    run.finish(made, request)


def _context(bench: Bench) -> RunFacts:
    engine = bench.healthy["candidate"]
    kernels = tuple({"name": c.name, "calls": int(c.calls), "bytes": int(c.bytes)} for c in engine.counters())
    return RunFacts(
        model=bench.model.facts,
        tokenizer={**bench.model.tokenizer, "engines_agree": None},
        text=None,
        template=None,
        token_ids=bench.prompt_ids,
        candidate=Party("live", engine.identity),
        reference=Party("unused", EngineIdentity(REFERENCE_NAME)),
        compute=Compute("real", is_fallback(engine.identity.settings.get("kernel")), kernels),
        settings={"candidate": "bitnet_py", "n_decode": catalogue.N_DECODE},
        notes=[*bench.model.notes, NOTE],
    )
