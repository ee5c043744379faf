"""The one guarded way out: what a caller's text makes this server fetch or send.

Only public addresses, unless the operator allows others: the name is looked up here, every address it has is checked,
and the connection is made to an address that was checked, so that a name cannot change its mind in between. The
certificate is checked against the name. Redirects of images go through the same check; what is posted follows none.
Size and time are limited, and answers are not decompressed: a little can become very much.

Every request has a connection of its own. A pool would know servers by their addresses, and two names at one address,
or one name before and after it moved, are not the same server.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from afterglow import __version__
from afterglow.addresses import NotAllowed, Target, is_public, target_of
from afterglow.contracts import Reply
from afterglow.errors import ImageUnavailable, OutboundFailed

MAX_REDIRECTS = 3
MAX_IMAGE_BYTES = 20 * 1024 * 1024
TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 5.0  # one of a name's addresses; then the next is tried
MAX_ADDRESSES = 8
MAX_LOOKUPS = 64  # names asked for at once; what hangs there holds up no other part of the server
OURS = {"user-agent": f"Afterglow/{__version__}", "accept-encoding": "identity"}
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
WEB = ("http", "https")
WRONG = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError)


class GuardedClient:
    """A `contracts.Outbound` over HTTP and HTTPS."""

    def __init__(self, certificates: ssl.SSLContext | None = None) -> None:
        """certificates: whom to trust; None: whom everyone trusts."""
        self._certificates = certificates
        self._clients: dict[str, httpx2.AsyncClient] = {}
        self._names = _Names()

    async def post(
        self,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        timeout_s: float,
        max_bytes: int,
        allow_private: bool,
    ) -> Reply:
        schemes = WEB if allow_private else ("https",)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.open("POST", url, headers, body, schemes=schemes, allow_private=allow_private) as response,
            ):
                return Reply(response.status_code, dict(response.headers), await _read(response, max_bytes))
        except TimeoutError:
            raise OutboundFailed(f"{_place(url)} gave no answer within {timeout_s:g} s.") from None
        except NotAllowed as error:
            raise OutboundFailed(f"{_place(url)} may not be asked: {error}.", forbidden=True) from None
        except WRONG as error:
            raise OutboundFailed(f"{_place(url)} cannot be reached: {_why(error)}.") from None

    @asynccontextmanager
    async def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        *,
        schemes: Collection[str] = WEB,
        allow_private: bool,
    ) -> AsyncIterator[httpx2.Response]:
        """The answer's head; its body is to be read inside, raw. Raises NotAllowed and others of WRONG."""
        target = target_of(url, schemes=schemes, allow_private=allow_private)
        addresses = await self.addresses(target, allow_private)
        response = await self._send(method, target, addresses, headers, body)
        try:
            yield response
        finally:
            await response.aclose()

    async def addresses(self, target: Target, allow_private: bool) -> list[str]:
        """Where to connect to. One address that may not be asked spoils the name: raises NotAllowed, or OSError."""
        found = [target.address] if target.address else await self._names.look_up(target.host)
        if not allow_private and not all(map(is_public, found)):
            raise NotAllowed(f"{target.host} is at a private address")
        return found[:MAX_ADDRESSES]

    async def _send(
        self, method: str, target: Target, addresses: list[str], headers: Mapping[str, str], body: bytes | None
    ) -> httpx2.Response:
        """Ask the first of the addresses that can be connected to."""
        client = await self._client(target.url.scheme)
        for address in addresses:
            request = client.build_request(
                method,
                target.url.copy_with(host=address),
                headers={**OURS, **headers, "host": target.url.netloc.decode()},
                content=body,
                extensions={"sni_hostname": target.host},
            )
            try:
                return await client.send(request, stream=True)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if address is addresses[-1]:
                    raise
        raise OSError("its name has no address")

    async def _client(self, scheme: str) -> httpx2.AsyncClient:
        if scheme not in self._clients:
            trusted = self._certificates
            if scheme == "http":
                trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # nobody
            elif trusted is None:  # reading whom everyone trusts takes long
                trusted = await asyncio.to_thread(httpx2.create_ssl_context, trust_env=False)
            opened = httpx2.AsyncClient(
                timeout=httpx2.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S, read=None),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
                follow_redirects=False,
                trust_env=False,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # one target's are nobody else's
                verify=trusted,
            )
            self._clients.setdefault(
                scheme, opened
            )  # somebody may have been quicker; one without connections is no loss
        return self._clients[scheme]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()


class _Names:
    """Looks names up, each in a thread of its own: the pool that the rest of the server shares is small, and whoever
    has a domain can make its lookups hang. A thread that hangs does not keep the process from ending."""

    def __init__(self) -> None:
        self._hanging = 0

    async def look_up(self, host: str) -> list[str]:
        """The IP addresses of a name, without zones. Raises OSError."""
        if self._hanging >= MAX_LOOKUPS:
            raise OSError("too many names are being looked up")
        self._hanging += 1
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()
        threading.Thread(target=self._ask, args=(host, loop, answer), name="name lookup", daemon=True).start()
        return await answer

    def _ask(self, host: str, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[list[str]]) -> None:
        addresses: list[str] | OSError
        try:
            addresses = resolve(host)
        except (OSError, UnicodeError) as error:
            addresses = OSError(f"its name cannot be looked up ({error})")
        try:
            loop.call_soon_threadsafe(self._answer, answer, addresses)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _answer(self, answer: asyncio.Future[list[str]], addresses: list[str] | OSError) -> None:
        self._hanging -= 1
        if answer.done():
            return
        if isinstance(addresses, OSError):
            answer.set_exception(addresses)
        else:
            answer.set_result(addresses)


def resolve(host: str) -> list[str]:
    """The IP addresses of a name, each once, in the system's order; blocks. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def _read(response: httpx2.Response, max_bytes: int) -> bytes:
    """The beginning of the body. Raises ValueError when it is compressed, unless nothing of it is wanted."""
    if not max_bytes:
        return b""
    _check_plain(response)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) >= max_bytes:
            break
    return bytes(body[:max_bytes])


def _check_plain(response: httpx2.Response) -> None:
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ValueError("its answer is compressed, though it was asked not to")


def _why(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _place(url: str) -> str:
    """A URL without what may be secret in it."""
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        return "The URL"
    return f"{parsed.scheme}://{parsed.netloc.decode('latin-1').rpartition('@')[2]}"[:200]


class GuardedFetcher:
    """A `contracts.ImageFetcher` over HTTP and HTTPS."""

    def __init__(self, client: GuardedClient, *, allow_private: bool) -> None:
        """allow_private: also private, loopback and link-local addresses."""
        self._client = client
        self._allow_private = allow_private

    async def data_url(self, url: str) -> str:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                media_type, body = await self._fetch(url)
        except TimeoutError:
            raise ImageUnavailable(f"The image {_short(url)} took longer than {TIMEOUT_S:.0f} s to fetch.") from None
        return f"data:{media_type};base64,{base64.b64encode(body).decode()}"

    async def _fetch(self, url: str) -> tuple[str, bytes]:
        for _ in range(MAX_REDIRECTS + 1):
            try:
                answer = await self._get(url)
            except NotAllowed as error:
                raise ImageUnavailable(
                    f"The image {_short(url)} cannot be fetched: {error} (setting: private_images)."
                ) from None
            except WRONG as error:
                raise ImageUnavailable(f"The image {_short(url)} cannot be fetched: {error}.") from None
            if isinstance(answer, tuple):
                return answer
            url = answer
        raise ImageUnavailable(f"The image {_short(url)} redirects too often.")

    async def _get(self, url: str) -> tuple[str, bytes] | str:
        """The image's type and bytes, or where it has moved to."""
        headers = {"accept": ", ".join(IMAGE_TYPES)}
        async with self._client.open("GET", url, headers, allow_private=self._allow_private) as response:
            if response.is_redirect:
                return str(httpx2.URL(url).join(_location(response)))
            return await _read_image(response)


def _location(response: httpx2.Response) -> str:
    location: str | None = response.headers.get("location")
    if location is None:
        raise ValueError("it has moved, and its server does not say where to")
    return location


async def _read_image(response: httpx2.Response) -> tuple[str, bytes]:
    if response.status_code != 200:
        raise ValueError(f"its server answered {response.status_code}")
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in IMAGE_TYPES:
        raise ValueError(f"it is of type {media_type or 'unknown'}, none of {', '.join(IMAGE_TYPES)}")
    _check_plain(response)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_IMAGE_BYTES:
            raise ValueError(f"it is larger than {MAX_IMAGE_BYTES // 1024 // 1024} MB")
    return media_type, bytes(body)


def _short(url: str) -> str:
    return url if len(url) <= 200 else f"{url[:200]}…"
