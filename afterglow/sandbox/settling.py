"""What the engines have in common whose sessions are elsewhere: they settle in the background, and their tasks end with
them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any, TypeVar

from afterglow.contracts import EngineStatus
from afterglow.errors import SandboxOff

T = TypeVar("T")


class Settling(ABC):
    """The part of a `contracts.CodeEngine` that comes to its status, and that ends its tasks."""

    def __init__(self, engine: str) -> None:
        self._status = EngineStatus("starting", engine)
        self._closing = EngineStatus("off", engine, reason="The server is stopping.")
        self._starting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # of which none outlives the engine

    @abstractmethod
    async def _settle(self) -> None:
        """Come to another status than `starting`."""

    @property
    def status(self) -> EngineStatus:
        return self._status

    def start(self) -> None:
        if self._starting is None and self._status is not self._closing:
            self._starting = self._spawn(self._settle())

    async def settled(self) -> EngineStatus:
        self.start()
        if self._starting is not None:
            await asyncio.wait([self._starting])
            if not self._starting.cancelled():
                self._starting.result()  # a fault of ours is raised, not taken for "starting"
        return self._status

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _await(self, making: asyncio.Task[T]) -> T:
        """What a task of ours gives. Raises SandboxOff when it ends because the engine does."""
        try:
            return await making
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if making.cancelled() and caller is not None and not caller.cancelling():
                raise SandboxOff(self._closing.reason) from None
            raise

    async def _end_tasks(self) -> None:
        self._status = self._closing
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
