# `make demo` and `make test` set up what they need; everything else is for those who work on pgtoolset.

PYTHON ?= python3
VENV ?= .venv
VENV_MINIMUM ?= .venv-minimum
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check lint test-minimum format benchmarks clean

## demo: the example shop on a real PostgreSQL, and a tour of it; DEMO_ONCE=1 ends after the tour
demo: $(VENV)/.ready
	$(VENV)/bin/python -m examples.shop.demo

## test: the test suite on the embedded PostgreSQL 18, or on the server that DATABASE_URL names
test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

## check: all that must hold before a change lands
check: lint test-minimum test

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

## test-minimum: the same suite on the oldest versions that are supported, and on PostgreSQL 16
test-minimum: $(VENV_MINIMUM)/.ready
	POSTGRES_VERSION=16 $(VENV_MINIMUM)/bin/python -m pytest $(PYTEST_ARGS)

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

## benchmarks: ratios against SQLAlchemy by hand, and against fastapi-toolsets
benchmarks: $(VENV)/.ready
	$(VENV)/bin/python -m benchmarks.imports
	$(VENV)/bin/python -m benchmarks.m2m
	$(VENV)/bin/python -m benchmarks.transactions
	$(VENV)/bin/python -m benchmarks.sessions
	$(VENV)/bin/python -m benchmarks.watch
	$(VENV)/bin/python -m benchmarks.locks

clean:
	rm -rf $(VENV) $(VENV_MINIMUM) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) --editable ".[dev]"
	touch $@

$(VENV_MINIMUM)/.ready: pyproject.toml requirements-minimum.txt
	$(PYTHON) -m venv $(VENV_MINIMUM)
	$(VENV_MINIMUM)/bin/python $(PIP_INSTALL) --editable ".[dev]" --constraint requirements-minimum.txt
	touch $@
