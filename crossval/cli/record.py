"""``crossval record``."""

from __future__ import annotations

from pathlib import Path

import click

from crossval.cli import comparison as run
from crossval.cli.options import model_option, template_names
from crossval.engines.registry import open_candidate, open_reference
from crossval.engines.session import encode
from crossval.model.taps import outline_taps
from crossval.reports.console import console, show_line
from crossval.traces.record import record_trace, trace_model


@click.command("record")
@click.option("--prompt", required=True, metavar="TEXT", help="Text the engine reads.")
@click.option("--out", "out_dir", required=True, type=click.Path(path_type=Path), metavar="DIR", help="New trace.")
@click.option(
    "--engine",
    type=click.Choice(["bitnet.cpp", "bitnet_py", "spec"]),
    default="bitnet.cpp",
    show_default=True,
    help="Engine to record.",
)
@click.option(
    "--decode", "n_decode", type=click.IntRange(0, 100_000), default=4, show_default=True, help="Decoded tokens."
)
@click.option("--outline", is_flag=True, help="Record layer outputs and logits only, not every tap.")
@click.option(
    "--template", type=click.Choice(template_names()), default="raw", show_default=True, help="Chat template."
)
@click.option("--threads", "n_threads", type=click.IntRange(1, 1024), metavar="N", help="Threads of the engine.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier trace in DIR.")
@model_option
def command(
    prompt: str,
    out_dir: Path,
    engine: str,
    n_decode: int,
    outline: bool,
    template: str,
    n_threads: int | None,
    overwrite: bool,
    model_path: Path | None,
) -> None:
    """Record an engine's taps for one prompt: a golden when the engine is real bitnet.cpp.

    The trace lets anyone compare against this engine later without having it.

    \b
    Example:
      crossval record --prompt "What is 2+2?" --out traces/sum
    """
    request = run.Request("layers", model_path, engine, engine, n_threads, template, None, False)
    run.check_text(prompt)
    with run.progress() as report:
        model = run.load_model(request, report)
        live = engine == "bitnet_py"
        opened = (
            open_candidate(engine, model.path, n_threads=n_threads)
            if live
            else open_reference(engine, model.path, n_threads=n_threads)
        )
        with opened as runner:
            rendered = run.render_prompt(request, prompt)
            encoded = encode(runner, runner, prompt, rendered, model.config.context_length)
            select = outline_taps(model.config.n_layers) if outline else None
            info = record_trace(
                runner,
                trace_model(model.path),
                out_dir,
                prompt_ids=encoded.token_ids,
                prompt_text=rendered,
                n_decode=n_decode,
                select_prefill=select,
                select_decode=select,
                n_decode_full=0 if outline else n_decode,
                notes=model.notes,
                overwrite=overwrite,
                progress=report,
            )
    out = console()
    n_taps = sum(len(one.taps) for one in info.passes)
    show_line(out, f"recorded {len(info.passes)} passes, {n_taps} taps of {info.engine.name}")
    show_line(out, f"trace: {out_dir}")
