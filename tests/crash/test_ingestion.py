"""The server dies between any two commits while files are indexed, leave, or are put together of parts; whatever
starts next brings rows and index together again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow.contracts import House
from afterglow.testing import ScriptedModels
from tests.crash.lives import PATIENCE_S, PROJECT, Life, mortal, next_life

pytestmark = pytest.mark.slow

TEXT = b"Cats sleep.\nCats purr."
Act = Callable[["Caller"], Awaitable[None]]


class Caller:
    """An app that wants a store with some files, and after a failure first looks what has become of its wish."""

    def __init__(self) -> None:
        self.client: openai.AsyncOpenAI
        self.files: list[str] = []
        self.store_id = ""
        self.parts: list[str] = []
        self.upload_id = ""

    async def prepare(self) -> None:
        for name in ("a.txt", "b.txt"):
            self.files.append((await self.client.files.create(file=(name, TEXT), purpose="assistants")).id)
        self.store_id = (await self.client.vector_stores.create()).id
        uploads = self.client.uploads
        size = len(TEXT)
        self.upload_id = (
            await uploads.create(filename="c", purpose="assistants", bytes=size, mime_type="text/plain")
        ).id
        for half in (TEXT[:10], TEXT[10:]):
            self.parts.append((await uploads.parts.create(self.upload_id, data=half)).id)

    async def attached(self) -> list[str]:
        found = await self.client.vector_stores.files.list(self.store_id, order="asc")
        return [file.id for file in found.data]

    async def until_indexed(self) -> None:
        while (await self.client.vector_stores.retrieve(self.store_id)).status == "in_progress":
            await asyncio.sleep(0.001)

    async def attach(self) -> None:
        """Both files are in the store in the end."""
        have = await self.attached()
        if missing := [file_id for file_id in self.files if file_id not in have]:
            await self.client.vector_stores.file_batches.create(self.store_id, file_ids=missing)
        await self.until_indexed()

    async def attach_and_detach(self) -> None:
        """The first file has been there, and is not any more."""
        await self.attach()
        await self.client.vector_stores.files.delete(self.files[0], vector_store_id=self.store_id)

    async def attach_and_delete(self) -> None:
        """As before, but the file itself is deleted."""
        await self.attach()
        await self.client.files.delete(self.files[0])

    async def attach_and_delete_store(self) -> None:
        await self.attach()
        await self.client.vector_stores.delete(self.store_id)

    async def attach_and_cancel(self) -> None:
        """The files' batch was cancelled; what was done before stays."""
        batch = await self.client.vector_stores.file_batches.create(self.store_id, file_ids=self.files)
        await self.client.vector_stores.file_batches.cancel(batch.id, vector_store_id=self.store_id)
        await self.until_indexed()

    async def complete(self) -> None:
        await self.client.uploads.complete(self.upload_id, part_ids=self.parts)


async def die_after(lives: int, folder: Path, caller: Caller, act: Act) -> int:
    """Let the caller act against a server that dies after `lives` commits; return how many there were."""
    async with mortal(folder, ScriptedModels()) as life:
        assert life.store is not None
        caller.client = life.client
        await caller.prepare()
        life.store.commits = 0
        life.store.lives = lives
        if not await life.do(act(caller)):
            assert life.store.commits == lives
        return life.store.commits


async def check(house: House, caller: Caller) -> None:
    """Rows and index say the same, nothing is left to do, and nothing of what is gone is on the disk."""
    rows = await house.store.read(lambda tx: tx.fetch("SELECT id, status, usage_bytes FROM vector_store_files"))
    completed = {file_id: usage_bytes for file_id, status, usage_bytes in rows if status == "completed"}
    for file_id in caller.files:
        chunks = await house.index.list_chunks(PROJECT, caller.store_id, file_id, -1, 10)
        assert len(chunks) == (2 if file_id in completed else 0), file_id
    assert await house.index.usage_bytes(PROJECT, caller.store_id) == sum(completed.values())
    stores = await house.store.read(
        lambda tx: tx.fetch("SELECT in_progress, completed, failed, cancelled, usage_bytes FROM vector_stores")
    )
    for store in stores:
        counted = [sum(status == name for _, status, _ in rows) for name in ("completed", "failed", "cancelled")]
        assert store == (0, *counted, sum(completed.values()))
    for table in ("index_chores", "loose_blobs"):
        assert await house.store.read(lambda tx, table=table: tx.fetch(f"SELECT * FROM {table}")) == []
    blobs = await house.store.read(
        lambda tx: tx.fetch("SELECT blob FROM files UNION ALL SELECT blob FROM upload_parts")
    )
    folder = Path(house.settings.data, "blobs")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        blob for (blob,) in blobs
    }


async def settled(life: Life) -> None:
    """Wait until the pipeline has nothing to do."""
    async with asyncio.timeout(PATIENCE_S):
        while await life.house.store.read(
            lambda tx: tx.fetch(
                "SELECT id FROM vector_store_files WHERE status = 'in_progress' UNION ALL SELECT id FROM index_chores"
            )
        ):
            await asyncio.sleep(0.001)


async def gone(act: Awaitable[Any]) -> bool:
    """Whether it was done by an earlier life already: it is not there any more, or closed."""
    try:
        await act
    except (openai.NotFoundError, openai.BadRequestError):
        return True
    return False


@pytest.mark.parametrize(
    ("act", "least"),
    [
        (Caller.attach, 4),
        (Caller.attach_and_detach, 6),
        pytest.param(Caller.attach_and_delete, 6, marks=pytest.mark.slow),
        pytest.param(Caller.attach_and_delete_store, 6, marks=pytest.mark.slow),
        pytest.param(Caller.attach_and_cancel, 3, marks=pytest.mark.slow),
        (Caller.complete, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_rows_and_index_agree_wherever_the_server_dies(tmp_path: Path, act: Act, least: int):
    """Stopped after each of its commits in turn, the server that starts next does what was left: no file is indexed
    half or twice, counts are right, and nothing is left of what was taken away."""
    lives = 0
    while True:
        lives += 1
        caller, folder = Caller(), tmp_path / str(lives)
        commits = await die_after(lives, folder, caller, act)
        if commits < lives:
            break
        async with next_life(folder, ScriptedModels()) as life:
            caller.client = life.client
            await settled(life)
            await check(life.house, caller)
            await gone(act(caller))
            await settled(life)
            await check(life.house, caller)
    assert commits >= least


@pytest.mark.parametrize("lives", range(1, 5))
async def test_a_second_death_changes_nothing(tmp_path: Path, lives: int):
    """Nor does a third: the files are indexed in the end, once."""
    caller = Caller()
    await die_after(lives, tmp_path, caller, Caller.attach)
    for _ in range(2):
        async with mortal(tmp_path, ScriptedModels()) as life:
            assert life.store is not None
            caller.client = life.client
            life.store.commits, life.store.lives = 0, lives
            await life.do(settled(life))
    async with next_life(tmp_path, ScriptedModels()) as life:
        caller.client = life.client
        await caller.attach()
        await check(life.house, caller)
        assert await caller.attached() == caller.files
