"""Variants: known ways of getting an operation wrong, each as a formula in NumPy float64.

``VARIANTS`` is the list; there is one module for each kind of operation. To add a variant, add one entry to the
table of its module: a name, one sentence, and the function that computes the wrong output from a ``Context``. A
variant whose parameter is estimated from the recorded values goes into ``FITTED``: a function that yields a
``Fit`` for each estimate. The tests simulate and diagnose it, and ``python -m crossval.diagnose.variants >
docs/variants.md`` regenerates the list in the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator

from crossval.diagnose.variants import (
    accumulator,
    after_product,
    attention,
    cache,
    embedding,
    embedding_models,
    factor,
    ffn,
    head,
    inputs,
    kernels,
    narrow_sums,
    norms,
    other_taps,
    precision,
    quantizer,
    residual,
    rope,
    rope_fits,
    rows,
    softmax,
    tokens,
    weights,
)
from crossval.diagnose.variants.context import Context, Inapplicable, of_records
from crossval.diagnose.variants.variant import EVERY_OP, FAMILIES, Candidate, Variant

VARIANTS: tuple[Variant, ...] = (
    *weights.VARIANTS,
    *after_product.VARIANTS,
    *quantizer.VARIANTS,
    *accumulator.VARIANTS,
    *ffn.VARIANTS,
    *norms.VARIANTS,
    *rope.VARIANTS,
    *attention.VARIANTS,
    *softmax.VARIANTS,
    *softmax.WINDOWS,
    *embedding.VARIANTS,
    *embedding_models.VARIANTS,
    *head.VARIANTS,
    *embedding.MISSING,
    *cache.VARIANTS,
    *precision.VARIANTS,
    *narrow_sums.VARIANTS,
    *residual.VARIANTS,
    *kernels.VARIANTS,
)
FITTED: tuple[Variant, ...] = (
    *inputs.FITTED,
    *weights.FITTED,
    *quantizer.FITTED,
    *rows.FITTED,
    *tokens.LOOKED_UP,
    *accumulator.FITTED,
    *embedding.FITTED,
    *norms.FITTED,
    *rope_fits.FITTED,
    *attention.FITTED,
    *head.FITTED,
    *softmax.FITTED,
    *ffn.FITTED,
    *factor.FITTED,
    *residual.FITTED,
    *cache.FITTED,
    *tokens.FITTED,
    *other_taps.FITTED,
)
"""Variants with parameters estimated from the recorded values; tried if nothing in ``VARIANTS`` explains them."""


def candidates(context: Context, *, deferred: bool = False) -> Iterator[Candidate]:
    """Yield the concrete mistakes that may explain one operation; the costly ones only on request."""
    for variant in VARIANTS:
        if variant.deferred == deferred:
            yield from variant.candidates(context)


def fitted(context: Context) -> Iterator[Candidate]:
    """Yield the mistakes that, with parameters estimated from the recorded values, come close to them."""
    for variant in FITTED:
        yield from variant.candidates(context)


__all__ = [
    "EVERY_OP",
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
