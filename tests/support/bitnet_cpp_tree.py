"""A miniature checkout of bitnet.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# The layout of bitnet.cpp in miniature: the paths CMake goes through, the header only upstream's script makes,
# and the lost const that only gcc forgives.
FILES = {
    "CMakeLists.txt": """
        cmake_minimum_required(VERSION 3.14)
        project(standin C CXX)
        add_subdirectory(3rdparty/llama.cpp)
    """,
    "include/ggml-bitnet.h": "#define STANDIN 1\n",
    "src/ggml-bitnet-mad.cpp": """
        #include "ggml-bitnet.h"
        #include "bitnet-lut-kernels.h"
        extern "C" int dot(const void * vy) {
            const signed char * y = (const signed char *) vy;
            typedef signed char int8_t;
            int8_t * y_col = y + STANDIN;
            return y_col[0];
        }
    """,
    "3rdparty/llama.cpp/CMakeLists.txt": "add_subdirectory(ggml)\nadd_subdirectory(src)\n",
    "3rdparty/llama.cpp/ggml/CMakeLists.txt": "add_subdirectory(src)\n",
    "3rdparty/llama.cpp/ggml/src/CMakeLists.txt": """
        add_library(ggml SHARED ../../../../include/bitnet-lut-kernels.h ../../../../src/ggml-bitnet-mad.cpp)
        target_include_directories(ggml PUBLIC ../../../../include)
        target_compile_options(ggml PRIVATE ${GGML_TEST_OPTIONS})
    """,
    "3rdparty/llama.cpp/src/CMakeLists.txt": """
        add_library(llama SHARED llama.cpp)
        target_link_libraries(llama PUBLIC ggml)
    """,
    "3rdparty/llama.cpp/src/llama.cpp": 'extern "C" int llama(void) { return 7; }\n',
    "3rdparty/llama.cpp/include/llama.h": "void llama_kv_cache_clear(struct llama_context * ctx);\n",
    "3rdparty/llama.cpp/ggml/include/ggml.h": "enum ggml_type { GGML_TYPE_I2_S = 36 };\n",
}

MAIN = {
    **{name: text for name, text in FILES.items() if "ggml/src" not in name},
    "3rdparty/llama.cpp/CMakeLists.txt": """
        set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
        add_subdirectory(ggml)
        add_subdirectory(src)
        add_custom_target(tool ALL COMMAND no-such-program)
    """,
    "3rdparty/llama.cpp/ggml/CMakeLists.txt": """
        foreach(name ggml-base ggml-cpu ggml)
            add_library(${name} SHARED part.c)
            set_target_properties(${name} PROPERTIES VERSION 0.1.2 SOVERSION 0)
        endforeach()
    """,
    "3rdparty/llama.cpp/ggml/part.c": "int part(void) { return 3; }\n",
    "3rdparty/llama.cpp/src/CMakeLists.txt": """
        add_library(llama SHARED llama.cpp)
        target_link_libraries(llama PUBLIC ggml-base ggml-cpu ggml)
        set_target_properties(llama PROPERTIES VERSION 0.0.1 SOVERSION 0)
    """,
    "3rdparty/llama.cpp/include/llama.h": "void llama_memory_clear(llama_memory_t mem, bool data);\n",
}
"""The same of main since July 2026: other libraries in another folder, and a program that cannot be built."""


def write_tree(root: Path, prefix: str = "", files: Mapping[str, str] = FILES) -> Path:
    for name, text in files.items():
        if name.startswith(prefix):
            path = root / name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root
