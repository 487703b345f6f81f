# `make demo` and `make test` do all set-up themselves: they need python3 (3.11 or later) with venv, and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
SOURCES := pyproject.toml CMakeLists.txt $(shell find cpp jax_flash -type f -not -name '*.pyc')

.PHONY: demo test lint format bench test-sanitize test-gpu test-sanitizer-gpu bench-gpu wheel clean

# The extra `lint` has all others in it, so that one environment serves every target.
$(VENV)/installed: $(SOURCES)
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet '.[lint]'
	touch $@

demo: $(VENV)/installed  ## trains a small GPT on the Python standard library
	$(VENV)/bin/python examples/train_gpt.py --out out

test: $(VENV)/installed  ## the whole test suite
	$(VENV)/bin/pytest -n auto

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(find cpp -name '*.h' -o -name '*.cc' -o -name '*.cuh')
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(find cpp -name '*.h' -o -name '*.cc' -o -name '*.cuh')

bench: $(VENV)/installed  ## the CPU table of the README
	$(VENV)/bin/python -m benchmarks.run --group cpu --out out/cpu.json --plot out/cpu.png

# AddressSanitizer and UndefinedBehaviorSanitizer over the tests that run the kernels, in an environment of its own.
SANITIZED = $(VENV)-sanitize
SANITIZED_TESTS = tests/test_attention.py tests/test_varlen.py tests/test_paged.py tests/test_dropout.py \
                  tests/test_flash_api.py tests/test_robustness.py tests/test_properties.py
test-sanitize:
	test -x $(SANITIZED)/bin/pip || $(PYTHON) -m venv $(SANITIZED)
	$(SANITIZED)/bin/pip install --quiet -C cmake.define.JAX_FLASH_SANITIZE=ON -C build-dir=build/sanitize '.[test]'
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(SANITIZED)/bin/pytest -n auto -p no:cacheprovider $(SANITIZED_TESTS)

# What needs an NVIDIA GPU, in an environment of its own. CUDA=cuda12 or cuda13: the extra that brings JAX's plugin.
GPU = $(VENV)-gpu
CUDA ?= cuda13
GPU_WORKERS ?= 6
GPU_OPTIONS ?=
GPU_TESTS = tests/test_attention.py tests/test_varlen.py tests/test_paged.py tests/test_dropout.py \
            tests/test_flash_api.py tests/test_properties.py tests/test_robustness.py tests/test_transforms.py \
            tests/test_cuda.py

# Fails where JAX sees no GPU: all of the tests would be skipped.
$(GPU)/installed: $(SOURCES)
	test -x $(GPU)/bin/pip || $(PYTHON) -m venv $(GPU)
	$(GPU)/bin/pip install --quiet '.[test,benchmarks,$(CUDA)]'
	$(GPU)/bin/python -P -c 'import jax; jax.devices("cuda")'
	touch $@

test-gpu: $(GPU)/installed  ## the half of the tests that runs on the GPU, which the workers share
	$(GPU)/bin/pytest -n $(GPU_WORKERS) $(GPU_OPTIONS) -k 'cuda and not 2_to_31' $(GPU_TESTS)
	$(GPU)/bin/pytest $(GPU_OPTIONS) -k 'cuda and 2_to_31' tests/test_cuda.py  # one by one: each takes much of the memory

# compute-sanitizer's four tools over a small subset of everything.
test-sanitizer-gpu: $(GPU)/installed
	$(GPU)/bin/pip install --quiet 'nvidia-cuda-sanitizer-api>=13.5'
	$(GPU)/bin/python -P tests/sanitizer_subset.py

bench-gpu: $(GPU)/installed  ## the GPU table and the host's cost; PyTorch and FlashAttention-4 (flash-attn-4) are peers where they are installed
	$(GPU)/bin/python -m benchmarks.run --group hopper --out out/hopper.json --plot out/hopper.png
	$(GPU)/bin/python -m benchmarks.host --out out/host.json

wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(SANITIZED) $(GPU) build dist out
