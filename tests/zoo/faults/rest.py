"""C faults of norms, FFN, residuals and the two ends of the network, and damage to any tensor."""

from __future__ import annotations

from collections.abc import Iterator

from tests.zoo.fault import LAST, MIDDLE, PREFILL, EngineFault
from tests.zoo.sites import DAMAGEABLE

NORMS = ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm")
SUB_NORMS = ("attn_sub_norm", "ffn_sub_norm")
_RIGHT_SCALE = "1.0f / sqrtf(zoo_mean_square(x, n, 0) + eps)"


def _norm(name: str, what: str, code: str, taps: tuple[str, ...] = NORMS, **more) -> EngineFault:
    code = (
        "const float *from = x; for (int64_t t = r->thread; t < rows; t += r->n_threads) {"
        f" const float *x = from + t * n; float *out = normed + t * n; {code} }} return;"
    )
    edits = {"norm_rows": code}
    return EngineFault(name, 7, what, taps, edits=edits, ops={tap: tap for tap in taps}, **more)


def _normed(factor: str, *, centre: str = "0", weight: str = "weight", plus: str = "0") -> str:
    return f"zoo_norm(x, {centre}, {factor}, {weight}, {plus}, n, out);"


def _norm_faults() -> Iterator[EngineFault]:
    """Yield every mistake for the norms of the layers and for the final norm."""
    small = tuple(tap for tap in NORMS if tap != "ffn_sub_norm")  # there the input is so large that eps is lost
    for name, what, code, more in (
        ("norm-layer-norm", "LayerNorm: the mean is subtracted",
         _normed("1.0f / sqrtf(zoo_mean_square(x, n, zoo_mean(x, n)) + eps)", centre="zoo_mean(x, n)"), {}),
        ("norm-eps-outside", "eps added outside the root",
         _normed("1.0f / (sqrtf(zoo_mean_square(x, n, 0)) + eps)"), {"taps": small}),
        ("norm-eps-hard-coded", "eps 1e-6 instead of the header's",
         _normed("1.0f / sqrtf(zoo_mean_square(x, n, 0) + 1e-6f)"), {"taps": small, "base": "large-eps"}),
        ("norm-weight-missing", "the weight is not applied", _normed(_RIGHT_SCALE, weight="NULL"), {}),
        ("norm-weight-plus-1", "1 added to the weight", _normed(_RIGHT_SCALE, plus="1"), {}),
    ):  # fmt: skip
        yield _norm(name, what, code, **more)
        yield _norm(f"final-{name}", f"final norm: {what}", code, **{**more, "taps": ("result_norm",)}, layers=())


def _act(name: str, what: str, value: str) -> EngineFault:
    code = (
        "for (int64_t i = 0; i < hidden; i++) {"
        " const float *gate = b->gate + t * hidden, relu = gate[i] > 0 ? gate[i] : 0.0f; (void)relu;"
        f" b->act[t * hidden + i] = {value};"
        " b->prod[t * hidden + i] = b->act[t * hidden + i] * b->up[t * hidden + i]; }"
    )
    return EngineFault(name, 6, what, ("ffn_act",), edits={"activation": code})


def _activate(gate: str, up: str) -> str:
    return (
        f"activate(b->{gate} + t * hidden, b->{up} + t * hidden, hidden,"
        " b->act + t * hidden, b->prod + t * hidden);"
    )


def _residual(name: str, what: str, to_ffn_inp: str, to_l_out: str) -> tuple[EngineFault, EngineFault]:
    def loop(target: str, value: str) -> str:
        return f"for (int64_t i = 0; i < n_rows * dim; i++) {target}[i] = {value};"

    return (
        EngineFault(f"{name}-after-attention", 13, f"residual of attention: {what}", ("ffn_inp",),
                    edits={"ffn_inp": loop("b->ffn_inp", to_ffn_inp)}),
        EngineFault(f"{name}-after-ffn", 13, f"residual of the FFN: {what}", ("l_out",),
                    edits={"l_out": loop("b->x", to_l_out)}),
    )  # fmt: skip


def _damage(name: str, family: int, what: str, code: str, taps: tuple[str, ...], **more) -> list[EngineFault]:
    """Damage to tensors of layers; one fault per name, because they share a mechanism and an explanation."""
    in_layers = tuple(tap for tap in taps if tap not in ("inp_embd", "result_output"))
    ops = {tap: tap for tap in in_layers}
    return [EngineFault(name, family, what, in_layers, edits={"damage": code}, ops=ops, **more)]


_AFTER_NORM = "(b->{normed} + skipped)[i]"
_EMBED = "bn_table_widen(table->type, bn_table_row(table, {row}, dim), dim, e->buffers.x + t * dim);"
_HALVES = "((const uint16_t *)e->model.{table}.rows)"

FAULTS = (
    *_norm_faults(),
    _norm("sub-norm-skipped", "the sub-norm is skipped", "memcpy(out, x, (size_t)n * sizeof *out);", SUB_NORMS),
    # FFN
    _act("act-silu", "SiLU instead of squared ReLU", "gate[i] / (1.0f + expf(-gate[i]))"),
    _act("act-gelu", "GELU instead of squared ReLU", "0.5f * gate[i] * (1.0f + erff(gate[i] * 0.70710678f))"),
    _act("act-relu", "plain ReLU", "relu"),
    _act("act-square", "the square without the ReLU", "gate[i] * gate[i]"),
    EngineFault("act-on-up", 6, "the activation is applied to up and gate multiplies it", ("ffn_act",),
                edits={"activation": _activate("up", "gate")}),
    EngineFault("gate-and-up-swapped", 6, "gate and up change places", ("ffn_gate",),
                edits={"gate_matrix": "&w->up", "up_matrix": "&w->gate"}),
    EngineFault("gate-times-gate", 6, "the product takes gate instead of up", ("ffn_out",),
                edits={"activation": _activate("gate", "gate")}),
    # residuals
    *_residual("residual-skipped", "left out", "(b->attn_out + skipped)[i]", "b->down[i]"),
    *_residual("residual-doubled", "added twice",
               "(b->attn_out + skipped)[i] + 2 * (b->x + skipped)[i]", "b->down[i] + 2 * b->ffn_inp[i]"),
    *_residual("residual-of-normed", "the normed input is added",
               "(b->attn_out + skipped)[i] + " + _AFTER_NORM.format(normed="attn_norm"),
               "b->down[i] + b->ffn_norm[i]"),
    # input
    EngineFault("input-shifted-right", 14, "the first token is embedded twice and the last not at all",
                ("inp_embd",), layers=(), passes=PREFILL,
                edits={"embed": _EMBED.format(row="r->pass->tokens[t ? t - 1 : 0]")}),
    EngineFault("input-shifted-left", 14, "the first token is not embedded", ("inp_embd",),
                layers=(), passes=PREFILL,
                edits={"embed": _EMBED.format(row="r->pass->tokens[t + 1 < r->pass->n_tokens ? t + 1 : t]")}),
    EngineFault("embedding-transposed", 10, "the embedding table is read as (dim, vocab_size)", ("inp_embd",),
                layers=(),
                edits={"embed": "for (int64_t i = 0; i < dim; i++) e->buffers.x[t * dim + i] = bn_half_to_float("
                       + _HALVES.format(table="token_embd")
                       + "[i * e->model.vocab_size + r->pass->tokens[t]]);"}),
    EngineFault("embedding-row-one-off", 10, "the embedding of the next token id", ("inp_embd",), layers=(),
                edits={"embed": _EMBED.format(row="r->pass->tokens[t] + 1")}),
    # head
    EngineFault("head-transposed", 10, "the head's table is read as (dim, vocab_size)", ("result_output",),
                layers=(),
                edits={"head_done": "for (int64_t t = 0; t < n_rows; t++) for (int64_t i = 0; i < vocab; i++)"
                       " r->pass->logits[t * vocab + i] ="
                       f" zoo_dot_f16({_HALVES.format(table='output')} + i, vocab,"
                       " e->buffers.head_in + t * dim, dim);"}),
    EngineFault("head-tied-by-mistake", 10, "the embedding multiplies although the file has its own head",
                ("result_output",), layers=(), base="untied",
                edits={"head_done": "for (int64_t t = 0; t < n_rows; t++) for (int64_t i = 0; i < vocab; i++)"
                       " r->pass->logits[t * vocab + i] ="
                       f" zoo_dot_f16({_HALVES.format(table='token_embd')} + i * dim, 1,"
                       " e->buffers.head_in + t * dim, dim);"}),
    EngineFault("head-input-not-rounded", 12, "the head's input kept in float32 for a single row",
                ("result_output",), layers=(),
                edits={"head_input": "memcpy(input, normed, (size_t)dim * sizeof *input);"}),
    EngineFault("head-input-through-bf16", 12, "the head's input rounded to BF16", ("result_output",), layers=(),
                edits={"head_input": "for (int64_t i = 0; i < dim; i++) input[i] = zoo_to_bf16(normed[i]);"}),
    EngineFault("head-rows-mod-4-unwritten", 15, "the last vocab_size mod 4 logits are never written",
                ("result_output",), layers=(),
                edits={"head_done": "for (int64_t t = 0; t < n_rows; t++)"
                       " zoo_zero(r->pass->logits + t * vocab + vocab / 4 * 4, vocab % 4);"}),
    EngineFault("head-thread-slice-lost", 15, "half of the logits are never written", ("result_output",),
                layers=(),
                edits={"head_done": "zoo_lose_slice(r->pass->logits, n_rows, vocab, 16);"}),
    EngineFault("rope-on-v-in-place", 8, "V is rotated where it is computed", ("v",), ops={"v": "v"},
                edits={"damage": "const int64_t d = r->engine->model.head_dim; float turned[1024];"
                       " for (int64_t i = 0; i < rows * n; i += d) {"
                       " const float position = (float)(r->pass->start + i / n);"
                       " zoo_rope(y + i, d / 2, position, r->engine->model.rope_base,"
                       " r->engine->model.rope_pairing, turned);"
                       " memcpy(y + i, turned, (size_t)d * sizeof *y); }"}),
    # any tensor
    *_damage("rows-swapped", 15, "the rows of two tokens change places",
             "if (rows > 2) zoo_swap_rows(y, 1, 2, n);",
             tuple(tap for tap in DAMAGEABLE if tap != "l_out"), passes=PREFILL, layers=(0, MIDDLE, LAST - 1)),
    *_damage("nan", 15, "one NaN", "y[n / 2] = NAN;", DAMAGEABLE),
    *_damage("infinity", 15, "one infinity", "y[n / 3] = INFINITY;", ("ffn_down", "kqv_out", "q")),
    *_damage("bit-flipped", 15, "the highest mantissa bit of one value flipped",
             "y[n - 2] = bn_float(bn_bits(y[n - 2]) ^ 0x400000u);", DAMAGEABLE),
)  # fmt: skip
