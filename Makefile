# make run   install once, then launch topologies/local.yaml and write its report
# make test  install once, then the fast tests, then the slow ones
# make lint  install once, then format check, lint and types
# Every target may be repeated: what is up to date is not done again. PYTHON=... picks another interpreter (3.11 or later).

PYTHON  ?= python3.11
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
TOPOLOGY ?= topologies/local.yaml

.DEFAULT_GOAL := help
.PHONY: help install run test lint

help:
	@sed -n 's/^# //p' Makefile

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install it or pass PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "==> creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing requirements.lock into $(VENV) (one to three minutes, 1.4 GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

run: $(STAMP)
	@echo "==> launching $(TOPOLOGY); an unfinished run of it is resumed"
	@$(BIN)/afm-rl launch $(TOPOLOGY) --resume

test: $(STAMP)
	@echo "==> fast tests"
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile
	@echo "==> slow tests (they start Ray)"
	@JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow

lint: $(STAMP)
	@echo "==> format"
	@$(BIN)/ruff format --check .
	@echo "==> lint"
	@$(BIN)/ruff check .
	@echo "==> types"
	@$(BIN)/mypy
