# The commands of the project; each makes .venv and installs what it needs when absent.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
TYPECHECK := build/typecheck/tcpa

.PHONY: demo test lint gpu clean
.DEFAULT_GOAL := test

$(STAMP): setup.py pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "tcpa needs Python 3.11 or newer; pass PYTHON=python3.x"'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(PY) -m tcpa.train demo

test: $(STAMP)
	# Two workers on one thread each (tests/conftest.py): the suite is mostly single-threaded.
	$(PY) -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	# The type checker cannot follow the package mapping of setup.py; give it a folder of links.
	rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)
	ln -s $(CURDIR)/tcpa/*.py $(TYPECHECK)/
	ln -s $(CURDIR)/kernels $(CURDIR)/train $(CURDIR)/bench $(TYPECHECK)/
	$(VENV)/bin/pyright

# What only a machine with a GPU can show; repeat it until all stages are done.
gpu: $(STAMP)
	$(PY) -m tcpa.bench gpu --results bench/results/gpu.jsonl

clean:
	rm -rf build demo_output .pytest_cache .ruff_cache .hypothesis *.egg-info
