"""Waiting in one process for what another does, on one Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from afterglow.app import Application, open_application
from afterglow.contracts import TextDelta
from afterglow.events import postgres
from afterglow.settings import load
from afterglow.testing import ScriptedEngine, ScriptedModels, ScriptedParser, says
from tests.api.streams import HEADERS, PATIENCE_S
from tests.postgres import fresh_database

pytestmark = pytest.mark.slow


class Apart:
    """An API process and a worker. model, parser: the worker's. ask: asks the API process."""

    def __init__(self, api: Application, model: ScriptedModels, parser: ScriptedParser) -> None:
        self.api = api
        self.model = model
        self.parser = parser
        transport = httpx2.ASGITransport(app=api)
        self.client = httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1/v1", headers=HEADERS, timeout=PATIENCE_S
        )

    async def ask(self, method: str, path: str, **sent: Any) -> Any:
        answer = await self.client.request(method, path, **sent)
        assert answer.status_code == 200, answer.text
        return answer.json() if "json" in answer.headers["content-type"] else answer.content

    async def run(self) -> str:
        """The path of a new run."""
        assistant = await self.ask("POST", "/assistants", json={"model": "gpt-4o"})
        run = await self.ask("POST", "/threads/runs", json={"assistant_id": assistant["id"]})
        return f"/threads/{run['thread_id']}/runs/{run['id']}"

    async def waiting(self, path: str) -> asyncio.Task[Any]:
        """A poll of it, held."""
        task = asyncio.create_task(self.ask("GET", f"{path}?wait=60"))
        async with asyncio.timeout(PATIENCE_S):
            while not self.api.house.metrics.held_polls._value.get():
                await asyncio.sleep(0.005)
        return task


@pytest.fixture
async def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Apart, None]:
    monkeypatch.setattr(postgres, "POLL_S", 60)  # words alone
    model, parser = ScriptedModels(), ScriptedParser()
    async with fresh_database() as url:
        settings = load({"data": str(tmp_path), "database_url": url, "shared_data": True}, environ={})
        async with (
            open_application(settings, part="api", models=ScriptedModels(), parser=ScriptedParser()) as api,
            open_application(
                settings, part="worker", models=model, parser=parser, code_engine=ScriptedEngine()
            ) as worker,
        ):
            for application in (api, worker):
                await application.house.events._notifier.connected()  # type: ignore[attr-defined]
            opened = Apart(api, model, parser)
            yield opened
            await opened.client.aclose()


async def test_a_run_that_another_process_executes(apart: Apart) -> None:
    """Its end is heard of by word; and its events, followed here, are those that were written there."""
    go = asyncio.Event()
    apart.model.will([TextDelta("Once"), go, *says("done.")])
    path = await apart.run()
    poll = await apart.waiting(path)
    events = asyncio.create_task(apart.ask("GET", f"{path}/events"))
    go.set()
    assert (await poll)["status"] == "completed"
    assert (await events).endswith(b"event: done\ndata: [DONE]\n\n")
    assert await apart.ask("GET", f"{path}/events") == await events


async def test_a_run_whose_cancel_another_process_hears(apart: Apart) -> None:
    """Who waits for the run sees its last status."""
    apart.model.will([TextDelta("Once"), asyncio.Event()])
    path = await apart.run()
    poll = await apart.waiting(path)
    await apart.ask("POST", f"{path}/cancel")
    assert (await poll)["status"] == "cancelled"


async def test_a_file_that_another_process_indexes(apart: Apart) -> None:
    """Its end, and that of its batch, is heard of by word."""
    go = apart.parser.holds["cats.txt"] = asyncio.Event()
    file = await apart.ask("POST", "/files", files={"file": ("cats.txt", b"Cats.")}, data={"purpose": "assistants"})
    store = await apart.ask("POST", "/vector_stores", json={})
    path = f"/vector_stores/{store['id']}"
    batch = await apart.ask("POST", f"{path}/file_batches", json={"file_ids": [file["id"]]})
    poll = await apart.waiting(f"{path}/files/{file['id']}")
    of_batch = asyncio.create_task(apart.ask("GET", f"{path}/file_batches/{batch['id']}?wait=60"))
    go.set()
    assert (await poll)["status"] == "completed"
    assert (await of_batch)["status"] == "completed"
