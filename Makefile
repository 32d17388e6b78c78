# Every target sets itself up: a virtual environment in .venv with the package (C library included) and its tools.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard bitnet_py/csrc/*)
# An editable installation lists the modules it found: it is renewed when folders are added or removed.
SOURCES += $(shell find bitnet_py crossval -type d -not -name __pycache__)
INSTALLED := $(VENV)/.installed
FUZZER := $(VENV)/.fuzzer
SECONDS ?= 60
TARGET ?= all
DEMO_RECEIPT := build/demo-receipt.json

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint types site fetch-cpp record bench bench-kernels sanitize tsan valgrind fuzz clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

# --no-compile: Python compiles the modules that are used, when they are first imported.
$(INSTALLED): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## Compare our engine with bitnet.cpp on the shipped model, layer by layer
	@mkdir -p build
	$(BIN)/crossval layers --prompt "What is 2+2?" --receipt $(DEMO_RECEIPT)
	$(BIN)/crossval gate $(DEMO_RECEIPT)

test: $(INSTALLED)  ## Run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(INSTALLED)  ## Run the tests in every case, where `test` takes a sample
	$(BIN)/python -m pytest -n auto --dist worksteal -m ""

lint: $(INSTALLED)  ## Check style of Python and C
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror bitnet_py/csrc/*.[ch] tests/csrc/*.[ch] examples/*.[ch]

types: $(INSTALLED)  ## Check types
	$(BIN)/mypy

site: $(INSTALLED)  ## Build the documentation as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fetch-cpp: $(INSTALLED)  ## Build bitnet.cpp: downloaded (BITNET_CPP_GENERATION=march or main), or the source in BITNET_CPP_DIR
	$(BIN)/python -m crossval.bitnet_cpp.build

record: $(INSTALLED)  ## Re-record the goldens of the shipped model from live bitnet.cpp
	$(BIN)/python -m crossval.cli.goldens

bench: $(INSTALLED)  ## Benchmark our engine and live bitnet.cpp, interleaved
	$(BIN)/crossval bench

bench-kernels: $(INSTALLED)  ## Benchmark every kernel, instruction sets side by side
	$(BIN)/python -m pytest tools/bench --benchmark-only --benchmark-max-time=0.3 --benchmark-columns=min,median,iqr,rounds

sanitize: $(INSTALLED)  ## Check the C library with AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m tests.support.checked_library sanitize

tsan: $(INSTALLED)  ## Check the C library's threads with ThreadSanitizer
	$(BIN)/python -m tests.support.checked_library tsan

valgrind: $(INSTALLED)  ## Check the C library with valgrind: nothing uninitialised is read
	$(BIN)/python -m tests.support.checked_library valgrind

$(FUZZER): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[fuzz]"
	@touch $@

fuzz: $(FUZZER)  ## Search for input that breaks a reader, for SECONDS (60) in all TARGETs or one
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --target $(TARGET)

clean:  ## Remove everything built or installed here
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
