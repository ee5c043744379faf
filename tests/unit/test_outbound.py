"""The guarded way out: which addresses it goes to, and what it brings back."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from afterglow import outbound
from afterglow.addresses import is_public
from afterglow.errors import ImageUnavailable
from afterglow.outbound import GuardedClient, GuardedFetcher

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 32
PAGE = "HTTP/1.1 {status} Fine\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n"


@asynccontextmanager
async def web_server(answers: dict[str, bytes]) -> AsyncGenerator[tuple[str, list[str]], None]:
    """Serves `answers` by path; yields its URL and the Host headers that it was sent."""
    hosts: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        hosts.extend(line[6:] for line in head.splitlines() if line.lower().startswith("host: "))
        writer.write(answers[head.split()[1]])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", hosts


def answer(body: bytes = PNG, *, kind: str = "image/png", status: int = 200, more: str = "") -> bytes:
    return PAGE.format(status=status, kind=kind, length=len(body), more=more).encode() + body


@pytest.fixture
async def fetch() -> AsyncGenerator[Callable[[str], Awaitable[str]], None]:
    fetcher = GuardedFetcher(client := GuardedClient(), allow_private=True)
    yield fetcher.data_url
    await client.close()


async def test_an_image_comes_back_as_data(fetch: Callable[[str], Awaitable[str]]) -> None:
    """The bytes and the type of an image become a data URL, and its server is asked under its own name."""
    async with web_server({"/a.png": answer()}) as (url, hosts):
        assert await fetch(f"{url}/a.png") == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
        assert hosts == [url.removeprefix("http://")]


async def test_a_redirect_is_followed(fetch: Callable[[str], Awaitable[str]]) -> None:
    """An image that has moved is fetched from where it is now."""
    moved = answer(b"", status=302, more="Location: /b.png\r\n")
    async with web_server({"/a.png": moved, "/b.png": answer()}) as (url, _):
        assert (await fetch(f"{url}/a.png")).startswith("data:image/png")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (answer(kind="text/html"), "of type text/html"),
        (answer(status=404), "answered 404"),
        (answer(b"", status=302, more="Location: /a.png\r\n"), "redirects too often"),
        (answer(b"", status=302), "does not say where to"),
        (answer(b"", status=302, more="Location: file:///etc/passwd\r\n"), "no http or https URL"),
    ],
)
async def test_what_is_no_image_is_refused(fetch: Callable[[str], Awaitable[str]], given: bytes, says: str) -> None:
    """Other types, errors and endless redirects end with a reason."""
    async with web_server({"/a.png": given}) as (url, _):
        with pytest.raises(ImageUnavailable, match=says):
            await fetch(f"{url}/a.png")


async def test_an_image_that_is_too_large_is_refused(
    fetch: Callable[[str], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more is read than is allowed."""
    monkeypatch.setattr(outbound, "MAX_IMAGE_BYTES", 16)
    async with web_server({"/a.png": answer()}) as (url, _):
        with pytest.raises(ImageUnavailable, match="larger than"):
            await fetch(f"{url}/a.png")


async def test_a_slow_server_is_given_up(
    fetch: Callable[[str], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that never answers costs a bounded time."""
    monkeypatch.setattr(outbound, "TIMEOUT_S", 0.05)
    released = asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ImageUnavailable, match="longer than"):
            await fetch(f"http://127.0.0.1:{port}/a.png")
        released.set()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433"])
async def test_this_machine_is_not_fetched_from(host: str) -> None:
    """However it is written, a loopback address is refused without a connection."""
    async with web_server({"/a.png": answer()}) as (url, hosts):
        port = url.rpartition(":")[2]
        fetcher = GuardedFetcher(client := GuardedClient(), allow_private=False)
        with pytest.raises(ImageUnavailable, match="cannot be fetched"):
            await fetcher.data_url(f"http://{host}:{port}/a.png")
        await client.close()
        assert hosts == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    """Private, local, shared and embedded private addresses are not."""
    assert is_public(address) is public
