"""A real `afterglow serve` that is killed, or asked to stop, in the midst of its work; and the one started after it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.beta.threads import Run

from afterglow.contracts import START
from afterglow.rows.events import list_segments
from afterglow.store.sqlite import SqliteStore
from bench import stub
from tests.conftest import GET_WEATHER
from tests.crash.lives import PROJECT, check_log, parse
from tests.e2e.processes import Served, serving

pytestmark = pytest.mark.slow

OVER = ("completed", "failed", "cancelled", "incomplete", "expired")
STREAMS = 20
TOKENS, PER_SECOND = 40, 20
MODEL = stub.model_name(TOKENS, PER_SECOND)
PATIENCE_S = 30


@pytest.fixture
async def model_url() -> AsyncGenerator[str, None]:
    """A model server in this process, which outlives the servers under test."""
    server = await stub.serve("127.0.0.1", 0)
    yield stub.base_url(server)
    server.close()
    await server.wait_closed()


@asynccontextmanager
async def client_of(served: Served) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="test-key", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


class Talk:
    """One thread as its caller knows it: what was acknowledged, and what was streamed of the answer."""

    def __init__(self) -> None:
        self.thread_id = ""
        self.run_id = ""
        self.acknowledged: list[str] = []
        self.streamed = ""

    async def begin(self, client: openai.AsyncOpenAI) -> None:
        self.thread_id = (await client.beta.threads.create()).id
        for number in range(3):
            await self.add(client, f"message {number}")

    async def add(self, client: openai.AsyncOpenAI, text: str) -> None:
        await client.beta.threads.messages.create(self.thread_id, role="user", content=text)
        self.acknowledged.append(text)

    async def add_for_ever(self, client: openai.AsyncOpenAI) -> None:
        while True:
            await self.add(client, f"message {len(self.acknowledged)}")

    async def stream(self, client: openai.AsyncOpenAI, assistant_id: str) -> None:
        stream = await client.beta.threads.runs.create(self.thread_id, assistant_id=assistant_id, stream=True)
        async for event in stream:
            if event.event == "thread.run.created":
                self.run_id = event.data.id
            elif event.event == "thread.message.delta":
                self.streamed += "".join(part.text.value for part in event.data.delta.content)

    async def end(self, client: openai.AsyncOpenAI) -> Run:
        """The run, once it is over."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                run = await client.beta.threads.runs.retrieve(self.run_id, thread_id=self.thread_id)
                if run.status in OVER:
                    return run
                await asyncio.sleep(0.05)

    async def check(self, client: openai.AsyncOpenAI, answers: Sequence[str]) -> None:
        """All that was acknowledged is there, once and in order; so is the answer; and one can go on talking."""
        said: dict[str, list[str]] = {"user": [], "assistant": []}
        async for message in await client.beta.threads.messages.list(self.thread_id, order="asc", limit=100):
            said[message.role].append("".join(part.text.value for part in message.content))
        assert said["assistant"] == list(answers)
        # One more may have been stored, whose answer was cut off.
        assert said["user"][: len(self.acknowledged)] == self.acknowledged
        assert len(said["user"]) <= len(self.acknowledged) + 1
        await self.add(client, "and on")


async def check_logs(folder: Path, talks: Sequence[Talk]) -> None:
    store = SqliteStore(folder / "data" / "afterglow.db", readers=1)
    try:
        for talk in talks:
            segments = await store.read(lambda tx, talk=talk: list_segments(tx, PROJECT, talk.run_id, START))
            check_log(parse(b"".join(segment.data for segment in segments)))
    finally:
        await store.close()


async def streaming(client: openai.AsyncOpenAI, talks: Sequence[Talk]) -> list[asyncio.Task[None]]:
    """Start a streamed run on each thread; return when each has said something."""
    assistant = await client.beta.assistants.create(model=MODEL)
    await asyncio.gather(*(talk.begin(client) for talk in talks))
    tasks = [asyncio.create_task(talk.stream(client, assistant.id)) for talk in talks]
    async with asyncio.timeout(PATIENCE_S):
        while not all(talk.streamed for talk in talks):
            await asyncio.sleep(0.01)
    return tasks


@pytest.mark.parametrize("after_s", [0.0, 0.7, 1.9])
async def test_nothing_is_lost_by_kill_9(tmp_path: Path, model_url: str, after_s: float):
    """While 20 runs stream and messages come in, the server is killed; the next one finishes every run, once, has
    every message that was acknowledged, in order, and no thread is locked."""
    talks, busy = [Talk() for _ in range(STREAMS)], Talk()
    async with serving(tmp_path, "--model-url", model_url) as served, client_of(served) as client:
        await busy.begin(client)
        tasks = await streaming(client, talks)
        tasks.append(asyncio.create_task(busy.add_for_ever(client)))
        await asyncio.sleep(after_s)  # the moment is the point: at the start, midway, near the end
        await served.stop(signal.SIGKILL)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, openai.APIConnectionError | httpx2.TransportError), result
    async with serving(tmp_path, "--model-url", model_url) as served, client_of(served) as client:
        runs = await asyncio.gather(*(talk.end(client) for talk in talks))
        assert [run.status for run in runs] == ["completed"] * STREAMS
        for talk, run in zip(talks, runs, strict=True):
            await talk.check(client, [stub.text_of(TOKENS)])
            assert run.usage is not None
            assert run.usage.completion_tokens == TOKENS
        await busy.check(client, [])
        await check_logs(tmp_path, talks)


async def test_a_run_that_waits_survives_kill_9_as_it_is(tmp_path: Path):
    """A run in requires_action is the same to the byte after a kill, and takes its outputs."""
    async with serving(tmp_path) as served, client_of(served) as client:
        assistant = await client.beta.assistants.create(model="gpt-4o", tools=[GET_WEATHER])
        thread = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}]}
        run = await client.beta.threads.create_and_run_poll(
            assistant_id=assistant.id, thread=thread, poll_interval_ms=20
        )
        assert run.status == "requires_action"
        before = await raw(client, run)
        await served.stop(signal.SIGKILL)
    async with serving(tmp_path) as served, client_of(served) as client:
        assert await raw(client, run) == before
        assert run.required_action is not None
        calls = run.required_action.submit_tool_outputs.tool_calls
        run = await client.beta.threads.runs.submit_tool_outputs_and_poll(
            run_id=run.id,
            thread_id=run.thread_id,
            tool_outputs=[{"tool_call_id": call.id, "output": "It is raining."} for call in calls],
            poll_interval_ms=20,
        )
        assert run.status == "completed"


async def raw(client: openai.AsyncOpenAI, run: Run) -> Any:
    answer = await client.beta.threads.runs.with_raw_response.retrieve(run.id, thread_id=run.thread_id)
    return answer.text


async def test_stopping_is_quick_and_loses_nothing(tmp_path: Path, model_url: str):
    """Asked to stop while runs stream, the server lets go of its clients and ends well within seconds, long before
    the model would; at the next start the runs go on to their ends."""
    talks = [Talk() for _ in range(5)]
    async with serving(tmp_path, "--model-url", model_url) as served, client_of(served) as client:
        tasks = await streaming(client, talks)
        ended = await served.stop(signal.SIGINT, within_s=8)
        assert ended.code == 0, ended.err
        assert "runs in progress go on at the next start" in ended.out
        assert "Traceback" not in ended.err
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(talk.streamed != stub.text_of(TOKENS) for talk in talks)
    async with serving(tmp_path, "--model-url", model_url) as served, client_of(served) as client:
        runs = await asyncio.gather(*(talk.end(client) for talk in talks))
        assert [run.status for run in runs] == ["completed"] * len(talks)
        for talk in talks:
            await talk.check(client, [stub.text_of(TOKENS)])
        await check_logs(tmp_path, talks)


async def test_two_servers_do_not_share_a_folder(tmp_path: Path):
    """A second server on the same folder is refused with the reason; the first one goes on."""
    async with serving(tmp_path) as served, client_of(served) as client:
        with pytest.raises(AssertionError, match="Another Afterglow is already serving"):
            async with serving(tmp_path):
                pass
        await client.beta.threads.create()
