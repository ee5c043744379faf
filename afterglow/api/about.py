"""/healthz, /readyz and /openapi.json: what the server says of itself, without a key."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from afterglow import __version__
from afterglow.api.answers import house_of, reply
from afterglow.errors import StoreError, Unavailable
from afterglow.rows.keys import try_writing


async def healthz(request: Request) -> Response:
    """GET /healthz: 200 as soon as requests are served."""
    house = house_of(request)
    engines = dict.fromkeys(house.engines_off, "off")
    return reply({"status": "ok", "version": __version__, "engines": engines})


async def readyz(request: Request) -> Response:
    """GET /readyz: 200 when the database can be written, which is tried, else 503."""
    try:
        await house_of(request).store.write(try_writing)
    except StoreError as error:
        raise Unavailable("The database cannot be written.") from error
    return reply({"status": "ready"})


async def openapi(request: Request) -> Response:
    """GET /openapi.json: generated from the route table and the structs."""
    text: bytes = request.app.openapi
    return reply(text)
