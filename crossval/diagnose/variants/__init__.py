"""Variants: the ways in which people get an operation wrong, each as a formula in NumPy float64.

``VARIANTS`` is the list; the modules hold one family group each. To add a variant, add one entry to the table of
its module: a name, its family, the operations it applies to, one sentence, and the function that computes the
wrong output from a ``Context``. The tests simulate and diagnose it, and ``python -m crossval.diagnose.variants >
docs/variants.md`` renews the list in the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator

from crossval.diagnose.variants import (
    attention,
    cache,
    embedding,
    ffn,
    fit_cells,
    fit_codes,
    fit_embedding,
    fit_factor,
    fit_ffn,
    fit_head,
    fit_heads,
    fit_inputs,
    fit_norms,
    fit_quantizer,
    fit_rope,
    fit_rows,
    fit_softmax,
    fit_sums,
    fit_taps,
    fit_tokens,
    kernels,
    norms,
    precision,
    quantizer,
    residual,
    rope,
    softmax,
    weights,
)
from crossval.diagnose.variants.context import Context, Inapplicable, of_records
from crossval.diagnose.variants.variant import FAMILIES, Candidate, Variant

VARIANTS: tuple[Variant, ...] = (
    *weights.VARIANTS,
    *quantizer.VARIANTS,
    *ffn.VARIANTS,
    *norms.VARIANTS,
    *rope.VARIANTS,
    *attention.VARIANTS,
    *softmax.VARIANTS,
    *fit_softmax.VARIANTS,
    *embedding.VARIANTS,
    *fit_embedding.VARIANTS,
    *cache.VARIANTS,
    *precision.VARIANTS,
    *residual.VARIANTS,
    *kernels.VARIANTS,
    fit_codes.ROW_SUMS,
)
FITTED: tuple[Variant, ...] = (
    *fit_inputs.FITTED,
    *fit_codes.FITTED,
    *fit_quantizer.FITTED,
    *fit_rows.FITTED,
    *fit_sums.FITTED,
    *fit_embedding.FITTED,
    *fit_norms.FITTED,
    *fit_rope.FITTED,
    *fit_heads.FITTED,
    *fit_head.FITTED,
    *fit_softmax.FITTED,
    *fit_ffn.FITTED,
    *fit_factor.FITTED,
    *fit_cells.FITTED,
    *fit_tokens.FITTED,
    *fit_taps.FITTED,
)
"""Their parameters are estimated from what was recorded; tried when nothing in ``VARIANTS`` explains it."""


def candidates(context: Context, *, deferred: bool = False) -> Iterator[Candidate]:
    """Yield the concrete mistakes that may explain one operation; the costly ones only when asked for."""
    for variant in VARIANTS:
        if variant.deferred == deferred:
            yield from variant.candidates(context)


def fitted(context: Context) -> Iterator[Candidate]:
    """Yield the mistakes whose parameters, estimated from what was recorded, come close to it."""
    for variant in FITTED:
        yield from variant.candidates(context)


__all__ = [
    "FAMILIES",
    "FITTED",
    "VARIANTS",
    "Candidate",
    "Context",
    "Inapplicable",
    "Variant",
    "candidates",
    "fitted",
    "of_records",
]
