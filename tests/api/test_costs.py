"""`/costs` and `/organization/costs`: what model calls have cost."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from afterglow.contracts import Transaction
from afterglow.objects import Usage
from afterglow.settings import ModelSettings
from afterglow.testing import SetClock, says
from tests.api.money import get, set_prices
from tests.conftest import Server, ServerFactory

USAGE = Usage(prompt_tokens=1000, completion_tokens=100, total_tokens=1100)
DAY = 86_400
NOON = 20_000 * DAY + DAY // 2


def lines(page: Any, *keys: str) -> list[list[Any]]:
    """Of each result the keys asked for, and its amount."""
    return [
        [*(result[key] for key in keys), result["amount"]["decimal"]]
        for bucket in page["data"]
        for result in bucket["results"]
    ]


async def spend(server: Server, thread_id: str | None = None, **fields: Any) -> Any:
    server.model.will(says("Hello.", usage=USAGE))
    return await server.run("Hello", thread_id=thread_id, **fields)


async def read_csv(server: Server, query: str, **headers: str) -> list[dict[str, str]]:
    async with httpx2.AsyncClient(verify=False) as client:
        answer = await client.get(
            f"{server.url}/v1/costs?{query}", headers={"authorization": "Bearer test-key", **headers}
        )
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/csv")
    return list(csv.DictReader(io.StringIO(answer.text)))


async def test_costs_by_everything(start_server: ServerFactory, tmp_path: Path):
    """Costs are told by run, thread, assistant, project, model and day, or all together; the same sum each time."""
    clock = SetClock(NOON)
    async with start_server(tmp_path, clock=clock, run_lease_s=10**6) as server:
        set_prices(server, gpt_4o=ModelSettings(prompt_price=1, completion_price=10), o3=ModelSettings(prompt_price=4))
        first = await spend(server)  # 0.001 + 0.001
        second = await spend(server, thread_id=first.thread_id, model="o3")  # 0.004, and 100 tokens without a price
        clock.time += DAY
        third = await spend(server, model="unknown")
        by: Any = {}
        for group in ("run", "thread", "assistant", "project", "model", "day"):
            by[group] = await get(server, "/costs", group_by=group)
        assert sorted(lines(by["run"], "run_id")) == sorted(
            [[first.id, "0.002"], [second.id, "0.004"], [third.id, "0"]]
        )
        assert sorted(lines(by["thread"], "thread_id")) == sorted([[first.thread_id, "0.006"], [third.thread_id, "0"]])
        assert lines(by["assistant"], "assistant_id") == [[first.assistant_id, "0.006"]]
        assert lines(by["project"], "project_id") == [["default", "0.006"]]
        assert lines(by["model"], "model") == [["gpt-4o", "0.002"], ["o3", "0.004"], ["unknown", "0"]]
        buckets = [(bucket["start_time"], bucket["end_time"]) for bucket in by["day"]["data"]]
        assert buckets == [(20_000 * DAY, 20_001 * DAY), (20_001 * DAY, 20_002 * DAY)]
        assert lines(by["day"]) == [["0.006"], ["0"]]
        [[result]] = [bucket["results"] for bucket in (await get(server, "/costs"))["data"]]
        assert result["amount"] == {"value": 0.006, "currency": "usd", "decimal": "0.006"}
        assert [result[key] for key in ("calls", "prompt_tokens", "completion_tokens")] == [3, 3000, 300]
        assert result["unpriced_tokens"] == 100 + 1100
        both = await get(server, "/costs", group_by="model,day")
        assert lines(both, "line_item") == [["gpt-4o", "0.002"], ["o3", "0.004"], ["unknown", "0"]]
        assert len(both["data"]) == 2


async def test_costs_of_a_time(start_server: ServerFactory, tmp_path: Path):
    """`start_time` and `end_time` choose days, the one of the start and those that begin before the end."""
    clock = SetClock(NOON)
    async with start_server(tmp_path, clock=clock, run_lease_s=10**6) as server:
        set_prices(server)
        for _ in range(3):
            await spend(server)
            clock.time += DAY
        for query, days in (
            ({}, 3),
            ({"start_time": NOON + DAY}, 2),
            ({"end_time": 20_001 * DAY}, 1),
            ({"start_time": 20_001 * DAY, "end_time": 20_002 * DAY}, 1),
            ({"start_time": 20_001 * DAY, "end_time": 20_001 * DAY + 1}, 1),
            ({"start_time": 20_009 * DAY}, 0),
        ):
            page = await get(server, "/costs", group_by="day", **query)
            assert len(page["data"]) == days, query


async def test_costs_by_metadata(server: Server):
    """One key of the runs' metadata tells costs apart; a run without it counts for its thread's."""
    set_prices(server)
    await spend(server, metadata={"customer": "ada", "team": "x"})
    await spend(server, metadata={"customer": "bob"})
    await spend(server, metadata={"customer": "ada"})
    thread = await server.client.beta.threads.create(metadata={"customer": "bob"})
    await spend(server, thread_id=thread.id)
    await spend(server)
    page = await get(server, "/costs", group_by="metadata.customer")
    assert lines(page, "metadata") == [[None, "0.0035"], ["ada", "0.007"], ["bob", "0.007"]]


async def test_a_bill_outlives_its_thread(server: Server):
    """The costs of a deleted thread stay, by their ids; the metadata goes with the thread."""
    set_prices(server)
    run = await spend(server, metadata={"customer": "ada"})
    await server.client.beta.threads.delete(run.thread_id)
    assert lines(await get(server, "/costs", group_by="run"), "run_id") == [[run.id, "0.0035"]]
    assert lines(await get(server, "/costs", group_by="metadata.customer"), "metadata") == [[None, "0.0035"]]


async def test_prices_of_the_time(server: Server):
    """A price that changes later changes nothing about what was spent before."""
    set_prices(server)
    run = await spend(server)
    set_prices(server, gpt_4o=ModelSettings(prompt_price=100, completion_price=100))
    assert lines(await get(server, "/costs")) == [["0.0035"]]
    ledger = await get(server, f"/threads/{run.thread_id}/runs/{run.id}/ledger")
    assert ledger["total"]["cost"]["decimal"] == "0.0035"


async def test_pages_of_costs(server: Server):
    """`limit` and `page` walk through a bill, each line once."""
    set_prices(server)
    runs = sorted([(await spend(server)).id for _ in range(5)])
    found: list[Any] = []
    query: dict[str, Any] = {"group_by": "run", "limit": 2}
    for _ in range(3):
        page = await get(server, "/costs", **query)
        found += [line[0] for line in lines(page, "run_id")]
        query["page"] = page["next_page"]
    assert found == runs
    assert (page["has_more"], page["next_page"]) == (False, None)


async def test_costs_as_csv(server: Server, monkeypatch: pytest.MonkeyPatch):
    """As CSV, by `format` or by `Accept`, a bill comes whole, with exact amounts and dates."""
    monkeypatch.setattr("afterglow.bills.CSV_LINES", 2)
    set_prices(server)
    for customer in ("ada", "=cmd()", "eve", "zoe", ""):
        await spend(server, metadata={"customer": customer})
    rows = await read_csv(server, "group_by=metadata.customer&format=csv")
    assert [row["metadata.customer"] for row in rows] == ["", "'=cmd()", "ada", "eve", "zoe"]
    assert {row["cost"] for row in rows} == {"0.0035"}
    [row] = await read_csv(server, "group_by=model&group_by=day", accept="text/csv")
    assert row["model"] == "gpt-4o"
    assert len(row["date"]) == 10
    assert row["calls"] == "5"


async def test_what_is_wrong_with_a_question(server: Server):
    """What cannot be read of a question is a 400 that names it."""
    for query, param in (
        ({"group_by": "colour"}, "group_by"),
        ({"group_by": "metadata."}, "group_by"),
        ({"group_by": "metadata.a,metadata.b"}, "group_by"),
        ({"group_by": "metadata.\0"}, "group_by"),
        ({"start_time": "yesterday"}, "start_time"),
        ({"end_time": str(10**30)}, "end_time"),
        ({"limit": "0"}, "limit"),
        ({"format": "xml"}, "format"),
        ({"bucket_width": "1m"}, "bucket_width"),
        ({"page": "zz"}, "page"),
        ({"page": "5b315d"}, "page"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await get(server, "/costs", **query)
        assert refused.value.param == param, query


async def test_one_project_sees_its_own(start_server: ServerFactory, tmp_path: Path):
    """/costs is of the caller's project alone; /organization/costs of all, as the SDK's own method reads it."""
    async with start_server(tmp_path) as server:
        set_prices(server)
        await spend(server)

        async def of_another(tx: Transaction) -> None:
            await tx.execute(
                "INSERT INTO spend SELECT 'other', day, run_id, model, currency, thread_id, assistant_id, calls,"
                " prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, cost, unpriced_tokens FROM spend"
            )

        await server.house.store.write(of_another)
        assert lines(await get(server, "/costs", group_by="project"), "project_id") == [["default", "0.0035"]]
        usage = server.client.copy(admin_api_key="test-key").admin.organization.usage
        found = await usage.costs(start_time=0, group_by=["project_id", "line_item"], limit=10)
    [bucket] = found.data
    results: Any = bucket.results
    assert [(one.project_id, one.line_item, one.amount.value) for one in results] == [
        ("default", "gpt-4o", 0.0035),
        ("other", "gpt-4o", 0.0035),
    ]
