# The two commands are `make demo` and `make test`; `make` lists the others.
#
#   PYTHON         the interpreter that makes the environment, 3.10 or newer (default python3); 3.11 for the newest torch
#   SLORA_TORCH    2.11: the pair torch 2.11.0 / Triton 3.6.0 in .venv (default); newest: in .venv-newest
#   SLORA_SKIP_EXT 1: install without the C++/CUDA extension
#   PYTEST_ARGS    more arguments for pytest, such as PYTEST_ARGS="-k merge"
#   WORKERS        processes that pytest uses (default 2); 0 runs the tests in one
#   DEMO_ARGS      arguments for `slora demo`
#   CASES          random calls that `make sanitize` tries (default 1000), damaged files that `make mutations` reads

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
SHELL := bash

PYTHON ?= python3
SLORA_TORCH ?= 2.11
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
CASES ?= 1000

ifeq ($(SLORA_TORCH),2.11)
VENV := .venv
CONSTRAINTS := constraints/torch-2.11.txt
OLDEST := 3.10
TORCH := torch 2.11.0
else ifeq ($(SLORA_TORCH),newest)
VENV := .venv-newest
CONSTRAINTS := constraints/newest.txt
OLDEST := 3.11
TORCH := the newest torch
else
$(error SLORA_TORCH=$(SLORA_TORCH) is unknown; use SLORA_TORCH=2.11 (the default) or SLORA_TORCH=newest)
endif

ifndef CUDA_HOME
ifneq ($(wildcard /usr/local/cuda),)
export CUDA_HOME := /usr/local/cuda
endif
endif

# Bytecode is written, whatever the caller's habit: the tests start a hundred processes, and each would compile anew all
# that it imports of torch.
unexport PYTHONDONTWRITEBYTECODE

# Start of a command of the environment; what that command starts in turn (ninja, slora) is found there as well.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/
PIP_LOG := $(VENV)/pip.log
BUILD_LOG := $(VENV)/build.log

# Both environments install this folder in place and share slora/_C*.so, which fits one torch only. The stamp says for
# which environment it was built; building for one removes the stamp of the other.
SKIPPED := $(if $(filter-out 0 false no off,$(SLORA_SKIP_EXT)),-skipped)
BUILT := build/extension-for-$(VENV:.%=%)$(SKIPPED)
NATIVE := $(wildcard csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu)
NATIVE_CHECKS := $(wildcard tests/csrc/*.h tests/csrc/*.cpp)

TRAIN_STAMP := $(VENV)/.installed-train
TEST_STAMP := $(VENV)/.installed-test
TRAIN := slora[train]
TEST := slora[train,test]

# $(call pip_install,what it is,arguments of pip install,environment variables)
define pip_install
@echo "slora: installing $(1) into $(VENV)"
@set -o pipefail; { $(3) $(RUN)python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) $(2) \
	2>&1 1>&3 | tee $(PIP_LOG) >&2; } 3>&1 || { \
	if grep -qiE 'connection broken|max retries|timed? ?out|name resolution|proxyerror|sslerror|http error' $(PIP_LOG); \
	then echo "slora: pip could not reach the package index; check the network, or set PIP_INDEX_URL to an index that can be reached or HTTPS_PROXY to a proxy."; \
	else echo "slora: pip could not install $(1); its message stands above."; fi >&2; exit 1; }
endef

.PHONY: help
help: ## list the targets
	@echo "Targets of this Makefile (variables: see its first lines):"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: say-demo $(TRAIN_STAMP) $(BUILT) ## install into .venv and run `slora demo`
	@$(RUN)slora demo $(DEMO_ARGS)

.PHONY: test
test: say-test $(TEST_STAMP) $(BUILT) run-lint run-tests ## install with the test extra; ruff, format, mypy and all tests

.PHONY: test-only
test-only: say-test-only $(TEST_STAMP) $(BUILT) run-tests ## all tests, without ruff, format and mypy

.PHONY: lint
lint: say-lint $(TEST_STAMP) run-lint ## ruff, format and mypy, without the tests

.PHONY: format
format: say-format $(TEST_STAMP) ## rewrite the sources in the project's format
	@$(RUN)ruff check --fix-only --quiet .
	@$(RUN)ruff format .
	$(if $(NATIVE),@$(RUN)clang-format -i $(NATIVE) $(NATIVE_CHECKS))

.PHONY: sanitize
sanitize: say-sanitize ## the native checks with AddressSanitizer and UndefinedBehaviorSanitizer, CASES=1000 (no torch)
	@mkdir -p build
	@for check in cpu kernel; do $(CXX) -std=c++17 -g -O2 -pthread -w -fsanitize=address,undefined \
		-fno-sanitize-recover=all tests/csrc/check_$$check.cpp $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp)) \
		-o build/check_$$check && echo "slora: check_$$check $(CASES)" && build/check_$$check $(CASES) || exit 1; done

.PHONY: mutations
mutations: say-mutations $(TEST_STAMP) $(BUILT) ## read CASES=1000 damaged files of every kind: a correct load, or an error and nothing changed
	@OMP_NUM_THREADS=1 $(RUN)python -m tests.mutations --cases $(CASES)

.PHONY: measure
measure: say-measure $(TEST_STAMP) $(BUILT) ## run all benchmark cases on the CPU, beside their peers, and write the tables
	@$(RUN)python -m benchmarks run --case all --device cpu
	@$(RUN)python -m benchmarks report

.PHONY: environment
environment: say-environment $(TEST_STAMP) $(BUILT) ## only install, with the test extra

.PHONY: clean
clean: ## remove build outputs and caches; environments stay
	@echo "clean: remove build outputs and caches (the environments stay: rm -r .venv .venv-newest removes them)"
	@rm -rf build dist slora.egg-info slora/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find slora kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The first line of every target that does something: what it is about to do.
INSTALL := install $(TORCH) and slora into $(VENV) where that is not done yet
.PHONY: say-demo say-test say-test-only say-lint say-format say-measure say-sanitize say-mutations say-environment
say-demo:
	@echo "demo: $(INSTALL) (2 to 3 GB to fetch), build what can be built, then run 'slora demo'"
say-test:
	@echo "test: $(INSTALL), then run ruff, ruff format, mypy and all tests"
say-test-only:
	@echo "test-only: $(INSTALL), then run all tests"
say-lint:
	@echo "lint: $(INSTALL), then run ruff, ruff format and mypy"
say-format:
	@echo "format: $(INSTALL), then rewrite the sources in the project's format"
say-measure:
	@echo "measure: $(INSTALL), then run all benchmark cases on the CPU (half an hour or more on 2 cores) and write their tables"
say-sanitize:
	@echo "sanitize: build the checks in tests/csrc with sanitizers and run them; needs only a C++ compiler"
say-mutations:
	@echo "mutations: $(INSTALL), then read damaged adapters and checkpoints (CASES=100000 takes about half an hour)"
say-environment:
	@echo "environment: $(INSTALL), with what the tests need"

.PHONY: run-lint
run-lint:
	@echo "slora: ruff check";  $(RUN)ruff check .
	@echo "slora: ruff format --check"; $(RUN)ruff format --check .
	@echo "slora: mypy"; $(RUN)mypy
	$(if $(NATIVE),@echo "slora: clang-format"; $(RUN)clang-format --dry-run --Werror $(NATIVE) $(NATIVE_CHECKS))

# One thread per process: several processes that each use all cores slow each other down.
.PHONY: run-tests
run-tests:
	@echo "slora: pytest with $(TORCH)"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN)pytest -n $(WORKERS) --dist worksteal --benchmark-disable $(PYTEST_ARGS)

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { echo "slora: no Python was found as '$(PYTHON)'; install Python $(OLDEST) or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST)".split("."))))' || { echo "slora: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), but slora with $(TORCH) needs Python $(OLDEST) or newer; name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "slora: '$(PYTHON)' cannot make environments (its module venv or ensurepip is missing); on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.build-tools: $(CONSTRAINTS) | $(VENV)/.created
	$(call pip_install,build tools,'setuptools>=70.1' ninja pybind11)
	@touch $@

# The extension is built by the rule for $(BUILT), once torch is there.
$(TRAIN_STAMP): pyproject.toml $(CONSTRAINTS) $(VENV)/.build-tools
	$(call pip_install,$(TORCH) and $(TRAIN),--no-build-isolation -e '$(TRAIN:slora%=.%)',SLORA_SKIP_EXT=1)
	@touch $@

$(TEST_STAMP): pyproject.toml $(CONSTRAINTS) $(VENV)/.build-tools
	$(call pip_install,$(TORCH) and $(TEST),--no-build-isolation -e '$(TEST:slora%=.%)',SLORA_SKIP_EXT=1)
	@touch $@ $(TRAIN_STAMP)

$(BUILT): setup.py $(NATIVE) $(VENV)/.build-tools
	@echo "slora: installing slora itself into $(VENV), with its extension where that can be built"
	@rm -f slora/_C*.so build/extension-for-*
	@$(RUN)python -m pip install --verbose --disable-pip-version-check --no-deps --no-build-isolation -e . \
		>$(BUILD_LOG) 2>&1 || { tail -n 40 $(BUILD_LOG); \
		echo "slora: the extension could not be built; the compiler's messages are in $(BUILD_LOG). SLORA_SKIP_EXT=1 installs slora without it."; exit 1; } >&2
	@sed -nE 's/^ *(slora: extension .*)/\1/p' $(BUILD_LOG) | tail -n 1
	@mkdir -p build; touch $@
