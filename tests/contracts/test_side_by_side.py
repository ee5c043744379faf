"""Works of two processes that run at the same time on Postgres, each on its own snapshot: both may be done, and neither
may undo what the other relies on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from msgspec import structs

from afterglow import assistants, files, threads, vector_stores, webhooks
from afterglow.app import open_application
from afterglow.contracts import House, Segment, Transaction
from afterglow.errors import InvalidRequest, LostLease, NotFound, ThreadBusy
from afterglow.finding import index_messages
from afterglow.ids import new_id
from afterglow.objects import (
    AttachedCodeInterpreter,
    Attachment,
    CreateAssistant,
    CreateFileBatch,
    CreateMessage,
    CreateRun,
    CreateThread,
    CreateVectorStore,
    CreateVectorStoreFile,
    CreateWebhookEndpoint,
    Message,
    ModifyAssistant,
    Run,
    RunStep,
    StoreExpiry,
    SubmitToolOutputs,
    ToolOutput,
)
from afterglow.rows import events as event_rows
from afterglow.rows import messages as message_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import search_results as result_rows
from afterglow.rows import steps as step_rows
from afterglow.rows.audit import Actor
from afterglow.rows.message_words import Wanted, find_threads
from afterglow.rows.requests import Origin
from afterglow.rows.runs import RunRow
from afterglow.runs import lifecycle
from afterglow.runs.lifecycle import IfBusy, RunQuery
from afterglow.runs.worker import claim_next
from afterglow.settings import load
from afterglow.store import postgres
from afterglow.testing import ScriptedModels, SetClock
from afterglow.tools.code_interpreter import CodeInterpreter
from tests.postgres import fresh_database

P = "default"
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}", "output": None}}
IF_BUSY: tuple[IfBusy, ...] = ("queue", "interrupt")
SideBySide = Callable[[Coroutine[Any, Any, Any], Coroutine[Any, Any, Any]], Awaitable[list[Any]]]


def origin() -> Origin:
    return Origin(new_id("req"), "key", "POST /somewhere", "00")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncGenerator[House, None]:
    async with fresh_database() as url:
        settings = load({"data": str(tmp_path), "database_url": url}, environ={})
        async with open_application(settings, part="api", models=ScriptedModels()) as application:
            yield application.house


@pytest.fixture
async def side_by_side(house: House, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[SideBySide, None]:
    """Do the first up to the commit of its first write; then the second, until it is done or waits for the first; then
    the rest of both. Gives what they return or raise."""
    looking = await asyncpg.connect(house.settings.database_url)
    commit = postgres._commit

    async def do(first: Coroutine[Any, Any, Any], second: Coroutine[Any, Any, Any]) -> list[Any]:
        started: list[asyncio.Task[Any]] = []

        async def commit_late(session: Any, mark: Any) -> None:
            if mark is not None and not started:
                monkeypatch.setattr(postgres, "_commit", commit)
                started.append(asyncio.create_task(second))
                while not (started[0].done() or await looking.fetchval("SELECT 1 FROM pg_locks WHERE NOT granted")):
                    await asyncio.sleep(0.005)
            await commit(session, mark)

        monkeypatch.setattr(postgres, "_commit", commit_late)
        [ended] = await asyncio.gather(first, return_exceptions=True)
        return [ended, *await asyncio.gather(*started, return_exceptions=True)]

    yield do
    await looking.close()


async def rows(house: House, sql: str, *values: Any) -> list[Any]:
    return await house.store.read(lambda tx: tx.fetch(sql, *values))


async def stored_file(house: House, text: bytes = b"text") -> str:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield text

    async def finish() -> tuple[files.NewFile, Origin]:
        return files.NewFile("notes.txt", "assistants"), origin()

    return (await files.create_file(house, P, chunks(), finish)).id


async def new_thread(house: House) -> str:
    async def work(tx: Transaction) -> str:
        return (await threads.insert_thread(tx, house, P, CreateThread())).id

    return await house.store.write(work)


async def held_run(house: House) -> RunRow:
    """A run that a worker has claimed."""
    assistant = await assistants.create_assistant(house, P, CreateAssistant(model="m"), origin())
    thread_id = await new_thread(house)
    await threads.start_run(house, P, thread_id, CreateRun(assistant_id=assistant.id), RunQuery([]), origin())
    [claim] = await house.store.write(lambda tx: claim_next(tx, house, "worker", 1))
    return claim.row


# --- assistants ------------------------------------------------------------------------------------------------


async def test_an_assistant_that_is_deleted_is_not_brought_back_by_a_change(house: House, side_by_side: SideBySide):
    """Whoever changes an assistant while it is deleted hears that it is not there, and it stays deleted."""
    assistant = await assistants.create_assistant(house, P, CreateAssistant(model="m"), origin())

    change = assistants.modify_assistant(house, P, assistant.id, ModifyAssistant(name="n"))
    _, changed = await side_by_side(assistants.delete_assistant(house, P, assistant.id), change)
    assert isinstance(changed, NotFound)
    assert await rows(house, "SELECT id FROM assistants") == []


# --- vector stores ---------------------------------------------------------------------------------------------


async def test_of_two_batches_that_are_cancelled_the_last_cancels_the_file(house: House, side_by_side: SideBySide):
    """A file that two batches wait for is cancelled with the second of them, also when both are cancelled at once."""
    file_id = await stored_file(house)
    store = await vector_stores.create_store(house, P, CreateVectorStore(), origin())
    ids = [
        (await vector_stores.create_batch(house, P, store.id, CreateFileBatch(file_ids=[file_id]), origin())).id
        for _ in range(2)
    ]
    await side_by_side(*(vector_stores.cancel_batch(house, P, store.id, batch_id) for batch_id in ids))
    assert await rows(house, "SELECT status FROM vector_store_files") == [("cancelled",)]


async def test_a_store_that_was_swept_stays_expired_for_a_clock_that_is_behind(house: House):
    """Once the index has let go of a store, a process whose clock is behind cannot use it either."""
    body = CreateVectorStore(expires_after=StoreExpiry(anchor="last_active_at", days=1))
    store = await vector_stores.create_store(house, P, body, origin())
    file_id = await stored_file(house)
    await house.store.write(lambda tx: tx.execute("UPDATE vector_stores SET swept = 1"))  # as one ahead of us does
    with pytest.raises(InvalidRequest, match="has expired"):
        await vector_stores.create_file(house, P, store.id, CreateVectorStoreFile(file_id=file_id), origin())


# --- files -----------------------------------------------------------------------------------------------------


async def test_a_file_that_is_deleted_while_it_is_attached_is_in_no_store(house: House, side_by_side: SideBySide):
    """A file is either attached before it is deleted, and leaves the store, or it is not there to be attached."""
    file_id = await stored_file(house)
    store = await vector_stores.create_store(house, P, CreateVectorStore(), origin())
    attach = vector_stores.create_file(house, P, store.id, CreateVectorStoreFile(file_id=file_id), origin())
    await side_by_side(attach, files.delete_file(house, P, file_id))
    assert await rows(house, "SELECT id FROM vector_store_files") == []
    assert await rows(house, "SELECT in_progress FROM vector_stores") == [(0,)]


async def test_a_file_that_is_attached_while_it_is_deleted_is_in_no_store(house: House, side_by_side: SideBySide):
    """The same the other way round: whoever attaches it hears that it is not there."""
    file_id = await stored_file(house)
    store = await vector_stores.create_store(house, P, CreateVectorStore(), origin())
    attach = vector_stores.create_file(house, P, store.id, CreateVectorStoreFile(file_id=file_id), origin())
    _, attached = await side_by_side(files.delete_file(house, P, file_id), attach)
    assert isinstance(attached, NotFound)
    assert await rows(house, "SELECT id FROM vector_store_files") == []


async def test_no_passage_of_a_file_is_kept_that_is_deleted_meanwhile(house: House, side_by_side: SideBySide):
    """What a run has just found in a file goes with the file, though it is written while the file is deleted."""
    file_id = await stored_file(house)
    found_by = result_rows.FoundBy("thread", "run", "step", "call")
    result = {"file_id": file_id, "x-marker": "0:0†notes", "content": [{"type": "text", "text": "secret"}]}
    keep = house.store.write(lambda tx: result_rows.insert_results(tx, P, found_by, [result]))
    await side_by_side(keep, files.delete_file(house, P, file_id))
    assert await rows(house, "SELECT object FROM search_results") == []


# --- the code interpreter --------------------------------------------------------------------------------------


async def test_a_thread_that_is_deleted_leaves_no_names_of_files(house: House, side_by_side: SideBySide):
    """What a run places for its code goes with the thread, though it is placed while the thread is deleted."""
    file_id = await stored_file(house)
    row = await held_run(house)
    row.run.tool_resources = {"code_interpreter": {"file_ids": [file_id]}}
    place = CodeInterpreter(house, "worker").place_files(row)
    await side_by_side(place, threads.delete_thread(house, P, row.run.thread_id))
    assert await rows(house, "SELECT name FROM sandbox_files") == []


async def test_an_attempt_that_was_replaced_opens_no_session(house: House):
    """A thread's last session stays that of the attempt that took over, and code of an earlier one is not run."""
    row = await held_run(house)
    await house.store.write(lambda tx: run_rows.set_holder(tx, structs.replace(row, attempt=2), "another", 1e10))
    outputs = CodeInterpreter(house, "worker").run(row, [], "1", seen=False)
    with pytest.raises(LostLease):
        await anext(outputs)
    assert await rows(house, "SELECT worker FROM sandbox_sessions") == []


# --- events ----------------------------------------------------------------------------------------------------


async def test_text_that_is_deleted_is_not_just_being_written_to_the_log(house: House, side_by_side: SideBySide):
    """What a run's events quote is taken from them also when they are written while it is deleted."""
    row = await held_run(house)

    async def quote(tx: Transaction) -> None:
        await event_rows.insert_segment(tx, P, row.run.id, Segment(1, 50, 50, b"secret"), 1)
        await run_rows.update_run(tx, row)

    blank = house.store.write(lambda tx: event_rows.blank_run_events(tx, P, row.run.id))
    await side_by_side(house.store.write(quote), blank)
    assert [data for (data,) in await rows(house, "SELECT data FROM events WHERE length(data) > 0")] == []


# --- threads and runs ------------------------------------------------------------------------------------------


async def run_that_waits(house: House) -> Run:
    """A run that waits for the output of one call."""
    row = await held_run(house)
    run = row.run
    step = RunStep(
        id=new_id("step"),
        created_at=run.created_at,
        run_id=run.id,
        assistant_id=run.assistant_id,
        thread_id=run.thread_id,
        type="tool_calls",
        step_details={"type": "tool_calls", "tool_calls": [CALL]},
    )
    run.status, run.required_action = "requires_action", {"submit_tool_outputs": {"tool_calls": [CALL]}}

    async def wait(tx: Transaction) -> None:
        await step_rows.insert_step(tx, P, step, 1, 1)
        await run_rows.update_run(tx, row)

    await house.store.write(wait)
    return run


async def test_a_message_and_a_run_are_not_put_on_a_thread_at_once(house: House, side_by_side: SideBySide):
    """Whichever is second sees the first: a message that comes while a run begins is refused."""
    assistant = await assistants.create_assistant(house, P, CreateAssistant(model="m"), origin())
    for message_first in (True, False):
        thread_id = await new_thread(house)
        start = threads.start_run(house, P, thread_id, CreateRun(assistant_id=assistant.id), RunQuery([]), origin())
        say = threads.create_message(house, P, thread_id, CreateMessage(role="user", content="Hi."), origin())
        both = [say, start] if message_first else [start, say]
        _, second = await side_by_side(*both)
        assert isinstance(second, ThreadBusy) is not message_first
        [(seq,)] = await rows(house, "SELECT last_seq FROM threads WHERE id = $1", thread_id)
        assert seq == 1 + message_first


async def test_two_runs_are_not_put_on_a_thread_at_once(house: House, side_by_side: SideBySide):
    """The second hears that the thread is busy."""
    assistant = await assistants.create_assistant(house, P, CreateAssistant(model="m"), origin())
    thread_id = await new_thread(house)
    body = CreateRun(assistant_id=assistant.id)
    both = [threads.start_run(house, P, thread_id, body, RunQuery([]), origin()) for _ in range(2)]
    _, second = await side_by_side(*both)
    assert isinstance(second, ThreadBusy)


async def test_no_endpoint_is_one_too_many(house: House, side_by_side: SideBySide, monkeypatch: pytest.MonkeyPatch):
    """Of two that are made at once, the second hears that the project can have no more."""
    monkeypatch.setattr(webhooks, "MAX_ENDPOINTS", 1)
    body = CreateWebhookEndpoint(url="https://app.example/hook", event_types=["*"])
    both = [webhooks.create_endpoint(house, Actor("session", "tests"), P, body, origin()) for _ in range(2)]
    _, second = await side_by_side(*both)
    assert isinstance(second, InvalidRequest)


async def test_a_run_that_waits_is_not_missed_by_the_end_of_the_one_before(house: House, side_by_side: SideBySide):
    """Whichever is second sees the first: after a run is queued behind another that ends, it has the thread."""
    assistant = await assistants.create_assistant(house, P, CreateAssistant(model="m"), origin())
    body = CreateRun(assistant_id=assistant.id)
    for queued_first in (True, False):
        for if_busy in IF_BUSY:
            thread_id = await new_thread(house)
            active = await threads.start_run(house, P, thread_id, body, RunQuery([]), origin())
            queueing = threads.start_run(house, P, thread_id, body, RunQuery([], if_busy=if_busy), origin())
            ending = lifecycle.cancel_run(house, P, thread_id, active.run.id, origin())
            await (side_by_side(queueing, ending) if queued_first else side_by_side(ending, queueing))
            found = await rows(
                house, "SELECT status, holds_thread FROM runs WHERE thread_id = $1 ORDER BY seq", thread_id
            )
            assert found == [("cancelled", 0), ("queued", 1)]


async def test_a_thread_is_not_passed_to_a_run_that_is_just_cancelled(house: House, side_by_side: SideBySide):
    """The one behind it has the thread, whoever is first: the cancel, or the end of the run before."""
    assistant = await assistants.create_assistant(house, P, CreateAssistant(model="m"), origin())
    body = CreateRun(assistant_id=assistant.id)
    for cancelled_first in (True, False):
        thread_id = await new_thread(house)
        first, second, _ = [
            (await threads.start_run(house, P, thread_id, body, RunQuery([], if_busy="queue"), origin())).run.id
            for _ in range(3)
        ]
        cancelling = lifecycle.cancel_run(house, P, thread_id, second, origin())
        ending = lifecycle.cancel_run(house, P, thread_id, first, origin())
        await (side_by_side(cancelling, ending) if cancelled_first else side_by_side(ending, cancelling))
        found = await rows(house, "SELECT status, holds_thread FROM runs WHERE thread_id = $1 ORDER BY seq", thread_id)
        assert found == [("cancelled", 0), ("cancelled", 0), ("queued", 1)]


async def test_a_message_that_is_deleted_is_not_just_being_indexed(house: House, side_by_side: SideBySide):
    """Its words reach the index before it is deleted, and are taken out, or never."""
    for indexed_first in (True, False):
        thread_id = await new_thread(house)
        message = await threads.create_message(house, P, thread_id, CreateMessage("user", "quetzal"), origin())
        deleting = threads.delete_message(house, P, thread_id, message.id)
        indexing = index_messages(house)
        await (side_by_side(indexing, deleting) if indexed_first else side_by_side(deleting, indexing))
        wanted = Wanted(["quetzal"])
        assert await house.store.read(lambda tx: find_threads(tx, P, wanted, 10)) == []  # noqa: B023
        await index_messages(house)
        assert await rows(house, "SELECT term FROM message_terms") == []


async def test_an_idle_thread_that_is_spoken_to_is_not_deleted(house: House, side_by_side: SideBySide):
    """A message comes before the thread is deleted for its age, and keeps it, or hears that it is gone."""
    later = int(house.clock.now()) + 10
    for spoken_first in (True, False):
        thread_id = await new_thread(house)
        house.clock = SetClock(later + 10)
        speaking = threads.create_message(house, P, thread_id, CreateMessage("user", "Hi"), origin())
        deleting = threads.delete_idle_thread(house, P, thread_id, later)
        if spoken_first:
            said, deleted = await side_by_side(speaking, deleting)
        else:
            deleted, said = await side_by_side(deleting, speaking)
        assert deleted is not spoken_first
        assert isinstance(said, NotFound) is deleted
        assert len(await rows(house, "SELECT id FROM threads WHERE id = $1", thread_id)) == spoken_first
        house.clock = SetClock(later - 10)


async def test_a_file_that_is_just_being_named_is_not_deleted(house: House, side_by_side: SideBySide):
    """A file that is deleted for its age is not there to be named, and one that is just being named is kept."""
    later = int(house.clock.now()) + 10
    for named_first in (True, False):
        thread_id, file_id = await new_thread(house), await stored_file(house)
        body = CreateMessage("user", "Hi", attachments=[Attachment(file_id=file_id, tools=[AttachedCodeInterpreter()])])
        naming = threads.create_message(house, P, thread_id, body, origin())
        deleting = files.condemn_unused_file(house, P, file_id, later)
        if named_first:
            named, deleted = await side_by_side(naming, deleting)
        else:
            deleted, named = await side_by_side(deleting, naming)
        assert deleted is not named_first
        assert isinstance(named, NotFound) is deleted
        await index_messages(house)


async def test_outputs_are_taken_once(house: House, side_by_side: SideBySide):
    """Of two submissions at once the second, which says something else, hears that the run does not wait; so does one
    that meets a cancel."""
    body, other = (SubmitToolOutputs(tool_outputs=[ToolOutput(tool_call_id="call_1", output=text)]) for text in "xy")
    for cancelled in (False, True):
        run = await run_that_waits(house)
        names = house, P, run.thread_id, run.id
        submit = lifecycle.submit_tool_outputs(*names, body, origin())
        another = (
            lifecycle.cancel_run(*names, origin())
            if cancelled
            else lifecycle.submit_tool_outputs(*names, other, origin())
        )
        _, second = await side_by_side(another, submit)
        assert isinstance(second, InvalidRequest)
        assert "do not accept tool outputs" in second.message


@pytest.mark.parametrize("what", ["submit", "delete"])
async def test_a_run_is_locked_before_what_hangs_on_it(house: House, what: str):
    """Two works on one run wait for each other in turn, and do not stop each other until Postgres ends one of them."""
    run = await run_that_waits(house)
    body = SubmitToolOutputs(tool_outputs=[ToolOutput(tool_call_id="call_1", output="o")])
    acts: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "submit": lambda: lifecycle.submit_tool_outputs(house, P, run.thread_id, run.id, body, origin()),
        "delete": lambda: threads.delete_thread(house, P, run.thread_id),
    }
    first, looking = [await asyncpg.connect(house.settings.database_url) for _ in range(2)]
    async with first.transaction():
        await first.execute("UPDATE runs SET attempt = attempt WHERE id = $1", run.id)
        acting = asyncio.create_task(acts[what]())
        while not await looking.fetchval("SELECT 1 FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.005)
        await first.execute("SET LOCAL lock_timeout = '500ms'")
        await first.execute("UPDATE steps SET seq = seq WHERE run_id = $1", run.id)
        await first.execute("UPDATE threads SET last_seq = last_seq WHERE id = $1", run.thread_id)
    await acting
    for connection in (first, looking):
        await connection.close()


async def test_nothing_of_a_deleted_thread_is_left_by_what_was_written_to_it(house: House, side_by_side: SideBySide):
    """Messages and runs that are put on a thread while it is deleted go with it, or are refused."""
    assistant = await assistants.create_assistant(house, P, CreateAssistant(model="m"), origin())

    def writes(thread_id: str) -> list[Coroutine[Any, Any, Any]]:
        say = CreateMessage(role="user", content="Hi.")
        return [
            threads.create_message(house, P, thread_id, say, origin()),
            threads.start_run(house, P, thread_id, CreateRun(assistant_id=assistant.id), RunQuery([]), origin()),
        ]

    for number in range(2):
        for deleted_first in (True, False):
            thread_id = await new_thread(house)
            write, other = writes(thread_id)[:: -1 if number else 1]
            other.close()
            delete = threads.delete_thread(house, P, thread_id)
            _, second = await side_by_side(*([delete, write] if deleted_first else [write, delete]))
            assert isinstance(second, NotFound) is deleted_first
    for table in ("threads", "messages", "runs", "events"):
        assert await rows(house, f"SELECT * FROM {table}") == []


async def test_an_attempt_that_writes_to_a_deleted_thread_leaves_nothing(house: House, side_by_side: SideBySide):
    """A worker's transaction and the end of the thread come one after the other."""
    for deleted_first in (True, False):
        row = await held_run(house)
        message = Message(id=new_id("msg"), created_at=1, thread_id=row.run.thread_id, role="assistant")

        async def write(tx: Transaction, row: RunRow = row, message: Message = message) -> bool:
            held = await run_rows.get_held_run(tx, P, row.run.id, row.attempt)
            if held is not None:
                await message_rows.insert_message(tx, P, message, 9)
                await run_rows.update_run(tx, held)
            return held is not None

        both = [house.store.write(write), threads.delete_thread(house, P, row.run.thread_id)]
        ended = await side_by_side(*both[:: -1 if deleted_first else 1])
        assert (False in ended) is deleted_first
    for table in ("messages", "runs", "events"):
        assert await rows(house, f"SELECT * FROM {table}") == []


async def test_an_attempt_writes_nothing_once_another_has_taken_over(house: House, side_by_side: SideBySide):
    """A claim that comes while a late attempt writes is before or after it; if before, the attempt is not held."""
    row = await held_run(house)

    async def claim(tx: Transaction) -> None:
        held = await run_rows.get_held_run(tx, P, row.run.id, 1)
        assert held is not None
        await run_rows.set_holder(tx, structs.replace(held, attempt=2), "another", 1e10)

    async def write(tx: Transaction) -> bool:
        held = await run_rows.get_held_run(tx, P, row.run.id, 1)
        if held is not None:
            await run_rows.update_run(tx, held)
        return held is not None

    assert await side_by_side(house.store.write(claim), house.store.write(write)) == [None, False]


async def test_what_comes_later_is_later_whatever_the_clock_of_its_machine_says(house: House):
    """Messages and runs of a thread keep their order when the second is created where the clock is behind."""
    house.clock = clock = SetClock()
    assistant = await assistants.create_assistant(house, P, CreateAssistant(model="m"), origin())
    thread_id = await new_thread(house)
    first, *others = [CreateMessage(role="user", content=text) for text in ("one", "two")]
    said = [await threads.create_message(house, P, thread_id, first, origin())]
    clock.time -= 2
    said += [await threads.create_message(house, P, thread_id, body, origin()) for body in others]
    happened = await threads.start_run(
        house, P, thread_id, CreateRun(assistant_id=assistant.id), RunQuery([]), origin()
    )
    listed = await rows(house, "SELECT id FROM messages ORDER BY created_at, seq, id")
    assert [row[0] for row in listed] == [message.id for message in said]
    assert happened.run.created_at == said[0].created_at
    assert happened.run.expires_at == int(clock.time) + house.settings.run_expires_s
