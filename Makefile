# Longhaul on a bare machine: Python 3.10 or later and make. Every target below makes the environment it needs.

PYTHON ?= python3
NPROC = 2
CONFIG = configs/quickstart.yaml
ARGS =

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VIEW := .typecheck/longhaul

# The ranks share the machine's cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup train test check verify clean

help:  ## show this text
	@echo 'make TARGET [ARGS="--key value"]'
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo 'PYTHON=$(PYTHON) makes the environment in $(VENV)/. Training takes NPROC=$(NPROC) and CONFIG=$(CONFIG).'

setup: $(STAMP)  ## make the environment: once, and again when the requirements change

# torch comes first and by itself, so that nothing else can choose its build.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: Longhaul needs Python 3.10 or later: make PYTHON=python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

train: $(STAMP)  ## train on the Python files of this machine with 2 processes, and report
	$(BIN)/torchrun --standalone --nproc-per-node=$(NPROC) launcher/train.py --config $(CONFIG) $(ARGS)

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP)  ## lint and type-check
	$(BIN)/ruff check
	@mkdir -p $(VIEW)
	@for root in models parallel launcher configs; do ln -sfn ../../$$root $(VIEW)/$$root; done
	$(BIN)/mypy

verify: $(STAMP)  ## run every cell of the correctness matrix, and every topology
	$(BIN)/longhaul verify --all $(ARGS)
	$(BIN)/longhaul verify --topologies --all

clean:  ## remove caches and builds; the environment and the runs stay
	rm -rf build dist longhaul.egg-info .typecheck .mypy_cache .pytest_cache .ruff_cache
	find models parallel launcher configs tests -name __pycache__ -type d -exec rm -rf {} +
