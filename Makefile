# make setup | demo | test | test-mutants | lint | types | format | bench | cuda | wheel | clean
# Everything is installed into .venv; a second run finds it there.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh \
  csrc/*/*/*.cpp csrc/*/*/*.h)
CLANG_SOURCES = $(SOURCES) $(wildcard tests/*/*.cpp tests/*/*.h benchmarks/*.cpp)
NVCC_PACKAGES := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl

.PHONY: setup demo test test-mutants lint types format bench cuda wheel clean assets
.DELETE_ON_ERROR:

setup: .venv/.installed assets

# torch first and by its exact version, so that nothing else chooses a build of it.
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel pybind11 ninja
	touch $@

.venv/.installed: .venv/.torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python \
	  "$$(grep -o '^ttsem==[0-9.]*' constraints.txt)"
	touch $@

assets: .venv/.installed
	@$(BIN)/python -c "from ghosted_fast.assets import fetch_demo_assets; fetch_demo_assets()"

demo: setup
	$(BIN)/ghosted-fast demo --output demo

# nvcc, for the build of the CUDA kernels and their machine code; no GPU is needed.
.venv/.nvcc: .venv/.torch constraints.txt
	command -v nvcc >/dev/null || [ -n "$$CUDACXX$$CUDA_HOME" ] || \
	  $(BIN)/python -m pip install --quiet -c constraints.txt $(NVCC_PACKAGES)
	touch $@

test: setup .venv/.nvcc
	$(BIN)/python -m pytest -n auto --dist loadgroup

test-mutants: setup .venv/.nvcc
	$(BIN)/python tests/mutants/run.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CLANG_SOURCES)

types: .venv/.installed
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_SOURCES)

# Less than 15 minutes on two cores. Nothing else should run beside it.
bench: setup
	for bench in gram_update ghost_apply ghost_solve; do \
	  $(BIN)/python benchmarks/bench_$$bench.py --threads 1 2 || exit 1; done
	$(BIN)/python benchmarks/bench_calibration.py
	$(BIN)/python benchmarks/bench_generate.py --repeats 20 --new-tokens 16 --prompt-length 256
	$(BIN)/python benchmarks/picture.py

cuda: .venv/.installed .venv/.nvcc
	GHOSTED_FAST_BUILD=cuda $(BIN)/python -m pip install --quiet -c constraints.txt \
	  --no-build-isolation -e ".[dev]"
	$(BIN)/ghosted-fast doctor

wheel: .venv/.installed
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .

clean:
	rm -rf .venv build dist *.egg-info ghosted_fast/*.so demo
