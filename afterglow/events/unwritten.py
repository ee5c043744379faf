"""Streamed text on its way to the database: it waits for the next batch, or for a transaction that takes it along."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from itertools import groupby

from afterglow.contracts import Segment
from afterglow.errors import StoreError
from afterglow.events.following import join

RUNS_PER_WRITE = 128
RETRY_S = 0.1

Row = tuple[str, str, Segment]  # project, run id, segment

log = logging.getLogger("afterglow.events")


class Unwritten:
    """Segments by run, and the task that writes them in batches.

    Of one run, those that leave together become one row for each attempt. A row that could not be written is tried
    again as it is, and never joined with later text: it may be there after all, when the answer to its COMMIT was lost.
    """

    def __init__(
        self,
        write: Callable[[list[Row]], Awaitable[None]],
        flush_s: float,
        on_flush: Callable[[int], None] | None = None,
    ) -> None:
        """write: writes rows in one transaction, or raises StoreError. on_flush: told how many it were."""
        self._write = write
        self._flush_s = flush_s
        self._on_flush = on_flush
        self._text: dict[str, tuple[str, list[Segment]]] = {}
        self._refused: dict[str, list[Row]] = {}
        self._leaving: dict[str, list[Row]] = {}
        self._failing = False
        self._flushing: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._flush_forever())

    def add(self, project: str, run_id: str, segment: Segment) -> None:
        text = self._text.get(run_id)
        if text is None:
            self._text[run_id] = (project, [segment])
        else:
            text[1].append(segment)

    def take(self, run_id: str) -> list[Segment]:
        """What is not known to be written. The caller writes it, also what is just being written: that may be refused
        and wait, while the caller's transaction is done. Of the same row twice, one is refused."""
        return [row[2] for row in self._leaving.pop(run_id, []) + self._take_rows(run_id)]

    def of(self, run_id: str) -> list[Segment]:
        """What is not known to be written, left where it is."""
        rows = self._leaving.get(run_id, []) + self._refused.get(run_id, [])
        return [row[2] for row in rows] + self._text.get(run_id, ("", []))[1]

    def forget(self, run_id: str) -> None:
        self._text.pop(run_id, None)
        self._refused.pop(run_id, None)

    def __len__(self) -> int:
        """How many runs have text that is not being written yet."""
        return len(self._text.keys() | self._refused.keys())

    async def _flush_forever(self) -> None:
        loop, took_s = asyncio.get_running_loop(), 0.0
        while True:
            every_s = max(self._flush_s, RETRY_S) if self._failing else self._flush_s
            await asyncio.sleep(max(every_s - took_s, every_s / 4))  # a slow database is not asked without a pause
            began = loop.time()
            self._flushing = asyncio.create_task(self._flush())
            await asyncio.shield(self._flushing)  # `close` waits for it
            took_s = loop.time() - began

    async def _flush(self) -> None:
        """Write what is here, some runs at a time: in between, the transactions of others get their turn."""
        waiting = list(self._refused | self._text)
        for at in range(0, len(waiting), RUNS_PER_WRITE):
            rows = {run_id: self._take_rows(run_id) for run_id in waiting[at : at + RUNS_PER_WRITE]}
            self._leaving = {run_id: of_run for run_id, of_run in rows.items() if of_run}
            leaving = [row for of_run in self._leaving.values() for row in of_run]
            try:
                await self._write(leaving)
                if self._on_flush is not None:
                    self._on_flush(len(leaving))
            except StoreError as error:
                if not self._failing:
                    log.warning("Streamed text is not written; it is kept and tried again until it is: %s", error)
                self._failing = True
                self._refused |= self._leaving
                return
            finally:
                self._leaving = {}
            self._failing = False

    def _take_rows(self, run_id: str) -> list[Row]:
        project, segments = self._text.pop(run_id, ("", []))
        joined = [join(list(of_one)) for _, of_one in groupby(segments, lambda segment: segment.attempt)]
        return self._refused.pop(run_id, []) + [(project, run_id, segment) for segment in joined]

    async def close(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._flushing is not None:
            await self._flushing
        await self._flush()
