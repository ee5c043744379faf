"""Where everything meets: the routes, and the choice of implementations. Nothing else picks either."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import cached_property
from pathlib import Path

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from afterglow.access import Access, check_exposure
from afterglow.api import about, assistants, files, inspection, runs, threads, uploads, vector_stores
from afterglow.api import models as models_api
from afterglow.api.description import describe
from afterglow.api.edge import Edge
from afterglow.contracts import ChatModels, Clock, CodeEngine, Embedder, House, SearchIndex, Store, Transaction
from afterglow.declared import declare_assistants
from afterglow.embeddings import EmbeddingServer
from afterglow.errors import ConfigError, NotFound, StoreError
from afterglow.events.local import LocalEvents
from afterglow.files import sweep_blobs
from afterglow.ingest.parse import Parsers
from afterglow.ingest.pipeline import Parser, Pipeline
from afterglow.llm import Models
from afterglow.offline import OfflineModel
from afterglow.outbound import GuardedFetcher
from afterglow.queue.local import LocalQueue
from afterglow.rows.requests import mark_answered
from afterglow.rows.runs import release_leases
from afterglow.rows.vector_store_files import release_jobs
from afterglow.runs.worker import Worker
from afterglow.sandbox.choice import FirstOf
from afterglow.sandbox.docker import DockerEngine
from afterglow.sandbox.local import NativeEngine
from afterglow.sandbox.off import NoEngine
from afterglow.search.embedded import EmbeddedIndex
from afterglow.settings import Settings
from afterglow.store.blobs import LocalBlobs
from afterglow.store.sqlite import SqliteStore
from afterglow.telemetry import log

STORE = "/vector_stores/{vector_store_id}"
# (method, path below /v1, what answers it)
ROUTES = [
    ("POST", "/assistants", assistants.create_assistant),
    ("GET", "/assistants", assistants.list_assistants),
    ("GET", "/assistants/{assistant_id}", assistants.retrieve_assistant),
    ("POST", "/assistants/{assistant_id}", assistants.modify_assistant),
    ("DELETE", "/assistants/{assistant_id}", assistants.delete_assistant),
    ("POST", "/threads", threads.create_thread),
    ("GET", "/threads", threads.list_threads),
    ("POST", "/threads/runs", runs.create_thread_and_run),
    ("GET", "/threads/{thread_id}", threads.retrieve_thread),
    ("POST", "/threads/{thread_id}", threads.modify_thread),
    ("DELETE", "/threads/{thread_id}", threads.delete_thread),
    ("POST", "/threads/{thread_id}/messages", threads.create_message),
    ("GET", "/threads/{thread_id}/messages", threads.list_messages),
    ("GET", "/threads/{thread_id}/messages/{message_id}", threads.retrieve_message),
    ("POST", "/threads/{thread_id}/messages/{message_id}", threads.modify_message),
    ("DELETE", "/threads/{thread_id}/messages/{message_id}", threads.delete_message),
    ("GET", "/threads/{thread_id}/messages/{message_id}/citations", inspection.list_citations),
    ("POST", "/threads/{thread_id}/runs", runs.create_run),
    ("GET", "/threads/{thread_id}/runs", runs.list_runs),
    ("GET", "/threads/{thread_id}/runs/{run_id}", runs.retrieve_run),
    ("POST", "/threads/{thread_id}/runs/{run_id}", runs.modify_run),
    ("POST", "/threads/{thread_id}/runs/{run_id}/cancel", runs.cancel_run),
    ("POST", "/threads/{thread_id}/runs/{run_id}/submit_tool_outputs", runs.submit_tool_outputs),
    ("GET", "/threads/{thread_id}/runs/{run_id}/steps", runs.list_run_steps),
    ("GET", "/threads/{thread_id}/runs/{run_id}/steps/{step_id}", runs.retrieve_run_step),
    ("POST", "/files", files.create_file),
    ("GET", "/files", files.list_files),
    ("GET", "/files/{file_id}", files.retrieve_file),
    ("DELETE", "/files/{file_id}", files.delete_file),
    ("GET", "/files/{file_id}/content", files.retrieve_file_content),
    ("POST", "/uploads", uploads.create_upload),
    ("POST", "/uploads/{upload_id}/parts", uploads.create_upload_part),
    ("POST", "/uploads/{upload_id}/complete", uploads.complete_upload),
    ("POST", "/uploads/{upload_id}/cancel", uploads.cancel_upload),
    ("POST", "/vector_stores", vector_stores.create_vector_store),
    ("GET", "/vector_stores", vector_stores.list_vector_stores),
    ("GET", STORE, vector_stores.retrieve_vector_store),
    ("POST", STORE, vector_stores.modify_vector_store),
    ("DELETE", STORE, vector_stores.delete_vector_store),
    ("POST", f"{STORE}/search", vector_stores.search_vector_store),
    ("POST", f"{STORE}/explain", inspection.explain_search),
    ("POST", f"{STORE}/files", vector_stores.create_vector_store_file),
    ("GET", f"{STORE}/files", vector_stores.list_vector_store_files),
    ("GET", f"{STORE}/files/{{file_id}}", vector_stores.retrieve_vector_store_file),
    ("POST", f"{STORE}/files/{{file_id}}", vector_stores.modify_vector_store_file),
    ("DELETE", f"{STORE}/files/{{file_id}}", vector_stores.delete_vector_store_file),
    ("GET", f"{STORE}/files/{{file_id}}/content", vector_stores.retrieve_vector_store_file_content),
    ("GET", f"{STORE}/files/{{file_id}}/chunks", inspection.list_chunks),
    ("POST", f"{STORE}/file_batches", vector_stores.create_file_batch),
    ("GET", f"{STORE}/file_batches/{{batch_id}}", vector_stores.retrieve_file_batch),
    ("POST", f"{STORE}/file_batches/{{batch_id}}/cancel", vector_stores.cancel_file_batch),
    ("GET", f"{STORE}/file_batches/{{batch_id}}/files", vector_stores.list_files_of_batch),
    ("GET", "/models", models_api.list_models),
    ("GET", "/models/{model:path}", models_api.retrieve_model),
    ("DELETE", "/models/{model:path}", models_api.delete_model),
]
OPEN_ROUTES = [
    ("GET", "/healthz", about.healthz),
    ("GET", "/readyz", about.readyz),
    ("GET", "/openapi.json", about.openapi),
]
FORWARDED_METHODS = ["GET", "POST", "DELETE"]
PREFIXES = ("/v1", "/openai/v1", "/openai")  # Azure clients leave the version to ?api-version=

ANSWERED_FLUSH_S = 1.0
CODE_OFF = ("The setting code_interpreter is off.", "Set it to `auto`.")
CORS_EXPOSED = ["x-request-id", "openai-poll-after-ms", "openai-processing-ms"]


class _Clock:
    """The system's time, never running backwards."""

    def __init__(self) -> None:
        self._latest = 0.0

    def now(self) -> float:
        self._latest = max(self._latest, time.time())
        return self._latest


class DataFolder:
    """The data folder, locked: two servers on it would execute everything twice."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when it cannot be made, written or locked."""
        make_data_folder(path)
        try:
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"Another Afterglow is already serving the data folder {path}.") from None
        except OSError as error:
            raise ConfigError(f"The data folder {path} cannot be locked: {error.strerror}. Use a local disk.") from None

    def close(self) -> None:
        os.close(self._lock)


def make_data_folder(path: Path) -> None:
    """Make the folder, for its owner alone. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(path, 0o700)
    except OSError as error:
        raise ConfigError(f"The data folder {path} cannot be used: {error.strerror}.") from None


def database_path(settings: Settings) -> Path:
    return Path(settings.data) / "afterglow.db"


def blobs_path(settings: Settings) -> Path:
    return Path(settings.data) / "blobs"


def search_path(settings: Settings) -> Path:
    return Path(settings.data) / "search"


def build_models(settings: Settings) -> Models:
    """The model servers of the settings, or the offline model when there are none. Raises ConfigError."""
    return Models(settings, offline=OfflineModel())


def build_code_engine(settings: Settings) -> CodeEngine:
    """What runs model-written Python, as `code_interpreter` says; not started yet."""
    engines: dict[str, Callable[[], CodeEngine]] = {
        "auto": lambda: FirstOf([NativeEngine(settings), DockerEngine(settings)]),
        "native": lambda: NativeEngine(settings),
        "docker": lambda: DockerEngine(settings),
        "off": lambda: NoEngine(*CODE_OFF),
    }
    return engines[settings.code_interpreter]()


def build_embedder(settings: Settings) -> Embedder | None:
    """The server of embeddings, if the settings name one. Raises ConfigError."""
    return EmbeddingServer(settings) if settings.embedding_url else None


def build_index(settings: Settings) -> SearchIndex:
    """The search files of the data folder. Another process may be using them."""
    return EmbeddedIndex(search_path(settings))


def build_parser(settings: Settings) -> Parser:
    """What reads documents; no process is started before the first one."""
    return Parsers(settings.ingest_files, settings.parse_timeout_s, settings.parse_memory_mb)


@contextlib.asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[Store]:
    """The data folder's database alone, also beside a running server. Raises ConfigError or StoreError."""
    make_data_folder(Path(settings.data))
    store = SqliteStore(database_path(settings), readers=1)
    try:
        yield store
    finally:
        await store.close()


class Application:
    """The whole server as one ASGI application. `start` before the first request, `close` after the last."""

    def __init__(self, settings: Settings, house: House, worker: Worker, pipeline: Pipeline, access: Access) -> None:
        self.house = house
        self.worker = worker
        self.pipeline = pipeline
        self._answered: list[tuple[str, str]] = []
        self._marking: asyncio.Task[None] | None = None
        router = Router(_routes(), redirect_slashes=False, default=_no_route)
        self._app: ASGIApp = Edge(_Routed(router), house, access, self._note_answered, settings.root_path)
        if settings.allowed_origins:
            self._app = CORSMiddleware(
                self._app,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=CORS_EXPOSED,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def start(self) -> None:
        self.house.code_engine.start()
        await self.worker.start()
        await self.pipeline.start()
        self._marking = asyncio.create_task(self._mark_forever())

    def _note_answered(self, project: str, request_id: str) -> None:
        self._answered.append((project, request_id))

    async def _mark_forever(self) -> None:
        while True:
            await asyncio.sleep(ANSWERED_FLUSH_S)
            await self._mark()

    async def _mark(self) -> None:
        if not self._answered:
            return
        answered, self._answered = self._answered, []

        async def work(tx: Transaction) -> None:
            await mark_answered(tx, answered)

        with contextlib.suppress(StoreError):  # a mark that is missing costs a retry its match, nothing more
            await self.house.store.write(work)

    async def end_streams(self) -> None:
        """Let go of everyone who waits, so that connections can be closed."""
        await self.house.events.close()

    async def close(self) -> None:
        await self.worker.close()
        await self.pipeline.close()
        await self.house.code_engine.close()
        await self.house.events.close()
        if self._marking is not None:
            self._marking.cancel()
        await self._mark()
        await self.house.models.close()
        await self.house.images.close()
        if self.house.embedder is not None:
            await self.house.embedder.close()
        await self.house.index.close()
        await self.house.blobs.close()
        await self.house.store.close()


class _Routed:
    """Routing, with what `request.app` needs to offer."""

    def __init__(self, router: Router) -> None:
        self._router = router

    @cached_property
    def openapi(self) -> bytes:
        return describe([(method, f"/v1{path}", act) for method, path, act in ROUTES] + OPEN_ROUTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._router(scope, receive, send)


def _routes() -> list[BaseRoute]:
    routes: list[BaseRoute] = [Route(path, act, methods=[method]) for method, path, act in OPEN_ROUTES]
    for prefix in PREFIXES:
        routes += [Route(prefix + path, act, methods=[method]) for method, path, act in ROUTES]
        routes += [Route(prefix + path, models_api.forward, methods=FORWARDED_METHODS) for path in models_api.FORWARDED]
    routes.append(Route("/openai/deployments/{deployment}/{rest:path}", models_api.forward, methods=FORWARDED_METHODS))
    return routes


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound(f"Invalid URL ({scope['method']} {scope['path']})")


@contextlib.asynccontextmanager
async def open_application(
    settings: Settings,
    *,
    models: ChatModels | None = None,
    clock: Clock | None = None,
    code_engine: CodeEngine | None = None,
    parser: Parser | None = None,
    embedder: Embedder | None = None,
) -> AsyncIterator[Application]:
    """Build the laptop shape: everything in this process, on SQLite and a folder.

    models, clock, code_engine, parser, embedder: in place of the real ones, for tests. Raises ConfigError, with the
    way out, for whatever is wrong before the first request.
    """
    folder = DataFolder(Path(settings.data))
    try:
        application = await _build(
            settings, models or build_models(settings), clock or _Clock(), code_engine, parser, embedder
        )
        await application.start()
        try:
            yield application
        finally:
            await application.close()
    finally:
        folder.close()


async def _build(
    settings: Settings,
    models: ChatModels,
    clock: Clock,
    code_engine: CodeEngine | None,
    parser: Parser | None = None,
    embedder: Embedder | None = None,
) -> Application:
    store = SqliteStore(database_path(settings))
    await check_exposure(settings, store)
    events = LocalEvents(store, clock, flush_ms=settings.event_flush_ms, keep_alive_s=settings.keep_alive_s)
    house = House(
        settings=settings,
        clock=clock,
        store=store,
        events=events,
        queue=LocalQueue(),
        models=models,
        images=GuardedFetcher(allow_private=settings.private_images),
        blobs=LocalBlobs(blobs_path(settings)),
        code_engine=code_engine or build_code_engine(settings),
        ingest_queue=LocalQueue(),
        index=build_index(settings),
        embedder=embedder or build_embedder(settings),
    )
    events.start()
    # Nobody else can be at work on this folder: whatever was in progress may be taken over at once.
    if left := await store.write(release_leases):
        log.warning("%d runs were in progress when the server last stopped; they go on now.", left)
    if left := await store.write(release_jobs):
        log.warning("%d files were being indexed when the server last stopped; they are indexed now.", left)
    await sweep_blobs(house, math.inf)
    if settings.assistants:
        await declare_assistants(house, settings.assistants)
    pipeline = Pipeline(house, parser or build_parser(settings))
    return Application(settings, house, Worker(house), pipeline, Access(settings, store, clock))
