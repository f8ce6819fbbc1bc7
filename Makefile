# `make demo` and `make test` need nothing but Python (3.11-3.13) and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers suit two cores; override with `make test WORKERS=8`.
WORKERS ?= 2
# Systems with an offline reproduction.
SYSTEMS := spectr rsd dyspec token_recycling aded bild \
  learn2pd ete window_diffusion llada21 enat mulo_sd \
  hat learn_your_tokens byte2word dynamic_tokenization zett lexinvariant \
  kangaroo m2r2 chimera lud skipdecode fspad ppd

.PHONY: help setup demo test unit lint format reproduce benchmark clean

help:
	@echo "make demo       set up, then train a small pair and decode with three methods (runs/quickstart)"
	@echo "make test       set up, then lint, type check and test"
	@echo "make reproduce  the slow reproductions recorded under docs/results"
	@echo "make benchmark  speed, side by side with Hugging Face generate"

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/quickstart

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests

test: lint unit

reproduce: $(STAMP)
	$(BIN)/python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/reproduce/quickstart --fresh
	for slug in $(SYSTEMS); do \
	  $(BIN)/python -m experiments.run --config=experiments/configs/$$slug.py:offline --workdir=runs/reproduce/$$slug --fresh || exit 1; \
	done
	for slug in kangaroo lud m2r2 ppd; do \
	  $(BIN)/python -m experiments.run --config=experiments/configs/$$slug.py:slots --workdir=runs/reproduce/$${slug}_slots --fresh || exit 1; \
	done
	$(BIN)/python -m experiments.benchmark --suite=trees --workdir=runs/reproduce/trees
	$(BIN)/python -m experiments.benchmark --suite=diffusion --workdir=runs/reproduce/diffusion
	$(BIN)/python -m experiments.benchmark --suite=tokens --workdir=runs/reproduce/tokens
	$(BIN)/python -m experiments.benchmark --suite=self_drafting --workdir=runs/reproduce/self_drafting
	$(BIN)/python -m experiments.benchmark --suite=baseline --workdir=runs/reproduce/benchmark

benchmark: $(STAMP)
	$(BIN)/python -m experiments.benchmark --suite=baseline --workdir=runs/benchmark

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
