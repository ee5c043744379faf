"""What is put out for attacks: secrets to be found, and sockets to be reached. Only on this machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOMEWHERE = "192.0.2.1"  # documentation's address: connecting a UDP socket to it sends nothing, but picks our address
VARIABLE = "AFTERGLOW_TEST_UPSTREAM_KEY"


@dataclass
class Bait:
    """secret: a word that no session may ever see. folder: where a file holds it. listening: family, address and port
    that take TCP and UDP. abstract, path: of unix sockets. touched: what has reached any of them."""

    secret: str
    folder: str
    listening: list[tuple[int, str, int]] = field(default_factory=list)
    abstract: str = ""
    path: str = ""
    touched: list[str] = field(default_factory=list)

    def names(self) -> dict[str, Any]:
        """What the attacker is told; much more than a real one would know."""
        return {
            "PLANTED": f"{self.folder}/afterglow.db",
            "LISTENING": self.listening,
            "ABSTRACT": self.abstract,
            "SOCKET": self.path,
            "SERVER": os.getpid(),
            "SECRET": self.secret,
        }


@asynccontextmanager
async def put_out() -> AsyncGenerator[Bait]:
    """The secret in a file and in our own environment, and listeners of every kind."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="afterglow-bait-"))
        bait = Bait(f"secret-{secrets.token_hex(16)}", folder)
        Path(folder, "afterglow.db").write_text(bait.secret)
        stack.enter_context(variable(VARIABLE, bait.secret))
        for family, address in addresses():
            await stack.enter_async_context(_listening(bait, family, address))
        bait.abstract = f"\0afterglow-bait-{secrets.token_hex(8)}"
        bait.path = f"{folder}/docker.sock"
        for name in (bait.abstract, bait.path):
            await stack.enter_async_context(await asyncio.start_unix_server(_Told(bait, "a unix socket").take, name))
        yield bait


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable, for a time."""
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def addresses() -> list[tuple[int, str]]:
    """Loopback in both families, and the machine's own address."""
    found = [(int(socket.AF_INET), "127.0.0.1"), (int(socket.AF_INET), own_address())]
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        found.append((int(socket.AF_INET6), "::1"))
    return list(dict.fromkeys(found))


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((SOMEWHERE, 9))
        except OSError:
            return "127.0.0.1"
        return str(asking.getsockname()[0])


class _Told(asyncio.DatagramProtocol):
    """Notes whoever comes."""

    def __init__(self, bait: Bait, where: str) -> None:
        self._bait = bait
        self._where = where

    def take(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._bait.touched.append(self._where)
        writer.close()

    def datagram_received(self, _data: bytes, _address: Any) -> None:
        self._bait.touched.append(self._where)


@asynccontextmanager
async def _listening(bait: Bait, family: int, address: str) -> AsyncGenerator[None]:
    told = _Told(bait, address)
    server = await asyncio.start_server(told.take, address, 0)
    port = server.sockets[0].getsockname()[1]
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: told, (address, port))
    bait.listening.append((family, address, port))
    try:
        yield
    finally:
        transport.close()
        server.close()
