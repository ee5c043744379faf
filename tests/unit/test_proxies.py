"""Whose word about a caller's address is believed."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.datastructures import Headers

from afterglow.errors import ConfigError
from afterglow.proxies import Proxies


def seen(peer: str | None, told: str | list[str] | None, *trusted: str, proto: str = "") -> tuple[str, str]:
    """The address and the scheme of a request from `peer` with this `X-Forwarded-For`."""
    scope: dict[str, Any] = {"client": (peer, 1) if peer else None, "scheme": "http"}
    lines = [told] if isinstance(told, str) else told or []
    raw = [(b"x-forwarded-for", line.encode()) for line in lines]
    if proto:
        raw.append((b"x-forwarded-proto", proto.encode()))
    return Proxies(trusted).caller_address(scope, Headers(raw=raw)), scope["scheme"]


@pytest.mark.parametrize(
    ("peer", "told", "trusted", "address"),
    [
        ("10.0.0.1", "1.2.3.4", (), "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4", ("10.0.0.2",), "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4", ("10.0.0.0/8",), "1.2.3.4"),
        ("10.0.0.1", "6.6.6.6, 1.2.3.4, 10.0.0.7", ("10.0.0.0/8",), "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4"], ("10.0.0.1",), "1.2.3.4"),
        ("10.0.0.1", "6.6.6.6, nonsense", ("10.0.0.1",), "10.0.0.1"),
        ("10.0.0.1", "", ("10.0.0.1",), "10.0.0.1"),
        ("10.0.0.1", None, ("10.0.0.1",), "10.0.0.1"),
        ("10.0.0.1", "10.0.0.9", ("10.0.0.0/8",), "10.0.0.9"),
        ("::1", "[2001:db8::1]:443", ("::1",), "2001:db8::1"),
        ("::ffff:10.0.0.1", "1.2.3.4:5678", ("10.0.0.1",), "1.2.3.4"),
        (None, "1.2.3.4", ("10.0.0.1",), ""),
    ],
)
def test_the_last_address_that_is_no_trusted_proxys_counts(
    peer: str | None, told: Any, trusted: tuple[str, ...], address: str
):
    """What callers write at the front changes nothing."""
    assert seen(peer, told, *trusted)[0] == address


def test_only_a_trusted_proxy_says_https():
    """`X-Forwarded-Proto` of others is not looked at, nor what is no scheme."""
    assert seen("10.0.0.1", None, "10.0.0.1", proto="HTTPS")[1] == "https"
    assert seen("10.0.0.1", None, "10.0.0.2", proto="https")[1] == "http"
    assert seen("10.0.0.1", None, "10.0.0.1", proto="gopher")[1] == "http"


def test_what_is_no_network_is_refused():
    """At the start, with the setting's name."""
    with pytest.raises(ConfigError, match="trusted_proxies"):
        Proxies(["10.0.0.1/8"])
