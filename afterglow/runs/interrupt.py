"""Stopping an attempt from outside: only while it waits for model or tool, never in the middle of a transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal, TypeVar

T = TypeVar("T")
Why = Literal["", "cancelled", "expired", "lost"]


class Interrupted(Exception):
    """The attempt was asked to stop while it waited."""

    def __init__(self, why: Why) -> None:
        super().__init__(why)
        self.why = why


class Interrupt:
    """Lets others stop what waits in `wait` or `next`, and nothing else."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        """task: the one that waits."""
        self.why: Why = ""
        self._task = task
        self._waiting = False

    def ask(self, why: Why) -> None:
        first = not self.why
        self.why = self.why or why
        if first and self._waiting:
            self._task.cancel()

    def check(self) -> None:
        """Raise Interrupted when that was asked for."""
        if self.why:
            raise Interrupted(self.why)

    async def next(self, stream: AsyncIterator[T]) -> T | None:
        """The stream's next item; None at its end. Raises Interrupted."""
        try:
            return await self.wait(stream.__anext__)
        except StopAsyncIteration:
            return None

    async def wait(self, act: Callable[[], Awaitable[T]]) -> T:
        """What `act` gives in the end. Raises Interrupted when asked to, now or earlier."""
        self.check()
        self._waiting = True
        try:
            return await act()
        except asyncio.CancelledError:
            # Ours, unless the worker itself is being closed as well.
            if not self.why or self._task.uncancel():
                raise
            raise Interrupted(self.why) from None
        finally:
            self._waiting = False
