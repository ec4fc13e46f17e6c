# `make demo` and `make test` need only make and Python >= 3.11: what else they need is
# installed into .venv, which .ci/venv creates, and replaces when it is out of date.
#
#   make demo ARGS="--help"        options for the example
#   make test ARGS="-k norm -x"    options for pytest
#   make test PYTHON=python3.13    the Python to create .venv with

PYTHON ?=
ARGS ?=
BIN := .venv/bin

export PYTHON

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

venv: ## create .venv, or replace it if it is out of date
	@sh .ci/venv

demo: venv ## train a small character model, with and without clipping
	$(BIN)/python examples/char_lm.py $(ARGS)

test: lint ## everything a change must pass: lint, types, tests, doctests, README, examples
	$(BIN)/python -m pytest -q -n auto --dist worksteal --durations=10 $(ARGS)

lint: venv ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## format the code and apply the safe fixes of the linter
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and built packages
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
