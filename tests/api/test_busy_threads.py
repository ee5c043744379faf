"""Runs and messages for a thread on which a run is active: refused, queued, or put in the run's way."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.beta.threads import Run

from afterglow.testing import SetClock, calls, says
from tests.api.stores import upload
from tests.conftest import GET_WEATHER, Server, ServerFactory

LINE = "Thread {} already has {} runs that wait for it."


async def ask(server: Server, thread_id: str, if_busy: str = "queue", **fields: Any) -> Run:
    assistant = await server.assistant()
    return await server.client.beta.threads.runs.create(
        thread_id, assistant_id=assistant.id, extra_query={"if_busy": if_busy}, **fields
    )


async def get(server: Server, run: Run) -> Run:
    return await server.client.beta.threads.runs.retrieve(run.id, thread_id=run.thread_id)


async def waiting_on(server: Server) -> tuple[str, Run]:
    """A thread whose run waits for its caller."""
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.status == "requires_action"
    return run.thread_id, run


async def texts(server: Server, thread_id: str) -> list[str]:
    listed = await server.client.beta.threads.messages.list(thread_id, order="asc")
    return [message.content[0].text.value for message in listed.data]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def prompt_texts(request: Any) -> list[Any]:
    return [message["content"] for message in request.messages if message["role"] != "system" and message["content"]]


# --- queue -----------------------------------------------------------------------------------------------------


async def test_queued_runs_take_their_turns(server: Server):
    """Runs queued behind an active one are executed in order of creation, each once the one before it is over, and
    their messages come into the thread at their turn: the model of an earlier run does not see them."""
    thread_id, first = await waiting_on(server)
    second = await ask(server, thread_id, additional_messages=[user("Second?")])
    third = await ask(server, thread_id, additional_messages=[user("Third?")])
    assert [run.status for run in (second, third)] == ["queued", "queued"]
    assert await texts(server, thread_id) == ["Weather?"]
    for text in ("Rain.", "Two.", "Three."):
        server.model.will(says(text))
    assert (await server.submit(first, {"get_weather": "rain"})).status == "completed"
    assert (await server.poll(third)).status == "completed"
    assert (await get(server, second)).status == "completed"
    assert await texts(server, thread_id) == ["Weather?", "Rain.", "Second?", "Two.", "Third?", "Three."]
    assert "Second?" not in str(server.model.requests[1].messages)
    assert prompt_texts(server.model.requests[2])[-1] == "Second?"
    assert prompt_texts(server.model.requests[3])[-1] == "Third?"


async def test_a_free_thread_takes_the_run_at_once(server: Server):
    """`queue` and `interrupt` change nothing when no run is active."""
    for if_busy in ("queue", "interrupt", "reject"):
        thread = await server.client.beta.threads.create()
        server.model.will(says("Hi."))
        run = await server.poll(await ask(server, thread.id, if_busy, additional_messages=[user("Hello")]))
        assert run.status == "completed"
        assert await texts(server, thread.id) == ["Hello", "Hi."]


async def test_reject_is_the_default(server: Server):
    """Without the parameter, with an empty one and with `reject` the second run is refused as ever."""
    thread_id, first = await waiting_on(server)
    for query in ({}, {"if_busy": ""}, {"if_busy": "reject"}):
        with pytest.raises(openai.BadRequestError) as caught:
            await server.client.beta.threads.runs.create(
                thread_id, assistant_id=(await server.assistant()).id, extra_query=query
            )
        assert caught.value.body["message"] == f"Thread {thread_id} already has an active run {first.id}."


async def test_another_value_is_refused(server: Server):
    """A word that is none of the three is a 400 that names the parameter, of runs and of messages."""
    thread = await server.client.beta.threads.create()
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(server, thread.id, "wait")
    assert caught.value.body["param"] == "if_busy"
    with pytest.raises(openai.BadRequestError) as caught:
        await server.client.beta.threads.messages.create(thread.id, **user("a"), extra_query={"if_busy": "queue"})
    assert caught.value.body["param"] == "if_busy"


async def test_a_stream_of_a_waiting_run_stays_open(server: Server):
    """It begins with created and queued, and goes on when the run has its turn."""
    thread_id, first = await waiting_on(server)
    assistant = await server.assistant()
    names: list[str] = []
    waits = asyncio.Event()

    async def follow() -> None:
        async with server.client.beta.threads.runs.stream(
            thread_id=thread_id, assistant_id=assistant.id, extra_query={"if_busy": "queue"}
        ) as stream:
            async for event in stream:
                names.append(event.event)
                if event.event == "thread.run.queued":
                    waits.set()

    following = asyncio.create_task(follow())
    await waits.wait()
    assert names == ["thread.run.created", "thread.run.queued"]
    server.model.will(says("Two."))
    await server.client.beta.threads.runs.cancel(first.id, thread_id=thread_id)
    await following
    assert names[2] == "thread.run.in_progress"
    assert names[-1] == "thread.run.completed"


async def test_a_waiting_run_is_cancelled_at_once(server: Server):
    """It is over when the cancel is answered, its messages never come, and the next one waits on behind the active
    run."""
    thread_id, first = await waiting_on(server)
    second = await ask(server, thread_id, additional_messages=[user("Second?")])
    third = await ask(server, thread_id)
    assert (await server.client.beta.threads.runs.cancel(second.id, thread_id=thread_id)).status == "cancelling"
    assert (await get(server, second)).status == "cancelled"
    assert (await get(server, third)).status == "queued"
    assert (await get(server, first)).status == "requires_action"
    server.model.will(says("Three."))
    await server.client.beta.threads.runs.cancel(first.id, thread_id=thread_id)
    assert (await server.poll(third)).status == "completed"
    assert await texts(server, thread_id) == ["Weather?", "Three."]


async def test_a_waiting_run_can_be_modified(server: Server):
    """Its metadata can be set; it goes on waiting."""
    thread_id, _ = await waiting_on(server)
    second = await ask(server, thread_id)
    changed = await server.client.beta.threads.runs.update(second.id, thread_id=thread_id, metadata={"a": "b"})
    assert (changed.metadata, changed.status) == ({"a": "b"}, "queued")
    with pytest.raises(openai.BadRequestError, match="already has an active run"):
        await ask(server, thread_id, "reject")


async def test_so_many_runs_wait_and_no_more(server: Server, monkeypatch: pytest.MonkeyPatch):
    """What is too much is refused; the next is taken when one has gone."""
    monkeypatch.setattr("afterglow.runs.lifecycle.MAX_WAITING", 2)
    thread_id, _ = await waiting_on(server)
    second, _ = [await ask(server, thread_id) for _ in range(2)]
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(server, thread_id)
    assert caught.value.body["message"] == LINE.format(thread_id, 2)
    await server.client.beta.threads.runs.cancel(second.id, thread_id=thread_id)
    assert (await ask(server, thread_id)).status == "queued"


async def test_deleting_the_thread_deletes_those_who_wait(server: Server):
    """They are gone with it, and their followers are told."""
    thread_id, _ = await waiting_on(server)
    second = await ask(server, thread_id)

    async def follow() -> str:
        async for events in server.house.events.follow("default", second.id, (0, 2)):
            for event in events:
                return event.data.decode()
        return ""

    following = asyncio.create_task(follow())
    await asyncio.sleep(0)
    await server.client.beta.threads.delete(thread_id)
    assert "was deleted" in await following
    with pytest.raises(openai.NotFoundError):
        await get(server, second)


# --- when time runs out ----------------------------------------------------------------------------------------


async def test_a_run_has_its_whole_time_once_it_has_the_thread(start_server: ServerFactory, tmp_path: Path):
    """While it waits it expires when all that are ahead would have, and its own time after that; then its time begins
    anew."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, run_expires_s=100) as server:
        thread_id, first = await waiting_on(server)
        clock.time += 10
        second = await ask(server, thread_id)
        third = await ask(server, thread_id)
        assert (second.expires_at, third.expires_at) == (first.created_at + 200, first.created_at + 300)
        clock.time += 10
        server.model.will(calls(("get_weather", {"city": "Oslo"})))
        await server.client.beta.threads.runs.cancel(first.id, thread_id=thread_id)
        second = await server.poll(second)
        assert second.status in ("requires_action", "completed")
        assert (await get(server, third)).expires_at in (first.created_at + 300, None)


async def test_an_overdue_run_passes_its_thread_on(start_server: ServerFactory, tmp_path: Path):
    """The end of its time frees the thread for who waits: then `reject` is refused as long as that one is active."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, run_expires_s=100) as server:
        thread_id, first = await waiting_on(server)
        second = await ask(server, thread_id, additional_messages=[user("Second?")])
        clock.time = first.created_at + 101
        server.model.will(says("Two."))
        assert (await get(server, first)).status == "expired"
        assert (await server.poll(second)).status == "completed"
        assert await texts(server, thread_id) == ["Weather?", "Second?", "Two."]


async def test_a_run_that_waits_for_too_long_expires(start_server: ServerFactory, tmp_path: Path):
    """One whose own time is over while it waits ends, though the run before it has been given more."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, run_expires_s=100) as server:
        thread_id, first = await waiting_on(server)
        second = await ask(server, thread_id)
        later = clock.time + 1000
        await server.house.store.write(
            lambda tx: tx.execute("UPDATE runs SET deadline = $1 WHERE id = $2", int(later), first.id)
        )
        clock.time += 201
        assert (await get(server, second)).status == "expired"
        assert (await get(server, first)).status == "requires_action"


async def test_what_cannot_be_said_any_more_fails_the_run(server: Server):
    """A file that a waiting message names is deleted meanwhile: that run fails and says why, and the next has its
    turn. Whoever waits for the one that failed hears just that."""
    thread_id, first = await waiting_on(server)
    file_id = await upload(server)
    attachments = [{"file_id": file_id, "tools": [{"type": "code_interpreter"}]}]
    second = await ask(server, thread_id, additional_messages=[{**user("Look!"), "attachments": attachments}])
    third = await ask(server, thread_id, additional_messages=[user("Third?")])
    await server.client.files.delete(file_id)
    server.model.will(says("Three."))
    with server.house.events.watch("run", "default", second.id) as watch:
        await server.client.beta.threads.runs.cancel(first.id, thread_id=thread_id)
        news = await watch.next("", 5)
    assert news is not None
    assert news.status == "failed"
    assert (await server.poll(third)).status == "completed"
    failed = await get(server, second)
    assert failed.status == "failed"
    assert failed.last_error is not None
    assert file_id in failed.last_error.message
    assert await texts(server, thread_id) == ["Weather?", "Third?", "Three."]
    with pytest.raises(openai.NotFoundError):
        await ask(server, thread_id, additional_messages=[{**user("Look!"), "attachments": attachments}])


# --- interrupt -------------------------------------------------------------------------------------------------


async def test_interrupt_cancels_the_active_run(server: Server):
    """A run whose model is silent is stopped, and the new one is next, ahead of those that only wait."""
    thread = await server.client.beta.threads.create()
    stuck = asyncio.Event()
    server.model.will([*says("I am")[:-1], stuck, *says("done")])
    first = await ask(server, thread.id)
    second = await ask(server, thread.id, additional_messages=[user("Second?")])
    while (await get(server, first)).status != "in_progress":
        await asyncio.sleep(0.002)
    for text in ("Now.", "Two."):
        server.model.will(says(text))
    third = await ask(server, thread.id, "interrupt", additional_messages=[user("Now!")])
    assert (await server.poll(second)).status == "completed"
    assert ((await get(server, first)).status, (await get(server, third)).status) == ("cancelled", "completed")
    assert (await texts(server, thread.id))[-4:] == ["Now!", "Now.", "Second?", "Two."]


async def test_interrupting_a_run_that_waits_for_its_caller(server: Server):
    """It is over at once, and the new run has the thread."""
    thread_id, first = await waiting_on(server)
    server.model.will(says("Now."))
    second = await ask(server, thread_id, "interrupt", additional_messages=[user("Now!")])
    assert (await get(server, first)).status == "cancelled"
    assert (await server.poll(second)).status == "completed"
    assert await texts(server, thread_id) == ["Weather?", "Now!", "Now."]


async def test_a_run_that_fails_as_it_interrupts(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Its messages cannot come into the thread: the answer says so, its end is counted once, and the thread is free."""
    thread_id, first = await waiting_on(server)
    attachments = [{"file_id": await upload(server), "tools": [{"type": "code_interpreter"}]}]
    monkeypatch.setattr("afterglow.messages.MAX_CODE_FILES", 0)
    look = {**user("Look!"), "attachments": attachments}
    second = await ask(server, thread_id, "interrupt", additional_messages=[look])
    assert (second.status, (await get(server, first)).status) == ("failed", "cancelled")
    samples = [one for metric in server.house.metrics.runs_ended.collect() for one in metric.samples]
    ended = {one.labels["status"]: one.value for one in samples if one.name.endswith("_total") and one.value}
    assert ended == {"cancelled": 1, "failed": 1}
    assert await texts(server, thread_id) == ["Weather?"]
    server.model.will(says("Here."))
    assert (await server.poll(await ask(server, thread_id, "reject"))).status == "completed"


# --- messages --------------------------------------------------------------------------------------------------


async def test_a_message_while_a_run_is_active(server: Server):
    """`if_busy=allow` appends it, and the run sees it at its next model call; without it, it is refused."""
    thread_id, first = await waiting_on(server)
    create = server.client.beta.threads.messages.create
    with pytest.raises(openai.BadRequestError, match="Can't add messages to"):
        await create(thread_id, **user("And Bergen?"))
    await create(thread_id, **user("And Bergen?"), extra_query={"if_busy": "allow"})
    server.model.will(says("Rain in both."))
    assert (await server.submit(first, {"get_weather": "rain"})).status == "completed"
    assert await texts(server, thread_id) == ["Weather?", "And Bergen?", "Rain in both."]
    roles = [message["role"] for message in server.model.requests[-1].messages if message["role"] != "system"]
    assert roles == ["user", "assistant", "tool", "user"]


async def test_the_operator_may_allow_messages(start_server: ServerFactory, tmp_path: Path):
    """With the setting, messages are taken unless the request says `reject`."""
    async with start_server(tmp_path, messages_while_active=True) as server:
        thread_id, _ = await waiting_on(server)
        create = server.client.beta.threads.messages.create
        assert (await create(thread_id, **user("And Bergen?"))).role == "user"
        with pytest.raises(openai.BadRequestError, match="Can't add messages to"):
            await create(thread_id, **user("And Voss?"), extra_query={"if_busy": "reject"})


# --- races -----------------------------------------------------------------------------------------------------


async def test_whoever_comes_first_nobody_is_left_waiting(server: Server):
    """Many runs for one thread, asked for, cancelled and ended all at once: never two at a time, and all come to an
    end."""
    thread = await server.client.beta.threads.create()
    for _ in range(40):
        server.model.will(says("Yes."))

    async def one(number: int) -> Run:
        run = await ask(server, thread.id, "interrupt" if number % 7 == 6 else "queue")
        if number % 4 == 3:
            with contextlib.suppress(openai.BadRequestError):  # it was over
                await server.client.beta.threads.runs.cancel(run.id, thread_id=thread.id)
        return await server.poll(run)

    ended = await asyncio.gather(*(one(number) for number in range(20)))
    assert {run.status for run in ended} <= {"completed", "cancelled"}
    left = await server.house.store.read(
        lambda tx: tx.fetch("SELECT id, status FROM runs WHERE status = 'queued' OR holds_thread = 1")
    )
    assert left == []
    times = sorted((run.started_at or 0, run.completed_at or run.cancelled_at or 0) for run in ended if run.started_at)
    assert all(begun <= over for begun, over in times)
