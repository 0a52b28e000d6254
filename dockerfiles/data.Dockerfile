# The stages that touch the data set: validate and prepare. No torch.
# How to build it: docs/kubeflow.md
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv \
    && python3 -m venv --without-pip /opt/segdistill
WORKDIR /build
# Names here, versions in requirements.lock: whatever these names pull in is held to the lock.
COPY requirements.lock ./
RUN /opt/uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
    --constraints requirements.lock \
    great-expectations kfp mlflow numpy pandas pillow pyarrow pydantic pyyaml rich
COPY pyproject.toml README.md LICENSE ./
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
    GX_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true
LABEL org.opencontainers.image.title="segdistill, data stages" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision=${GIT_COMMIT}
USER 1000
WORKDIR /home/segdistill
# The image is good if what its stages and KFP's executor import is there, and torch is not.
RUN python3 -c "import great_expectations, mlflow, kfp.dsl.executor_main" \
    && python3 -c "import segdistill.execution, segdistill.data.sharding, segdistill.adapters.gx" \
    && python3 -c "import importlib.util; assert not importlib.util.find_spec('torch')" \
    && python3 -m segdistill prepare --help > /dev/null
