"""Which address a request came from: the connection's, or, behind trusted proxies, the one that they tell of."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

from afterglow.errors import ConfigError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Proxies:
    """The proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed."""

    def __init__(self, trusted: Sequence[str]) -> None:
        """trusted: addresses and networks (`10.0.0.0/8`). Raises ConfigError."""
        try:
            self._trusted: list[Network] = [ipaddress.ip_network(entry.strip("[]")) for entry in trusted]
        except ValueError as error:
            raise ConfigError(f"trusted_proxies: {error}.") from None

    def caller_address(self, scope: Scope, headers: Headers) -> str:
        """The caller's IP address; "" when the connection has none. A trusted proxy also says whether its caller came
        by https, which goes into `scope`.

        Each proxy adds at the end what it saw, and callers can write anything at the front: what counts is the last
        address that is not a trusted proxy's.
        """
        peer = scope["client"][0] if scope.get("client") else ""
        address = _address(peer) if self._trusted else None
        if address is None or not self._trusts(address):
            return str(peer)
        if (protocol := headers.get("x-forwarded-proto", "").lower()) in ("http", "https"):
            scope["scheme"] = protocol
        for entry in reversed(", ".join(headers.getlist("x-forwarded-for")).split(",")):
            told = _address(entry)
            if told is None:
                break
            address = told
            if not self._trusts(told):
                break
        return str(address)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _address(text: str) -> Address | None:
    """An address as proxies write it: perhaps with a port, IPv6 perhaps in brackets."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
