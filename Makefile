# Everything that people and CI run. `make help` lists it; each target installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VERSIONS := requirements.lock
FAULT_PROXY := .cache/mitmproxy-venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo image sbom chart test test-lowest test-newest test-chart test-distributed test-faults test-docker test-cluster soak test-gpu bench bench-data bench-loss bench-checkpointing bench-checkpoints bench-phases bench-gpu bench-fp8 bench-scale bench-storage lint format types docs lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(INSTALLED) ## Train a small model on sample data from a local S3 server, and show what it learned
	@$(BIN)/python tests/demo.py

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(INSTALLED) ## Run the tests, but for those of the targets below
	$(PYTEST)

# What pyproject.toml admits has two ends, each in an environment of its own. PyPI's PyTorch is the build for GPUs: 6 GB.
test-lowest: .cache/lowest.txt ## Run test and test-distributed with the lowest versions that pyproject.toml admits
	$(MAKE) test test-distributed VENV=.cache/lowest-venv VERSIONS=$<

test-newest: ## Run them with the newest versions that it admits
	mkdir -p .cache
	sed -n '/^torch==/s/==.*//p' requirements.lock > .cache/newest.txt
	rm -rf .cache/newest-venv
	$(MAKE) test test-distributed VENV=.cache/newest-venv VERSIONS=.cache/newest.txt

# The lowest of what the job needs; its tools are the newest.
.cache/lowest.txt: pyproject.toml
	mkdir -p $(@D)
	sed -n '/^dependencies/,/^dev/ s/.*"\([a-z0-9_-]*\)>=\([0-9.]*\).*/\1==\2/p' $< > $@

test-chart: $(INSTALLED) ## Run the tests of the chart, by Helm 4 and 3, and of training from CI
	$(PYTEST) tests/chart

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
	  $(GPU_PYTHON) -m pytest --numprocesses 4 tests/gpu --ignore tests/gpu/test_gpu_memory.py && $(GPU_PYTHON) -m pytest tests/gpu/test_gpu_memory.py; \
	else echo "SKIPPED: PyTorch sees no GPU here, so NOTHING of tests/gpu was run"; fi

TRL := .cache/trl/.installed
bench: $(INSTALLED) $(TRL) ## Train side by side with TRL and with bare loops, 5 rounds (BENCH=--quick for a tiny model)
	$(BIN)/python tests/bench/training.py $(BENCH)

bench-data: $(INSTALLED) ## Measure speed and memory of data preparation up to 3 GB (SIZES=100 for 100 MB alone)
	$(BIN)/python tests/bench/data.py $(if $(SIZES),--sizes $(SIZES))

bench-loss: $(INSTALLED) ## Measure memory and time of the loss in chunks against all logits at once
	$(BIN)/python tests/bench/loss.py --gradient-checkpointing
	$(BIN)/python tests/bench/loss.py --gradient-checkpointing --supervised 0.3

bench-checkpointing: $(INSTALLED) ## Measure what computing layers twice and smaller micro batches cost on a CPU; 9 minutes
	$(BIN)/python tests/bench/checkpointing.py $(BENCH)

bench-checkpoints: $(INSTALLED) ## Measure what saving and uploading checkpoints costs a training (BENCH=--quick for a tiny model)
	$(BIN)/python tests/bench/checkpoints.py $(BENCH)

bench-phases: $(INSTALLED) ## Measure where the time of a run goes (BENCH='--beside FOLDER' next to another checkout, --demo for the demo's model)
	$(BIN)/python tests/bench/phases.py $(BENCH)

# What is measured needs neither network nor tokenizer: GPU_PYTHON as for test-gpu, BENCH for the command's options.
bench-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED)) ## Measure the training step on one GPU, one measure after another, offline
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(GPU_PYTHON) tests/bench/gpu.py $(BENCH); \
	else echo "SKIPPED: PyTorch sees no GPU here, so NOTHING was measured"; fi

bench-fp8: $(INSTALLED) ## Measure what an FP8 base does to a small model's loss and gradients, and to what it learns; 10 minutes
	$(BIN)/python tests/bench/fp8.py

bench-scale: ## Compute what 1, 8 and 64 GPUs cost in communication (BENCH='--tokens-per-s 12000')
	@$(PYTHON) tests/bench/scale.py $(BENCH)

bench-storage: $(INSTALLED) ## Measure downloads and uploads against s5cmd and boto3's own (BENCH='--rounds 1')
	$(BIN)/python tests/bench/storage.py $(BENCH)

CHART := charts/sft-job
# The values of a JobSet are for clusters that have it.
APIS := --api-versions jobset.x-k8s.io/v1alpha2
chart: $(INSTALLED) ## Lint and render the chart with each of its example values by Helm 4 and 3, and package it
	@set -eu; mkdir -p .cache/chart; for name in helm helm3; do \
	  helm=$$($(BIN)/python tests/tools.py $$name); echo "$$($$helm version --short)"; \
	  for values in $(CHART)/ci/*-values.yaml; do \
	    $$helm lint --strict --quiet $(CHART) --values $$values; \
	    $$helm template demo $(CHART) --values $$values $(APIS) > .cache/chart/rendered.yaml; \
	    echo "$$values: $$(grep -c '^kind:' .cache/chart/rendered.yaml) objects"; \
	  done; done; \
	$$($(BIN)/python tests/tools.py helm) package $(CHART) --destination .cache/chart

# The chart's templates are no YAML until Helm has filled them in: the tests check what comes out.
YAML := .yamllint $(wildcard .github charts/sft-job/*.yaml charts/sft-job/ci job/*.yaml job/*/*.yaml tests/*.yaml)

# VARIANT=cpu needs TORCH_INDEX_URL: PyTorch's index of CPU wheels, or nothing where pip's own index has them. Where Debian
# or the packages come from another place: BASE_IMAGE, BUILD_IMAGE, DOCKER_BUILD_FLAGS. The build needs BuildKit.
VARIANT ?= cuda
DOCKER ?= docker
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
IMAGE ?= sft-job:$(VERSION)$(if $(filter cpu,$(VARIANT)),-cpu)
SOURCE ?= $(if $(GITHUB_REPOSITORY),$(GITHUB_SERVER_URL)/$(GITHUB_REPOSITORY))

image: ## Build the image and show its size by layer (VARIANT=cpu for machines without a GPU)
	$(if $(filter cuda cpu,$(VARIANT)),,$(error VARIANT=$(VARIANT): must be cuda or cpu))
	$(if $(filter cpuundefined,$(VARIANT)$(origin TORCH_INDEX_URL)),$(error VARIANT=cpu: set TORCH_INDEX_URL to the index \
	  of CPU wheels that pytorch.org names, or to nothing where pip finds them by itself))
	DOCKER_BUILDKIT=1 $(DOCKER) build $(DOCKER_BUILD_FLAGS) --file docker/Dockerfile --tag $(IMAGE) \
	  $(foreach name,BASE_IMAGE BUILD_IMAGE TORCH_INDEX_URL,$(if $($(name)),--build-arg $(name)=$($(name)))) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git describe --always --abbrev=40 --dirty --exclude '*') \
	  --build-arg SOURCE=$(SOURCE) .
	@$(DOCKER) history --human=false --format '{{.Size}} {{.CreatedBy}}' $(IMAGE) | awk '$$1 > 0 \
	  {printf "%8.1f MB  %.90s\n", $$1 / 1e6, substr($$0, length($$1) + 2); total += $$1} \
	  END {printf "%8.1f MB  $(IMAGE)\n", total / 1e6}'

SBOM = dist/$(subst :,-,$(notdir $(IMAGE))).cdx.json
sbom: .cache/sbom-venv/.installed ## List what the image holds, of Debian and of Python, in dist/ as CycloneDX (VARIANT as for image)
	.cache/sbom-venv/bin/python docker/sbom.py $(DOCKER) $(IMAGE) > $(SBOM).new
	mv $(SBOM).new $(SBOM)

test-docker: $(INSTALLED) ## Build the CPU image on a local base and run it with a real engine, which is started if need be
	@tests/docker/engine.sh run $(BIN)/python -m pytest tests/docker

# On the cluster of KUBECONFIG, with SFT_TEST_IMAGE and SFT_TEST_HOST, or on one that the program CLUSTER starts here:
# all of it is explained at the top of tests/cluster/conftest.py. ARGS are pytest's, such as ARGS='-k drained'.
test-cluster: $(INSTALLED) ## Run the chart and the image on a real Kubernetes cluster, with S3 on this machine
	@tests/cluster/run.sh $(BIN)/python $(ARGS)

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

docs: $(INSTALLED) ## Write the README's generated tables anew, and the chart's files that follow from the code
	$(BIN)/python tests/docs.py
	$(BIN)/python tests/chart_files.py

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
$(INSTALLED): $(VERSIONS) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	grep '^torch\b' $(VERSIONS) | xargs $(BIN)/pip install --quiet --disable-pip-version-check
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(VERSIONS) --editable '.[dev]'
	touch $@

# The tool of `make sbom` is no part of the job and its tests.
.cache/sbom-venv/.installed: docker/sbom.lock
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	mkdir -p dist
	touch $@

# mitmproxy has an environment of its own, for it pins libraries that the job needs in other versions.
$(FAULT_PROXY): tests/faults/mitmproxy.lock
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

# What the job is compared with is no part of its environment.
$(TRL): tests/bench/trl.lock $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) --requirement $<
	touch $@
