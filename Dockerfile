# syntax=docker/dockerfile:1
# One image for workers, MLflow and optuna-dashboard. Models and data are mounted, never inside.
#   docker build -t lora-search:cpu .
#   docker build -t lora-search:cuda --build-arg VARIANT=cuda .
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
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

FROM python:${PYTHON}-slim-bookworm
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
