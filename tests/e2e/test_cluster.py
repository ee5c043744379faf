"""Several real processes on one Postgres and one object store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.processes import Served, environment, run, serving, working
from tests.e2e.talking_model import TalkingModel
from tests.objects import fresh_bucket
from tests.postgres import fresh_database, programs

pytestmark = pytest.mark.slow

KEY = "sk-story"


@asynccontextmanager
async def balanced(servers: Sequence[Served]) -> AsyncGenerator[str, None]:
    """A load balancer that knows nothing: each connection goes to the next server. Gives its base URL."""
    ports = itertools.cycle([urlsplit(served.url).port for served in servers])

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", next(ports))
        await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer))

    listening = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    finally:
        listening.close()


@asynccontextmanager
async def cluster(folder: Path, database: str, bucket: dict[str, str]) -> AsyncGenerator[str, None]:
    """Two API processes and two workers, each with a folder of its own, behind a balancer. Gives its base URL."""
    async with AsyncExitStack() as opened:
        model = await opened.enter_async_context(TalkingModel())
        env = environment(
            AFTERGLOW_DATABASE_URL=database,
            AFTERGLOW_MODEL_URL=model.url,
            AFTERGLOW_DEFAULT_MODEL="talker",
            AFTERGLOW_API_KEYS=KEY,
            AFTERGLOW_KEEP_ALIVE_S="0.01",
            AFTERGLOW_POLL_AFTER_MS="20",
            **bucket,
        )
        folders = [folder / name for name in ("api-1", "api-2", "worker-1", "worker-2")]
        for place in folders:
            place.mkdir()
        servers = [await opened.enter_async_context(serving(place, "--no-worker", env=env)) for place in folders[:2]]
        for place in folders[2:]:
            await opened.enter_async_context(working(place, env))
        yield await opened.enter_async_context(balanced(servers))


def settings_of_a_bucket() -> dict[str, str]:
    bucket = fresh_bucket()
    options = ",".join(f"{name}={value}" for name, value in bucket.options.items())
    return {"AFTERGLOW_BLOB_URL": bucket.url, "AFTERGLOW_BLOB_OPTIONS": options}


async def test_a_whole_app_on_many_processes(tmp_path: Path):
    """What apps do with the official client works unmodified when each connection meets another process, and each run
    another worker."""
    async with fresh_database(migrated=False) as database, cluster(tmp_path, database, settings_of_a_bucket()) as url:
        script = Path(__file__).parent / "client_story.py"
        ended = await run(sys.executable, "-W", "ignore::DeprecationWarning", script, url, KEY)
        assert ended.code == 0, ended.err
        assert ended.out.count("came to its end") == 2


async def test_a_dump_holds_everything_but_bytes(tmp_path: Path):
    """What `pg_dump` has saved, `pg_restore` brings back, to the byte; with the same bucket the app goes on."""
    bucket, dump = settings_of_a_bucket(), tmp_path / "afterglow.dump"
    async with fresh_database(migrated=False) as database:
        (tmp_path / "before").mkdir()
        async with (
            cluster(tmp_path / "before", database, bucket) as url,
            openai.AsyncOpenAI(base_url=url, api_key=KEY) as api,
        ):
            store = await api.vector_stores.create()
            leave = ("leave.md", b"Everyone has 30 days of leave a year.")
            file = await api.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=leave)
            thread = await api.beta.threads.create(messages=[{"role": "user", "content": "Count."}])
            assistant = await api.beta.assistants.create(model="gpt-4o")
            done = await api.beta.threads.runs.create_and_poll(thread_id=thread.id, assistant_id=assistant.id)
            saved = await run(programs() / "pg_dump", "--format=custom", f"--file={dump}", database)
            assert saved.code == 0, saved.err
    async with fresh_database(migrated=False) as database:
        restored = await run(programs() / "pg_restore", "--no-owner", f"--dbname={database}", dump)
        assert restored.code == 0, restored.err
        (tmp_path / "after").mkdir()
        async with (
            cluster(tmp_path / "after", database, bucket) as url,
            openai.AsyncOpenAI(base_url=url, api_key=KEY) as api,
        ):
            assert await api.beta.threads.runs.retrieve(done.id, thread_id=thread.id) == done
            assert (await api.files.content(file.id)).content == leave[1]
            found = await api.vector_stores.search(store.id, query="days of leave")
            assert [hit.file_id for hit in found.data] == [file.id]
            again = await api.beta.threads.runs.create_and_poll(thread_id=thread.id, assistant_id=assistant.id)
            assert again.status == "completed"
