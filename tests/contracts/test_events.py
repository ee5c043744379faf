"""What `contracts.Events` promises: whoever follows a run, from wherever and whenever, gets the same bytes, once and
in order; and replay is what was stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterglow.contracts import DELETED, START, Events, News, Position, Segment, Stop, Store, Transaction, Watch
from afterglow.errors import StoreFull
from afterglow.events import postgres
from afterglow.events.local import LocalEvents
from afterglow.events.postgres import PostgresEvents
from afterglow.objects import Run, Usage
from afterglow.rows.events import insert_segment, list_segments
from afterglow.rows.runs import RunAsked, RunRow, insert_run
from afterglow.store.notify import Notifier
from afterglow.store.postgres import PostgresStore
from afterglow.store.sqlite import SqliteStore
from afterglow.testing import SetClock

PROJECT = "default"
_numbers = count(1)


class FillableStore:
    """A store whose disk can be full. Reads go on. url: of its database, where it has one. asked: one more for each
    write that will be refused, which then waits for `refusing`."""

    def __init__(self, store: Store, url: str = "") -> None:
        self._store = store
        self.url = url
        self.full = False
        self.asked = asyncio.Semaphore(0)
        self.refusing = asyncio.Event()
        self.refusing.set()
        self._refused = asyncio.Semaphore(0)
        self.read = store.read
        self.write_early = store.write_early
        self.close = store.close

    async def write(self, work, *, rowwise=False):  # type: ignore[no-untyped-def]
        if self.full:
            self.asked.release()
            await self.refusing.wait()
            self._refused.release()
            raise StoreFull("no space left")
        return await self._store.write(work)

    async def refuses(self, times: int) -> None:
        """Wait until so many more writes were refused."""
        for _ in range(times):
            await self._refused.acquire()


@asynccontextmanager
async def local_events(
    store: Store, *, flush_ms: int = 1, keep_alive_s: float = 60.0
) -> AsyncGenerator[LocalEvents, None]:
    events = LocalEvents(store, SetClock(), flush_ms=flush_ms, keep_alive_s=keep_alive_s)
    events.start()
    try:
        yield events
    finally:
        await events.close()


@asynccontextmanager
async def postgres_events(
    store: FillableStore, *, flush_ms: int = 1, keep_alive_s: float = 60.0
) -> AsyncGenerator[PostgresEvents, None]:
    notifier = Notifier(store.url)
    events = PostgresEvents(
        store, SetClock(), notifier, gone=b"event: gone\n\n", flush_ms=flush_ms, keep_alive_s=keep_alive_s
    )
    notifier.start()
    events.start()
    try:
        yield events
    finally:
        await events.close()
        await notifier.close()


class Apart:
    """Two processes as one: what happens is said in the one, and followed in the other."""

    def __init__(self, said: Events, followed: Events) -> None:
        self._both = (said, followed)
        self.announce = said.announce
        self.keep = said.keep
        self.take_unwritten = said.take_unwritten
        self.forget = said.forget
        self.follow = followed.follow
        self.note = said.note
        self.watch = followed.watch
        self.end_watches = followed.end_watches

    async def connected(self) -> None:
        for events in self._both:
            await events._notifier.connected()  # type: ignore[attr-defined]

    async def close(self) -> None:
        for events in self._both:
            await events.close()


@asynccontextmanager
async def events_apart(
    store: FillableStore, *, flush_ms: int = 1, keep_alive_s: float = 60.0
) -> AsyncGenerator[Apart, None]:
    async with (
        postgres_events(store, flush_ms=flush_ms) as said,
        postgres_events(store, keep_alive_s=keep_alive_s) as followed,
    ):
        yield Apart(said, followed)


@asynccontextmanager
async def sqlite_store(url: str) -> AsyncGenerator[FillableStore, None]:
    with TemporaryDirectory() as folder:
        opened = SqliteStore(Path(folder) / "afterglow.db", readers=1)
        yield FillableStore(opened)
        await opened.close()


@asynccontextmanager
async def postgres_store(url: str) -> AsyncGenerator[FillableStore, None]:
    opened = await PostgresStore.open(url, connections=4, pooled=False)
    yield FillableStore(opened, url)
    await opened.close()


# A new kind of events is another entry here, with the store it needs.
KINDS = {
    "local": (local_events, sqlite_store),
    "postgres": (postgres_events, postgres_store),
    "apart": (events_apart, postgres_store),
}
IN_ONE_PROCESS = pytest.mark.parametrize("kind", ["local", "postgres"])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_events(kind: str):
    """Opens events over a store, as a process does when it starts."""
    return KINDS[kind][0]


@pytest.fixture
def url(request: pytest.FixtureRequest, kind: str) -> str:
    return url_for(request, kind)


def url_for(request: pytest.FixtureRequest, kind: str) -> str:
    """The database of a kind that needs one; the others start no server."""
    return "" if kind == "local" else str(request.getfixturevalue("database_url"))


@pytest.fixture
async def store(kind: str, url: str) -> AsyncGenerator[FillableStore, None]:
    async with KINDS[kind][1](url) as opened:
        yield opened


@pytest.fixture
async def events(open_events, store: Store) -> AsyncGenerator[Events, None]:
    async with open_events(store) as opened:
        yield opened


class Writer:
    """Says what happens to one run, as the worker that holds it does. said: all segments, one event each."""

    def __init__(self, store: Store, events: Events) -> None:
        self.store = store
        self.events = events
        self.run_id = f"run_{next(_numbers)}"
        self.attempt = 0
        self.sequence = 0
        self.said: list[Segment] = []

    async def start(self) -> Writer:
        run = Run(id=self.run_id, created_at=0, assistant_id="asst_1", thread_id=f"thread_{self.run_id}", model="m")
        row = RunRow(project=PROJECT, run=run, asked=RunAsked(), spent=Usage(), attempt=0, deadline=600)
        await self.store.write(lambda tx: insert_run(tx, row))
        return self

    def _segment(self, size: int, stop: Stop = "") -> Segment:
        made = []
        for _ in range(size):
            self.sequence += 1
            place = (self.attempt, self.sequence)
            made.append(
                Segment(*place, self.sequence, b'event: e\ndata: "text of %d.%d"\nid: %d.%d\n\n' % (place + place))
            )
        self.said += made
        return Segment(self.attempt, made[0].first, self.sequence, b"".join(one.data for one in made), stop)

    def streams(self, size: int = 1) -> None:
        """Text comes from the model."""
        self.events.keep(PROJECT, self.run_id, self._segment(size))

    async def commits(self, size: int = 1, stop: Stop = "") -> None:
        """Something changes in a transaction, and is announced after it."""
        parts = [*self.events.take_unwritten(self.run_id), self._segment(size, stop)]

        async def work(tx: Transaction) -> None:
            for part in parts:
                await insert_segment(tx, PROJECT, self.run_id, part, 0)

        await self.store.write(work)
        self.events.announce(PROJECT, self.run_id, parts[-1])

    async def is_taken_over(self) -> None:
        """Another attempt goes on."""
        self.attempt, self.sequence = self.attempt + 1, 0
        attempt, run_id = self.attempt, self.run_id
        await self.store.write(lambda tx: tx.execute("UPDATE runs SET attempt = $1 WHERE id = $2", attempt, run_id))

    def bytes_after(self, place: Position) -> bytes:
        return b"".join(one.data for one in self.said if (one.attempt, one.first) > place)

    async def stored(self) -> bytes:
        run_id = self.run_id
        return b"".join(one.data for one in await self.store.read(lambda tx: list_segments(tx, PROJECT, run_id, START)))

    async def is_written(self) -> None:
        """Wait until everything said so far is in the database."""
        while await self.stored() != self.bytes_after(START):
            await asyncio.sleep(0.001)


@pytest.fixture
async def writer(store: Store, events: Events) -> Writer:
    return await Writer(store, events).start()


async def until_stop(events: Events, run_id: str, after: Position = START) -> bytes:
    """What a follower gets up to the next stop."""
    got = b""
    async with aclosing(events.follow(PROJECT, run_id, after)) as batches:
        async for batch in batches:
            got += b"".join(segment.data for segment in batch)
            if any(segment.stop for segment in batch):
                return got
    raise AssertionError(f"the stream ended without a stop, after {got!r}")


def following(events: Events, run_id: str, after: Position = START) -> asyncio.Task[bytes]:
    return asyncio.create_task(until_stop(events, run_id, after))


# --- from where and when ---------------------------------------------------------------------------------------


async def test_live_and_replay_are_the_same_bytes(writer: Writer, events: Events):
    """Who follows from the start, and who comes when it is over, get what was stored, byte for byte."""
    live = following(events, writer.run_id)
    await writer.commits(2)
    writer.streams(3)
    writer.streams()
    await writer.commits(3, "end")
    expected = writer.bytes_after(START)
    assert await live == expected
    assert await until_stop(events, writer.run_id) == expected
    assert await writer.stored() == expected


@IN_ONE_PROCESS
async def test_text_is_followed_before_it_is_stored(store: FillableStore, open_events):
    """What comes from the model reaches followers at once, though the database gets it later."""
    async with open_events(store, flush_ms=60_000) as events:
        writer = await Writer(store, events).start()
        async with aclosing(events.follow(PROJECT, writer.run_id, START)) as batches:
            writer.streams(2)
            assert (await anext(batches))[0].data == writer.bytes_after(START)
        assert await writer.stored() == b""


@pytest.mark.parametrize("written", [False, True])
async def test_following_begins_after_any_place(writer: Writer, events: Events, written: bool):
    """From each event on, one gets exactly the rest, also from the midst of what was written as one piece."""
    await writer.commits(2)
    writer.streams(5)
    writer.streams(5)
    if written:
        await writer.is_written()
    await writer.commits()
    await writer.is_taken_over()
    await writer.commits(3)
    await writer.commits(2, "end")
    for place in (START, *(Position(one.attempt, one.first) for one in writer.said[:-1])):
        assert await until_stop(events, writer.run_id, place) == writer.bytes_after(place)


async def test_a_log_outlives_its_process(open_events, store: Store):
    """After a restart one can follow from the start, and from the midst, into what happens next."""
    async with open_events(store) as events:
        writer = await Writer(store, events).start()
        await writer.commits(2)
        writer.streams(4)
    assert await writer.stored() == writer.bytes_after(START)
    async with open_events(store) as events:
        writer.events = events
        places = [START, Position(0, 3), Position(0, 6)]
        tasks = [following(events, writer.run_id, place) for place in places]
        await writer.is_taken_over()
        await writer.commits(2)
        writer.streams()
        await writer.commits(1, "end")
        for place, task in zip(places, tasks, strict=True):
            assert await task == writer.bytes_after(place)


async def test_a_place_beyond_a_dead_attempt_goes_on_at_the_next(open_events, store: Store):
    """A client that saw more of an attempt than was stored goes on with the new attempt's first event."""
    async with open_events(store) as events:
        writer = await Writer(store, events).start()
        await writer.commits(2)
    async with open_events(store) as events:
        writer.events = events
        await writer.is_taken_over()
        await writer.commits(2, "end")
        assert await until_stop(events, writer.run_id, Position(0, 99)) == writer.bytes_after(Position(0, 99))
        assert writer.bytes_after(Position(0, 99)) == writer.bytes_after(Position(0, 2)) != b""


async def test_a_stream_goes_on_after_the_outputs(writer: Writer, events: Events):
    """The part after `action` is followed from the place where it began."""
    await writer.commits(2, "action")
    place = Position(0, 2)
    await writer.commits(1)
    rest = following(events, writer.run_id, place)
    await writer.is_taken_over()
    await writer.commits(2)
    await writer.commits(1, "end")
    assert await rest == writer.bytes_after(place)


async def test_runs_do_not_mix(store: Store, events: Events):
    """Whoever follows one run hears nothing of another."""
    writers = [await Writer(store, events).start() for _ in range(5)]
    tasks = [following(events, writer.run_id) for writer in writers]
    for _ in range(3):
        for writer in writers:
            writer.streams(2)
            await writer.commits()
    for writer in writers:
        await writer.commits(1, "end")
    assert await asyncio.gather(*tasks) == [writer.bytes_after(START) for writer in writers]


async def test_projects_do_not_mix(writer: Writer, events: Events):
    """What is stored of a run is not read under another project."""
    await writer.commits(2, "end")
    async with aclosing(events.follow("other", writer.run_id, START)) as batches:
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await events.close()
        with pytest.raises(StopAsyncIteration):
            await waiting


# --- writing ---------------------------------------------------------------------------------------------------


async def test_text_is_written_in_batches(writer: Writer):
    """Many pieces that came between two flushes make few rows, with nothing lost."""
    await writer.commits()
    for _ in range(100):
        writer.streams()
    await writer.is_written()
    run_id = writer.run_id
    rows = await writer.store.read(lambda tx: list_segments(tx, PROJECT, run_id, START))
    assert len(rows) < 10
    assert [row.first for row in rows[1:]] == [row.last + 1 for row in rows[:-1]]


async def test_what_a_transaction_takes_is_written_once(store: Store, open_events):
    """`take_unwritten` hands over each segment to one caller, in order, and as one row what nobody has tried to write:
    each is a statement of the caller's transaction."""
    async with open_events(store, flush_ms=60_000) as events:
        writer = await Writer(store, events).start()
        writer.streams(2)
        writer.streams(1)
        [taken] = events.take_unwritten(writer.run_id)
        assert taken.data == writer.bytes_after(START)
        assert events.take_unwritten(writer.run_id) == []


async def test_a_full_disk_loses_no_text(store: FillableStore, events: Events, writer: Writer):
    """Text that could not be written is written when there is space again, in its place."""
    await writer.commits()
    store.full = True
    writer.streams(3)
    await store.refuses(2)
    writer.streams(2)
    await store.refuses(2)
    store.full = False
    await writer.is_written()
    await writer.commits(1, "end")
    assert await writer.stored() == writer.bytes_after(START) == await until_stop(events, writer.run_id)


async def test_a_full_disk_keeps_the_order(store: FillableStore, events: Events, writer: Writer):
    """A transaction that takes what a failed flush left writes it before its own."""
    live = following(events, writer.run_id)
    store.full = True
    writer.streams(3)
    await store.refuses(1)
    writer.streams(2)
    store.full = False
    await writer.commits(1, "end")
    assert await live == await writer.stored() == writer.bytes_after(START)


async def test_a_batch_that_is_refused_late_leaves_no_gap(store: FillableStore, events: Events, writer: Writer):
    """What a transaction writes is whole, though a batch was on its way before it and is refused after it."""
    store.full = True
    store.refusing.clear()
    writer.streams(3)
    await store.asked.acquire()
    store.full = False
    await writer.commits(1, "end")
    stored = await writer.stored()
    store.refusing.set()
    await store.refuses(1)
    assert stored == writer.bytes_after(START)
    assert await writer.stored() == writer.bytes_after(START)


async def test_a_dead_attempts_text_is_not_mixed_with_the_next(store: Store, open_events):
    """When an attempt is taken over before its text was written, the next one's is stored whole and alone."""
    async with open_events(store, flush_ms=60_000) as events:
        writer = await Writer(store, events).start()
        await writer.commits()
        writer.streams(2)
        lost = writer.said[-2:]
        await writer.is_taken_over()
        writer.streams(3)
    assert await writer.stored() == b"".join(one.data for one in writer.said if one not in lost)


async def test_a_run_that_is_gone_gets_no_rows(writer: Writer):
    """Text that comes after a run was deleted is not written."""
    run_id = writer.run_id
    await writer.store.write(lambda tx: tx.execute("DELETE FROM runs WHERE id = $1", run_id))
    writer.streams(3)
    await writer.events.close()
    assert await writer.stored() == b""


# --- silence, and the end --------------------------------------------------------------------------------------


async def test_silence_is_told(store: Store, open_events):
    """In silence followers get empty lists, and no bytes that are not events; then the next event."""
    async with open_events(store, keep_alive_s=0.01) as events:
        writer = await Writer(store, events).start()
        async with aclosing(events.follow(PROJECT, writer.run_id, START)) as batches:
            for _ in range(3):
                assert await anext(batches) == []
            await writer.commits(1, "end")
            while not (batch := await anext(batches)):
                pass
            assert [segment.data for segment in batch] == [writer.bytes_after(START)]


async def test_no_batch_is_without_bytes(writer: Writer, events: Events):
    """Every segment that a follower gets has something in it."""
    writer.streams(3)
    await writer.is_written()
    async with aclosing(events.follow(PROJECT, writer.run_id, Position(0, 3))) as batches:
        waiting = asyncio.ensure_future(anext(batches))
        await asyncio.sleep(0)
        await writer.commits(1, "end")
        assert all(segment.data for segment in await waiting)


@IN_ONE_PROCESS
async def test_closing_writes_the_rest_and_ends_every_stream(store: Store, open_events):
    """After `close` all followers have ended, whatever they waited for, and all text is stored."""
    async with open_events(store, flush_ms=60_000) as events:
        writer = await Writer(store, events).start()

        async def follow_on() -> bytes:
            return b"".join([s.data async for batch in events.follow(PROJECT, writer.run_id, START) for s in batch])

        tasks = [asyncio.create_task(follow_on()) for _ in range(3)]
        writer.streams(2)
        await asyncio.sleep(0.01)
        await events.close()
        assert await asyncio.gather(*tasks) == [writer.bytes_after(START)] * 3
        assert await writer.stored() == writer.bytes_after(START)
        writer.streams(1)
        await events.close()
        assert await writer.stored() == writer.bytes_after(START)
        assert [batch async for batch in events.follow(PROJECT, "run_none", START)] == []


@pytest.mark.parametrize("kind", ["local"])
async def test_memory_is_given_back(store: Store, open_events):
    """A run that has stopped is kept in memory only while somebody follows it."""
    async with open_events(store) as events:
        writer = await Writer(store, events).start()
        live = following(events, writer.run_id)
        await writer.commits(2)
        writer.streams(4)
        assert list(events._feeds) == [writer.run_id]
        await writer.commits(1, "action")
        await live
        assert events._feeds == {}
        async with aclosing(events.follow(PROJECT, writer.run_id, START)) as batches:
            await anext(batches)
        assert events._feeds == {}
        await writer.commits(1)
        await writer.commits(1, "end")
        assert events._feeds == {}
        assert not events._unwritten


async def test_a_follower_that_leaves_disturbs_nobody(writer: Writer, events: Events):
    """Of two who follow, one is cancelled while it waits; the other gets everything."""
    leaves, stays = following(events, writer.run_id), following(events, writer.run_id)
    await writer.commits()
    await asyncio.sleep(0)
    leaves.cancel()
    writer.streams(2)
    await writer.commits(1, "end")
    assert await stays == writer.bytes_after(START)
    with pytest.raises(asyncio.CancelledError):
        await leaves


# --- any order -------------------------------------------------------------------------------------------------


class Follow(NamedTuple):
    """Begin to follow after the event that is this far (0 to 1) into what was said."""

    share: float


class Says(NamedTuple):
    streamed: bool
    size: int


ACTS = st.one_of(
    st.builds(Says, st.booleans(), st.integers(1, 3)),
    st.builds(Follow, st.sampled_from([0.0, 0.5, 1.0])),
    st.sampled_from(["flushed", "breathe", "taken over", "restart"]),
)


class Scene:
    """A run, its writer and all who ever followed it."""

    def __init__(self, store: Store, kind: str) -> None:
        self.store = store
        self.open = KINDS[kind][0]
        self.followers: list[tuple[Position, asyncio.Task[bytes]]] = []

    async def play(self, acts: list[object]) -> None:
        self.opened = self.open(self.store)
        self.writer = await Writer(self.store, await self.opened.__aenter__()).start()
        try:
            for act in acts:
                await self.act(act)
            await self.writer.commits(1, "end")
            await self.check()
        finally:
            await self.opened.__aexit__(None, None, None)

    async def act(self, act: object) -> None:
        match act:
            case Says(streamed=True, size=size):
                self.writer.streams(size)
            case Says(size=size):
                await self.writer.commits(size)
            case Follow(share=share):
                said = self.writer.said
                seen = said[: round(share * len(said))]
                place = Position(seen[-1].attempt, seen[-1].first) if seen else START
                self.followers.append((place, following(self.writer.events, self.writer.run_id, place)))
            case "flushed":
                await self.writer.is_written()
            case "breathe":
                await asyncio.sleep(0)
            case "taken over":
                await self.writer.commits()
                await self.writer.is_taken_over()
            case "restart":
                await self.restart()

    async def restart(self) -> None:
        """The process ends well and another starts; those who follow come back to where they were."""
        await self.opened.__aexit__(None, None, None)
        for _, task in self.followers:
            with pytest.raises(AssertionError, match="ended without a stop"):
                await task
        self.opened = self.open(self.store)
        self.writer.events = await self.opened.__aenter__()
        run_id = self.writer.run_id
        self.followers = [(place, following(self.writer.events, run_id, place)) for place, _ in self.followers]

    async def check(self) -> None:
        writer = self.writer
        for place, task in self.followers:
            assert await task == writer.bytes_after(place)
            assert await until_stop(writer.events, writer.run_id, place) == writer.bytes_after(place)
        assert await writer.stored() == writer.bytes_after(START)


class Stage(NamedTuple):
    """A loop and a database for many scenes, and the kind of events they are about."""

    runner: asyncio.Runner
    store: Store
    kind: str

    def play(self, acts: list[object]) -> None:
        self.runner.run(Scene(self.store, self.kind).play(acts))


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with asyncio.Runner() as runner:
        opening = KINDS[request.param][1](url_for(request, request.param))
        yield Stage(runner, runner.run(opening.__aenter__()), request.param)
        runner.run(opening.__aexit__(None, None, None))


@pytest.mark.parametrize("stage", ["local"], indirect=True)
@given(acts=st.lists(ACTS, max_size=25))
@settings(max_examples=150, deadline=None)
def test_everyone_gets_the_same_bytes_once_and_in_order(stage: Stage, acts: list[object]):
    """However saying, writing, following and restarting are mixed, every follower gets all that comes after its
    place, and replay gives it again."""
    stage.play(acts)


@pytest.mark.parametrize("stage", ["postgres", "apart"], indirect=True)
@given(acts=st.lists(ACTS, max_size=25))
@settings(max_examples=15, deadline=None)
def test_so_it_is_with_postgres(stage: Stage, acts: list[object]):
    """The same, with every statement on its way through a socket."""
    stage.play(acts)


# --- watching --------------------------------------------------------------------------------------------------


def state(status: str, sequence: int = 1, stop: Stop = "") -> Segment:
    """A segment that ends with the run in this status, after the end of a step whose text looks like an event."""
    step = b'event: thread.run.step.completed\ndata: "event: thread.run.failed"\nid: 1.%d\n\n' % sequence
    run = b'event: thread.run.%b\ndata: {"n": %d}\nid: 1.%d\n\n' % (status.encode(), sequence + 1, sequence + 1)
    return Segment(1, sequence, sequence + 1, step + run, stop)


@pytest.fixture
async def by_word_alone(monkeypatch: pytest.MonkeyPatch, events: Any) -> None:
    """Words come at once, and nobody looks for what is not there."""
    monkeypatch.setattr(postgres, "POLL_S", 60)
    if isinstance(events, Apart):
        await events.connected()


async def heard(watch: Watch, known: str = "") -> News | None:
    return await watch.next(known, 10)


async def test_a_watch_hears_of_another_status(events: Events, by_word_alone: None, kind: str):
    """Whoever watches a run hears what it is now, with its object where it was announced in the same process; not of
    its steps and text, of other runs, or of what is known."""
    run_id = f"run_{next(_numbers)}"
    with events.watch("run", PROJECT, run_id) as watch, events.watch("run", "other", run_id) as other:
        events.announce(PROJECT, run_id, state("in_progress"))
        assert (await heard(watch)) == News("in_progress", None if kind == "apart" else b'{"n": 2}')
        events.announce(PROJECT, run_id, state("in_progress", 3))
        events.announce(PROJECT, run_id, Segment(1, 5, 5, b"event: thread.run.step.completed\ndata: 1\nid: 1.5\n\n"))
        events.announce(PROJECT, run_id, state("requires_action", 6, "action"))
        assert (await heard(watch, "in_progress") or News()).status == "requires_action"
        events.note(PROJECT, run_id, "cancelling")
        assert await heard(watch, "requires_action") == News("cancelling")
        events.announce(PROJECT, run_id, Segment(2**31, 1, 1, b"event: error\ndata: {}\n\n", "end"))
        assert (await heard(watch) or News()).status == DELETED
        with pytest.raises(TimeoutError):
            await other.next("", 0)


async def test_files_batches_and_stores(events: Events, by_word_alone: None):
    """Files and batches are told of by name; of a store that is told of, all in it hear, and nobody in another."""
    store = f"vs_{next(_numbers)}"
    with (
        events.watch("file", PROJECT, "file-1", store) as file,
        events.watch("batch", PROJECT, f"vsfb_{store}", store) as batch,
        events.watch("file", PROJECT, "file-1", "vs_other") as other,
    ):
        events.note(PROJECT, f"{store}/file-1", "completed")
        assert await heard(file, "in_progress") == News("completed")
        events.note(PROJECT, f"vsfb_{store}")
        assert await heard(batch, "in_progress") == News()
        events.note(PROJECT, store)
        assert [await heard(file, "completed"), await heard(batch)] == [News(), News()]
        with pytest.raises(TimeoutError):
            await other.next("in_progress", 0)


async def test_nobody_is_to_wait_any_longer(events: Events, by_word_alone: None):
    """Who watches is told to end, and hears nothing else then; who comes later waits, until events are closed."""
    with events.watch("run", PROJECT, "run_w") as watch:
        events.end_watches()
        events.announce(PROJECT, "run_w", state("in_progress"))
        assert await heard(watch) is None
        assert await heard(watch) is None
        with events.watch("run", PROJECT, "run_w") as later:
            waiting = asyncio.create_task(heard(later))
            await asyncio.sleep(0)
            await events.close()
            assert await waiting is None
            with events.watch("run", PROJECT, "run_w") as last:
                assert await heard(last) is None
