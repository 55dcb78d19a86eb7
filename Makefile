# make study    install what is pinned into .venv and run the study of config.yaml
# make test     the same environment: style, lint, tests
#
# Variables: CORES=4 (default: all), STUDY=workflow/studies/smoke.yaml (default: config.yaml),
# FLAGS="--keep-going" (passed to snakemake), PYTHON=python3.12, VENV=/elsewhere/.venv

SHELL := /bin/sh
VENV ?= .venv
CORES ?= all
STUDY ?= config.yaml
FLAGS ?=

# The first Python of a version that the study runs on.
SUITABLE = 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c $(SUITABLE) 2>/dev/null && echo $$python && break; done)

BIN := $(VENV)/bin
SNAKEMAKE = $(BIN)/snakemake --cores $(CORES) --configfile "$(STUDY)" $(FLAGS)

.PHONY: study smoke plan status test style benchmark lock networks clean clean-results help

study: $(VENV)/.installed
	$(SNAKEMAKE)

smoke:
	$(MAKE) study STUDY=workflow/studies/smoke.yaml

plan status: $(VENV)/.installed
	$(BIN)/study $@ --config "$(STUDY)"

test: style
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

# After a change of the dependencies in pyproject.toml, in an environment that has the new ones.
lock:
	$(BIN)/python .ci/lock

$(BIN)/python:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c $(SUITABLE) 2>/dev/null; then \
		echo "make: Python 3.11, 3.12 or 3.13 is needed and was not found; install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml requirements.lock | $(BIN)/python
	@echo "Installing into $(VENV) (about 1.6 GB; some minutes the first time) ..."
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@

# The parts of the package against plain references, as ratios; about 25 minutes.
benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu.py --out benchmarks/results-cpu.csv

# After a change of a backbone: its networks in the shipped studies, for plans without counting.
networks: $(VENV)/.installed
	$(BIN)/python -c "import sys; from study.ledger.plan import count_all; count_all(sys.argv[1:])" \
		config.yaml workflow/studies/*.yaml

# Caches and the environment; nothing that was computed.
clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

clean-results:
	@printf 'Delete results/ and with it every trained run? Type yes: '; read answer; \
	if [ "$$answer" = yes ]; then rm -rf results .snakemake; else echo 'Nothing deleted.'; fi

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile
