"""What tests of bills share: prices, budgets, and questions that the official client has no method for."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from openai.types.beta.threads import Run
from openai.types.beta.threads.runs import RunStep

from afterglow.contracts import Transaction
from afterglow.objects import Budget, ProjectSettings
from afterglow.settings import ModelSettings
from tests.conftest import Server

GPT = ModelSettings(prompt_price=2.5, cached_price=1.25, completion_price=10.0)


def set_prices(server: Server, **models: ModelSettings) -> None:
    """The prices of models by name, `_` for `-`; without names that of gpt-4o."""
    named = {name.replace("_", "-"): told for name, told in models.items()} or {"gpt-4o": GPT}
    server.house.settings = dataclasses.replace(server.house.settings, models=named)


async def set_budget(server: Server, project: str = "default", **budget: Any) -> None:
    text = msgspec.json.encode(ProjectSettings(budget=Budget(**budget))).decode()

    async def work(tx: Transaction) -> None:
        await tx.execute(
            "INSERT INTO projects (id, created_at, settings) VALUES ($1, 1, $2)"
            " ON CONFLICT (id) DO UPDATE SET settings = excluded.settings",
            project,
            text,
        )

    await server.house.store.write(work)


async def get(server: Server, path: str, **query: Any) -> Any:
    return await server.client.get(path, cast_to=object, options={"params": query})


async def ledger_of(server: Server, run: Run) -> Any:
    return await get(server, f"/threads/{run.thread_id}/runs/{run.id}/ledger")


async def steps_of(server: Server, run: Run) -> list[RunStep]:
    page = await server.client.beta.threads.runs.steps.list(run.id, thread_id=run.thread_id, order="asc")
    return page.data


async def prompt_of(server: Server, run: Run, step: RunStep, **query: Any) -> Any:
    return await get(server, f"/threads/{run.thread_id}/runs/{run.id}/steps/{step.id}/prompt", **query)


async def count_rows(server: Server) -> dict[str, int]:
    """How many rows each table has that a run may write to."""
    tables = ("threads", "messages", "runs", "steps", "events", "requests", "model_calls", "spend", "vector_stores")

    async def look(tx: Transaction) -> dict[str, int]:
        return {table: int((await tx.fetch(f"SELECT COUNT(*) FROM {table}"))[0][0]) for table in tables}

    return await server.house.store.read(look)
