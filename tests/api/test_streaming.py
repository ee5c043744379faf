"""Streams: which events come in which order, what is in them, and that they are the run's log and nothing else."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args

import httpx2
import openai
import pytest
from openai.types.beta import AssistantStreamEvent
from openai.types.beta.threads import Run
from openai.types.beta.threads.runs import RunStep

from afterglow.api.sse import EventStream
from afterglow.contracts import START, EngineStatus, ModelEnd, Position, RefusalDelta, TextDelta, ToolCallDelta
from afterglow.errors import ModelBroke
from afterglow.objects import INCLUDE_FILE_SEARCH_CONTENT
from afterglow.testing import SetClock, calls, ended, says
from tests.api.streams import (
    HEADERS,
    PROJECT,
    Sent,
    answers,
    happened,
    names,
    polled,
    read_events,
    split,
    stored,
    stream,
    streaming,
    submit,
)
from tests.conftest import GET_WEATHER, Server, ServerFactory

WEATHER_IN_OSLO = ("get_weather", {"city": "Oslo"})
HELLO: Any = [{"role": "user", "content": "Hello"}]
PYTHON = {"type": "code_interpreter"}
DONE = b"event: done\ndata: [DONE]\n\n"

BEGIN = ["run.created", "run.queued", "run.in_progress"]
CALLS = ["run.step.created", "run.step.in_progress", "run.step.delta"]
TEXT = ["run.step.created", "run.step.in_progress", "message.created", "message.in_progress", "message.delta"]
ANSWER = [*TEXT, "message.completed", "run.step.completed", "run.completed", "done"]


async def new_thread(server: Server) -> str:
    return (await server.client.beta.threads.create(messages=HELLO)).id


async def run_stream(server: Server, thread_id: str | None = None, **fields: Any) -> bytes:
    """All bytes of a run that is streamed from its creation."""
    thread_id = thread_id or await new_thread(server)
    body = {"assistant_id": (await server.assistant()).id, **fields}
    raw = await stream(server, f"/threads/{thread_id}/runs", body)
    validate(read_events(raw))
    return raw


async def submit_stream(server: Server, run: dict[str, Any], outputs: dict[str, str]) -> bytes:
    """All bytes of what follows the outputs. run: as the stream before it ended."""
    tool_outputs = answers(Run.model_validate(run), outputs)
    path = f"/threads/{run['thread_id']}/runs/{run['id']}/submit_tool_outputs"
    raw = await stream(server, path, {"tool_outputs": tool_outputs})
    validate(read_events(raw))
    return raw


EVENT_TYPES: dict[str, Any] = {
    get_args(kind.model_fields["event"].annotation)[0]: kind for kind in get_args(get_args(AssistantStreamEvent)[0])
}


def validate(events: list[Sent]) -> None:
    """Every event is one the SDK knows, its data has the SDK's shape, and statuses equal the events' names."""
    assert events[-1] == Sent("done", "[DONE]", None)
    for event in events[:-1]:
        EVENT_TYPES[event.name].model_validate({"event": event.name, "data": event.data})
        last = event.name.rpartition(".")[2]
        if event.name not in ("thread.created", "error") and last not in ("created", "delta"):
            assert event.data["status"] == last


def only(events: list[Sent], name: str) -> list[Any]:
    """The data of all events of one name."""
    return [event.data for event in events if event.name == name]


def add_up(events: list[Sent]) -> dict[str, list[dict[str, Any]]]:
    """Messages' content and steps' calls, by id, put together from deltas alone, by the rules of the SDKs."""
    whole: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.name in ("thread.message.created", "thread.run.step.created"):
            assert event.data["id"] not in whole
            whole[event.data["id"]] = []
        elif event.name.endswith(".delta"):
            delta = event.data["delta"]
            assert set(event.data) == {"id", "object", "delta"}
            assert "id" not in delta
            pieces = delta["content"] if "content" in delta else delta["step_details"]["tool_calls"]
            for piece in pieces:
                add(whole[event.data["id"]], dict(piece))
    return whole


def add(parts: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    index = piece.pop("index")
    assert index <= len(parts), "indices are contiguous"
    if index == len(parts):
        parts.append(piece)
    else:
        merge(parts[index], piece)


def merge(old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if key == "type":
            assert old[key] == value
        elif isinstance(value, dict):
            merge(old[key], value)
        else:
            assert isinstance(value, str), f"{key} is sent once"
            old[key] += value


# --- the exact orders ------------------------------------------------------------------------------------------


async def test_a_text_run(start_server: ServerFactory, tmp_path: Path) -> None:
    """(i) A run that answers in words: each object is a snapshot at its moment, each id comes after its data."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will(says("Hel lo !"))
        events = read_events(await run_stream(server))
    assert names(events) == [*BEGIN, *ANSWER]
    created, queued, running = (event.data for event in events[:3])
    assert created == queued
    assert (created["status"], created["started_at"]) == ("queued", None)
    assert running == {**created, "status": "in_progress", "started_at": int(clock.time)}
    step, message = only(events, "thread.run.step.created")[0], only(events, "thread.message.created")[0]
    assert (step["type"], step["status"], step["usage"]) == ("message_creation", "in_progress", None)
    assert step["step_details"] == {"type": "message_creation", "message_creation": {"message_id": message["id"]}}
    assert (message["status"], message["content"], message["role"]) == ("in_progress", [], "assistant")
    assert (message["run_id"], message["assistant_id"]) == (created["id"], created["assistant_id"])
    deltas = only(events, "thread.message.delta")
    assert [delta["delta"]["content"] for delta in deltas] == [
        [{"index": 0, "type": "text", "text": {"value": "Hel", "annotations": []}}],
        [{"index": 0, "type": "text", "text": {"value": " lo"}}],
        [{"index": 0, "type": "text", "text": {"value": " !"}}],
    ]
    [whole], [closed], [done] = (only(events, f"thread.{name}.completed") for name in ("message", "run.step", "run"))
    assert whole["content"] == [{"type": "text", "text": {"value": "Hel lo !", "annotations": []}}]
    assert whole["completed_at"] == int(clock.time)
    assert closed["usage"]["total_tokens"] == done["usage"]["total_tokens"] == 15
    assert (done["expires_at"], done["completed_at"]) == (None, int(clock.time))
    ids = [event.id for event in events[:-1]]
    assert ids == ["0.1", "0.2", *(f"1.{number}" for number in range(1, len(ids) - 1))]


async def test_a_function_call(server: Server) -> None:
    """(ii) A function call ends the stream at requires_action; a step's id, name and output are sent once."""
    server.model.will(calls(WEATHER_IN_OSLO, ("get_weather", {"city": "Bergen"})))
    events = read_events(await run_stream(server, tools=[GET_WEATHER]))
    assert names(events) == [*BEGIN, *CALLS, "run.requires_action", "done"]
    [step] = only(events, "thread.run.step.created")
    assert step["step_details"] == {"type": "tool_calls", "tool_calls": []}
    deltas = only(events, "thread.run.step.delta")
    pieces = [delta["delta"]["step_details"]["tool_calls"] for delta in deltas]
    assert all(len(piece) == 1 for piece in pieces)
    asked = only(events, "thread.run.requires_action")[0]["required_action"]["submit_tool_outputs"]["tool_calls"]
    for index, call in enumerate(asked):
        first, *later = [piece for [piece] in pieces if piece["index"] == index]
        empty = {"name": "get_weather", "arguments": "", "output": None}
        assert first == {"index": index, "id": call["id"], "type": "function", "function": empty}
        assert all(set(piece) == {"index", "type", "function"} for piece in later)
        assert all(set(piece["function"]) == {"arguments"} for piece in later)
    opened = only(events, "thread.run.requires_action")[0]
    assert opened["usage"] is None
    assert opened["required_action"]["type"] == "submit_tool_outputs"


async def test_submit_goes_on_in_a_new_stream(server: Server) -> None:
    """After outputs: the old step completed, then queued and in_progress, and on as before; no run.created again."""
    server.model.will(calls(WEATHER_IN_OSLO), calls(WEATHER_IN_OSLO), says("Rain, rain."))
    first = read_events(await run_stream(server, tools=[GET_WEATHER]))
    run = first[-2].data
    second = read_events(await submit_stream(server, run, {"get_weather": "rain"}))
    goes_on = ["run.step.completed", "run.queued", "run.in_progress"]
    assert names(second) == [*goes_on, *CALLS, "run.requires_action", "done"]
    [old] = only(second, "thread.run.step.completed")
    assert old["id"] == only(first, "thread.run.step.created")[0]["id"]
    assert old["step_details"]["tool_calls"][0]["function"]["output"] == "rain"
    assert old["usage"]["total_tokens"] == 15
    assert second[1].data["required_action"] is None
    third = read_events(await submit_stream(server, second[-2].data, {"get_weather": "more rain"}))
    assert names(third) == [*goes_on, *ANSWER]
    positions = [tuple(map(int, event.id.split("."))) for event in first + second + third if event.id]
    assert positions == sorted(set(positions))


async def test_text_before_calls(server: Server) -> None:
    """Words before a call are a message of their own, whose step ends before that of the calls begins."""
    server.model.will([TextDelta("Let me look."), *calls(WEATHER_IN_OSLO)])
    events = read_events(await run_stream(server, tools=[GET_WEATHER]))
    assert names(events) == [
        *BEGIN,
        *TEXT,
        "message.completed",
        "run.step.completed",
        *CALLS,
        "run.requires_action",
        "done",
    ]


async def test_a_server_side_tool_that_is_off(server: Server) -> None:
    """The step shows code and reason, fails, and the next one follows."""
    server.code.status = EngineStatus("off", reason="The kernel is too old.")
    server.model.will(calls(("python", {"code": "print(1)"})), says("I could not."))
    events = read_events(await run_stream(server, tools=[PYTHON]))
    assert names(events) == [*BEGIN, *CALLS, "run.step.failed", *ANSWER]
    pieces = [delta["delta"]["step_details"]["tool_calls"][0] for delta in only(events, "thread.run.step.delta")]
    assert {(piece["index"], piece["type"]) for piece in pieces} == {(0, "code_interpreter")}
    assert pieces[0]["code_interpreter"] == {"input": "", "outputs": []}
    assert "".join(piece["code_interpreter"].get("input", "") for piece in pieces) == "print(1)"
    assert pieces[-1]["code_interpreter"]["outputs"] == [{"index": 0, "type": "logs", "logs": "The kernel is too old."}]
    [failed] = only(events, "thread.run.step.failed")
    assert failed["last_error"]["code"] == "server_error"


async def test_a_run_that_fails(server: Server) -> None:
    """(v) failed: what was open is closed first; before the first token nothing was."""
    error = ModelBroke("It broke.")
    server.model.will([TextDelta("Well"), error], [error])
    events = read_events(await run_stream(server))
    assert names(events) == [*BEGIN, *TEXT, "message.incomplete", "run.step.failed", "run.failed", "done"]
    [message] = only(events, "thread.message.incomplete")
    assert message["incomplete_details"] == {"reason": "run_failed"}
    assert message["content"][0]["text"]["value"] == "Well"
    assert only(events, "thread.run.failed")[0]["last_error"]["message"] == str(error)
    assert names(read_events(await run_stream(server))) == [*BEGIN, "run.failed", "done"]


async def test_a_run_that_is_incomplete(server: Server) -> None:
    """(v) incomplete: the message says so, its step is completed. Without any room there is neither."""
    server.model.will([TextDelta("Once"), ended("length")])
    events = read_events(await run_stream(server))
    assert names(events) == [*BEGIN, *TEXT, "message.incomplete", "run.step.completed", "run.incomplete", "done"]
    assert only(events, "thread.message.incomplete")[0]["incomplete_details"] == {"reason": "max_tokens"}
    long: Any = [{"role": "user", "content": "word " * 1000}]
    events = read_events(await run_stream(server, additional_messages=long, max_prompt_tokens=256))
    assert names(events) == [*BEGIN, "run.incomplete", "done"]


async def test_a_run_that_is_cancelled(server: Server) -> None:
    """(v) cancelled: cancelling comes before what it closes; in the middle of text, of calls, and of silence."""
    for script, opened, closed in (
        ([TextDelta("Once")], TEXT, ["message.incomplete", "run.step.cancelled"]),
        ([ToolCallDelta(0, "call_1", "get_weather")], CALLS, ["run.step.cancelled"]),
        ([], [], []),
    ):
        server.model.will([*script, asyncio.Event()])
        thread_id = await new_thread(server)
        task = asyncio.create_task(run_stream(server, thread_id, tools=[GET_WEATHER]))
        run = await only_run(server, thread_id)
        await happened(server, run.id, f"thread.{[*BEGIN, *opened][-1]}")
        await server.client.beta.threads.runs.cancel(run.id, thread_id=thread_id)
        events = read_events(await task)
        assert names(events) == [*BEGIN, *opened, "run.cancelling", *closed, "run.cancelled", "done"]
        for message in only(events, "thread.message.incomplete"):
            assert message["incomplete_details"] == {"reason": "run_cancelled"}


async def only_run(server: Server, thread_id: str) -> Run:
    """The thread's run, once it is there."""
    async with asyncio.timeout(10):
        while not (runs := (await server.client.beta.threads.runs.list(thread_id)).data):
            await asyncio.sleep(0.005)
    return runs[0]


async def test_a_run_that_expires(start_server: ServerFactory, tmp_path: Path) -> None:
    """(v) expired: message, step and run, in that order."""
    async with start_server(tmp_path, run_expires_s=1) as server:
        server.model.will([TextDelta("Once"), asyncio.Event()])
        events = read_events(await run_stream(server))
        assert names(events) == [*BEGIN, *TEXT, "message.incomplete", "run.step.expired", "run.expired", "done"]
        assert only(events, "thread.message.incomplete")[0]["incomplete_details"] == {"reason": "run_expired"}


async def test_create_and_run(server: Server) -> None:
    """(vi) The thread comes first, without an id: it is no part of the run's log."""
    server.model.will(says("Hi."))
    body = {"assistant_id": (await server.assistant()).id, "thread": {"messages": HELLO, "metadata": {"a": "1"}}}
    events = read_events(await stream(server, "/threads/runs", body))
    validate(events)
    assert names(events) == ["created", *BEGIN, *ANSWER]
    thread, run = events[0], events[1]
    assert (thread.name, thread.id, thread.data["object"]) == ("thread.created", None, "thread")
    assert thread.data["metadata"] == {"a": "1"}
    assert run.data["thread_id"] == thread.data["id"]


async def test_only_a_silent_model_is_waited_for(server: Server) -> None:
    """A follower hears that the run is in progress before the model has said anything."""
    hold = asyncio.Event()
    server.model.will([hold, *says("Hi.")])
    body = {"assistant_id": (await server.assistant()).id}
    async with streaming(server, f"/threads/{await new_thread(server)}/runs", body) as response:
        raw = b""
        async for piece in response.aiter_raw():
            raw += piece
            if b"event: thread.run.in_progress\n" in raw:
                hold.set()
    assert names(read_events(raw)) == [*BEGIN, *ANSWER]


# --- deltas ----------------------------------------------------------------------------------------------------

SCRIPTS: list[list[Any]] = [
    says('It rains 雨 in Ålesund 🌧️, "always" \n\n and \\ever.'),
    [TextDelta(""), TextDelta("late"), ended("stop")],
    [TextDelta("a\u2028b\u2029c\x85d\re\r\nf"), TextDelta("\t{}"), ended("stop")],
    [ended("stop")],
    [RefusalDelta("I can"), RefusalDelta("not."), ended("stop")],
    [TextDelta("Hm. "), RefusalDelta("I can"), RefusalDelta("not."), ended("stop")],
    [RefusalDelta("No"), TextDelta("but "), RefusalDelta(", never,"), TextDelta("yes"), ended("stop")],
    [TextDelta("Onc"), ended("length")],
    [TextDelta("Onc"), ended("content_filter")],
    calls(WEATHER_IN_OSLO, ("get_weather", {"city": "Tromsø"}), ("get_weather", {})),
    [
        ToolCallDelta(0, "call_a", "get_weather", '{"a":'),
        ToolCallDelta(1, "call_b", "get_weather", "{"),
        ToolCallDelta(0, arguments="1}"),
        ToolCallDelta(1, arguments="}"),
        ended("tool_calls"),
    ],
    [TextDelta("Let me see."), *calls(WEATHER_IN_OSLO)],
    [*calls(WEATHER_IN_OSLO)[:-1], TextDelta("dropped"), RefusalDelta("too"), ended("tool_calls")],
]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "all at once"])
async def test_deltas_add_up(server: Server, monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    """By the SDKs' rules the deltas of every message and step add up to exactly what it holds in the end, however
    they arrive from the model; one step is open at a time, and each ends once."""
    if together:
        monkeypatch.setattr(server.model, "stream", all_at_once(server))
    for script in SCRIPTS:
        server.model.will(list(script))
        events = read_events(await run_stream(server, tools=[GET_WEATHER]))
        whole = add_up(events)
        messages = await server.client.beta.threads.messages.list(events[0].data["thread_id"], limit=1)
        steps = await server.client.beta.threads.runs.steps.list(
            events[0].data["id"], thread_id=events[0].data["thread_id"]
        )
        finals = {
            message["id"]: message["content"]
            for name in ("completed", "incomplete")
            for message in only(events, f"thread.message.{name}")
        }
        for step in steps.data:
            details = step.to_dict()["step_details"]
            if step.type == "tool_calls":
                finals[step.id] = details["tool_calls"]  # type: ignore[index]
            else:
                assert whole.pop(step.id) == []
        assert whole == finals
        if finals and messages.data[0].role == "assistant":
            assert messages.data[0].to_dict()["content"] == finals[messages.data[0].id]
        one_at_a_time(events)


def all_at_once(server: Server) -> Any:
    """A model stream that gives the whole script in one list."""

    async def give(request: Any) -> Any:
        yield server.model.scripts.pop(0)

    return give


def one_at_a_time(events: list[Sent]) -> None:
    for kind in ("thread.run.step", "thread.message"):
        open_id, seen = None, set()
        for event in events:
            before, _, what = event.name.rpartition(".")
            if before != kind:
                continue
            if what == "created":
                assert open_id is None
                assert event.data["id"] not in seen
                open_id = event.data["id"]
                seen.add(open_id)
            assert event.data["id"] == open_id
            if what in ("completed", "incomplete", "failed", "cancelled", "expired"):
                open_id = None


# --- the stream and the log ------------------------------------------------------------------------------------


async def test_streams_equal_what_is_stored(server: Server) -> None:
    """What was sent live, without framing, is byte for byte what is stored, whatever the run's course."""
    for script in (
        says("Hi there."),
        [ModelBroke("no")],
        [TextDelta("Onc"), ModelBroke("no")],
        [TextDelta("Onc"), ended("length")],
        [ended("stop")],
        [RefusalDelta("No."), ended("stop")],
        [TextDelta("I was about to")],
    ):
        server.model.will(script)  # type: ignore[arg-type]
        raw = await run_stream(server)
        assert raw.endswith(DONE)
        assert raw.removesuffix(DONE) == await stored(server, read_events(raw)[0].data["id"])


async def test_streams_of_several_rounds_equal_what_is_stored(server: Server) -> None:
    """The streams of a run's rounds, one after the other, are its whole log."""
    server.model.will(calls(WEATHER_IN_OSLO), [TextDelta("Hm."), *calls(WEATHER_IN_OSLO)], says("Rain."))
    raw = await run_stream(server, tools=[GET_WEATHER])
    whole = raw.removesuffix(DONE)
    for _ in range(2):
        raw = await submit_stream(server, read_events(raw)[-2].data, {"get_weather": "rain"})
        whole += raw.removesuffix(DONE)
    assert read_events(raw)[-2].name == "thread.run.completed"
    assert whole == await stored(server, read_events(raw)[1].data["id"])


async def test_streams_equal_the_log_when_it_is_written_piece_by_piece(
    start_server: ServerFactory, tmp_path: Path
) -> None:
    """Batches of text that are written in between change nothing about it."""
    async with start_server(tmp_path, event_flush_ms=1) as server:
        server.model.will([item for word in says("word " * 50) for item in (word, FEW_MS)])  # type: ignore[misc]
        server.model.stream = with_pauses(server)  # type: ignore[method-assign]
        raw = await run_stream(server)
        run_id = read_events(raw)[0].data["id"]
        assert raw.removesuffix(DONE) == await stored(server, run_id)
        rows = await server.house.store.read(
            lambda tx: tx.fetch("SELECT COUNT(*) FROM events WHERE run_id = $1", run_id)
        )
        assert rows[0][0] > 4


FEW_MS = 0.002


def with_pauses(server: Server) -> Any:
    """A model stream that pauses at each number of its script."""

    async def give(request: Any) -> Any:
        for item in server.model.scripts.pop(0):
            if isinstance(item, float):
                await asyncio.sleep(item)
            else:
                yield [item]

    return give


async def test_what_was_streamed_survives_a_restart(start_server: ServerFactory, tmp_path: Path) -> None:
    """A new server replays the same bytes."""
    async with start_server(tmp_path) as server:
        server.model.will(says("Hi there."))
        raw = await run_stream(server)
    async with start_server(tmp_path) as server:
        assert raw.removesuffix(DONE) == await stored(server, read_events(raw)[0].data["id"])


async def follow(server: Server, run_id: str, after: Position = START) -> bytes:
    """What a follower of the run gets up to its end."""
    raw = b""
    async with asyncio.timeout(10), aclosing(server.house.events.follow(PROJECT, run_id, after)) as batches:
        async for batch in batches:
            raw += b"".join([segment.data for segment in batch])
            if any(segment.stop == "end" for segment in batch):
                break
    return raw


async def test_followers_see_the_same(server: Server) -> None:
    """Whoever follows, from the start, from the middle or after the end, gets the same bytes from there on."""
    hold = asyncio.Event()
    server.model.will([TextDelta("Once "), TextDelta("upon "), hold, TextDelta("a time."), ended("stop")])
    thread_id = await new_thread(server)
    live = asyncio.create_task(run_stream(server, thread_id))
    run = await only_run(server, thread_id)
    early = asyncio.create_task(follow(server, run.id))
    await happened(server, run.id, "thread.message.delta", 2)
    late = [asyncio.create_task(follow(server, run.id)) for _ in range(3)]
    await asyncio.sleep(0)
    hold.set()
    raw = (await live).removesuffix(DONE)
    assert await asyncio.gather(early, *late, follow(server, run.id)) == [raw] * 5
    blocks = split(raw)
    for number, event in enumerate(read_events(raw)[:-1], 1):
        assert event.id is not None
        attempt, sequence = map(int, event.id.split("."))
        assert await follow(server, run.id, Position(attempt, sequence)) == b"".join(blocks[number:])


async def test_a_client_that_leaves_changes_nothing(server: Server) -> None:
    """Closing the stream does not stop the run; it can be polled to its end, and its log is whole."""
    hold = asyncio.Event()
    server.model.will([TextDelta("Once "), hold, TextDelta("more."), ended("stop")])
    thread_id = await new_thread(server)
    body = {"assistant_id": (await server.assistant()).id}
    async with streaming(server, f"/threads/{thread_id}/runs", body) as response:
        raw = b""
        async for piece in response.aiter_raw():
            raw += piece
            if b"event: thread.message.delta\n" in raw:
                break
    run = await only_run(server, thread_id)
    assert run.status == "in_progress"
    with pytest.raises(openai.BadRequestError):
        await server.client.beta.threads.messages.create(thread_id, role="user", content="And?")
    hold.set()
    assert (await polled(server, run)).status == "completed"
    assert server.model.closed == 0
    assert await server.last_text(thread_id) == "Once more."
    whole = await stored(server, run.id)
    assert whole.startswith(raw)
    assert names(read_events(whole + DONE)) == [*BEGIN, *ANSWER]


async def test_many_clients_that_leave(server: Server) -> None:
    """Streams that are dropped at every moment leave no follower and no feed behind."""
    server.model.will(*[says("one two three four five six seven eight") for _ in range(10)])
    body = {"assistant_id": (await server.assistant()).id, "thread": {"messages": HELLO}}
    for number in range(10):
        async with streaming(server, "/threads/runs", body) as response:
            pieces = response.aiter_raw()
            for _ in range(number % 4):
                await anext(pieces, b"")
    async with asyncio.timeout(10):
        while server.application.worker.running or server.house.events._feeds:  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)


async def test_a_slow_reader_gets_no_more_than_its_stream(server: Server) -> None:
    """A stream ends with the first stop after its start, also when the run has gone on by the time it is written."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    run = await server.client.beta.threads.runs.create(
        await new_thread(server), assistant_id=(await server.assistant()).id, tools=[GET_WEATHER]
    )
    room, begun, sent = asyncio.Event(), asyncio.Event(), []

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body"):
            begun.set()
            await room.wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    response = EventStream(server.house, PROJECT, run.id, START)
    task = asyncio.create_task(response({}, receive, send))
    await begun.wait()
    run = await submit(server, await polled(server, run), {"get_weather": "rain"})
    assert run.status == "completed"
    room.set()
    await task
    raw = b"".join([message.get("body", b"") for message in sent])
    assert names(read_events(raw)) == [*BEGIN, *CALLS, "run.requires_action", "done"]


# --- errors and refusals ---------------------------------------------------------------------------------------


async def test_the_error_event(server: Server) -> None:
    """When the thread is deleted under a stream, an `error` event tells it, flat and nested, and the stream ends."""
    server.model.will([TextDelta("Once"), asyncio.Event()])
    thread_id = await new_thread(server)
    task = asyncio.create_task(stream(server, f"/threads/{thread_id}/runs", {"assistant_id": await asst(server)}))
    run = await only_run(server, thread_id)
    await happened(server, run.id, "thread.message.delta")
    await server.client.beta.threads.delete(thread_id)
    events = read_events(await task)
    error = next(event for event in events if event.name == "error")
    assert error.id is None
    four = {"message": "The thread of this run was deleted.", "type": "server_error", "param": None, "code": None}
    assert error.data == {**four, "error": four}
    assert events.index(error) >= len(events) - 2


async def asst(server: Server) -> str:
    return (await server.assistant()).id


async def test_the_sdk_raises_the_error_event(server: Server) -> None:
    """The official client raises it as APIError."""
    server.model.will([TextDelta("Once"), asyncio.Event()])
    thread_id = await new_thread(server)
    events = await server.client.beta.threads.runs.create(thread_id, assistant_id=await asst(server), stream=True)
    async for event in events:
        if event.event == "thread.message.delta":
            break
    await server.client.beta.threads.delete(thread_id)
    with pytest.raises(openai.APIError, match="The thread of this run was deleted"):
        [event async for event in events]


async def test_what_is_refused_is_no_stream(server: Server) -> None:
    """What can be told before the first byte is an ordinary answer, also when a stream was asked for."""
    thread_id = await new_thread(server)
    assistant_id = await asst(server)
    async with httpx2.AsyncClient(headers=HEADERS, verify=False) as client:
        for path, body, status in (
            (f"/threads/{thread_id}/runs", {"assistant_id": "asst_missing"}, 404),
            ("/threads/thread_missing/runs", {"assistant_id": assistant_id}, 404),
            (f"/threads/{thread_id}/runs", {}, 400),
            (f"/threads/{thread_id}/runs?include[]=everything", {"assistant_id": assistant_id}, 400),
            (f"/threads/{thread_id}/runs/run_missing/submit_tool_outputs", {"tool_outputs": []}, 404),
        ):
            response = await client.post(f"{server.url}/v1{path}", json={**body, "stream": True})
            assert response.status_code == status
            assert response.headers["content-type"] == "application/json"
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert (await server.client.beta.threads.runs.list(thread_id)).data == []


async def test_include(server: Server) -> None:
    """The one legal value of `include[]` is taken by runs and steps, any other is refused by name."""
    threads = server.client.beta.threads
    server.model.will(says("Hi."), says("Hi."))
    thread_id, assistant_id = await new_thread(server), await asst(server)
    include: Any = [INCLUDE_FILE_SEARCH_CONTENT]
    run = await threads.runs.create_and_poll(
        thread_id=thread_id, assistant_id=assistant_id, include=include, poll_interval_ms=5
    )
    [step] = (await threads.runs.steps.list(run.id, thread_id=thread_id, include=include)).data
    assert (
        await threads.runs.steps.retrieve(step.id, thread_id=thread_id, run_id=run.id, include=include)
    ).id == step.id
    async with threads.runs.stream(thread_id=thread_id, assistant_id=assistant_id, include=include) as events:
        await events.until_done()
    include = ["step_details.everything"]
    for request in (
        threads.runs.create(thread_id, assistant_id=assistant_id, include=include),
        threads.runs.steps.list(run.id, thread_id=thread_id, include=include),
        threads.runs.steps.retrieve(step.id, thread_id=thread_id, run_id=run.id, include=include),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await request
        body: Any = refused.value.body
        assert body["code"] == "invalid_value"
        assert "'step_details.everything'" in body["message"]
        assert INCLUDE_FILE_SEARCH_CONTENT in body["message"]


# --- keep-alives -----------------------------------------------------------------------------------------------

PING = b": ping\n"


async def test_pings_fill_silence(start_server: ServerFactory, tmp_path: Path) -> None:
    """While the model is silent the stream carries `: ping` with a single newline; nothing of it is stored."""
    async with start_server(tmp_path, keep_alive_s=0.01) as server:
        words = [TextDelta("Once "), TextDelta("upon "), TextDelta("a time.")]
        holds = [asyncio.Event() for _ in range(4)]
        script: list[Any] = [item for pair in zip(holds, [*words, ended("stop")], strict=True) for item in pair]
        server.model.will(script)
        raw = b""
        async with streaming(
            server, f"/threads/{await new_thread(server)}/runs", {"assistant_id": await asst(server)}
        ) as response:
            async for piece in response.aiter_raw():
                raw += piece
                # After two pings in a row, the model says one thing more.
                if raw.endswith(PING + PING) and len(server.model.requests) == 1:
                    next((hold for hold in holds if not hold.is_set()), asyncio.Event()).set()
        assert all(hold.is_set() for hold in holds)
        assert raw.count(PING) >= 8
        assert PING + b"\n" not in raw
        events = read_events(raw.replace(PING, b""))
        assert names(events) == [*BEGIN, *ANSWER]
        assert raw.replace(PING, b"").removesuffix(DONE) == await stored(server, events[0].data["id"])


async def test_the_client_parses_pings_as_they_come(start_server: ServerFactory, tmp_path: Path) -> None:
    """The official client, async and sync, reads a live stream with pings in it."""
    async with start_server(tmp_path, keep_alive_s=0.001) as server:
        script: list[Any] = [item for word in says("Once upon a time.") for item in (FEW_MS * 10, word)]
        server.model.stream = with_pauses(server)  # type: ignore[method-assign]
        server.model.will(list(script), list(script))
        assistant_id = await asst(server)
        async with server.client.beta.threads.create_and_run_stream(
            assistant_id=assistant_id, thread={"messages": HELLO}
        ) as events:
            assert "".join([text async for text in events.text_deltas]) == "Once upon a time."

        def read() -> str:
            with (
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="test-key") as client,
                client.beta.threads.create_and_run_stream(
                    assistant_id=assistant_id, thread={"messages": HELLO}
                ) as stream,
            ):
                return "".join(stream.text_deltas)

        assert await asyncio.to_thread(read) == "Once upon a time."


async def test_the_client_parses_pings_between_any_two_events(server: Server) -> None:
    """One ping, or two, between any two events, before the first and after the last: the client reads the same."""
    server.model.will(calls(WEATHER_IN_OSLO), says("It is raining."))
    body = {"assistant_id": await asst(server), "thread": {"messages": HELLO}, "tools": [GET_WEATHER]}
    first = await stream(server, "/threads/runs", body)
    second = await submit_stream(server, read_events(first)[-2].data, {"get_weather": "rain"})
    for raw in (first, second):
        events = read_events(raw)
        pinged = PING + b"".join([block + PING * (1 + number % 2) for number, block in enumerate(split(raw))])
        assert await parsed_async(raw) == await parsed_async(pinged) == parsed(pinged)
        assert await parsed_async(pinged) == [(event.name, event.data) for event in events[:-1]]
        # In the smallest pieces that a network can make of it.
        assert await parsed_async(pinged, 1) == await parsed_async(raw)


def answering(raw: bytes, size: int) -> Any:
    """A transport that answers everything with this stream, cut in pieces."""
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)] if size else [raw]

    async def give() -> Any:
        for piece in pieces:
            yield piece

    def answer(request: httpx2.Request) -> httpx2.Response:
        content = give() if size else raw
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    return httpx2.MockTransport(answer)


async def parsed_async(raw: bytes, size: int = 0) -> list[tuple[str, Any]]:
    http = httpx2.AsyncClient(transport=answering(raw, size), verify=False)
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="k", http_client=http) as client:
        events = await client.beta.threads.runs.create("thread_1", assistant_id="asst_1", stream=True)
        return [(event.event, as_sent(event.data)) async for event in events]


def parsed(raw: bytes) -> list[tuple[str, Any]]:
    http = httpx2.Client(transport=answering(raw, 0), verify=False)
    with openai.OpenAI(base_url="http://test/v1", api_key="k", http_client=http) as client:
        events = client.beta.threads.runs.create("thread_1", assistant_id="asst_1", stream=True)
        return [(event.event, as_sent(event.data)) for event in events]


def as_sent(data: Any) -> Any:
    return json.loads(data.to_json(exclude_unset=True))


# --- as clients use it -----------------------------------------------------------------------------------------


class Weatherman(openai.AsyncAssistantEventHandler):
    """Answers requires_action from within the stream that told it, as the guides show."""

    def __init__(self, client: openai.AsyncOpenAI, log: list[str]) -> None:
        super().__init__()
        self.client = client
        self.log = log

    async def on_event(self, event: AssistantStreamEvent) -> None:
        self.log.append(event.event)
        if event.event == "thread.run.requires_action":
            outputs = answers(event.data, {"get_weather": f"rain {self.log.count(event.event)}"})
            async with self.client.beta.threads.runs.submit_tool_outputs_stream(
                thread_id=event.data.thread_id,
                run_id=event.data.id,
                tool_outputs=outputs,
                event_handler=Weatherman(self.client, self.log),
            ) as events:
                await events.until_done()


async def test_outputs_from_within_the_stream(server: Server) -> None:
    """A handler may submit as soon as it hears of requires_action, before its own stream is read to the end, and
    so on for each round."""
    rounds = 3
    server.model.will(*[calls(WEATHER_IN_OSLO) for _ in range(rounds)], says("Enough rain."))
    log: list[str] = []
    async with server.client.beta.threads.runs.stream(
        thread_id=await new_thread(server),
        assistant_id=await asst(server),
        tools=[GET_WEATHER],  # type: ignore[list-item]
        event_handler=Weatherman(server.client, log),
    ) as events:
        await events.until_done()
    assert log.count("thread.run.requires_action") == rounds
    assert log[-1] == "thread.run.completed"
    outputs = [said["content"] for said in server.model.requests[-1].messages if said["role"] == "tool"]
    assert outputs == ["rain 1", "rain 2", "rain 3"]


async def test_requires_action_can_be_acted_on_at_once(server: Server) -> None:
    """Whatever an event says can be read by whoever heard it: the run waits, its step is there, outputs are taken."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    threads, thread_id = server.client.beta.threads, await new_thread(server)
    events = await threads.runs.create(
        thread_id,
        assistant_id=await asst(server),
        tools=[GET_WEATHER],  # type: ignore[list-item]
        stream=True,
    )
    async for event in events:
        if event.event.startswith("thread.run.step.") and isinstance(event.data, RunStep):
            seen = await threads.runs.steps.retrieve(event.data.id, thread_id=thread_id, run_id=event.data.run_id)
            assert seen.id == event.data.id
        if isinstance(event.data, Run) and event.event not in ("thread.run.created", "thread.run.queued"):
            read = await threads.runs.retrieve(event.data.id, thread_id=thread_id)
            assert read.status in (event.data.status, "requires_action")
            if event.event == "thread.run.requires_action":
                assert read == event.data
                assert (await submit(server, read, {"get_weather": "rain"})).status == "completed"


def test_every_script_ends() -> None:
    """The scripts above are whole answers."""
    assert all(isinstance(script[-1], ModelEnd) for script in SCRIPTS)
