# The targets are the whole of CONTRIBUTING.md. `make demo` and `make test` need Python 3.11+, make and pip alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo test test-slow architectures lint format model clean

## setup: build .venv with vLLM for CPU and everything that the project needs
setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)' || \
		$(BIN)/python -m pip install --quiet --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[cpu,offline,plots,dev]'
	$(BIN)/python -m vllm_steer.cpu_env
	touch $@

## demo: extract steering packs, serve the demo model, show steered beside unsteered answers
demo: setup
	$(BIN)/vllm-steer demo

## test: everything that runs in minutes, against real vLLM
test: setup
	$(BIN)/python -m pytest

## test-slow: the long tests
test-slow: setup
	$(BIN)/python -m pytest -m slow

## architectures: test every family, eager and compiled, and write the README's table
architectures: setup
	rm -f tests/architectures/parity.json
	$(BIN)/python -m pytest -m 'slow or not slow' tests/architectures/test_parity.py --record-parity
	$(BIN)/python -m tests.architectures.table

## lint: ruff and mypy
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format: rewrite the code in the house style
format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## model: train the demo model again
model: setup
	$(BIN)/python -m offline.demo.train --out offline/demo/model

## clean: remove what the targets made
clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
