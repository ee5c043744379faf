"""All models that this server can call: which upstream is asked for which name, and what is known of a model.

A name is an alias, or `UPSTREAM/model`, or is configured for or listed by an upstream; any other name is given to the
default model, or passed on as it is. The calls themselves are in `chat/server.py`; the offline model, which answers
when no upstream is configured, in `offline.py`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import unquote

import httpx2
import msgspec

from afterglow.chat.http1 import Http1Transport
from afterglow.chat.probe import ServerWords
from afterglow.chat.server import ModelServer, Sleep, parse_url
from afterglow.contracts import ChatRequest, Delta, Forwarded, ModelEnd, ModelInfo, TextDelta, ToolCallDelta
from afterglow.errors import ConfigError, ModelError, ModelTimeout, NotFound
from afterglow.objects import Model
from afterglow.settings import ModelSettings, Settings, Upstream

log = logging.getLogger("afterglow.models")

OFFLINE = "offline"
DATA_URLS_ONLY = {"ollama", "llama.cpp", "lm-studio"}
HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
CALLERS_OWN = {
    "authorization",
    "api-key",
    "cookie",
    "host",
    "content-length",
    "expect",
    "origin",
    "referer",
    "forwarded",
    "openai-organization",
    "openai-project",
    "openai-beta",
    "user-agent",
    "accept-encoding",
}
BODILESS = {"GET", "HEAD", "DELETE", "OPTIONS"}
UPSTREAMS_OWN = {"set-cookie", "server", "date", "openai-organization", "openai-project"}


class OneModel(Protocol):
    """A model in this process that answers under every name."""

    @property
    def info(self) -> ModelInfo: ...

    def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]: ...


class Check(msgspec.Struct, frozen=True):
    """One line of `afterglow doctor`."""

    name: str
    ok: bool
    detail: str


class _Route(NamedTuple):
    server: ModelServer
    model: str


class Models:
    """ChatModels over any number of OpenAI-compatible servers, or over the offline model when there is none.

    transport: in place of the network, for tests. sleep: waits between two tries. Raises ConfigError.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        offline: OneModel | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        upstreams = [Upstream(name="", url=settings.model_url, key=settings.model_key)] if settings.model_url else []
        upstreams += settings.upstreams.values()
        if not upstreams and offline is None:
            raise ConfigError("No model server is configured: set model_url, or [upstreams.NAME] in the file.")
        self._settings = settings
        self._alone = None if upstreams else offline
        self._transport = transport or Http1Transport()
        self._proxied: list[httpx2.AsyncBaseTransport] = []
        self._servers: list[ModelServer] = []
        for upstream in upstreams:
            refuse_own_address(upstream, settings)
            way = transport or self._proxy_for(upstream) or self._transport
            self._servers.append(ModelServer(upstream, settings, way, sleep))
        self._learned: dict[_Route, int] = {}
        self._assumed: set[_Route] = set()

    def _proxy_for(self, upstream: Upstream) -> httpx2.AsyncBaseTransport | None:
        """The usual proxy variables, or the system's proxy settings, as every HTTP client takes them."""
        url = parse_url(upstream)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if not proxy or is_loopback(url.host) or urllib.request.proxy_bypass(url.host):
            return None
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._proxied.append(httpx2.AsyncHTTPTransport(proxy=proxy, limits=limits))
        return self._proxied[-1]

    # Calling

    def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        return self._alone.stream(request) if self._alone else self._stream(request)

    async def _stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        server, model = await self._route(request.model)
        async with aclosing(server.stream(request, model)) as lists:
            async for deltas in lists:
                yield deltas

    # Which server

    async def _route(self, asked: str) -> _Route:
        """Fetches model lists when the choice depends on them and they are not known yet."""
        target = self._target(asked)
        if self._configured(target) is None and (len(self._servers) > 1 or self._maps_unknown(asked, target)):
            await asyncio.gather(*(server.listing.get() for server in self._servers))
        return self._choose(asked)

    def _choose(self, asked: str) -> _Route:
        """The choice as far as the lists are known."""
        target = self._target(asked)
        if route := self._configured(target) or self._listed(target):
            return route
        if self._maps_unknown(asked, target) and self._lists_are_whole():
            instead = self._target(self._settings.default_model)
            return self._configured(instead) or self._listed(instead) or _Route(self._servers[0], instead)
        return _Route(self._servers[0], target)

    def _target(self, asked: str) -> str:
        return self._settings.aliases.get(asked, asked)

    def _maps_unknown(self, asked: str, target: str) -> bool:
        default = self._settings.default_model
        return bool(default) and asked not in self._settings.aliases and target != default

    def _configured(self, target: str) -> _Route | None:
        prefix, slash, rest = target.partition("/")
        for server in self._servers:
            if target in server.upstream.models:
                return _Route(server, target)
            if slash and rest and prefix == server.upstream.name:
                return _Route(server, rest)
        return None

    def _listed(self, target: str) -> _Route | None:
        for server in self._servers:
            if (listing := server.listing.known) and listing.has(target):
                return _Route(server, target)
        return None

    def _lists_are_whole(self) -> bool:
        return all((listing := server.listing.known) and listing.whole for server in self._servers)

    # What is known of a model

    async def info(self, model: str) -> ModelInfo:
        if self._alone:
            return self._alone.info
        route = await self._route(model)
        told = self._told(model, route)
        if told.window_tokens and route.server.upstream.inline_images is not None:
            words = ServerWords()
        else:
            words = await route.server.words(route.model)
        return self._put_together(route, told, words)

    def _told(self, asked: str, route: _Route) -> ModelSettings:
        models = self._settings.models
        return models.get(asked) or models.get(route.model) or ModelSettings()

    def _put_together(self, route: _Route, told: ModelSettings, words: ServerWords) -> ModelInfo:
        learned = self._learned.get(route)
        info = ModelInfo(
            window_tokens=self._settings.default_window_tokens,
            max_output_tokens=told.max_output_tokens,
            vision=words.vision if told.vision is None else told.vision,
            tools=words.tools if told.tools is None else told.tools,
        )
        if told.window_tokens:
            info.window_tokens, info.learned = told.window_tokens, "configuration"
        elif words.window_tokens or learned:
            info.window_tokens, info.learned = words.window_tokens or learned or 0, "server"
        else:
            self._say_assumed(route)
        if learned and learned < info.window_tokens:
            info.window_tokens, info.learned = learned, "server"
        return info

    def _say_assumed(self, route: _Route) -> None:
        if route not in self._assumed:
            self._assumed.add(route)
            log.warning(
                'nobody tells the context window of %s; assuming %d tokens ([models."%s"] window_tokens sets it)',
                route.server.who(route.model),
                self._settings.default_window_tokens,
                route.model,
            )

    def names(self, model: str) -> list[str]:
        if self._alone:
            return [model, OFFLINE]
        server, own = self._choose(model)
        prefix = f"{server.upstream.name}/" if server.upstream.name else ""
        return list(dict.fromkeys([model, self._target(model), prefix + own, own]))

    def learn_window(self, model: str, window_tokens: int) -> None:
        if not self._alone:
            self._learned[self._choose(model)] = window_tokens

    def wants_inline_images(self, model: str) -> bool:
        """Whether images must be sent to this model as data, because its server fetches no URLs. What kind of server
        it is, is known once `info` was asked for the model."""
        if self._alone:
            return True
        server, name = self._choose(model)
        if server.upstream.inline_images is not None:
            return server.upstream.inline_images
        return server.known_words(name).kind in DATA_URLS_ONLY

    # Listing

    async def list_models(self) -> list[dict[str, Any]]:
        models = {OFFLINE: _model(OFFLINE, 0, "afterglow")} if self._alone else {}
        listings = await asyncio.gather(*(server.listing.get(wait_again=True) for server in self._servers))
        for server, listing in zip(self._servers, listings, strict=True):
            for entry in listing.entries if listing else ():
                models.setdefault(entry["id"], _model(entry["id"], entry.get("created"), entry.get("owned_by")))
            for name in server.upstream.models if listing else ():
                models.setdefault(name, _model(name, 0, server.name))
        for alias in self._settings.aliases:
            models.setdefault(alias, _model(alias, 0, "alias"))
        return list(models.values())

    # Passing through

    async def forward(
        self, method: str, path: str, query: str, headers: Mapping[str, str], body: AsyncIterator[bytes]
    ) -> Forwarded:
        if self._alone:
            raise NotFound(f"{path} is for a model server to answer, and none is configured. Set one with --model-url.")
        if ".." in unquote(path).split("/"):
            raise NotFound(f"Invalid URL ({method} {path})")
        given = httpx2.Headers(dict(headers))
        kept = _passed_on(given, HOP_BY_HOP | CALLERS_OWN)
        content: bytes | AsyncIterator[bytes] = body
        server, model = self._servers[0], ""
        if given.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            content = b"".join([part async for part in body])
            fields = _top_level(content)
            if asked := _model_in(fields):
                server, model = await self._route(asked)
                content = content if model == asked else _with_model(fields, model)
        elif "content-length" in given:
            kept["content-length"] = given["content-length"]
        elif method in BODILESS:
            content = b""
        send = partial(server.send, method, server.url(path, query), content, list(kept.items()))
        return await self._pass(server, model, send)

    async def _pass(self, server: ModelServer, model: str, send: Callable[[], Awaitable[httpx2.Response]]) -> Forwarded:
        async with AsyncExitStack() as held:
            await held.enter_async_context(server.turns)
            limit_s = self._settings.first_token_timeout_s
            try:
                async with asyncio.timeout(limit_s):
                    response = await send()
            except TimeoutError:
                raise ModelTimeout(f"No answer within {limit_s:g} s from {server.label}.") from None
            except httpx2.TransportError as error:
                raise server.broken_connection(error, model).error from None
            held.push_async_callback(response.aclose)
            answer = _passed_on(response.headers, HOP_BY_HOP | UPSTREAMS_OWN)
            return Forwarded(response.status_code, answer, _PassedBody(server, model, response, held.pop_all()))

    # Looking after it

    async def check(self, model: str = "") -> list[Check]:
        """Try every upstream: is it there, does it list its models, stream text, call a function? For `doctor`.

        model: the name to try with; else the default model, or the first one listed.
        """
        found = []
        for server in self._servers:
            listing = await server.listing.get(wait_again=True)
            count = (
                f"{len(listing.entries)} model{'s' * (len(listing.entries) != 1)}"
                if listing
                else "no answer to /models"
            )
            found.append(Check(f"{server.label}: lists its models", bool(listing and listing.entries), count))
            tried = await self._model_to_try(server, model)
            if tried is None:
                found.append(Check(f"{server.label}: streams", False, "no model to try; name one"))
                continue
            found.append(await _check_stream(server, tried))
            found.append(await _check_tool_call(server, tried))
        return found

    async def _model_to_try(self, server: ModelServer, model: str) -> str | None:
        if name := model or self._settings.default_model:
            route = await self._route(name)
            if route.server is server:
                return route.model
        listing = server.listing.known
        listed = [entry["id"] for entry in listing.entries] if listing else []
        return next(iter((*server.upstream.models, *listed)), None)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for transport in (self._transport, *self._proxied):
            await transport.aclose()


class _PassedBody:
    """The body of a passed-on answer; holds the upstream's turn until it is read or closed."""

    def __init__(self, server: ModelServer, model: str, response: httpx2.Response, held: AsyncExitStack) -> None:
        self._server = server
        self._model = model
        self._parts = aiter(cast(httpx2.AsyncByteStream, response.stream))
        self._held = held

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._parts)
        except httpx2.TransportError as error:
            await self.aclose()
            raise self._server.broken_connection(error, self._model).error from None
        except BaseException:  # the end, or a cancelled reader, who does not come back to close it
            await self.aclose()
            raise

    async def aclose(self) -> None:
        await self._held.aclose()


# --- addresses -------------------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost"
    return address.is_loopback


def refuse_own_address(upstream: Upstream, settings: Settings) -> None:
    """Raises ConfigError when the upstream's URL leads back to this server, where every call would call itself."""
    url = parse_url(upstream)
    port = url.port or (443 if url.scheme == "https" else 80)
    everywhere = settings.host in ("", "0.0.0.0", "::")  # noqa: S104
    same_host = url.host.lower() == settings.host.lower() or (
        (is_loopback(url.host) or url.host in ("0.0.0.0", "::")) and (everywhere or is_loopback(settings.host))  # noqa: S104
    )
    if same_host and port == settings.port:
        raise ConfigError(f"The model server {upstream.url} is this server's own address. Name the one behind it.")


# --- passing through -------------------------------------------------------------------------------------------


def _passed_on(headers: Mapping[str, str], left_out: set[str]) -> dict[str, str]:
    named = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    return {
        name: value
        for name, value in headers.items()
        if name.lower() not in left_out | named and not name.lower().startswith(("x-forwarded-", "x-stainless-"))
    }


def _top_level(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, each as its own bytes; empty for anything else, which the upstream may judge."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return {}


def _model_in(fields: dict[str, msgspec.Raw]) -> str:
    try:
        return msgspec.json.decode(fields["model"], type=str) if "model" in fields else ""
    except ValueError:
        return ""


def _with_model(fields: dict[str, msgspec.Raw], model: str) -> bytes:
    return msgspec.json.encode({**fields, "model": model})


def _model(name: str, created: Any, owner: Any) -> dict[str, Any]:
    known = Model(
        id=name,
        created=int(created) if isinstance(created, int | float) else 0,
        owned_by=owner if isinstance(owner, str) and owner else "unknown",
    )
    return cast(dict[str, Any], msgspec.to_builtins(known))


# --- doctor ----------------------------------------------------------------------------------------------------


async def _check_stream(server: ModelServer, model: str) -> Check:
    name = f"{server.who(model)}: streams"
    request = ChatRequest(model=model, messages=[{"role": "user", "content": "Say: ready."}], max_tokens=256)
    try:
        lists = [deltas async for deltas in server.stream(request, model)]
    except ModelError as error:
        return Check(name, False, str(error))
    end = lists[-1][-1]
    said = sum(isinstance(delta, TextDelta) for deltas in lists for delta in deltas)
    usage = "reports usage" if isinstance(end, ModelEnd) and end.usage else "reports no usage"
    return Check(name, True, f"{said} pieces of text, {usage}")


async def _check_tool_call(server: ModelServer, model: str) -> Check:
    name = f"{server.who(model)}: calls functions"
    clock = {"name": "get_time", "description": "The time now.", "parameters": {"type": "object", "properties": {}}}
    request = ChatRequest(
        model=model,
        messages=[{"role": "user", "content": "What time is it? Use the function."}],
        tools=[{"type": "function", "function": clock}],
        max_tokens=512,
    )
    try:
        lists = [deltas async for deltas in server.stream(request, model)]
    except ModelError as error:
        return Check(name, False, str(error))
    called = any(isinstance(delta, ToolCallDelta) for deltas in lists for delta in deltas)
    return Check(name, called, "called get_time" if called else "answered without calling it")
