# The model server's image for linux/amd64. `make image` builds it with docker, podman or buildah:
#
#   make image                                                 the server
#   make push REGISTRY=registry.example.com/team               the server, in your registry
#   docker build -t mistral-7b-kserve:demo --target demo .     with the demo model inside, for a cluster without a GPU
#
# No weights, no compiler, no pip cache. KServe probes it, so it has no HEALTHCHECK.

# Debian 13 and a Python that kserve 0.21 supports. A tag moves with its security fixes, a digest never: pass one for a
# build that can be repeated. Find it in the registry you pull from:
#   --build-arg PYTHON_DIGEST=@$(docker buildx imagetools inspect python:3.12-slim-trixie --format '{{.Manifest.Digest}}')
ARG PYTHON_IMAGE=python:3.12-slim-trixie
ARG PYTHON_DIGEST=

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS dependencies
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY requirements.lock ./
# Wheels only: nothing here could compile. Without --no-deps, pip takes the newest version of a package that another one
# requires with an extra, and the lock file has no hash for it.
RUN pip install --no-cache-dir --no-compile --only-binary :all: --no-deps --require-hashes --requirement requirements.lock \
 && pip uninstall --yes pip
# The bytecode is made here and never compared with its source again, so that a cold start neither compiles thousands of
# files nor looks at their dates.
RUN python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST} AS server
RUN useradd --uid 1000 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin mistral
COPY --from=dependencies /opt/venv /opt/venv
# /tmp is the one place the server writes to; everything that looks for a home or a cache finds it there.
# GKE mounts the GPU's driver into /usr/local/nvidia; elsewhere NVIDIA's container toolkit puts it where the loader looks.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/tmp/hf \
    PYTHONUNBUFFERED=1 \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
COPY model_server model_server
COPY mistral_relay mistral_relay
COPY mistral_cli mistral_cli
RUN python -m compileall -q --invalidation-mode unchecked-hash model_server mistral_relay mistral_cli
# `make image` passes both, from pyproject.toml and git.
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="mistral-7b-kserve" \
      org.opencontainers.image.description="Mistral 7B behind KServe: continuous batching, streaming, scale to zero" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
EXPOSE 8080
USER 1000:1000
# Exec form: the server itself is process 1 and gets the SIGTERM.
ENTRYPOINT ["python", "-m", "model_server"]

FROM server AS demo
USER 0:0
# What it is trained on: our own FAQ.
COPY docs/faq.md docs/faq.md
COPY demo demo
# safetensors writes its files for the owner alone.
RUN python -m demo.make --out /opt/demo-model && chmod -R a+rX /opt/demo-model
USER 1000:1000
ENV MISTRAL_MODEL_DIR=/opt/demo-model

# Last, so that a build without --target gives the server.
FROM server AS final
