"""The choice `auto`: of several engines the first that works here, or none of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from afterglow.contracts import CodeEngine, CodeSession, EngineStatus
from afterglow.errors import SandboxOff


class FirstOf:
    """A `contracts.CodeEngine` that stands for one of `engines`: the next is started only when the last one is off."""

    def __init__(self, engines: Sequence[CodeEngine]) -> None:
        self._engines = engines
        self._chosen: CodeEngine | None = None
        self._status = EngineStatus("starting")
        self._choosing: asyncio.Task[None] | None = None

    @property
    def status(self) -> EngineStatus:
        return self._chosen.status if self._chosen else self._status

    def start(self) -> None:
        if self._choosing is None:
            self._choosing = asyncio.create_task(self._choose())

    async def _choose(self) -> None:
        refusals = []
        for engine in self._engines:
            engine.start()
            status = await engine.settled()
            if status.state == "on":
                self._chosen = engine
                return
            refusals.append(status)
        self._status = none_of(refusals)

    async def settled(self) -> EngineStatus:
        self.start()
        assert self._choosing is not None
        await asyncio.wait([self._choosing])  # not awaited itself: it may be cancelled by `close`, the caller is not
        if not self._choosing.cancelled():
            self._choosing.result()  # a fault of ours is raised, not taken for "starting"
        return self.status

    async def open(self) -> CodeSession:
        status = await self.settled()
        if self._chosen is None:
            raise SandboxOff(f"{status.reason} {status.remedy}")
        return await self._chosen.open()

    async def close(self) -> None:
        self._status = EngineStatus("off", reason="The server is stopping.")
        if self._choosing is not None:
            self._choosing.cancel()
        for engine in self._engines:
            await engine.close()


def none_of(refusals: Sequence[EngineStatus]) -> EngineStatus:
    """What is said when every engine is off: the first one's reason and remedy lead, for it is the one preferred."""
    first, *others = refusals
    return EngineStatus(
        "off",
        reason=" ".join([first.reason, *(f"Nor does {other.engine} work: {other.reason}" for other in others)]),
        remedy=" ".join([first.remedy, *(f"Or, for {other.engine}: {other.remedy}" for other in others)]),
    )
