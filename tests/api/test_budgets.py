"""Budgets: a run is stopped before the call that would pass one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai.types.beta.threads import Run

from afterglow.objects import Usage
from afterglow.testing import SetClock, calls, says
from tests.api.money import set_budget, set_prices
from tests.api.wire import until
from tests.conftest import GET_WEATHER, Server, ServerFactory

WEATHER = ("get_weather", {"city": "Oslo"})
USAGE = Usage(prompt_tokens=900, completion_tokens=100, total_tokens=1000)


def limited(**limits: Any) -> dict[str, Any]:
    """Fields of a run with limits of its own."""
    return {"extra_query": limits}


def refused(run: Run) -> str:
    """Why a run was stopped by a budget."""
    assert run.status == "failed"
    assert run.last_error is not None
    assert run.last_error.code == "rate_limit_exceeded"
    return run.last_error.message


async def two_calls(server: Server, **fields: Any) -> Run:
    """A run whose first call takes 1,000 tokens, and which then wants to make another."""
    server.model.scripts = [calls(WEATHER, usage=USAGE), says("Rain.", usage=USAGE)]
    run = await server.run("Weather?", tools=[GET_WEATHER], **fields)
    return await server.submit(run, {"get_weather": "rain"}) if run.status == "requires_action" else run


@pytest.mark.parametrize("limit", [{"max_total_tokens": 1050}, {"max_cost": "0.00335"}])
async def test_a_runs_own_limit(server: Server, limit: dict[str, Any]):
    """A run stops before the call that would pass its limit; what it has spent is in its usage."""
    set_prices(server)  # the first call costs 900 × 2.5 + 100 × 10 per million: 0.00325
    run = await two_calls(server, **limited(**limit))
    why = refused(run)
    assert why.startswith("The budget of this run would be passed: it is ")
    assert ("1000 tokens are spent" in why) or ("0.00325 USD are spent" in why)
    assert run.usage is not None
    assert run.usage.total_tokens == 1000
    assert len(server.model.requests) == 1
    generous = dict.fromkeys(limit, "2000")
    assert (await two_calls(server, **limited(**generous))).status == "completed"


@pytest.mark.parametrize(
    ("budget", "whose"),
    [
        ({"run_tokens": 1050}, "this run"),
        ({"run_cost": 0.00335}, "this run"),
        ({"day_tokens": 1050}, "this project for today (UTC)"),
        ({"day_cost": 0.00335}, "this project for today (UTC)"),
        ({"total_tokens": 1050}, "this project"),
        ({"total_cost": 0.00335}, "this project"),
    ],
)
async def test_the_budget_of_a_project(server: Server, budget: dict[str, Any], whose: str):
    """Budgets of tokens and of money hold for a run, a day and ever."""
    set_prices(server)
    await set_budget(server, **budget)
    assert f"The budget of {whose} would be passed" in refused(await two_calls(server))
    assert len(server.model.requests) == 1
    run = await server.run("word " * 100)
    assert (run.status == "completed") == (whose == "this run")


async def test_a_day_ends(start_server: ServerFactory, tmp_path: Path):
    """A day's budget is there anew at midnight UTC; the total is not."""
    clock = SetClock(86_400 * 20_000 - 10.0)
    async with start_server(tmp_path, clock=clock, run_lease_s=1000) as server:
        await set_budget(server, day_tokens=1100, total_tokens=2050)
        server.model.will(*[says("Hello.", usage=USAGE)] * 3)
        assert (await server.run("One?")).status == "completed"
        assert "for today" in refused(await server.run("word " * 300))
        clock.time += 20
        assert (await server.run("Two?")).status == "completed"
        clock.time += 86_400
        assert "The budget of this project would be passed" in refused(await server.run("word " * 300))


async def test_money_needs_a_price(server: Server):
    """Under a budget of money a model without a price is not called, and the run says what to set."""
    await set_budget(server, day_cost=5)
    assert "The model 'gpt-4o' has no price here" in refused(await server.run("Hello"))
    assert server.model.requests == []


async def test_a_budget_of_nothing(server: Server):
    """A budget of 0 stops every run before its first call."""
    await set_budget(server, run_tokens=0)
    assert "it is 0 tokens, 0 tokens are spent" in refused(await server.run("Hello"))


async def test_calls_at_work_count(server: Server):
    """A call that is still at work counts with its prompt, and is replaced by what it took when it is over."""
    go = asyncio.Event()
    server.model.will([go, *says("First.")], says("Third."))
    assistant = await server.assistant()
    threads = [
        await server.client.beta.threads.create(messages=[{"role": "user", "content": "word " * 360}]) for _ in "abc"
    ]
    await set_budget(server, day_tokens=700)  # a prompt is 504 tokens
    runs = server.client.beta.threads.runs
    first = await runs.create(threads[0].id, assistant_id=assistant.id)
    await until(lambda: server.model.requests)
    second = await runs.create_and_poll(thread_id=threads[1].id, assistant_id=assistant.id, poll_interval_ms=5)
    assert "the calls that are at work and the prompt of the next one take about 1008 tokens" in refused(second)
    go.set()
    assert (await server.poll(first)).status == "completed"  # which took 15
    third = await runs.create_and_poll(thread_id=threads[2].id, assistant_id=assistant.id, poll_interval_ms=5)
    assert third.status == "completed"


async def test_projects_have_budgets_of_their_own(start_server: ServerFactory, tmp_path: Path):
    """What one project spends is nothing to another."""
    async with start_server(tmp_path) as server:
        await set_budget(server, project="other", total_tokens=0)
        assert (await server.run("Hello")).status == "completed"


async def test_what_other_processes_spend_is_seen(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Spending is read anew from time to time; until then, what this process has spent since counts already."""
    budgets = server.application.worker.budgets
    monkeypatch.setattr("afterglow.runs.budgets.REREAD_AFTER", 10**6)  # never
    await set_budget(server, total_tokens=100, day_tokens=100)
    assert (await server.run("One")).status == "completed"
    assert budgets._known["default"].now.today.tokens == 15
    assert budgets._known["default"].spent.today.tokens == 0
    another = "INSERT INTO spend VALUES ('default', $1, 'run_x', 'm', 'USD', 't', 'a', 1, 80, 0, 0, 0, 0, 0)"
    today = int(server.house.clock.now()) // 86_400
    await server.house.store.write(lambda tx: tx.execute(another, today))
    assert (await server.run("Two")).status == "completed"
    monkeypatch.setattr("afterglow.runs.budgets.REREAD_AFTER", 0)
    assert "110 tokens are spent" in refused(await server.run("Three"))
    assert budgets._known["default"].held == {}
