# ghosted_fast for processors, x86-64 or ARM64:
#     docker build -f docker/cpu.Dockerfile --build-arg TORCH_INDEX=... -t ghosted-fast:0.1.0 .
#     docker run --rm -v "$PWD":/work ghosted-fast:0.1.0 doctor
# TORCH_INDEX is the index of torch's builds for processors, which torch's own page on installing
# names. Without it torch is PyPI's, which on x86-64 is a build for CUDA, and large.

FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
ARG TORCH_INDEX=
COPY constraints.txt .
# torch first and by its exact version, so that nothing else chooses a build of it.
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir "$(grep '^torch==' constraints.txt)" \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    && /venv/bin/pip install --no-cache-dir -c constraints.txt setuptools wheel pybind11 ninja
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY ghosted_fast ghosted_fast
RUN GHOSTED_FAST_BUILD=cpu \
    /venv/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation ".[gguf,report]"

FROM python:3.12-slim-bookworm
RUN useradd --uid 1000 --create-home ghost && mkdir -m 1777 /cache /work
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH GHOSTED_FAST_CACHE=/cache HF_HOME=/cache/huggingface
USER 1000
WORKDIR /work
ENTRYPOINT ["ghosted-fast"]
CMD ["--help"]
