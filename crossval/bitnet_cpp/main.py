"""bitnet.cpp's main since July 2026, in four libraries.

Sources: its llama.cpp's ``include/llama.h``, ``ggml/include/ggml.h``, ``ggml/include/ggml-cpu.h``.
"""

from __future__ import annotations

from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p

from crossval.bitnet_cpp.table import (
    ANY,
    BATCH_FIELDS,
    BITNET_NODES,
    LINEAR,
    NAME_FIELD,
    TEMPLATE_ARGUMENTS,
    TYPE_F16,
    DotProduct,
    Function,
    Layout,
    Nodes,
    Quantizer,
    Table,
    common_functions,
    layout,
)

MODEL_PARAMS = Layout(
    "llama_model_params",
    (
        ("devices", c_void_p, None),
        ("tensor_buft_overrides", c_void_p, None),
        ("n_gpu_layers", c_int32, -1),
        ("split_mode", c_int32, 1),
        ("main_gpu", c_int32, 0),
        ("tensor_split", c_void_p, None),
        ("progress_callback", c_void_p, None),
        ("progress_callback_user_data", c_void_p, None),
        ("kv_overrides", c_void_p, None),
        ("vocab_only", c_bool, False),
        ("use_mmap", c_bool, True),
        ("use_direct_io", c_bool, False),
        ("use_mlock", c_bool, False),
        ("check_tensors", c_bool, False),
        ("use_extra_bufts", c_bool, True),
        ("no_host", c_bool, False),
        ("no_alloc", c_bool, False),
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
BATCH = layout("llama_batch", *BATCH_FIELDS)
TENSOR = layout(
    "ggml_tensor",
    ("type", c_int32),
    ("buffer", c_void_p),
    ("ne", c_int64 * 4),
    ("nb", c_size_t * 4),
    ("op", c_int32),
    ("op_params", c_int32 * 16),
    ("flags", c_int32),
    ("src", c_void_p * 10),
    ("view_src", c_void_p),
    ("view_offs", c_size_t),
    ("data", c_void_p),
    NAME_FIELD,
    ("extra", c_void_p),
    ("padding", c_char * 8),
)
TYPE_TRAITS = Layout(
    "ggml_type_traits_cpu",
    (
        ("from_float", c_void_p, ANY),
        ("vec_dot", c_void_p, ANY),
        ("vec_dot_type", c_int32, TYPE_F16),
        ("nrows", c_int64, 1),
    ),
)


def functions(model_params: Layout, context_params: Layout) -> dict[str, Function]:
    """Return the functions by role, as mainline has them, too, with parameters of its own."""
    return common_functions(model_params, context_params, BATCH) | {
        "apply_template": Function("llama_chat_apply_template", c_int32, TEMPLATE_ARGUMENTS),
        "load_model": Function("llama_model_load_from_file", c_void_p, (c_char_p, model_params.struct)),
        "new_context": Function("llama_init_from_model", c_void_p, (c_void_p, context_params.struct)),
        "vocab": Function("llama_model_get_vocab", c_void_p, (c_void_p,)),
        "n_vocab": Function("llama_vocab_n_tokens", c_int32, (c_void_p,)),
        "n_ctx_train": Function("llama_model_n_ctx_train", c_int32, (c_void_p,)),
        "n_embd": Function("llama_model_n_embd", c_int32, (c_void_p,)),
        "n_layer": Function("llama_model_n_layer", c_int32, (c_void_p,)),
        "n_head": Function("llama_model_n_head", c_int32, (c_void_p,)),
        "memory": Function("llama_get_memory", c_void_p, (c_void_p,)),
        "pooling_type": Function("llama_pooling_type", c_int32, (c_void_p,)),
        "pooled": Function("llama_get_embeddings_seq", POINTER(c_float), (c_void_p, c_int32)),
        "clear_memory": Function("llama_memory_clear", None, (c_void_p, c_bool), constants=(True,)),
    }


BITNET: Nodes = {
    **BITNET_NODES,
    "inp_embd": (("embd", frozenset({"GET_ROWS"})),),
    "kq_soft_max": (("kq_soft_max", frozenset({"SOFT_MAX"})),),
    "attn_o_out": (("attn_out", None),),
    "ffn_act": (),
    "ffn_out": (("ffn_sub_out", None),),
}
"""``src/models/bitnet.cpp`` and ``src/llama-graph.cpp``. SiLU and product are one operation, and with flash
attention so are scores, softmax and weighted sum."""
LLAMA: Nodes = {
    **{tap: nodes for tap, nodes in BITNET.items() if tap not in ("attn_sub_norm", "ffn_sub_norm")},
    "ffn_out": (("ffn_swiglu", None),),
    "ffn_down": (("ffn_out", LINEAR),),
}
"""``src/models/llama.cpp``: ``kqv_out`` is still the merged heads, ``ffn_out`` the down projection."""
QWEN3: Nodes = {
    **LLAMA,
    "attn_q_norm_in": (("attn_q_norm_in", None),),
    "attn_k_norm_in": (("attn_k_norm_in", None),),
    "attn_v_norm_in": (("attn_v_norm_in", None),),
    "q": (("Qcur_raw", None),),
    "k": (("Kcur_raw", None),),
    "v": (("Vcur_raw", None),),
    "q_norm": (("Qcur_normed", None),),
    "k_norm": (("Kcur_normed", None),),
    "attn_sub_norm": (("attn_out_norm_in", None),),
    "attn_o_out": (("attn_o_out", None),),
    "ffn_gate_norm_in": (("ffn_gate_norm_in", None),),
    "ffn_up_norm_in": (("ffn_up_norm_in", None),),
    "ffn_act": (("ffn_silu", None),),
    "ffn_out": (("ffn_gate_up", None),),
    "ffn_sub_norm": (("ffn_down_norm_in", None),),
    "ffn_down": (("ffn_down", None),),
}
"""``src/models/qwen3.cpp``: SiLU and product are two operations, where the matrices have norms before them."""
INPUT_NORMS = frozenset(tap for tap in QWEN3 if tap.endswith(("norm_in", "sub_norm")))
PLAIN_QWEN3: Nodes = {
    **{tap: nodes for tap, nodes in QWEN3.items() if tap not in INPUT_NORMS},
    "attn_o_out": (),
    **{tap: LLAMA[tap] for tap in ("ffn_act", "ffn_out", "ffn_down")},
}
"""The same without these norms: the projection of the merged heads has no name."""
GEMMA3: Nodes = {
    **QWEN3,
    "inp_scaled": (("inp_scaled", None),),
    **{tap: LLAMA[tap] for tap in ("q", "k", "v", "ffn_down")},
    "q_scaled": (),
    "attn_post_norm": (("attn_post_norm", None),),
    "ffn_inp": (("sa_out", None),),
    "ffn_act": (("ffn_gate_gelu", None),),
    "ffn_post_norm": (("ffn_post_norm", None),),
}
"""``src/models/gemma3.cpp``: the scaled queries have no name."""
PLAIN_GEMMA3: Nodes = {
    **{tap: nodes for tap, nodes in GEMMA3.items() if tap not in INPUT_NORMS},
    "attn_o_out": (),
}

TABLE = Table(
    generation="main",
    engine="bitnet.cpp",
    title="bitnet.cpp main since July 2026",
    functions=functions(MODEL_PARAMS, CONTEXT_PARAMS),
    model_params=MODEL_PARAMS,
    context_params=CONTEXT_PARAMS,
    batch=BATCH,
    tensor=TENSOR,
    types={36: b"i2_s", 42: b"tl2"},
    graphs={"bitnet-b1.58": BITNET, "bitnet": BITNET, "llama": LLAMA, "qwen3": QWEN3, "gemma3": GEMMA3},
    plain_graphs={"qwen3": PLAIN_QWEN3, "gemma3": PLAIN_GEMMA3},
    flash_attention="flash_attn_type",
    gone_with_flash_attention=frozenset({"kq", "kq_soft_max"}),
    dot=DotProduct("ggml_get_type_traits_cpu", TYPE_TRAITS, prepare="ggml_cpu_init"),
    quantizer=Quantizer(ties="away", scale_of_zeros=0.0),
)
