# Each target sets up what it needs in .venv: `make demo` runs the main job, `make test` the tests, `make cluster` those of
# two nodes, `make lint` the checks of form, types and imports. `make clean` deletes what the demo made.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test cluster lint bench chaos clean

demo: $(VENV)/.installed
	$(BIN)/python -m scf_fast.demo

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Two nodes with a network between them, for real; needs the right to make network namespaces, and skips without it.
cluster: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/cluster

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The report is written even where a section failed.
bench: $(VENV)/.installed-test
	$(BIN)/python -m bench.suite; status=$$?; $(BIN)/python -m bench.report && exit $$status

chaos: $(VENV)/.installed
	$(BIN)/python -m bench.chaos

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "Python 3.10 to 3.13 is needed, this is %d.%d; set PYTHON=python3.12 or the like" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

clean:
	rm -rf runs/demo data/demo
