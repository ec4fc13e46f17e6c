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
.PHONY: help venv demo test suite proof matrix fuzz mutants bench docs lint format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

venv: ## create .venv, or replace it if it is out of date
	@sh .ci/venv

demo: venv ## train a small character model, with and without clipping
	$(BIN)/python examples/char_lm.py $(ARGS)

test: lint ## everything a change must pass, on the oldest Python and, if there is one, on 3.13
	@$(MAKE) --no-print-directory suite
ifeq ($(PYTHON),)
	@newest=$$(sh .ci/newest); if [ -n "$$newest" ]; then \
	  PYTHON=$$newest sh .ci/venv .venv-newest && \
	  $(MAKE) --no-print-directory suite BIN=.venv-newest/bin SHARE=-8; \
	else echo "No Python 3.13 found: the newest JAX is not tested here."; fi
endif

# The tests pretend to have eight devices. With one, leaves are laid together and metrics are taken
# in one read, so what this concerns is tested once more; and again written as for a GPU.
ONE_DEVICE := --xla_force_host_platform_device_count=1

# Of a parametrized test one cell in four is run here, and on the newest Python one in eight, from
# the other end; `make proof` runs those that this leaves, see tests/conftest.py.
SHARE := 4
proof suite: export OPTAXCLIP_SHARE = $(SHARE)

# Not `python -m pytest`, which would put the checkout before the wheel.
TESTS = OPTAXCLIP_TESTED=wheel $(BIN)/pytest -q -n auto --dist worksteal
define with_one_device
	XLA_FLAGS=$(ONE_DEVICE) $(TESTS) $(1) tests/test_bundles.py tests/test_pieces.py \
	  tests/test_clip.py tests/test_measure.py tests/test_record.py tests/test_cotangent.py \
	  tests/test_observe.py
	XLA_FLAGS=$(ONE_DEVICE) OPTAXCLIP_PRETEND_GPU=1 $(TESTS) $(1) tests/test_clip.py \
	  tests/test_measure.py tests/test_record.py tests/test_pieces.py
endef

suite:
	@$(BIN)/python -c "import jax, sys; print('Python', sys.version.split()[0], 'jax', jax.__version__)"
	$(TESTS) --durations=10 --pyargs optaxclip tests/ $(ARGS)
	$(call with_one_device)

proof: venv ## the long proofs, and the cells that `make test` leaves out (three hours)
	$(TESTS) -m "proof or rest" --durations=20 tests/ $(ARGS)
	$(call with_one_device,-m rest)

matrix: venv ## the table of checks and variants, into out/compatibility.md (20 minutes)
	$(BIN)/python tests/matrix.py $(ARGS)

fuzz: venv ## try the laws on fresh trees for ten minutes, and count
	$(BIN)/python tests/fuzz.py --minutes 10 --workers 2 $(ARGS)

mutants: venv ## break the package on purpose, one fault after the other: tests must notice
	$(BIN)/python tests/mutants.py $(ARGS)

bench: venv ## time every drop-in beside Optax's own, into the results of this machine (20 minutes)
	$(BIN)/python benchmarks/overhead.py --save $(ARGS)

docs: venv ## the API reference, out of the docstrings, into out/docs
	$(BIN)/python docs/build.py $(ARGS)

lint: venv ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## format the code and apply the safe fixes of the linter
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and built packages
	rm -rf .venv .venv-newest .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
