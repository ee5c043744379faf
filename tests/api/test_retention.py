"""What a project has not used for as long as it says is deleted for good, and nothing else is."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from afterglow.files import tidy_files
from afterglow.finding import index_messages
from afterglow.objects import ProjectSettings, Retention
from afterglow.retention import Retention as Sweeper
from afterglow.testing import SetClock, calls, says
from tests.api.stores import make_store, upload
from tests.conftest import GET_WEATHER, Server, ServerFactory

DAY_S = 24 * 3600


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
async def server(start_server: ServerFactory, tmp_path: Path, clock: SetClock) -> AsyncGenerator[Server, None]:
    async with start_server(
        tmp_path / "data", clock=clock, api_keys="test-key,sk-other:other", run_expires_s=90 * DAY_S
    ) as running:
        yield running


async def set_retention(server: Server, project: str = "default", **days: int) -> None:
    settings = msgspec.json.encode(ProjectSettings(retention=Retention(**days))).decode()
    await server.house.store.write(
        lambda tx: tx.execute(
            "INSERT INTO projects (id, created_at, settings) VALUES ($1, 0, $2)"
            " ON CONFLICT (id) DO UPDATE SET settings = excluded.settings",
            project,
            settings,
        )
    )


async def swept(server: Server) -> tuple[int, ...]:
    """Threads, files, and whether events were deleted, by one round of a worker."""
    await index_messages(server.house)
    deleted = await Sweeper(server.house).sweep()
    await tidy_files(server.house)
    return (deleted.threads, deleted.files)


async def threads(server: Server) -> set[str]:
    rows = await server.house.store.read(lambda tx: tx.fetch("SELECT id FROM threads"))
    return {thread_id for (thread_id,) in rows}


async def test_idle_threads_are_deleted(server: Server, clock: SetClock):
    """A thread goes once it, its last message and its last run are that old; not while a run is active."""
    create = server.client.beta.threads.messages.create
    empty = (await server.client.beta.threads.create()).id
    said = (await server.run("old secret")).thread_id
    spoken_to = (await server.run("old")).thread_id
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    waiting = await server.run("Weather?", tools=[GET_WEATHER])
    assert waiting.status == "requires_action"
    clock.time += 20 * DAY_S
    await create(spoken_to, role="user", content="new")
    young = (await server.client.beta.threads.create()).id
    clock.time += 15 * DAY_S
    assert await swept(server) == (0, 0)
    await set_retention(server, threads_days=30)
    assert await swept(server) == (2, 0)
    assert await threads(server) == {spoken_to, waiting.thread_id, young}
    for thread_id in (empty, said):
        with pytest.raises(openai.NotFoundError):
            await server.client.beta.threads.retrieve(thread_id)
    assert await swept(server) == (0, 0)


async def test_a_deleted_thread_is_gone_from_the_disk(server: Server, clock: SetClock, tmp_path: Path, on_sqlite: None):
    """Its text is in no file of the data folder any more, its words in no index."""
    await server.run("unmistakable xanthophyll")
    await index_messages(server.house)
    clock.time += 31 * DAY_S
    await set_retention(server, threads_days=30)
    assert await swept(server) == (1, 0)
    terms = await server.house.store.read(lambda tx: tx.fetch("SELECT term FROM message_terms"))
    assert ("xanthophyll",) in terms
    await index_messages(server.house)
    assert await server.house.store.read(lambda tx: tx.fetch("SELECT term FROM message_terms")) == []
    await server.application.close()
    await server.house.store.close()
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file() and b"xanthophyll" in path.read_bytes()]
    assert left == []


async def test_each_project_has_its_own_time(server: Server, clock: SetClock):
    """What one project says is of no concern to another."""
    await set_retention(server, "other", threads_days=1, files_days=1, events_days=1)
    thread = await server.client.beta.threads.create()
    await upload(server)
    clock.time += 100 * DAY_S
    assert await swept(server) == (0, 0)
    assert await threads(server) == {thread.id}


async def test_a_round_is_bounded_and_the_next_goes_on(
    server: Server, clock: SetClock, monkeypatch: pytest.MonkeyPatch
):
    """What is in use is passed over, and looked at again after the end has been reached."""
    monkeypatch.setattr("afterglow.retention.LOOKED_AT", 2)
    monkeypatch.setattr("afterglow.retention.LOOKS", 1)
    made = [(await server.client.beta.threads.create()).id for _ in range(5)]
    clock.time += 10 * DAY_S
    for thread_id in made[:2]:
        await server.client.beta.threads.messages.create(thread_id, role="user", content="still here")
    await set_retention(server, threads_days=5)
    sweeper = Sweeper(server.house)
    assert [(await sweeper.sweep()).threads for _ in range(3)] == [0, 2, 1]
    clock.time += 10 * DAY_S
    assert [(await sweeper.sweep()).threads for _ in range(3)] == [2, 0, 0]


async def test_unused_files_are_deleted(server: Server, clock: SetClock):
    """A file goes, with its bytes, unless an assistant, a thread, a vector store or a message has it."""
    client: Any = server.client
    unused, of_assistant, of_thread, attached, shown = [await upload(server, name=f"{n}.txt") for n in range(5)]
    picture = (await client.files.create(file=("a.png", b"\x89PNG\r\n\x1a\n"), purpose="vision")).id
    await client.beta.assistants.create(
        model="m", tool_resources={"code_interpreter": {"file_ids": [of_assistant]}}, tools=[]
    )
    thread = await client.beta.threads.create(tool_resources={"code_interpreter": {"file_ids": [of_thread]}})
    attachments = [{"file_id": attached, "tools": [{"type": "code_interpreter"}]}]
    await client.beta.threads.messages.create(thread.id, role="user", content="a", attachments=attachments)
    await client.beta.threads.messages.create(
        thread.id, role="user", content="a", attachments=[{"file_id": shown, "tools": []}]
    )
    part = {"type": "image_file", "image_file": {"file_id": picture}}
    await client.beta.threads.messages.create(thread.id, role="user", content=[part])
    _, [in_store] = await make_store(server, b"text")
    await set_retention(server, files_days=7)
    assert await swept(server) == (0, 0)
    clock.time += 8 * DAY_S
    assert await swept(server) == (0, 1)
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(unused)
    for file_id in (of_assistant, of_thread, attached, shown, picture, in_store):
        await client.files.retrieve(file_id)
    await client.beta.threads.delete(thread.id)
    await index_messages(server.house)
    assert await swept(server) == (0, 4)


async def test_a_file_that_a_run_waits_with_stays(server: Server, clock: SetClock):
    """The messages of a run that waits for its thread are no messages yet; what they name is there when they come."""
    file_id = await upload(server)
    await set_retention(server, files_days=7)
    clock.time += 8 * DAY_S
    server.model.will(calls(("get_weather", {"city": "Oslo"})), says("Rain."), says("A file."))
    busy = await server.run("Weather?", tools=[GET_WEATHER])
    attachments = [{"file_id": file_id, "tools": [{"type": "code_interpreter"}]}]
    waits = await server.client.beta.threads.runs.create(
        busy.thread_id,
        assistant_id=busy.assistant_id,
        additional_messages=[{"role": "user", "content": "See.", "attachments": attachments}],  # type: ignore[typeddict-item]
        extra_query={"if_busy": "queue"},
    )
    assert await swept(server) == (0, 0)
    await server.submit(busy, {"get_weather": "rain"})
    assert (await server.poll(waits)).status == "completed"


async def test_events_have_the_projects_time(server: Server, clock: SetClock):
    """A project's own time comes before the server's, be it longer or shorter."""

    async def events() -> set[str]:
        rows = await server.house.store.read(lambda tx: tx.fetch("SELECT run_id FROM events"))
        return {run_id for (run_id,) in rows}

    first = await server.run("Hi")
    clock.time += 2 * DAY_S
    second = await server.run("Hi")
    await set_retention(server, events_days=3)
    await swept(server)
    assert await events() == {first.id, second.id}
    clock.time += 2 * DAY_S
    await swept(server)
    assert await events() == {second.id}
    await set_retention(server)
    await swept(server)
    assert await events() == set()
