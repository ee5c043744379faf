"""The server dies between any two commits while runs wait for their thread: each has its turn, once, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
from openai.types.beta.threads import Run

from afterglow.contracts import ChatRequest, Delta
from afterglow.runs.states import TERMINAL
from afterglow.testing import ScriptedModels, calls, says
from tests.conftest import GET_WEATHER
from tests.crash.lives import PATIENCE_S, Life, check_log, mortal, next_life, parse, stored_log

pytestmark = pytest.mark.slow


class Answering(ScriptedModels):
    """A model that calls a function when it is asked to, and says yes to everything else."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        asks = request.messages[-1]["content"] == "Ask"
        self.scripts = [calls(("get_weather", {"city": "Oslo"})) if asks else says("Yes.")]
        async with aclosing(super().stream(request)) as batches:
            async for batch in batches:
                yield batch


async def find(life: Life) -> dict[str, Run]:
    """The runs that are there, by what their callers have named them."""
    found = await life.house.store.read(lambda tx: tx.fetch("SELECT thread_id, id FROM runs"))
    runs = life.client.beta.threads.runs
    there = [await runs.retrieve(run_id, thread_id=thread_id) for thread_id, run_id in found]
    return {(run.metadata or {})["name"]: run for run in there}


async def ask(life: Life, name: str, text: str, thread_id: str, assistant_id: str) -> Run:
    return await life.client.beta.threads.runs.create(
        thread_id,
        assistant_id=assistant_id,
        metadata={"name": name},
        additional_messages=[{"role": "user", "content": text}],
        extra_query={"if_busy": "queue"},
    )


async def act(life: Life, thread_id: str, assistant_id: str) -> None:
    """Let one run wait for its caller, two behind it, and stay until all are over; go on with what is there."""
    runs = life.client.beta.threads.runs
    if "first" not in await find(life):
        await ask(life, "first", "Ask", thread_id, assistant_id)
    while (first := (await find(life))["first"]).status not in ("requires_action", *TERMINAL):
        await asyncio.sleep(0.001)
    for name in ("second", "third"):
        if name not in await find(life):
            await ask(life, name, name, thread_id, assistant_id)
    if first.status == "requires_action":
        assert first.required_action is not None
        [call] = first.required_action.submit_tool_outputs.tool_calls
        outputs = [{"tool_call_id": call.id, "output": "rain"}]
        await runs.submit_tool_outputs(first.id, thread_id=thread_id, tool_outputs=outputs)
    while any(run.status not in TERMINAL for run in (await find(life)).values()):
        await asyncio.sleep(0.001)


async def test_the_thread_goes_on_wherever_the_server_dies(tmp_path: Path):
    """Stopped after each commit in turn: the next server brings all three runs to their ends, in order, each message
    is there once, and nobody waits for a thread that no run holds."""
    lives = 0
    while True:
        lives += 1
        folder = tmp_path / str(lives)
        async with mortal(folder, Answering()) as life:
            assert life.store is not None
            assistant_id = (await life.client.beta.assistants.create(model="m", tools=[GET_WEATHER])).id
            thread_id = (await life.client.beta.threads.create()).id
            life.store.commits, life.store.lives = 0, lives
            outlived = await life.do(act(life, thread_id, assistant_id))
        async with next_life(folder, Answering()) as life:
            async with asyncio.timeout(PATIENCE_S):
                await act(life, thread_id, assistant_id)
            ended = await find(life)
            assert [ended[name].status for name in ("first", "second", "third")] == ["completed"] * 3, lives
            listed = await life.client.beta.threads.messages.list(thread_id, order="asc")
            texts = [message.content[0].text.value for message in listed.data]
            assert texts == ["Ask", "Yes.", "second", "Yes.", "third", "Yes."], lives
            for run in ended.values():
                check_log(parse(await stored_log(life.house, run.id)))
        if outlived:
            break
    assert lives > 12
