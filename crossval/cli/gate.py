"""``crossval gate``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bitnet_py import overrides
from bitnet_py.override_option import override_option
from bitnet_py.stops import stop_if_asked
from crossval.api.rerun import Rerun
from crossval.cli import output
from crossval.cli.exits import of_error
from crossval.cli.options import COLOR, DETAIL, PATH, TAP_MAP
from crossval.errors import BadInputError
from crossval.files import write_atomically
from crossval.receipts import ci, gate, signature
from crossval.receipts import file as receipt
from crossval.receipts.policy import GateCheck, Policy, policy_of, read_policy
from crossval.receipts.show import show_checks, show_verdict
from crossval.receipts.trusted import policy_text
from crossval.receipts.yaml_text import parse_yaml
from crossval.registry import judge
from crossval.sweep import check, summary

_FRACTION = click.FloatRange(0, 1)
_POSITIVE_FRACTION = click.FloatRange(0, 1, min_open=True)
_POSITIVE = click.FloatRange(0, min_open=True)
DEMANDS: tuple[tuple[str, Any, str, str], ...] = (
    ("--min-exact-match", _FRACTION, "R",
     "Minimum fraction of equal results, as the kind of receipt counts them: tokens (greedy, the same as "
     "--min-token-match), bit-identical values (layers, diff), texts (smoke, tokens), passes with "
     "equal logits (bench), values of a checkpoint (weights)."),
    ("--min-token-match", _FRACTION, "R", "Minimum fraction of equal tokens (greedy)."),
    ("--min-logit-match", _FRACTION, "R",
     "Minimum fraction of bit-identical logits (greedy, layers, diff, score)."),
    ("--min-cosine", click.FloatRange(-1, 1), "C", "Minimum cosine similarity."),
    ("--min-correct", _POSITIVE_FRACTION, "R",
     "Minimum fraction of correct answers of every engine (smoke). Default: 0.7."),
    ("--min-prefill-ratio", _POSITIVE, "R", "Minimum ratio of our prompt speed to the reference's (bench)."),
    ("--min-decode-ratio", _POSITIVE, "R", "Minimum ratio of our decoding speed to the reference's (bench)."),
    ("--min-greedy-ratio", _POSITIVE, "R",
     "Minimum ratio of our greedy decoding speed to the reference's (bench)."),
    ("--accept-within", _POSITIVE_FRACTION, "X",
     "Accept agreement shown only within this distance (relative L2), as from a trace with few taps."),
    ("--min-tokens", click.IntRange(1), "N", "Minimum number of tokens or steps compared."),
    ("--max-age-days", _POSITIVE, "N", "Oldest accepted."),
)  # fmt: skip
"""Options that take a number: name, type, placeholder, help. Each sets the policy field of the same name."""
FLAGS = (
    ("--require-bitwise", "Every row must be bit-identical."),
    ("--require-live", "The reference must have run live."),
    ("--allow-fallback", "Accept a slower kernel than the CPU offers."),
    ("--allow-reference-graph", "Accept parity with a reference's graph that is not the model."),
)


def _demands(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of ``DEMANDS``, then those of ``FLAGS``."""
    for name, text in reversed(FLAGS):
        function = click.option(name, is_flag=True, help=text)(function)
    for name, kind, placeholder, text in reversed(DEMANDS):
        function = click.option(name, type=kind, metavar=placeholder, help=text)(function)
    return function


@click.command("gate")
@click.argument("receipts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RECEIPT...")
@click.option(
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Policy as YAML or JSON, or `strict`, which ships with crossval.",
)
@click.option(
    "--init", is_flag=True, help="Write a policy of the one receipt given, which you trust; judge nothing else."
)
@click.option(
    "-o", "--output", "policy_out", type=PATH, metavar="OUT", help="Where `--init` writes. Default: stdout."
)
@_demands
@click.option(
    "--allow-compute",
    "allow_compute_paths",
    multiple=True,
    type=click.Choice(["recorded", "specification", "none"]),
    help="Accept a candidate without kernels: a trace, the specification, or none at all (smoke). Repeatable.",
)
@click.option(
    "--allow-precision",
    multiple=True,
    type=click.Choice(["bf16", "f16"]),
    help="Accept an engine that computes in this format without stating it. Repeatable.",
)
@click.option(
    "--allow-deviation",
    multiple=True,
    type=click.Choice(["float_activations", "weights_f16", "weights_bf16"]),
    help="Accept engines that do this otherwise than the model defines. Repeatable.",
)
@click.option(
    "--reference-name",
    "reference_names",
    multiple=True,
    metavar="NAME",
    help="Accepted reference. Default: bitnet.cpp.",
)
@click.option("--model-sha256", multiple=True, metavar="HEX", help="Accepted model file. Repeatable.")
@click.option(
    "--require-signature",
    "keys",
    multiple=True,
    type=PATH,
    metavar="KEY",
    help="Each receipt must be signed (`crossval sign`) with one of these keys (public, PEM). Repeatable.",
)
@click.option(
    "--rerun",
    is_flag=False,
    flag_value="1",
    type=_POSITIVE_FRACTION,
    metavar="[FRACTION]",
    help="Run each receipt's command again here and compare every row (layers, greedy, diff); of a fraction, a "
    "sample that follows from the receipt's digest. Write it after the receipts, or with a number.",
)
@click.option("--model", type=PATH, metavar="PATH", help="Model for --rerun. Default: the shipped one.")
@click.option("--candidate", metavar="WORD", help="Candidate for --rerun. Default: the receipt's word.")
@click.option("--reference", metavar="WORD", help="Reference for --rerun. Default: the receipt's word.")
@TAP_MAP
@override_option
@click.option("--junit", type=PATH, metavar="OUT", help="Write the checks as JUnit XML.")
@click.option("--markdown", type=PATH, metavar="OUT", help="Write a summary for a pull request.")
@click.option("--badge", type=PATH, metavar="OUT", help="Write the JSON of a badge, as shields.io reads it.")
@click.option("--annotations", is_flag=True, help="Print a GitHub ::error line for each check that failed.")
@click.option("--json", "as_json", is_flag=True, help="Print every check as JSON on stdout.")
@COLOR
@DETAIL
def command(
    receipts: tuple[Path, ...],
    policy_path: Path | None,
    init: bool,
    policy_out: Path | None,
    as_json: bool,
    junit: Path | None,
    markdown: Path | None,
    badge: Path | None,
    annotations: bool,
    keys: tuple[Path, ...],
    rerun: float | None,
    model: Path | None,
    candidate: str | None,
    reference: str | None,
    tap_map: str | None,
    **demands: Any,
) -> None:
    """Check receipts in CI: recompute everything from the rows, then apply a policy.

    Trusts no status, verdict or summary: digest, row states, coverage, parity numbers, first
    divergence and verdict are recomputed. Exit 0 when every receipt passes, 1 when one fails, 4 when
    one cannot be read or violates the schema. Options override the policy file. A demand holds the
    kinds of receipts that it means; it fails when none of them is given. RECEIPT may be -, which is
    stdin, and OUT -, which is stdout.

    \b
    Example:
      crossval gate receipts/*.json
      crossval gate receipts/greedy-*.json --require-live --min-exact-match 1
      crossval gate --init receipts/layers-shipped.json
      crossval gate my-receipt.json --policy strict --rerun
    """
    output.one_stdout(json=as_json, junit=junit, markdown=markdown, badge=badge)
    policy = _policy(policy_path, demands)
    if init or policy_out is not None:
        _init(receipts, policy, policy_out, init)
        return
    again = None if rerun is None else Rerun(rerun, model, candidate, reference, tap_map)
    if again is None and (any((model, candidate, reference, tap_map)) or overrides.notes()):
        raise click.UsageError("--model, --candidate, --reference, --tap-map and --override are for --rerun")
    found = [judged(path, policy, keys, again) for path in receipts]
    for one, checks in zip(found, gate.together([one.checks for one in found]), strict=True):
        one.checks = checks
    for path, text in ((junit, ci.junit), (markdown, ci.markdown), (badge, ci.badge)):
        if path is not None:
            write_atomically(path, text(found).encode())
    _show(found, as_json, output.screen(junit, markdown, badge))
    if annotations:
        for line in ci.workflow_commands(found):
            click.echo(line)
    for one in found:
        if one.error is not None:
            click.echo(f"error: {one.error}", err=True)
    raise click.exceptions.Exit(exit_code(found))


@dataclass
class Judged:
    """One receipt on the command line."""

    receipt: str
    checks: list[GateCheck] = field(default_factory=list)
    error: str | None = None
    code: int = 0
    """Of the error."""

    @property
    def passed(self) -> bool:
        """Whether it was read and every check passed."""
        return self.error is None and gate.passed(self.checks)


def judged(path: Path, policy: Policy, keys: Sequence[Path] = (), again: Rerun | None = None) -> Judged:
    """Judge one receipt; whatever goes wrong with it is its own error, and the others are judged."""
    try:
        if summary.is_summary(path):
            made = summary.read(path)
            checks = check.judge(path, made, policy, judge)
        else:
            made = receipt.read(path)
            checks = judge(made, policy)
        checks += [signature.check(path, made, keys)] if keys else []
        # What is not even true by itself is not worth running again.
        holds = all(one.passed or not one.applies for one in checks)
        more = again.checks(made) if again and holds else ()
        return Judged(str(path), [*checks, *more])
    except Exception as error:
        stop_if_asked()
        message, code = of_error(error)
        return Judged(
            str(path), error=message if isinstance(error, BadInputError) else f"{path}: {message}", code=code
        )


def exit_code(judged: Sequence[Judged]) -> int:
    """Return the largest exit code of those that could not be judged, else 1 when one failed or there is none."""
    code = max((one.code for one in judged), default=0)
    return code or (0 if judged and all(one.passed for one in judged) else 1)


def _policy(path: Path | None, demands: dict[str, Any]) -> Policy:
    """Return the policy of the file, overridden by every option that was given."""
    policy = Policy() if path is None else read_policy(path)
    # By identity: 0 is a value that was given, although it equals False.
    given = {name: v for name, v in demands.items() if v is not None and v is not False and v != ()}
    for sha256 in given.get("model_sha256", ()):
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise click.BadParameter("expected 64 lower-case hexadecimal digits", param_hint="--model-sha256")
    return replace(policy, **given)


def _init(receipts: Sequence[Path], policy: Policy, out: Path | None, init: bool) -> None:
    """Write a policy of one receipt, which must pass the gate by itself and by the policy."""
    if not init or len(receipts) != 1:
        raise click.UsageError("--init takes one receipt, and -o belongs to it")
    trusted = receipt.read(receipts[0])
    text = policy_text(trusted)
    made = policy_of(parse_yaml(text.encode(), "the policy"), "the policy")
    for asked in (replace(policy, allow_compute_paths=made.allow_compute_paths), made):
        failed = [check for check in judge(trusted, asked) if not check.passed and check.applies]
        if failed:
            raise BadInputError(
                f"{receipts[0]}: no policy of a receipt that fails: {failed[0].name}: {failed[0].detail}"
            )
    if out is None:
        click.echo(text, nl=False)
    else:
        write_atomically(out, text.encode())


def _show(judged: Sequence[Judged], as_json: bool, out: Console) -> None:
    if as_json:
        plain = [
            {
                "receipt": one.receipt,
                "passed": one.passed,
                "error": one.error,
                "checks": list(map(asdict, one.checks)),
            }
            for one in judged
        ]
        report = {"passed": exit_code(judged) == 0, "receipts": plain}
        output.write_json(json.dumps(report, indent=1, ensure_ascii=True) + "\n")
        return
    for one in judged:
        if one.checks:
            show_checks(out, one.receipt, one.checks, one.passed)
    if len(judged) > 1:
        n_passed, n_unread = sum(one.passed for one in judged), sum(one.error is not None for one in judged)
        counts = {"pass": n_passed, "fail": len(judged) - n_passed - n_unread, "could not be judged": n_unread}
        shown = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        show_verdict(out, "fail" if exit_code(judged) else "pass", f"{len(judged)} receipts: {shown}")
