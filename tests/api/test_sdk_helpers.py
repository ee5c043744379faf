"""The official client's own helpers, sync and async, doing what their documentation shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import openai
import pytest
from openai.types.beta import AssistantStreamEvent
from openai.types.beta.threads import Run
from openai.types.beta.threads.runs import RunStep

from afterglow.contracts import ModelEnd, TextDelta
from afterglow.testing import calls, ended, says
from tests.api.streams import answers
from tests.conftest import GET_WEATHER, Server

T = TypeVar("T")
WEATHER_IN_OSLO = ("get_weather", {"city": "Oslo"})
TOOLS: Any = [GET_WEATHER]
HELLO: Any = {"messages": [{"role": "user", "content": "Weather?"}]}
RAIN = {"get_weather": "rain"}


async def in_a_thread(server: Server, act: Callable[[openai.OpenAI], T]) -> T:
    """What `act` does with a sync client, while the server runs here."""

    def work() -> T:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="test-key", max_retries=0) as client:
            return act(client)

    return await asyncio.to_thread(work)


# --- polling ---------------------------------------------------------------------------------------------------


async def test_polling_helpers(server: Server) -> None:
    """create_and_poll stops at requires_action, submit_tool_outputs_and_poll at the end."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    runs = server.client.beta.threads.runs
    thread = await server.client.beta.threads.create(**HELLO)
    assistant = await server.assistant()
    run = await runs.create_and_poll(thread_id=thread.id, assistant_id=assistant.id, tools=TOOLS)
    assert run.status == "requires_action"
    run = await runs.submit_tool_outputs_and_poll(
        run_id=run.id, thread_id=thread.id, tool_outputs=answers(run, RAIN), poll_interval_ms=5
    )
    assert run.status == "completed"
    assert await server.last_text(thread.id) == "Rain."


async def test_polling_helpers_of_the_sync_client(server: Server) -> None:
    """create_and_run_poll and submit_tool_outputs_and_poll, then the newest message first, as everybody reads it."""
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."))
    assistant = await server.assistant()

    def act(client: openai.OpenAI) -> str:
        threads = client.beta.threads
        run = threads.create_and_run_poll(assistant_id=assistant.id, thread=HELLO, tools=TOOLS, poll_interval_ms=5)
        assert run.status == "requires_action"
        run = threads.runs.submit_tool_outputs_and_poll(
            run_id=run.id, thread_id=run.thread_id, tool_outputs=answers(run, RAIN), poll_interval_ms=5
        )
        assert run.status == "completed"
        content = threads.messages.list(run.thread_id).data[0].content[0]
        assert content.type == "text"
        return content.text.value

    assert await in_a_thread(server, act) == "Rain."


async def test_poll_tells_how_long_to_wait(server: Server) -> None:
    """Every GET of a run carries openai-poll-after-ms, a whole number; other answers do not."""
    server.model.will(says("Hi."))
    run = await server.run("Hello")
    runs = server.client.beta.threads.runs
    polled = await runs.with_raw_response.retrieve(run.id, thread_id=run.thread_id)
    assert int(polled.headers["openai-poll-after-ms"]) == server.house.settings.poll_after_ms
    listed = await runs.with_raw_response.list(run.thread_id)
    assert "openai-poll-after-ms" not in listed.headers


# --- streaming -------------------------------------------------------------------------------------------------


class Heard:
    """What a handler was called with: in words, deltas in a row once; and the text and arguments that came."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.text = ""
        self.arguments = ""
        self.done_text: list[str] = []

    def note(self, callback: str, *given: Any) -> None:
        what = callback.removeprefix("on_")
        if what == "text_delta":
            self.text += given[0].value
        elif what == "text_done":
            self.done_text.append(given[0].value)
        elif what == "tool_call_delta":
            self.arguments = given[1].function.arguments
        if self.calls[-1:] != [what] or not what.endswith("delta"):
            self.calls.append(what)


CALLBACKS = [
    name
    for name in vars(openai.AssistantEventHandler)
    if name.startswith("on_") and name not in ("on_event", "on_message_delta", "on_run_step_delta")
]


def handler(heard: Heard) -> openai.AssistantEventHandler:
    """A handler that notes every callback."""
    noting = {name: lambda self, *given, name=name: heard.note(name, *given) for name in CALLBACKS}
    made: openai.AssistantEventHandler = type("Handler", (openai.AssistantEventHandler,), noting)()
    return made


def async_handler(heard: Heard) -> openai.AsyncAssistantEventHandler:
    def noting(name: str) -> Any:
        async def note(self: Any, *given: Any) -> None:
            heard.note(name, *given)

        return note

    callbacks = {name: noting(name) for name in CALLBACKS}
    made: openai.AsyncAssistantEventHandler = type("Handler", (openai.AsyncAssistantEventHandler,), callbacks)()
    return made


HEARD_TEXT = [
    "run_step_created",
    "message_created",
    "text_created",
    "text_delta",
    "text_done",
    "message_done",
    "run_step_done",
    "end",
]
HEARD_CALL = ["run_step_created", "tool_call_created", "tool_call_delta", "tool_call_done", "end"]


def check_steps(steps: list[RunStep], stored: list[RunStep]) -> None:
    """What the helper put together from the stream names the same steps and calls as were stored."""
    assert [step.id for step in steps] == [step.id for step in stored]
    assert [step.type for step in steps] == [step.type for step in stored]
    for step, kept in zip(steps, stored, strict=True):
        if step.step_details.type == "tool_calls":
            assert kept.step_details.type == "tool_calls"
            [call], [same] = step.step_details.tool_calls, kept.step_details.tool_calls
            assert call.type == same.type == "function"
            assert (call.id, call.function.name, call.function.arguments) == (
                same.id,
                same.function.name,
                same.function.arguments,
            )


async def test_stream_helpers(server: Server) -> None:
    """stream() and submit_tool_outputs_stream() with an async handler: each callback once, in order, and the final
    run, steps and messages as they are stored."""
    server.model.will(calls(WEATHER_IN_OSLO), says("It is raining."))
    threads = server.client.beta.threads
    thread = await threads.create(**HELLO)
    assistant = await server.assistant()
    heard = Heard()
    async with threads.runs.stream(
        thread_id=thread.id, assistant_id=assistant.id, tools=TOOLS, event_handler=async_handler(heard)
    ) as events:
        run = await events.get_final_run()
        steps = await events.get_final_run_steps()
    assert heard.calls == HEARD_CALL
    assert heard.arguments == '{"city":"Oslo"}'
    assert run == await threads.runs.retrieve(run.id, thread_id=thread.id)
    check_steps(steps, (await threads.runs.steps.list(run.id, thread_id=thread.id)).data)

    heard = Heard()
    async with threads.runs.submit_tool_outputs_stream(
        thread_id=thread.id, run_id=run.id, tool_outputs=answers(run, RAIN), event_handler=async_handler(heard)
    ) as events:
        run = await events.get_final_run()
        messages = await events.get_final_messages()
    assert heard.calls == ["run_step_done", *HEARD_TEXT]
    assert heard.text == "It is raining."
    assert heard.done_text == ["It is raining."]
    assert run == await threads.runs.retrieve(run.id, thread_id=thread.id)
    assert run.status == "completed"
    assert messages == (await threads.messages.list(thread.id, limit=1)).data


async def test_stream_helpers_of_the_sync_client(server: Server) -> None:
    """The same with the sync client: create_and_run_stream, then submit_tool_outputs_stream."""
    server.model.will(calls(WEATHER_IN_OSLO), says("It is raining."))
    assistant = await server.assistant()

    def act(client: openai.OpenAI) -> None:
        threads = client.beta.threads
        heard = Heard()
        with threads.create_and_run_stream(
            assistant_id=assistant.id, thread=HELLO, tools=TOOLS, event_handler=handler(heard)
        ) as events:
            run = events.get_final_run()
            steps = events.get_final_run_steps()
        assert heard.calls == HEARD_CALL
        assert run.status == "requires_action"
        check_steps(steps, threads.runs.steps.list(run.id, thread_id=run.thread_id).data)
        heard = Heard()
        with threads.runs.submit_tool_outputs_stream(
            thread_id=run.thread_id, run_id=run.id, tool_outputs=answers(run, RAIN), event_handler=handler(heard)
        ) as events:
            assert "".join(events.text_deltas) == "It is raining."
            run = events.get_final_run()
            messages = events.get_final_messages()
        assert heard.calls == ["run_step_done", *HEARD_TEXT]
        assert run == threads.runs.retrieve(run.id, thread_id=run.thread_id)
        assert messages == threads.messages.list(run.thread_id, limit=1).data

    await in_a_thread(server, act)


async def test_streams_without_a_helper(server: Server) -> None:
    """`stream=True` on create, create_and_run and submit_tool_outputs, with both clients."""
    assistant = await server.assistant()
    threads = server.client.beta.threads
    server.model.will(calls(WEATHER_IN_OSLO), says("Rain."), calls(WEATHER_IN_OSLO), says("Rain."))

    def last_run(events: list[AssistantStreamEvent], status: str) -> Run:
        assert events[-1].event == f"thread.run.{status}"
        assert isinstance(events[-1].data, Run)
        return events[-1].data

    opened = await threads.create_and_run(assistant_id=assistant.id, thread=HELLO, tools=TOOLS, stream=True)
    run = last_run([event async for event in opened], "requires_action")
    opened = await threads.runs.submit_tool_outputs(
        run_id=run.id, thread_id=run.thread_id, tool_outputs=answers(run, RAIN), stream=True
    )
    run = last_run([event async for event in opened], "completed")

    def act(client: openai.OpenAI) -> None:
        runs = client.beta.threads.runs
        opened = runs.create(run.thread_id, assistant_id=assistant.id, tools=TOOLS, stream=True)
        waiting = last_run(list(opened), "requires_action")
        opened = runs.submit_tool_outputs(
            run_id=waiting.id, thread_id=run.thread_id, tool_outputs=answers(waiting, RAIN), stream=True
        )
        last_run(list(opened), "completed")

    await in_a_thread(server, act)


@pytest.mark.parametrize(
    ("end", "status"), [(ended("length"), "incomplete"), (ended("content_filter"), "failed"), (None, "cancelled")]
)
async def test_helpers_on_runs_that_end_otherwise(server: Server, end: ModelEnd | None, status: str) -> None:
    """A stream helper gives the final run and message also of runs that were cut, filtered or cancelled."""
    server.model.will([TextDelta("Once"), *([end] if end else [asyncio.Event()])])
    threads = server.client.beta.threads
    heard = Heard()
    async with threads.create_and_run_stream(
        assistant_id=(await server.assistant()).id, thread=HELLO, event_handler=async_handler(heard)
    ) as events:
        async for event in events:
            if event.event == "thread.message.delta" and end is None:
                run_id, thread_id = events.current_run.id, events.current_run.thread_id  # type: ignore[union-attr]
                await threads.runs.cancel(run_id, thread_id=thread_id)
        run = await events.get_final_run()
        [message] = await events.get_final_messages()
    assert run.status == status
    assert message.status == "incomplete"
    assert heard.calls == HEARD_TEXT


async def test_a_refused_request_is_raised_by_helpers(server: Server) -> None:
    """A run that cannot begin is an ordinary error from every helper."""
    assistant = await server.assistant()
    threads = server.client.beta.threads
    with pytest.raises(openai.NotFoundError, match="No thread found with id 'thread_missing'"):
        await threads.runs.create_and_poll(thread_id="thread_missing", assistant_id=assistant.id)
    with pytest.raises(openai.NotFoundError, match="No thread found with id 'thread_missing'"):
        async with threads.runs.stream(thread_id="thread_missing", assistant_id=assistant.id):
            pass


async def test_pagers(server: Server) -> None:
    """Iterating over messages, runs and steps walks all pages, in the order asked for."""
    server.model.will(*[calls(WEATHER_IN_OSLO) for _ in range(2)], says("Rain."))
    threads = server.client.beta.threads
    run = await server.run("0", tools=TOOLS)
    for _ in range(2):
        run = await threads.runs.submit_tool_outputs_and_poll(
            run_id=run.id, thread_id=run.thread_id, tool_outputs=answers(run, RAIN), poll_interval_ms=5
        )
    for number in range(1, 5):
        await threads.messages.create(run.thread_id, role="user", content=str(number))
    messages: list[Any] = [message async for message in threads.messages.list(run.thread_id, limit=2)]
    assert [message.content[0].text.value for message in messages] == ["4", "3", "2", "1", "Rain.", "0"]
    steps = [step.type async for step in threads.runs.steps.list(run.id, thread_id=run.thread_id, limit=1, order="asc")]
    assert steps == ["tool_calls", "tool_calls", "message_creation"]
    of_the_run = [message.role async for message in threads.messages.list(run.thread_id, run_id=run.id, limit=1)]
    assert of_the_run == ["assistant"]
    assert [found.id async for found in threads.runs.list(run.thread_id, limit=1)] == [run.id]
