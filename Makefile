# `make demo` shows what this does here, with a GPU or without; `make test` passes the tests. Both set up all they need.

# Python 3.10 to 3.13; for `make test` 3.11 and later, as SGLang wants.
PYTHON ?= python3
VENV ?= .venv
# Installed first. With another CUDA version or driver: `make demo TORCH=torch==2.9.1`.
TORCH ?= torch==2.13.0
# Test processes at a time.
JOBS ?= auto

RUN := $(VENV)/bin
# FlashInfer's JIT calls ninja, which is in there.
export PATH := $(abspath $(VENV))/bin:$(PATH)

CUDA_SOURCES := $(wildcard csrc/* fi_prefetch/bench/*.cu tests/gpu/*.cu tests/emulator/*.h tests/emulator/*.cuh)
# One kernel through FlashInfer's JIT, and all that touches its API.
OLDER_TESTS := 'tests/cpu/test_compile.py::test_instructions[sm90a-q_bf16_kv_bf16_o_bf16_hd64_swa0_cap0]' \
    tests/cpu/test_api.py tests/cpu/test_dispatch.py tests/cpu/test_jit.py tests/cpu/test_wrapper.py
OLDER_TOOLS := $(abspath $(VENV))/for-older-flashinfer

.PHONY: demo test test-older test-gpu lint format dist docs refresh clean

demo: $(VENV)/made-from
	$(RUN)/fi-prefetch demo

# No process is started for one that crashed: by groups, pytest-xdist would wait for the crashed one's tests for ever.
test: $(VENV)/made-from
	$(RUN)/python tests/sglang/make_env.py
	$(RUN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --max-worker-restart 0 --dist loadgroup \
	    tests/cpu tests/sglang

# The wrapper on the older FlashInfer releases it supports, 0.6.14 and 0.7.2: those beside the SGLangs that are tested.
OLDER := test-older-0.5.16 test-older-0.5.23
.PHONY: $(OLDER)
test-older: $(VENV)/made-from
	$(RUN)/python tests/sglang/make_env.py
	test -d $(OLDER_TOOLS) || $(RUN)/pip install --quiet --target $(OLDER_TOOLS) \
	    pytest pytest-xdist hypothesis ninja nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(MAKE) --jobs 2 --output-sync $(OLDER)

$(OLDER): test-older-%:
	PATH="$(OLDER_TOOLS)/bin:$$PATH" PYTHONPATH=$(OLDER_TOOLS) \
	    tests/sglang/.venv/$*/bin/python -m pytest -p no:cacheprovider $(OLDER_TESTS)

# Needs a GPU. Add `--record` by hand: `.venv/bin/fi-prefetch check --record`.
test-gpu: $(VENV)/made-from
	$(RUN)/fi-prefetch check

lint: $(VENV)/made-from
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy
	$(RUN)/clang-format --dry-run --Werror $(CUDA_SOURCES)

format: $(VENV)/made-from
	$(RUN)/ruff check --fix
	$(RUN)/ruff format
	$(RUN)/clang-format -i $(CUDA_SOURCES)

# Wheel and sdist in dist/, of the version that the tag says.
dist: $(VENV)/made-from
	$(RUN)/python -m build

# The site in build/docs. A warning is an error: a link that leads nowhere, a name that the API does not have.
docs: $(VENV)/made-docs-from
	$(RUN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

# After new measurements or a changed command line: the tables, plots, screens and pictures of README and docs/.
refresh: $(VENV)/made-from
	$(RUN)/python docs/refresh.py

clean:
	rm -rf $(VENV) build dist *.egg-info tests/sglang/.venv

# PyTorch comes first and alone: what is installed after it must not choose another build of it.
$(VENV)/made-from: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install $(TORCH)
	$(RUN)/pip install --editable '.[test,plots]'
	touch $@

$(VENV)/made-docs-from: $(VENV)/made-from
	$(RUN)/pip install --editable '.[docs]'
	touch $@
