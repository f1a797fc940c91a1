# make test      checks, build, tests on the CPU (no GPU needed; the first run makes .venv)
# make demo      quantizes the bundled model and reports on it
# make gpu-test  the tests that need a CUDA device, then compute-sanitizer over the small ones
# make help      the rest
#
# NO_VENV=1 uses PYTHON and its packages as they are, for machines without a network.

PYTHON  ?= python3
VENV    ?= .venv
NO_VENV ?=
# Newest and oldest target: between them every branch on the architecture is compiled (for the oldest to PTX, which spares
# the assembler's time). A plain `pip install .` builds all.
TEST_ARCHS  ?= 80-virtual;90a
GPU_ARCHS   ?= native
GPU         ?= h200
SANITIZER   ?= compute-sanitizer
PYTEST_ARGS ?=
WORKERS     ?= 2

ifeq ($(NO_VENV),)
PY      := $(VENV)/bin/python
INSTALL := $(VENV)/.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)
else
PY      := $(PYTHON)
INSTALL := editable
endif

NVCC    := $(or $(CUDACXX),$(shell command -v nvcc))
HAS_GPU := $(shell command -v nvidia-smi)
SOURCES := pyquant kernels tests benchmarks setup.py
CXX_SOURCES := $(wildcard csrc/*.cu csrc/*.cuh csrc/*.cpp csrc/*.h)

.PHONY: help venv install editable ext lint format test pytest pytest-triton demo gpu-test gpu-sanitize gpu-bench clean
.DEFAULT_GOAL := help

help:
	@echo 'venv           $(VENV) with everything the tests need, the package installed from this folder'
	@echo 'ext            rebuild pyquant/_C, compiling only what changed (PYQUANT_CUDA_ARCHS=90a for one target)'
	@echo 'lint, format   ruff, clang-format, mypy'
	@echo 'test           lint, ext, pytest, pytest-triton'
	@echo 'demo           pyquant demo --out demo-out'
	@echo 'gpu-test       pytest -m gpu, then memcheck over "gpu and small" (SANITIZER= leaves it out)'
	@echo 'gpu-bench      measure the linear kernels; the numbers go to benchmarks/results/$(GPU)/'
	@echo 'clean          remove what was built, not $(VENV)'

# ---- environment -----------------------------------------------------------------------------------------------------

venv install: $(INSTALL)

# torch: the pinned version on a CPU machine (a CPU build where pip's settings offer one), any version where there is an
# NVIDIA GPU, whose driver decides. A CUDA build of torch brings its own triton; the pin is for those that bring none.
# The extension is left out here and built by `ext`, which keeps its objects between runs; pip starts from nothing.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	grep -v -E '^($(if $(HAS_GPU),torch|setuptools|)triton)==' constraints.txt > $(VENV)/constraints.txt
	$(PY) -m pip install -q -c $(VENV)/constraints.txt torch setuptools scikit-build-core pybind11 ninja cmake
	test -d $(VENV)/lib/python*/site-packages/triton || grep '^triton==' constraints.txt >> $(VENV)/constraints.txt
	PYQUANT_SKIP_CUDA=1 $(PY) -m pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e '.[test,triton]'
	touch $@

editable:
	PYQUANT_SKIP_CUDA=1 $(PY) -m pip install -q --no-build-isolation --no-deps -e .

ext: $(INSTALL)
ifneq ($(NVCC),)
	cmake -S . -B build/ext -G Ninja -DCMAKE_INSTALL_PREFIX='$(CURDIR)' -DPython_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')" \
	    -DPYQUANT_CUDA_ARCHS='$(or $(PYQUANT_CUDA_ARCHS),$(TEST_ARCHS))'
	cmake --build build/ext
	cmake --install build/ext
else
	@echo 'no nvcc: the CUDA extension is left out'
endif

# ---- checks ----------------------------------------------------------------------------------------------------------

lint: $(INSTALL)
	ruff check $(wildcard $(SOURCES))
	ruff format --check $(wildcard $(SOURCES))
	clang-format --dry-run -Werror $(CXX_SOURCES)
	mypy

format: $(INSTALL)
	ruff check --fix $(wildcard $(SOURCES))
	ruff format $(wildcard $(SOURCES))
	clang-format -i $(CXX_SOURCES)

pytest: $(INSTALL)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m 'not gpu' --ignore-glob='tests/test_triton_*.py' $(PYTEST_ARGS)

# Triton reads the variable when it is imported, so its tests run in a process of their own.
pytest-triton: $(INSTALL)
ifneq ($(wildcard tests/test_triton_*.py),)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m 'not gpu' $(sort $(wildcard tests/test_triton_*.py)) $(PYTEST_ARGS)
endif

# One after the other also under `make -j`: the tests need the extension that was just built.
test:
	$(MAKE) lint
	$(MAKE) ext
	$(MAKE) pytest
	$(MAKE) pytest-triton

demo: $(INSTALL)
	$(if $(NO_VENV),pyquant,$(VENV)/bin/pyquant) demo --out demo-out

# ---- on a GPU machine ------------------------------------------------------------------------------------------------

gpu-test:
	$(MAKE) ext PYQUANT_CUDA_ARCHS='$(or $(PYQUANT_CUDA_ARCHS),$(GPU_ARCHS))'
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)
	$(if $(SANITIZER),$(MAKE) gpu-sanitize)

# torch hands out pieces of large blocks; without its cache every tensor is an allocation whose ends memcheck can see.
gpu-sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --error-exitcode 1 --target-processes all \
	    $(PY) -m pytest -m 'gpu and small' --timeout 0 $(PYTEST_ARGS)

gpu-bench:
	$(PY) -m benchmarks.run --family linear --out benchmarks/results/$(GPU)/linear.json

clean:
	rm -rf build dist *.egg-info pyquant/_C.*.so demo-out .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find pyquant kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
