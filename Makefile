# CONTRIBUTING.md lists the targets. `make demo` and `make test` need only Python 3.11+, make and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# The oldest supported vLLM, the torch that it was built for, and an environment for both.
OLDEST_VLLM := 0.26.0
OLDEST_TORCH := torch==2.11.0
OLDEST_VENV := .venv-oldest
OLDEST_BIN := $(OLDEST_VENV)/bin

# The accessibility checks of the playground's tests, which no package brings.
AXE := axe-core@4.14.1

.PHONY: setup demo demo-full demo-tiny showcase test test-engine test-all test-slow playground-test test-oldest check-versions architectures compatibility benchmarks docs lint format model clean

## setup: build .venv with vLLM for CPU and all dependencies
setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)' || \
		$(BIN)/python -m pip install --quiet --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[cpu,offline,plots,docs,dev]'
	$(BIN)/python -m vllm_steer.vllm_compat.cpu_env
	touch $@

## demo: learn a direction of a real model, serve it, show plain, prefixed and steered answers
demo: setup
	$(BIN)/vllm-steer demo

## demo-full: the same with all directions learned; about an hour on two cores
demo-full: setup
	$(BIN)/vllm-steer demo --full

## demo-tiny: the same on the tests' model, which is part of the repository
demo-tiny: setup
	$(BIN)/vllm-steer demo --tiny

## showcase: write the demo's shipped pack from the directions of demo-full
showcase: demo-full
	$(BIN)/python -m vllm_steer.offline.showcase.release demo-output/packs/smollm2

# What make test starts of vLLM: an eager engine, a compiled one, one with Model Runner V2, and a server.
CORE := tests/engine/test_parity.py tests/server/test_http.py
# Two tests at a time, each with its engine on one thread.
WORKERS ?= 2
PARALLEL_PYTEST := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

## test: tests without an engine, and the core engine tests, against real vLLM
test: setup
	$(PARALLEL_PYTEST) -m 'not (slow or engine or server or browser)'
	$(PARALLEL_PYTEST) $(CORE) -m 'not slow'

## test-engine: all other engine and server tests that take minutes
test-engine: setup
	$(PARALLEL_PYTEST) $(addprefix --ignore=,$(CORE)) -m '(engine or server) and not slow'

## test-all: both
test-all: test test-engine

## test-slow: the long tests
test-slow: setup
	$(BIN)/python -m pytest -m slow

## playground-test: a person's way through the playground in a real browser; needs npm, chromium and chromium-driver
playground-test: setup
	$(BIN)/python -m pip install --quiet -e '.[browser]'
	npm install --silent --no-save --prefix $(VENV)/axe $(AXE)
	$(BIN)/python -m pytest -m browser tests/playground

## test-oldest: the unit, engine and server tests on the oldest supported vLLM
test-oldest: $(OLDEST_VENV)/ready
	$(OLDEST_BIN)/python -m pytest tests/unit tests/engine tests/server

# If no index has the CPU build of that torch, the larger CUDA build is used.
$(OLDEST_VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_BIN)/python -m pip install --quiet '$(OLDEST_TORCH)+cpu' || \
		$(OLDEST_BIN)/python -m pip install --quiet --extra-index-url $(TORCH_INDEX) '$(OLDEST_TORCH)+cpu' || \
		$(OLDEST_BIN)/python -m pip install --quiet '$(OLDEST_TORCH)'
	$(OLDEST_BIN)/python -m tests.oldest_env $(OLDEST_VLLM)
	$(OLDEST_BIN)/python -m pip install --quiet -e '.[offline,plots,docs,dev]'
	$(OLDEST_BIN)/python -m vllm_steer.vllm_compat.cpu_env
	touch $@

## check-versions: check that every supported vLLM has the patched symbols; downloads 1.6 GB, installs nothing
check-versions: setup
	$(BIN)/python -m tests.vllm_versions

## architectures: test every model family, eager and compiled, and write the documentation's table
architectures: setup
	rm -f tests/architectures/parity.json
	$(BIN)/python -m pytest -m 'slow or not slow' tests/architectures/test_parity.py --record-parity
	$(BIN)/python -m tests.architectures.table

## compatibility: test vLLM's features together with steering and write the documentation's table
compatibility: setup
	rm -f tests/compatibility.json
	$(BIN)/python -m pytest -m feature --record-features
	$(BIN)/python -m tests.compatibility

## benchmarks: speed and overhead, on an otherwise idle machine, and their tables; about an hour
benchmarks: setup
	$(BIN)/python -m benchmarks.overhead --json benchmarks/results/overhead.json
	$(BIN)/python -m benchmarks.throughput --starts 3 --json benchmarks/results/throughput-demo.json
	$(BIN)/python -m benchmarks.throughput --model 100m --requests 16 --tokens 0.5 --starts 6 --repetitions 4 --workloads decode-heavy --json benchmarks/results/throughput-100m.json
	$(BIN)/python -m benchmarks.serve --json benchmarks/results/serve.json
	$(BIN)/python -m benchmarks.serve --directions 512 --starts 3 --json benchmarks/results/serve-512.json
	$(BIN)/python -m benchmarks.tables

## docs: build the documentation into site/ and check every link and anchor
docs: setup
	$(BIN)/python -m vllm_steer.cli.reference_docs docs/reference
	$(BIN)/mkdocs build --strict

## lint: ruff and mypy
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format: format the code
format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## model: retrain the demo model
model: setup
	$(BIN)/python -m vllm_steer.offline.demo.train --out offline/demo/model

## clean: remove everything the targets made
clean:
	rm -rf $(VENV) $(OLDEST_VENV) build dist site *.egg-info demo-output
