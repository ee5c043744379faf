"""Events among processes that share a database: rows in small batches, and a word to the others after each.

Theory of operation. Each process keeps a feed for every run that is followed in it: a window of the run's log, from
memory where the run is executed here, and from the rows where it is not. After a batch of rows, and after each
transaction that wrote events, the others are told which runs to look at; a process reads, for all its feeds that are
due, the rows behind their ends, in one query. What is told can be lost, so every feed is due now and then, and when
the connection that listens is back.

The rows of one run become visible in the order of their places, for whoever reads behind a place never looks back. So
a transaction writes along with its own events also the text that a batch is just writing: whichever is second waits
for the first, and finds its rows there. And what is announced here, but does not join on to the feed's end, waits in
`ahead` until the rows before it were read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Iterable
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from afterglow.contracts import DELETED, START, Clock, News, Position, Segment, SqlRow, Store, Watched
from afterglow.errors import StoreError
from afterglow.events.following import (
    Followed,
    before,
    break_silence_forever,
    chain,
    cut,
    end_before,
    end_of,
    to_each_stop,
)
from afterglow.events.unwritten import Row, Unwritten
from afterglow.events.watching import Watch, Watches, word_for

if TYPE_CHECKING:
    from afterglow.store.notify import Notifier

CHANNEL = "afterglow_events"
STATUS_CHANNEL = "afterglow_statuses"
POLL_S = 1.0  # how long a lost word can go unnoticed
RETRY_S = 0.5
PAUSE_S = 0.005  # between two reads; what is told meanwhile is read together
RUNS_PER_READ = 256
ROWS_PER_RUN = 256  # what is behind that comes with the next read
WINDOW_BYTES = 256 * 1024
LARGEST = 2**31 - 1  # places that callers name may be beyond what a column holds
GONE_ATTEMPT = 2**31  # after all that was ever written

# Of runs that are still this attempt's. The lock keeps it so: whoever takes a run over, or expires it, passes over what
# is locked like this (`FOR UPDATE SKIP LOCKED`), and text that comes while it is being taken over waits, and then finds
# another attempt. The worker's own updates do not mind it.
WRITE = """
INSERT INTO events (project_id, run_id, attempt, first_seq, last_seq, stop, created_at, data)
SELECT new.project, new.run, new.attempt, new.first, new.last, new.stop, $3, substr($2::bytea, new.start, new.size)
FROM json_to_recordset($1::json) AS new
    (project text, run text, attempt int, first bigint, last bigint, stop text, start int, size int)
JOIN runs ON runs.project_id = new.project AND runs.id = new.run AND runs.attempt = new.attempt
    AND runs.holds_thread = 1
FOR KEY SHARE OF runs
ON CONFLICT DO NOTHING
"""
# The first row may begin before the place and reach beyond it. `last` is the log's end.
READ = f"""
SELECT asked.number, runs.id IS NOT NULL, newest.attempt, newest.last_seq,
    found.attempt, found.first_seq, found.last_seq, found.data, found.stop
FROM json_to_recordset($1::json) AS asked (number int, project text, run text, attempt int, sequence bigint)
LEFT JOIN runs ON runs.project_id = asked.project AND runs.id = asked.run
LEFT JOIN LATERAL (
    SELECT attempt, last_seq FROM events WHERE project_id = asked.project AND run_id = asked.run
    ORDER BY attempt DESC, first_seq DESC LIMIT 1
) AS newest ON true
LEFT JOIN LATERAL (
    SELECT attempt, first_seq, last_seq, data, stop FROM events
    WHERE project_id = asked.project AND run_id = asked.run
        AND (attempt, first_seq) >= (asked.attempt, COALESCE((
            SELECT first_seq FROM events
            WHERE project_id = asked.project AND run_id = asked.run
                AND attempt = asked.attempt AND first_seq <= asked.sequence
            ORDER BY first_seq DESC LIMIT 1
        ), 0))
        AND (attempt, last_seq) > (asked.attempt, asked.sequence) AND length(data) > 0
    ORDER BY attempt, first_seq LIMIT {ROWS_PER_RUN}
) AS found ON true
ORDER BY asked.number, found.attempt, found.first_seq
"""  # noqa: S608  a number of ours

# The statuses of what is watched, by its kind. Of a batch it only matters whether it is over.
STATUSES: dict[Watched, str] = {
    "run": """
SELECT asked.number, runs.status FROM json_to_recordset($1::json) AS asked (number int, project text, key text)
JOIN runs ON runs.project_id = asked.project AND runs.id = asked.key
""",
    "file": """
SELECT asked.number, files.status
FROM json_to_recordset($1::json) AS asked (number int, project text, key text, inside text)
JOIN vector_store_files AS files
    ON files.project_id = asked.project AND files.store_id = asked.inside AND files.id = asked.key
""",
    "batch": """
SELECT asked.number, CASE WHEN EXISTS (
    SELECT 1 FROM batch_files AS files
    WHERE files.project_id = asked.project AND files.batch_id = asked.key AND files.status = 'in_progress'
) THEN 'in_progress' ELSE '' END
FROM json_to_recordset($1::json) AS asked (number int, project text, key text)
JOIN file_batches ON file_batches.project_id = asked.project AND file_batches.id = asked.key
""",
}
STATUSES_PER_READ = 2000

log = logging.getLogger("afterglow.events")


class _Log(NamedTuple):
    """What was read of a run's log behind a place. exists: the run does. newest: the log's end. more: there is more
    behind `segments`."""

    exists: bool
    newest: Position
    segments: list[Segment]
    more: bool


class _Feed(Followed):
    """segments: a window of the log, everything in (start, end]. ahead: announced here, not known to join on.

    sure: `end` is a place in the log, not only what a caller named. exists: the run was seen to. idle: nobody has
    followed it for a while.
    """

    __slots__ = ("ahead", "end", "exists", "idle", "project", "run_id", "segments", "size", "start", "sure")

    def __init__(self, project: str, run_id: str, end: Position, *, sure: bool) -> None:
        super().__init__()
        self.project = project
        self.run_id = run_id
        self.segments: list[Segment] = []
        self.ahead: list[Segment] = []
        self.start = self.end = end
        self.size = 0
        self.sure = sure
        self.exists = sure
        self.idle = False

    def joins_on(self, segment: Segment) -> bool:
        return self.sure and not self.ahead and before(segment) == self.end

    def add(self, segments: Iterable[Segment]) -> None:
        """Add what is not here yet."""
        for fresh in chain(segments, self.end):
            self.segments.append(fresh)
            self.size += len(fresh.data)
            self.end = end_of(fresh)
        if self.size > WINDOW_BYTES:
            self._shrink()
        self.wake(True)

    def _shrink(self) -> None:
        """Let the older half go: whoever has not read it yet reads the rows."""
        count = 0
        while self.size > WINDOW_BYTES // 2 and count < len(self.segments) - 1:
            self.size -= len(self.segments[count].data)
            count += 1
        if count:
            self.start = end_of(self.segments[count - 1])
            del self.segments[:count]

    def after(self, place: Position) -> list[Segment]:
        """What the window holds behind a place that is in it."""
        first = bisect_right(self.segments, place, key=end_of)
        return [part for segment in self.segments[first:] if (part := cut(segment, place))]


class PostgresEvents:
    """A `contracts.Events` for processes that share a database; made inside the event loop, before the notifier is
    started."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        notifier: Notifier,
        *,
        gone: bytes,
        flush_ms: int,
        keep_alive_s: float,
        on_flush: Callable[[int], None] | None = None,
    ) -> None:
        """gone: the event that tells a follower that its run was deleted. on_flush: told how many rows each batch of
        text was."""
        self._store = store
        self._clock = clock
        self._notifier = notifier
        self._gone = Segment(GONE_ATTEMPT, 1, 1, gone, "end")
        self._keep_alive_s = keep_alive_s
        self._feeds: dict[str, _Feed] = {}
        self._watches = Watches()
        self._unsure = asyncio.Event()  # whether all that is watched has been heard of
        self._due: set[str] = set()
        self._any_due = asyncio.Event()
        self._unwritten = Unwritten(self._write, flush_ms / 1000, on_flush)
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        notifier.listen(CHANNEL, self._look_at)
        notifier.listen(STATUS_CHANNEL, self._hear_statuses)
        notifier.on_return(self._look_at_all)
        notifier.on_return(self._unsure.set)

    def start(self) -> None:
        """Begin to write, to read, and to send keep-alives."""
        self._unwritten.start()
        loops = (
            self._read_forever(),
            self._poll_forever(),
            self._check_forever(),
            break_silence_forever(self._feeds, self._keep_alive_s),
        )
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    # --- what happens here -------------------------------------------------------------------------------------

    def announce(self, project: str, run_id: str, segment: Segment) -> None:
        self._hear(project, run_id, segment)
        word = word_for(project, run_id)
        self._notifier.notify(CHANNEL, word)
        self._watches.tell_of(word, segment, lambda status: self._say_status(word, status))

    def keep(self, project: str, run_id: str, segment: Segment) -> None:
        self._hear(project, run_id, segment)
        self._unwritten.add(project, run_id, segment)

    def take_unwritten(self, run_id: str) -> list[Segment]:
        return self._unwritten.take(run_id)

    def forget(self, run_id: str) -> None:
        self._unwritten.forget(run_id)

    def _hear(self, project: str, run_id: str, segment: Segment) -> None:
        word = word_for(project, run_id)
        feed = self._feeds.get(word)
        if feed is None or not (feed.followers or feed.joins_on(segment)):
            # Kept for a moment without followers: who has a run created often follows it next.
            feed = self._feeds[word] = _Feed(project, run_id, before(segment), sure=True)
        if feed.joins_on(segment):
            feed.add([segment])
        elif not feed.sure or end_of(segment) > feed.end:
            feed.ahead.append(segment)
            self._look_at([word])

    async def _write(self, rows: list[Row]) -> None:
        now = int(self._clock.now())
        places, start = [], 1
        for project, run_id, (attempt, first, last, data, stop) in rows:
            place = {"attempt": attempt, "first": first, "last": last, "stop": stop, "start": start, "size": len(data)}
            places.append({"project": project, "run": run_id, **place})
            start += len(data)
        values = (msgspec.json.encode(places).decode(), b"".join(row[2].data for row in rows), now)

        # Rowwise: of many runs one has often just been written to, and the rows of all would have to be written again.
        await self._store.write(lambda tx: tx.execute(WRITE, *values), rowwise=True)
        for project, run_id, _ in rows:
            self._notifier.notify(CHANNEL, word_for(project, run_id))

    # --- following ---------------------------------------------------------------------------------------------

    async def follow(self, project: str, run_id: str, after: Position) -> AsyncGenerator[list[Segment], None]:
        after = Position(*(max(0, min(number, LARGEST)) for number in after))
        word = word_for(project, run_id)
        feed = self._feeds.get(word)
        if feed is None:
            feed = self._feeds[word] = self._open(project, run_id, after)
        feed.followers += 1
        if feed.followers == 1:  # until now it was not read
            self._look_at([word])
        try:
            while not self._closed:
                fresh = feed.after(after) if feed.start <= after else await self._stored(feed, after)
                if fresh := fresh or end_before(feed.segments, after):
                    for batch in to_each_stop(fresh):
                        yield batch
                    after = end_of(fresh[-1])
                elif not await feed.news():
                    yield []
        finally:
            feed.followers -= 1
            if not feed.followers:
                self._feeds.pop(word, None)

    def _open(self, project: str, run_id: str, after: Position) -> _Feed:
        unwritten = self._unwritten.of(run_id)
        feed = _Feed(project, run_id, before(unwritten[0]) if unwritten else after, sure=bool(unwritten))
        feed.add(unwritten)
        return feed

    async def _stored(self, feed: _Feed, after: Position) -> list[Segment]:
        """What comes after a place that is before the feed's window, in whole or in part."""
        while not self._closed:
            start = feed.start
            unwritten = self._unwritten.of(feed.run_id)  # before reading: what is written meanwhile is then in both
            try:
                [found] = await self._read([(feed, after)])
            except StoreError as error:
                log.warning("Events could not be read, and this will be tried again: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            fresh = list(chain(found.segments if found.more else [*found.segments, *unwritten], after))
            # What the window alone has by now was deleted, or never was in a row.
            return fresh or (feed.after(after) if feed.start == start else [])
        return []

    # --- hearing of others -------------------------------------------------------------------------------------

    def _look_at(self, words: Iterable[str]) -> None:
        for word in words:
            if (feed := self._feeds.get(word)) is not None and feed.followers:
                self._due.add(word)
                self._any_due.set()

    def _look_at_all(self) -> None:
        self._look_at(list(self._feeds))

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for word, feed in list(self._feeds.items()):
                if not feed.followers and feed.idle:
                    del self._feeds[word]
                feed.idle = not feed.followers
            self._look_at_all()

    async def _read_forever(self) -> None:
        while True:
            await self._any_due.wait()
            due = list(self._due)[:RUNS_PER_READ]
            self._due.difference_update(due)
            try:
                await self._read_feeds([feed for word in due if (feed := self._feeds.get(word))])
                pause_s = PAUSE_S
            except StoreError as error:
                log.warning("Events of other processes could not be read, and this will be tried again: %s", error)
                self._due.update(due)
                pause_s = RETRY_S
            if not self._due:
                self._any_due.clear()
            await asyncio.sleep(pause_s)

    async def _read_feeds(self, feeds: list[_Feed]) -> None:
        """Read the rows behind the ends of these feeds, all in one query."""
        ahead = [len(feed.ahead) for feed in feeds]
        found = await self._read([(feed, feed.end) for feed in feeds])
        for feed, its_log, its_ahead in zip(feeds, found, ahead, strict=True):
            if self._take_in(feed, its_log, its_ahead):
                self._look_at([word_for(feed.project, feed.run_id)])

    def _take_in(self, feed: _Feed, found: _Log, ahead: int) -> bool:
        """Bring a feed up to what was read of its log; return whether that has to be done again.

        ahead: how many segments were ahead before the rows were read; they come after those rows."""
        if not feed.sure and not found.segments:
            feed.start = feed.end = min(feed.end, found.newest)
        feed.sure = True
        fresh = list(found.segments)
        if not found.more:
            fresh += feed.ahead[:ahead]
            del feed.ahead[:ahead]
            if feed.exists and not found.exists and feed.end < end_of(self._gone):
                fresh.append(self._gone)
        feed.exists = feed.exists or found.exists
        if fresh:
            feed.add(fresh)
        return found.more or bool(feed.ahead)

    async def _read(self, places: list[tuple[_Feed, Position]]) -> list[_Log]:
        """What the database has behind a place, for each of them."""
        asked = [
            {
                "number": number,
                "project": feed.project,
                "run": feed.run_id,
                "attempt": min(place.attempt, LARGEST),
                "sequence": place.sequence,
            }
            for number, (feed, place) in enumerate(places)
        ]
        text = msgspec.json.encode(asked).decode()

        return _logs(await self._store.read(lambda tx: tx.fetch(READ, text)))

    # --- watching ----------------------------------------------------------------------------------------------

    def watch(self, kind: Watched, project: str, key: str, inside: str = "") -> Watch:
        return Watch(self._watches, kind, project, key, inside)

    def note(self, project: str, key: str, status: str = "") -> None:
        word = word_for(project, key)
        self._watches.tell(word, News(status))
        self._say_status(word, status)

    def end_watches(self) -> None:
        self._watches.end()

    def _say_status(self, word: str, status: str) -> None:
        self._notifier.notify(STATUS_CHANNEL, f"{status} {word}")

    def _hear_statuses(self, said: list[str]) -> None:
        for one in said:
            status, _, word = one.partition(" ")
            self._watches.tell(word, News(status))

    async def _check_forever(self) -> None:
        """Tell what is watched its status now and then, for word of it may have been lost."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._unsure.wait()
            self._unsure.clear()
            for kind in STATUSES:
                watches = [watch for watch in self._watches.all() if watch.kind == kind]
                try:
                    for at in range(0, len(watches), STATUSES_PER_READ):
                        await self._check(kind, watches[at : at + STATUSES_PER_READ])
                except StoreError as error:
                    log.warning("What is waited for could not be read, and this will be tried again: %s", error)

    async def _check(self, kind: Watched, watches: list[Watch]) -> None:
        asked = [
            {"number": number, "project": watch.project, "key": watch.key, "inside": watch.inside}
            for number, watch in enumerate(watches)
        ]
        text = msgspec.json.encode(asked).decode()
        statuses: dict[int, str] = dict(await self._store.read(lambda tx: tx.fetch(STATUSES[kind], text)))
        for number, watch in enumerate(watches):
            watch.hear(News(statuses.get(number, DELETED)))

    # --- the end -----------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Write what is left, and end every `follow` and every watch."""
        self._closed = True
        self._watches.close()
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._unwritten.close()
        for feed in list(self._feeds.values()):
            feed.wake(True)


def _logs(rows: list[SqlRow]) -> list[_Log]:
    """The rows of READ as one log for each place that was asked for."""
    logs = []
    for _, of_one in groupby(rows, itemgetter(0)):
        found = list(of_one)
        _, exists, newest_attempt, newest, *_ = found[0]
        segments = [Segment(*columns) for _, _, _, _, *columns in found if columns[0] is not None]
        end = START if newest_attempt is None else Position(newest_attempt, newest)
        logs.append(_Log(exists, end, segments, more=len(segments) == ROWS_PER_RUN))
    return logs
