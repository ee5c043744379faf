"""A plain HTTP client beside the official one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import pytest

from tests.api.wire import Wire
from tests.conftest import Server


@pytest.fixture
async def connect() -> AsyncGenerator[Callable[..., Wire], None]:
    """Make plain clients: `connect(server, key="sk-other")`."""
    wires: list[Wire] = []

    def make(server: Server, key: str = "sk-wire") -> Wire:
        wires.append(Wire(server.url, key))
        return wires[-1]

    yield make
    for wire in wires:
        await wire.client.aclose()


@pytest.fixture
async def wire(server: Server, connect: Callable[..., Wire]) -> Wire:
    return connect(server)
