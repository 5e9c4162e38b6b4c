# Two commands for a newcomer: `make demo` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow lint types bench install docs clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.base

demo: $(VENV)/.base  ## base model -> cold start -> GRPO, minutes on two cores (PROCESSES=1 for one); writes runs/demo/report.html
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m posttrain demo --out runs/demo

test: $(VENV)/.dev lint types  ## linters, the strict type check and the test suite
	$(BIN)/python -m pytest -n $(PROCESSES)

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests examples benchmarks

types: $(VENV)/.dev
	$(BIN)/mypy

test-slow: $(VENV)/.dev  ## what takes longer: whole runs, kills at many moments
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.dev  ## against TRL on the same model, data and mathematics, in one run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/posttrain bench --json runs/bench.json

docs: $(VENV)/.base  ## the table of methods, from the code
	$(BIN)/python docs/tables.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
