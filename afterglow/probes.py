"""The second port: `/metrics`, `/healthz` and `/readyz` for machines, without a key, and nothing else."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from afterglow.api.edge import KEYLESS, METRICS_PATH

PATHS = (METRICS_PATH, "/healthz", "/readyz")
NOWHERE = "/nowhere"  # no route begins so
GRACE_S = 1


@contextlib.asynccontextmanager
async def serve_metrics(application: ASGIApp, listening: socket.socket) -> AsyncIterator[None]:
    """Answer on `listening`, in this event loop, until the end of the block; the socket is closed then.

    application: what serves the API, or would.
    """
    config = uvicorn.Config(
        _Probes(application),
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listening])
    try:
        yield
    finally:
        await server.shutdown([listening])


class _Probes:
    """Lets requests for the three paths through to the application, and says of what it lets through that no key is
    needed."""

    def __init__(self, application: ASGIApp) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in PATHS else NOWHERE
        await self._application({**scope, "path": path, KEYLESS: True}, receive, send)
