"""Write ``docs/policy.md`` from the schema (``python -m crossval.cli.policy_docs > docs/policy.md``)."""

from __future__ import annotations

import json

from crossval.receipts.policy import POLICIES, Demand, demands

HEADER = """# Policies of the gate

This page answers: what can a policy demand of a receipt, and of which kinds? Generated; do not
edit. Regenerate with `python -m crossval.cli.policy_docs > docs/policy.md`. What the gate checks
whatever the policy says is in [gate.md](gate.md); what a list stops, and whom, in
[trust.md](trust.md).

A policy is YAML or JSON ([schema](../schemas/policy.v1.schema.json)), at most 1 MiB (YAML: 128
KiB). Every field may be left out. Duplicate keys, anchors and tags are refused; scalars are JSON's
(`no` is a text, `1e-6` a number).

- `crossval gate --policy FILE RECEIPT...`; options of the command line override the file.
- `crossval gate --init RECEIPT -o FILE` writes a policy of a receipt that you trust: its model,
  engines, version and results.
- `crossval gate --policy strict RECEIPT...` is the policy below, which ships with crossval.

A field holds receipts of the kinds that it means. On another kind the gate says `not applicable`
(its line shows `-`). A demand that means none of the receipts on the command line fails: a receipt
of another kind does not get past it. Fields that accept something (`allow_…`, `accept_within`)
demand nothing, so they never fail.
"""


def policy_markdown() -> str:
    """Return the page: the fields with their meaning, default and kinds, and the strict policy."""
    strict = (POLICIES / "strict.yaml").read_text(encoding="utf-8")
    rows = "\n".join(map(_row, demands().values()))
    table = f"## Fields\n\n| field | meaning | default | kinds |\n|---|---|---|---|\n{rows}\n"
    return f"{HEADER}\n{table}\n## The strict policy\n\n```yaml\n{strict}```\n"


def _row(demand: Demand) -> str:
    default = "" if demand.default is None else f"`{json.dumps(demand.default)}`"
    kinds = "all" if demand.of_all else ", ".join(f"`{kind}`" for kind in demand.kinds)
    meaning = demand.meaning.replace("|", "\\|")
    return f"| `{demand.name}` | {meaning} | {default} | {kinds} |"


if __name__ == "__main__":
    print(policy_markdown(), end="")
