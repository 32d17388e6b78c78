"""C faults for tests outside the zoo's tables.

Some are so small that the engine goes on choosing the same tokens (``greedy``); others appear only with some
batches or threads (``metamorphic``).
"""

from __future__ import annotations

from tests.zoo.fault import EngineFault
from tests.zoo.faults.bitlinear import READS

_QUANTIZED = "e->buffers.q8 + row * n, &e->buffers.q8_scale[row], &e->buffers.q8_sum[row]"

FAULTS = (
    EngineFault(
        "quantiser-clamps-at-126", 5, "int8 activations are kept within -126 and 126", ("attn_o_out",), ops=READS,
        edits={
            "quantize_row": f"zoo_quantize(x, n, (float)(127.0 / (double)zoo_absmax(x, n)), rintf, {_QUANTIZED});"
            " int32_t kept = 0; for (int64_t i = 0; i < n; i++) { int8_t *q = e->buffers.q8 + row * n + i;"
            " *q = *q > 126 ? 126 : *q < -126 ? -126 : *q; kept += *q; }"
            " e->buffers.q8_sum[row] = kept; return;"
        },
    ),
    EngineFault(
        "float-row-sum", 5, "the sum that is subtracted is that of the float activations", ("attn_o_out",),
        ops={"attn_o_out": "attn_o_out"},
        edits={
            "rescale": "const float *x = zoo_rows[(t + c) % ZOO_MAX_ROWS]; const int32_t *d = acc + c * n_rows;"
            " double whole = 0; for (int64_t i = 0; i < m->cols; i++) whole += (double)x[i] * s; (void)sum;"
            " for (int i = 0; i < n_rows; i++) out[i] = ((float)d[i] - (float)whole) / s * m->scale;"
        },
    ),
    EngineFault(
        "remainder-scaled-as-first-row", 15, "the last n mod 4 tokens take the first one's scale", ("q",),
        edits={"row_scale": "b->q8_scale[t + c >= n_tokens - n_tokens % 4 ? 0 : t + c]"},
    ),
    EngineFault(
        "only-the-last-sees-itself", 9, "of a batch, only the last token sees its own cell", ("kq_soft_max",),
        edits={
            "softmax": "e->kernels->softmax[e->width_index](scores,"
            " n_visible - (t + 1 < p->n_tokens && n_visible > 1), n_kv, scale);"
        },
    ),
    EngineFault(
        # a wrong value, not a missing one: rows left unwritten may hold the right values of an earlier pass
        "third-thread-off-by-one", 15, "the third thread subtracts one too much from its sums", ("q",),
        edits={
            "rescale": "const int32_t *d = acc + c * n_rows; for (int i = 0; i < n_rows; i++)"
            " out[i] = ((float)d[i] - sum - (float)(r->thread == 2)) / s * m->scale;"
        },
    ),
    EngineFault(
        # one unit in the last place, which may round away before the layer's output
        "three-threads-one-ulp", 15, "one ulp in one value, if three threads run", ("ffn_up",),
        ops={"ffn_up": "ffn_up"},
        edits={"damage": "if (r->thread == 0 && r->n_threads == 3) y[0] = nextafterf(y[0], INFINITY);"},
    ),
)  # fmt: skip
