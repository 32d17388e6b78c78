"""Options that several commands share, and the decorators that turn functions into commands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from bitnet_py.override_option import override_option
from bitnet_py.template import NAMES
from crossval.cli import output
from crossval.engines import tap_maps
from crossval.engines.registry import words
from crossval.errors import UnavailableError, UsageError
from crossval.receipts.file import Receipt

Option = Callable[[Callable[..., Any]], Callable[..., Any]]
PATH = click.Path(path_type=Path)
MAX_THREADS = 1024


def count(
    word: str, name: str, help_text: str, default: int | None = None, *, low: int = 1, high: int = 100_000
) -> Option:
    """Return an option for a whole number from ``low`` to ``high``, shown as N."""
    numbers = click.IntRange(low, high)
    shown = default is not None
    return click.option(word, name, type=numbers, metavar="N", default=default, show_default=shown, help=help_text)


def file(word: str, name: str, help_text: str, metavar: str = "FILE", *, required: bool = False) -> Option:
    """Return an option for the path of a file or directory."""
    return click.option(word, name, type=PATH, metavar=metavar, required=required, help=help_text)


def together(*options: Option) -> Option:
    """Return options that belong together as one."""
    return lambda function: functools.reduce(lambda made, option: option(made), reversed(options), function)


PROMPT = click.option("--prompt", required=True, metavar="TEXT", help="Text both engines read.")
MODEL = together(
    file("--model", "model", "GGUF model both engines run. Default: the model that ships with crossval.", "PATH"),
    override_option,
)
CANDIDATE = click.option(
    "--candidate",
    default="bitnet_py",
    show_default=True,
    metavar="|".join(words("candidate")),
    help="Engine under test: ours, a build of bitnet.cpp or llama.cpp (PATH: a library, a build directory or a "
    "source checkout), the float64 specification, or a trace directory of any engine.",
)
REFERENCE = click.option(
    "--reference",
    default="auto",
    show_default=True,
    metavar="|".join(words("reference")),
    help="auto: live bitnet.cpp when it is built, else its recorded trace of this model and prompt; the others as "
    "for --candidate.",
)
THREADS = count("--threads", "n_threads", "Threads of each engine. Default: each engine's own.", high=MAX_THREADS)
TEMPLATE = click.option(
    "--template",
    type=click.Choice(sorted(NAMES)),
    default="raw",
    show_default=True,
    help="Chat template to apply to the prompt; auto: the model file's own.",
)
ENGINES = (MODEL, REFERENCE, CANDIDATE, THREADS, TEMPLATE)
"""Options of every command that runs or replays a candidate and a reference."""
OUTPUT = (
    file("--receipt", "receipt_path", "Write the receipt to this file.", "PATH"),
    click.option(
        "--json", "as_json", is_flag=True, help="Print the receipt as JSON on stdout, and nothing else there."
    ),
)
DECODE = count(
    "--decode",
    "n_decode",
    "Tokens to decode after the prompt. Default: 4, or what a recorded trace holds when that is less.",
    low=0,
)
FULL = click.option(
    "--full", is_flag=True, help="Compare every operation of every layer, not only of the one found."
)
FLOORS = click.option(
    "--floors",
    is_flag=True,
    help="Measure how far the live reference differs from itself on this prompt (in one pass or token by token, 1 "
    "and 2 threads, with and without capture) and express differences in multiples of that.",
)
CAUSAL = click.option(
    "--causal",
    is_flag=True,
    help="Show which layer's error matters for the logits: the specification continues from both engines' "
    "states after each layer. The time grows with the square of the number of layers.",
)
FOLLOW = click.option(
    "--follow-reference-graph",
    is_flag=True,
    help="Let bitnet_py compute what the other engine's generation computes even where that is not the model, so "
    "that everything else can be compared to the bit.",
)
TAP_MAP = click.option(
    "--tap-map",
    metavar="NAME|FILE",
    help="What the engines of traces call their tensors: a file, or the name of a shipped map "
    f"({', '.join(tap_maps.shipped())}).",
)
REPRO = file(
    "--repro",
    "repro_dir",
    "Write the first wrong operation to this directory: its inputs, and a script that needs only NumPy. When both "
    "engines are wrong, the reference's operation goes to DIR/reference.",
    "DIR",
)


def which_engine(help_text: str) -> Option:
    """Return the option ``--engine`` of commands that run one engine, or both independently."""
    choice = click.Choice(["candidate", "reference", "both"])
    return click.option("--engine", type=choice, default="candidate", show_default=True, help=help_text)


def receipt_command(
    name: str, *options: Option, plain_words: bool = False, also: Callable[..., None] | None = None
) -> Callable[[Any], click.Command]:
    """Turn a function that returns a receipt into a command, which writes and shows it and exits by its verdict.

    The function takes the options under their names in ``crossval.api``, and two callbacks,
    ``progress`` and ``say``. The options of ``OUTPUT`` are added here. ``plain_words``: show what
    ``crossval triage`` shows. ``also``: called with the console and the options, shows more below.
    """

    def make(function: Callable[..., Receipt]) -> click.Command:
        @functools.wraps(function)
        def run(receipt_path: Path | None, as_json: bool, **given: Any) -> None:
            try:
                with output.progress() as progress:
                    made = function(**given, progress=progress, say=functools.partial(click.echo, err=True))
            except UnavailableError as error:
                if error.receipt is not None:
                    output.publish(error.receipt, receipt_path, as_json)
                raise
            except UsageError as error:
                raise click.UsageError(str(error)) from error
            more = None if also is None else functools.partial(also, **given)
            output.finish(made, receipt_path, as_json, plain_words=plain_words, more=more)

        return plain_command(name, *options, *OUTPUT)(run)

    return make


def refuse_others(context: click.Context, allowed: Collection[str], why: str) -> None:
    """Raise a usage error that names the first option given that is none of ``allowed``: it would be ignored.

    ``why``: follows the option's name.
    """
    for param in context.command.params:
        given = context.get_parameter_source(str(param.name)) is click.core.ParameterSource.COMMANDLINE
        if given and param.name not in allowed:
            raise click.UsageError(f"{param.opts[0]} {why}")


def plain_command(name: str, *options: Option) -> Callable[[Any], click.Command]:
    """Turn a function into a command with these options in this order; its docstring is the command's help."""

    def make(function: Callable[..., Any]) -> click.Command:
        for option in reversed(options):
            function = option(function)
        return click.command(name)(function)

    return make
