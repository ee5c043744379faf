"""/healthz, /readyz, /openapi.json and /metrics: what the server says of itself."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from afterglow import __version__
from afterglow.api.answers import house_of, reply
from afterglow.contracts import House
from afterglow.errors import StoreError, Unavailable
from afterglow.metrics import CONTENT_TYPE
from afterglow.rows.backlog import count_backlog
from afterglow.rows.projects import try_writing

DATABASE_TIMEOUT_S = 2.0  # of a scrape, which must not wait for a database that is silent
HOST_PATH = re.compile(r"(?<![\w.~/])~?/(?!proc/|sys/|mnt/data)[\w.+~-]+(?:/[\w.+~-]*)*")


async def healthz(request: Request) -> Response:
    """GET /healthz: 200 as soon as requests are served. Tells also what keeps the code interpreter from being whole."""
    house = house_of(request)
    code = house.code_engine.status
    engines = {"code_interpreter": code.state, "file_search": "on"}
    about: dict[str, Any] = {"status": "ok", "version": __version__, "engines": engines}
    if code.reason or code.unenforced:
        about["details"] = {
            "code_interpreter": {
                "reason": _without_paths(code.reason),
                "remedy": _without_paths(code.remedy),
                "unenforced": [_without_paths(limit) for limit in code.unenforced],
            }
        }
    return reply(about)


def _without_paths(text: str) -> str:
    """Everybody may ask for this page; where things lie on this machine is the operator's to know."""
    return HOST_PATH.sub("…", text)


async def readyz(request: Request) -> Response:
    """GET /readyz: 200 when the database can be written, which is tried, else 503. Also 503 once it is to stop."""
    if request.app.draining:
        raise Unavailable("The server is stopping.")
    try:
        await house_of(request).store.write(try_writing)
    except StoreError as error:
        raise Unavailable("The database cannot be written.") from error
    return reply({"status": "ready"})


async def metrics(request: Request) -> Response:
    """GET /metrics: what this process has counted, and what waits in the database, for Prometheus."""
    house = house_of(request)
    if house.metrics.backlog_is_old():
        await _count_backlog(house)
    return Response(await asyncio.to_thread(house.metrics.text), media_type=CONTENT_TYPE)


async def _count_backlog(house: House) -> None:
    try:
        async with asyncio.timeout(DATABASE_TIMEOUT_S):
            backlog = await house.store.read(count_backlog)
    except (StoreError, TimeoutError):
        house.metrics.database_silent()
    else:
        age_s = 0 if backlog.oldest_at is None else max(house.clock.now() - backlog.oldest_at, 0)
        house.metrics.database_told(backlog.runs, age_s, backlog.files)


async def openapi(request: Request) -> Response:
    """GET /openapi.json: generated from the route table and the structs."""
    text: bytes = request.app.openapi
    return reply(text)
