# The stages that train, measure, compare and register.
# How to build it: docs/kubeflow.md
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /build
# Empty: the registry's torch, which brings its CUDA libraries and serves nodes with and without a GPU; the driver is
# the node's. Or what uv's --torch-backend knows: cpu leaves CUDA out, torchvision likewise, from PyTorch's own index.
ARG TORCH_BACKEND=
# Names here and in pyproject.toml, versions in requirements.lock. This layer is the large one, and changes rarely.
# The certificates are there only behind a private authority; nothing of this stage but /opt/segdistill goes on.
COPY requirements.lock pyproject.toml certificates.pe[m] ./
RUN if [ -f certificates.pem ]; then export SSL_CERT_FILE=$PWD/certificates.pem PIP_CERT=$PWD/certificates.pem; fi \
    && python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv \
    && python3 -m venv --without-pip /opt/segdistill \
    && /opt/uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
       ${TORCH_BACKEND:+--torch-backend ${TORCH_BACKEND}} \
       --constraints requirements.lock --requirements pyproject.toml boto3 kfp mlflow
COPY README.md LICENSE ./
COPY segdistill segdistill
RUN if [ -f certificates.pem ]; then export SSL_CERT_FILE=$PWD/certificates.pem; fi \
    && /opt/uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
       --build-constraints requirements.lock --no-deps .

FROM ${BASE_IMAGE}
RUN useradd --uid 1000 --create-home segdistill
COPY --from=build /opt/segdistill /opt/segdistill
ARG GIT_COMMIT=unknown
ARG VERSION=unknown
# USER is for libraries that ask for a name, where a container runs as a user that /etc/passwd does not know.
ENV PATH=/opt/segdistill/bin:$PATH \
    USER=segdistill \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SEGDISTILL_GIT_COMMIT=${GIT_COMMIT} \
    MPLCONFIGDIR=/tmp/matplotlib \
    MLFLOW_DISABLE_TELEMETRY=true
LABEL org.opencontainers.image.title="segdistill, training stages" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${GIT_COMMIT}
USER 1000
WORKDIR /home/segdistill
# The image is good if what its stages and KFP's executor import is there.
RUN export HOME=/tmp/check \
    && python3 -c "import mlflow.pytorch, kfp.dsl.executor_main" \
    && python3 -c "import segdistill.methods, segdistill.engine.trainer, segdistill.models.segmenter" \
    && python3 -m segdistill distill --help > /dev/null \
    && rm -rf /tmp/*
