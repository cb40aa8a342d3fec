# One command each; every target does all of its own set-up (environment .venv, pinned dependencies, build).
#   make PYTHON=python3.12 test    uses another Python (3.11 or newer)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DEPS   := $(VENV)/.dependencies
BUILD  := $(VENV)/.build
CPP    := $(sort $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc'))
TORCH  := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements-dev.txt)
# With a compiler at hand a kernel that does not compile is an error; without one the package runs on the reference.
STRICT := $(if $(shell command -v $(CXX)),1,0)

BENCH_JSON ?= bench/results/local.json
GPU_BASE   := $(if $(REHEARSE),$(BIN)/python,$(PYTHON))
GPU_VENV   := .venv-gpu$(if $(REHEARSE),-rehearsal)

.DEFAULT_GOAL := help
.PHONY: help setup dev demo test bench lint kernel-report gpu clean

help: ## this list
	@sed -n 's/^\([a-z -]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup dev: $(BUILD) ## create .venv, install everything, build; again: compile what changed

demo: $(BUILD) ## the main job: swap a plain PyTorch model's layers and show speed, memory and equality
	@$(BIN)/python -m hivilt.demo

test: $(BUILD) ## all tests, in two processes
	@$(BIN)/pytest -q --numprocesses=2 --dist=worksteal

bench: $(BUILD) ## benchmarks -> JSON, table and plot under bench/results
	@mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/pytest bench/ --benchmark-only --benchmark-json=$(BENCH_JSON)
	$(BIN)/python bench/report.py $(BENCH_JSON)

lint: $(DEPS) ## ruff and clang-format, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

kernel-report: $(BUILD) ## without a GPU: compile every GPU kernel; registers, spills, shared memory
	@$(BIN)/python -m hivilt.kernel_report

# Uses the machine's own torch, which fits its driver, and all else that it has: an empty environment over its packages.
# REHEARSE=1 walks through the same lines on a CPU, over the packages of .venv, and leaves bench/results alone.
gpu: $(if $(REHEARSE),$(BUILD)) ## on a GPU machine: GPU tests and benchmarks -> bench/results/<gpu>.json
	@test -n "$(REHEARSE)" || $(PYTHON) -c "import torch, sys; sys.exit(not torch.cuda.is_available())" 2>/dev/null || \
	  { echo "make gpu: no CUDA GPU is visible to the torch of '$(PYTHON)'; nothing was run" >&2; exit 1; }
	@test -x $(GPU_VENV)/bin/python || $(GPU_BASE) -m venv --without-pip $(GPU_VENV)
	@$(GPU_BASE) -c "import site; print(*site.getsitepackages(), site.getusersitepackages(), sep='\n')" > \
	  "$$($(GPU_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/machine.pth"
	@$(GPU_VENV)/bin/python -c "import hypothesis, psutil, pytest, pytest_benchmark, pytest_timeout, setuptools as s, tqdm; \
	  assert int(s.__version__.split('.')[0]) >= 77" 2>/dev/null || \
	  $(GPU_VENV)/bin/python -m pip install -q hypothesis psutil pytest pytest-benchmark pytest-timeout tqdm "setuptools>=77" wheel
	@$(GPU_VENV)/bin/python bench/gpu.py $(if $(REHEARSE),--rehearse)

clean: ## remove what was built; .venv stays
	rm -rf build dist hivilt.egg-info hivilt/*.so hivilt/_build_info.json $(BUILD) .venv-gpu .venv-gpu-rehearsal

$(DEPS): requirements-dev.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "make: '$(PYTHON)' is not Python 3.11 or newer; name another with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: '$(PYTHON)' cannot create environments (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "setting up $(VENV): a few minutes at most, once"
	@$(PIP) install -q --no-deps "$(TORCH)+cpu" 2>/dev/null || \
	  $(PIP) install -q --no-deps --index-url https://download.pytorch.org/whl/cpu "$(TORCH)" 2>/dev/null || true
	@$(PIP) install -q --no-compile -r requirements-dev.txt # most of it is never imported
	@touch $@

# The build is run by itself first: pip hides what it prints. The objects are kept in build/, so pip compiles nothing again.
$(BUILD): $(DEPS) setup.py pyproject.toml hivilt/_settings.py $(CPP)
	@HIVILT_STRICT=$(STRICT) $(BIN)/python setup.py -q build_ext --inplace
	@$(PIP) install -q -e . --no-build-isolation --no-deps 2> $(VENV)/install.log || { cat $(VENV)/install.log >&2; exit 1; }
	@touch $@
