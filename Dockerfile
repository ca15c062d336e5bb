# The project with its environment, for cluster/kuberay.yaml or any machine with containers. In the project's folder:
#   docker build --tag hificl-lab .                               for NVIDIA's GPUs (and CPUs)
#   docker build --tag hificl-lab:cpu --build-arg TORCH=cpu .     without CUDA's libraries
# CUDA comes as Python packages, so both stand on one base; a node brings NVIDIA's driver. `make test-image` checks it.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# gcc and libc6-dev: Triton compiles for the GPU in hand; git: a record names the commit; wget: KubeRay's health checks
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /hificl-lab
# What decides the packages comes first: a change of code alone installs nothing anew.
COPY Makefile requirements.txt pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY pipeline/__init__.py pipeline/
COPY stages/__init__.py stages/
COPY benchmarks/__init__.py benchmarks/
ARG TORCH=
ENV UV_NO_CACHE=1
RUN make setup "TORCH=${TORCH}"
COPY . .

# a login shell, which KubeRay may start, sets PATH anew
# hadolint ignore=SC2016
RUN echo 'export PATH=/hificl-lab/.venv/bin:$PATH' > /etc/profile.d/hificl.sh \
    && useradd --uid 1000 --create-home hificl \
    && mkdir /work && chown hificl /work
ENV PATH=/hificl-lab/.venv/bin:$PATH PYTHONPATH=/hificl-lab OMP_NUM_THREADS=1 \
    RAY_USAGE_STATS_ENABLED=0 DVC_NO_ANALYTICS=1 MLFLOW_DISABLE_TELEMETRY=true
USER 1000
WORKDIR /work
CMD ["hificl", "--help"]
