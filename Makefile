# `make help` lists the targets. Every target first runs `make setup`, which takes seconds when
# the environment is there. PYTHON and VENV choose the interpreter and the environment:
#     make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet install
STAMP := $(VENV)/.ringattn-setup
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup train extend test test-all fuzz soak lint format bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP)  ## create the environment, or bring it up to date
	@:

train: setup  ## train configs/demo.yaml: a small language model, its sequence over two ranks
	$(VENV)/bin/ringattn train configs/demo.yaml $(ARGS)

extend: setup  ## train a small model at 2K tokens, extend it to 16K, and draw what it retrieves
	$(PY) docs/examples/extend_context/extend_context.py $(ARGS)

test: setup  ## the tests that every change has to pass (under 20 minutes on 2 cores)
	$(PY) -m pytest $(ARGS)

test-all: setup  ## the whole grid, resumable; the summary goes to tests/results
	$(PY) -m pytest --full $(ARGS)

fuzz: setup  ## attention on random cases, such as ARGS="--cases 2000 --seed 20260101"; for every night
	$(PY) -m tests.fuzz $(ARGS)

soak: setup  ## 20 minutes of training with kills: memory, file handles and threads must stay flat
	$(PY) -m ringattn.benchmarks.soak $(ARGS)

lint: setup  ## check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(PY)

format: setup  ## format, and fix what can be fixed without a person
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: setup  ## every benchmark once, small: each case a figure, a refusal or an error
	$(VENV)/bin/ringattn bench all --smoke $(ARGS)

clean:  ## remove caches and builds (keeps the environment and the runs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch first and exactly: a looser request would pull gigabytes of CUDA onto a CPU machine.
$(STAMP): pyproject.toml constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || { $(call check_python) && $(call make_venv); }
	@echo "installing into $(VENV) (a minute or a few, the first time)"
	@$(PIP) -c constraints.txt $(TORCH) setuptools
	@DS_BUILD_OPS=0 $(PIP) -c constraints.txt --no-build-isolation -e '.[test,dev,triton]'
	@touch $@

define check_python
{ $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
{ echo "ringattn needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 \
| tail -n 1); name another one: make setup PYTHON=python3.12" >&2; exit 1; }; }
endef

define make_venv
{ $(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed: install the venv module \
(python3-venv on Debian and Ubuntu) and run make setup again" >&2; exit 1; }; }
endef
