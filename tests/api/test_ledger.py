"""`…/ledger`: where the tokens of runs went."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from afterglow.contracts import ModelEnd, ModelInfo, TextDelta
from afterglow.errors import ModelBroke
from afterglow.objects import CompletionTokensDetails, PromptTokenDetails, Run, Usage
from afterglow.rows.runs import insert_finished_run
from afterglow.testing import calls, ended, says
from tests.api.money import get, ledger_of, set_prices, steps_of
from tests.api.wire import until
from tests.conftest import GET_WEATHER, Server, ServerFactory

USAGE = Usage(
    prompt_tokens=1200,
    completion_tokens=50,
    total_tokens=1250,
    prompt_token_details=PromptTokenDetails(1000),
    completion_tokens_details=CompletionTokensDetails(30),
)
WEATHER = ("get_weather", {"city": "Oslo"})
PARTS = [
    "instructions",
    "tool_schemas",
    "response_format",
    "history",
    "retrieved_chunks",
    "tool_results",
    "images",
    "remainder",
]


def check(ledger: Any, run: Any) -> None:
    """Every line adds up, and all of them to the run's usage."""
    for line in (*ledger["data"], ledger["total"]):
        assert list(line["prompt"]) == PARTS
        assert sum(line["prompt"].values()) == line["usage"]["prompt_tokens"]
        assert sum(line["completion"].values()) == line["usage"]["completion_tokens"]
    assert ledger["total"]["usage"]["prompt_tokens"] == run.usage.prompt_tokens
    assert ledger["total"]["usage"]["completion_tokens"] == run.usage.completion_tokens
    assert ledger["total"]["usage"]["total_tokens"] == run.usage.total_tokens
    if ledger["unrecorded"] is None:
        assert sum(line["usage"]["total_tokens"] for line in ledger["data"]) == run.usage.total_tokens


async def test_a_ledger_of_two_calls(server: Server):
    """A run's ledger has a line for each call of the model, by parts, with what was cached, thought and paid."""
    set_prices(server)
    server.model.will(calls(WEATHER, usage=USAGE), says("Rain.", usage=USAGE))
    run = await server.run("Weather?", tools=[GET_WEATHER], instructions="Be brief.")
    run = await server.submit(run, {"get_weather": "rain " * 100})
    ledger = await ledger_of(server, run)
    check(ledger, run)
    first, second = ledger["data"]
    assert first["prompt"]["tool_results"] == 0
    assert second["prompt"]["tool_results"] > 100
    assert first["prompt"]["instructions"] == second["prompt"]["instructions"] > 0
    assert first["prompt"]["tool_schemas"] > 0
    assert [line["cached_tokens"] for line in (first, second, ledger["total"])] == [1000, 1000, 2000]
    assert first["completion"] == {"output": 20, "reasoning": 30}
    # 200 × 2.5 + 1000 × 1.25 + 50 × 10, per million
    assert first["cost"] == {"value": 0.00225, "currency": "usd", "decimal": "0.00225"}
    assert ledger["total"]["cost"]["decimal"] == "0.0045"
    assert not first["estimated"]


async def test_the_ledger_of_a_step(server: Server):
    """A step's ledger is that of its call, and the step's usage; text before calls counts with the calls."""
    server.model.will([TextDelta("Let me look."), *calls(WEATHER, usage=USAGE)], says("Rain."))
    run = await server.run("Weather?", tools=[GET_WEATHER])
    run = await server.submit(run, {"get_weather": "rain"})
    for step in await steps_of(server, run):
        ledger = await get(server, f"/threads/{run.thread_id}/runs/{run.id}/steps/{step.id}/ledger")
        assert ledger["step_id"] == step.id
        check(ledger, step)


async def test_what_is_not_reported_is_estimated(server: Server):
    """Of a server that reports no usage the ledger shows our estimate, and says that it is one."""
    server.model.will([TextDelta("Hello."), ModelEnd(finish_reason="stop")])
    run = await server.run("Hello", instructions="Be brief.")
    ledger = await ledger_of(server, run)
    check(ledger, run)
    assert ledger["total"]["estimated"]
    assert ledger["data"][0]["prompt"]["remainder"] == 0


async def test_calls_that_break_count_nothing(server: Server):
    """A call that failed is in the ledger with what was sent, and adds nothing to the run's usage."""
    server.model.will([TextDelta("Hel"), ModelBroke("no more")])
    run = await server.run("Hello")
    assert run.status == "failed"
    ledger = await ledger_of(server, run)
    check(ledger, run)
    [line] = ledger["data"]
    assert line["finish_reason"] == "interrupted"
    assert line["prompt"]["remainder"] == -line["prompt"]["history"] < 0


async def test_a_cancelled_run_adds_up(server: Server):
    """A run that was stopped in a call adds up like any other."""
    never = asyncio.Event()
    server.model.will(calls(WEATHER, usage=USAGE), [TextDelta("It is "), never])
    run = await server.run("Weather?", tools=[GET_WEATHER])
    runs = server.client.beta.threads.runs
    assert run.required_action is not None
    [call] = run.required_action.submit_tool_outputs.tool_calls
    outputs: Any = [{"tool_call_id": call.id, "output": "rain"}]
    await runs.submit_tool_outputs(run.id, thread_id=run.thread_id, tool_outputs=outputs)
    await until(lambda: len(server.model.requests) == 2)
    await runs.cancel(run.id, thread_id=run.thread_id)
    run = await server.poll(run)
    assert run.status == "cancelled"
    ledger = await ledger_of(server, run)
    check(ledger, run)
    assert len(ledger["data"]) == 2


async def test_several_attempts_add_up(start_server: ServerFactory, tmp_path: Path):
    """After a restart in the middle of a call the ledger of the run still is its usage."""
    never = asyncio.Event()
    async with start_server(tmp_path) as server:
        server.model.will(calls(WEATHER, usage=USAGE), [TextDelta("It is "), never])
        run = await server.run("Weather?", tools=[GET_WEATHER])
        assert run.required_action is not None
        [call] = run.required_action.submit_tool_outputs.tool_calls
        outputs: Any = [{"tool_call_id": call.id, "output": "rain"}]
        await server.client.beta.threads.runs.submit_tool_outputs(run.id, thread_id=run.thread_id, tool_outputs=outputs)
        await until(lambda: len(server.model.requests) == 2)
    async with start_server(tmp_path) as server:
        server.model.will(says("Rain.", usage=USAGE))
        run = await server.poll(run)
        ledger = await ledger_of(server, run)
    check(ledger, run)
    assert len({line["attempt"] for line in ledger["data"]}) > 1


async def test_an_imported_run_adds_up(server: Server):
    """Of a run that was over elsewhere, the whole usage is stated as unrecorded."""
    thread = await server.client.beta.threads.create()
    usage = Usage(prompt_tokens=40, completion_tokens=2, total_tokens=42)
    run = Run(id="run_old", created_at=1, assistant_id="asst_1", thread_id=thread.id, model="gpt-4", usage=usage)
    run.status = "completed"
    await server.house.store.write(lambda tx: insert_finished_run(tx, "default", run, 1))
    shown = await server.client.beta.threads.runs.retrieve("run_old", thread_id=thread.id)
    ledger = await ledger_of(server, shown)
    check(ledger, shown)
    assert ledger["data"] == []
    assert ledger["unrecorded"] == ledger["total"]["usage"] == msgspec.to_builtins(usage)


async def test_images_have_a_part(server: Server):
    """The images of a prompt are told apart from its words."""
    picture: Any = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}
    words: Any = {"type": "text", "text": "What is this?"}
    server.model.info_of_all = ModelInfo(window_tokens=8192, vision=True)
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": [words, picture]}])
    server.model.will([*says("A cat.")[:-1], ended("stop", USAGE)])
    run = await server.client.beta.threads.runs.create_and_poll(
        thread_id=thread.id, assistant_id=(await server.assistant()).id, poll_interval_ms=5
    )
    assert (await ledger_of(server, run))["total"]["prompt"]["images"] == 85


async def test_ledgers_of_nothing(server: Server):
    """Threads, runs and steps that are not there are not found, each by its own name."""
    run = await server.run("Hello")
    base = f"/threads/{run.thread_id}/runs"
    for path, missing in (
        ("/threads/thread_none/runs/run_none/ledger", "thread"),
        (f"{base}/run_none/ledger", "run"),
        (f"{base}/{run.id}/steps/step_none/ledger", "run step"),
        (f"{base}/{run.id}/steps/step_none/prompt", "run step"),
        (f"{base}/run_none/steps/step_none/prompt", "run"),
    ):
        with pytest.raises(openai.NotFoundError, match=f"No {missing} found"):
            await get(server, path)
