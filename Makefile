# Every target works on a fresh clone: it makes .venv, installs what it needs once, and does its job.
# PYTHON=python3.12 make ... picks another interpreter; TORCH=... another torch; BENCH_OUT=... where
# `make bench` writes (git ignores outputs/).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PACKAGES := mmlm_efficient ray_serve eval
BENCH_OUT ?= outputs/flowcut_bench.json

# No target talks to a model hub: the tests and the demo use what the repository ships.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch goes first and by itself, so that nothing else decides which torch is installed.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	@touch $@

# What the demo needs: the core and matplotlib.
$(VENV)/.core: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[plots]"
	@touch $@

# What tests, linters and benchmarks need on top.
$(VENV)/.dev: $(VENV)/.core
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.core ## the pocket model answers with and without pruning, and draws what it kept
	$(BIN)/mmlm demo

lint: $(VENV)/.dev ## ruff (check and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(addprefix -p ,$(PACKAGES))

format: $(VENV)/.dev ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## lint, types and every test
	$(BIN)/python -m pytest

test-fast: $(VENV)/.dev ## the tests that take under 90 seconds together
	$(BIN)/python -m pytest -m "not slow"

bench: $(VENV)/.dev ## FlowCut against the stock model: time and peak memory, JSON in outputs/
	$(BIN)/mmlm bench flowcut --out $(BENCH_OUT)

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
