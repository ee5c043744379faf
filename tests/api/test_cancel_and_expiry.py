"""Runs that are stopped: by their caller, or by the clock; and what becomes of what they had open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.beta.threads import Run
from openai.types.beta.threads.runs import RunStep

from afterglow.contracts import TextDelta, ToolCallDelta
from afterglow.errors import ModelBroke
from afterglow.rows.requests import Origin
from afterglow.runs import lifecycle, worker
from afterglow.testing import SetClock, calls, ended, says
from tests.api.streams import PROJECT, answers, happened, names, polled, read_events, stored, submit
from tests.conftest import GET_WEATHER, Server, ServerFactory

WEATHER_IN_OSLO = ("get_weather", {"city": "Oslo"})
ORIGIN = Origin("req_1", "key", "cancel_run", "00")


@pytest.fixture
def never() -> asyncio.Event:
    """What a model that hangs waits for."""
    return asyncio.Event()


@pytest.fixture
def sweep_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeper looks all the time; servers started later only."""
    monkeypatch.setattr(worker, "SWEEP_S", 0.01)


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever expires is expired by the request that looks at it."""
    monkeypatch.setattr(worker, "SWEEP_S", 3600)


async def start(server: Server, **fields: Any) -> Run:
    """Start a run on a thread of its own, and do not wait for it."""
    return await server.client.beta.threads.create_and_run(
        assistant_id=(await server.assistant()).id,
        thread={"messages": [{"role": "user", "content": "Hello"}]},
        **fields,
    )


async def get(server: Server, run: Run) -> Run:
    return await server.client.beta.threads.runs.retrieve(run.id, thread_id=run.thread_id)


async def cancel(server: Server, run: Run) -> Run:
    return await server.client.beta.threads.runs.cancel(run.id, thread_id=run.thread_id)


async def steps_of(server: Server, run: Run) -> list[RunStep]:
    return (await server.client.beta.threads.runs.steps.list(run.id, thread_id=run.thread_id, order="asc")).data


async def newest(server: Server, run: Run) -> Any:
    """The thread's newest message."""
    return (await server.client.beta.threads.messages.list(run.thread_id, limit=1)).data[0]


async def say_more(server: Server, run: Run) -> None:
    """Append to the run's thread, which the run must not hold any more."""
    await server.client.beta.threads.messages.create(run.thread_id, role="user", content="And?")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def assert_refused(request: Any, text: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await request
    body: Any = refused.value.body
    assert body == {"message": text, "type": "invalid_request_error", "param": None, "code": None}


# --- cancel ----------------------------------------------------------------------------------------------------


async def test_cancel_while_queued(start_server: ServerFactory, tmp_path: Path, never: asyncio.Event) -> None:
    """A queued run is cancelled without being begun: the answer says cancelling, the next look cancelled."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, max_running_runs=1) as server:
        server.model.will([never])
        await start(server)
        await until(lambda: len(server.model.requests) == 1)
        run = await start(server)
        clock.time += 5
        answer = await cancel(server, run)
        assert (answer.status, answer.cancelled_at) == ("cancelling", None)
        assert answer.expires_at == run.expires_at
        run = await get(server, run)
        assert (run.status, run.cancelled_at, run.expires_at, run.started_at) == (
            "cancelled",
            int(clock.time),
            None,
            None,
        )
        assert run.usage is not None
        assert run.usage.total_tokens == 0
        assert await steps_of(server, run) == []
        await say_more(server, run)
        assert names(read_events(await stored(server, run.id))) == [
            "run.created",
            "run.queued",
            "run.cancelling",
            "run.cancelled",
        ]


async def test_cancel_before_the_first_token(server: Server, never: asyncio.Event) -> None:
    """Cancel ends a run whose model keeps silent within a second, and aborts the model call."""
    server.model.will([never])
    run = await start(server)
    await until(lambda: len(server.model.requests) == 1)
    began = time.monotonic()
    answer = await cancel(server, run)
    assert answer.status == "cancelling"
    assert answer.expires_at is not None
    run = await polled(server, run)
    assert time.monotonic() - began <= 1
    assert run.status == "cancelled"
    assert run.cancelled_at is not None
    assert run.expires_at is None
    assert server.model.closed == 1
    assert await steps_of(server, run) == []
    await say_more(server, run)


async def test_cancel_before_the_model_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch, never: asyncio.Event
) -> None:
    """A server that does not even say what model it has delays no cancel."""
    asked = asyncio.Event()

    async def hang(model: str) -> Any:
        asked.set()
        await never.wait()

    monkeypatch.setattr(server.model, "info", hang)
    run = await start(server)
    await asked.wait()
    began = time.monotonic()
    await cancel(server, run)
    assert (await polled(server, run)).status == "cancelled"
    assert time.monotonic() - began <= 1
    assert server.model.requests == []


async def test_cancel_in_the_middle_of_a_message(server: Server, never: asyncio.Event) -> None:
    """The text that came stays, as an incomplete message; its step is cancelled."""
    server.model.will([TextDelta("Once "), TextDelta("upon"), never])
    run = await start(server)
    await happened(server, run.id, "thread.message.delta", 2)
    began = time.monotonic()
    await cancel(server, run)
    run = await polled(server, run)
    assert time.monotonic() - began <= 1
    assert run.status == "cancelled"
    assert server.model.closed == 1
    message = await newest(server, run)
    assert (message.status, message.incomplete_details.reason) == ("incomplete", "run_cancelled")
    assert (message.incomplete_at, message.completed_at) == (run.cancelled_at, None)
    assert message.content[0].text.value == "Once upon"
    [step] = await steps_of(server, run)
    assert (step.status, step.cancelled_at, step.last_error) == ("cancelled", run.cancelled_at, None)
    server.model.will(says("a time."))
    await server.run("Go on", thread_id=run.thread_id)
    assert [said["content"] for said in server.model.requests[-1].messages] == ["Hello", "Once upon", "Go on"]


async def test_cancel_in_the_middle_of_a_call(server: Server, never: asyncio.Event) -> None:
    """A call that the model was still writing stays in its cancelled step as far as it came."""
    server.model.will([ToolCallDelta(0, "call_1", "get_weather"), ToolCallDelta(0, arguments='{"ci'), never])
    run = await start(server, tools=[GET_WEATHER])
    await happened(server, run.id, "thread.run.step.delta", 2)
    await cancel(server, run)
    run = await polled(server, run)
    assert (run.status, run.required_action) == ("cancelled", None)
    [step] = await steps_of(server, run)
    assert (step.status, step.cancelled_at) == ("cancelled", run.cancelled_at)
    assert step.step_details.type == "tool_calls"
    [call] = step.step_details.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments, call.function.output) == ("get_weather", '{"ci', None)


async def test_cancel_while_the_run_waits(server: Server) -> None:
    """Cancelling frees a thread from a run in requires_action; the step is cancelled, and outputs come too late."""
    server.model.will(calls(WEATHER_IN_OSLO))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    outputs = answers(run, {"get_weather": "rain"})
    answer = await cancel(server, run)
    assert (answer.status, answer.required_action) == ("cancelling", None)
    run = await get(server, run)
    assert (run.status, run.required_action, run.expires_at) == ("cancelled", None, None)
    assert run.usage is not None
    assert run.usage.total_tokens == 15
    [step] = await steps_of(server, run)
    assert (step.status, step.cancelled_at) == ("cancelled", run.cancelled_at)
    assert step.usage is not None
    assert step.usage.total_tokens == 15
    await assert_refused(
        server.client.beta.threads.runs.submit_tool_outputs(
            run_id=run.id, thread_id=run.thread_id, tool_outputs=outputs
        ),
        'Runs in status "cancelled" do not accept tool outputs.',
    )
    server.model.will(says("Hi."))
    assert (await server.run("And?", thread_id=run.thread_id)).status == "completed"
    assert all(said["role"] == "user" for said in server.model.requests[-1].messages)


async def test_a_run_that_is_over_cannot_be_cancelled(
    start_server: ServerFactory, tmp_path: Path, no_sweep: None
) -> None:
    """Cancelling a terminal run is refused with its status, and changes nothing."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will(says("Hi."), [ModelBroke("no")], [TextDelta("Onc"), ended("length")], calls(WEATHER_IN_OSLO))
        over = [await polled(server, await start(server)) for _ in range(3)]
        waiting = [await polled(server, await start(server, tools=[GET_WEATHER]))]
        server.model.will(calls(WEATHER_IN_OSLO))
        waiting.append(await polled(server, await start(server, tools=[GET_WEATHER])))
        await cancel(server, waiting[0])
        clock.time += 600  # and nobody looks at the other one before it is cancelled
        runs = [*over, *waiting]
        for run, status in zip(runs, ["completed", "failed", "incomplete", "cancelled", "expired"], strict=True):
            await assert_refused(cancel(server, run), f"Cannot cancel run with status '{status}'.")
            assert (await get(server, run)).status == status


async def test_cancel_twice(server: Server, monkeypatch: pytest.MonkeyPatch, never: asyncio.Event) -> None:
    """While a run is cancelling, another cancel answers with the run unchanged."""
    monkeypatch.setattr(server.house.queue, "cancel", lambda run_id: None)  # the worker does not hear of it yet
    server.model.will([TextDelta("Once"), never])
    run = await start(server)
    await happened(server, run.id, "thread.message.delta")
    first = await cancel(server, run)
    assert first.status == "cancelling"
    assert await cancel(server, run) == first
    assert await get(server, run) == first
    for request in (say_more(server, run), server.run("Hello", thread_id=run.thread_id)):
        await assert_refused(request, f"Can't add messages to {run.thread_id} while a run {run.id} is active.")
    monkeypatch.undo()
    await cancel(server, run)
    assert (await polled(server, run)).status == "cancelled"


async def test_work_that_ends_first_wins_over_cancel(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is whole before the worker hears of the cancel completes the run."""
    hold = asyncio.Event()
    monkeypatch.setattr(server.house.queue, "cancel", lambda run_id: None)
    server.model.will([hold, *says("Done.")])
    run = await start(server)
    await until(lambda: len(server.model.requests) == 1)
    assert (await cancel(server, run)).status == "cancelling"
    hold.set()
    run = await polled(server, run)
    assert (run.status, run.cancelled_at) == ("completed", None)
    assert await server.last_text(run.thread_id) == "Done."


async def test_calls_do_not_win_over_cancel(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cancelling does not begin to wait for outputs; what it streamed and spent is kept."""
    hold = asyncio.Event()
    monkeypatch.setattr(server.house.queue, "cancel", lambda run_id: None)
    server.model.will([*calls(WEATHER_IN_OSLO)[:-1], hold, ended("tool_calls")])
    run = await start(server, tools=[GET_WEATHER])
    await happened(server, run.id, "thread.run.step.delta", 2)
    await cancel(server, run)
    hold.set()
    run = await polled(server, run)
    assert run.status == "cancelled"
    assert run.usage is not None
    assert run.usage.total_tokens == 15
    events = read_events(await stored(server, run.id))
    assert [event.id for event in events[3:]] == [f"1.{number}" for number in range(2, len(events) - 1)]
    assert names(events)[-4:] == ["run.step.delta", "run.cancelling", "run.step.cancelled", "run.cancelled"]


async def test_cancel_at_once(server: Server, never: asyncio.Event) -> None:
    """Whenever in a run's first moments the cancel comes, it wins."""
    server.model.will(*[[never] for _ in range(12)])
    for number in range(12):
        run = await start(server)
        for _ in range(number):
            await asyncio.sleep(0)
        assert (await cancel(server, run)).status == "cancelling"
        assert (await polled(server, run)).status == "cancelled"


async def test_cancel_while_being_claimed(start_server: ServerFactory, tmp_path: Path, never: asyncio.Event) -> None:
    """A cancel that comes between a run's claim and its first step is heard."""
    async with start_server(tmp_path, max_running_runs=1) as server:
        server.model.will([never], [never])
        await start(server)
        await until(lambda: len(server.model.requests) == 1)
        run = await start(server)
        claimed = asyncio.create_task(server.application.worker._claim(1))
        cancelled = asyncio.create_task(lifecycle.cancel_run(server.house, PROJECT, run.thread_id, run.id, ORIGIN))
        await asyncio.sleep(0)
        time.sleep(0.1)  # noqa: ASYNC251  both are done before the loop can look at either
        await asyncio.gather(claimed, cancelled)
        assert (await polled(server, run)).status == "cancelled"


# --- expiry ----------------------------------------------------------------------------------------------------


async def test_a_waiting_run_expires_when_it_is_read(
    start_server: ServerFactory, tmp_path: Path, no_sweep: None
) -> None:
    """600 s after its creation a run in requires_action is read as expired, its step too, and outputs are refused."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will(calls(WEATHER_IN_OSLO))
        waiting = await server.run("Weather?", tools=[GET_WEATHER])
        clock.time += 599
        assert (await get(server, waiting)).status == "requires_action"
        clock.time += 1
        run = await get(server, waiting)
        assert (run.status, run.expires_at, run.required_action, run.last_error) == ("expired", None, None, None)
        for never_set in (run.completed_at, run.failed_at, run.cancelled_at):
            assert never_set is None
        assert run.usage is not None
        assert run.usage.total_tokens == 15
        [step] = await steps_of(server, run)
        assert (step.status, step.expired_at, step.last_error) == ("expired", int(clock.time), None)
        await assert_refused(
            server.client.beta.threads.runs.submit_tool_outputs(
                run_id=run.id, thread_id=run.thread_id, tool_outputs=answers(waiting, {"get_weather": "rain"})
            ),
            'Runs in status "expired" do not accept tool outputs.',
        )
        assert names(read_events(await stored(server, run.id)))[-2:] == ["run.step.expired", "run.expired"]


@pytest.mark.parametrize("request_that_looks", ["message", "run", "outputs"])
async def test_an_overdue_run_frees_its_thread_when_asked(
    start_server: ServerFactory, tmp_path: Path, no_sweep: None, request_that_looks: str
) -> None:
    """Nobody has to look at the run first: a message, a run or outputs that come after its time expire it."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will(calls(WEATHER_IN_OSLO), says("Hi."))
        run = await server.run("Weather?", tools=[GET_WEATHER])
        clock.time += 600
        if request_that_looks == "message":
            await say_more(server, run)
        elif request_that_looks == "run":
            later = await server.client.beta.threads.runs.create(run.thread_id, assistant_id=run.assistant_id)
            assert (await polled(server, later)).status == "completed"
        else:
            await assert_refused(
                submit(server, run, {"get_weather": "rain"}),
                'Runs in status "expired" do not accept tool outputs.',
            )
        runs = (await server.client.beta.threads.runs.list(run.thread_id)).data
        assert [seen.status for seen in runs if seen.id == run.id] == ["expired"]


async def test_a_queued_run_expires(
    start_server: ServerFactory, tmp_path: Path, no_sweep: None, never: asyncio.Event
) -> None:
    """A run whose turn never came expires too; the model is not called for it."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, max_running_runs=1) as server:
        server.model.will([never])
        await start(server)
        await until(lambda: len(server.model.requests) == 1)
        run = await start(server)
        clock.time += 600
        run = await get(server, run)
        assert (run.status, run.started_at, run.expires_at) == ("expired", None, None)
        assert len(server.model.requests) == 1
        await say_more(server, run)


async def test_a_run_at_work_expires(
    start_server: ServerFactory, tmp_path: Path, sweep_quickly: None, never: asyncio.Event
) -> None:
    """At its deadline the model call is aborted; the text that came stays as an incomplete message."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will([TextDelta("Once "), TextDelta("upon"), never])
        run = await start(server)
        await happened(server, run.id, "thread.message.delta", 2)
        clock.time += 600
        await happened(server, run.id, "thread.run.expired")
        assert server.model.closed == 1
        run = await get(server, run)
        assert (run.status, run.expires_at, run.last_error) == ("expired", None, None)
        message = await newest(server, run)
        assert (message.status, message.incomplete_details.reason) == ("incomplete", "run_expired")
        assert message.incomplete_at == int(clock.time)
        assert message.content[0].text.value == "Once upon"
        [step] = await steps_of(server, run)
        assert (step.status, step.expired_at, step.last_error) == ("expired", int(clock.time), None)
        assert names(read_events(await stored(server, run.id)))[-4:] == [
            "message.delta",
            "message.incomplete",
            "run.step.expired",
            "run.expired",
        ]
        assert len(server.model.requests) == 1
        await say_more(server, run)


async def test_a_run_expires_by_the_systems_clock(
    start_server: ServerFactory, tmp_path: Path, never: asyncio.Event
) -> None:
    """With the real clock too, and without anybody looking."""
    async with start_server(tmp_path, run_expires_s=1) as server:
        server.model.will([never])
        run = await start(server)
        await happened(server, run.id, "thread.run.expired")
        assert server.model.closed == 1


async def test_the_sweeper_expires_what_nobody_looks_at(
    start_server: ServerFactory, tmp_path: Path, sweep_quickly: None
) -> None:
    """Followers of a waiting run hear of its expiry without any request."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will(calls(WEATHER_IN_OSLO))
        run = await server.run("Weather?", tools=[GET_WEATHER])
        clock.time += 600
        await happened(server, run.id, "thread.run.expired")
        assert (await get(server, run)).status == "expired"


async def test_outputs_do_not_extend_a_run(
    start_server: ServerFactory, tmp_path: Path, sweep_quickly: None, never: asyncio.Event
) -> None:
    """The deadline counts from creation, whatever was submitted since."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, run_lease_s=1000) as server:
        server.model.will(calls(WEATHER_IN_OSLO), [never])
        run = await server.run("Weather?", tools=[GET_WEATHER])
        clock.time += 599
        await server.client.beta.threads.runs.submit_tool_outputs(
            run_id=run.id, thread_id=run.thread_id, tool_outputs=answers(run, {"get_weather": "rain"})
        )
        await until(lambda: len(server.model.requests) == 2)
        clock.time += 1
        assert (await polled(server, run)).status == "expired"
        first, *_ = await steps_of(server, run)
        assert first.status == "completed"


async def test_a_worker_that_slept_goes_on(
    start_server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that ran out while the whole machine slept makes nobody do the same work again."""
    clock, hold = SetClock(), asyncio.Event()
    monkeypatch.setattr(worker, "POLL_S", 0.01)
    monkeypatch.setattr(worker, "SWEEP_S", 0.01)
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will([TextDelta("Once "), hold, TextDelta("more."), ended("stop")], says("Other."))
        run = await start(server)
        await happened(server, run.id, "thread.message.delta")
        clock.time += 300
        assert (await server.run("Hello")).status == "completed"  # the worker has looked for work since
        await asyncio.sleep(0.05)
        hold.set()
        run = await polled(server, run)
        assert run.status == "completed"
        assert await server.last_text(run.thread_id) == "Once more."
        assert len(server.model.requests) == 2


# --- across a restart ------------------------------------------------------------------------------------------


async def test_a_waiting_run_survives_a_restart(start_server: ServerFactory, tmp_path: Path) -> None:
    """A run in requires_action is found as it was, and goes on with its outputs."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will(calls(WEATHER_IN_OSLO))
        run = await server.run("Weather?", tools=[GET_WEATHER])
    clock.time += 100
    async with start_server(tmp_path, clock=clock) as server:
        assert await get(server, run) == run
        server.model.will(says("Rain."))
        done = await submit(server, run, {"get_weather": "rain"})
        assert (done.status, done.started_at) == ("completed", int(clock.time))
        assert done.usage is not None
        assert done.usage.total_tokens == 30
        assert [step.status for step in await steps_of(server, run)] == ["completed", "completed"]


async def test_a_waiting_run_expires_while_the_server_is_down(
    start_server: ServerFactory, tmp_path: Path, no_sweep: None
) -> None:
    """Time goes on while nobody serves."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will(calls(WEATHER_IN_OSLO))
        run = await server.run("Weather?", tools=[GET_WEATHER])
    clock.time += 600
    async with start_server(tmp_path, clock=clock) as server:
        run = await get(server, run)
        assert (run.status, run.expires_at) == ("expired", None)
        [step] = await steps_of(server, run)
        assert (step.status, step.expired_at) == ("expired", int(clock.time))


async def test_a_run_at_work_expires_while_the_server_is_down(
    start_server: ServerFactory, tmp_path: Path, never: asyncio.Event
) -> None:
    """What was in progress when the server stopped, and is overdue when it starts, has expired: step and message
    say so, and the model is not asked again."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        server.model.will([TextDelta("Once "), TextDelta("upon"), never])
        run = await start(server)
        await happened(server, run.id, "thread.message.delta", 2)
    clock.time += 600
    async with start_server(tmp_path, clock=clock) as server:
        run = await polled(server, run)
        assert run.status == "expired"
        message = await newest(server, run)
        assert (message.status, message.incomplete_details.reason) == ("incomplete", "run_expired")
        assert message.content[0].text.value == "Once upon"
        [step] = await steps_of(server, run)
        assert (step.status, step.last_error) == ("expired", None)
        assert server.model.requests == []


async def test_a_cancel_survives_a_restart(
    start_server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: asyncio.Event
) -> None:
    """A run that was being cancelled when the server stopped is cancelled when it starts again."""
    async with start_server(tmp_path) as server:
        monkeypatch.setattr(server.house.queue, "cancel", lambda run_id: None)
        server.model.will([TextDelta("Once "), TextDelta("upon"), never])
        run = await start(server)
        await happened(server, run.id, "thread.message.delta", 2)
        assert (await cancel(server, run)).status == "cancelling"
    async with start_server(tmp_path) as server:
        run = await polled(server, run)
        assert run.status == "cancelled"
        message = await newest(server, run)
        assert (message.status, message.incomplete_details.reason) == ("incomplete", "run_cancelled")
        assert message.content[0].text.value == "Once upon"
        [step] = await steps_of(server, run)
        assert (step.status, step.cancelled_at) == ("cancelled", run.cancelled_at)
        assert server.model.requests == []


async def test_a_run_at_work_goes_on_after_a_restart(
    start_server: ServerFactory, tmp_path: Path, never: asyncio.Event
) -> None:
    """The half-written message of the stopped server is replaced; steps that were finished are not done again."""
    async with start_server(tmp_path) as server:
        server.model.will(calls(WEATHER_IN_OSLO), [TextDelta("It is "), never])
        run = await server.run("Weather?", tools=[GET_WEATHER])
        await server.client.beta.threads.runs.submit_tool_outputs(
            run_id=run.id, thread_id=run.thread_id, tool_outputs=answers(run, {"get_weather": "rain"})
        )
        await happened(server, run.id, "thread.message.delta")
    async with start_server(tmp_path) as server:
        server.model.will(says("Rain."))
        run = await polled(server, run)
        assert run.status == "completed"
        assert [said["role"] for said in server.model.requests[0].messages] == ["user", "assistant", "tool"]
        messages = (await server.client.beta.threads.messages.list(run.thread_id)).data
        assert [(message.role, message.status) for message in messages] == [
            ("assistant", "completed"),
            ("user", "completed"),
        ]
        assert [step.type for step in await steps_of(server, run)] == ["tool_calls", "message_creation"]
