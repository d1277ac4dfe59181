# make demo    set everything up and let the built-in model answer questions about the shipped pictures
# make test    the tests                  make check   format, lint, types, layers, tests: what CI runs
# make fix     format and lint by machine make bench   speed against transformers, accuracy on drawn scenes
#
# PYTHON=python3.12 make demo takes another Python; VENV=folder another place for the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := src tests benchmarks ablations dev

.PHONY: demo test check fix bench clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	@$(BIN)/llava demo

test: $(VENV)/.installed-dev  # two processes of one thread each, a file in one of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py
	$(MAKE) test

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/speed.py
	$(BIN)/llava scenes score

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp is written only after the step before it has succeeded, so an interrupted set-up begins again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV) (once, some minutes; torch is large) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Adding what tests and checks need ..."
	@$(PIP) -e ".[dev]"
	@touch $@
