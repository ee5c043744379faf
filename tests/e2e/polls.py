"""A server whose model answers only once a poll waits for the answer."""

from __future__ import annotations

import asyncio

from afterglow.testing import calls, says
from tests.conftest import GET_WEATHER, Server
from tests.e2e.processes import Ended

HASTE_S = 1.5  # the longest that the hasty clients of these stories wait for an answer
PATIENCE_S = 20


class HeldModel:
    """What the model of `client_polls` says. assistant: the id of who is asked."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._holds = [asyncio.Event() for _ in range(4)]
        first, second, third, last = self._holds
        weather = calls(("get_weather", {"city": "Oslo"}))
        server.model.will([first, *weather], [second, *says("Rain.")], [third, *says("Hi.")], [last, *says("Slow.")])

    async def assistant(self) -> str:
        return (await self._server.assistant(tools=[GET_WEATHER])).id

    async def play(self, client: asyncio.Task[Ended]) -> None:
        """Let each answer go when it is waited for, and the last one later than its client waits."""
        for hold in self._holds:
            await self._held(client)
            if hold is self._holds[-1]:
                await asyncio.sleep(HASTE_S)
            hold.set()
            await self._held(client, count=0)

    async def _held(self, client: asyncio.Task[Ended], count: int = 1) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self._server.house.metrics.held_polls._value.get() != count and not client.done():
                await asyncio.sleep(0.005)
