# Four images of one release: `worker` (workers, scheduler, migrations), `api` (the API at home),
# `commands` (with what reports need) and `flower`. Each is a slim Python with one environment
# copied in; compilers, pip's leftovers and this source tree stay behind.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY nightreel nightreel
COPY scheduler scheduler
COPY workers workers
COPY storage storage
COPY clipserver clipserver
RUN python -m pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.11.14-slim-bookworm AS environment
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY deploy/constraints.txt /constraints.txt
COPY --from=build /wheels /wheels
RUN python -m venv /opt/nightreel
RUN /opt/nightreel/bin/pip install --constraint /constraints.txt /wheels/*.whl

FROM environment AS environment-commands
RUN /opt/nightreel/bin/pip install --constraint /constraints.txt "$(echo /wheels/*.whl)[reports]"

FROM environment AS environment-api
RUN /opt/nightreel/bin/pip install --constraint /constraints.txt "$(echo /wheels/*.whl)[local]"

FROM environment AS environment-flower
RUN /opt/nightreel/bin/pip install --constraint /constraints.txt flower

FROM python:3.11.14-slim-bookworm AS base
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="nightreel" \
      org.opencontainers.image.description="Classify the scenes of a large video archive overnight" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number of its own, so that it is no user of the host, and the same in every image.
RUN groupadd --gid 10001 nightreel \
 && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin nightreel
ENV PATH=/opt/nightreel/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# Empty: Celery puts the working directory first on its path.
WORKDIR /home/nightreel
USER 10001:10001

FROM base AS commands
COPY --from=environment-commands /opt/nightreel /opt/nightreel
ENTRYPOINT ["nightreel"]
CMD ["--help"]

FROM base AS api
COPY --from=environment-api /opt/nightreel /opt/nightreel
EXPOSE 9001
# Fetching the weights comes first.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9001/readiness', timeout=5)"]
CMD ["python", "-m", "clipserver", "--host", "0.0.0.0"]

FROM base AS flower
COPY --from=environment-flower /opt/nightreel /opt/nightreel
EXPOSE 5555
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:5555/healthcheck', timeout=5)"]
CMD ["celery", "-A", "workers.app", "flower", "--address=0.0.0.0"]

# Last, so that it is what `docker build .` makes.
FROM base AS worker
COPY --from=environment /opt/nightreel /opt/nightreel
# A process a core: threads of the linear algebra would only take from each other.
ENV OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 \
    NIGHTREEL_METRICS_PORT=9102
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:9102/metrics', timeout=5)"]
CMD ["celery", "-A", "workers.app", "worker", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
