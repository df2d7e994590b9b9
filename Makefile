# Everything that people and CI run. `make help` lists it; each target installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu bench-data lint format types docs lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(INSTALLED) ## Train a small model on sample data from a local S3 server, and show what it learned
	@$(BIN)/python tests/demo.py

test: $(INSTALLED) ## Run all tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-gpu: $(INSTALLED) ## Run the tests that need a GPU
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest tests/gpu; \
	else echo "SKIPPED: PyTorch sees no GPU here, so NOTHING of tests/gpu was run"; fi

bench-data: $(INSTALLED) ## Measure speed and memory of data preparation up to 3 GB (SIZES=100 for 100 MB alone)
	$(BIN)/python tests/bench/data.py $(if $(SIZES),--sizes $(SIZES))

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

docs: $(INSTALLED) ## Write the README's generated tables anew
	$(BIN)/python tests/docs.py

lock: ## Resolve the newest versions within pyproject.toml's ranges into requirements.lock
	rm -rf .cache/lock-venv
	$(PYTHON) -m venv .cache/lock-venv
	grep '^torch==' requirements.lock | xargs .cache/lock-venv/bin/pip install
	.cache/lock-venv/bin/pip install --editable '.[dev]'
	{ sed -n '/^#/p' requirements.lock; .cache/lock-venv/bin/pip freeze --exclude-editable \
	  | grep -vE '^(nvidia-c|nvidia-nv|triton)' | sed -E 's/\+[a-z0-9]+$$//'; } > .cache/lock-new
	mv .cache/lock-new requirements.lock

clean: ## Remove the virtual environment and the demo's server, data and adapters
	rm -rf $(VENV) .cache

# torch comes first and by itself: pip then takes a build that is already on the machine, if there is one.
$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	grep '^torch==' requirements.lock | xargs $(BIN)/pip install --quiet --disable-pip-version-check
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	touch $@
