# Needs Python 3.11 or later and nothing else; everything goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-quick test-slow soak lint types format docs bench clean

demo: $(VENV)/installed  ## the quickstart: trains, merges, prints tables, plots
	$(BIN)/python -m experiments.sweep \
		--sweep=configs/sweeps/quickstart.py --workdir=runs/quickstart

# Processes share the tests by files.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile \
	--no-loadscope-reorder

test: $(VENV)/installed-dev  ## the tests, without those that take minutes
	$(PYTEST)

# The rules of the house, the algebra of permutations, the assignment, graphs, mixing,
# the ledger, the checks of configs, and one small run from end to end.
QUICK := tests/test_layering.py tests/test_repository.py tests/test_tree.py \
	tests/permutation/test_spec.py tests/permutation/test_actions.py \
	tests/permutation/test_units.py tests/matching/test_assignment.py \
	tests/test_topology.py tests/test_mixing.py tests/test_network.py \
	tests/test_ledger.py tests/test_config.py \
	tests/test_train.py::test_a_run_writes_a_row_for_every_evaluation

test-quick: $(VENV)/installed-dev  ## what is worth a run after every edit
	$(BIN)/python -m pytest -n auto --maxprocesses=2 --dist=loadfile $(QUICK)

test-slow: $(VENV)/installed-dev  ## the tests and the cases that `test` leaves out
	$(PYTEST) -m slow

soak: $(VENV)/installed  ## random runs are killed and damaged; it goes on for an hour
	$(BIN)/python -m experiments.soak --out=runs/soak

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs  ## the site, in build/site; dead links are errors
	$(BIN)/python -m docs.build

bench: $(VENV)/installed
	$(BIN)/python -m experiments.bench merge --out=runs/bench-merge.json

clean:
	rm -rf $(VENV) build runs/quickstart

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, found " \
		+ sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@ $(VENV)/installed
