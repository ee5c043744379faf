"""Which URLs and addresses may be asked on behalf of others."""

from __future__ import annotations

import pytest

from afterglow.addresses import NotAllowed, is_public, target_of

WEB = ("http", "https")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("192.0.0.8", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("169.254.169.254", False),
        ("168.63.129.16", False),  # Azure's machines learn there what is theirs alone
        ("100.64.0.1", False),
        ("127.255.255.254", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("ff0e::1", False),
        ("2001:db8::1", False),
        ("100::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("::ffff:0:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("2002:808:808::1", True),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),  # Teredo of 127.0.0.1
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::808:808", False),
        ("5f00::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    """Private, local, shared, reserved and many-receiver addresses are not, nor what stands for such a one in IPv6."""
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "no http or https URL"),
        ("file:///etc/passwd", "no http or https URL"),
        ("gopher://example.com/", "no http or https URL"),
        ("//example.com/", "no http or https URL"),
        ("https:///path", "no http or https URL"),
        ("https://user@example.com/", "names a user"),
        ("https://user:pw@example.com/", "names a user"),
        ("https://example.com%00.evil/", "no name"),
        ("https://exa mple.com/", "no name"),
        ("https://example.com\n/", "no URL"),
        ("https://-bad-.example/", "no name"),
        ("https://ex..ample/", "no name"),
        ("https://2130706433/", "unusual form"),
        ("https://0x7f.0.0.1/", "unusual form"),
        ("https://0x7f000001/", "unusual form"),
        ("https://0177.0.0.1/", "no URL"),
        ("https://127.1/", "unusual form"),
        ("https://1.2.3.4.5/", "unusual form"),
        ("https://example.0x1/", "unusual form"),
        ("https://１２７.0.0.1/", "no URL"),
        ("https://[fe80::1%25eth0]/", "no IPv6 address"),
        ("https://[::1/", "no URL"),
        ("https://example.com:0/", "no port"),
        ("https://example.com:99999/", "no port"),
        ("https://example.com:port/", "no URL"),
        ("https://example.com:22/", "port 22 is none"),
        ("http://example.com:25/", "port 25 is none"),
        ("https://127.0.0.1/", "private address"),
        ("https://127.0.0.1./", "private address"),
        ("https://[::ffff:10.0.0.1]/", "private address"),
        ("https://example.com/" + "x" * 2048, "longer than"),
    ],
)
def test_what_is_refused_without_a_look(url: str, says: str) -> None:
    """Whatever readers of URLs do not agree on, and whatever is private on its face."""
    with pytest.raises(NotAllowed, match=says):
        target_of(url, schemes=WEB, allow_private=False)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://Example.COM/", "example.com", 443),
        ("http://example.com./", "example.com", 80),
        ("https://bücher.example/", "xn--bcher-kva.example", 443),
        ("https://a_b.example:8443/", "a_b.example", 8443),
        ("https://8.8.8.8/", "8.8.8.8", 443),
        ("https://[2606:4700:0::1111]/", "2606:4700::1111", 443),
        ("https://example.com/p?q=user@host#x@y", "example.com", 443),
    ],
)
def test_what_may_be_asked(url: str, host: str, port: int) -> None:
    """Names in ASCII and small letters, addresses in their usual form."""
    target = target_of(url, schemes=WEB, allow_private=False)
    assert (target.host, target.port) == (host, port)


def test_private_ones_when_they_are_allowed() -> None:
    """Addresses of one's own network, any port, and no user even so."""
    assert target_of("http://10.0.0.8:25/", schemes=WEB, allow_private=True).address == "10.0.0.8"
    with pytest.raises(NotAllowed, match="names a user"):
        target_of("http://me@10.0.0.8/", schemes=WEB, allow_private=True)
