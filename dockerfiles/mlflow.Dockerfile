# An MLflow server that keeps its runs in PostgreSQL and its artifacts in S3: for compose.yaml and the end-to-end tests.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /build
COPY requirements.lock certificates.pe[m] ./
RUN if [ -f certificates.pem ]; then export SSL_CERT_FILE=$PWD/certificates.pem PIP_CERT=$PWD/certificates.pem; fi \
    && python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv \
    && python3 -m venv --without-pip /opt/mlflow \
    && /opt/uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/mlflow/bin/python \
       --constraints requirements.lock boto3 mlflow psycopg2-binary==2.9.11

FROM ${BASE_IMAGE}
RUN useradd --uid 1000 --create-home mlflow
COPY --from=build /opt/mlflow /opt/mlflow
ARG GIT_COMMIT=unknown
ARG VERSION=unknown
ENV PATH=/opt/mlflow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MLFLOW_DISABLE_TELEMETRY=true
LABEL org.opencontainers.image.title="MLflow server, for segdistill" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${GIT_COMMIT}
USER 1000
WORKDIR /home/mlflow
RUN export HOME=/tmp/check && python3 -c "import boto3, mlflow.server, psycopg2" && rm -rf /tmp/*
CMD ["mlflow", "server"]
