"""The whole server on a temporary folder and a free port, with a scripted model and the official client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from openai.types.beta import Assistant
from openai.types.beta.threads import Run

from afterglow.app import Application, database_path, open_application
from afterglow.connection import connections
from afterglow.contracts import Store
from afterglow.settings import Settings, load
from afterglow.store.sqlite import SqliteStore, migrate
from afterglow.testing import ScriptedEngine, ScriptedModels, ScriptedParser
from tests.postgres import FolderDatabases, close_shared_postgres
from tests.twice import TwiceStore

GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Server:
    """A running server. model: what answers its runs. code: what runs its code. parser: what reads files of vector
    stores. client: the official client, without retries."""

    def __init__(self, application: Application, model: ScriptedModels, code: Any, parser: Any, url: str) -> None:
        self.application = application
        self.house = application.house
        self.model = model
        self.code = code
        self.parser = parser
        self.url = url
        no_certificates = openai.DefaultAsyncHttpxClient(verify=False)  # reading them takes longer than most tests
        self.client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="test-key", max_retries=0, http_client=no_certificates
        )
        self._assistant: Assistant | None = None

    async def assistant(self, **fields: Any) -> Assistant:
        """An assistant; without fields always the same one."""
        if fields or self._assistant is None:
            made = await self.client.beta.assistants.create(**{"model": "gpt-4o", **fields})
            if fields:
                return made
            self._assistant = made
        return self._assistant

    async def run(self, text: str, *, thread_id: str | None = None, tools: Any = None, **fields: Any) -> Run:
        """Say `text` on a thread (a new one, unless named), run the assistant, and poll until the run stops."""
        if thread_id is None:
            thread_id = (await self.client.beta.threads.create()).id
        await self.client.beta.threads.messages.create(thread_id, role="user", content=text)
        if "assistant_id" not in fields:
            fields["assistant_id"] = (await self.assistant()).id
        if tools is not None:
            fields["tools"] = tools
        return await self.client.beta.threads.runs.create_and_poll(thread_id=thread_id, poll_interval_ms=5, **fields)

    async def poll(self, run: Run) -> Run:
        """Wait until the run stops."""
        return await self.client.beta.threads.runs.poll(run.id, thread_id=run.thread_id, poll_interval_ms=5)

    async def submit(self, run: Run, outputs: dict[str, str]) -> Run:
        """Answer the waiting calls by function name, and poll until the run stops again."""
        assert run.required_action is not None
        calls = run.required_action.submit_tool_outputs.tool_calls
        return await self.client.beta.threads.runs.submit_tool_outputs_and_poll(
            run_id=run.id,
            thread_id=run.thread_id,
            tool_outputs=[{"tool_call_id": call.id, "output": outputs[call.function.name]} for call in calls],
            poll_interval_ms=5,
        )

    async def last_text(self, thread_id: str) -> str:
        """The text of the thread's newest message."""
        newest = (await self.client.beta.threads.messages.list(thread_id, limit=1)).data[0]
        return "".join(part.text.value for part in newest.content if part.type == "text")


class _PromptServer(uvicorn.Server):
    """Ends without uvicorn's fixed wait of 100 ms."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for closable in (*self.servers, *(sockets or [])):
            closable.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        async with asyncio.timeout(10):
            while self.server_state.connections or self.server_state.tasks:
                await asyncio.sleep(0.001)


# Which database the servers of these tests have; `--database` says so.
_database = "sqlite"
_databases = FolderDatabases()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--database",
        choices=["sqlite", "twice", "postgres"],
        default="sqlite",
        help="what servers of the tests store in; twice: SQLite, and whatever writes is run twice",
    )


def pytest_configure(config: pytest.Config) -> None:
    global _database
    _database = config.getoption("--database")


def pytest_unconfigure() -> None:
    close_shared_postgres()


@pytest.fixture
def on_sqlite() -> None:
    """For tests of what one process alone does with one folder."""
    if _database == "postgres":
        pytest.skip("it is about SQLite and a folder")


@pytest.fixture(autouse=True)
async def _no_database_is_left() -> AsyncGenerator[None, None]:
    yield
    await _databases.drop()


async def _chosen_url(folder: Path) -> str:
    """The setting `database_url`, as `--database` says."""
    return await _databases.url(str(folder)) if _database == "postgres" else ""


@functools.cache
def _empty_database() -> bytes:
    """SQLite's file with our schema: making one takes longer than most tests."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        migrate(connection)
        return connection.serialize()


def _lay_out(settings: Settings) -> None:
    """Have the database of a folder that is empty, or not there yet."""
    path = database_path(settings)
    if settings.database_url:
        return
    with contextlib.suppress(OSError):  # the server says what is wrong with the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        if not any(path.parent.iterdir()):
            path.write_bytes(_empty_database())


def _open_store(settings: Settings) -> Store | None:
    """The store that `--database` asks for; None lets the application choose."""
    if _database != "twice":
        return None
    Path(settings.data).mkdir(parents=True, exist_ok=True)
    return TwiceStore(SqliteStore(database_path(settings)))


ServerFactory = Callable[..., AbstractAsyncContextManager[Server]]


@asynccontextmanager
async def running_server(
    folder: Path, clock: Any = None, code_engine: Any = None, parser: Any = None, embedder: Any = None, **settings: Any
) -> AsyncGenerator[Server, None]:
    """A server on `folder`; start it again on the same folder to see what survives. code_engine, parser: in place of
    the scripted ones. embedder: there is none otherwise."""
    settings = {"data": str(folder), "database_url": await _chosen_url(folder), **settings}
    loaded: Settings = load(settings, environ={})
    _lay_out(loaded)
    model, code, parser = ScriptedModels(), code_engine or ScriptedEngine(), parser or ScriptedParser()
    async with open_application(
        loaded,
        models=model,
        clock=clock,
        code_engine=code,
        parser=parser,
        embedder=embedder,
        store=_open_store(loaded),
    ) as application:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)  # uvloop does it; asyncio would wait 40 ms
        config = uvicorn.Config(
            application,
            loop="none",
            http=connections(loaded),
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            proxy_headers=False,
        )
        config.load()
        uvicorn_server = _PromptServer(config)
        uvicorn_server.lifespan = config.lifespan_class(config)
        await uvicorn_server.startup([listening])
        server = Server(application, model, code, parser, f"http://127.0.0.1:{listening.getsockname()[1]}")
        try:
            yield server
        finally:
            await server.client.close()
            await application.end_streams()
            await uvicorn_server.shutdown([listening])


@pytest.fixture
def start_server() -> ServerFactory:
    """Start servers by hand: `async with start_server(folder, clock=…, run_expires_s=…) as server`."""
    return running_server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncGenerator[Server, None]:
    async with running_server(tmp_path / "data") as running:
        yield running
