# The steps that touch the data set: fetch, validate and prepare. No torch.
# How to build it: docs/kubeflow.md
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /build
# Names here, versions in requirements.lock: whatever these names pull in is held to the lock.
# The certificates are there only behind a private authority; nothing of this stage but /opt/segdistill goes on.
COPY requirements.lock certificates.pe[m] ./
RUN if [ -f certificates.pem ]; then export SSL_CERT_FILE=$PWD/certificates.pem PIP_CERT=$PWD/certificates.pem; fi \
    && python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv \
    && python3 -m venv --without-pip /opt/segdistill \
    && /opt/uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
       --constraints requirements.lock \
       boto3 configobj great-expectations kfp mlflow numpy pandas pillow pyarrow pydantic pyyaml rich
COPY pyproject.toml README.md LICENSE ./
COPY segdistill segdistill
RUN if [ -f certificates.pem ]; then export SSL_CERT_FILE=$PWD/certificates.pem; fi \
    && /opt/uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
       --build-constraints requirements.lock --no-deps .

FROM ${BASE_IMAGE}
# git reads data.dvc of a revision.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends git ca-certificates > /dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && useradd --uid 1000 --create-home segdistill
COPY --from=build /opt/segdistill /opt/segdistill
ARG GIT_COMMIT=unknown
ARG VERSION=unknown
# USER is for libraries that ask for a name, where a container runs as a user that /etc/passwd does not know.
ENV PATH=/opt/segdistill/bin:$PATH \
    USER=segdistill \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SEGDISTILL_GIT_COMMIT=${GIT_COMMIT} \
    GX_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true
LABEL org.opencontainers.image.title="segdistill, data stages" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${GIT_COMMIT}
USER 1000
WORKDIR /home/segdistill
# The image is good if what its stages and KFP's executor import is there, and torch is not.
RUN export HOME=/tmp/check && git --version > /dev/null \
    && python3 -c "import great_expectations, mlflow, kfp.dsl.executor_main" \
    && python3 -c "import segdistill.execution, segdistill.data.sharding, segdistill.adapters.gx" \
    && python3 -c "import segdistill.adapters.dvc_remote" \
    && python3 -c "import importlib.util; assert not importlib.util.find_spec('torch')" \
    && python3 -m segdistill prepare --help > /dev/null \
    && rm -rf /tmp/*
