"""Record the goldens of a model from live bitnet.cpp (``make record``)."""

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


@click.command(help=__doc__)
@click.option("--model", type=PATH, help="GGUF file. Default: the shipped one.")
@click.option("--out", type=PATH, help="Directory of the traces. Default: beside the model.")
def main(model: Path | None, out: Path | None) -> None:
    """Command line of this module."""
    try:
        path = model or default_model_path()
        with BitnetCppRunner(path) as runner:
            for directory in record_goldens(runner, path, out or goldens_dir(path)):
                size_bytes = sum(file.stat().st_size for file in directory.iterdir())
                click.echo(f"{directory}  {size_bytes} bytes", err=True)
    except (BitnetError, CrossvalError) as error:
        message, code = of_error(error)
        click.echo(f"error: {message}", err=True)
        raise click.exceptions.Exit(code) from error


if __name__ == "__main__":
    main()
