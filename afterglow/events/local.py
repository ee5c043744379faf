"""Events in one process: memory for those who follow now, the database (in batches) for those who come later.

A run's feed holds what was announced since it was opened. It is dropped when the run has stopped and nobody follows:
everything is in the database by then, because a stop is announced only after the transaction that also wrote what
came before it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from afterglow.contracts import Clock, News, Position, Segment, Store, Transaction, Watched
from afterglow.events.following import Followed, before, break_silence_forever, cut, end_before, end_of, to_each_stop
from afterglow.events.unwritten import Row, Unwritten
from afterglow.events.watching import Watch, Watches, word_for
from afterglow.rows.events import insert_segment, list_segments


class _Feed(Followed):
    """segments: what was announced, in order. start: the place before the first of them."""

    __slots__ = ("segments", "start", "stopped")

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self.start: Position | None = None
        self.stopped = False

    def add(self, segment: Segment) -> None:
        if self.start is None:
            self.start = before(segment)
        self.segments.append(segment)
        self.stopped = bool(segment.stop)
        self.wake(True)


class LocalEvents:
    """A `contracts.Events` for the shape in which one process does everything; made inside its event loop."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        flush_ms: int,
        keep_alive_s: float,
        on_flush: Callable[[int], None] | None = None,
    ) -> None:
        """on_flush: told how many rows each batch of text was."""
        self._store = store
        self._clock = clock
        self._keep_alive_s = keep_alive_s
        self._feeds: dict[str, _Feed] = {}
        self._watches = Watches()
        self._unwritten = Unwritten(self._write, flush_ms / 1000, on_flush)
        self._breaking_silence: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to write batches and to send keep-alives."""
        self._unwritten.start()
        self._breaking_silence = asyncio.create_task(break_silence_forever(self._feeds, self._keep_alive_s))

    def announce(self, project: str, run_id: str, segment: Segment) -> None:
        self._hear(run_id, segment)
        self._watches.tell_of(word_for(project, run_id), segment)

    def _hear(self, run_id: str, segment: Segment) -> None:
        feed = self._feeds.get(run_id)
        if feed is None:
            feed = self._feeds[run_id] = _Feed()
        feed.add(segment)
        self._drop_if_idle(run_id, feed)

    def keep(self, project: str, run_id: str, segment: Segment) -> None:
        self._unwritten.add(project, run_id, segment)
        self._hear(run_id, segment)

    def take_unwritten(self, run_id: str) -> list[Segment]:
        return self._unwritten.take(run_id)

    def forget(self, run_id: str) -> None:
        self._unwritten.forget(run_id)
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
                    for batch in to_each_stop(stored):
                        yield batch
                    after = end_of(stored[-1])
            index = 0
            while not self._closed:
                if index < len(feed.segments):
                    fresh = [part for segment in feed.segments[index:] if (part := cut(segment, after))]
                    index = len(feed.segments)
                    for batch in to_each_stop(fresh or end_before(feed.segments, after)):
                        yield batch
                    continue
                if not await feed.news():
                    yield []
        finally:
            feed.followers -= 1
            self._drop_if_idle(run_id, feed)

    def watch(self, kind: Watched, project: str, key: str, inside: str = "") -> Watch:
        return Watch(self._watches, kind, project, key, inside)

    def note(self, project: str, key: str, status: str = "") -> None:
        self._watches.tell(word_for(project, key), News(status))

    def end_watches(self) -> None:
        self._watches.end()

    async def _stored(self, project: str, run_id: str, after: Position) -> list[Segment]:
        async def work(tx: Transaction) -> list[Segment]:
            return await list_segments(tx, project, run_id, after)

        return [part for segment in await self._store.read(work) if (part := cut(segment, after))]

    def _drop_if_idle(self, run_id: str, feed: _Feed) -> None:
        if not feed.followers and (feed.stopped or not feed.segments) and self._feeds.get(run_id) is feed:
            del self._feeds[run_id]

    async def _write(self, rows: list[Row]) -> None:
        now = int(self._clock.now())

        async def work(tx: Transaction) -> None:
            for project, run_id, segment in rows:
                await insert_segment(tx, project, run_id, segment, now)

        await self._store.write(work)

    async def close(self) -> None:
        """Write what is left, and end every `follow` and every watch."""
        self._closed = True
        self._watches.close()
        if self._breaking_silence is not None:
            self._breaking_silence.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._breaking_silence
        await self._unwritten.close()
        for feed in list(self._feeds.values()):
            feed.wake(True)
