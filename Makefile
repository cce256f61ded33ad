# Needs Python 3.11 or newer, git and make; everything else goes into .venv.

PYTHON ?= python3
# Prebuilt torch_scatter and torch_sparse, where there are some: building them takes about half an hour.
WHEELS ?= ../shared/wheels
PYTEST_ARGS ?=

PY := .venv/bin/python
PIP_INSTALL := $(PY) -m pip -qq --disable-pip-version-check install --constraint constraints.txt
FIND_LINKS := $(if $(wildcard $(WHEELS)),--find-links '$(WHEELS)')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips must not write to one .venv.
.NOTPARALLEL:
.PHONY: help setup demo test lint format bench interop docs clean distclean

help:
	@echo 'make demo      set up .venv and run the demo'
	@echo 'make test      run the tests                          (PYTEST_ARGS="-k gcn" to choose some)'
	@echo 'make lint      ruff check, ruff format --check, mypy'
	@echo 'make format    apply what ruff can fix'
	@echo 'make bench     run the microbenchmarks                (PYTEST_ARGS="-k gcn" to choose some)'
	@echo 'make interop   run the tests against torch_geometric and torch_sparse, and those of figures'
	@echo 'make docs      build the documentation into site/, strictly'
	@echo 'make setup     only set up .venv'
	@echo 'make clean     remove build output and caches; make distclean removes .venv too'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python that .venv is made from.'

# The stamps carry what was installed: editing either file installs again, anything else does not.
.venv/base.stamp: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo 'gas-triton needs Python 3.11 or newer, and there is no $(PYTHON) here.' >&2; \
	  echo 'Name one: make PYTHON=/path/to/python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gas-triton needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
	  echo 'Name a newer one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'Setting up .venv (the first time downloads torch) ...'
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) --editable .
	@touch $@

.venv/test.stamp: .venv/base.stamp
	@echo 'Installing what the tests need ...'
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $@

.venv/dev.stamp: .venv/base.stamp
	@echo 'Installing what lint needs ...'
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# torch_scatter and torch_sparse import torch in their setup.py, so where they are built from source it has to be
# without isolation, with the tools for it (and for this package) installed beside.
.venv/interop.stamp: .venv/test.stamp
	@echo 'Installing torch_geometric, torch_sparse and matplotlib (half an hour where they have to be built) ...'
	@$(PIP_INSTALL) 'setuptools>=77' wheel ninja
	@$(PIP_INSTALL) --no-build-isolation $(FIND_LINKS) --editable '.[test,pyg,sparse,plot]'
	@touch $@

.venv/docs.stamp: .venv/base.stamp
	@echo 'Installing what the documentation needs ...'
	@$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

setup: .venv/base.stamp

demo: .venv/base.stamp
	@$(PY) -m bench.demo

test: .venv/test.stamp
	$(PY) -m pytest tests $(PYTEST_ARGS)

lint: .venv/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: .venv/test.stamp
	$(PY) -m pytest bench $(PYTEST_ARGS)

interop: .venv/interop.stamp
	$(PY) -m pytest tests -m interop --require-optional $(PYTEST_ARGS)

# The variable keeps the theme from advertising in the output. A warning of any kind fails, but not with --quiet.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage htmlcov
	find gas_triton kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
