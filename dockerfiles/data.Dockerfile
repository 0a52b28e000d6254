# The steps that touch the data set: fetch, validate and prepare. No torch.
# How to build it: docs/kubeflow.md
# Any Python 3.11 on Debian, best by digest (python@sha256:...); dockerfiles/build looks up that of a tag.
ARG BASE_IMAGE=python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b
ARG UV_VERSION=0.13.9

# What changes rarely, in a layer of its own. uv comes and goes within it.
FROM ${BASE_IMAGE} AS libraries
ARG UV_VERSION
# git reads data.dvc of a revision.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends git ca-certificates > /dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
# Names here, versions and hashes in requirements.lock: whatever these names pull in is held to the lock.
# The secret is there only behind a private authority: certificates to trust while building.
RUN --mount=type=bind,source=requirements.lock,target=/tmp/requirements.lock --mount=type=secret,id=certificates \
    trusted=/run/secrets/certificates; if [ -f $trusted ]; then export SSL_CERT_FILE=$trusted PIP_CERT=$trusted; fi; \
    python3 -m venv /tmp/uv && /tmp/uv/bin/pip install --no-cache-dir --quiet uv==${UV_VERSION} \
    && python3 -m venv --without-pip /opt/segdistill \
    && /tmp/uv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
       --constraints /tmp/requirements.lock \
       boto3 configobj great-expectations jinja2 kfp mlflow numpy pandas pillow pyarrow pydantic pyyaml rich scipy tifffile \
    && rm -rf /tmp/uv*

FROM libraries AS package
ARG UV_VERSION
WORKDIR /build
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY segdistill segdistill
RUN --mount=type=secret,id=certificates \
    trusted=/run/secrets/certificates; if [ -f $trusted ]; then export SSL_CERT_FILE=$trusted PIP_CERT=$trusted; fi; \
    python3 -m venv /tmp/uv && /tmp/uv/bin/pip install --no-cache-dir --quiet uv==${UV_VERSION} \
    && /tmp/uv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/segdistill/bin/python \
       --build-constraints requirements.lock --no-deps --prefix /package .

FROM libraries
RUN useradd --uid 1000 --create-home segdistill
COPY --from=package /package /opt/segdistill
ARG BASE_IMAGE
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
LABEL org.opencontainers.image.base.name=${BASE_IMAGE} \
      org.opencontainers.image.title="segdistill, data stages" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${GIT_COMMIT}
USER 1000
WORKDIR /home/segdistill
# The image is good if what its stages and KFP's executor import is there, and torch is not.
RUN export HOME=/tmp/check && git --version > /dev/null \
    && python3 -c "import great_expectations, mlflow, kfp.dsl.executor_main" \
    && python3 -c "import segdistill.kubeflow.tasks, segdistill.data.sharding, segdistill.adapters.gx" \
    && python3 -c "import segdistill.adapters.dvc_remote" \
    && python3 -c "import importlib.util; assert not importlib.util.find_spec('torch')" \
    && python3 -m segdistill prepare --help > /dev/null \
    && rm -rf /tmp/*
