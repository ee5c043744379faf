"""One model server: asking it for chat completions, with retries, and for what it knows of its models.

Which server is asked for which model is decided in `llm.py`. A call that fails before its first token is tried again
when that may help; a parameter that the server refuses is left out from then on; after the first token nothing is
repeated, since the run has already shown it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Generic, NamedTuple, TypeVar, cast

import httpx2
import msgspec

from afterglow import __version__
from afterglow.chat.faults import Fault, model_error, read_fault, refused_parameter
from afterglow.chat.probe import ServerWords, ask_server, read_entry
from afterglow.chat.stream import BadStream, ChatStream, ErrorInStream
from afterglow.contracts import ChatRequest, Delta, ModelEnd
from afterglow.errors import ConfigError, ModelBroke, ModelError, ModelTimeout, ModelUnreachable
from afterglow.settings import Settings, Upstream

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]

log = logging.getLogger("afterglow.models")

BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 8.0
LONGEST_RETRY_AFTER_S = 60.0  # a server that asks for more is not waited for
PROBE_TIMEOUT_S = 2.0
DRAIN_TIMEOUT_S = 0.25
ERROR_BODY_BYTES = 64 * 1024
PROBE_BODY_BYTES = 8 * 1024 * 1024
FRESH_S = 300.0
RETRY_S = 15.0
MODELS_REMEMBERED = 1000


class Listing(NamedTuple):
    """A server's model list. whole: false when it keeps none, so that nothing follows from a missing name."""

    entries: list[dict[str, Any]]
    whole: bool

    def has(self, model: str) -> bool:
        return self.entry(model) is not None

    def entry(self, model: str) -> dict[str, Any] | None:
        names = (model, f"{model}:latest")  # Ollama lists `llama3` as `llama3:latest`
        return next((entry for entry in self.entries if entry["id"] in names), None)


class Remembered(Generic[T]):
    """Something asked for once and then refreshed behind its readers' backs. `known` is None until it was had."""

    def __init__(self, ask: Callable[[], Awaitable[T | None]], fresh_s: Callable[[T | None], float]) -> None:
        self.known: T | None = None
        self._ask = ask
        self._fresh_s = fresh_s
        self._stale_at = 0.0
        self._tried = False
        self._task: asyncio.Task[None] | None = None

    async def get(self, *, wait_again: bool = False) -> T | None:
        """Return what is known. Waits the first time; after a failure only if `wait_again`, so that a server that
        does not answer holds up no more than one call."""
        if self._task is None and time.monotonic() >= self._stale_at:
            self._task = asyncio.create_task(self._refresh())
        if self.known is None and self._task and (wait_again or not self._tried):
            await asyncio.wait([self._task])
        return self.known

    async def _refresh(self) -> None:
        try:
            had = await self._ask()
            self.known = had if had is not None else self.known
            self._stale_at = time.monotonic() + self._fresh_s(had)
        finally:
            self._tried = True
            self._task = None

    def close(self) -> None:
        if self._task:
            self._task.cancel()


class Trouble(Exception):
    """A call that did not go well. error: what ends the run; passing: trying again may help, after `wait_s` if the
    server named a time; fault: the server's refusal, if it gave one."""

    def __init__(
        self, error: ModelError, *, passing: bool = False, wait_s: float | None = None, fault: Fault | None = None
    ) -> None:
        super().__init__()
        self.error = error
        self.passing = passing and (wait_s is None or wait_s <= LONGEST_RETRY_AFTER_S)
        self.wait_s = wait_s
        self.fault = fault


class ModelServer:
    """One upstream. name: its name in the settings, or host and port when it has none."""

    def __init__(
        self, upstream: Upstream, settings: Settings, transport: httpx2.AsyncBaseTransport, sleep: Sleep
    ) -> None:
        url = parse_url(upstream)
        host = f"{url.host}:{url.port}" if url.port else url.host
        self.upstream = upstream
        self.name = upstream.name or host
        self.label = f"{upstream.name} ({host})" if upstream.name else host
        self.turns = asyncio.Semaphore(upstream.max_concurrency) if upstream.max_concurrency else _NoLimit()
        self.listing = Remembered(self._list, lambda had: FRESH_S if had else RETRY_S)
        self._settings = settings
        self._transport = transport
        self._sleep = sleep
        self._url = url
        self._chat_url = self.url("/chat/completions")
        self._headers = self._own_headers()
        self._limit_names = ["max_tokens", "max_completion_tokens"]
        if url.host == "api.openai.com" or url.host.endswith((".openai.com", ".azure.com")):
            self._limit_names.reverse()
        self._refused: dict[str, set[tuple[str, Any]]] = {}
        self._words: dict[str, Remembered[ServerWords]] = {}

    def who(self, model: str) -> str:
        """For the run's owner: the model and the upstream's name, never its address."""
        if not model:
            return self.upstream.name or "the model server"
        return f"model {model!r} at {self.upstream.name}" if self.upstream.name else f"model {model!r}"

    def url(self, path: str, query: str = "") -> httpx2.URL:
        """The address of an API route, e.g. `/chat/completions`. The upstream's own query (`api-version`) is kept."""
        base, _, own_query = self._url.raw_path.decode("ascii").partition("?")
        queries = "&".join(filter(None, (own_query, query)))
        target = (base.rstrip("/") or "/v1") + path
        return self._url.copy_with(raw_path=f"{target}?{queries}".encode() if queries else target.encode())

    def _root_url(self, path: str) -> httpx2.URL:
        base = self._url.raw_path.decode("ascii").partition("?")[0].rstrip("/")
        return self._url.copy_with(raw_path=(base.removesuffix("/v1") + path).encode())

    def _own_headers(self) -> list[tuple[str, str]]:
        headers = [("user-agent", f"afterglow/{__version__}"), ("accept-encoding", "identity")]
        if key := self.upstream.key:
            headers.append(("authorization", f"Bearer {key}"))
            if self._url.host.endswith(".azure.com"):
                headers.append(("api-key", key))
        return headers

    async def send(
        self,
        method: str,
        url: httpx2.URL,
        content: bytes | AsyncIterable[bytes] | None = None,
        headers: Sequence[tuple[str, str]] = (),
    ) -> httpx2.Response:
        """Send a request with this upstream's key. Raises httpx2.TransportError; waits without limit for the answer."""
        request = httpx2.Request(
            method,
            url,
            headers=[*self._headers, *headers],
            content=content,
            extensions={"timeout": {"connect": self._settings.connect_timeout_s}},
        )
        return await self._transport.handle_async_request(request)

    # Chat completions

    async def stream(self, request: ChatRequest, model: str) -> AsyncGenerator[list[Delta], None]:
        """As ChatModels.stream, with `model` in this server's words."""
        async with self.turns:
            try:
                answer = await self._open(request, model)
                try:
                    deltas = answer.first
                    while True:
                        yield deltas
                        if isinstance(deltas[-1], ModelEnd):
                            break
                        deltas = await answer.more()
                    await answer.drain()
                finally:
                    await answer.close()
            except Trouble as trouble:
                raise trouble.error from None

    async def _open(self, request: ChatRequest, model: str) -> _Answer:
        retries = self._settings.model_retries
        attempt = 0
        while True:
            try:
                return await self._attempt(request, model)
            except Trouble as trouble:
                if self._learns_refusal(trouble.fault, request, model):
                    continue
                if not trouble.passing or attempt >= retries:
                    raise
                wait_s = trouble.wait_s if trouble.wait_s is not None else backoff_s(attempt)
            attempt += 1
            log.info("trying %s again in %.1f s (%d of %d)", self.who(model), wait_s, attempt, retries)
            await self._sleep(wait_s)

    async def _attempt(self, request: ChatRequest, model: str) -> _Answer:
        parameters, dropped = self._parameters(request, model)
        body = msgspec.json.encode({"model": model, "messages": request.messages, "stream": True, **parameters})
        limit_s = self._settings.first_token_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                response = await self._post_chat(body, model)
                sent = {k: v for k, v in parameters.items() if k not in ("tools", "stream_options")}
                answer = _Answer(self, model, response, sent, dropped)
                await answer.begin()
                return answer
        except TimeoutError:
            raise Trouble(ModelTimeout(f"No first token within {limit_s:g} s from {self.who(model)}.")) from None

    async def _post_chat(self, body: bytes, model: str) -> httpx2.Response:
        try:
            return await self.send("POST", self._chat_url, body, [("content-type", "application/json")])
        except httpx2.TransportError as error:
            raise self.broken_connection(error, model) from None

    def _parameters(self, request: ChatRequest, model: str) -> tuple[dict[str, Any], list[str]]:
        """What is sent beside the messages, and the names of what is left out because this server refuses it."""
        wanted: dict[str, Any] = {
            "stream_options": {"include_usage": True},
            "response_format": request.response_format,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "reasoning_effort": request.reasoning_effort,
            "user": request.user,
        }
        if request.tools:  # both are refused by some servers when there is nothing to call
            wanted |= {"tool_choice": request.tool_choice, "parallel_tool_calls": request.parallel_tool_calls}
        refused = self._refused.get(model, set())
        sent: dict[str, Any] = {"tools": request.tools} if request.tools else {}
        dropped = []
        for name, value in wanted.items():
            if (name, None) in refused or (name, _plain(value)) in refused:
                dropped += [name] if value is not None else []
            elif value is not None:
                sent[name] = value
        if request.max_tokens is not None:
            name = next((name for name in self._limit_names if (name, None) not in refused), "")
            if name:
                sent[name] = request.max_tokens
            else:
                dropped.append("max_tokens")
        return sent, dropped

    def _learns_refusal(self, fault: Fault | None, request: ChatRequest, model: str) -> bool:
        """Whether the server refused a parameter that it will not be sent again."""
        if fault is None or fault.is_overflow or fault.is_filter:
            return False
        sent, _ = self._parameters(request, model)
        name = refused_parameter(fault, sent)
        if name is None:
            return False
        # OpenAI's reasoning models refuse single values ("'reasoning_effort' does not support 'minimal'").
        only_value = "unsupported_value" in fault.codes and "only the default" not in fault.own_words.lower()
        self._refused.setdefault(model, set()).add((name, _plain(sent[name]) if only_value else None))
        log.warning("%s refuses %s; it is left out or renamed from now on", self.who(model), name)
        return True

    def broken_connection(self, error: httpx2.TransportError, model: str) -> Trouble:
        if isinstance(error, httpx2.TimeoutException):
            limit_s = self._settings.connect_timeout_s
            return Trouble(ModelTimeout(f"No connection within {limit_s:g} s to {self.who(model)}."), passing=True)
        log.warning("%s: %s", self.label, error)
        said = "" if self._url.host in str(error) else f": {error}"
        text = f"The model server cannot be reached or broke the connection, {self.who(model)}{said}."
        passing = not isinstance(error, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol)
        return Trouble(ModelUnreachable(text), passing=passing)

    def refused(self, status: int, headers: Mapping[str, str], body: bytes, model: str) -> Trouble:
        """An error answer, or an error inside a stream (status 200), as trouble. The key never shows."""
        if self.upstream.key:
            body = body.replace(self.upstream.key.encode(), b"***")
        fault = read_fault(status, body)
        error = model_error(fault, self.who(model))
        return Trouble(error, passing=fault.is_passing, wait_s=_retry_after_s(headers), fault=fault)

    # What the server knows

    async def _list(self) -> Listing | None:
        status, said = await self._ask("GET", self.url("/models"), None)
        if status in (404, 405, 501):
            return Listing([], whole=False)
        if status != 200:
            return None
        found = said.get("data") if isinstance(said, dict) else said
        entries = [entry for entry in found if _has_id(entry)] if isinstance(found, list) else []
        return Listing(entries, whole=isinstance(found, list) or (isinstance(said, dict) and "data" in said))

    async def words(self, model: str) -> ServerWords:
        """What the server says of a model; empty when it cannot be asked."""
        if model not in self._words and len(self._words) >= MODELS_REMEMBERED:
            self._words.clear()
        remembered = self._words.setdefault(model, Remembered(lambda: self._probe(model), _words_fresh_s))
        return await remembered.get() or ServerWords()

    def known_words(self, model: str) -> ServerWords:
        remembered = self._words.get(model)
        return (remembered and remembered.known) or ServerWords()

    async def _probe(self, model: str) -> ServerWords | None:
        async def ask(method: str, path: str, body: Any) -> Any:
            status, said = await self._ask(method, self._root_url(path), body)
            return said if status == 200 else None

        listing, words = await asyncio.gather(self.listing.get(), ask_server(ask, model))
        listed = read_entry(listing.entry(model) or {}) if listing else None
        return listed if words is None else words

    async def _ask(self, method: str, url: httpx2.URL, body: Any) -> tuple[int, Any]:
        """Ask for something small. Returns status 0 when the server cannot be reached in time or talks no JSON."""
        content = None if body is None else msgspec.json.encode(body)
        headers = [("content-type", "application/json")] if content else []
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                response = await self.send(method, url, content, headers)
                try:
                    said = await read_at_most(response, PROBE_BODY_BYTES)
                finally:
                    await response.aclose()
            return response.status_code, msgspec.json.decode(said) if response.status_code == 200 else None
        except (httpx2.TransportError, TimeoutError, ValueError, RecursionError):
            return 0, None

    def close(self) -> None:
        self.listing.close()
        for remembered in self._words.values():
            remembered.close()


class _Answer:
    """An answer on its way."""

    def __init__(
        self, server: ModelServer, model: str, response: httpx2.Response, sent: dict[str, Any], dropped: list[str]
    ) -> None:
        self._server = server
        self._model = model
        self._response = response
        self._sent = sent
        self._dropped = dropped
        self._parser = ChatStream()
        # The response's own iterators decode and count; its stream gives the bytes as they are.
        self._parts = aiter(cast(httpx2.AsyncByteStream, response.stream))
        self.first: list[Delta] = []

    async def begin(self) -> None:
        """Wait for the first delta. Closes the answer when that fails."""
        try:
            if self._response.status_code >= 300:
                body = await read_at_most(self._response, ERROR_BODY_BYTES)
                raise self._server.refused(self._response.status_code, self._response.headers, body, self._model)
            self.first = await self.more()
        except httpx2.TransportError as error:
            await self.close()
            raise self._server.broken_connection(error, self._model) from None
        except BaseException:
            await self.close()
            raise

    async def more(self) -> list[Delta]:
        """The next deltas, at least one; ModelEnd is the last of all. Raises Trouble."""
        try:
            async for data in self._parts:
                deltas = self._parser.feed(data)
                if self._parser.done:
                    break
                if deltas:
                    return deltas
            else:
                deltas = []
            return [*deltas, *self._sign(self._parser.finish())]
        except BadStream as bad:
            raise Trouble(ModelBroke(f"The model server failed, {self._server.who(self._model)}: {bad}.")) from None
        except ErrorInStream as error:
            raise self._server.refused(200, self._response.headers, error.body, self._model) from None
        except httpx2.TransportError as error:
            raise self._server.broken_connection(error, self._model) from None

    def _sign(self, deltas: list[Delta]) -> list[Delta]:
        end = deltas[-1]
        if isinstance(end, ModelEnd):
            end.upstream = self._server.name
            end.sent = self._sent
            end.dropped = self._dropped
        return deltas

    async def drain(self) -> None:
        """Read what follows `[DONE]`, the end of the message, without which the connection cannot be used again."""
        with contextlib.suppress(TimeoutError, httpx2.TransportError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                async for _ in self._parts:
                    pass

    async def close(self) -> None:
        await self._response.aclose()


class _NoLimit:
    """Where a semaphore goes, for upstreams without one."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


def parse_url(upstream: Upstream) -> httpx2.URL:
    """Raises ConfigError."""
    where = f"[upstreams.{upstream.name}] url" if upstream.name else "model_url"
    try:
        url = httpx2.URL(upstream.url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{where}: {upstream.url!r} is no URL: {error}.") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{where}: expected http://… or https://…, got {upstream.url!r}.")
    return url


async def read_at_most(response: httpx2.Response, size_bytes: int) -> bytes:
    """The body, cut off at `size_bytes`. Raises httpx2.TransportError."""
    body = b""
    async for part in cast(httpx2.AsyncByteStream, response.stream):
        body += part
        if len(body) >= size_bytes:
            break
    return body[:size_bytes]


def backoff_s(attempt: int) -> float:
    """How long to wait before the next try, after `attempt` tries more than the first."""
    return min(BACKOFF_S * 2.0**attempt, LONGEST_BACKOFF_S) * (1 - random.random() / 4)  # noqa: S311


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long the server asks us to wait: `retry-after-ms`, or `retry-after` as seconds or a date."""
    with contextlib.suppress(KeyError, ValueError):
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    with contextlib.suppress(KeyError, ValueError):
        return max(0.0, float(headers["retry-after"]))
    with contextlib.suppress(KeyError, ValueError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return None


def _words_fresh_s(words: ServerWords | None) -> float:
    """A server that is still starting, or a model not loaded yet, soon has more to say."""
    return RETRY_S if words is None or words.guessed else FRESH_S


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else None


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("id"), str)
