# ccam-deploy on a server with an NVIDIA GPU. The driver must support CUDA 13.
#
#   docker build --tag ccam-deploy .
#   docker run --rm --gpus all ccam-deploy doctor
#   docker run --rm --gpus all --user "$(id -u)" --volume "$PWD:/data" \
#       ccam-deploy explain engines/model photos --output maps
#
# EXTRAS=gpu-onnxruntime leaves TensorRT out.

ARG CUDA=13.0.1
ARG UBUNTU=24.04

# The compiler and CUDA's headers, for PyCUDA, which has no wheels
FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS build
ARG EXTRAS=gpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/ccam-deploy
ENV PATH=/opt/ccam-deploy/bin:/usr/local/cuda/bin:$PATH \
    LIBRARY_PATH=/usr/local/cuda/lib64/stubs \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY . .
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

# cuDNN comes with the wheels; CUDA's own libraries are for PyCUDA
FROM nvidia/cuda:${CUDA}-runtime-ubuntu${UBUNTU}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="ccam-deploy" \
      org.opencontainers.image.description="Explanations of image classifiers at inference speed" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.authors="The ccam-deploy developers"
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ccam \
    && install --directory --owner ccam /data
COPY --from=build /opt/ccam-deploy /opt/ccam-deploy
ENV PATH=/opt/ccam-deploy/bin:$PATH \
    PYTHONUNBUFFERED=1
# A number, so that Kubernetes can tell that it is not root
USER 10001
WORKDIR /data
ENTRYPOINT ["ccam-deploy"]
CMD ["--help"]
