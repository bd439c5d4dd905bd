# syntax=docker/dockerfile:1@sha256:ecfaec9ed6d810b56388c508f4121597bfbba70d41a6dfeee4d8cad5f295fc32
# One image for workers, MLflow and optuna-dashboard. Models and data are mounted, never inside.
#   docker build -t lora-search:cpu .
#   docker build -t lora-search:cuda --build-arg VARIANT=cuda .
# A digest names the index of an image for all platforms; the tag before it only tells people which version that is.
# SECURITY.md says where the digests come from. To renew one, write down what this prints as "Digest", with its tag:
#   docker buildx imagetools inspect python:3.11-slim-bookworm
ARG PYTHON=python:3.11.17-slim-bookworm@sha256:0a310eeecf4e1f5a0743f9a6520c90c88d089c903ca5fd283f501e3a805f5f89

FROM ${PYTHON} AS build
ARG VARIANT=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# PyTorch's wheel on PyPI is the one for CUDA; the one for CPUs, a tenth of its size, is on its own index. Alone and
# without dependencies, so that nothing else is ever taken from there.
RUN case "$VARIANT" in \
      cpu) torch="$(sed -n 's/^torch==//p' constraints.txt)" && \
           pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==${torch}+cpu" ;; \
      cuda) ;; \
      *) echo "VARIANT must be cpu or cuda, but is '$VARIANT'" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY search search
COPY trainer trainer
COPY studies studies
RUN pip install --constraint constraints.txt '.[server]' && pip check

FROM ${PYTHON}
ARG VARIANT=cpu
LABEL org.opencontainers.image.title="lora-search" \
      org.opencontainers.image.licenses="Apache-2.0" \
      lora-search.variant="${VARIANT}"
# The folders are made here so that new volumes mounted on them belong to the user.
RUN groupadd --gid 10001 search && useradd --uid 10001 --gid search --create-home search \
    && mkdir -p /runs /cache /models /mlflow /data && chown search:search /runs /cache /models /mlflow
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_WAIT_POLICY=PASSIVE \
    LORA_SEARCH_CACHE=/cache \
    HF_HOME=/models \
    MPLCONFIGDIR=/tmp/matplotlib \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=true \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER search
WORKDIR /runs
CMD ["python", "-m", "search.run", "--help"]
