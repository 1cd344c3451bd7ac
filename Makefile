# demo: nestling reads a document and writes on   test: everything is tested   check: style, types, layers
# bench: the measured figures as JSON   sanitize: the tests of the native library under ASan and UBSan
# test-amx: the paths for AMX, emulated   fuzz: the tokenizer (with clang) and files, FUZZ_SECONDS each
# The first use of each creates .venv and installs the versions in constraints.txt. With a C++ compiler that also builds
# the native library, anew whenever its sources change; without one roost works in plain torch (`roost info` says so).
# WERROR=ON: compiler warnings are errors.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard CMakeLists.txt src/native src/native/*)
SANITIZED := (native or tokenizer or packed or panels or fuzz) and not (bench or peers or chunked or reference)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(if $(WERROR),--config-settings=cmake.define.ROOST_WERROR=$(WERROR))

FUZZ_SECONDS ?= 60
CLANG ?= $(firstword $(foreach name,clang++ $(foreach version,21 20 19 18 17 16 15 14,clang++-$(version)),$(shell command -v $(name))))

.PHONY: demo test check bench sanitize test-amx fuzz clean

demo: .venv/installed
	@$(BIN)/roost demo

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(TESTFLAGS)

check: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/python -m pytest -q tests/test_layering.py

bench: .venv/installed-test
	@mkdir -p runs
	@for script in wkv wkv_native generate tokenizer; do $(BIN)/python benchmarks/$$script.py --out runs/bench-$$script.json || exit 1; done

# pip rather than cmake, because pip fetches cmake where there is none. Python's own leaks are not ours to find.
sanitize: .venv/installed-test
	rm -rf build/sanitized
	$(INSTALL) --no-deps --target build/sanitized --config-settings=build-dir=build/sanitize \
	  --config-settings=cmake.define.ROOST_WERROR=ON "--config-settings=cmake.define.ROOST_SANITIZE=address,undefined" .
	LD_PRELOAD="$$(for one in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$one.so; done | xargs)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -n 2 tests -k "$(SANITIZED)" -m "not slow" \
	  --native-library=build/sanitized/roost/_native.so $(TESTFLAGS)

# The paths for AMX on machines without it (but with AVX-512): a library that emulates the tile instructions.
test-amx: .venv/installed-test
	rm -rf build/amx
	$(INSTALL) --no-deps --target build/amx --config-settings=build-dir=build/emulate-amx \
	  --config-settings=cmake.define.ROOST_WERROR=ON --config-settings=cmake.define.ROOST_EMULATE_AMX=ON .
	$(BIN)/python -m pytest -n 2 -m "not slow" tests/models/test_native.py tests/models/test_native_amx.py \
	  --native-library=build/amx/roost/_native.so $(TESTFLAGS)

# Inputs that crash are kept: of the tokenizer under build/fuzz, of files as the seed that makes the file again.
fuzz: .venv/installed-test
	@mkdir -p build/fuzz/corpus
ifeq ($(CLANG),)
	@echo "the tokenizer is fuzzed with clang's libFuzzer, and there is no clang: on Debian and Ubuntu, apt install clang" >&2
else
	$(CLANG) -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Isrc/native \
	  tests/fuzz/tokenizer.cpp $(patsubst %,src/native/%.cpp,tokenizer trie isa pool) -pthread -o build/fuzz/tokenizer
	build/fuzz/tokenizer -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -len_control=0 -artifact_prefix=build/fuzz/ -print_final_stats=1 \
	  build/fuzz/corpus
endif
	$(BIN)/python tests/fuzz/files.py --seconds $(FUZZ_SECONDS)

clean:
	rm -rf .venv build .pytest_cache .ruff_cache .hypothesis .coverage*

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "roost needs Python >= 3.10: make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "python venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

.venv/installed: pyproject.toml constraints.txt $(NATIVE) | .venv/bin/python
	$(INSTALL) -e . && touch $@

.venv/installed-%: pyproject.toml constraints.txt $(NATIVE) | .venv/bin/python
	$(INSTALL) -e '.[$*]' && touch $@ .venv/installed
