# `make demo` and `make test` set up what they need; everything else is for those who work on pgtoolset.

PYTHON ?= python3
VENV ?= .venv
VENV_MINIMUM ?= .venv-minimum
VENV_RELEASE ?= .venv-release
VENV_BENCH ?= .venv-bench
# The demo needs few packages: a visitor does not wait for the tools of those who work on pgtoolset.
VENV_DEMO ?= $(if $(wildcard $(VENV)/.ready),$(VENV),.venv-demo)
VENV_COMPARISON = build/comparison
DRIVER ?= asyncpg
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find src stubs -name '*.py*' -not -path '*/__pycache__/*') setup.py MANIFEST.in pyproject.toml

# Tests, and what they read, as they are copied to where the source of the package is not.
OUTSIDE = .wheel-tests
TESTED = tests docs examples benchmarks README.md CHANGELOG.md pyproject.toml

# The suite runs in four processes, each with an embedded server of its own: it waits for half of its time, so they keep
# two cores busy. On a server that DATABASE_URL names it runs in one: some tests look at everything that happens on
# their server.
WORKERS ?= $(if $(DATABASE_URL),0,4)
# `make test` takes the newest versions of other packages and `make test-wheel` the oldest, unless VERSIONS says which.
OLDEST = --constraint requirements-minimum.txt
VERSIONS_OF_SOURCE = $(if $(filter oldest,$(VERSIONS)),$(OLDEST))
VERSIONS_OF_WHEEL = $(if $(filter newest,$(VERSIONS)),,$(OLDEST))

PYTEST = -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

.PHONY: demo cluster picture test check lint types docs wheel test-wheel test-minimum format bench clean
.PHONY: release-check check-dist comparison

## demo: the example shop on a real PostgreSQL, and a tour of it; DEMO_ONCE=1 ends after the tour
demo: $(VENV_DEMO)/.ready
	@$(VENV_DEMO)/bin/python -m examples.shop.demo

## cluster: a Patroni cluster under load while its primaries are killed, frozen, switched over and cut off; it proves that
## nothing is lost, done twice or told wrong. CLUSTER_SECONDS=180, CLUSTER_ONCE=1 (a minute), CLUSTER_DRIVER=psycopg
cluster: $(VENV)/.ready
	$(VENV)/bin/python -m examples.cluster

## picture: the pictures of the demo's page in docs/images; needs Chromium
picture: $(VENV)/.ready
	$(VENV)/bin/python -m examples.shop.picture

## test: the test suite on the embedded PostgreSQL 18, or on the server that DATABASE_URL names; PYTEST_ARGS adds options,
## and DRIVER=psycopg chooses the driver
test: $(VENV)/.ready
	DRIVER=$(DRIVER) $(VENV)/bin/python $(PYTEST)

## check: all that must hold before a change lands. One suite keeps two cores busy, so the two run one after the other;
## what comes before them is made by tools that use one core each
check:
	$(MAKE) --no-print-directory --jobs=2 lint types docs
	$(MAKE) --no-print-directory test-minimum
	$(MAKE) --no-print-directory test

## lint: style, types, the layers of the package, and dead code
lint: $(VENV)/.ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/vulture

## docs: the documentation as a site, in build/site; a warning is an error
docs: $(VENV)/.ready
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs build/site

## types: the public types are complete, and the stubs of the compiled modules are true, in the installed wheel
types: $(VENV_MINIMUM)/.ready
	cd $(VENV_MINIMUM) && PATH="$$PWD/bin:$$PATH" pyright --verifytypes pgtoolset --ignoreexternal
	cd $(VENV_MINIMUM) && bin/python -m mypy.stubtest pgtoolset._native.associations_c pgtoolset._native.comparator_c

## wheel: a wheel for this Python with the compiled modules, and the sdist that it is built from, in dist/
wheel: dist/.built

## test-wheel: the suite on the installed wheel, away from the source tree, with its compiled modules; DRIVER and
## POSTGRES_VERSION choose what it runs on, and VERSIONS=newest the other end of what other packages may be
test-wheel: $(VENV_MINIMUM)/.ready $(OUTSIDE)
	cd $(OUTSIDE) && PGTOOLSET_IMPL=c DRIVER=$(DRIVER) $(abspath $(VENV_MINIMUM))/bin/python $(PYTEST)

## test-minimum: the same with the oldest versions that are supported, and PostgreSQL is 16, so the other end of each
## range is tested as well. What is marked `once` would have the same outcome there as in `make test`. The driver is
## psycopg, and then asyncpg for the tests that it alone can run
test-minimum: $(VENV_MINIMUM)/.ready $(OUTSIDE)
	cd $(OUTSIDE) && export PGTOOLSET_IMPL=c POSTGRES_VERSION=16 \
		&& DRIVER=psycopg $(abspath $(VENV_MINIMUM))/bin/python $(PYTEST) -m "not once" \
		&& DRIVER=asyncpg $(abspath $(VENV_MINIMUM))/bin/python $(PYTEST) -m "asyncpg and not once"

.PHONY: $(OUTSIDE)
$(OUTSIDE):
	rm -rf $(OUTSIDE) && mkdir $(OUTSIDE) && cp -r $(TESTED) $(OUTSIDE)

## release-check: what is built can be published: its metadata, its description, its files
release-check: dist/.built
	$(MAKE) --no-print-directory check-dist

## check-dist: the same for what is in dist/ already
check-dist: $(VENV_RELEASE)/.ready
	$(VENV_RELEASE)/bin/twine check --strict dist/*.whl dist/*.tar.gz
	$(VENV_RELEASE)/bin/check-wheel-contents dist/*.whl
	for sdist in dist/*.tar.gz; do $(VENV_RELEASE)/bin/pyroma --min 10 $$sdist || exit 1; done

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

## bench: all benchmarks on the compiled wheel, compared with the committed results, as a page with tables and plots in
## build/bench; fails where a target that was met is missed. QUICK=1 takes a few minutes, UPDATE=1 rewrites what is
## committed, BENCH="m2m locks" chooses modules, RENDER=1 draws the committed results again
bench: $(VENV_BENCH)/.ready
	$(VENV_BENCH)/bin/python -m benchmarks.report $(BENCH) $(if $(QUICK),--quick) $(if $(UPDATE),--update) \
		$(if $(RENDER),--render)

## comparison: the programs behind docs/comparison.md, on the libraries that it compares, in an environment of their own
comparison: $(VENV_COMPARISON)/.ready
	$(VENV_COMPARISON)/bin/python -m pytest tests/comparison --confcutdir=tests/comparison -W default $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .venv-demo $(VENV_MINIMUM) $(VENV_RELEASE) $(VENV_BENCH) $(OUTSIDE) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Editable, and so without the compiled modules: they would hide an edit of their source.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	PGTOOLSET_NO_EXTENSIONS=1 $(VENV)/bin/python $(PIP_INSTALL) --editable ".[dev,cluster]" $(VERSIONS_OF_SOURCE)
	touch $@

.venv-demo/.ready: pyproject.toml setup.py
	@echo "Installing what the demo needs in .venv-demo; this takes a minute or two, once."
	@$(PYTHON) -m venv .venv-demo
	@PGTOOLSET_NO_EXTENSIONS=1 .venv-demo/bin/python $(PIP_INSTALL) --editable ".[demo]" $(VERSIONS_OF_SOURCE)
	@touch $@

# The wheel is built from the sdist, away from the source tree, so neither can lack anything.
dist/.built: $(SOURCES) | $(VENV)/.ready
	rm -rf dist && mkdir dist
	PGTOOLSET_REQUIRE_EXTENSIONS=1 $(VENV)/bin/python -m build --outdir dist . > dist/build.log 2>&1 \
		|| { cat dist/build.log; exit 1; }
	touch $@

$(VENV_MINIMUM)/.ready: dist/.built requirements-minimum.txt
	$(PYTHON) -m venv $(VENV_MINIMUM)
	$(VENV_MINIMUM)/bin/python $(PIP_INSTALL) "$$(echo dist/*.whl)[dev]" $(VERSIONS_OF_WHEEL)
	$(VENV_MINIMUM)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps dist/*.whl
	touch $@

# What users install: the newest versions of other packages, and the compiled modules; and beside them other libraries.
$(VENV_BENCH)/.ready: dist/.built
	$(PYTHON) -m venv $(VENV_BENCH)
	$(VENV_BENCH)/bin/python $(PIP_INSTALL) "$$(echo dist/*.whl)[dev,bench]"
	$(VENV_BENCH)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps dist/*.whl
	$(VENV_BENCH)/bin/python -m benchmarks._peers
	touch $@

$(VENV_RELEASE)/.ready: requirements-release.txt
	$(PYTHON) -m venv $(VENV_RELEASE)
	$(VENV_RELEASE)/bin/python $(PIP_INSTALL) --requirement requirements-release.txt
	touch $@

$(VENV_COMPARISON)/.ready: pyproject.toml tests/comparison/requirements.txt
	$(PYTHON) -m venv $(VENV_COMPARISON)
	PGTOOLSET_NO_EXTENSIONS=1 $(VENV_COMPARISON)/bin/python $(PIP_INSTALL) --editable ".[fastapi,testing]" \
		--requirement tests/comparison/requirements.txt
	$(VENV_COMPARISON)/bin/python $(PIP_INSTALL) --no-deps --upgrade --target build/fastapi-toolsets-3.1.1 \
		fastapi-toolsets==3.1.1
	touch $@
