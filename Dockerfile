# Afterglow in a container: `docker build -t afterglow .`, then `docker run -p 127.0.0.1:8000:8000 -v afterglow:/data …`.
# docs/deployment.md tells which settings it wants. The image holds no key and no data, and runs as an ordinary user.

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
 && /opt/afterglow/bin/pip uninstall -y pip

FROM python:3.13-slim
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin afterglow \
 && install -d -o afterglow -g afterglow -m 0700 /data
COPY --from=build /opt/afterglow /opt/afterglow
ENV PATH=/opt/afterglow/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    AFTERGLOW_HOST=0.0.0.0 \
    AFTERGLOW_PORT=8000 \
    AFTERGLOW_DATA=/data \
    AFTERGLOW_LOG_FORMAT=json
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['AFTERGLOW_PORT'] + '/healthz', timeout=2)"]
ENTRYPOINT ["afterglow"]
CMD ["serve"]
