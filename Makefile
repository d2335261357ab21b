# The commands of the project; each makes .venv and installs what it needs when absent.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
TYPECHECK := build/typecheck/tcpa
CHECKED := build/typecheck/pyright.txt

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
	# The type checker cannot follow the package mapping of setup.py, nor links to folders, which it
	# skips without a word: give it copies, and see that it took every file.
	rm -rf $(TYPECHECK) && mkdir -p $(dir $(TYPECHECK))
	cp -R tcpa $(TYPECHECK)
	cp -R kernels train bench $(TYPECHECK)/
	$(VENV)/bin/pyright --stats > $(CHECKED) || { cat $(CHECKED); exit 1; }
	grep "files checked: $$(find tcpa train bench -name '*.py' | grep -c .)$$" $(CHECKED) \
		|| { echo "pyright left files out; see $(CHECKED)"; exit 1; }

# What only a machine with a GPU can show; repeat it until all stages are done.
gpu: $(STAMP)
	$(PY) -m tcpa.bench gpu --results bench/results/gpu.jsonl

clean:
	rm -rf build demo_output .pytest_cache .ruff_cache .hypothesis *.egg-info
