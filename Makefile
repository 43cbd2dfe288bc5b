PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# processes that run tests
WORKERS ?= 2

.PHONY: demo test test-slow chaos lint types docs clean

demo: $(INSTALLED)
	$(BIN)/rmft demo --out runs/demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile

test-slow: $(INSTALLED) types
	$(BIN)/python -m pytest -m slow

chaos: $(INSTALLED)
	$(BIN)/python -m pytest -s tests/test_chaos.py

lint: $(INSTALLED)
	$(BIN)/ruff check rmft_jax tests docs
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck --external-sources tpu_scripts/*.sh tests/pods/*.sh

types: $(INSTALLED)
	$(BIN)/mypy

# docs/reference, from docstrings and the command line.
docs: $(INSTALLED)
	$(BIN)/python docs/make_reference.py

# Installs once: again only after the package's metadata or the tested versions have changed.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "setting up .venv (about a minute, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
