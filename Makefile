# Two commands on a fresh machine: `make demo` and `make test`. Everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-all lint docs audit sbom clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/plait demo --out plait-demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p plait.adapters -p plait.merging -p plait.formats -p plait.subspaces -p plait.statistics -m plait.store -m plait.errors -m plait.options -m plait.checked -m plait.patterns -m plait.automaton

# torch first and pinned: left to the resolver it may come as gigabytes of GPU packages.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test]'
	touch $@ $(VENV)/.demo

# Known vulnerabilities of the pinned versions; asks the network.
audit: $(VENV)/.audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

# What is installed, as a CycloneDX file.
sbom: $(VENV)/.audit
	mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-file dist/sbom.json $(BIN)/python

# The pinned versions with their hashes, for `pip install --require-hashes`.
requirements.lock: pyproject.toml constraints.txt $(VENV)/.audit
	$(BIN)/uv pip compile pyproject.toml --extra demo --python-version 3.11 --generate-hashes --no-header --constraint constraints.txt --output-file $@

$(VENV)/.audit: $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit cyclonedx-bom uv
	touch $@

clean:
	rm -rf $(VENV) dist build plait-demo .pytest_cache .mypy_cache .ruff_cache
