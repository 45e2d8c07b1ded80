# Everything a newcomer needs: `make demo` and `make test`. Both set the environment up first, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# The first Python that is new enough; override with `make setup PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
TORCH := 2.13.0
# Compiled afterwards, by all cores at once: pip does it with one, which is half of the time it takes.
INSTALL := $(BIN)/python -m pip install -q --no-compile -c requirements/lock.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export NO_MKDOCS_2_WARNING := 1

# The demo: three strategies on a simulated multi-hospital brain cohort.
DEMO_DATA := runs/demo-data
DEMO_OUT := runs/demo
DEMO_MAKE := $(BIN)/omnifm data make atlas $(DEMO_DATA).part --patients 80 --seed 0
DEMO_RUN := $(BIN)/omnifm compare configs/demo.toml --strategies omnifm,fedavg,local --seeds 0 --jobs 2 --out $(DEMO_OUT)

# More words for a tool, e.g. `make test ARGS="tests/spectral -k parseval"`.
ARGS ?=

.PHONY: help
help: ## Show the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: $(STAMP) ## Make .venv with the pinned versions and the omnifm command (quick when nothing changed)

# The stamp is touched last: an interrupted set-up starts over.
$(STAMP): pyproject.toml requirements/lock.txt
	@test -n "$(PYTHON)" || { echo "omnifm needs Python 3.11 or newer; name one with 'make PYTHON=/path/to/python'." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
		echo "Installing torch $(TORCH) (a GPU is here)"; \
		$(INSTALL) torch==$(TORCH); \
	elif $(INSTALL) torch==$(TORCH)+cpu >/dev/null 2>&1; then \
		echo "Installed torch $(TORCH), the CPU build"; \
	else \
		echo "Installing torch $(TORCH) (no build called +cpu was found: see docs/install.md if this downloads a CUDA build)"; \
		$(INSTALL) torch==$(TORCH); \
	fi
	@echo "Installing omnifm and its pinned dependencies"
	@$(INSTALL) -e '.[dev,docs,imagenet,vqa,dicom,flower,flower-simulation,privacy]'
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/' $(VENV)/lib || true # what is imported; some files are no Python of this version
	@touch $@

.PHONY: demo
demo: $(STAMP) | $(DEMO_DATA) ## Set up, then compare OmniFM, FedAvg and Local on a simulated cohort (minutes, CPU)
	@$(DEMO_RUN)
	@printf '\nTable:  %s\nReport: %s (open it in a browser)\n' "$(DEMO_OUT)/table.csv" "$(DEMO_OUT)/report.html"

# Renamed when it is whole, so that an interrupted one is never taken for the cohort.
$(DEMO_DATA): | $(STAMP)
	@rm -rf $@.part
	@$(DEMO_MAKE)
	@mv $@.part $@

# One thread per process: the same bits everywhere, and the worker processes do not fight for cores.
# Bytecode is kept even where the caller says otherwise: a hundred of the tests' processes import the package.
.PHONY: test
test: $(STAMP) ## Set up, then run the tests (offline, CPU; ARGS="tests/spectral" narrows them)
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

.PHONY: check
check: $(STAMP) ## Lint, format, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict omnifm
	$(BIN)/lint-imports --no-logo

.PHONY: format
format: $(STAMP) ## Rewrite the code the way `make check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(STAMP) ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

.PHONY: clean
clean: ## Remove caches and built files; keeps .venv and runs/
	rm -rf site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
