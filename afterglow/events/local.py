"""Events in one process: memory for those who follow now, the database (in batches) for those who come later.

A run's feed holds what was announced since it was opened. It is dropped when the run has stopped and nobody follows:
everything is in the database by then, because a stop is announced only after the transaction that also wrote what
came before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from itertools import groupby

from afterglow.contracts import Clock, Position, Segment, Store, Transaction
from afterglow.errors import StoreError
from afterglow.rows.events import insert_segment, list_segments

RUNS_PER_WRITE = 128

log = logging.getLogger("afterglow.events")


class _Feed:
    """segments: what was announced, in order. start: the place before the first of them."""

    __slots__ = ("followers", "segments", "start", "stopped", "waiting")

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.start: Position | None = None
        self.stopped = False
        self.followers = 0
        self.waiting: list[asyncio.Future[bool]] = []

    def add(self, segment: Segment) -> None:
        if self.start is None:
            self.start = Position(segment.attempt, segment.first - 1)
        self.segments.append(segment)
        self.stopped = bool(segment.stop)
        self.wake(True)

    def wake(self, news: bool) -> None:
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(news)


class LocalEvents:
    """A `contracts.Events` for the shape in which one process does everything; made inside its event loop."""

    def __init__(self, store: Store, clock: Clock, *, flush_ms: int, keep_alive_s: float) -> None:
        self._store = store
        self._clock = clock
        self._flush_s = flush_ms / 1000
        self._keep_alive_s = keep_alive_s
        self._feeds: dict[str, _Feed] = {}
        self._unwritten: dict[str, tuple[str, list[Segment]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._closed = False
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to write batches and to send keep-alives."""
        self._tasks = [asyncio.create_task(self._flush_forever()), asyncio.create_task(self._keep_alive_forever())]

    def announce(self, project: str, run_id: str, segment: Segment) -> None:
        feed = self._feeds.get(run_id)
        if feed is None:
            feed = self._feeds[run_id] = _Feed()
        feed.add(segment)
        self._drop_if_idle(run_id, feed)

    def keep(self, project: str, run_id: str, segment: Segment) -> None:
        unwritten = self._unwritten.get(run_id)
        if unwritten is None:
            self._unwritten[run_id] = (project, [segment])
        else:
            unwritten[1].append(segment)
        self.announce(project, run_id, segment)

    def take_unwritten(self, run_id: str) -> list[Segment]:
        return self._unwritten.pop(run_id, ("", []))[1]

    def forget(self, run_id: str) -> None:
        self._unwritten.pop(run_id, None)
        if (feed := self._feeds.get(run_id)) and not feed.followers:
            del self._feeds[run_id]

    async def follow(self, project: str, run_id: str, after: Position) -> AsyncGenerator[list[Segment], None]:
        feed = self._feeds.get(run_id)
        if feed is None:
            feed = self._feeds[run_id] = _Feed()
        feed.followers += 1
        try:
            if feed.start is None or after < feed.start:
                stored = await self._stored(project, run_id, after)
                if stored:
                    for batch in _to_each_stop(stored):
                        yield batch
                    after = _end(stored[-1])
            index = 0
            while not self._closed:
                if index < len(feed.segments):
                    fresh = [cut for segment in feed.segments[index:] if (cut := _after(segment, after))]
                    index = len(feed.segments)
                    for batch in _to_each_stop(fresh):
                        yield batch
                    continue
                if not await self._news(feed):
                    yield []
        finally:
            feed.followers -= 1
            self._drop_if_idle(run_id, feed)

    async def _stored(self, project: str, run_id: str, after: Position) -> list[Segment]:
        async def work(tx: Transaction) -> list[Segment]:
            return await list_segments(tx, project, run_id, after)

        return [cut for segment in await self._store.read(work) if (cut := _after(segment, after))]

    async def _news(self, feed: _Feed) -> bool:
        future: asyncio.Future[bool] = self._loop.create_future()
        feed.waiting.append(future)
        return await future

    def _drop_if_idle(self, run_id: str, feed: _Feed) -> None:
        if not feed.followers and (feed.stopped or not feed.segments) and self._feeds.get(run_id) is feed:
            del self._feeds[run_id]

    async def _keep_alive_forever(self) -> None:
        """One clock for all followers: each hears of silence within one to two periods."""
        while True:
            waiting_before = {id(future) for feed in self._feeds.values() for future in feed.waiting}
            await asyncio.sleep(self._keep_alive_s)
            for feed in list(self._feeds.values()):
                if any(id(future) in waiting_before for future in feed.waiting):
                    feed.wake(False)

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(self._flush_s)
            self._flushing = asyncio.create_task(self._flush())
            await asyncio.shield(self._flushing)  # `close` waits for it

    async def _flush(self) -> None:
        """Write what is kept, some runs at a time: in between, the transactions of others get their turn."""
        waiting = list(self._unwritten)
        for at in range(0, len(waiting), RUNS_PER_WRITE):
            run_ids = [run_id for run_id in waiting[at : at + RUNS_PER_WRITE] if run_id in self._unwritten]
            if not await self._write({run_id: self._unwritten.pop(run_id) for run_id in run_ids}):
                return

    async def _write(self, batch: dict[str, tuple[str, list[Segment]]]) -> bool:
        joined = [
            (project, run_id, join(list(of_one)))
            for run_id, (project, segments) in batch.items()
            for _, of_one in groupby(segments, lambda segment: segment.attempt)
        ]
        now = int(self._clock.now())

        async def work(tx: Transaction) -> None:
            for project, run_id, segment in joined:
                await insert_segment(tx, project, run_id, segment, now)

        try:
            await self._store.write(work)
        except StoreError as error:
            log.warning("Streamed text was not written, and will be tried again: %s", error)
            self._give_back(batch)
            return False
        return True

    def _give_back(self, batch: dict[str, tuple[str, list[Segment]]]) -> None:
        """What the database would not take comes before what was kept since."""
        for run_id, (project, segments) in batch.items():
            self._unwritten[run_id] = (project, segments + self.take_unwritten(run_id))

    async def close(self) -> None:
        """Write what is left, and end every `follow`."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._flushing is not None:
            await self._flushing
        await self._flush()
        for feed in list(self._feeds.values()):
            feed.wake(True)


def join(segments: list[Segment]) -> Segment:
    """Consecutive segments of one attempt as one."""
    first, last = segments[0], segments[-1]
    return Segment(first.attempt, first.first, last.last, b"".join(s.data for s in segments), last.stop)


def _to_each_stop(segments: list[Segment]) -> Iterator[list[Segment]]:
    """In batches that end with a stop, all but perhaps the last: a POST stream ends there, and must hold no more."""
    begin = 0
    for end, segment in enumerate(segments, 1):
        if segment.stop or end == len(segments):
            yield segments[begin:end]
            begin = end


def _end(segment: Segment) -> Position:
    return Position(segment.attempt, segment.last)


def _after(segment: Segment, after: Position) -> Segment | None:
    """What of a segment comes after a place: all, a part, or None."""
    if (segment.attempt, segment.first - 1) >= after:
        return segment
    if (segment.attempt, segment.last) <= after:
        return None
    mark = b"\nid: %d.%d\n\n" % after
    return segment._replace(first=after.sequence + 1, data=segment.data.partition(mark)[2])
