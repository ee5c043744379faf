"""Which URLs and addresses this server asks on behalf of others. No I/O: names are looked up in `outbound.py`.

What a browser, a resolver and a C library read differently (`0x7f.1`, `2130706433`, zones, `user@host`) is refused, so
that everyone who looks at a URL sees the same host in it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from typing import NamedTuple

import httpx2

MAX_URL_CHARS = 2048
NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*")
READ_AS_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label that makes some readers see an IPv4 address
WEB_PORTS = (80, 443)
LAST_RESERVED_PORT = 1023  # mail, shells and the like, some of which take a request for a conversation
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Global as some versions of Python see it, and still none of a host on the internet: protocols, relays, what answers
# Azure's machines alone about themselves, translated addresses, addresses of sites, segments of routes.
NOT_OF_A_HOST = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "64:ff9b:1::/48", "fec0::/10", "2001::/23", "5f00::/16"),
    )
)
COMPATIBLE = ipaddress.IPv6Network("::/96")


class NotAllowed(ValueError):
    """The URL is none that may be asked; the text says why, after the URL's name and `: `."""


class Target(NamedTuple):
    """A URL taken apart. host: in ASCII, without brackets and without a dot at its end."""

    url: httpx2.URL
    host: str
    port: int

    @property
    def address(self) -> str | None:
        """The host, when it is an IP address."""
        try:
            return str(ipaddress.ip_address(self.host))
        except ValueError:
            return None


def target_of(url: str, *, schemes: Collection[str], allow_private: bool) -> Target:
    """Take a URL apart. allow_private: also private addresses, and any port. Raises NotAllowed."""
    if len(url) > MAX_URL_CHARS:
        raise NotAllowed(f"it is longer than {MAX_URL_CHARS} characters")
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        raise NotAllowed("it is no URL") from None
    if parsed.scheme not in schemes or not parsed.raw_host:
        raise NotAllowed(f"it is no {' or '.join(sorted(schemes))} URL")
    if parsed.userinfo or "@" in parsed.netloc.decode("latin-1"):
        raise NotAllowed("it names a user")
    host = _host(parsed.raw_host.decode("latin-1"))
    port = parsed.port if parsed.port is not None else (443 if parsed.scheme == "https" else 80)
    if not 1 <= port <= 65535:
        raise NotAllowed("it has no port that exists")
    target = Target(parsed, host, port)
    if not allow_private:
        if port <= LAST_RESERVED_PORT and port not in WEB_PORTS:
            raise NotAllowed(f"port {port} is none of the web's")
        if target.address is not None and not is_public(target.address):
            raise NotAllowed(f"{host} is a private address")
    return target


def _host(raw: str) -> str:
    host = raw.lower().strip("[]")
    if ":" in host:
        try:
            return str(ipaddress.IPv6Address(host if "%" not in host else "a zone"))
        except ValueError:
            raise NotAllowed("its host is no IPv6 address") from None
    host = host.removesuffix(".")
    if READ_AS_NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise NotAllowed("its host is an IPv4 address in an unusual form") from None
    if len(host) > 253 or not NAME.fullmatch(host):
        raise NotAllowed("its host is no name")
    return host


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the internet can reach."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.scope_id is not None:
            return False
        if (inner := _embedded(parsed)) is not None:
            return is_public(str(inner))
    if any(parsed in network for network in NOT_OF_A_HOST):
        return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if address in NAT64 or address in COMPATIBLE:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
