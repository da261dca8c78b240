# ghosted_fast for CUDA: PyPI's torch, which brings CUDA's libraries, and the kernels compiled in.
# Building needs no GPU:
#     docker build -f docker/cuda.Dockerfile -t ghosted-fast:0.1.0-cuda .
#     docker run --rm --gpus all -v "$PWD":/work ghosted-fast:0.1.0-cuda doctor

FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt .
# torch first and by its exact version, so that nothing else chooses a build of it. nvcc is not
# taken along.
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" \
    && /venv/bin/pip install --no-cache-dir -c constraints.txt setuptools wheel pybind11 ninja \
    && /venv/bin/pip install --no-cache-dir -c constraints.txt --no-deps --target /nvcc \
    nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY ghosted_fast ghosted_fast
RUN GHOSTED_FAST_BUILD=cuda PYTHONPATH=/nvcc \
    /venv/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation \
    ".[gguf,report,triton]"

FROM python:3.12-slim-bookworm
# Triton compiles what starts its kernels.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ghost && mkdir -m 1777 /cache /work
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH GHOSTED_FAST_CACHE=/cache HF_HOME=/cache/huggingface
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /work
ENTRYPOINT ["ghosted-fast"]
CMD ["--help"]
