# One way in per job. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test test-isa mutants crashes fuzz situations check lint types data-demo figures package clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# One stamp per set of extras; a changed setup.py, constraints.txt or kernel installs again.
$(VENV)/.installed-%: $(VENV)/.created setup.py constraints.txt $(wildcard FlagEmbedding/modeling/kernels/*.h FlagEmbedding/modeling/kernels/*.cpp)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

install: $(VENV)/.installed-demo,eval  ## create .venv and install the package with pinned versions

quickstart: $(VENV)/.installed-demo,eval  ## small real base model, CLP + MoE training, nDCG before and after (minutes, no GPU, no hub)
	PATH="$(abspath $(BIN)):$$PATH" bash examples/quickstart.sh

data-demo: $(VENV)/.installed-demo,eval,mining  ## from the sample's raw topics and corpus to a checked training file
	PATH="$(abspath $(BIN)):$$PATH" bash examples/data_demo.sh

test: $(VENV)/.installed-dev  ## run all tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-isa: $(VENV)/.installed-dev  ## run the numeric tests as processors with fewer instructions would (count table)
	OMP_NUM_THREADS=1 $(BIN)/python tests/isa $(ARGS)

mutants: $(VENV)/.installed-dev  ## plant the faults of tests/mutants/$(ROOM).yaml, see whether the tests notice (ROOM=all: hours)
	$(BIN)/python tests/mutants $(or $(ROOM),all) $(ARGS)

crashes: $(VENV)/.installed-dev  ## kill, stop and run out of disk at random moments: training, step 0, mining, query generation (an hour)
	$(BIN)/python tests/crashes $(ARGS)

fuzz: $(VENV)/.installed-dev  ## give every reader broken files for MINUTES (10) and see that it says so
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz $(or $(MINUTES),10)

situations: $(VENV)/.installed-dev  ## what comes of everything that can be wrong, anew: docs/robustness.md (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/situations

lint: $(VENV)/.installed-dev  ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## mypy --strict
	$(BIN)/mypy

check: lint types  ## lint, types and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

figures: $(VENV)/.installed-eval  ## draw the pictures in imgs/ again
	$(BIN)/python imgs/make_figures.py

package:  ## build wheel and sdist, install each in a fresh venv and try it
	PYTHON="$(PYTHON)" bash .ci/package

clean:  ## remove what quickstart and the tests left
	rm -rf quickstart build dist .pytest_cache .mypy_cache .ruff_cache
