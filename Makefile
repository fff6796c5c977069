# make demo       a small cascade learns to draw captions it was never shown (12 to 17 minutes)
# make demo-long  the same with five to eight times the steps, about an hour
# make demo-emoji another one learns 64 bundled pictures by heart (about 13 minutes)
# make test       ruff and the quick tests, 9 to 15 minutes
# make test-ci    what .ci/run runs: the slow ones too, about 20
# make test-all   the long ones too
# make test-newest   the tests that need no torch, with the newest Python, JAX and Flax
# make browser    the Chromium that tests of the page run in, where apt-get can install it
# make lint       ruff alone: no torch is installed for it
# make env, make test-env   only the environments, in .venv
#
# PYTHON=python3.12 picks the interpreter (3.11 or newer) that .venv is made with.
# The parity tests compare with imagen-pytorch. Where pip would fetch a CUDA build of torch, point
# it at PyTorch's CPU index: make test TORCH_INDEX=<that index>. NEWEST=python3.14 picks the
# interpreter of `make test-newest`, whose environment is .venv-newest.

PYTHON ?= python3
TORCH_INDEX ?=
NEWEST ?= python3.13
WORKERS ?= 2
PIP := .venv/bin/python -m pip install

# Installed without dependencies: imagen-pytorch asks for torchvision and kornia without bounds and
# would replace torch by a CUDA build. What it needs of the rest is REFERENCE_NEEDS.
REFERENCE := imagen-pytorch==2.1.0 torchvision==0.28.0 kornia==0.9.0 kornia-rs==0.2.0 \
    diffusers==0.42.1 accelerate==1.15.0 ema-pytorch==0.8.3 pytorch-warmup==0.2.0
REFERENCE_NEEDS := click datasets filelock fsspec packaging importlib_metadata protobuf psutil "pydantic>=2" pyyaml regex requests sentencepiece

# Both workers, and the commands that tests start, share what XLA compiled in this run.
RUN_TESTS = cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && \
    JAX_COMPILATION_CACHE_DIR=$$cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5 \
    $(1)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

WITH_NETWORKS := tests/nn tests/train/test_step.py tests/test_checkpoint.py tests/test_pipeline.py

.PHONY: demo demo-long demo-emoji test test-ci test-all test-newest browser lint env test-env

demo: env
	.venv/bin/python demo.py

demo-long: env
	.venv/bin/python demo.py --long

demo-emoji: env
	.venv/bin/python demo.py --data bundled

test: lint test-env
	$(call RUN_TESTS,.venv) -m "not slow and not long"

test-ci: lint test-env
	$(call RUN_TESTS,.venv) -m "not long"

test-all: lint test-env
	$(call RUN_TESTS,.venv)

# The second run: Flax without its graphs of shared objects, which the code does not need.
test-newest: .venv-newest/env.stamp
	$(call RUN_TESTS,.venv-newest) -m "not long and not torch"
	export NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false; \
	    $(call RUN_TESTS,.venv-newest) -m "not long and not torch" $(WITH_NETWORKS)

# Without it pytest leaves out the tests marked `page`.
browser:
	command -v chromium chromium-browser google-chrome > /dev/null || \
	    { apt-get -q update && apt-get -q install -y --no-install-recommends chromium; } || \
	    echo "note: no Chromium: tests of the page are left out"

lint: .venv/lint.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

env: .venv/env.stamp
test-env: .venv/test-env.stamp

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/lint.stamp: pyproject.toml | .venv/bin/python
	$(PIP) "ruff>=0.14"
	touch $@

.venv/env.stamp: pyproject.toml | .venv/bin/python
	$(PIP) -e .
	touch $@

.venv/test-env.stamp: pyproject.toml Makefile | .venv/bin/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -e ".[test,ui,captions]" "playwright>=1.60"
	$(PIP) --no-deps $(REFERENCE)
	$(PIP) $(REFERENCE_NEEDS)
	touch $@

.venv-newest/env.stamp: pyproject.toml Makefile
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --upgrade -e ".[test]"
	touch $@
