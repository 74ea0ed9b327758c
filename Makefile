# make quickstart | test | test-all | lint | docs | clean
#
# On a Linux machine without a GPU outside a CPU-only package index, spare the CUDA download:
#   make quickstart PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS)
TORCH := $(shell head -n 1 constraints.txt)

.PHONY: quickstart test test-all lint docs clean

quickstart: $(VENV)/.installed
	$(BIN)/rectify run recipes/digits/flash_grpo.yaml

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-all: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	$(BIN)/python -m recipes.reference > docs/recipe-reference.md
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Rectify needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and the pinned set (a minute or two)"
	@# torch first and alone: any other package's wider range would fetch another build of it
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@
