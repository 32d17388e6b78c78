"""Trace faults: one array of a healthy engine's recording is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from crossval.model.taps import token_axis
from crossval.passes import TapArray
from crossval.selftest import alter
from crossval.selftest.alter import Array
from tests.zoo.fault import BOTH, LAST, MIDDLE, PREFILL, TraceFault
from tests.zoo.recording import Recording

NOT_IN_A_RUNNING_ENGINE = ("ffn_act", "attn_norm", "k_rope", "kq_soft_max", "attn_sub_norm", "ffn_norm", "ffn_out",
                           "ffn_sub_norm")  # fmt: skip
"""Taps that the C faults of damage leave out: their tensors are recorded after they were read."""
MATRICES = ("attn_o_out", "q", "k", "v", "ffn_gate", "ffn_up", "ffn_down")
EVERY_OP = (*NOT_IN_A_RUNNING_ENGINE, *MATRICES, "q_rope", "kq", "kqv_out", "ffn_inp", "l_out")
BEFORE_LAST = (0, MIDDLE, LAST - 1)


def _array(change: Callable[[Array, int], Array]):
    """Replace an array by ``change(array, token axis)``, which keeps its shape."""

    def edit(recording: Recording, index: int, tap: str) -> None:
        array = recording.array(index, tap)
        array[...] = change(array.copy(), token_axis(tap))

    return edit


def _swap_rows(x: Array, axis: int) -> Array:
    order = np.arange(x.shape[axis])
    order[[1, 2]] = order[[2, 1]]
    return np.take(x, order, axis)


def _repeat_previous_row(x: Array, axis: int) -> Array:
    order = np.arange(x.shape[axis])
    order[-1] -= 1
    return np.take(x, order, axis)


def _of_previous_pass(recording: Recording, index: int, tap: str) -> None:
    stale = recording.array(index - 1, tap)
    array = recording.array(index, tap)
    array[...] = np.take(stale, [0], token_axis(tap))  # the buffer starts with the batch's first token


def _of_next_layer(recording: Recording, index: int, tap: str) -> None:
    _, layer, name = tap.split(".")
    array = recording.array(index, tap)
    array[...] = recording.array(index, f"blk.{int(layer) + 1}.{name}")


def _lose_row(recording: Recording, index: int, tap: str) -> None:
    record = recording.passes[index]
    old = record.taps[tap]
    shorter = alter.lose_row(old.array, token_axis(tap))
    recording.passes[index] = replace(record, taps={**record.taps, tap: TapArray(shorter, old.rows)})


def _feed(change: Callable[[tuple[int, ...]], tuple[int, ...]]):
    """Claim other tokens than those that were run."""

    def edit(recording: Recording, index: int, tap: str) -> None:
        record = recording.passes[index]
        plan = replace(record.plan, token_ids=change(record.plan.token_ids))
        recording.passes[index] = replace(record, plan=plan)

    return edit


def _trace(name: str, family: int, what: str, taps: tuple[str, ...], change, **more) -> TraceFault:
    return TraceFault(f"trace-{name}", family, what, taps, change=change, **more)


FAULTS = (
    _trace("bos-doubled", 14, "the engine was fed one more BOS than the trace says", ("inp_embd",),
           _feed(lambda ids: (*ids[1:], ids[-1])), layers=(), passes=PREFILL),
    _trace("token-ids-shifted", 14, "token ids one too high", ("inp_embd",),
           _feed(lambda ids: tuple(i + 1 for i in ids)), layers=(), passes=BOTH),
    _trace("rows-swapped", 15, "the rows of two tokens change places", NOT_IN_A_RUNNING_ENGINE, _array(_swap_rows),
           passes=PREFILL, layers=BEFORE_LAST),
    _trace("stale-row", 11, "the last row repeats the one before", ("k_rope", "v", "kq", "kqv_out", "attn_norm"),
           _array(_repeat_previous_row), passes=PREFILL, layers=BEFORE_LAST),
    _trace("stale-pass", 11, "a decoded token's array is that of the pass before",
           ("v", "k_rope", "attn_norm", "ffn_norm", "l_out", "ffn_act"), _of_previous_pass, passes=("decode",)),
    _trace("batch-remainder-zero", 11, "the last n_tokens mod 4 rows of a batch are 0",
           ("ffn_act", "attn_norm", "k_rope", "kqv_out", "ffn_out"), _array(alter.zero_remainder), passes=PREFILL,
           layers=BEFORE_LAST),
    _trace("thread-slice-lost", 15, "half of the features are 0", NOT_IN_A_RUNNING_ENGINE,
           _array(alter.lose_half)),
    _trace("nan", 15, "one NaN", NOT_IN_A_RUNNING_ENGINE, _array(alter.set_value(3, np.nan))),
    _trace("infinity", 15, "one infinity", NOT_IN_A_RUNNING_ENGINE, _array(alter.set_value(0, np.inf))),
    _trace("sign-flipped", 15, "the largest value of the last token has the other sign", EVERY_OP,
           _array(alter.flip_sign)),
    _trace("rounded-to-f16", 12, "passed on in F16", ("l_out", "ffn_out", "attn_norm", "ffn_act", "q_rope"),
           _array(alter.through_f16)),
    _trace("rounded-to-bf16", 12, "passed on in BF16", ("l_out", "ffn_inp", "k_rope", "kqv_out", "kq_soft_max"),
           _array(alter.through_bf16)),
    _trace("one-in-ten-thousand", 12, "every value 0.01 % too large", EVERY_OP,
           _array(alter.one_in_ten_thousand)),
    _trace("of-another-layer", 10, "the array of the next layer", ("attn_norm", "v", "ffn_act", "k"),
           _of_next_layer, layers=BEFORE_LAST),
    _trace("row-missing", 15, "one token's row is missing", ("ffn_norm", "q", "kq_soft_max"), _lose_row,
           passes=PREFILL, layers=BEFORE_LAST),
    _trace("logits-shifted", 15, "every logit one token id too high", ("result_output",),
           _array(alter.shift_features), layers=()),
)  # fmt: skip
