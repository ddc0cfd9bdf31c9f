# The daemon's image, and the shim for engine images (--target shim). docs/image.md says what is in them, and why.
#
#   docker buildx build --build-arg CUDA=13 --tag weightd:cuda13 .     or 12, or none

# A tag of a series, so that a rebuild takes the fixes of its Python and its Debian. To have the same base every time:
# --build-arg BASE=docker.io/library/python:3.13-slim-trixie@sha256:...
ARG BASE=docker.io/library/python:3.13-slim-trixie

# ---------------------------------------------------------------- what the other stages build with
FROM ${BASE} AS tools
ENV UV_LINK_MODE=copy
WORKDIR /src
COPY requirements/uv.txt requirements/build.txt requirements/
RUN --mount=type=cache,target=/root/.cache python -m venv --without-pip /build \
 && python -m pip --python /build/bin/python install --no-compile --no-deps --require-hashes --only-binary :all: \
      -r requirements/uv.txt \
 && /build/bin/uv pip install --python /build/bin/python --no-deps --require-hashes --only-binary :all: \
      -r requirements/build.txt

# ---------------------------------------------------------------- what the locks name, less what of it is never used
FROM tools AS dependencies
ARG CUDA=13
COPY requirements requirements
# Wheels only: nothing is compiled, so that no stage has a compiler.
RUN --mount=type=cache,target=/root/.cache python -m venv --without-pip /opt/weightd \
 && /build/bin/uv pip install --python /opt/weightd/bin/python --no-deps --require-hashes --only-binary :all: \
      -r "requirements/cuda-${CUDA}.txt" \
 && python requirements/trim.py /opt/weightd \
 && /opt/weightd/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/weightd/lib

# ---------------------------------------------------------------- weightd itself, the same for every CUDA
FROM tools AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY api api
COPY daemon daemon
COPY ipc ipc
RUN /build/bin/uv build --python /build/bin/python --wheel --no-build-isolation --out-dir /wheels .

# ---------------------------------------------------------------- where it goes, and the list of all that is there
FROM dependencies AS application
COPY pyproject.toml ./
COPY --from=wheel /wheels /wheels
RUN /build/bin/uv pip install --python /opt/weightd/bin/python --no-deps --no-index --find-links /wheels \
      --prefix /app weightd \
 && rm /app/.lock \
 && /opt/weightd/bin/python -m compileall -q --invalidation-mode unchecked-hash -s /app -p /opt/weightd /app/lib \
 && mkdir /sbom \
 && /build/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
      --output-format JSON --no-validate --output-file /sbom/weightd.cdx.json /opt/weightd/bin/python

# ---------------------------------------------------------------- target shim: weightd.ipc, for COPY --from
FROM tools AS engine-side
COPY ipc ipc
COPY LICENSE ipc/
RUN /build/bin/uv build --python /build/bin/python --wheel --no-build-isolation --out-dir /wheels ipc \
 && /build/bin/uv pip install --python /build/bin/python --no-deps --no-index --find-links /wheels \
      --target /weightd weightd-ipc \
 && rm /wheels/.gitignore /weightd/.lock

FROM scratch AS shim
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="weightd-shim" \
      org.opencontainers.image.description="weightd.ipc, to copy into images of engines" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=engine-side /wheels /wheels
COPY --from=engine-side /weightd /weightd

# ---------------------------------------------------------------- the daemon's image
FROM ${BASE} AS weightd
# No volumes: what is mounted over these two folders, and how large it is, is for whoever runs it to say.
RUN groupadd --gid 65532 weightd \
 && useradd --key UID_MAX=65532 --uid 65532 --gid 65532 --no-log-init --create-home --shell /usr/sbin/nologin weightd \
 && install --directory --owner 65532 --group 65532 --mode 0770 /run/weightd /var/cache/weightd
COPY --from=dependencies /opt/weightd /opt/weightd
# A layer of its own, a hundredth of the one below: an upgrade of weightd alone pulls no more than this.
COPY --from=application /app /opt/weightd
COPY --from=application /sbom /usr/share/sbom
# The home is for credentials (~/.aws and the like); all that is written goes to the two folders.
ENV PATH=/opt/weightd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    WEIGHTD_RUNTIME_DIR=/run/weightd \
    WEIGHTD_CACHE_DIR=/var/cache/weightd \
    HF_HOME=/var/cache/weightd/huggingface \
    CUPY_CACHE_DIR=/var/cache/weightd/cupy \
    CUDA_CACHE_PATH=/var/cache/weightd/cuda \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG BASE
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
# The licence of weightd; those of what it depends on are in the SBOM, and their texts in each one's dist-info.
LABEL org.opencontainers.image.title="weightd" \
      org.opencontainers.image.description="Stages model weights into memory that inference engines map" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
USER 65532:65532
# Peers, health, metrics, where they are switched on. The API is on loopback and on the sockets.
EXPOSE 7401 7402 7403
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["weightd", "doctor", "--quick"]
# Becomes the keeper: PID 1, which reaps, and hands SIGTERM on to the daemon.
ENTRYPOINT ["weightd", "serve"]
