"""Outputs that come in parts, come again, come late, or do not come."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.beta.threads import Run

from afterglow.runs.lifecycle import time_out_calls
from afterglow.testing import SetClock, calls, says
from tests.api.streams import answers, idle, names, polled, read_events, stream
from tests.api.test_runs import get, sent, start, steps_of, tool_calls
from tests.conftest import GET_WEATHER, Server, ServerFactory

GET_TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
BOTH = [GET_WEATHER, GET_TIME]
OUTPUTS = {"get_weather": "rain", "get_time": "noon"}
ASKS_BOTH = (("get_weather", {"city": "Oslo"}), ("get_time", {}))


async def waiting(server: Server, *then: Any, tools: Any = BOTH, asks: Any = ASKS_BOTH, **fields: Any) -> Run:
    """A run that waits for the outputs of `asks`; then the model goes on with `then`."""
    server.model.will(calls(*asks), *then)
    run = await polled(server, await start(server, tools=tools, **fields))
    assert run.status == "requires_action"
    return run


async def give(server: Server, run: Run, outputs: Any, **body: Any) -> Run:
    return await server.client.beta.threads.runs.submit_tool_outputs(
        run.id, thread_id=run.thread_id, tool_outputs=outputs, extra_body=body
    )


def missing(run: Run) -> list[str]:
    assert run.required_action is not None
    return [call.function.name for call in run.required_action.submit_tool_outputs.tool_calls]


# --- partial outputs -------------------------------------------------------------------------------------------


async def test_partial_outputs_are_kept_until_the_last_has_come(server: Server) -> None:
    """With `partial`, the run waits on for what is missing, shows what it has, and goes on with the last."""
    run = await waiting(server, says("Rain at noon."))
    first, second = answers(run, OUTPUTS)
    kept = await give(server, run, [second], partial=True)
    assert (kept.status, missing(kept)) == ("requires_action", ["get_weather"])
    assert missing(await get(server, run)) == ["get_weather"]
    [step] = await steps_of(server, run)
    assert [call.function.output for call in tool_calls(step)] == [None, "noon"]
    queued = await give(server, run, [first], partial=True)
    assert queued.status == "queued"
    done = await polled(server, run)
    assert done.status == "completed"
    assert [message["content"] for message in sent(server) if message["role"] == "tool"] == ["rain", "noon"]
    assert done.usage is not None
    assert done.usage.total_tokens == 30
    step = (await steps_of(server, run))[0]
    assert step.usage is not None
    assert step.usage.total_tokens == 15


async def test_without_partial_all_are_expected(server: Server) -> None:
    """Some outputs alone are refused as ever, unless `partial` asks for it; unknown ids are refused even then."""
    run = await waiting(server)
    first = answers(run, OUTPUTS)[0]
    with pytest.raises(openai.BadRequestError, match="Expected tool outputs for call_ids"):
        await give(server, run, [first])
    with pytest.raises(openai.BadRequestError, match="Expected tool outputs for call_ids"):
        await give(server, run, [first, {"tool_call_id": "call_other", "output": ""}], partial=True)
    with pytest.raises(openai.BadRequestError, match="Expected tool outputs for call_ids"):
        await give(server, run, [first, first], partial=True)
    assert missing(await get(server, run)) == ["get_weather", "get_time"]


async def test_what_was_kept_may_come_again_but_not_differ(server: Server) -> None:
    """An output that was kept is accepted again, also beside the missing ones; another one for its call is not."""
    run = await waiting(server, says("Fine."))
    first, second = answers(run, OUTPUTS)
    await give(server, run, [first], partial=True)
    again = await give(server, run, [first], partial=True)
    assert missing(again) == ["get_time"]
    with pytest.raises(openai.BadRequestError, match="Expected tool outputs for call_ids"):
        await give(server, run, [first | {"output": "snow"}], partial=True)
    assert (await give(server, run, [first, second])).status == "queued"
    assert (await polled(server, run)).status == "completed"


async def test_two_parts_at_once_lose_nothing(server: Server) -> None:
    """Parts that are given at the same moment are both kept, and the run goes on once."""
    run = await waiting(server, says("Rain at noon."))
    first, second = answers(run, OUTPUTS)
    both = await asyncio.gather(give(server, run, [first], partial=True), give(server, run, [second], partial=True))
    assert sorted(one.status for one in both) == ["queued", "requires_action"]
    assert (await polled(server, run)).status == "completed"
    assert len(server.model.requests) == 2


async def test_the_stream_of_a_part_goes_on_when_the_rest_has_come(server: Server) -> None:
    """A part that is given with `stream` is answered by the events that follow once the others are there."""
    run = await waiting(server, says("Rain at noon."))
    first, second = answers(run, OUTPUTS)
    path = f"/threads/{run.thread_id}/runs/{run.id}/submit_tool_outputs"
    streaming = asyncio.ensure_future(stream(server, path, {"tool_outputs": [first], "partial": True}))
    while missing(await get(server, run)) != ["get_time"]:
        await asyncio.sleep(0.005)
    await give(server, run, [second], partial=True)
    events = names(read_events(await streaming))
    assert events[:3] == ["run.step.completed", "run.queued", "run.in_progress"]
    assert events[-2:] == ["run.completed", "done"]


# --- the same outputs again ------------------------------------------------------------------------------------


async def test_the_same_outputs_again_have_no_effect(server: Server) -> None:
    """Outputs that were given before are answered with the run as it is: in the next round, and when it is over."""
    again = calls(("get_weather", {"city": "Bergen"}))
    run = await waiting(server, again, says("Rain everywhere."))
    outputs = answers(run, OUTPUTS)
    await give(server, run, outputs)
    later = await polled(server, run)
    assert missing(later) == ["get_weather"]
    assert await give(server, run, outputs) == later
    await give(server, run, answers(later, OUTPUTS))
    done = await polled(server, run)
    assert await give(server, run, outputs) == done
    assert await give(server, run, answers(later, OUTPUTS)) == done
    assert len(server.model.requests) == 3
    for other in ([outputs[0], outputs[1] | {"output": "midnight"}], []):
        with pytest.raises(openai.BadRequestError, match='status "completed" do not accept'):
            await give(server, run, other)


async def test_the_same_outputs_again_while_the_model_answers(server: Server) -> None:
    """While the run is in progress, the same outputs are answered with it, and the model is asked once."""
    go = asyncio.Event()
    run = await waiting(server, [go, *says("Rain at noon.")])
    outputs = answers(run, OUTPUTS)
    await give(server, run, outputs)
    while len(server.model.requests) < 2:
        await asyncio.sleep(0.005)
    assert (await give(server, run, outputs)).status == "in_progress"
    with pytest.raises(openai.BadRequestError, match='status "in_progress" do not accept'):
        await give(server, run, [output | {"output": "?"} for output in outputs])
    go.set()
    assert (await polled(server, run)).status == "completed"
    assert len(server.model.requests) == 2


async def test_a_stream_of_the_same_outputs_is_the_first_ones(server: Server) -> None:
    """The same outputs with `stream` give the very bytes that the first submission gave."""
    run = await waiting(server, calls(("get_weather", {"city": "Bergen"})), says("Rain."))
    path = f"/threads/{run.thread_id}/runs/{run.id}/submit_tool_outputs"
    outputs = answers(run, OUTPUTS)
    first = await stream(server, path, {"tool_outputs": outputs})
    assert await stream(server, path, {"tool_outputs": outputs}) == first
    await give(server, run, answers(await get(server, run), OUTPUTS))
    await polled(server, run)
    await idle(server)
    assert await stream(server, path, {"tool_outputs": outputs}) == first


async def test_ids_that_a_model_server_uses_again_are_no_repetition(server: Server) -> None:
    """Calls that wait are answered, also when an earlier round had the same ids and the same outputs."""
    one = calls(("get_weather", {"city": "Oslo"}))
    server.model.will(one, one, says("Rain."))
    run = await polled(server, await start(server, tools=BOTH))
    outputs = answers(run, OUTPUTS)
    for _ in range(2):
        assert (await give(server, run, outputs)).status == "queued"
        run = await polled(server, run)
    assert run.status == "completed"


# --- deadlines -------------------------------------------------------------------------------------------------


async def test_a_call_without_an_answer_times_out(start_server: ServerFactory, tmp_path: Path) -> None:
    """After the run's `tool_timeout_s` the model is told that the tool timed out, and the run goes on; what comes
    later is refused."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, run_lease_s=1000) as server:
        run = await waiting(server, says("Never mind."), extra_query={"tool_timeout_s": 30})
        outputs = answers(run, OUTPUTS)
        await give(server, run, outputs[1:], partial=True)
        clock.time += 29
        assert await time_out_calls(server.house, 10) == 0
        clock.time += 1
        assert await time_out_calls(server.house, 10) == 2
        assert (await polled(server, run)).status == "completed"
        told = [message["content"] for message in sent(server) if message["role"] == "tool"]
        assert told == ["ERROR: The tool timed out: no output was given within 30 s.", "noon"]
        with pytest.raises(openai.BadRequestError, match=r"timed out.*too late") as refused:
            await give(server, run, outputs)
        assert refused.value.param == "tool_outputs[0]"
        assert await time_out_calls(server.house, 10) == 0


async def test_the_worker_sees_to_deadlines(server: Server) -> None:
    """Nobody needs to ask: the worker's sweep lets the run go on about a second later at most."""
    run = await waiting(server, says("Never mind."), extra_query={"tool_timeout_s": "0.1"})
    async with asyncio.timeout(5):
        while (run := await get(server, run)).status != "completed":
            await asyncio.sleep(0.05)


async def test_a_tool_has_its_own_time(start_server: ServerFactory, tmp_path: Path) -> None:
    """`x-afterglow.timeout_s` of a tool goes before that of the run, and the others are waited for; after a restart,
    too."""
    clock = SetClock()
    slow = GET_WEATHER | {"x-afterglow": {"timeout_s": 50}}
    async with start_server(tmp_path, clock=clock, run_lease_s=1000) as server:
        run = await waiting(server, tools=[slow, GET_TIME], extra_query={"tool_timeout_s": 30})
        outputs = answers(run, OUTPUTS)
        assert run.tools[0].model_extra == {"x-afterglow": {"timeout_s": 50}}
        clock.time += 31
        await time_out_calls(server.house, 10)
        assert missing(await get(server, run)) == ["get_weather"]
        with pytest.raises(openai.BadRequestError, match="too late"):
            await give(server, run, outputs)
    async with start_server(tmp_path, clock=clock, run_lease_s=1000) as server:
        server.model.will(says("Never mind."))
        clock.time += 20
        await time_out_calls(server.house, 10)
        assert (await polled(server, run)).status == "completed"


async def test_a_deadline_is_a_number_of_seconds(server: Server) -> None:
    """What is no number of seconds in range is refused, with the parameter's name."""
    for value in ("0", "soon", "-1", "1e3", "90000"):
        with pytest.raises(openai.BadRequestError) as refused:
            await start(server, extra_query={"tool_timeout_s": value})
        assert refused.value.param == "tool_timeout_s"


async def test_the_runs_own_deadline_stays(start_server: ServerFactory, tmp_path: Path) -> None:
    """A run that is past its own deadline expires, whatever its calls are waiting for; a deleted thread leaves no
    deadline."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, run_lease_s=1000) as server:
        run = await waiting(server, extra_query={"tool_timeout_s": 599})
        other = await waiting(server, extra_query={"tool_timeout_s": 599})
        await server.client.beta.threads.delete(other.thread_id)
        clock.time += 601
        await time_out_calls(server.house, 10)
        assert (await get(server, run)).status == "expired"
        left = await server.house.store.read(lambda tx: tx.fetch("SELECT COUNT(*) FROM tool_deadlines"))
        assert left[0][0] == 0
