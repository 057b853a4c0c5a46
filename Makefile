# The whole interface for developing. Needs only make and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests mostly wait, for sockets, processes and deadlines: one worker more than two cores. Not for the long ones, which measure.
# Torch has one thread in each: threads of several processes that wait for each other on too few cores are slower by far.
WORKERS ?= 3
# The environment is made anew when pyproject.toml changes, and only then.
STAMP := $(VENV)/.made-for-$(shell $(PYTHON) -c "import hashlib; print(hashlib.sha256(open('pyproject.toml', 'rb').read()).hexdigest()[:16])")

.PHONY: demo test check test-long bench

demo: $(STAMP)
	$(BIN)/fedclip-agg demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

test-long: $(STAMP)
	$(BIN)/pytest -m long --timeout 1800

bench: $(STAMP)
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file; done

$(STAMP):
	@$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12' % sys.version_info[:2] if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	rm -f $(VENV)/.made-for-*
	touch $@
