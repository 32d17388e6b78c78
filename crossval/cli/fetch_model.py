"""``crossval fetch-model``."""

from __future__ import annotations

from typing import Any

import click

import crossval
from crossval.cli import output
from crossval.cli.options import file, plain_command
from crossval.console import show_line


def _digest(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and (len(value) != 64 or set(value) - set("0123456789abcdef")):
        raise click.BadParameter("expected 64 lower-case hexadecimal digits")
    return value


@plain_command(
    "fetch-model",
    click.argument("repo", metavar="OWNER/NAME"),
    click.option("--file", metavar="NAME", help="File to fetch. Default: the only GGUF file of the repository."),
    file("--to", "to", "Folder for the file. Default: the cache that programs share which use the hub.", "DIR"),
    click.option("--sha256", metavar="HEX", callback=_digest, help="Fail unless the file has this sha256."),
)
def command(repo: str, **options: Any) -> None:
    """Fetch one model file from the Hugging Face hub, and check its sha256.

    Nothing but this file is downloaded; a download that was interrupted resumes. Its sha256 is
    compared with the one that the hub states, which shows a complete copy, not whose file it is:
    for that, give --sha256. Needs the extra `hub`. Exit 3 when the hub cannot be reached, 4 when
    there is no such file or its sha256 is another.

    \b
    Example:
      crossval fetch-model microsoft/bitnet-b1.58-2B-4T-gguf --to models/
    """
    fetched = crossval.fetch_model(repo, **options)
    checks = [("the hub states the same", fetched.stated_by_hub), ("as asked for", fetched.asked_for)]
    compared = ", ".join(words for words, done in checks if done) or "the hub states none"
    known = "" if fetched.asked_for else "; not known to crossval"
    out = output.screen()
    show_line(out, f"file    {fetched.path}")
    show_line(out, f"from    {fetched.repo}, commit {fetched.commit}")
    show_line(out, f"size    {fetched.size_bytes} bytes")
    show_line(out, f"sha256  {fetched.sha256} ({compared}{known})")
