"""bitnet.cpp of March 2026, the pinned commit.

Sources: its llama.cpp's ``include/llama.h``, ``ggml/include/ggml.h``.
"""

from __future__ import annotations

from ctypes import c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p

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
        ("n_gpu_layers", c_int32, ANY),
        ("split_mode", c_int32, 1),
        ("main_gpu", c_int32, 0),
        ("tensor_split", c_void_p, None),
        ("rpc_servers", c_void_p, None),
        ("progress_callback", c_void_p, None),
        ("progress_callback_user_data", c_void_p, None),
        ("kv_overrides", c_void_p, None),
        ("vocab_only", c_bool, False),
        ("use_mmap", c_bool, True),
        ("use_mlock", c_bool, False),
        ("check_tensors", c_bool, False),
    ),
)
CONTEXT_PARAMS = Layout(
    "llama_context_params",
    (
        ("n_ctx", c_uint32, 512),
        ("n_batch", c_uint32, 2048),
        ("n_ubatch", c_uint32, 512),
        ("n_seq_max", c_uint32, 1),
        ("n_threads", c_int32, 4),
        ("n_threads_batch", c_int32, 4),
        ("rope_scaling_type", c_int32, -1),
        ("pooling_type", c_int32, -1),
        ("attention_type", c_int32, -1),
        ("rope_freq_base", c_float, 0.0),
        ("rope_freq_scale", c_float, 0.0),
        ("yarn_ext_factor", c_float, -1.0),
        ("yarn_attn_factor", c_float, 1.0),
        ("yarn_beta_fast", c_float, 32.0),
        ("yarn_beta_slow", c_float, 1.0),
        ("yarn_orig_ctx", c_uint32, 0),
        ("defrag_thold", c_float, -1.0),
        ("cb_eval", c_void_p, None),
        ("cb_eval_user_data", c_void_p, None),
        ("type_k", c_int32, TYPE_F16),
        ("type_v", c_int32, TYPE_F16),
        ("logits_all", c_bool, False),
        ("embeddings", c_bool, False),
        ("offload_kqv", c_bool, True),
        ("flash_attn", c_bool, False),
        ("no_perf", c_bool, True),
        ("abort_callback", c_void_p, None),
        ("abort_callback_data", c_void_p, None),
    ),
)
BATCH = layout(
    "llama_batch", *BATCH_FIELDS, ("all_pos_0", c_int32), ("all_pos_1", c_int32), ("all_seq_id", c_int32)
)
TENSOR = layout(
    "ggml_tensor",
    ("type", c_int32),
    ("backend", c_int32),
    ("buffer", c_void_p),
    ("ne", c_int64 * 4),
    ("nb", c_size_t * 4),
    ("op", c_int32),
    ("op_params", c_int32 * 16),
    ("flags", c_int32),
    ("grad", c_void_p),
    ("src", c_void_p * 10),
    ("view_src", c_void_p),
    ("view_offs", c_size_t),
    ("data", c_void_p),
    NAME_FIELD,
    ("extra", c_void_p),
)
TYPE_TRAITS = Layout(
    "ggml_type_traits",
    (
        ("type_name", c_char_p, b"f16"),
        ("blck_size", c_int64, 1),
        ("blck_size_interleave", c_int64, ANY),
        ("type_size", c_size_t, 2),
        ("is_quantized", c_bool, False),
        ("to_float", c_void_p, ANY),
        ("from_float", c_void_p, ANY),
        ("from_float_ref", c_void_p, ANY),
        ("from_float_to_mat", c_void_p, ANY),
        ("vec_dot", c_void_p, ANY),
        ("vec_dot_type", c_int32, TYPE_F16),
        ("nrows", c_int64, 1),
        ("ncols", c_int64, ANY),
        ("gemv", c_void_p, ANY),
        ("gemm", c_void_p, ANY),
    ),
)
FUNCTIONS = common_functions(MODEL_PARAMS, CONTEXT_PARAMS, BATCH) | {
    "apply_template": Function("llama_chat_apply_template", c_int32, (c_void_p, *TEMPLATE_ARGUMENTS)),
    "load_model": Function("llama_load_model_from_file", c_void_p, (c_char_p, MODEL_PARAMS.struct)),
    "new_context": Function("llama_new_context_with_model", c_void_p, (c_void_p, CONTEXT_PARAMS.struct)),
    "n_vocab": Function("llama_n_vocab", c_int32, (c_void_p,)),
    "n_ctx_train": Function("llama_n_ctx_train", c_int32, (c_void_p,)),
    "n_embd": Function("llama_n_embd", c_int32, (c_void_p,)),
    "n_layer": Function("llama_n_layer", c_int32, (c_void_p,)),
    "n_head": Function("llama_n_head", c_int32, (c_void_p,)),
    "model_tensor": Function("llama_get_model_tensor", c_void_p, (c_void_p, c_char_p)),
    "clear_memory": Function("llama_kv_cache_clear", None, (c_void_p,)),
}
BITNET: Nodes = {
    **BITNET_NODES,
    "inp_embd": (("inp_embd", None),),
    "kq_soft_max": (("kq_soft_max_ext", frozenset({"SOFT_MAX"})),),
    "attn_o_out": (("attn_o_out", None),),
    # The square comes after ReLU; ffn_silu is what a build with the wrong activation computes there.
    "ffn_act": (("ffn_relu", None), ("ffn_gelu", None), ("ffn_silu", None), ("ffn_sqr(relu)", None)),
    "ffn_out": (("ffn_out", None),),
}
"""``build_bitnet_158``, ``llm_build_ffn`` and ``llm_build_kqv`` of ``src/llama.cpp``."""
BITNET_SILU: Nodes = {**BITNET, "ffn_act": (("ffn_silu", None),), "ffn_out": (("ffn_sub_out", None),)}
"""``build_bitnet``, which the name ``bitnet`` means."""
LLAMA: Nodes = {
    **{tap: nodes for tap, nodes in BITNET_SILU.items() if tap not in ("attn_sub_norm", "ffn_sub_norm")},
    "kqv_out": (("kqv_merged_cont", None),),
    "attn_o_out": (("kqv_out", LINEAR),),
    "ffn_out": (("ffn_gate_par", None),),
    "ffn_down": (("ffn_out", LINEAR),),
}
"""``build_llama``: attention and feed-forward block multiply with their last matrix themselves, so that
``kqv_out`` and ``ffn_out`` are what comes after it."""

TABLE = Table(
    generation="march",
    engine="bitnet.cpp",
    title="bitnet.cpp of March 2026",
    functions=FUNCTIONS,
    model_params=MODEL_PARAMS,
    context_params=CONTEXT_PARAMS,
    batch=BATCH,
    tensor=TENSOR,
    types={36: b"i2_s"},
    graphs={"bitnet-b1.58": BITNET, "bitnet-25": BITNET, "bitnet": BITNET_SILU, "llama": LLAMA},
    template_takes_model=True,
    products_on_stack=True,
    dot=DotProduct("ggml_get_type_traits", TYPE_TRAITS),
    quantizer=Quantizer(ties="even", scale_of_zeros=127.0 / 1e-5),
)
