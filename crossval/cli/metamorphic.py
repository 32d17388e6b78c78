"""``crossval metamorphic``."""

from __future__ import annotations

from typing import Any

import click

import crossval
from bitnet_py._native import kernel_families
from bitnet_py.integers_option import Integers
from crossval.cli.options import ENGINES, prompt_option, receipt_command, which_engine
from crossval.receipts.file import Receipt
from crossval.repeat.metamorphic.cases import LENGTHS, THREAD_COUNTS

MAX_LENGTH = 4096


COUNTS = Integers("N,N,...", f"integers from 1 to {MAX_LENGTH}", 1, MAX_LENGTH)


def _kernels(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the families named; the checks report those that this CPU lacks."""
    if value is None:
        return None
    names = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
    for name in names:
        check_kernel(name)
    return names


def check_kernel(name: str) -> None:
    """Refuse a name that is not one of the C library's kernel families.

    Raises:
        click.BadParameter: it is not.
    """
    known = [family.name for family in kernel_families()]
    if name not in known:
        raise click.BadParameter(f"{name!r} is not a kernel family; the C library has {', '.join(known)}")


@receipt_command(
    "metamorphic",
    prompt_option("Text the checks start with. Default: arbitrary tokens.", required=False),
    which_engine("Which engine is checked; with both, each against itself."),
    click.option(
        "--lengths",
        type=COUNTS,
        default=",".join(map(str, LENGTHS)),
        show_default=True,
        help="Prompt lengths in tokens.",
    ),
    click.option(
        "--thread-counts",
        type=COUNTS,
        default=",".join(map(str, THREAD_COUNTS)),
        show_default=True,
        help="Numbers of threads.",
    ),
    click.option(
        "--kernels",
        callback=_kernels,
        metavar="NAME,NAME,...",
        help="Kernel families of bitnet_py. Default: all that this CPU runs.",
    ),
    *ENGINES,
)
def command(say: object, **options: Any) -> Receipt:
    """Check an engine against itself: the same work done another way must give the same result.

    A prompt in one pass and token by token, at any length, in two passes, after another sequence,
    with other thread counts and with every kernel of this CPU. Needs no second engine. Exit 0 when
    every relation holds, 1 when one does not, 3 when something could not be checked.

    \b
    Example:
      crossval metamorphic
      crossval metamorphic --engine both --receipt metamorphic.json && crossval gate metamorphic.json
    """
    return crossval.metamorphic(**options)
