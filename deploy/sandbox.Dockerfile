# A sandbox for model-written code (engine `remote`): `docker build -t afterglow-sandbox -f deploy/sandbox.Dockerfile .`
# It gives one session and ends. What must hold it when it runs is in deploy/kubernetes/sandbox.yaml.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY locks/build.txt locks/serve.txt locks/
RUN python -m venv /build && /build/bin/pip install --require-hashes -r locks/build.txt \
 && python -m venv /opt/afterglow && /opt/afterglow/bin/pip install --require-hashes -r locks/serve.txt
COPY pyproject.toml README.md LICENSE ./
COPY docs/runs.md docs/runs.md
COPY afterglow afterglow
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /opt/afterglow/bin/pip install --no-deps /wheels/*.whl \
 && /opt/afterglow/bin/afterglow sandbox setup --standard --sandbox-env /opt/sandbox

FROM python:3.13-slim
COPY --from=build /opt/afterglow /opt/afterglow
COPY --from=build /opt/sandbox /opt/sandbox
# The folders that sessions write to are mounted here; then nothing that could raise a right is left.
RUN mkdir -p /mnt/data /home/sandbox \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
ENV PATH=/opt/afterglow/bin:$PATH \
    AFTERGLOW_SANDBOX_ENV=/opt/sandbox
USER 64321:64321
WORKDIR /mnt/data
ENTRYPOINT ["afterglow"]
CMD ["sandbox", "serve"]
