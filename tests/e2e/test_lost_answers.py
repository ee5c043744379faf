"""The SDKs' own retries, when the answers to their first attempts get lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from afterglow.api import edge
from afterglow.testing import says
from tests.conftest import Server
from tests.e2e.processes import Ended
from tests.e2e.test_node_clients import VERSIONS as NODE_VERSIONS
from tests.e2e.test_node_clients import node
from tests.e2e.test_old_python_clients import python

pytestmark = pytest.mark.slow

PYTHON_VERSIONS = ("1.109.1", "current")  # 1.40 does not count its retries
MADE = {"assistants": 1, "threads": 1, "runs": 2, "messages": 3}


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The connection breaks when a POST with the count 0 is about to be answered; gives their paths."""
    paths: list[str] = []
    send = edge._Exchange.send

    async def broken(exchange: Any, message: Any) -> None:
        scope = exchange._scope
        first = scope["method"] == "POST" and (b"x-stainless-retry-count", b"0") in scope["headers"]
        if first and message["type"] == "http.response.start":
            paths.append(scope["path"])
            scope[edge.GONE].args[0].transport.abort()
        await send(exchange, message)

    monkeypatch.setattr(edge._Exchange, "send", broken)
    return paths


async def one_of_each(
    server: Server, lost: list[str], client: Callable[[str], Awaitable[Ended]], files: int = 1
) -> None:
    server.model.will(says("Hello."), says("Hello."))
    ended = await client(f"{server.url}/v1")
    assert "all there" in ended.out
    assert len(lost) == 5 + files
    for table, number in {**MADE, "files": files}.items():
        [(found,)] = await server.house.store.read(lambda tx, table=table: tx.fetch(f"SELECT COUNT(*) FROM {table}"))
        assert found == number, table


@pytest.mark.parametrize("version", PYTHON_VERSIONS)
async def test_python_makes_one_of_each(version: str, server: Server, lost: list[str]):
    """Each object is there once, and each run ran once."""
    await one_of_each(server, lost, lambda url: python(version, "client_retries.py", url))


@pytest.mark.parametrize("version", NODE_VERSIONS)
async def test_node_makes_one_of_each(version: str, server: Server, lost: list[str]):
    """Each object is there once, and each run ran once."""
    await one_of_each(
        server, lost, lambda url: node(version, "client_retries.mjs", url), files=0 if version < "5" else 1
    )
