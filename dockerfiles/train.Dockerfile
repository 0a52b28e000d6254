# The stages that train, measure, compare and register.
# How to build it: docs/kubeflow.md
# The locked torch brings its own CUDA libraries, so this base serves GPU nodes too; the driver is the node's.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv \
    && python3 -m venv --without-pip /opt/segdistill
WORKDIR /build
# Names here and in pyproject.toml, versions in requirements.lock. This layer is the large one, and changes rarely.
COPY requirements.lock pyproject.toml ./
RUN /opt/uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
    --constraints requirements.lock --requirements pyproject.toml boto3 kfp mlflow
COPY README.md LICENSE ./
COPY segdistill segdistill
RUN /opt/uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
    --build-constraints requirements.lock --no-deps .

FROM ${BASE_IMAGE}
RUN useradd --uid 1000 --create-home segdistill
COPY --from=build /opt/segdistill /opt/segdistill
ARG GIT_COMMIT=unknown
ENV PATH=/opt/segdistill/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SEGDISTILL_GIT_COMMIT=${GIT_COMMIT} \
    MPLCONFIGDIR=/tmp/matplotlib \
    MLFLOW_DISABLE_TELEMETRY=true
LABEL org.opencontainers.image.title="segdistill, training stages" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision=${GIT_COMMIT}
USER 1000
WORKDIR /home/segdistill
# The image is good if what its stages and KFP's executor import is there.
RUN python3 -c "import mlflow.pytorch, kfp.dsl.executor_main" \
    && python3 -c "import segdistill.methods, segdistill.engine.trainer, segdistill.models.segmenter" \
    && python3 -m segdistill distill --help > /dev/null
