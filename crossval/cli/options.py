"""Options that several commands share, and the decorators that turn functions into commands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from bitnet_py.integers_option import tokens_option
from bitnet_py.override_option import override_option
from bitnet_py.template import NAMES
from crossval.cli import completion, output
from crossval.engines import tap_maps
from crossval.engines.registry import words
from crossval.engines.session import Given
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


def prompt_option(help_text: str, *, required: bool = True) -> Option:
    """Return the options ``--prompt TEXT`` and ``--tokens ID,ID,...``, of which one is given, as ``prompt``."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, prompt: Given | None, tokens: Given | None = None, **given: Any) -> Any:
            if prompt is not None and tokens is not None:
                raise click.UsageError("--prompt and --tokens exclude each other")
            if required and prompt is None and tokens is None:
                raise click.UsageError("give either --prompt TEXT or --tokens ID,ID,...")
            return function(*args, prompt=prompt if tokens is None else tokens, **given)

        text = click.option("--prompt", metavar="TEXT", help=help_text)
        return text(tokens_option(TOKENS_HELP)(run))

    return add


TOKENS_HELP = "Token ids to read in place of a text, as they are: no BOS is added, no template applied."
PROMPT = prompt_option("Text both engines read.")
MODEL = together(
    click.option(
        "--model",
        type=PATH,
        metavar="PATH",
        envvar="CROSSVAL_MODEL",
        show_envvar=True,
        help="GGUF model both engines run. Default: the model that ships with crossval.",
    ),
    override_option,
)


def engine_option(name: str, accepted: Collection[str], default: Any, help_text: str, **more: Any) -> Option:
    """Return an option that names an engine by one of the words ``accepted``, as they are listed.

    Its default can be set in the environment: ``CROSSVAL_CANDIDATE`` for ``--candidate``.
    """
    given = {
        "default": default,
        "show_default": True,
        "metavar": "|".join(accepted),
        "envvar": f"CROSSVAL_{name.upper()}",
        "show_envvar": True,
        "shell_complete": completion.of_words(accepted),
    }
    return click.option(f"--{name}", help=help_text, **{**given, **more})


CANDIDATE = engine_option(
    "candidate",
    words("candidate"),
    "bitnet_py",
    "Engine under test: ours, a build of bitnet.cpp or llama.cpp (PATH: a library, a build directory or a "
    "source checkout), the float64 specification, or a trace directory of any engine.",
)
REFERENCE = engine_option(
    "reference",
    words("reference"),
    "auto",
    "auto: live bitnet.cpp when it is built, else its recorded trace of this model and prompt; the others as "
    "for --candidate.",
)
THREADS = click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(1, MAX_THREADS),
    metavar="N",
    envvar="CROSSVAL_THREADS",
    show_envvar=True,
    help="Threads of each engine. Default: each engine's own.",
)
TEMPLATE = click.option(
    "--template",
    type=click.Choice(sorted(NAMES)),
    default="raw",
    show_default=True,
    help="Chat template to apply to the prompt; auto: the model file's own.",
)


def _set_color(context: click.Context, param: click.Parameter, value: bool | None) -> None:
    if value is not None:
        context.color = value


def _set_detail(context: click.Context, param: click.Parameter, value: bool) -> None:
    if not value:
        return
    if context.meta.setdefault(output.DETAIL, param.name) != param.name:
        raise click.UsageError("--quiet and --verbose exclude each other")


COLOR: Option = click.option(
    "--color/--no-color",
    default=None,
    expose_value=False,
    callback=_set_color,
    help="Color or none. Default: as NO_COLOR and FORCE_COLOR say, else color on a terminal.",
)
DETAIL = together(
    click.option(
        "-q",
        "--quiet",
        "quiet",
        is_flag=True,
        expose_value=False,
        callback=_set_detail,
        help="Print the verdict line only, and no progress.",
    ),
    click.option(
        "-v",
        "--verbose",
        "verbose",
        is_flag=True,
        expose_value=False,
        callback=_set_detail,
        help="Print every row that was compared, not only the first or the worst.",
    ),
)
ENGINES = (MODEL, REFERENCE, CANDIDATE, THREADS, TEMPLATE)
"""Options of every command that runs or replays a candidate and a reference."""
OUTPUT = (
    file(
        "--receipt", "receipt_path", "Write the receipt to this file; -: to stdout, the tables to stderr.", "PATH"
    ),
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
    shell_complete=completion.of_words(tap_maps.shipped(), otherwise="file"),
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
            output.one_stdout(json=as_json, receipt=receipt_path)
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

        return plain_command(name, *options, *OUTPUT, DETAIL)(run)

    return make


def refuse_others(context: click.Context, allowed: Collection[str], why: str) -> None:
    """Raise a usage error that names the first option given that is none of ``allowed``: it would be ignored.

    ``why``: follows the option's name.
    """
    for param in context.command.params:
        given = context.get_parameter_source(str(param.name)) is click.core.ParameterSource.COMMANDLINE
        if given and param.name not in (*allowed, "color"):
            raise click.UsageError(f"{param.opts[0]} {why}")


def plain_command(name: str, *options: Option) -> Callable[[Any], click.Command]:
    """Turn a function into a command with these options in this order; its docstring is the command's help."""

    def make(function: Callable[..., Any]) -> click.Command:
        for option in reversed((*options, COLOR)):
            function = option(function)
        return click.command(name)(function)

    return make
