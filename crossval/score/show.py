"""Print a receipt of kind ``score``: both engines' figures, and the first token whose logits differ."""

from __future__ import annotations

from rich.console import Console

from crossval.console import new_table, plain, show_line
from crossval.receipts.file import Receipt
from crossval.receipts.party import names_of
from crossval.receipts.show import show_verdict
from crossval.terms import SIDES


def show_score(out: Console, receipt: Receipt) -> None:
    """Print figures, how many tokens have equal logits, the first that has not, and the verdict."""
    results, names = receipt["results"], names_of(receipt)
    text, n_scored = results["text"], results["n_scored"]
    show_line(
        out,
        f"\n{n_scored} tokens scored in windows of up to {text['n_context']}, {text['n_scored_bytes']} of "
        f"{text['n_bytes']} bytes of text (sha256 {text['sha256'][:12]})",
    )
    table = new_table()
    for name in ("engine", "mean NLL (nats)", "perplexity", "bits per byte"):
        table.add_column(name, justify="left" if name == "engine" else "right", overflow="fold")
    for side in SIDES:
        figures = results["figures"][side]
        values = (figures[name] for name in ("mean_nll", "perplexity", "bits_per_byte"))
        shown = ("beyond binary64" if value is None else f"{value:.9g}" for value in values)
        table.add_row(f"{side}: {plain(names[side])}", *shown)
    out.print(table)
    show_line(out, f"NLL        equal in every bit for {results['n_equal_nll']} of {n_scored} scored tokens")
    first = results["first_difference"]
    if first is not None:
        nll = ", ".join(f"{names[side]} {first['nll'][side]:.9g}" for side in SIDES)
        show_line(
            out,
            f"first      scored token {first['position']} (id {first['token_id']}): {first['n_different']} of "
            f"{receipt['model']['shape']['vocab_size']} logits differ, by at most "
            f"{first['largest_difference']:.3g}; NLL {nll}",
        )
    equal = f"logits equal in every bit for {results['n_equal_logits']} of {n_scored} scored tokens"
    show_verdict(out, receipt["verdict"], equal)
