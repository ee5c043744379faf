"""A store that finds works which cannot be run again."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable
from typing import TypeVar

from afterglow.contracts import Store, Transaction, Work

T = TypeVar("T")


class _TakenBack(Exception):
    """Takes back what a work has written."""


class TwiceStore:
    """Runs whatever writes twice, as Postgres may: all that the first run wrote is taken back."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read(self, work: Work[T]) -> T:
        return await self._store.read(work)

    async def write(self, work: Work[T], *, rowwise: bool = False) -> T:
        await self._rehearse(work)
        return await self._store.write(work, rowwise=rowwise)

    async def write_early(self, work: Work[T]) -> tuple[T, Awaitable[None]]:
        await self._rehearse(work)
        return await self._store.write_early(work)

    async def _rehearse(self, work: Work[T]) -> None:
        async def rehearsal(tx: Transaction) -> None:
            await work(tx)
            raise _TakenBack

        with contextlib.suppress(_TakenBack):
            await self._store.write(rehearsal)

    async def close(self) -> None:
        await self._store.close()
