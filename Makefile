# The commands of the project; each makes .venv and installs what it needs when absent.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
TYPECHECK := build/typecheck
LINKED := build/links.txt
CHECKED := build/pyright.txt

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
	# The type checker cannot follow the mapping of setup.py: setuptools links every file where it
	# is imported from. Links to folders would be skipped without a word; see that every file is taken.
	rm -rf $(TYPECHECK) && mkdir -p build
	$(PY) -c 'from setuptools.build_meta import build_editable as build; \
		build("build", {"editable_mode": "strict"})' > $(LINKED) 2>&1 || { cat $(LINKED); exit 1; }
	mv build/__editable__.tcpa-* $(TYPECHECK)
	$(VENV)/bin/pyright --stats > $(CHECKED) || { cat $(CHECKED); exit 1; }
	grep "files checked: $$(find tcpa train bench -name '*.py' | grep -c .)$$" $(CHECKED) \
		|| { echo "pyright left files out; see $(CHECKED)"; exit 1; }

# What only a machine with a GPU can show; repeat it until all stages are done.
gpu: $(STAMP)
	$(PY) -m tcpa.bench gpu --results bench/results/gpu.jsonl

clean:
	rm -rf build demo_output .pytest_cache .ruff_cache .hypothesis *.egg-info
