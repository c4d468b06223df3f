# `make demo`, `make test`, `make test-slow`, `make docs` and `make lint` work on a fresh machine with Python 3.11 or
# newer: what they need is installed into .venv, once, and again only when the requirements change.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check install --no-compile -c constraints.txt

# Modules are compiled once, when they are first imported: not by each of the many processes that tests start, nor when
# they are installed, which takes a minute for thousands that nobody imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow docs lint clean

demo: .venv/ready
	@$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# The few tests from end to end that take longer than everything about them.
test-slow: .venv/ready
	$(BIN)/python -m pytest -n auto -m slow

# Writes docs/methods/ anew from the docstrings; a test fails while the two differ.
docs: .venv/ready
	$(BIN)/python docs/make_methods.py

lint: .venv/ready-to-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# Removes what make made, .venv included; your own runs/ stay.
clean:
	rm -rf .venv demo dist build .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version; sys.exit(0 if sys.version_info >= (3, 11) else f"untrojan needs Python 3.11 or newer, $(PYTHON) is {v.split()[0]}; try make PYTHON=python3.11")'
	@echo "Installing into .venv; the first time this takes some minutes, most of them for torch."
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -e '.[demo,test]'
	@touch $@

.venv/ready-to-lint: .venv/ready
	@$(INSTALL) -e '.[demo,test,lint]'
	@touch $@
