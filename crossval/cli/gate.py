"""``crossval gate``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from crossval.cli import comparison as run
from crossval.errors import BadInputError
from crossval.receipts import file as receipt
from crossval.receipts import gate
from crossval.receipts.gate import Check, Policy
from crossval.reports import render


@click.command("gate")
@click.argument("receipts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECEIPT...")
@click.option("--policy", "policy_path", type=click.Path(path_type=Path), metavar="FILE", help="Policy as JSON.")
@click.option(
    "--min-exact-match",
    type=click.FloatRange(0, 1),
    metavar="R",
    help="Least share of what a receipt of its kind counts: equal tokens (greedy, the same as --min-token-match), "
    "bit-equal values (layers, diff), equal texts (smoke), passes with equal logits (bench).",
)
@click.option(
    "--min-token-match",
    type=click.FloatRange(0, 1),
    metavar="R",
    help="Least share of equal tokens (greedy; other kinds fail).",
)
@click.option(
    "--min-logit-match",
    type=click.FloatRange(0, 1),
    metavar="R",
    help="Least share of bit-equal logits (greedy, layers, diff; other kinds fail).",
)
@click.option("--min-cosine", type=click.FloatRange(-1, 1), metavar="C", help="Least cosine similarity.")
@click.option(
    "--min-correct",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="R",
    help="Least share of correct answers of every engine (smoke). Default: 0.7.",
)
@click.option(
    "--min-prefill-ratio",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="Least ratio of the prompt's speed to the reference's (bench).",
)
@click.option(
    "--min-decode-ratio",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="Least ratio of the speed of decoding to the reference's (bench).",
)
@click.option(
    "--min-greedy-ratio",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="Least ratio of the speed of greedy decoding to the reference's (bench).",
)
@click.option(
    "--accept-within",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="X",
    help="Accept agreement shown only within this distance (relative L2), as from a coarse trace.",
)
@click.option("--min-tokens", type=click.IntRange(1), metavar="N", help="Least tokens or steps compared.")
@click.option("--require-bitwise", is_flag=True, help="Every row must be bit-equal.")
@click.option("--require-live", is_flag=True, help="The reference must have run live.")
@click.option("--max-age-days", type=click.FloatRange(0, min_open=True), metavar="N", help="Oldest accepted.")
@click.option("--allow-fallback", is_flag=True, help="Accept a slower kernel than the CPU offers.")
@click.option(
    "--allow-compute",
    multiple=True,
    type=click.Choice(["recorded", "specification", "none"]),
    help="Accept a candidate without kernels: a trace, the specification, or none at all (smoke). Repeatable.",
)
@click.option(
    "--allow-precision",
    multiple=True,
    type=click.Choice(["bf16", "f16"]),
    help="Accept an engine that computes in this format and does not state it. Repeatable.",
)
@click.option("--reference-name", multiple=True, metavar="NAME", help="Accepted reference. Default: bitnet.cpp.")
@click.option("--model-sha256", multiple=True, metavar="HEX", help="Accepted model file. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print every check as JSON on stdout.")
def command(receipts: tuple[Path, ...], policy_path: Path | None, as_json: bool, **demands: Any) -> None:
    """Check receipts in CI: recompute everything from the rows, then apply a policy.

    Trusts no status, verdict or summary: digest, row states, coverage, parity numbers, first divergence and
    verdict are computed anew. Exit 0 when every receipt passes, 1 when one fails, 4 when one cannot be read
    or violates the schema. Options override the policy file.

    \b
    Example:
      crossval gate receipts/*.json
      crossval gate receipts/greedy-*.json --require-live --min-exact-match 1
    """
    policy = _policy(policy_path, demands)
    judged: list[dict[str, Any]] = []
    for path in receipts:
        try:
            checks = gate.judge(receipt.read(path), policy)
        except BadInputError as error:
            judged.append({"receipt": str(path), "passed": False, "error": str(error), "checks": []})
            continue
        judged.append({"receipt": str(path), "passed": gate.passed(checks), "error": None, "checks": checks})
    _show(judged, as_json)
    for one in judged:
        if one["error"]:
            click.echo(f"error: {one['error']}", err=True)
    raise click.exceptions.Exit(exit_code(judged))


def exit_code(judged: list[dict[str, Any]]) -> int:
    """Return 4 when a receipt is unreadable, else 1 when one failed, else 0; no receipt at all is no pass."""
    if any(one["error"] for one in judged):
        return BadInputError.exit_code
    return 0 if judged and all(one["passed"] for one in judged) else 1


def _policy(path: Path | None, demands: dict[str, Any]) -> Policy:
    """Return the file's policy with every option that was given in its place."""
    policy = Policy() if path is None else gate.read_policy(path)
    names = {"allow_compute": "allow_compute_paths", "reference_name": "reference_names"}
    # By identity: 0 is a value that was given, although it equals False.
    given = {
        names.get(name, name): value
        for name, value in demands.items()
        if value is not None and value is not False and value != ()
    }
    for sha256 in given.get("model_sha256", ()):
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise click.BadParameter("expected 64 lower-case hexadecimal digits", param_hint="--model-sha256")
    return replace(policy, **given)


def _show(judged: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        plain = [{**one, "checks": [asdict(check) for check in one["checks"]]} for one in judged]
        report = {"passed": exit_code(judged) == 0, "receipts": plain}
        run.write_json(json.dumps(report, indent=1, ensure_ascii=True) + "\n")
        return
    console = render.console()
    for one in judged:
        checks: list[Check] = one["checks"]
        if checks:
            render.show_checks(console, one["receipt"], checks, one["passed"])
