"""The server dies around calls of tools that it makes itself, and around outputs that come in parts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from afterglow.runs.closing import NOT_CALLED, NOT_KNOWN
from afterglow.testing import Saying, SetClock, calls
from tests.conftest import GET_WEATHER
from tests.crash.lives import Left, Storyteller, check_run, mortal, next_life
from tests.crash.test_between_commits import ANSWER, COST, OVER, Caller, answers
from tests.endpoints import Answer, Endpoint, endpoint

pytestmark = pytest.mark.slow

BOOK: Any = {"type": "function", "function": {"name": "book", "parameters": {"type": "object"}}}
ENOUGH = 30


def asks_one() -> Saying:
    return calls(("get_weather", {"city": "Oslo"}))


def asks_both() -> Saying:
    return calls(("get_weather", {"city": "Oslo"}), ("book", {}))


class ToolCaller(Caller):
    """Its assistant has a tool with an endpoint, and one that it answers itself."""

    def __init__(self, tool: Endpoint) -> None:
        super().__init__()
        self._tool: Any = GET_WEATHER | {"x-afterglow": {"url": tool.url, "retries": 0}}

    async def prepare(self) -> None:
        beta = self.client.beta
        self.assistant_id = (await beta.assistants.create(model="m", tools=[self._tool, BOOK])).id
        self.thread_id = (await beta.threads.create()).id
        await beta.threads.messages.create(self.thread_id, role="user", content="How is the weather?")


@pytest.mark.parametrize("asks", [asks_one, asks_both])
async def test_a_call_is_never_made_twice(tmp_path: Path, asks: Any) -> None:
    """Wherever the server dies, a call goes out once at most; when nobody knows what has become of it, the model is
    told so, and the run goes on to its end."""
    unknown = 0
    for lives in range(1, ENOUGH):
        async with endpoint() as tool:
            tool.will(Answer(b"rain"))
            caller, model = ToolCaller(tool), Storyteller(asks, answers)
            folder = tmp_path / str(lives)
            async with mortal(folder, model, private_tools=True, event_flush_ms=60_000) as life:
                assert life.store is not None
                caller.client = life.client
                await caller.prepare()
                life.store.commits, life.store.lives = 0, lives
                outlived = await life.do(caller.talk())
            if outlived:
                break
            told = await _live_on(folder, caller, model)
            unknown += any(NOT_KNOWN in output for output in told)
            assert len(tool.asked) <= 1
            assert tool.asked or told[0] == f"ERROR: {NOT_KNOWN}"
            if told[0] == f"ERROR: {NOT_KNOWN}":
                assert told[1:] in ([], [f"ERROR: {NOT_CALLED}"])
    assert outlived
    assert unknown


async def _live_on(folder: Path, caller: Caller, model: Storyteller) -> list[str]:
    """Bring the run to its end with the next server; return the outputs that the model was told."""
    async with next_life(folder, model, private_tools=True) as life:
        caller.client = life.client
        await caller.find(life)
        async with asyncio.timeout(20):
            await caller.talk()
        run = await caller.look()
        assert run.status == "completed", run.last_error
        await check_run(life, run, assistant_texts=[ANSWER])
        assert await Left.by(folder) == (2, 2 * COST)
    return [message["content"] for message in model.requests[-1].messages if message["role"] == "tool"]


class PartCaller(ToolCaller):
    """Gives outputs one by one."""

    async def talk(self) -> None:
        runs = self.client.beta.threads.runs
        if self.run is None:
            self.run = await runs.create(self.thread_id, assistant_id=self.assistant_id)
        while (run := await self.until("requires_action", *OVER)).status == "requires_action":
            assert run.required_action is not None
            call = run.required_action.submit_tool_outputs.tool_calls[0]
            await runs.submit_tool_outputs(
                run.id,
                thread_id=self.thread_id,
                tool_outputs=[{"tool_call_id": call.id, "output": call.function.name}],
                extra_body={"partial": True},
            )


async def test_parts_survive(tmp_path: Path) -> None:
    """Wherever the server dies, outputs that were given in parts are neither lost nor wanted again."""

    def asks_two() -> Saying:
        return calls(("book", {}), ("book", {}), ("book", {}))

    for lives in range(1, ENOUGH):
        async with endpoint() as tool:
            caller, model = PartCaller(tool), Storyteller(asks_two, answers)
            folder = tmp_path / str(lives)
            async with mortal(folder, model, event_flush_ms=60_000) as life:
                assert life.store is not None
                caller.client = life.client
                await caller.prepare()
                life.store.commits, life.store.lives = 0, lives
                outlived = await life.do(caller.talk())
            if outlived:
                return
            assert await _live_on(folder, caller, model) == ["book"] * 3
    pytest.fail("it never outlived its death")


async def test_deadlines_survive(tmp_path: Path) -> None:
    """A call whose caller is gone times out after a restart, by the worker alone."""
    async with endpoint() as tool:
        caller, model = ToolCaller(tool), Storyteller(lambda: calls(("book", {})), answers)
        async with mortal(tmp_path, model) as life:
            caller.client = life.client
            await caller.prepare()
            caller.run = await life.client.beta.threads.runs.create(
                caller.thread_id, assistant_id=caller.assistant_id, extra_query={"tool_timeout_s": 5}
            )
            await caller.until("requires_action")
        later = SetClock()
        later.time += 6
        async with next_life(tmp_path, model, later) as life:
            caller.client = life.client
            run = await caller.until(*OVER)
            assert run.status == "completed"
            await check_run(life, run, assistant_texts=[ANSWER])
