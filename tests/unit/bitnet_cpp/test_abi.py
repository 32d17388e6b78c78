"""The generation of a library is found, and one that fits no table is detected before it can do harm.

Stand-ins are compiled from C: one per generation behaves like it as far as the checks look, the others differ from
it in one thing each.
"""

from __future__ import annotations

import ctypes
import re
from itertools import product
from pathlib import Path

import pytest

from crossval.bitnet_cpp import abi as llama_abi
from crossval.bitnet_cpp.runner import open_library
from crossval.errors import UnavailableError
from crossval.model.config import SpecConfig
from crossval.model.graphs import GRAPHS
from tests.support.c_compiler import compile_library, needs_compiler
from tests.support.extra import sampled

pytestmark = needs_compiler

SOURCE = r"""
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>

#ifdef MAINLINE
#define MAIN
#endif
#ifdef MAIN
struct model_params {
    void * devices, * overrides;
#ifdef MAINLINE
    int32_t n_gpu_layers, split_mode, load_mode, lazy_mode, main_gpu;
    void * pointers[4];
    bool vocab_only, check_tensors, extra, no_host, no_alloc, load_mtp;
#else
    int32_t n_gpu_layers, split_mode, main_gpu;
    void * pointers[4];
    bool vocab_only, use_mmap, direct, use_mlock, check_tensors, extra, no_host, no_alloc;
#endif
};
struct context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max;
#ifdef MAINLINE
    uint32_t n_outputs_max_per_seq;
#endif
    int32_t n_threads, n_threads_batch, kind, rope, pooling, attention, flash;
    float freq_base, freq_scale, ext, attn, fast, slow;
    uint32_t orig_ctx;
    float defrag;
    void * callback, * user_data;
    int32_t type_k, type_v;
    void * abort, * abort_data;
    bool embeddings, offload_kqv, no_perf, op_offload, swa_full, unified;
    void * samplers;
    size_t n_samplers;
    void * other;
};
#else
struct model_params {
    int32_t n_gpu_layers, split_mode, main_gpu;
    void * pointers[5];
    bool vocab_only, use_mmap, use_mlock, check_tensors;
};
struct context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max;
    int32_t n_threads, n_threads_batch, rope, pooling, attention;
    float freq_base, freq_scale, ext, attn, fast, slow;
    uint32_t orig_ctx;
    float defrag;
    void * callback, * user_data;
    int32_t type_k, type_v;
    bool logits_all, embeddings, offload_kqv, flash_attn, no_perf;
    void * abort, * abort_data;
};
#endif
struct tensor {
    int32_t type;
#ifndef MAIN
    int32_t backend;
#endif
    void * buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op, op_params[16], flags;
#ifndef MAIN
    struct tensor * grad;
#endif
    struct tensor * src[10], * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
#ifdef MAIN
    char padding[8];
#endif
};

struct model_params llama_model_default_params(void) {
    struct model_params p;
    memset(&p, 0, sizeof p);
    p.split_mode = 1;
#ifdef MAINLINE
    p.load_mode = -1; p.lazy_mode = 1;
#else
    p.use_mmap = true;
#endif
#ifdef MAIN
    p.n_gpu_layers = -1; p.extra = true;
#endif
    return p;
}
struct context_params llama_context_default_params(void) {
    struct context_params p;
    memset(&p, 0, sizeof p);
    p.n_ctx = 512; p.n_batch = 2048; p.n_ubatch = 512; p.n_seq_max = 1; p.n_threads = p.n_threads_batch = 4;
    p.rope = p.pooling = p.attention = -1;
    p.ext = -1; p.attn = 1; p.fast = 32; p.slow = 1; p.defrag = -1; p.type_k = p.type_v = 1;
    p.offload_kqv = p.no_perf = true;
#ifdef MAIN
#ifdef MAINLINE
    p.n_outputs_max_per_seq = 1;
#endif
    p.flash = -1; p.attn = p.fast = p.slow = -1; p.op_offload = p.swa_full = true;
#endif
    return p;
}
struct init { size_t size; void * buffer; bool no_alloc; };
static char pool[1 << 16];
static size_t used;
void * ggml_init(struct init p) { (void) p; used = 0; return pool; }
void ggml_free(void * c) { (void) c; }
static struct tensor * make(void) {
    struct tensor * t = (struct tensor *) (pool + used);
    used += sizeof *t;
    memset(t, 0, sizeof *t);
    return t;
}
struct tensor * ggml_new_tensor_4d(void * c, int32_t type, int64_t a, int64_t b, int64_t d, int64_t e) {
    struct tensor * t = make();
    (void) c;
    t->type = type;
    int64_t ne[4] = {a, b, d, e};
    memcpy(t->ne, ne, sizeof ne);
    t->nb[0] = 4;
    for (int i = 1; i < 4; i++) t->nb[i] = t->nb[i - 1] * t->ne[i - 1];
    t->data = pool + used;
    used += t->nb[3] * e;
    return t;
}
struct tensor * ggml_permute(void * c, struct tensor * a, int p0, int p1, int p2, int p3) {
    struct tensor * t = make();
    int p[4] = {p0, p1, p2, p3};
    (void) c;
    for (int i = 0; i < 4; i++) { t->ne[p[i]] = a->ne[i]; t->nb[p[i]] = a->nb[i]; }
    return t;
}
struct tensor * ggml_view_1d(void * c, struct tensor * a, int64_t n, size_t offset) {
    struct tensor * t = make();
    (void) c; (void) n;
    t->view_src = a; t->view_offs = offset; t->data = (char *) a->data + offset;
    return t;
}
struct tensor * ggml_sqr(void * c, struct tensor * a) {
    struct tensor * t = make();
    (void) c;
    t->op = 8; t->src[0] = a;
    return t;
}
struct tensor * ggml_set_name(struct tensor * t, const char * n) { snprintf(t->name, 64, "%s", n); return t; }
char * ggml_get_name(struct tensor * t) { return t->name; }
void * ggml_get_data(struct tensor * t) { return t->data; }
size_t ggml_nbytes(struct tensor * t) { return t->nb[3] * t->ne[3]; }
int64_t ggml_nelements(struct tensor * t) { return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]; }
const char * ggml_op_name(int32_t op) { return op == 8 ? "SQR" : "NONE"; }
#ifdef MAINLINE
const char * ggml_type_name(int32_t type) {
    return type == 34 ? "tq1_0" : type == 35 ? "tq2_0" : type == 42 ? "q2_0" : "other";
}
#else
const char * ggml_type_name(int32_t type) { return type == 36 ? "i2_s" : type == 42 ? "tl2" : "other"; }
#endif
size_t ggml_tensor_overhead(void) { return sizeof(struct tensor) + 32; }
const char * llama_print_system_info(void) { return "stand-in"; }
"""

CHANGES = {
    "a field more in the context": (
        "void * abort, * abort_data;\n",
        "void * abort, * abort_data, * more;\n",
        "llama_context_default_params writes {0}",
    ),
    "a field less in the model": ("* pointers[", "* pointers[-1 + ", "llama_model_default_params writes {1}"),
    "fields exchanged": (
        "float freq_base, freq_scale, ext, attn,",
        "float freq_base, attn, ext, freq_scale,",
        "default",
    ),
    "another default": ("p.n_ubatch = 512;", "p.n_ubatch = 256;", "n_ubatch is 256, expected 512"),
    "a larger tensor": ("char name[64];", "char name[128];", "struct ggml_tensor has"),
    "fields moved within a tensor": (
        "size_t view_offs;\n    void * data;",
        "void * data;\n    size_t view_offs;",
        "view_offs",
    ),
    "another type numbering": ('type == 36 ? "i2_s"', 'type == 35 ? "i2_s"', "ggml type 36 is b'other'"),
    "another operation numbering": ("op == 8", "op == 9", "tensor op is"),
    "a crash": ("{ (void) p; used = 0; return pool; }", "{ (void) p; abort(); }", "SIGABRT"),
}
SIZES = {"march": (128, 56), "main": (168, 64)}
"""Bytes of the changed structs of the context and the model."""
TABLES = {table.generation: table for table in llama_abi.TABLES}
BOTH = pytest.mark.parametrize("generation", SIZES)
EVERY = pytest.mark.parametrize("generation", TABLES)


def stand_in(folder: Path, source: str, generation: str, without: str = "") -> Path:
    """Compile the stand-in, with an empty function for everything else that its generation exports."""
    names = [function.name for function in TABLES[generation].functions.values() if function.name != without]
    rest = [name for name in names if not re.search(rf"\b{name}\(", source)]
    code = source + "\n".join(f"void * {name}(void) {{ return 0; }}" for name in rest)
    return compile_library(folder / "libllama.so", code, f"-D{generation.upper()}")


@EVERY
def test_the_generation_of_the_stand_in_is_found(tmp_path, generation):
    library = stand_in(tmp_path, SOURCE, generation)
    facts = open_library(library)
    assert facts["generation"] == generation
    assert list(facts["files"]) == [str(library)]
    assert facts["system_info"] == "stand-in"
    assert (facts["simd_width"], facts["binary16_sums"], facts["fused_quantizer"]) == (None, None, None)


@pytest.mark.parametrize(("change", "generation"), sampled(product(CHANGES, SIZES), 4, lambda case: case[:1]))
def test_a_library_that_differs_in_one_thing_is_unavailable(tmp_path, change, generation):
    old, new, complaint = CHANGES[change]
    assert old in SOURCE
    library = stand_in(tmp_path, SOURCE.replace(old, new), generation)
    with pytest.raises(UnavailableError, match=re.escape(complaint.format(*SIZES[generation]))) as caught:
        open_library(library)
    if change != "a crash":
        assert TABLES[generation].title in str(caught.value)


@BOTH
def test_the_structs_of_another_generation_behind_the_same_functions_are_detected(tmp_path, generation):
    """Both have a tensor of 336 bytes; defaults are looked at first, so give the other generation's."""
    other = {"march": "MAIN", "main": "MARCH"}[generation]
    library = stand_in(tmp_path, f"#undef {generation.upper()}\n#define {other}\n{SOURCE}", generation)
    with pytest.raises(UnavailableError, match="its data are others than those of"):
        open_library(library)


@EVERY
def test_a_missing_function_is_named_for_the_nearest_generation(tmp_path, generation):
    name = TABLES[generation].functions["clear_memory"].name
    library = stand_in(tmp_path, SOURCE, generation, without=name)
    complaint = rf"no known generation: (.*; )?for {re.escape(TABLES[generation].title)} it lacks {name}; for "
    with pytest.raises(UnavailableError, match=complaint):
        open_library(library)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("uint32_t n_outputs_max_per_seq;", "", "n_outputs_max_per_seq is 4, expected 1"),
        ("load_mode, lazy_mode, main_gpu;", "lazy_mode, load_mode, main_gpu;", "load_mode is 1, expected -1"),
        ('type == 35 ? "tq2_0"', 'type == 37 ? "tq2_0"', "ggml type 35 is b'other', expected b'tq2_0'"),
    ],
)
def test_another_version_of_mainline_is_refused_with_what_differs(tmp_path, old, new, complaint):
    assert old in SOURCE
    source = SOURCE.replace(old, new)
    source = source if new else source.replace("    p.n_outputs_max_per_seq = 1;\n", "")
    library = stand_in(tmp_path, source, "mainline")
    with pytest.raises(UnavailableError, match=re.escape(complaint)) as caught:
        open_library(library)
    assert TABLES["mainline"].title in str(caught.value)


def test_a_library_without_llama_is_no_libllama(tmp_path):
    library = compile_library(tmp_path / "libother.so", "int ggml_something(void) { return 1; }\n")
    with pytest.raises(UnavailableError, match="not a libllama: it exports none"):
        open_library(library)


def test_the_mirrored_structs_have_the_sizes_of_the_headers():
    sizes = {
        generation: [
            ctypes.sizeof(layout.struct)
            for layout in (table.model_params, table.context_params, table.batch, table.tensor)
        ]
        for generation, table in TABLES.items()
    }
    assert sizes == {"march": [64, 120, 72, 336], "main": [72, 160, 56, 336], "mainline": [80, 160, 56, 336]}


def test_roles_that_only_some_generations_have_are_listed():
    roles = [set(table.functions) for table in TABLES.values()]
    assert set.union(*roles) - set.intersection(*roles) == set(llama_abi.OPTIONAL_ROLES)


def test_every_graph_says_where_each_tap_is_or_that_it_is_nowhere():
    absent = {}
    for table in TABLES.values():
        for arch in table.graphs:
            config = SpecConfig(1, 1, 1, 2, 2, 2, 1, 1, rope_base=1.0, rms_eps=1.0, architecture=arch)
            expected = {op.name for op in GRAPHS[arch](config)} - {"result_output"}
            for flash in (False, True):
                nodes = table.nodes(arch, flash)
                assert set(nodes) == expected
                absent[table.generation, arch, flash] = {tap for tap, where in nodes.items() if not where}
    assert absent["march", "bitnet-b1.58", False] == set()
    assert absent["main", "bitnet-b1.58", False] == {"ffn_act"}
    assert absent["main", "bitnet-b1.58", True] == {"ffn_act", "kq", "kq_soft_max"}
