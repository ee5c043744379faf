"""The one guarded way out: what a caller's text makes this server fetch or send.

Only public addresses, unless the operator allows others: the name is resolved here, every address it has is checked,
and the connection is made to the very address that was checked, so that a name cannot change its mind in between.
Redirects of images go through the same check; what is posted follows none. Size and time are limited.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx2

from afterglow.contracts import Reply
from afterglow.errors import ImageUnavailable, OutboundFailed

MAX_REDIRECTS = 3
MAX_IMAGE_BYTES = 20 * 1024 * 1024
TIMEOUT_S = 20.0
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
WRONG = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError)


class _Forbidden(ValueError):
    """The address is none that may be asked."""


class GuardedClient:
    """A `contracts.Outbound` over HTTP and HTTPS."""

    def __init__(self) -> None:
        self._client: httpx2.AsyncClient | None = None

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
        schemes = ("http", "https") if allow_private else ("https",)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.open("POST", url, headers, body, schemes=schemes, allow_private=allow_private) as response,
            ):
                return Reply(response.status_code, dict(response.headers), await _read(response, max_bytes))
        except TimeoutError:
            raise OutboundFailed(f"{_short(url)} gave no answer within {timeout_s:g} s.") from None
        except _Forbidden as error:
            raise OutboundFailed(f"{_short(url)} may not be asked: {error}.", forbidden=True) from None
        except WRONG as error:
            raise OutboundFailed(f"{_short(url)} cannot be reached: {str(error) or type(error).__name__}.") from None

    @asynccontextmanager
    async def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        *,
        schemes: tuple[str, ...] = ("http", "https"),
        allow_private: bool,
    ) -> AsyncIterator[httpx2.Response]:
        """The answer's head; its body is to be read inside. Raises one of WRONG."""
        target = httpx2.URL(url)
        if target.scheme not in schemes or not target.host:
            raise _Forbidden(f"it is no {' or '.join(schemes)} URL")
        port = target.port or (443 if target.scheme == "https" else 80)
        address = await checked_address(target.host, port, allow_private)
        if self._client is None:
            self._client = httpx2.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)
        request = self._client.build_request(
            method,
            target.copy_with(host=address),
            headers={**headers, "host": target.netloc.decode()},
            content=body,
            extensions={"sni_hostname": target.host},
        )
        response = await self._client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()


async def _read(response: httpx2.Response, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > max_bytes:
            break
    return bytes(body[:max_bytes])


async def checked_address(host: str, port: int, allow_private: bool) -> str:
    """The IP address to connect to. Raises ValueError for one that may not be asked, OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not allow_private:
        for address in addresses:
            if not is_public(address):
                raise _Forbidden(f"{host} is at a private address")
    return addresses[0]


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
            except _Forbidden as error:
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


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the internet can reach."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and (inner := _embedded(parsed)):
        return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


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
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_IMAGE_BYTES:
            raise ValueError(f"it is larger than {MAX_IMAGE_BYTES // 1024 // 1024} MB")
    return media_type, bytes(body)


def _short(url: str) -> str:
    return url if len(url) <= 200 else f"{url[:200]}…"
