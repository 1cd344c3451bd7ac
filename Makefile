# demo: nestling reads a document and writes on   test: everything is tested   check: style, types, layers
# bench: the measured figures as JSON. The first use of each creates .venv and installs the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: demo test check bench clean

demo: .venv/installed
	@$(BIN)/roost demo

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(TESTFLAGS)

check: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/python -m pytest -q tests/test_layering.py

bench: .venv/installed-test
	@mkdir -p runs
	@for script in wkv generate tokenizer; do $(BIN)/python benchmarks/$$script.py --out runs/bench-$$script.json || exit 1; done

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .coverage*

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "roost needs Python >= 3.10: make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "python venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) . && touch $@

.venv/installed-%: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[$*]' && touch $@ .venv/installed
