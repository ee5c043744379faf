"""Keys as they are presented, shown and kept; and which addresses are this machine's alone."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from afterglow.access import Access, Caller, hash_key, is_loopback, mask, new_key, presented_key
from afterglow.contracts import Store
from afterglow.errors import Forbidden, StoreUnavailable
from afterglow.settings import Settings
from afterglow.testing import SetClock


class NoStore:
    """A store that must not be asked."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"{name} of the store was used")


NO_STORE: Store = NoStore()  # type: ignore[assignment]


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({}, ""),
        ({"authorization": "Bearer sk-1"}, "sk-1"),
        ({"authorization": "bearer sk-1"}, "sk-1"),
        ({"authorization": "Bearer   sk-1  "}, "sk-1"),
        ({"authorization": "Bearer "}, ""),
        ({"authorization": "Bearer"}, ""),
        ({"authorization": basic(":sk-1")}, "sk-1"),
        ({"authorization": basic("user:sk:1")}, "sk:1"),
        ({"authorization": basic("no colon")}, ""),
        ({"authorization": "Basic !!!"}, ""),
        ({"authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()}, ""),
        ({"authorization": "Digest sk-1"}, ""),
        ({"api-key": " sk-1 "}, "sk-1"),
        ({"authorization": "Digest x", "api-key": "sk-1"}, "sk-1"),
        ({"authorization": "Bearer sk-1", "api-key": "sk-2"}, "sk-1"),
    ],
)
def test_a_key_is_found_where_clients_put_it(headers: dict[str, str], key: str):
    """As a bearer, as the password of Basic, or in Azure's header; anything else is no key."""
    assert presented_key(Headers(headers)) == key


@given(st.text(max_size=80))
def test_a_masked_key_is_worthless(key: str):
    """What is shown of a key is at most its first five and last four characters, of a short one nothing."""
    shown = mask(key)
    assert len(shown) <= 29
    visible = shown.replace("*", "")
    if len(key) < 12:
        assert visible == ""
    elif "*" not in key:
        assert visible == key[:5] + key[-4:]
        assert "*" in shown


def test_a_new_key_is_kept_as_its_hash():
    """The secret is long and of chance; the row and the hash do not tell it."""
    secret, row, key_hash = new_key("acme", "for tests", 1_700_000_000)
    assert re.fullmatch(r"sk-ag-[A-Za-z0-9_-]{32}", secret)
    assert (row.project_id, row.name, row.created_at, row.revoked_at) == ("acme", "for tests", 1_700_000_000, None)
    assert key_hash == hash_key(secret)
    assert re.fullmatch(r"[0-9a-f]{64}", key_hash)
    assert secret not in repr(row)
    assert secret[6:-4] not in repr(row)
    assert new_key("acme", "", 0)[0] != secret


def test_any_key_can_be_hashed():
    """Bytes that are no UTF-8 arrive as surrogates, and are a wrong key like any other."""
    assert hash_key("sk-\udcff") != hash_key("sk-\ufffd")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2", "127.255.255.254")),
        *(
            (host, False)
            for host in ("0.0.0.0", "::", "192.168.1.5", "10.0.0.1", "example.com", "", "127.0.0.1.example")
        ),
    ],
)
def test_loopback_is_this_machine_alone(host: str, expected: bool):
    """Names and addresses that others cannot reach; everything unknown counts as reachable."""
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("listening", "allowed", "host", "served"),
    [
        *(
            ("127.0.0.1", (), host, True)
            for host in ("127.0.0.1:8000", "localhost", "LocalHost:1", "[::1]:8000", "[::1]", "")
        ),
        *(("127.0.0.1", (), host, False) for host in ("evil.example", "127.0.0.1.evil.example:8000", "192.168.1.5")),
        ("127.0.0.2", (), "127.0.0.2:8000", True),
        ("127.0.0.1", ("app.example",), "app.example:443", True),
        ("127.0.0.1", ("app.example",), "APP.example", True),
        ("127.0.0.1", ("app.example",), "other.example", False),
        ("127.0.0.1", ("*",), "other.example", True),
        ("0.0.0.0", (), "any.example", True),
        ("192.168.1.5", ("app.example",), "192.168.1.5:8000", True),
        ("192.168.1.5", ("app.example",), "localhost", True),
        ("192.168.1.5", ("app.example",), "other.example", False),
    ],
)
def test_a_host_is_served_or_not(listening: str, allowed: tuple[str, ...], host: str, served: bool):
    """Loopback serves loopback names and those allowed; beyond it keys decide, unless hosts are named."""
    access = Access(Settings(host=listening, allowed_hosts=allowed), NO_STORE, SetClock())
    if served:
        access.check_host(host)
    else:
        with pytest.raises(Forbidden, match="AFTERGLOW_ALLOWED_HOSTS"):
            access.check_host(host)


@pytest.mark.parametrize(
    ("allowed", "origin", "served"),
    [
        ((), None, True),
        ((), "http://localhost:3000", False),
        ((), "null", False),
        (("http://localhost:3000",), "http://localhost:3000", True),
        (("http://localhost:3000",), "http://localhost:3001", False),
        (("http://localhost:3000",), "https://localhost:3000", False),
        (("*",), "https://anything.example", True),
    ],
)
def test_an_origin_may_call_or_not(allowed: tuple[str, ...], origin: str | None, served: bool):
    """Web pages may call only when their origin is named, to the letter."""
    access = Access(Settings(allowed_origins=allowed), NO_STORE, SetClock())
    if served:
        access.check_origin(origin)
    else:
        with pytest.raises(Forbidden, match="AFTERGLOW_ALLOWED_ORIGINS"):
            access.check_origin(origin)


class BrokenStore:
    """A store that nobody can read."""

    async def read(self, work: object) -> None:
        raise StoreUnavailable("it is away")


async def test_configured_keys_need_no_database():
    """Keys of the settings are known also while the database is not, each with its project; their ids do not tell
    them."""
    store: Store = BrokenStore()  # type: ignore[assignment]
    access = Access(Settings(host="0.0.0.0", api_keys=("sk-one", "sk-two:acme")), store, SetClock())
    one, two = [await access.caller(Headers({"authorization": f"Bearer {key}"})) for key in ("sk-one", "sk-two")]
    assert isinstance(one, Caller)
    assert (one.project, two.project) == ("default", "acme")
    assert one.key_id != two.key_id
    assert "sk-" not in one.key_id + two.key_id
