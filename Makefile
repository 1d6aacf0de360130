# qe-edge: `make demo` runs the whole pipeline, `make test` the tests. `make help` lists all targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# llama.cpp is compiled once; its build takes all cores.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Two files of tests at once; each process takes up to 2.5 GB.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile
# GCC 12 drops what Intel's AMX needs (qe_edge/backends/amx.py), unless it is told to keep what looks unused.
ifeq ($(shell uname -sm),Linux x86_64)
export CMAKE_ARGS ?= -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'
endif
# setuptools warns of every editable installation.
$(READY): export PYTHONWARNINGS = ignore

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format docs clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

# torch is pinned in constraints.txt. On Linux, PyPI's build of it brings gigabytes of CUDA: on a machine
# without an NVIDIA GPU, have PIP_EXTRA_INDEX_URL name PyTorch's own index of CPU builds.
$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): several minutes the first time, most of it compiling llama.cpp"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

install: $(READY)  ## Make .venv with everything in it

demo: $(READY)  ## Run the whole pipeline on the embedded student and collection
	$(BIN)/qe-edge demo

test: $(READY)  ## Run the tests, but not the slow ones
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## Run all tests
	$(PYTEST)

lint: $(READY)  ## Check style, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(READY)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## Write the generated pages, and build the site into build/site
	$(BIN)/python docs/site/cli.py > docs/cli.md
	$(BIN)/python docs/site/api.py > docs/python-api.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

clean:  ## Delete the environment and build files; trained models in qe-edge-work stay
	rm -rf $(VENV) build *.egg-info
