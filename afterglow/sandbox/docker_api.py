"""The Docker Engine API over its socket: the few calls that the engine `docker` makes, and the stream of a container.

Docker is trusted; what a container sends through it is not. Reference: the Engine API's own, 1.41 to 1.51.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import deque
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx2
import msgspec

from afterglow.sandbox.answers import one_line

T = TypeVar("T")

OLDEST = (1, 41)  # Docker 20.10
NEWEST = (1, 51)  # the newest that this file was written against; Docker goes on speaking the older ones for years
CALL_S = 30.0
BUILD_S = 1800.0
STDOUT, STDERR = 1, 2
HEAD_BYTES = 65_536
LARGEST_PIECE = 16 << 20  # Docker sends pieces of 32 KB; a length beyond this is no length


class DockerFault(Exception):
    """Docker did not do what it was asked. status: HTTP, or 0 when it did not answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Version(msgspec.Struct):
    """What GET /version says, as far as it matters."""

    api: str = msgspec.field(name="ApiVersion", default="")
    os: str = msgspec.field(name="Os", default="")

    @property
    def numbers(self) -> tuple[int, int]:
        major, _, minor = self.api.partition(".")
        return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


class Info(msgspec.Struct):
    """What GET /info says: which runtimes there are, and what the cgroups of this machine can limit."""

    runtimes: dict[str, Any] = msgspec.field(name="Runtimes", default_factory=dict)
    cpus: int = msgspec.field(name="NCPU", default=1)
    limits_memory: bool = msgspec.field(name="MemoryLimit", default=False)
    limits_swap: bool = msgspec.field(name="SwapLimit", default=False)
    limits_pids: bool = msgspec.field(name="PidsLimit", default=False)
    limits_cpus: bool = msgspec.field(name="CpuCfsQuota", default=False)


class Listed(msgspec.Struct):
    """One line of GET /containers/json."""

    id: str = msgspec.field(name="Id")
    labels: dict[str, str] = msgspec.field(name="Labels", default_factory=dict)


class State(msgspec.Struct):
    """How a container fares."""

    out_of_memory: bool = msgspec.field(name="OOMKilled", default=False)


class Inspected(msgspec.Struct):
    """What GET /containers/{id}/json says, as far as it matters."""

    state: State = msgspec.field(name="State", default_factory=State)


class BuildLine(msgspec.Struct):
    """One line of what a build says."""

    stream: str = ""
    error: str = ""


class Complaint(msgspec.Struct):
    """The body of an answer that says no."""

    message: str = ""


class Docker:
    """The Docker Engine behind one socket. Every call raises DockerFault."""

    def __init__(self, path: str) -> None:
        self.path = path
        transport = httpx2.AsyncHTTPTransport(uds=path, verify=False, limits=httpx2.Limits(max_connections=None))
        self._http = httpx2.AsyncClient(transport=transport, base_url="http://docker", timeout=CALL_S, trust_env=False)
        self._root = ""

    async def close(self) -> None:
        await self._http.aclose()

    async def _call(self, method: str, path: str, body: Any = None, **query: str) -> bytes:
        try:
            response = await self._http.request(method, self._root + path, params=query, json=body)
        except httpx2.TransportError:
            raise self._silence() from None
        if response.is_error:
            raise _refusal(response)
        return response.content

    def _silence(self) -> DockerFault:
        return DockerFault(f"Docker does not answer at {self.path}.")

    async def version(self) -> Version:
        """What it is; from here on the newest API is spoken that both sides know."""
        version = _decode(await self._call("GET", "/version"), Version)
        self._root = "/v{}.{}".format(*min(version.numbers, NEWEST))
        return version

    async def info(self) -> Info:
        return _decode(await self._call("GET", "/info"), Info)

    async def has_image(self, tag: str) -> bool:
        try:
            await self._call("GET", f"/images/{tag}/json")
        except DockerFault as fault:
            if fault.status != 404:
                raise
            return False
        return True

    async def build(self, tag: str, context: bytes) -> None:
        """Build an image from a tar archive. The DockerFault of a failed build has the last that it said."""
        request = self._http.build_request(
            "POST",
            f"{self._root}/build",
            params={"t": tag, "forcerm": "1"},
            headers={"content-type": "application/x-tar"},
            content=context,
            timeout=httpx2.Timeout(CALL_S, read=BUILD_S),
        )
        try:
            response = await self._http.send(request, stream=True)
            async with contextlib.aclosing(response):
                if response.is_error:
                    await response.aread()
                    raise _refusal(response)
                said: deque[str] = deque(maxlen=3)
                async for line in response.aiter_lines():
                    _hear(line, said)
        except httpx2.TransportError:
            raise self._silence() from None

    async def create(self, name: str, body: Mapping[str, Any]) -> None:
        await self._call("POST", "/containers/create", body, name=name)

    async def start(self, name: str) -> None:
        await self._call("POST", f"/containers/{name}/start")

    async def attach(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The stdout and stdin of a container."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        with contextlib.ExitStack() as undo:
            try:
                transport, stream = await loop.create_unix_connection(lambda: ContainerStream(reader), self.path)
                undo.callback(transport.abort)
                transport.write(
                    f"POST {self._root}/containers/{name}/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\n"
                    "Host: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n".encode()
                )
                async with asyncio.timeout(CALL_S):
                    status = await stream.status
            except (OSError, TimeoutError):
                raise self._silence() from None
            if not status:
                raise self._silence()
            if status != 101:
                raise DockerFault(f"Docker does not attach us to its container (HTTP {status}).", status)
            undo.pop_all()
        return reader, asyncio.StreamWriter(transport, stream, reader, loop)

    async def ran_out_of_memory(self, name: str) -> bool:
        """Whether the kernel has killed a process in the container for want of memory."""
        return _decode(await self._call("GET", f"/containers/{name}/json"), Inspected).state.out_of_memory

    async def remove(self, name: str) -> None:
        """Kill the container, if it is there, and return when it is gone."""
        try:
            await self._call("DELETE", f"/containers/{name}", force="1", v="1")
        except DockerFault as fault:
            if fault.status == 409:  # it has ended by itself, and is being removed just now
                await self._gone(name)
            elif fault.status != 404:
                raise

    async def _gone(self, name: str) -> None:
        try:
            await self._call("POST", f"/containers/{name}/wait", condition="removed")
        except DockerFault as fault:
            if fault.status != 404:
                raise

    async def containers(self, label: str) -> list[Listed]:
        """Those that carry `label`, with whatever value, running or not."""
        filters = json.dumps({"label": [label]})
        return _decode(await self._call("GET", "/containers/json", all="1", filters=filters), list[Listed])


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise DockerFault("Docker's answer cannot be understood.") from None


def _refusal(response: httpx2.Response) -> DockerFault:
    try:
        message = msgspec.json.decode(response.content, type=Complaint).message
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = ""
    return DockerFault(f"Docker says: {one_line(message or f'HTTP {response.status_code}')}", response.status_code)


def _hear(line: str, said: deque[str]) -> None:
    """Remember the end of what a build says; raises DockerFault with it when the build has failed."""
    try:
        heard = msgspec.json.decode(line, type=BuildLine)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return
    if heard.error:
        raise DockerFault(" / ".join([*said, one_line(heard.error)]))
    if heard.stream.strip():
        said.append(one_line(heard.stream))


class ContainerStream(asyncio.StreamReaderProtocol):
    """A connection that attaches to a container: the reader is given what that writes to its stdout, and only that.

    status: of the answer to the request, once it is there. What breaks the form ends the connection.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(reader, loop=loop)
        self.status: asyncio.Future[int] = loop.create_future()
        self._head = b""
        self._unpacker = Unpacker()
        self._connection: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connection = transport

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if not self.status.done():
            self.status.set_result(0)

    def data_received(self, data: bytes) -> None:
        try:
            if not self.status.done():
                data = self._read_head(data)
            super().data_received(self._unpacker.unpack(data))
        except ValueError:
            assert self._connection is not None
            self._connection.close()

    def _read_head(self, data: bytes) -> bytes:
        """Take in more of the answer's head. Returns what comes after it. Raises ValueError when it is none."""
        self._head, end, rest = (self._head + data).partition(b"\r\n\r\n")
        if end and (first := re.match(rb"HTTP/1\.[01] (\d{3}) ", self._head)):
            self.status.set_result(int(first[1]))
        elif end or len(self._head) > HEAD_BYTES:
            raise ValueError("this is no head of an answer")
        return rest


class Unpacker:
    """Takes off Docker's packing: pieces of stdout and stderr, each behind eight bytes. Only stdout is kept."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._left = 0
        self._wanted = False

    def unpack(self, data: bytes) -> bytes:
        """What of `data` is stdout. Raises ValueError at what cannot be a header."""
        stdout = bytearray()
        rest = memoryview(data)
        while rest:
            if self._left:
                piece, rest = rest[: self._left], rest[self._left :]
                self._left -= len(piece)
                if self._wanted:
                    stdout += piece
            else:
                missing = 8 - len(self._header)
                self._header += rest[:missing]
                rest = rest[missing:]
                if len(self._header) == 8:
                    self._begin()
        return bytes(stdout)

    def _begin(self) -> None:
        stream, size = self._header[0], int.from_bytes(self._header[4:])
        if stream not in (STDOUT, STDERR) or any(self._header[1:4]) or size > LARGEST_PIECE:
            raise ValueError("this is no header of Docker's")
        self._left, self._wanted = size, stream == STDOUT
        self._header.clear()
