# For test builds (BITNET_TEST_BUILD=ON), included by the top-level CMakeLists.txt: the library with the AVX-512 and AMX
# families emulated in AVX2, and a program that exercises the library without Python. BITNET_TEST_OPTIONS are compiler and
# linker options that come last, e.g. sanitizers; tests/checked_library.py sets them.
set(BITNET_TEST_OPTIONS "" CACHE STRING "Compiler and linker options of a test build")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    set_source_files_properties(${src}/kernels_avx512vnni.c PROPERTIES COMPILE_OPTIONS
        "-mavx2;-mfma;-mf16c;-include;${CMAKE_CURRENT_LIST_DIR}/emulated_avx512.h")
    set_source_files_properties(${src}/kernels_amx.c PROPERTIES COMPILE_OPTIONS
        "-mavx2;-mfma;-mf16c;-include;${CMAKE_CURRENT_LIST_DIR}/emulated_amx.h")
endif()

get_target_property(sources bitnet_native SOURCES)
get_target_property(options bitnet_native COMPILE_OPTIONS)
get_target_property(definitions bitnet_native COMPILE_DEFINITIONS)
set(here ${CMAKE_CURRENT_LIST_DIR})
add_executable(checks EXCLUDE_FROM_ALL
    ${here}/checks.c ${here}/check_kernels.c ${here}/check_engines.c ${here}/support.c ${sources})
target_include_directories(checks PRIVATE ${src})
target_compile_options(checks PRIVATE ${options})
if(definitions)
    target_compile_definitions(checks PRIVATE ${definitions})
endif()
target_link_libraries(checks PRIVATE Threads::Threads m)

set(targets bitnet_native checks)
if(CMAKE_C_COMPILER_ID MATCHES "Clang") # libFuzzer is clang's
    add_executable(fuzz_engine EXCLUDE_FROM_ALL
        ${here}/fuzz_engine.c ${here}/check_engines.c ${here}/support.c ${sources})
    target_include_directories(fuzz_engine PRIVATE ${src})
    target_compile_options(fuzz_engine PRIVATE ${options} -fsanitize=fuzzer-no-link)
    if(definitions)
        target_compile_definitions(fuzz_engine PRIVATE ${definitions})
    endif()
    target_link_libraries(fuzz_engine PRIVATE Threads::Threads m)
    target_link_options(fuzz_engine PRIVATE -fsanitize=fuzzer)
    list(APPEND targets fuzz_engine)
endif()

foreach(target ${targets})
    target_compile_options(${target} PRIVATE ${BITNET_TEST_OPTIONS})
    target_link_options(${target} PRIVATE ${BITNET_TEST_OPTIONS})
endforeach()
