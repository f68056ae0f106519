# Everything a newcomer needs. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONFIG ?= jobs/configs/kitchen/genarm.yaml
# One thread per process: Ray runs several of them, and two OpenMP pools on one core crawl.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart kitchen reproduce train test test-slow test-unit check format clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create .venv and install the project into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Pilotfish needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	test -e $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[ray,train,track,dev]'
	touch $@

quickstart: setup ## Train a guide on a miniature world, measure it, serve it (minutes, CPU)
	$(RUN) -m jobs.quickstart

kitchen: setup ## Train every guide and baseline of the miniature world; one table (16 min)
	$(RUN) -m jobs.kitchen

reproduce: setup ## Train, tune, measure: one page on four papers' claims (53 min)
	$(RUN) -m jobs.reproduce

train: setup ## Train from a config: make train CONFIG=jobs/configs/kitchen/genarm.yaml
	$(RUN) -m jobs.train $(CONFIG)

test: setup ## Run the test suite (starts local Ray clusters)
	$(RUN) -m pytest -m 'not cluster' -n logical --maxprocesses 8 --dist loadscope
	$(RUN) -m pytest -m 'cluster and not slow'

test-slow: setup ## Run what takes minutes: searches that are killed, populations, serving through HAProxy
	$(RUN) -m pytest -m slow
	RAY_SERVE_ENABLE_HA_PROXY=1 $(RUN) -m pytest tests/cluster/test_serve.py tests/cluster/test_serve_limits.py

test-unit: setup ## Run the tests that need no Ray cluster
	$(RUN) -m pytest -m 'not cluster and not gpu' -n logical --maxprocesses 8 --dist loadscope

check: setup ## Check formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

format: setup ## Format the code and fix what lint can fix
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## Remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache
