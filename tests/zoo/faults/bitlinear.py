"""C faults of the BitLinears: codes, scales, activation quantisation, kernels, which matrix."""

from __future__ import annotations

from tests.zoo.fault import FIRST, LAST, MIDDLE, PREFILL, EngineFault

BITLINEARS = ("q", "k", "v", "attn_o_out", "ffn_gate", "ffn_up", "ffn_down")
SOME = ("ffn_down", "q", "v", "ffn_up")
READS = {"q": "attn_norm", "attn_o_out": "attn_sub_norm", "ffn_gate": "ffn_norm", "ffn_down": "ffn_sub_norm"}
"""First BitLinear that reads a quantised row -> the norm whose code quantises it."""


def _bitlinear(
    name: str, family: int, what: str, taps: tuple[str, ...], site: str, code: str, **more
) -> EngineFault:
    """A fault inside ``bitlinear``, in one of the matrices."""
    return EngineFault(name, family, what, taps, edits={site: code}, ops={tap: tap for tap in taps}, **more)


def _rescale(name: str, family: int, what: str, taps: tuple[str, ...], value: str) -> EngineFault:
    """Another value than ``((float)d[i] - sum) / s * m->scale``."""
    code = f"const int32_t *d = acc + c * n_rows; (void)d; for (int i = 0; i < n_rows; i++) out[i] = {value};"
    return _bitlinear(name, family, what, taps, "rescale", code)


def _quantizer(name: str, what: str, site: str, code: str, **more) -> EngineFault:
    """A fault of the quantiser after one of the norms."""
    return EngineFault(name, 5, what, more.pop("taps", tuple(READS)), edits={site: code}, ops=READS, **more)


def _layout(layout: str) -> str:
    return f"zoo_dots(e->kernels->i2s_dot, m, row, n_rows, b->q8 + t * m->cols, n_cols, {layout}, acc);"


def _table(values: str) -> str:
    return f"zoo_table_dot(m, row + i, b->q8 + (t + c) * m->cols, (const float[]){{{values}}}) / s * m->scale"


def _other_matrix(which: str) -> str:
    return f"&e->layers[(layer + 1) % e->model.n_layers].{which}"


def _of_another_layer(tap: str) -> EngineFault:
    name = f"{tap}-of-another-layer"
    what = f"{tap} computed with the next layer's matrix"
    return EngineFault(name, 10, what, (tap,), edits={f"{tap}_matrix": _other_matrix(tap)})


_KERNEL_ROWS = "for (int i = 0; i < n_rows * n_cols; i++) acc[i] = "

FAULTS = (
    _bitlinear(
        "codes-sequential-high-first", 1, "four consecutive codes per byte, high bits first",
        SOME, "i2s_dot", _layout("ZOO_SEQUENTIAL_HIGH_FIRST"),
    ),
    _bitlinear(
        "codes-sequential-low-first", 1, "four consecutive codes per byte, low bits first",
        SOME, "i2s_dot", _layout("ZOO_SEQUENTIAL_LOW_FIRST"),
    ),
    _rescale(
        "table-minus2-to-2", 2, "codes mean -2, -1, 1, 2",
        SOME, _table("-2, -1, 1, 2"),
    ),
    _rescale(
        "table-thirds", 2, "codes mean -1, -0.33, 0.33, 1",
        SOME, _table("-1, -0.33f, 0.33f, 1"),
    ),
    _rescale(
        "table-zero-plus-minus", 2, "codes mean 0, +1, -1",
        SOME, _table("0, 1, -1, 0"),
    ),
    _rescale(
        "offset-forgotten", 2, "codes used as 0, 1, 2: the sum of the activations is not subtracted",
        SOME, "(float)d[i] / s * m->scale",
    ),
    _bitlinear(
        "block-of-64", 3, "blocks of 64 codes, as on ARM",
        BITLINEARS, "i2s_dot", _layout("ZOO_STRIDED_64"),
    ),
    _rescale(
        "weight-scale-ignored", 4, "the matrix's scale is not applied",
        BITLINEARS, "((float)d[i] - sum) / s",
    ),
    _rescale(
        "weight-scale-twice", 4, "the matrix's scale is applied twice",
        SOME, "((float)d[i] - sum) / s * m->scale * m->scale",
    ),
    _rescale(
        "weight-scale-inverted", 4, "divided by the matrix's scale",
        SOME, "((float)d[i] - sum) / s / m->scale",
    ),
    _rescale(
        "input-scale-one-at-rescale", 5, "the result is not divided by the activations' scale",
        SOME, "((float)d[i] - sum) * m->scale",
    ),
    _bitlinear(
        "row-scale-of-first-row", 5, "every row divided by the first row's scale",
        SOME, "row_scale", "b->q8_scale[0]", passes=PREFILL, layers=(FIRST, MIDDLE, LAST - 1),
    ),
    _bitlinear(
        "row-scale-of-previous-row", 5, "every row divided by the scale of the row before",
        SOME, "row_scale", "b->q8_scale[t + c > 0 ? t + c - 1 : 0]", passes=PREFILL,
        layers=(FIRST, MIDDLE, LAST - 1),
    ),
    _rescale(
        "activations-not-quantised", 5, "float activations",
        SOME, "zoo_float_dot(m, row + i, zoo_rows[(t + c) % ZOO_MAX_ROWS]) * m->scale",
    ),
    _quantizer(
        "input-scale-fixed", "activations rounded as they are, scale 1.0", "quantize_row",
        "zoo_quantize(x, n, 1.0f, rintf, e->buffers.q8 + row * n, &e->buffers.q8_scale[row],"
        " &e->buffers.q8_sum[row]); return;",
    ),
    _quantizer(
        "quantiser-truncates", "int8 conversion truncates instead of rounding", "quantize_row",
        "zoo_quantize(x, n, 127.0f / zoo_absmax(x, n), truncf, e->buffers.q8 + row * n,"
        " &e->buffers.q8_scale[row], &e->buffers.q8_sum[row]); return;",
    ),
    EngineFault(
        "quantiser-rounds-half-up", 5, "ties rounded up instead of to even", ("q",), layers=(FIRST,), base="ties",
        ops=READS,
        edits={"quantize_row": "zoo_quantize(x, n, (float)(127.0 / (double)zoo_absmax(x, n)), zoo_half_up,"
               " e->buffers.q8 + row * n, &e->buffers.q8_scale[row], &e->buffers.q8_sum[row]); return;"},
    ),
    _quantizer(
        "quantiser-per-tensor", "one scale for all tokens of the batch", "quantized",
        "const float *all = weight ? normed : x;"
        " const float s = (float)(127.0 / (double)zoo_absmax(all, rows * n));"
        " for (int64_t t = 0; t < rows; t++) zoo_quantize(all + t * n, n, s, rintf, r->engine->buffers.q8 + t * n,"
        " &r->engine->buffers.q8_scale[t], &r->engine->buffers.q8_sum[t]);",
        passes=PREFILL, layers=(FIRST, MIDDLE, LAST - 1), taps=("ffn_down", "attn_o_out", "ffn_gate", "q"),
    ),
    _bitlinear(
        "accumulator-16-bit", 15, "the integer sum wraps at 16 bits",
        ("q", "k", "v"), "i2s_dot",
        "e->kernels->i2s_dot(m->data + row * (m->cols / 4), m->cols, n_rows, b->q8 + t * m->cols, m->cols, n_cols,"
        f" acc); {_KERNEL_ROWS} (int16_t)acc[i];",
        layers=(FIRST,), base="saturated",
    ),
    _bitlinear(
        "empty-kernel", 15, "the kernel has no body: all sums are 0",
        BITLINEARS, "i2s_dot", f"{_KERNEL_ROWS} 0;",
    ),
    _bitlinear(
        "thread-slice-lost", 15, "what the second of two threads computed is missing",
        BITLINEARS, "bitlinear_done", "zoo_lose_slice(y, n_tokens, m->rows, 4);",
    ),
    _bitlinear(
        "last-row-unwritten", 15, "the last output row is never written",
        SOME, "bitlinear_done",
        "for (int64_t t = 0; t < n_tokens; t++) y[t * m->rows + m->rows - 1] = 0;",
    ),
    _bitlinear(
        "batch-remainder-zero", 11, "the last n_tokens mod 4 columns of a batch are 0",
        BITLINEARS, "bitlinear_done",
        "if (n_tokens > 1) zoo_zero(y + n_tokens / 4 * 4 * m->rows, n_tokens % 4 * m->rows);",
        passes=PREFILL, layers=(FIRST, MIDDLE, LAST - 1),
    ),
    _bitlinear(
        "batch-remainder-repeated", 11, "the last n_tokens mod 4 columns of a batch repeat the column before them",
        SOME, "bitlinear_done",
        "if (n_tokens > 4) for (int64_t t = n_tokens / 4 * 4; t < n_tokens; t++)"
        " memcpy(y + t * m->rows, y + (n_tokens / 4 * 4 - 1) * m->rows, (size_t)m->rows * sizeof *y);",
        passes=PREFILL, layers=(FIRST, MIDDLE, LAST - 1),
    ),
    _of_another_layer("q"),
    _of_another_layer("k"),
    _of_another_layer("v"),
)  # fmt: skip
