# Rectify with its pinned set: the image of 'rectify submit --kuberay'.
#
# CPU:   docker build -t rectify:0.1.0 --build-arg INDEX=https://download.pytorch.org/whl/cpu .
# CUDA:  docker build -t rectify:0.1.0-cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
#
# Any Debian or Ubuntu with Python 3.11 or newer does as BASE. PyPI's torch brings CUDA's libraries
# itself; take a -devel image where a DeepSpeed operator is to be compiled. INDEX is one more package
# index, for torch without CUDA.

ARG BASE=python:3.11-slim
FROM ${BASE}
ARG INDEX=

# A compiler for torch.compile; wget, by which KubeRay asks Ray for its health.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates git wget \
    && if ! command -v python3 > /dev/null; then \
         apt-get install -y --no-install-recommends python3 python3-dev python3-venv; fi \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/rectify PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV PATH=${VIRTUAL_ENV}/bin:${PATH}
RUN python3 -m venv ${VIRTUAL_ENV}

WORKDIR /opt/rectify-src
COPY constraints.txt ./
# torch first and alone: any other package's wider range would fetch another build of it.
RUN pip install ${INDEX:+--extra-index-url ${INDEX}} "$(head -n 1 constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
COPY distill distill
COPY recipes recipes
COPY rewards rewards
COPY rl rl
COPY rollout rollout
RUN pip install ${INDEX:+--extra-index-url ${INDEX}} -c constraints.txt . && rectify doctor

# A login shell has a PATH of its own.
RUN ln -s ${VIRTUAL_ENV}/bin/ray ${VIRTUAL_ENV}/bin/rectify /usr/local/bin/
WORKDIR /work
CMD ["rectify", "--help"]
