# Every target works on a fresh clone: it makes .venv, installs what it needs once, and does its job.
# make demo PYTHON=python3.12 picks another interpreter; TORCH=... another torch; BENCH_OUT=... where
# `make bench` writes (git ignores outputs/).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PACKAGES := mmlm_efficient ray_serve eval
BENCH_OUT ?= outputs/flowcut_bench.json
CONSTRAINTS := constraints.txt
# Of `make test-with`: the release of transformers, and what to run on it (TESTS=tests: everything).
TRANSFORMERS ?=
TESTS ?= tests/test_contract_transformers.py tests/test_matrix.py
OTHER := build/transformers-$(TRANSFORMERS)
# Of `make test-install`.
INSTALL := build/install
# The oldest Python that pyproject.toml allows, such as 3.11.
OLDEST := $(shell sed -n 's/^requires-python = ">=\(.*\)"$$/\1/p' pyproject.toml)
NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST)".split("."))))' 2>/dev/null

# No target talks to a model hub: the tests and the demo use what the repository ships.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-with test-install lint format bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# torch goes first and by itself, so that nothing else decides which torch is installed.
$(VENV)/.torch:
	@test -x $(BIN)/python || $(PYTHON) $(NEW_ENOUGH) || { \
	  echo "Python $(OLDEST) or newer is needed; '$(PYTHON)' says: $$($(PYTHON) --version 2>&1 | tail -n 1)." \
	    "Give another: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@test ! -x $(BIN)/python || $(BIN)/python $(NEW_ENOUGH) || { \
	  echo "Python $(OLDEST) or newer is needed; $(VENV) says: $$($(BIN)/python --version 2>&1 | tail -n 1)." \
	    "Run: make clean; make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	@touch $@

# What the demo needs: the core and matplotlib.
$(VENV)/.core: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) -e ".[plots]"
	@touch $@

# What tests, linters and benchmarks need on top. lmms-eval comes without its dependencies: they
# would bring another torch; those that tasks need are in the extra lmms-eval.
$(VENV)/.dev: $(VENV)/.core
	$(PIP) install -c $(CONSTRAINTS) -e ".[dev]"
	$(PIP) install -c $(CONSTRAINTS) --no-deps lmms-eval
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

test-with: ## contract and matrix on another transformers: make test-with TRANSFORMERS=5.23.0
	@test -n "$(TRANSFORMERS)" || { echo "Which release? make test-with TRANSFORMERS=5.23.0" >&2; exit 1; }
	@mkdir -p $(OTHER)
	$(MAKE) VENV=$(OTHER) CONSTRAINTS=$(OTHER)/constraints.txt $(OTHER)/.dev
	$(OTHER)/bin/python -m pytest $(TESTS)

# Another transformers may need another tokenizers and huggingface_hub: these are left to pip.
build/transformers-%/constraints.txt: constraints.txt
	sed -E '/^(transformers|tokenizers|huggingface_hub)==/d' constraints.txt > $@
	echo 'transformers==$*' >> $@

# Everything anew, so that pip chooses what a user gets today. `python -P` from a folder elsewhere:
# the checkout cannot be imported by chance.
test-install: $(VENV)/.core ## the wheel in an empty venv, without constraints, answers as the checkout does
	rm -rf $(INSTALL)
	$(PIP) wheel --no-deps --wheel-dir $(INSTALL) .
	$(BIN)/python -m venv $(INSTALL)/venv
	$(INSTALL)/venv/bin/python -m pip --disable-pip-version-check --quiet install "$(TORCH)"
	$(INSTALL)/venv/bin/python -m pip --disable-pip-version-check --quiet install $(INSTALL)/*.whl
	$(BIN)/python -P tests/install/answers.py > $(INSTALL)/checkout.json
	cd / && $(CURDIR)/$(INSTALL)/venv/bin/python -P $(CURDIR)/tests/install/answers.py \
	  $(CURDIR)/$(INSTALL)/checkout.json

bench: $(VENV)/.dev ## FlowCut against the stock model: time and peak memory, JSON in outputs/
	$(BIN)/mmlm bench flowcut --out $(BENCH_OUT)

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
