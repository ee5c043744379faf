"""What keeps one run from costing without end, and one caller from spoiling the server for others."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pytest

from afterglow.api import bodies
from afterglow.api.bodies import decode
from afterglow.contracts import START, EngineStatus, ModelInfo, TextDelta, Transaction
from afterglow.errors import ContextOverflow
from afterglow.rows.events import list_segments
from afterglow.testing import calls, ended, says
from tests.conftest import GET_WEATHER, Server

INTERPRETER: Any = {"type": "code_interpreter"}
ASKS_FOR_CODE = ("python", {"code": "1 + 1"})


async def test_a_tool_that_is_off_is_not_offered_for_ever(server: Server) -> None:
    """A model that keeps calling an engine that is off is asked a third time without it; functions stay."""
    server.code.status = EngineStatus("off", reason="The kernel is too old.")
    server.model.will(calls(ASKS_FOR_CODE), calls(ASKS_FOR_CODE), says("Then without."))
    run = await server.run("Compute.", tools=[INTERPRETER, GET_WEATHER])
    assert run.status == "completed"
    offered = [[tool["function"]["name"] for tool in request.tools] for request in server.model.requests]
    assert offered == [["python", "get_weather"], ["python", "get_weather"], ["get_weather"]]


async def test_an_overflow_without_a_number_teaches_one_run_only(server: Server) -> None:
    """The prompt of that run is halved; the window that all runs share stays what it was."""
    server.model.info_of_all = ModelInfo(window_tokens=4000, learned="configuration")
    thread = await server.client.beta.threads.create(
        messages=[{"role": "user", "content": "word " * 400} for _ in range(5)]
    )
    server.model.will([ContextOverflow("too long")], says("Short."))
    run = await server.run("And now?", thread_id=thread.id)
    assert run.status == "completed"
    sizes = [len(request.messages) for request in server.model.requests]
    assert sizes[0] > sizes[1] >= 1
    assert server.model.info_of_all.window_tokens == 4000


async def test_a_prompt_within_its_limit_is_sent_though_it_may_not_fit_the_window(server: Server) -> None:
    """max_prompt_tokens ends a run for what it spends, not for what we think of the model's window."""
    server.model.info_of_all = ModelInfo(window_tokens=1000)
    server.model.will(says("Read."))
    run = await server.run("word " * 3000, max_prompt_tokens=50_000)
    assert run.status == "completed"


async def test_one_call_at_a_time_means_one(server: Server) -> None:
    """With parallel_tool_calls off, a model that makes two calls all the same is taken at its first."""
    server.model.will(calls(("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"})))
    run = await server.run("Weather?", tools=[GET_WEATHER], parallel_tool_calls=False)
    assert run.required_action is not None
    [call] = run.required_action.submit_tool_outputs.tool_calls
    assert call.function.arguments == '{"city":"Oslo"}'


async def test_no_call_means_none(server: Server) -> None:
    """With tool_choice none, a model that calls all the same is taken at its words, here none."""
    server.model.will(calls(("get_weather", {"city": "Oslo"})))
    run = await server.run("Weather?", tools=[GET_WEATHER], tool_choice="none")
    assert run.status == "completed"
    assert server.model.requests[0].tool_choice == "none"
    assert await server.last_text(run.thread_id) == ""


async def test_a_message_deleted_while_it_is_written_leaves_no_text(server: Server) -> None:
    """Neither what was said before the deletion nor after it stays in the run's log; the run itself goes on."""
    gate = asyncio.Event()
    server.model.will([TextDelta("The secret "), gate, TextDelta("word."), ended("stop")])
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": "Tell me."}])
    assistant = await server.assistant()
    run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
    while len(found := (await server.client.beta.threads.messages.list(thread.id)).data) < 2:
        await asyncio.sleep(0.005)
    await server.client.beta.threads.messages.delete(found[0].id, thread_id=thread.id)
    gate.set()
    assert (await server.poll(run)).status == "completed"

    async def stored(tx: Transaction) -> bytes:
        return b"".join(segment.data for segment in await list_segments(tx, "default", run.id, START))

    assert b"secret" not in await server.house.store.read(stored)
    assert b"word." not in await server.house.store.read(stored)


async def test_a_stream_that_the_server_ends_says_so(server: Server) -> None:
    """Stopping the server while a client streams is an error for that client, never a short answer."""
    server.model.will([TextDelta("Half an "), asyncio.Event()])
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": "Go."}])
    assistant = await server.assistant()
    events = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id, stream=True)
    async for event in events:
        if event.event == "thread.message.delta":
            break
    await server.application.end_streams()
    with pytest.raises(openai.APIError, match="The server is stopping"):
        await anext(aiter(events))


@pytest.mark.parametrize("url", ["ftp://example.com/a.png", "nonsense", "file:///etc/passwd", "javascript:1"])
async def test_an_image_comes_over_http_or_as_data(server: Server, url: str) -> None:
    """Other addresses are refused with their path."""
    thread = await server.client.beta.threads.create()
    content: Any = [{"type": "text", "text": "Look."}, {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError) as refused:
        await server.client.beta.threads.messages.create(thread.id, role="user", content=content)
    assert (refused.value.param, refused.value.code) == ("content[1].image_url.url", "invalid_value")


async def test_a_model_without_tools_is_offered_none(server: Server) -> None:
    """What the operator says of a model holds: it answers without tools, and fails clearly when one is demanded."""
    server.model.info_of_all = ModelInfo(window_tokens=8192, tools=False)
    server.model.will(says("In words."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    assert run.status == "completed"
    assert server.model.requests[0].tools == []
    run = await server.run("Weather?", tools=[GET_WEATHER], tool_choice="required")
    assert run.last_error is not None
    assert run.last_error.message == "The model 'gpt-4o' takes no tools, and tool_choice demands one."
    assert len(server.model.requests) == 1


@pytest.mark.slow
async def test_a_large_body_makes_nobody_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a body of many megabytes is looked through, the event loop goes on turning."""
    huge = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(200_000)}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": huge}}
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += decoding.is_set()

    def slow_decode(body: bytes, kind: Any) -> Any:
        decoding.set()
        try:
            return decode(body, kind)
        finally:
            decoding.clear()

    decoding = threading.Event()
    monkeypatch.setattr(bodies, "decode", slow_decode)
    counting = asyncio.create_task(count_turns())
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        await server.assistant(tools=[tool, {"type": "nonsense"}])
    counting.cancel()
    assert turns > 0
