"""The guarded way out: which addresses it goes to, and what it brings back."""

from __future__ import annotations

import asyncio
import base64
import datetime
import gzip
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from afterglow import outbound
from afterglow.contracts import Reply
from afterglow.errors import ImageUnavailable, OutboundFailed
from afterglow.outbound import GuardedClient, GuardedFetcher

Names = dict[str, list[str] | Callable[[], list[str]]]
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


# --- posts -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def client() -> AsyncGenerator[GuardedClient, None]:
    client = GuardedClient()
    yield client
    await client.close()


async def post(client: GuardedClient, url: str, **options: Any) -> Reply:
    given: dict[str, Any] = {"timeout_s": 2, "max_bytes": 1000, "allow_private": True, **options}
    return await client.post(url, {"x-one": "1"}, b"body", **given)


async def refused(client: GuardedClient, url: str, **options: Any) -> OutboundFailed:
    with pytest.raises(OutboundFailed) as failed:
        await post(client, url, **options)
    return failed.value


@asynccontextmanager
async def raw_server(
    answer: Callable[[asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncGenerator[tuple[int, list[bytes]], None]:
    """Answers every request as told; yields its port and what was sent."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            await answer(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1], heads


def at_once(data: bytes) -> Callable[[asyncio.StreamWriter], Awaitable[None]]:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """What names stand for, in place of the system's resolver; a function is asked each time."""
    known: Names = {}

    def resolve(host: str) -> list[str]:
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        found = known[host]
        return found() if callable(found) else found

    monkeypatch.setattr(outbound, "resolve", resolve)
    return known


FINE = answer(b"fine", kind="text/plain")


async def test_any_status_is_a_reply(client: GuardedClient) -> None:
    """Also a redirect, which is not followed, and an error; no more of the body is brought back than was asked for."""
    moved = answer(b"elsewhere", status=302, more="Location: /b\r\n")
    async with web_server({"/a": moved, "/e": answer(b"broken", status=500)}) as (url, hosts):
        reply = await post(client, f"{url}/a", max_bytes=4)
        assert (reply.status, reply.headers["location"], reply.body) == (302, "/b", b"else")
        assert (await post(client, f"{url}/e")).status == 500
        assert len(hosts) == 2


@pytest.mark.parametrize("url", ["http://8.8.8.8/", "https://10.0.0.8/", "https://me@example.com/", "https://0x7f.1/"])
async def test_what_may_not_be_posted_to(client: GuardedClient, url: str) -> None:
    """Plain http, private addresses, users and odd hosts are refused for good."""
    assert (await refused(client, url, allow_private=False)).forbidden


async def test_one_private_address_spoils_a_name(client: GuardedClient, names: Names) -> None:
    """However many public addresses stand beside it; nothing is connected to."""
    async with raw_server(at_once(FINE)) as (port, heads):
        for private in ("127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fe80::1%eth0"):
            names["rebound.example"] = ["8.8.8.8", private]
            failed = await refused(client, f"https://rebound.example:{port}/", allow_private=False)
            assert failed.forbidden
            assert str(failed) == (
                f"https://rebound.example:{port} may not be asked: rebound.example is at a private address."
            )
        assert heads == []


async def test_a_name_cannot_change_its_mind(client: GuardedClient, names: Names) -> None:
    """It is looked up once, and what was checked is what is connected to."""
    answers = iter([["127.0.0.1"], ["10.0.0.8"]])
    names["rebound.example"] = lambda: next(answers)
    async with raw_server(at_once(FINE)) as (port, heads):
        assert (await post(client, f"http://rebound.example:{port}/")).body == b"fine"
        assert b"\r\nhost: rebound.example:%d\r\n" % port in heads[0].lower()
    assert next(answers) == ["10.0.0.8"]


async def test_the_next_address_is_tried(client: GuardedClient, names: Names) -> None:
    """When nobody listens at the first."""
    names["two.example"] = ["127.0.0.2", "127.0.0.1"]
    async with raw_server(at_once(FINE)) as (port, _):
        assert (await post(client, f"http://two.example:{port}/")).body == b"fine"
    failed = await refused(client, f"http://two.example:{port}/?token=secret")
    assert str(failed).startswith(f"http://two.example:{port} cannot be reached: ")
    assert not failed.forbidden


async def test_a_name_that_is_not_there(client: GuardedClient, names: Names) -> None:
    """It may be there later: trying again can help."""
    failed = await refused(client, "https://nowhere.example/", allow_private=False)
    assert "its name cannot be looked up" in str(failed)
    assert not failed.forbidden


async def test_a_slow_lookup_holds_up_nobody(
    client: GuardedClient,
    names: Names,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not other names, not other work in threads, and itself no longer than its time; there is a bound to how many."""
    released = threading.Event()
    names["slow.example"] = lambda: ["127.0.0.1"][: released.wait(10) - 1]
    names["quick.example"] = ["127.0.0.1"]
    monkeypatch.setattr(outbound, "MAX_LOOKUPS", 40)
    async with raw_server(at_once(FINE)) as (port, _):
        slow = [asyncio.create_task(refused(client, "http://slow.example/", timeout_s=0.3)) for _ in range(39)]
        await asyncio.sleep(0)
        assert (await post(client, f"http://quick.example:{port}/")).body == b"fine"
        assert await asyncio.to_thread(lambda: 1) == 1
        assert {str(failed) for failed in await asyncio.gather(*slow)} == {
            "http://slow.example gave no answer within 0.3 s."
        }
        extra = asyncio.create_task(refused(client, "http://slow.example/", timeout_s=0.1))
        await asyncio.sleep(0)
        assert "too many names" in str(await refused(client, f"http://quick.example:{port}/"))
        await extra
        released.set()
        async with asyncio.timeout(5):
            while client._names._hanging:
                await asyncio.sleep(0.001)
        assert (await post(client, f"http://quick.example:{port}/")).status == 200


@pytest.mark.parametrize("drips", [b"", b"HTTP/1.1 200 Fine\r\n", b"HTTP/1.1 200 Fine\r\ncontent-length: 900\r\n\r\n"])
async def test_an_answer_that_drips_is_given_up(client: GuardedClient, drips: bytes) -> None:
    """The time is for all of it: head or body, a byte now and then does not make it longer."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(drips)
        for _ in range(500):
            writer.write(b"x" if drips.endswith(b"\r\n\r\n") else b"x: y\r\n" if drips else b"H"[: not drips])
            await writer.drain()
            await asyncio.sleep(0.02)

    async with raw_server(drip) as (port, _):
        began = time.monotonic()
        failed = await refused(client, f"http://127.0.0.1:{port}/", timeout_s=0.2)
        assert time.monotonic() - began < 2
        assert "127.0.0.1" in str(failed)


async def test_an_endless_head_is_given_up(client: GuardedClient) -> None:
    """Headers without end do not fill the memory."""

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 Fine\r\n")
        for number in range(100_000):
            writer.write(b"x-%d: %b\r\n" % (number, b"y" * 1000))
            await writer.drain()

    async with raw_server(endless) as (port, _):
        assert "cannot be reached" in str(await refused(client, f"http://127.0.0.1:{port}/", timeout_s=10))


async def test_nothing_is_decompressed(client: GuardedClient) -> None:
    """An answer is asked for as it is; one that is compressed is refused, or not read when nobody wants its body."""
    bomb = answer(gzip.compress(b"\0" * 10_000_000), more="Content-Encoding: gzip\r\n")
    async with raw_server(at_once(bomb)) as (port, heads):
        assert "is compressed" in str(await refused(client, f"http://127.0.0.1:{port}/"))
        assert b"accept-encoding: identity" in heads[0].lower()
        assert (await post(client, f"http://127.0.0.1:{port}/", max_bytes=0)).status == 200
        fetcher = GuardedFetcher(client, allow_private=True)
        with pytest.raises(ImageUnavailable, match="is compressed"):
            await fetcher.data_url(f"http://127.0.0.1:{port}/a.png")


async def test_nothing_is_remembered(client: GuardedClient) -> None:
    """A cookie that a target sets comes back to nobody."""
    async with raw_server(at_once(answer(b"", more="Set-Cookie: a=b; Path=/\r\n"))) as (port, heads):
        for _ in range(2):
            assert (await post(client, f"http://127.0.0.1:{port}/")).headers["set-cookie"] == "a=b; Path=/"
        assert b"cookie" not in heads[1].lower()


# --- certificates ----------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority for one test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test authority")])
        self._own = self._certificate(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0))

    def _certificate(self, name: x509.Name, key: Any, extension: x509.ExtensionType) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(self._key, hashes.SHA256())
        )

    def trusted(self) -> ssl.SSLContext:
        """Of a client that trusts it, and nobody else."""
        pem = self._own.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=pem)

    def server(self, *dns_names: str) -> ssl.SSLContext:
        """Of a server that has a certificate for these names."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.DNSName(name) for name in dns_names])
        certificate = self._certificate(x509.Name([]), key, names)
        file = self._folder / f"{dns_names[0]}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


async def test_the_certificate_is_checked_against_the_name(tmp_path: Path, names: Names) -> None:
    """Not against the address that is connected to, and the name is what the server is asked for."""
    authority = Authority(tmp_path)
    tls = authority.server("good.example")
    asked: list[str | None] = []
    tls.sni_callback = lambda _, name, __: asked.append(name)
    names |= {"good.example": ["127.0.0.1"], "evil.example": ["127.0.0.1"]}
    client = GuardedClient(authority.trusted())
    async with raw_server(at_once(FINE), tls) as (port, heads):
        assert (await post(client, f"https://good.example:{port}/")).body == b"fine"
        assert (await post(client, f"https://good.example.:{port}/")).body == b"fine"
        for wrong in ("evil.example", "127.0.0.1"):
            failed = await refused(client, f"https://{wrong}:{port}/")
            assert "certificate" in str(failed).lower()
        assert asked == ["good.example", "good.example", "evil.example", None]
        assert len(heads) == 2
    await client.close()


async def test_a_stranger_is_not_trusted(tmp_path: Path, client: GuardedClient, names: Names) -> None:
    """A certificate of an authority that nobody knows ends the connection before anything is sent."""
    names["good.example"] = ["127.0.0.1"]
    async with raw_server(at_once(FINE), Authority(tmp_path).server("good.example")) as (port, heads):
        assert "certificate" in str(await refused(client, f"https://good.example:{port}/")).lower()
        assert heads == []


async def test_two_names_at_one_address_are_two_servers(tmp_path: Path, names: Names) -> None:
    """A connection that was made under one name is never used for another, even when the server would keep it."""
    authority = Authority(tmp_path)
    names |= {"one.example": ["127.0.0.1"], "two.example": ["127.0.0.1"]}
    contexts = {name: authority.server(name) for name in names}
    shown: list[str] = []

    def choose(socket: ssl.SSLObject, name: str, _: ssl.SSLContext) -> None:
        shown.append(name)
        socket.context = contexts[name]

    front = authority.server("nobody.example")
    front.sni_callback = choose  # type: ignore[assignment]
    kept = b"HTTP/1.1 200 Fine\r\ncontent-length: 4\r\n\r\nfine"
    released = asyncio.Event()

    async def keep(writer: asyncio.StreamWriter) -> None:
        writer.write(kept)
        await writer.drain()
        await released.wait()

    client = GuardedClient(authority.trusted())
    async with raw_server(keep, front) as (port, _):
        for name in ("one.example", "two.example", "one.example"):
            assert (await post(client, f"https://{name}:{port}/")).body == b"fine"
        released.set()
    assert shown == ["one.example", "two.example", "one.example"]
    await client.close()
