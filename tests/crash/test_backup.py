"""Backups by a process of their own, beside a server under load; and backups that are killed."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from afterglow.backup import CHECKSUMS
from tests.e2e.processes import afterglow, run, serving

pytestmark = pytest.mark.slow

# Ends the process when everything has been copied, but for the last steps.
KILLED = """
import os, signal, sys
from afterglow import backup, cli
backup.os.sync = lambda: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(cli.main(sys.argv[1:]))
"""


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=url, api_key="test-key", max_retries=0)


def content_of(name: str, size: int) -> bytes:
    return (f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n".encode() * (size // 60 + 1))[:size]


async def live(client: openai.AsyncOpenAI, store_id: str, number: int) -> None:
    """Upload, index and delete until cancelled."""
    sizes: Iterator[int] = itertools.cycle([100, 5_000, 400_000])
    for turn, size in zip(itertools.count(), sizes, strict=False):
        name = f"{number}-{turn}-{size}.txt"
        file = await client.files.create(file=(name, content_of(name, size)), purpose="assistants")
        await client.vector_stores.files.create(store_id, file_id=file.id)
        await client.beta.threads.create(messages=[{"role": "user", "content": name}])
        if turn % 2:
            await client.files.delete(file.id)


async def check(client: openai.AsyncOpenAI) -> int:
    """Every file has its bytes, and every completed file of a store is found in it; return how many files there are."""
    names: dict[str, str] = {}
    async for file in client.files.list():
        names[file.id] = file.filename
        size = int(file.filename.removesuffix(".txt").split("-")[2])
        assert (await client.files.content(file.id)).content == content_of(file.filename, size)
    async for store in client.vector_stores.list():
        async with asyncio.timeout(60):
            while (await client.vector_stores.retrieve(store.id)).status == "in_progress":
                await asyncio.sleep(0.1)
        async for attached in client.vector_stores.files.list(store.id):
            assert attached.status == "completed", attached.last_error
            word = hashlib.sha256(names[attached.id].encode()).hexdigest()
            hits = await client.vector_stores.search(store.id, query=word, max_num_results=1)
            assert [hit.filename for hit in hits.data] == [names[attached.id]]
    return len(names)


async def test_backups_beside_a_server_under_load(tmp_path: Path):
    """Backups of a folder that a server is writing to end well; each, restored and served, is whole, and no older than
    its start."""
    async with serving(tmp_path) as served, client_of(served.url) as client:
        store = await client.vector_stores.create(name="busy")
        lives = [asyncio.create_task(live(client, store.id, number)) for number in range(4)]
        kept: list[int] = []
        for number in range(3):
            await asyncio.sleep(0.5)
            kept.append(len((await client.files.list()).data))
            ended = await afterglow("backup", tmp_path / f"copy-{number}", "--data", tmp_path / "data")
            assert ended.code == 0, ended.err
        assert not any(life.done() for life in lives)
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
    for number, count in enumerate(kept):
        folder = tmp_path / f"again-{number}"
        folder.mkdir()
        ended = await afterglow("restore", tmp_path / f"copy-{number}", "--data", folder / "data")
        assert ended.code == 0, ended.err
        async with serving(folder) as served, client_of(served.url) as client:
            # Each life may have deleted one file between the count and the moment of the backup.
            assert await check(client) >= count - 4


async def test_a_killed_backup_does_not_count(tmp_path: Path):
    """A backup that is killed when all but its last steps are done is not restored, and the next one takes its
    place."""
    async with serving(tmp_path) as served, client_of(served.url) as client:
        store = await client.vector_stores.create(name="quiet")
        name = "0-0-5000.txt"
        file = await client.files.create(file=(name, content_of(name, 5000)), purpose="assistants")
        await client.vector_stores.files.create_and_poll(file.id, vector_store_id=store.id)
        words = ("backup", tmp_path / "copy", "--data", tmp_path / "data")
        ended = await run(sys.executable, "-c", KILLED, *words)
        assert ended.code == -signal.SIGKILL
        assert not (tmp_path / "copy" / CHECKSUMS).exists()
        again = tmp_path / "again"
        again.mkdir()
        refused = await afterglow("restore", tmp_path / "copy", "--data", again / "data")
        assert (refused.code, refused.out) == (1, "")
        assert "holds no whole backup" in refused.err
        assert list(again.iterdir()) == []
        again_made = await afterglow(*words)
        assert (again_made.code, "anew" in again_made.out) == (0, False)
    killed = await run(sys.executable, "-c", KILLED, "restore", tmp_path / "copy", "--data", again / "data")
    assert killed.code == -signal.SIGKILL
    assert (await afterglow("restore", tmp_path / "copy", "--data", again / "data")).code == 0
    async with serving(again) as served, client_of(served.url) as client:
        assert await check(client) == 1
