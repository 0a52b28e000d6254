# An MLflow server that keeps its runs in PostgreSQL and its artifacts in S3: for compose.yaml and the end-to-end tests.
# Any Python 3.11 on Debian, best by digest (python@sha256:...); dockerfiles/build looks up that of a tag.
ARG BASE_IMAGE=python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b
ARG UV_VERSION=0.13.9

FROM ${BASE_IMAGE}
ARG UV_VERSION
# The secret is there only behind a private authority: certificates to trust while building.
RUN --mount=type=bind,source=requirements.lock,target=/tmp/requirements.lock --mount=type=secret,id=certificates \
    trusted=/run/secrets/certificates; if [ -f $trusted ]; then export SSL_CERT_FILE=$trusted PIP_CERT=$trusted; fi; \
    python3 -m venv /tmp/uv && /tmp/uv/bin/pip install --no-cache-dir --quiet uv==${UV_VERSION} \
    && python3 -m venv --without-pip /opt/mlflow \
    && /tmp/uv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/mlflow/bin/python \
       --constraints /tmp/requirements.lock boto3 mlflow psycopg2-binary==2.9.11 \
    && rm -rf /tmp/uv* && useradd --uid 1000 --create-home mlflow
ARG BASE_IMAGE
ARG GIT_COMMIT=unknown
ARG VERSION=unknown
ENV PATH=/opt/mlflow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
LABEL org.opencontainers.image.base.name=${BASE_IMAGE} \
      org.opencontainers.image.title="MLflow server, for segdistill" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${GIT_COMMIT}
USER 1000
WORKDIR /home/mlflow
RUN export HOME=/tmp/check && python3 -c "import boto3, mlflow.server, psycopg2" && rm -rf /tmp/*
CMD ["mlflow", "server"]
