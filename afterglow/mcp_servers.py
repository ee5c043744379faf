"""MCP servers through the official client: one session for each server and project, opened when it is first needed.

A session lives in a task of its own, which opens and closes it; calls come from everywhere and share it. It is closed
when it was idle for a while, when there are too many, and at the end, with the program that was started for it. What
a server says is hostile input: number and size of tools and outputs are bounded, and time is.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import httpx2
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CONNECTION_CLOSED, CallToolResult, TextContent, Tool

from afterglow.addresses import target_of
from afterglow.contracts import McpServer, McpTool
from afterglow.errors import OutboundFailed
from afterglow.outbound import WEB, GuardedClient
from afterglow.settings import McpSettings, Settings

CONNECT_S = 10.0
SILENCE_S = 600.0  # of a server's stream
IDLE_S = 600.0
LISTED_S = 300.0  # how long a list of tools is believed
REFUSED_S = 15.0  # how long a server that could not be asked is left alone
MAX_SESSIONS = 64
MAX_LISTS = 256
MAX_CALLS = 16  # at once, in one session
MAX_PAGES = 20
MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 32 * 1024
MAX_DESCRIPTION_CHARS = 4000
MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_OUTPUT_CHARS = 512 * 1024
SESSION_HEADER = "mcp-session-id"


class _Listed(NamedTuple):
    """What a server has, or why it could not be asked. until: on the monotonic clock."""

    until: float
    tools: list[McpTool]
    failure: str


class McpSessions:
    """A `contracts.McpServers`."""

    def __init__(self, settings: Settings, outbound: GuardedClient) -> None:
        """outbound: looks up where servers are, and checks it."""
        self._settings = settings
        self._outbound = outbound
        self._sessions: dict[tuple[str, McpServer], _Session] = {}
        self._open: set[_Session] = set()  # also those that are about to be closed
        self._listed: dict[McpServer, _Listed] = {}
        self._listing: dict[McpServer, asyncio.Lock] = {}
        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it would log what is said

    def why_refused(self, server: McpServer) -> str | None:
        if not server.url:
            if server.label in self._settings.mcp:
                return None
            names = ", ".join(sorted(self._settings.mcp)) or "none"
            return f"There is no MCP server '{server.label}' here. The operator's are: {names}."
        if not self._settings.mcp_server_urls:
            return "MCP servers cannot be named by 'server_url' here (setting: mcp_server_urls)."
        if not self._settings.private_tools and not server.url.startswith("https://"):
            return "The 'server_url' of an MCP server begins with 'https://'."
        return None

    async def list_tools(self, project: str, server: McpServer) -> list[McpTool]:
        async with self._listing.setdefault(server, asyncio.Lock()):
            listed = self._listed.get(server)
            if listed is None or listed.until < time.monotonic():
                listed = await self._list(project, server)
                self._listed[server] = listed
        if len(self._listed) > MAX_LISTS:
            oldest = next(iter(self._listed))
            del self._listed[oldest]
            self._listing.pop(oldest, None)  # whoever lists it just now brings back only what it has
        if listed.failure:
            raise OutboundFailed(listed.failure)
        return listed.tools

    async def _list(self, project: str, server: McpServer) -> _Listed:
        try:
            async with self._use(project, server, CONNECT_S) as client:
                tools = await _all_tools(client)
        except OutboundFailed as error:
            self._drop_hung(project, server)
            return _Listed(time.monotonic() + REFUSED_S, [], str(error))
        said = self._settings.mcp.get(server.label) if not server.url else None
        allowed = said.allowed_tools if said else None
        kept = [_bounded(tool) for tool in tools if allowed is None or tool.name in allowed]
        return _Listed(time.monotonic() + LISTED_S, [tool for tool in kept if tool][:MAX_TOOLS], "")

    async def call_tool(
        self, project: str, server: McpServer, name: str, arguments: dict[str, Any], *, timeout_s: float
    ) -> str:
        for again in (False, True):
            try:
                async with self._use(project, server, timeout_s) as client:
                    return _output(await client.call_tool(name, arguments))
            except _Forgotten:  # it was restarted, and has done nothing
                if again:
                    raise
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _use(self, project: str, server: McpServer, timeout_s: float) -> AsyncIterator[Client]:
        """The session's client, for one request. Raises OutboundFailed for whatever goes wrong inside."""
        if reason := self.why_refused(server):
            raise OutboundFailed(reason)
        session = self._session(project, server)
        session.in_use += 1
        try:
            async with asyncio.timeout(timeout_s), session.calls:
                yield await session.client()
        except TimeoutError:
            if not session.connected:
                self._drop(session)
            raise OutboundFailed(f"The MCP server {server.label} gave no answer within {timeout_s:g} s.") from None
        except MCPError as error:
            broken = error.code == CONNECTION_CLOSED  # whatever it was asked, it may have done
            if broken or session.forgotten:
                self._drop(session)
            kind = _Forgotten if session.forgotten and not broken else OutboundFailed
            raise kind(f"The MCP server {server.label} answered: {error.message[:1000]}") from None
        except (ValueError, RuntimeError, OSError) as error:  # no MCP; our own end of a broken connection
            self._drop(session)
            why = type(error).__name__ if isinstance(error, ValueError) else error
            raise OutboundFailed(f"The MCP server {server.label} cannot be understood: {why}.") from None
        finally:
            session.in_use -= 1
            session.used_at = time.monotonic()

    def _session(self, project: str, server: McpServer) -> _Session:
        found = self._sessions.get((project, server))
        if found is not None and not found.over:
            found.used_at = time.monotonic()
            return found
        self._sessions = {key: session for key, session in self._sessions.items() if not session.over}
        if len(self._sessions) >= MAX_SESSIONS:
            idle = [session for session in self._sessions.values() if not session.in_use]
            if not idle:
                raise OutboundFailed("Too many MCP servers are being asked just now.")
            self._drop(min(idle, key=lambda session: session.used_at))
        made = self._sessions[project, server] = self._opened(server)
        self._open = {session for session in self._open if not session.closed} | {made}
        return made

    def _opened(self, server: McpServer) -> _Session:
        """A new session."""
        said = McpSettings(server.label, url=server.url) if server.url else self._settings.mcp[server.label]
        if said.url:
            allow_private = not server.url or self._settings.private_tools
            guarded = _GuardedTransport(self._outbound, allow_private=allow_private)
            return _Session(server.label, _http(said, guarded), guarded)
        program, *arguments = said.command
        return _Session(
            server.label, stdio_client(StdioServerParameters(command=program, args=arguments, env=dict(said.env)))
        )

    def _drop_hung(self, project: str, server: McpServer) -> None:
        """After a list that did not come: unlike a call, it takes no time where anybody is there."""
        session = self._sessions.get((project, server))
        if session is not None and not session.in_use:
            self._drop(session)

    def _drop(self, session: _Session) -> None:
        """Nobody uses it any more but who has it already."""
        session.end()
        self._sessions = {key: one for key, one in self._sessions.items() if one is not session}

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._open))


class _Forgotten(OutboundFailed):
    """The server does not know the session any more."""


class _Session:
    """One connection, made and closed by a task of its own, as the client demands. used_at: on the monotonic clock.
    in_use: requests under way."""

    def __init__(
        self,
        label: str,
        transport: AbstractAsyncContextManager[Any],
        guarded: _GuardedTransport | None = None,
    ) -> None:
        """guarded: what HTTP goes through, if it does."""
        self.stop = asyncio.Event()
        self.calls = asyncio.Semaphore(MAX_CALLS)
        self.used_at = time.monotonic()
        self.in_use = 0
        self._label = label
        self._transport = transport
        self._guarded = guarded
        self._client: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live())
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # who waits is told

    @property
    def closed(self) -> bool:
        return self._task.done()

    @property
    def over(self) -> bool:
        """Whether it is of no use any more."""
        return self.closed or self.stop.is_set()

    @property
    def forgotten(self) -> bool:
        """Whether the server knows it no more."""
        return self._guarded is not None and self._guarded.forgotten

    @property
    def connected(self) -> bool:
        return self._client.done()

    async def client(self) -> Client:
        """Once it is connected. Raises OutboundFailed."""
        either: list[asyncio.Future[Any]] = [self._client, self._task]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._client.done():
            error = None if self._task.cancelled() else self._task.exception()
            raise OutboundFailed(f"The MCP server {self._label} cannot be reached: {_words(error)}.")
        return self._client.result()

    async def _live(self) -> None:
        async with Client(self._transport, cache=None) as client:
            self._client.set_result(client)
            while not self.stop.is_set():
                left = self.used_at + IDLE_S - time.monotonic()
                if left <= 0 and not self.in_use:
                    self.stop.set()
                else:
                    await _wait(self.stop, max(left, 1.0))

    def end(self) -> None:
        self.stop.set()
        if not self.connected:
            self._task.cancel()

    async def close(self) -> None:
        self.end()
        await asyncio.wait([self._task], timeout=CONNECT_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiting], timeout=timeout_s)
    waiting.cancel()


def _words(error: BaseException | None) -> str:
    """Why a session could not be opened: the first reason of however many."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)[:500] or type(error).__name__


# --- HTTP ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _http(said: McpSettings, guarded: _GuardedTransport) -> AsyncGenerator[Any, None]:
    async with AsyncExitStack() as opened:
        http = await opened.enter_async_context(
            httpx2.AsyncClient(
                transport=guarded,
                headers={"accept-encoding": "identity", **dict(said.headers)},
                timeout=httpx2.Timeout(CONNECT_S, read=SILENCE_S),
                follow_redirects=False,
                trust_env=False,
            )
        )
        yield await opened.enter_async_context(streamable_http_client(said.url, http_client=http))


class _GuardedTransport(httpx2.AsyncBaseTransport):
    """Connects to the very address that was checked, and takes no more than MAX_ANSWER_BYTES of anything but events,
    which the client bounds one by one. Nothing is unpacked: a little could become very much.

    forgotten: the server has said that it does not know the session.
    """

    def __init__(self, outbound: GuardedClient, *, allow_private: bool) -> None:
        self.forgotten = False
        self._outbound = outbound
        self._allow_private = allow_private
        self._inner = httpx2.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        try:
            target = target_of(str(url), schemes=WEB, allow_private=self._allow_private)
            addresses = await self._outbound.addresses(target, self._allow_private)
        except (ValueError, OSError) as error:
            raise httpx2.ConnectError(str(error), request=request) from None
        sent = httpx2.Request(
            request.method,
            url.copy_with(host=addresses[0]),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": target.host},
        )
        response = await self._inner.handle_async_request(sent)
        self.forgotten = self.forgotten or (response.status_code == 404 and SESSION_HEADER in request.headers)
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            await response.aclose()
            return httpx2.Response(502, request=request)
        if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Bounded(response.stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_ANSWER_BYTES:
                raise httpx2.StreamError(f"the answer has more than {MAX_ANSWER_BYTES // 2**20} MB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


# --- what servers say ------------------------------------------------------------------------------------------


async def _all_tools(client: Client) -> list[Tool]:
    tools: list[Tool] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None or len(tools) >= 4 * MAX_TOOLS:
            break
    return tools


def _bounded(tool: Tool) -> McpTool | None:
    """None for a tool whose schema is too large to be sent with every prompt."""
    if not tool.name or len(json.dumps(tool.input_schema)) > MAX_SCHEMA_BYTES:
        return None
    return McpTool(tool.name, (tool.description or "")[:MAX_DESCRIPTION_CHARS], tool.input_schema)


def _output(result: CallToolResult) -> str:
    """Texts, and the names of what is none; structured content where there is nothing else. Raises OutboundFailed."""
    parts = [part.text if isinstance(part, TextContent) else _named(part) for part in result.content]
    text = "\n".join(parts)
    if not parts and result.structured_content is not None:
        text = json.dumps(result.structured_content, ensure_ascii=False)
    text = text.encode(errors="replace").decode()[:MAX_OUTPUT_CHARS]
    if result.is_error:
        raise OutboundFailed(text or "The tool failed, and does not say why.")
    return text


def _named(part: Any) -> str:
    """A stand-in for content that is no text; a resource's text is text."""
    resource = getattr(part, "resource", None)
    if isinstance(text := getattr(resource, "text", None), str):
        return text
    kind = getattr(part, "mime_type", None) or getattr(resource, "mime_type", None) or "no type"
    place = getattr(part, "uri", None) or getattr(resource, "uri", None)
    return f"[{part.type}: {kind}{f', {place}' if place else ''}]"
