"""Messages: their parts, limits and order, and what an active run on their thread refuses."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow.contracts import START, Position, TextDelta, Transaction
from afterglow.rows.events import get_last_position, list_segments
from afterglow.testing import SetClock, calls, ended, says
from tests.api.wire import Fault, Json, Wire, until
from tests.conftest import GET_WEATHER, Server, ServerFactory

MESSAGE_ID = re.compile(r"msg_[A-Za-z0-9]{24}")
NOW = 1_700_000_000
MAX_CHARS = 256_000
TOO_LONG = (
    "Invalid '{}': string too long. Expected a string with maximum length 256000, "
    "but got a string with length 256001 instead."
)


def text(value: str) -> Json:
    return {"type": "text", "text": {"value": value, "annotations": []}}


@pytest.fixture
async def messages(wire: Wire) -> str:
    """The path of an empty thread's messages."""
    return f"/threads/{(await wire.made('/threads'))['id']}/messages"


async def say(wire: Wire, messages: str, content: Any = "hi", **more: Any) -> Json:
    return await wire.made(messages, {"role": "user", "content": content, **more})


# --- creating --------------------------------------------------------------------------------------------------


async def test_a_text_becomes_one_part(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """A message made through the API is complete at once, belongs to no run, and has every key of the reference."""
    async with start_server(tmp_path, clock=SetClock(NOW)) as server:
        wire = connect(server)
        thread_id = (await wire.made("/threads"))["id"]
        for nulls in ({}, {"attachments": None, "metadata": None}, {"attachments": []}):
            made = await say(wire, f"/threads/{thread_id}/messages", "Hello", **nulls)
            assert MESSAGE_ID.fullmatch(made["id"])
            assert made == {
                "id": made["id"],
                "object": "thread.message",
                "created_at": NOW,
                "thread_id": thread_id,
                "status": "completed",
                "incomplete_details": None,
                "completed_at": NOW,
                "incomplete_at": None,
                "role": "user",
                "content": [text("Hello")],
                "assistant_id": None,
                "run_id": None,
                "attachments": [],
                "metadata": {},
            }
            assert await wire.read(f"/threads/{thread_id}/messages/{made['id']}") == made


async def test_parts_come_back_as_they_are_answered(wire: Wire, messages: str):
    """A text part, sent as a plain string, is answered with value and annotations; an image gets its default detail."""
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    low = {"type": "image_url", "image_url": {"url": "https://example.com/b.png", "detail": "low"}}
    content = [{"type": "text", "text": "one"}, image, low, {"type": "text", "text": " "}]
    made = await say(wire, messages, content, role="assistant", metadata={"k": "v"})
    shown = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "auto"}}
    assert made["content"] == [text("one"), shown, low, text(" ")]
    assert (made["role"], made["metadata"], made["run_id"]) == ("assistant", {"k": "v"}, None)
    assert (await say(wire, messages, [image]))["content"] == [shown]


async def test_text_is_kept_to_the_character(wire: Wire, messages: str):
    """Emoji, right-to-left marks, controls, line ends and white space at the ends come back unchanged."""
    odd = " \r\n\t\x01\x7f\u202e\N{GRINNING FACE}e\u0301\ufeff\U0010ffff\u2028\\u0000 "
    made = await say(wire, messages, odd)
    read = await wire.read(f"{messages}/{made['id']}")
    assert read["content"] == made["content"] == [text(odd)]


async def test_the_official_client_sees_the_same(server: Server, wire: Wire, messages: str):
    """Create, retrieve, update, list and delete of the official client do what the routes do."""
    api, thread_id = server.client.beta.threads.messages, messages.split("/")[2]
    made = await api.create(thread_id, role="user", content=[{"type": "text", "text": "hi"}])
    assert (await api.retrieve(made.id, thread_id=thread_id)) == made
    changed = await api.update(made.id, thread_id=thread_id, metadata={"k": "v"})
    assert changed.metadata == {"k": "v"}
    assert [one.id async for one in api.list(thread_id)] == [made.id]
    deleted = await api.delete(made.id, thread_id=thread_id)
    assert deleted.model_dump() == {"id": made.id, "object": "thread.message.deleted", "deleted": True}


async def test_text_has_its_limit(wire: Wire, messages: str):
    """256,000 characters pass, as a string and as a part, on every route that takes messages; one more is refused."""
    full, over = "\N{GRINNING FACE}" * MAX_CHARS, "x" * (MAX_CHARS + 1)
    assert len((await say(wire, messages, full))["content"][0]["text"]["value"]) == MAX_CHARS
    await say(wire, messages, [{"type": "text", "text": full}] * 2)
    for path, body, param in (
        (messages, {"role": "user", "content": over}, "content"),
        (messages, {"role": "user", "content": [{"type": "text", "text": over}]}, "content[0].text"),
        ("/threads", {"messages": [{"role": "user", "content": over}]}, "messages[0].content"),
    ):
        refusal = await wire.post(path, body)
        assert refusal.fault == Fault(400, TOO_LONG.format(param), param, "string_above_max_length")


async def test_a_message_says_something(wire: Wire, messages: str):
    """Empty text, white space alone and an empty array are refused; so is a message without role or content."""
    blank = Fault(400, "Message content must be non-empty.", "content")
    for content in ("", " \n\t", [{"type": "text", "text": ""}, {"type": "text", "text": " "}]):
        assert (await wire.post(messages, {"role": "user", "content": content})).fault == blank
    none = await wire.post(messages, {"role": "user", "content": []})
    flaw = "empty array. Expected an array with minimum length 1, but got an empty array instead."
    assert none.fault == Fault(400, f"Invalid 'content': {flaw}", "content", "empty_array")
    for body, name in (({"role": "user"}, "content"), ({"content": "hi"}, "role"), ({}, "role")):
        refusal = await wire.post(messages, body)
        message = f"Missing required parameter: '{name}'."
        assert refusal.fault == Fault(400, message, name, "missing_required_parameter")
    assert (await wire.read(messages))["data"] == []


async def test_roles_and_parts_are_those_of_the_reference(wire: Wire, messages: str):
    """There are two roles and three parts that a caller may send, and no other keys."""
    supported = "Supported values are: 'user' and 'assistant'."
    refusal = await wire.post(messages, {"role": "system", "content": "hi"})
    assert refusal.fault == Fault(400, f"Invalid value: 'system'. {supported}", "role", "invalid_value")
    for part, path, code in (
        ({"type": "refusal", "refusal": "no"}, "content[0].type", "invalid_value"),
        ({"type": "text", "text": {"value": "hi", "annotations": []}}, "content[0].text", "invalid_type"),
        ({"type": "text", "text": "hi", "x": 1}, "content[0].x", "unknown_parameter"),
        ({"type": "image_url", "image_url": {}}, "content[0].image_url.url", "missing_required_parameter"),
        (
            {"type": "image_url", "image_url": {"url": "u", "detail": "all"}},
            "content[0].image_url.detail",
            "invalid_value",
        ),
        ({"text": "hi"}, "content[0].type", "missing_required_parameter"),
    ):
        refusal = await wire.post(messages, {"role": "user", "content": [part]})
        assert (refusal.status, refusal.fault.param, refusal.fault.code) == (400, path, code)
    for name in ("file_ids", "run_id", "assistant_id", "x-mine"):
        refusal = await wire.post(messages, {"role": "user", "content": "hi", name: None})
        assert refusal.fault == Fault(400, f"Unknown parameter: '{name}'.", name, "unknown_parameter")


async def test_files_that_are_not_here_are_refused(wire: Wire, messages: str):
    """An attachment or an image by the id of no file is a 404, and the message is not stored."""
    for more in (
        {"attachments": [{"file_id": "file-x", "tools": [{"type": "file_search"}, {"type": "code_interpreter"}]}]},
        {"attachments": [{"file_id": "file-x"}]},
        {"content": [{"type": "image_file", "image_file": {"file_id": "file-x", "detail": "high"}}]},
    ):
        refusal = await wire.post(messages, {"role": "user", "content": "hi", **more})
        assert refusal.fault == Fault(404, "No such File object: file-x", "id")
    bad_tool = {"attachments": [{"file_id": "file-x", "tools": [{"type": "function"}]}]}
    refusal = await wire.post(messages, {"role": "user", "content": "hi", **bad_tool})
    assert refusal.fault.param == "attachments[0].tools[0].type"
    assert (await wire.read(messages))["data"] == []


# --- reading, modifying, deleting ------------------------------------------------------------------------------


async def test_only_metadata_can_be_modified(wire: Wire, messages: str):
    """Metadata is replaced, cleared by null and kept when left out; nothing else of a message changes."""
    made = await say(wire, messages, metadata={"a": "1"})
    path = f"{messages}/{made['id']}"
    for body, metadata in (({}, {"a": "1"}), ({"metadata": {"b": "2"}}, {"b": "2"}), ({"metadata": None}, {})):
        made["metadata"] = metadata
        assert await wire.made(path, body) == made
        assert await wire.read(path) == made
    for name in ("content", "role", "attachments", "status"):
        refusal = await wire.post(path, {name: "x"})
        assert refusal.fault == Fault(400, f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    too_many = await wire.post(path, {"metadata": {f"k{n}": "v" for n in range(17)}})
    assert too_many.fault.code == "object_above_max_properties"
    assert await wire.read(path) == made


async def test_a_deleted_message_is_gone(wire: Wire, messages: str):
    """It answers once, and is then missing from its place, from lists, and as a cursor."""
    first, second, third = [await say(wire, messages, str(number)) for number in range(3)]
    path = f"{messages}/{second['id']}"
    deleted = await wire.delete(path, headers={"content-type": "application/json"})
    assert deleted.json == {"id": second["id"], "object": "thread.message.deleted", "deleted": True}
    missing = Fault(404, f"No message found with id '{second['id']}'.")
    for method, body in (("GET", None), ("POST", {}), ("DELETE", None)):
        assert (await wire.ask(method, path, body)).fault == missing
    assert (await wire.get(messages)).ids == [third["id"], first["id"]]
    assert (await wire.get(f"{messages}?after={second['id']}")).fault == missing._replace(param="after")


async def test_a_message_belongs_to_its_thread(wire: Wire, messages: str):
    """Through another thread it is not found; through a thread that is not there, the thread is what is missing."""
    made = await say(wire, messages)
    other = (await wire.made("/threads"))["id"]
    for thread_id, fault in (
        (other, Fault(404, f"No message found with id '{made['id']}'.")),
        ("thread_nobody", Fault(404, "No thread found with id 'thread_nobody'.")),
    ):
        for method, body in (("GET", None), ("POST", {}), ("DELETE", None)):
            answer = await wire.ask(method, f"/threads/{thread_id}/messages/{made['id']}", body)
            assert answer.fault == fault
    assert (await wire.get(f"/threads/{other}/messages?after={made['id']}")).status == 404
    assert (await wire.get(messages)).ids == [made["id"]]


async def test_an_answer_names_its_run(server: Server, wire: Wire):
    """What a run wrote is the newest message, complete, with the ids of run and assistant; `run_id` finds it alone."""
    server.model.will(says("Hello there."), says("Again."))
    first = await server.run("hi")
    second = await server.run("more", thread_id=first.thread_id)
    messages = f"/threads/{first.thread_id}/messages"
    newest, _, older, _ = (await wire.read(messages))["data"]
    assert newest["content"] == [text("Again.")]
    assert (newest["role"], newest["status"]) == ("assistant", "completed")
    assert (newest["run_id"], newest["assistant_id"]) == (second.id, second.assistant_id)
    assert newest["completed_at"] >= newest["created_at"]
    assert (await wire.get(f"{messages}?run_id={first.id}")).ids == [older["id"]]
    assert (await wire.get(f"{messages}?run_id={second.id}")).ids == [newest["id"]]
    assert (await wire.get(f"{messages}?run_id=run_nobody")).ids == []
    assert len((await wire.get(f"{messages}?run_id=")).ids) == 4


# --- the lock --------------------------------------------------------------------------------------------------


async def assert_locked(wire: Wire, run: Json) -> None:
    """Messages and runs are refused in the words that clients parse, and whatever else touches the thread passes."""
    thread_id, run_id = run["thread_id"], run["id"]
    thread = f"/threads/{thread_id}"
    before = (await wire.get(f"{thread}/messages")).ids
    busy = Fault(400, f"Can't add messages to {thread_id} while a run {run_id} is active.")
    assert (await wire.post(f"{thread}/messages", {"role": "user", "content": "x"})).fault == busy
    another = {"assistant_id": run["assistant_id"]}
    held = Fault(400, f"Thread {thread_id} already has an active run {run_id}.")
    assert (await wire.post(f"{thread}/runs", another)).fault == held
    added = [{"role": "user", "content": "x"}]
    assert (await wire.post(f"{thread}/runs", {**another, "additional_messages": added})).fault == held
    assert (await wire.get(f"{thread}/messages")).ids == before
    for path in (thread, f"{thread}/messages/{before[0]}", f"{thread}/runs/{run_id}"):
        assert (await wire.made(path, {"metadata": {"seen": run["status"]}}))["metadata"] == {"seen": run["status"]}
    assert (await wire.get(f"{thread}/runs")).ids[0] == run_id


async def test_an_active_run_locks_its_thread(server: Server, wire: Wire):
    """While a run is in progress or waits for outputs, the thread is locked; with its end the lock is gone at once."""
    gate = asyncio.Event()
    server.model.will([gate, *calls(("get_weather", {"city": "Oslo"}))], says("Rain."))
    assistant = await server.assistant(tools=[GET_WEATHER])
    thread = await wire.made("/threads", {"messages": [{"role": "user", "content": "Weather?"}]})
    path = f"/threads/{thread['id']}"
    run = await wire.made(f"{path}/runs", {"assistant_id": assistant.id})
    await until(lambda: server.model.requests)
    await assert_locked(wire, await wire.read(f"{path}/runs/{run['id']}"))
    gate.set()
    run = await wire.stopped(run)
    assert run["status"] == "requires_action"
    await assert_locked(wire, run)
    [call] = run["required_action"]["submit_tool_outputs"]["tool_calls"]
    outputs = {"tool_outputs": [{"tool_call_id": call["id"], "output": "rain"}]}
    run = await wire.stopped(await wire.made(f"{path}/runs/{run['id']}/submit_tool_outputs", outputs))
    assert run["status"] == "completed"
    await say(wire, f"{path}/messages", "Thanks.")


async def test_a_queued_run_locks_its_thread(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """A run that nobody has taken up yet holds its thread too, and may be cancelled; then the thread is free."""
    async with start_server(tmp_path, max_running_runs=1) as server:
        wire, gate = connect(server), asyncio.Event()
        server.model.will([gate, ended("stop")])
        assistant = await server.assistant()
        runs = [await wire.made("/threads/runs", {"assistant_id": assistant.id}) for _ in range(2)]
        waiting = await wire.read(f"/threads/{runs[1]['thread_id']}/runs/{runs[1]['id']}")
        assert waiting["status"] == "queued"
        await say(wire, f"/threads/{(await wire.made('/threads'))['id']}/messages")
        path = f"/threads/{waiting['thread_id']}"
        refusal = await wire.post(f"{path}/messages", {"role": "user", "content": "x"})
        assert refusal.fault.message.endswith(f"while a run {waiting['id']} is active.")
        assert (await wire.made(f"{path}/runs/{waiting['id']}/cancel"))["status"] == "cancelling"
        assert (await wire.read(f"{path}/runs/{waiting['id']}"))["status"] == "cancelled"
        await say(wire, f"{path}/messages", "free")
        gate.set()


async def test_a_message_can_be_deleted_while_a_run_is_active(server: Server, wire: Wire):
    """The lock is for what is added; a message may go."""
    gate = asyncio.Event()
    server.model.will([gate, *says("Done.")])
    assistant = await server.assistant()
    thread = await wire.made("/threads", {"messages": [{"role": "user", "content": "hi"}]})
    messages = f"/threads/{thread['id']}/messages"
    run = await wire.made(f"/threads/{thread['id']}/runs", {"assistant_id": assistant.id})
    [message_id] = (await wire.get(messages)).ids
    assert (await wire.delete(f"{messages}/{message_id}")).status == 200
    gate.set()
    assert (await wire.stopped(run))["status"] == "completed"
    assert await server.last_text(thread["id"]) == "Done."


async def test_events_go_on_counting_after_a_message_is_deleted(server: Server) -> None:
    """Deleting what a waiting run has said takes its text out of the log, and the numbers of its events stay taken."""
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": "Weather?"}])
    server.model.will([TextDelta("I will look."), *calls(("get_weather", {"city": "Oslo"}))], says("It rains."))
    assistant = await server.assistant()
    started = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id, tools=[GET_WEATHER])
    run = await server.poll(started)
    said = (await server.client.beta.threads.messages.list(thread.id, limit=1)).data[0]

    async def last(tx: Transaction) -> Position:
        return await get_last_position(tx, "default", run.id)

    async def stored(tx: Transaction) -> bytes:
        return b"".join(segment.data for segment in await list_segments(tx, "default", run.id, START))

    before = await server.house.store.read(last)
    assert b"I will look." in await server.house.store.read(stored)
    await server.client.beta.threads.messages.delete(said.id, thread_id=thread.id)
    assert await server.house.store.read(stored) == b""
    run = await server.submit(run, {"get_weather": "rain"})
    assert run.status == "completed"
    log = await server.house.store.read(stored)
    assert log.split(b"\nid: ")[1].split(b"\n")[0] == b"%d.%d" % (before.attempt, before.sequence + 1)
    assert b"I will look." not in log


async def test_an_image_needs_an_address(server: Server) -> None:
    """An empty image URL is refused with its path, and nothing of the message is kept."""
    thread = await server.client.beta.threads.create()
    content: Any = [{"type": "image_url", "image_url": {"url": ""}}]
    with pytest.raises(openai.BadRequestError) as refused:
        await server.client.beta.threads.messages.create(thread.id, role="user", content=content)
    assert (refused.value.param, refused.value.code) == ("content[0].image_url.url", "string_below_min_length")
    assert (await server.client.beta.threads.messages.list(thread.id)).data == []
