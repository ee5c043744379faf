"""The server dies between any two commits of a run; whatever starts next brings the run to its end, well and once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import openai
import pytest
from openai.types.beta.threads import Run

from afterglow.testing import Saying, calls, says
from tests.conftest import GET_WEATHER
from tests.crash.lives import PATIENCE_S, Left, Life, Storyteller, check_run, mortal, next_life

pytestmark = pytest.mark.slow

OVER = ("completed", "failed", "cancelled", "incomplete", "expired")
COST = 15  # tokens of one scripted call
ANSWER = "It is raining in Oslo and in Bergen, and nobody there minds at all."
Act = Callable[["Caller"], Awaitable[None]]


def asks_one() -> Saying:
    return calls(("get_weather", {"city": "Oslo"}))


def asks_two() -> Saying:
    return calls(("get_weather", {"city": "Bergen"}), ("get_weather", {"city": "Voss"}))


def talks_and_asks() -> Saying:
    return [*says("Let me see.")[:-1], *asks_one()]


def answers() -> Saying:
    return says(ANSWER)


class Caller:
    """An app that talks to whichever server is alive, and after a failure first looks what has become of its run."""

    def __init__(self) -> None:
        self.client: openai.AsyncOpenAI
        self.thread_id = ""
        self.assistant_id = ""
        self.run: Run | None = None
        self.cancelled = False

    async def prepare(self) -> None:
        beta = self.client.beta
        self.assistant_id = (await beta.assistants.create(model="m", tools=[GET_WEATHER])).id
        self.thread_id = (await beta.threads.create()).id
        await beta.threads.messages.create(self.thread_id, role="user", content="How is the weather?")

    async def find(self, life: Life) -> None:
        """Learn what became of a request that was never answered."""
        found = await life.house.store.read(lambda tx: tx.fetch("SELECT thread_id, id FROM runs"))
        assert len(found) <= 1
        for thread_id, run_id in found:
            self.thread_id = thread_id
            self.run = await self.client.beta.threads.runs.retrieve(run_id, thread_id=thread_id)

    async def look(self) -> Run:
        assert self.run is not None
        self.run = await self.client.beta.threads.runs.retrieve(self.run.id, thread_id=self.thread_id)
        return self.run

    async def until(self, *statuses: str) -> Run:
        while (await self.look()).status not in statuses:
            await asyncio.sleep(0.001)
        assert self.run is not None
        return self.run

    async def talk(self) -> None:
        """Run the assistant, answer its calls, and stay until the end."""
        runs = self.client.beta.threads.runs
        if self.run is None:
            self.run = await runs.create(self.thread_id, assistant_id=self.assistant_id)
        while (run := await self.until("requires_action", *OVER)).status == "requires_action":
            assert run.required_action is not None
            waiting = run.required_action.submit_tool_outputs.tool_calls
            outputs = [{"tool_call_id": call.id, "output": "rain"} for call in waiting]
            self.run = await runs.submit_tool_outputs(run.id, thread_id=self.thread_id, tool_outputs=outputs)

    async def talk_on_a_new_thread(self) -> None:
        """As `talk`, with thread and run made in one request."""
        if self.run is None:
            thread = {"messages": [{"role": "user", "content": "How is the weather?"}]}
            self.run = await self.client.beta.threads.create_and_run(assistant_id=self.assistant_id, thread=thread)
            self.thread_id = self.run.thread_id
        await self.talk()

    async def cancel(self) -> None:
        """Run the assistant, and cancel the run while the model is silent."""
        runs = self.client.beta.threads.runs
        self.run = await runs.create(self.thread_id, assistant_id=self.assistant_id)
        while not (await runs.steps.list(self.run.id, thread_id=self.thread_id)).data:
            await asyncio.sleep(0.001)
        await runs.cancel(self.run.id, thread_id=self.thread_id)
        self.cancelled = True
        await self.until(*OVER)


async def die_after(
    lives: int,
    folder: Path,
    caller: Caller,
    model: Storyteller,
    act: Callable[[], Awaitable[None]],
    flush_ms: int = 60_000,
) -> int:
    """Let the caller act against a server that dies after `lives` commits; return how many there were. What was
    finished before is not done again."""
    finished = (await Left.by(folder)).calls if caller.assistant_id else 0
    before = len(model.told)
    async with mortal(folder, model, event_flush_ms=flush_ms) as life:
        assert life.store is not None
        caller.client = life.client
        await (caller.find(life) if caller.assistant_id else caller.prepare())
        life.store.commits = 0
        life.store.lives = lives
        if not await life.do(act()):
            assert life.store.commits == lives
        while life.application.worker.running and not life.store.dead.is_set():
            await asyncio.sleep(0.001)  # the caller may see a commit before it is counted
        assert model.told[before:] == list(range(finished, finished + len(model.told) - before))
        return life.store.commits


async def live_on(folder: Path, caller: Caller, model: Storyteller, act: Callable[[], Awaitable[None]]) -> None:
    """Start anew, find the run, and go on to its end; then everything must be as if nothing had happened."""
    finished = await Left.by(folder)
    before = len(model.told)
    async with next_life(folder, model) as life:
        caller.client = life.client
        await caller.find(life)
        async with asyncio.timeout(PATIENCE_S):
            await act()
        run = await caller.look()
        assert run.status == "completed", run.last_error
        # What was finished is not done again, everything else is, once, and nothing unfinished is in its prompt.
        assert model.told[before:] == list(range(finished.calls, len(model.story)))
        for part, request in zip(model.told, model.requests, strict=True):
            assert request.messages == model.requests[model.told.index(part)].messages
        said = ["Let me see."] if talks_and_asks in model.story else []
        await check_run(life, run, assistant_texts=[*said, ANSWER])
        assert await Left.by(folder) == (len(model.story), COST * len(model.story))
        assert run.usage is not None
        assert run.usage.total_tokens == COST * len(model.story)


STORIES: dict[str, Sequence[Callable[[], Saying]]] = {
    "text": [answers],
    "functions": [asks_one, asks_two, answers],
    "text and functions": [talks_and_asks, asks_two, answers],
}
COMMITS = {"text": 4, "functions": 12, "text and functions": 13}


@pytest.mark.parametrize(
    ("story", "act", "flush_ms"),
    [
        ("text", "talk", 60_000),
        pytest.param("text", "talk", 1, marks=pytest.mark.slow),
        ("text", "talk_on_a_new_thread", 60_000),
        ("functions", "talk", 60_000),
        pytest.param("functions", "talk", 1, marks=pytest.mark.slow),
        pytest.param("text and functions", "talk", 60_000, marks=pytest.mark.slow),
        pytest.param("text and functions", "talk", 1, marks=pytest.mark.slow),
    ],
)
async def test_a_run_ends_once_wherever_the_server_dies(tmp_path: Path, story: str, act: str, flush_ms: int):
    """Stopped after each of its commits in turn, a run is finished by the next server: no model call that was
    finished is made again, each message is there once, log and usage add up, and the thread is free."""
    lives = 0
    while True:
        lives += 1
        caller, model = Caller(), Storyteller(*STORIES[story], pause_s=0.002 if flush_ms == 1 else 0)
        folder = tmp_path / str(lives)
        commits = await die_after(lives, folder, caller, model, getattr(caller, act), flush_ms)
        if commits < lives:
            break
        await live_on(folder, caller, model, getattr(caller, act))
    assert commits >= COMMITS[story]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, COMMITS["functions"] + 1))
async def test_a_run_ends_once_however_often_the_server_dies(tmp_path: Path, first: int):
    """A second death, after each commit of the second life in turn, changes nothing of that; nor does a third."""
    second = 0
    while True:
        second += 1
        caller, model = Caller(), Storyteller(*STORIES["functions"])
        folder = tmp_path / str(second)
        await die_after(first, folder, caller, model, caller.talk)
        if await die_after(second, folder, caller, model, caller.talk) < second:
            break
        await die_after(2, folder, caller, model, caller.talk)
        await live_on(folder, caller, model, caller.talk)


@pytest.mark.parametrize("flush_ms", [60_000, 1])
async def test_a_cancel_ends_the_run_wherever_the_server_dies(tmp_path: Path, flush_ms: int):
    """A run whose cancel was stored is cancelled, one whose cancel was not is finished; never neither."""
    lives = 0
    while True:
        lives += 1
        silence = asyncio.Event()
        caller, model = Caller(), Storyteller(lambda: [*says("It is")[:-1], silence, *says("raining.")])  # noqa: B023
        folder = tmp_path / str(lives)
        commits = await die_after(lives, folder, caller, model, caller.cancel, flush_ms)
        if commits < lives:
            break
        asked = caller.cancelled
        silence.set()
        async with next_life(folder, model) as life:
            caller.client = life.client
            await caller.find(life)
            if caller.run is None:
                continue
            run = await caller.until(*OVER)
            assert run.status == "cancelled" or (run.status == "completed" and not asked)
            await check_run(life, run, assistant_texts=None if run.status == "cancelled" else ["It israining."])
    assert commits >= 5
