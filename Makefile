# Everything a developer runs.  On a machine with nothing but Python 3.12 or newer, each target
# first makes the virtual environment that it needs.

PYTHON ?= python3
# Processes that run tests side by side; auto is one per core.
WORKERS ?= auto
# More arguments for the program a target runs: make test ARGS="-k depthwise -x"
ARGS ?=

# Tests start some two hundred processes: with none of what they import compiled before, it takes
# each of them 7 s to import jax and flax, and 2 with it.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
BIN_AOT := .venv-aot/bin
BIN_OLDEST := .venv-oldest/bin
BIN_TRITON := .venv-triton-oldest/bin

# The oldest releases that setup.py allows, exactly: "jax==... flax==...".
OLDEST := $(shell sed -n 's/.*install_requires=\[\(.*\)\].*/\1/p' setup.py | tr -d '",' | sed 's/>=/==/g')

# And the oldest Triton, with a numpy that its interpreter knows, and what runs on it.
OLDEST_TRITON := "jax[cuda13-local]$(patsubst jax%,%,$(firstword $(OLDEST)))" triton==3.6.0 "numpy<2.4"
OF_TRITON := $(addprefix tests/,test_added_kernels.py test_aot_triton.py test_triton_choices.py test_triton_interpreter.py tuning)

.PHONY: help demo test test-aot test-oldest test-triton-oldest lint format bench
.PHONY: venv venv-aot venv-oldest venv-triton-oldest clean

help: ## list the targets (the default)
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: venv ## train a TCN, check it against stock nnx.Conv, time a dozen layers
	$(BIN)/python -m conv_pallas demo $(ARGS)

test: venv ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-aot: venv-aot ## compile for GPUs and TPUs that are not here, and read the result
	$(BIN_AOT)/python -m pytest -n $(WORKERS) --dist worksteal -m aot $(ARGS)

test-oldest: venv-oldest ## run the tests with the oldest jax and flax that setup.py allows
	$(BIN_OLDEST)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-triton-oldest: venv-triton-oldest ## test the Triton kernels with the oldest triton and jax
	$(BIN_TRITON)/python -m pytest -n $(WORKERS) --dist worksteal -m aot $(OF_TRITON) $(ARGS)

lint: venv ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv ## measure layers on this machine; make bench ARGS=--quick takes minutes less
	$(BIN)/python -m benchmarks $(ARGS)

venv: .venv/installed ## make .venv, for everything but test-aot
venv-aot: .venv-aot/installed ## make .venv-aot, which adds libtpu, the CUDA plugin and triton
venv-oldest: .venv-oldest/installed ## make .venv-oldest
venv-triton-oldest: .venv-triton-oldest/installed ## make .venv-triton-oldest

clean: ## remove all that these targets made, environments too
	rm -rf .venv .venv-aot .venv-oldest .venv-triton-oldest demo-output examples-output bench-output build dist *.egg-info
	rm -rf .benchmarks .cache .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: EXTRAS := demo,bench,test
.venv-aot/installed: EXTRAS := test,aot
.venv-oldest/installed: EXTRAS := demo,bench,test
.venv-oldest/installed: PINS := $(OLDEST)
.venv-triton-oldest/installed: EXTRAS := test
.venv-triton-oldest/installed: PINS := $(OLDEST) $(OLDEST_TRITON)
# It asks for triton 3.7, and works with 3.6: see kernels/triton_compat.py.
.venv-triton-oldest/installed: REGARDLESS := jax-triton==0.4.1

# setup.py holds every dependency.  An environment is made anew rather than updated, so that it
# is the one a fresh machine gets.  The stamp is written last, and --clear removes an old one:
# after a failed or interrupted install there is none.  Python compiles what it imports; to have pip
# compile all that is there makes 42 s of 24 s.
.venv/installed .venv-aot/installed .venv-oldest/installed .venv-triton-oldest/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	  echo "conv_pallas needs Python 3.12 or newer; $(PYTHON) is not. Name one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@echo "Installing into $(@D), once: this takes a minute or two."
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -q --no-compile --disable-pip-version-check -e '.[$(EXTRAS)]' $(PINS)
	@$(if $(REGARDLESS),$(@D)/bin/python -m pip install -q --no-deps --disable-pip-version-check $(REGARDLESS))
	@touch $@
