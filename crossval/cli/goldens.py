"""Record the goldens of a model from live bitnet.cpp, of whichever generation is built (``make record``)."""

from __future__ import annotations

from pathlib import Path

import click

from bitnet_py.errors import BitnetError
from bitnet_py.resources import default_model_path
from crossval.bitnet_cpp.runner import BitnetCppRunner
from crossval.cli.exits import of_error
from crossval.cli.options import PATH
from crossval.engines.goldens import goldens_dir, record_goldens
from crossval.errors import CrossvalError
from crossval.passes import Numerics


@click.command(help=__doc__)
@click.option("--model", type=PATH, help="GGUF file. Default: the shipped one.")
@click.option("--out", type=PATH, help="Directory of the traces. Default: beside the model.")
def main(model: Path | None, out: Path | None) -> None:
    """Command line of this module."""
    try:
        path = model or default_model_path()
        numerics = _record(path, out, as_run=False)
        if numerics.flash_attention is False:
            _record(path, out, as_run=True)
    except (BitnetError, CrossvalError) as error:
        message, code = of_error(error)
        click.echo(f"error: {message}", err=True)
        raise click.exceptions.Exit(code) from error


def _record(model: Path, out: Path | None, *, as_run: bool) -> Numerics:
    with BitnetCppRunner(model, flash_attention=None if as_run else False) as runner:
        numerics = runner.identity.numerics
        folder = out or goldens_dir(model, numerics.generation or "march")
        for directory in record_goldens(runner, model, folder):
            size_bytes = sum(file.stat().st_size for file in directory.iterdir())
            click.echo(f"{directory}  {size_bytes} bytes", err=True)
        return numerics


if __name__ == "__main__":
    main()
