"""Mainline llama.cpp, as ``llama-cpp-python`` 0.3.36 ships it (llama.cpp 0.5.0, ggml 0.25.3), in four libraries.

Its parameters change more often than bitnet.cpp's; a library of another version is refused with what differs.

Sources: ``include/llama.h``, ``ggml/include/ggml.h``, ``src/models/bitnet.cpp``, ``src/llama-graph.cpp``.
"""

from __future__ import annotations

from ctypes import c_bool, c_float, c_int32, c_size_t, c_uint32, c_void_p

from crossval.bitnet_cpp import main
from crossval.bitnet_cpp.table import TYPE_F16, Layout, Nodes, Table

MODEL_PARAMS = Layout(
    "llama_model_params",
    (
        ("devices", c_void_p, None),
        ("tensor_buft_overrides", c_void_p, None),
        ("n_gpu_layers", c_int32, -1),
        ("split_mode", c_int32, 1),
        ("load_mode", c_int32, -1),
        ("lazy_mode", c_int32, 1),
        ("main_gpu", c_int32, 0),
        ("tensor_split", c_void_p, None),
        ("progress_callback", c_void_p, None),
        ("progress_callback_user_data", c_void_p, None),
        ("kv_overrides", c_void_p, None),
        ("vocab_only", c_bool, False),
        ("check_tensors", c_bool, False),
        ("use_extra_bufts", c_bool, True),
        ("no_host", c_bool, False),
        ("no_alloc", c_bool, False),
        ("load_mtp", c_bool, False),
    ),
)
CONTEXT_PARAMS = Layout(
    "llama_context_params",
    (
        ("n_ctx", c_uint32, 512),
        ("n_batch", c_uint32, 2048),
        ("n_ubatch", c_uint32, 512),
        ("n_seq_max", c_uint32, 1),
        ("n_rs_seq", c_uint32, 0),
        ("n_outputs_max", c_uint32, 0),
        ("n_outputs_max_per_seq", c_uint32, 1),
        ("n_threads", c_int32, 4),
        ("n_threads_batch", c_int32, 4),
        ("ctx_type", c_int32, 0),
        ("rope_scaling_type", c_int32, -1),
        ("pooling_type", c_int32, -1),
        ("attention_type", c_int32, -1),
        ("flash_attn_type", c_int32, -1),
        ("rope_freq_base", c_float, 0.0),
        ("rope_freq_scale", c_float, 0.0),
        ("yarn_ext_factor", c_float, -1.0),
        ("yarn_attn_factor", c_float, -1.0),
        ("yarn_beta_fast", c_float, -1.0),
        ("yarn_beta_slow", c_float, -1.0),
        ("yarn_orig_ctx", c_uint32, 0),
        ("defrag_thold", c_float, -1.0),
        ("cb_eval", c_void_p, None),
        ("cb_eval_user_data", c_void_p, None),
        ("type_k", c_int32, TYPE_F16),
        ("type_v", c_int32, TYPE_F16),
        ("abort_callback", c_void_p, None),
        ("abort_callback_data", c_void_p, None),
        ("embeddings", c_bool, False),
        ("offload_kqv", c_bool, True),
        ("no_perf", c_bool, True),
        ("op_offload", c_bool, True),
        ("swa_full", c_bool, True),
        ("kv_unified", c_bool, False),
        ("samplers", c_void_p, None),
        ("n_samplers", c_size_t, 0),
        ("ctx_other", c_void_p, None),
    ),
)
QWEN3: Nodes = {**main.PLAIN_QWEN3, **{tap: main.LLAMA[tap] for tap in ("q", "k", "v")}}
"""``src/models/qwen3.cpp``: there are no norms of inputs in mainline's graphs."""
GEMMA3: Nodes = {**main.PLAIN_GEMMA3, "ffn_act": (), "ffn_out": (("ffn_geglu", None),)}
"""``src/models/gemma3.cpp``: GELU and product are one operation."""
TABLE = Table(
    generation="mainline",
    engine="llama.cpp",
    title="mainline llama.cpp",
    functions=main.functions(MODEL_PARAMS, CONTEXT_PARAMS),
    model_params=MODEL_PARAMS,
    context_params=CONTEXT_PARAMS,
    batch=main.BATCH,
    tensor=main.TENSOR,
    types={34: b"tq1_0", 35: b"tq2_0", 42: b"q2_0"},
    graphs={"bitnet": main.BITNET, "llama": main.LLAMA, "qwen3": QWEN3, "gemma3": GEMMA3},
    flash_attention="flash_attn_type",
    gone_with_flash_attention=main.TABLE.gone_with_flash_attention,
    dot=main.TABLE.dot,
)
