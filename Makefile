# `make repro` prepares and runs; with the environment active, plain `dvc repro` is the same run.
SHELL := /bin/bash
PYTHON ?= python3.11
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup data streets preset repro test e2e images lock lint format ui clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv from requirements.lock

# uv installs what the lock names, nothing else, and only files whose hashes are in it; the package itself is linked, so
# that edits are seen.
$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) has no venv module; on Debian: apt-get install python3.11-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

data: $(READY)  ## make sure that data/ is there: from the DVC remote, or else the synthetic streets
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "make: no git repository here, in which DVC keeps its record; install git, then: git init && git add --all && git commit --message start" >&2; exit 2; }
	@test -d data || $(BIN)/dvc pull --quiet data 2>/dev/null || $(MAKE) --no-print-directory streets

# data.dvc says which data set this is: the streets stand in only where it records them.
streets: $(READY)
	@mkdir -p .dvc/tmp && cp data.dvc .dvc/tmp/recorded.dvc
	@$(BIN)/python -m segdistill data synth --out data && $(BIN)/dvc commit --quiet --force data.dvc
	@cmp -s data.dvc .dvc/tmp/recorded.dvc || { \
	  cp .dvc/tmp/recorded.dvc data.dvc; rm -rf data; \
	  echo "make: data.dvc records another data set than the synthetic streets, and no DVC remote has it; bring it to data/" >&2; exit 2; }

preset: $(READY)
ifdef PRESET
	@$(BIN)/python -m segdistill init --preset $(PRESET)
endif

repro: data preset  ## run the pipeline: validate ... register (PRESET=name: with presets/name.yaml)
	@PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro

test: $(READY)  ## run the tests
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest

e2e: $(READY)  ## run the pipeline in containers, between real servers (root, or DOCKER_HOST)
	@tests/e2e/install
	@PATH="$(CURDIR)/$(BIN):$$PATH" pytest tests/e2e -n 0 --durations 30

images:  ## build the container images of what is committed
	@dockerfiles/build

lock: $(READY)  ## write requirements.lock anew from pyproject.toml, with what is in it kept where it fits
	@$(BIN)/uv pip compile --quiet --python-version 3.11 --all-extras --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --output-file requirements.lock pyproject.toml

lint: $(READY)  ## ruff, mypy, and who may import what
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(READY)  ## let ruff format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

ui: $(READY)  ## the MLflow UI on the embedded store, http://127.0.0.1:5000
	@$(BIN)/python -c "from pathlib import Path; from segdistill.adapters.mlflow_store import default_store; default_store(Path()).client()"
	@$(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" --host 127.0.0.1 --port 5000

clean:  ## remove what the pipeline made; data/ and the MLflow store stay
	rm -rf artifacts reports
