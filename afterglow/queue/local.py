"""The run queue inside one process: an event that wakes the worker's loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class LocalQueue:
    """A `contracts.RunQueue` for the shape in which API and worker share a process."""

    def __init__(self) -> None:
        self._queued = asyncio.Event()
        self._listeners: list[Callable[[str], None]] = []

    def wake(self) -> None:
        self._queued.set()

    def cancel(self, run_id: str) -> None:
        for listener in self._listeners:
            listener(run_id)

    async def wait(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._queued.wait()
        self._queued.clear()

    def on_cancel(self, listener: Callable[[str], None]) -> None:
        self._listeners.append(listener)
