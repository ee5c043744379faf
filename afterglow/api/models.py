"""/v1/models, and the routes that are the upstream's: passed on as bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from afterglow.api.answers import house_of, reply
from afterglow.contracts import Forwarded
from afterglow.errors import ModelError, NotFound, Unavailable

# What apps use through the same client, and this server does not do itself.
FORWARDED = (
    "/chat/completions",
    "/completions",
    "/embeddings",
    "/moderations",
    "/audio/{rest:path}",
    "/images/{rest:path}",
    "/responses",
    "/responses/{rest:path}",
)
DEPLOYMENTS = "/openai/deployments/"
KEPT_IN_PATHS = "/:@!$&'()*+,;="  # RFC 3986; everything else that was decoded is encoded again


async def list_models(request: Request) -> Response:
    """GET /models: what the upstreams list, and the aliases. Not paginated."""
    return reply({"object": "list", "data": await house_of(request).models.list_models()})


async def retrieve_model(request: Request) -> Response:
    """GET /models/{model}"""
    wanted = request.path_params["model"]
    for model in await house_of(request).models.list_models():
        if model["id"] == wanted:
            return reply(model)
    raise _no_model(wanted)


async def delete_model(request: Request) -> Response:
    """DELETE /models/{model}: there are no fine-tuned models here."""
    raise _no_model(request.path_params["model"])


def _no_model(model: str) -> NotFound:
    return NotFound(f"The model '{model}' does not exist", param="model", code="model_not_found")


async def forward(request: Request) -> Response:
    """Any route of FORWARDED, with the upstream's key and never the caller's."""
    house = house_of(request)
    path: str = request.scope["path"]
    if not house.settings.passthrough:
        raise NotFound(f"Invalid URL ({request.method} {path})")
    query, body = request.scope["query_string"].decode("latin-1"), request.stream()
    if deployment := request.path_params.get("deployment"):
        query, body = "", _with_model(await request.body(), deployment)
    upstream_path = quote(_unprefixed(path), safe=KEPT_IN_PATHS)
    try:
        answer = await house.models.forward(request.method, upstream_path, query, request.headers, body)
    except ModelError as error:
        raise Unavailable(str(error)) from error
    return StreamingResponse(_closing(answer), answer.status, answer.headers)


async def _with_model(body: bytes, deployment: str) -> AsyncGenerator[bytes, None]:
    """Azure names the model in the path, and its clients need not repeat it in the body."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = None
    if isinstance(fields, dict) and "model" not in fields:
        body = msgspec.json.encode({**fields, "model": deployment})
    yield body


async def _closing(answer: Forwarded) -> AsyncIterator[bytes]:
    """The body; a client that leaves midway leaves the upstream's connection free."""
    async with aclosing(answer.body) as body:
        async for chunk in body:
            yield chunk


def _unprefixed(path: str) -> str:
    """What the upstream calls it. Azure also names the model: /openai/deployments/{deployment}/chat/completions."""
    if path.startswith(DEPLOYMENTS):
        return "/" + path.removeprefix(DEPLOYMENTS).partition("/")[2]
    return path.removeprefix("/openai").removeprefix("/v1")
