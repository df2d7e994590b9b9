# Everything that people and CI run. `make help` lists it; each target installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FAULT_PROXY := .cache/mitmproxy-venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-distributed test-faults soak test-gpu bench-data bench-loss bench-checkpoints lint format types docs lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(INSTALLED) ## Train a small model on sample data from a local S3 server, and show what it learned
	@$(BIN)/python tests/demo.py

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(INSTALLED) ## Run the tests, but for those of the targets below
	$(PYTEST)

test-distributed: $(INSTALLED) ## Run real trainings under every engine, on several hosts, and out of memory
	@[ "$$(id -u)" = 0 ] || echo "SKIPPED: without root there are no network namespaces, so NOTHING is run on several hosts"
	$(PYTEST) tests/distributed

test-faults: $(INSTALLED) $(FAULT_PROXY) ## Run the tests of kills, resuming, faults of the store, full disks and hangs
	@[ "$$(id -u)" = 0 ] || echo "SKIPPED: without root no small disk can be mounted, so NOTHING is run on full disks"
	$(PYTEST) tests/faults

soak: $(INSTALLED) $(FAULT_PROXY) ## Kill jobs at random moments amid faults of the store until they end, 100 rounds (SOAK='--rounds 10 --seed 2')
	$(BIN)/python tests/faults/soak.py $(SOAK)

# On a machine without a package index: make test-gpu GPU_PYTHON=python3, for a Python that has all that is needed.
GPU_PYTHON ?= $(BIN)/python
test-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED)) ## Run the tests that need a GPU, offline; 10 minutes
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(GPU_PYTHON) -m pytest --numprocesses 4 tests/gpu/test_gpu.py tests/gpu/test_gpu_resume.py && $(GPU_PYTHON) -m pytest tests/gpu/test_gpu_memory.py; \
	else echo "SKIPPED: PyTorch sees no GPU here, so NOTHING of tests/gpu was run"; fi

bench-data: $(INSTALLED) ## Measure speed and memory of data preparation up to 3 GB (SIZES=100 for 100 MB alone)
	$(BIN)/python tests/bench/data.py $(if $(SIZES),--sizes $(SIZES))

bench-loss: $(INSTALLED) ## Measure memory and time of the loss in chunks against all logits at once
	$(BIN)/python tests/bench/loss.py --gradient-checkpointing
	$(BIN)/python tests/bench/loss.py --gradient-checkpointing --supervised 0.3

bench-checkpoints: $(INSTALLED) ## Measure what saving and uploading checkpoints costs a training (BENCH=--quick for a tiny model)
	$(BIN)/python tests/bench/checkpoints.py $(BENCH)

# The chart's templates are no YAML until Helm has filled them in: the tests check what comes out.
YAML := .yamllint $(wildcard .github charts/sft-job/*.yaml charts/sft-job/ci job/*.yaml job/*/*.yaml tests/*/*.yaml)

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck .ci/run $(wildcard charts/*.sh docker/*.sh tests/*/*.sh)
	$(if $(wildcard docker/Dockerfile),$(BIN)/hadolint docker/Dockerfile)
	$(BIN)/yamllint --strict $(YAML)

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

# mitmproxy has an environment of its own, for it pins libraries that the job needs in other versions.
$(FAULT_PROXY): tests/faults/mitmproxy.lock
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@
