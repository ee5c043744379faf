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
from typing import Any, Literal

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from afterglow.access import Access, check_exposure
from afterglow.api import (
    about,
    assistants,
    bills,
    files,
    finding,
    inspection,
    organization,
    runs,
    threads,
    uploads,
    vector_stores,
    webhooks,
)
from afterglow.api import models as models_api
from afterglow.api.attempts import Attempts
from afterglow.api.description import describe
from afterglow.api.edge import METRICS_PATH, Edge
from afterglow.api.idempotency import once
from afterglow.contracts import (
    Blobs,
    ChatModels,
    Clock,
    CodeEngine,
    Embedder,
    House,
    McpServers,
    SearchIndex,
    Store,
    Traces,
)
from afterglow.declared import declare_assistants
from afterglow.deliveries import Deliveries
from afterglow.embeddings import EmbeddingServer
from afterglow.errors import AfterglowError, ConfigError, NotFound, StoreError
from afterglow.events.local import LocalEvents
from afterglow.files import sweep_blobs, tidy_files
from afterglow.ingest.parse import Parsers
from afterglow.ingest.pipeline import Parser, Pipeline
from afterglow.limits import Limiter
from afterglow.llm import Models
from afterglow.metrics import Metrics
from afterglow.offline import OfflineModel
from afterglow.outbound import GuardedClient, GuardedFetcher
from afterglow.queue.local import LocalQueue
from afterglow.quotas import share_rates
from afterglow.rows.moves import unfinished_move
from afterglow.rows.runs import release_leases
from afterglow.rows.vector_store_files import release_jobs
from afterglow.rows.webhooks import release_deliveries
from afterglow.runs.worker import Worker
from afterglow.sandbox.choice import FirstOf
from afterglow.sandbox.docker import DockerEngine
from afterglow.sandbox.local import NativeEngine
from afterglow.sandbox.off import NoEngine
from afterglow.sandbox.remote import RemoteEngine
from afterglow.search.embedded import EmbeddedIndex
from afterglow.settings import Settings
from afterglow.store.blobs import LocalBlobs, check_data_folder
from afterglow.store.locks import LocalLocks
from afterglow.store.run_memory import LocalRunMemory
from afterglow.store.sqlite import READERS, SqliteStore
from afterglow.telemetry import log
from afterglow.threads import gone_event

Part = Literal["all", "api", "worker"]
STORE = "/vector_stores/{vector_store_id}"
ENDPOINT = "/webhook_endpoints/{endpoint_id}"
PROJECT = "/organization/projects/{project_id}"
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
    ("GET", "/messages", finding.search_messages),
    ("GET", "/runs", finding.list_project_runs),
    ("POST", "/threads/{thread_id}/runs", runs.create_run),
    ("GET", "/threads/{thread_id}/runs", runs.list_runs),
    ("GET", "/threads/{thread_id}/runs/{run_id}", runs.retrieve_run),
    ("GET", "/threads/{thread_id}/runs/{run_id}/events", runs.follow_run_events),
    ("POST", "/threads/{thread_id}/runs/{run_id}", runs.modify_run),
    ("POST", "/threads/{thread_id}/runs/{run_id}/cancel", runs.cancel_run),
    ("POST", "/threads/{thread_id}/runs/{run_id}/submit_tool_outputs", runs.submit_tool_outputs),
    ("GET", "/threads/{thread_id}/runs/{run_id}/steps", runs.list_run_steps),
    ("GET", "/threads/{thread_id}/runs/{run_id}/steps/{step_id}", runs.retrieve_run_step),
    ("GET", "/threads/{thread_id}/runs/{run_id}/ledger", bills.retrieve_run_ledger),
    ("GET", "/threads/{thread_id}/runs/{run_id}/steps/{step_id}/ledger", bills.retrieve_run_step_ledger),
    ("GET", "/threads/{thread_id}/runs/{run_id}/steps/{step_id}/prompt", bills.retrieve_run_step_prompt),
    ("GET", "/costs", bills.retrieve_costs),
    ("GET", "/organization/costs", bills.retrieve_organization_costs),
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
    ("POST", "/webhook_endpoints", webhooks.create_webhook_endpoint),
    ("GET", "/webhook_endpoints", webhooks.list_webhook_endpoints),
    ("GET", ENDPOINT, webhooks.retrieve_webhook_endpoint),
    ("POST", ENDPOINT, webhooks.modify_webhook_endpoint),
    ("DELETE", ENDPOINT, webhooks.delete_webhook_endpoint),
    ("POST", f"{ENDPOINT}/rotate_secret", webhooks.rotate_webhook_secret),
    ("POST", f"{ENDPOINT}/test", webhooks.test_webhook_endpoint),
    ("GET", f"{ENDPOINT}/deliveries", webhooks.list_webhook_deliveries),
    ("GET", f"{ENDPOINT}/deliveries/{{delivery_id}}", webhooks.retrieve_webhook_delivery),
    ("POST", f"{ENDPOINT}/deliveries/{{delivery_id}}/resend", webhooks.resend_webhook_delivery),
    ("GET", "/webhook_event_types", webhooks.list_webhook_event_types),
    ("GET", "/organization/projects", organization.list_projects),
    ("POST", "/organization/projects", organization.create_project),
    ("GET", PROJECT, organization.retrieve_project),
    ("POST", PROJECT, organization.modify_project),
    ("POST", f"{PROJECT}/archive", organization.archive_project),
    ("GET", f"{PROJECT}/api_keys", organization.list_keys),
    ("POST", f"{PROJECT}/api_keys", organization.create_key),
    ("GET", f"{PROJECT}/api_keys/{{key_id}}", organization.retrieve_key),
    ("POST", f"{PROJECT}/api_keys/{{key_id}}", organization.modify_key),
    ("DELETE", f"{PROJECT}/api_keys/{{key_id}}", organization.delete_key),
    ("GET", "/organization/audit_logs", organization.list_audit_logs),
    ("GET", "/models", models_api.list_models),
    ("GET", "/models/{model:path}", models_api.retrieve_model),
    ("DELETE", "/models/{model:path}", models_api.delete_model),
]
OPEN_ROUTES = [
    ("GET", "/healthz", about.healthz),
    ("GET", "/readyz", about.readyz),
    ("GET", "/openapi.json", about.openapi),
]
METHODS = ["GET", "POST", "DELETE"]
PREFIXES = ("/v1", "/openai/v1", "/openai")  # Azure clients leave the version to ?api-version=

ANSWERED_FLUSH_S = 1.0
FOLDER_NOTED_EVERY_S = 3600
CLUSTER_FLUSH_MS = 20  # others read streamed text from the database
CODE_ELSEWHERE = ("Code is run by the workers.", "")
CODE_OFF = ("The setting code_interpreter is off.", "Set it to `auto`.")
CORS_EXPOSED = [  # what SDKs and apps read
    *("x-request-id", "openai-poll-after-ms", "openai-processing-ms", "openai-version", "openai-organization"),
    *("idempotent-replayed", "preference-applied"),
    *("retry-after", "retry-after-ms", "x-should-retry", "content-disposition", "content-range"),
    *(f"x-ratelimit-{part}-{what}" for what in ("requests", "tokens") for part in ("limit", "remaining", "reset")),
]


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
        "remote": lambda: RemoteEngine(settings),
        "off": lambda: NoEngine(*CODE_OFF),
    }
    return engines[settings.code_interpreter]()


def build_embedder(settings: Settings) -> Embedder | None:
    """The server of embeddings, if the settings name one. Raises ConfigError."""
    return EmbeddingServer(settings) if settings.embedding_url else None


def build_traces(settings: Settings) -> Traces | None:
    """Where traces of runs go, if the settings say so. Raises ConfigError."""
    if not settings.trace_url:
        return None
    try:
        from afterglow.traces import OtlpTraces
    except ModuleNotFoundError:
        raise ConfigError("trace_url needs OpenTelemetry. Install it: pip install 'afterglow[otel]'") from None
    return OtlpTraces(settings.trace_url)


def build_mcp(settings: Settings, outbound: GuardedClient) -> McpServers | None:
    """The MCP servers that may be asked, if the settings name or allow any. Raises ConfigError."""
    if not settings.mcp and not settings.mcp_server_urls:
        return None
    try:
        from afterglow.mcp_servers import McpSessions
    except ModuleNotFoundError:
        raise ConfigError("MCP servers need its client. Install it: pip install 'afterglow[mcp]'") from None
    return McpSessions(settings, outbound)


def build_index(settings: Settings) -> SearchIndex:
    """The search files of the data folder. Another process may be using them."""
    return EmbeddedIndex(search_path(settings))


def build_parser(settings: Settings) -> Parser:
    """What reads documents; no process is started before the first one."""
    return Parsers(settings.ingest_files, settings.parse_timeout_s, settings.parse_memory_mb)


@contextlib.asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[Store]:
    """The database alone, also beside running servers. Raises ConfigError or StoreError."""
    store = await _open_store(settings, sqlite_readers=1)
    try:
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def open_place(settings: Settings) -> AsyncIterator[tuple[Store, Blobs, SearchIndex]]:
    """Everything that is kept: rows, bytes and index. Raises ConfigError or StoreError."""
    async with contextlib.AsyncExitStack() as opened:
        store = await _open_store(settings)
        opened.push_async_callback(store.close)
        yield store, await _open_blobs(settings, opened), await _open_index(settings, opened)


async def _open_store(
    settings: Settings, *, sqlite_readers: int = READERS, run_memory: LocalRunMemory | None = None
) -> Store:
    if settings.database_url:
        from afterglow.store.postgres import PostgresStore

        return await PostgresStore.open(
            settings.database_url,
            connections=settings.database_connections,
            pooled=bool(settings.database_listen_url),
            silence_s=settings.run_lease_s / 2,
        )
    make_data_folder(Path(settings.data))
    return SqliteStore(database_path(settings), readers=sqlite_readers, run_memory=run_memory)


async def _open_blobs(settings: Settings, opened: contextlib.AsyncExitStack) -> Blobs:
    if settings.blob_url:
        from afterglow.store.object_blobs import ObjectBlobs

        objects = ObjectBlobs(settings.blob_url, settings.blob_options)
        await objects.check()
        blobs: Blobs = objects
    else:
        make_data_folder(Path(settings.data))
        blobs = LocalBlobs(blobs_path(settings))
    opened.push_async_callback(blobs.close)
    return blobs


async def _open_index(settings: Settings, opened: contextlib.AsyncExitStack) -> SearchIndex:
    if not settings.database_url:
        index = build_index(settings)
    else:
        from afterglow.search.postgres import PostgresIndex

        connections = max(2, settings.database_connections // 3)
        pooled = bool(settings.database_listen_url)
        index = await PostgresIndex.open(settings.database_url, connections=connections, pooled=pooled)
    opened.push_async_callback(index.close)
    return index


class Application:
    """The whole server as one ASGI application. `start` before the first request, `close` after the last."""

    def __init__(self, settings: Settings, house: House, worker: Worker, pipeline: Pipeline, access: Access) -> None:
        self.house = house
        self.worker = worker
        self.pipeline = pipeline
        self.deliveries = Deliveries(house)
        self._access = access
        self._attempts = Attempts()
        self._tasks: list[asyncio.Task[None]] = []
        router = Router(_routes(), redirect_slashes=False, default=_no_route)
        self._routed = _Routed(router)
        self._app: ASGIApp = Edge(self._routed, house, access, self._attempts, settings.root_path)
        if settings.allowed_origins:
            self._app = CORSMiddleware(
                self._app,
                allow_origins=list(settings.allowed_origins),
                allow_methods=METHODS,
                allow_headers=["*"],  # those that a preflight asks for are named in its answer
                expose_headers=CORS_EXPOSED,
                allow_private_network=True,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def start(self, *, work: bool) -> None:
        """work: execute runs and index files, too."""
        self.house.code_engine.start()
        if work:
            await self.worker.start()
            await self.pipeline.start()
            await self.deliveries.start()
        self._tasks = [asyncio.create_task(self._mark_forever()), asyncio.create_task(self._note_folder_forever())]

    async def _note_folder_forever(self) -> None:
        """Others who start with a folder of their own learn that this one is in use."""
        while True:
            await asyncio.sleep(FOLDER_NOTED_EVERY_S)
            try:
                await _check_folder(self.house)
            except AfterglowError as error:
                log.error("The data folder was not noted: %s", error)

    async def _mark_forever(self) -> None:
        while True:
            await asyncio.sleep(ANSWERED_FLUSH_S)
            await self._attempts.flush(self.house)
            await share_rates(self.house)
            with contextlib.suppress(StoreError):
                await self._access.write_uses()

    async def drain(self) -> None:
        """Take no more work, and let what is in hand end, for up to `drain_s`. Requests are still answered."""
        self._routed.draining = True
        self.house.events.end_watches()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.house.settings.drain_s):
                await asyncio.gather(self.worker.drain(), self.pipeline.drain())
                await self.deliveries.drain()  # also of what those have just ended

    async def end_streams(self) -> None:
        """Let go of everyone who waits, so that connections can be closed."""
        await self.house.events.close()

    async def close(self) -> None:
        await self.worker.close()
        await self.pipeline.close()
        await self.deliveries.close()
        await self.house.code_engine.close()
        await self.house.events.close()
        for task in self._tasks:
            task.cancel()
        await share_rates(self.house)
        await self._attempts.flush(self.house)
        if self.house.embedder is not None:
            await self.house.embedder.close()
        if self.house.mcp is not None:
            await self.house.mcp.close()
        if self.house.traces is not None:
            await self.house.traces.close()


class _Routed:
    """Routing, with what `request.app` needs to offer."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self.draining = False

    @cached_property
    def openapi(self) -> bytes:
        return describe([(method, f"/v1{path}", act) for method, path, act in ROUTES] + OPEN_ROUTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self._router(scope, receive, send)


def _routes() -> list[BaseRoute]:
    routes: list[BaseRoute] = [Route(path, act, methods=[method]) for method, path, act in OPEN_ROUTES]
    routes.append(Route(METRICS_PATH, about.metrics))
    for prefix in PREFIXES:
        routes += [
            Route(prefix + path, once(act) if method == "POST" else act, methods=[method])
            for method, path, act in ROUTES
        ]
    # Azure names the model in the path; below it is what is passed on anyway, and nothing else of the upstream's.
    for prefix in (*PREFIXES, models_api.DEPLOYMENTS + "{deployment}"):
        routes += [Route(prefix + path, models_api.forward, methods=METHODS) for path in models_api.FORWARDED]
    return routes


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFound(f"Invalid URL ({scope['method']} {scope['path']})")


@contextlib.asynccontextmanager
async def open_application(
    settings: Settings,
    *,
    part: Part = "all",
    models: ChatModels | None = None,
    clock: Clock | None = None,
    code_engine: CodeEngine | None = None,
    parser: Parser | None = None,
    embedder: Embedder | None = None,
    store: Store | None = None,
) -> AsyncIterator[Application]:
    """Build the shape that the settings ask for: everything in this process, on SQLite and a folder; or, with
    `database_url`, one of many processes that share a Postgres.

    part: `api` answers requests and executes no runs, `worker` the other way round. models, clock, code_engine, parser,
    embedder, store: in place of the real ones, for tests. Raises ConfigError, with the way out, for whatever is wrong
    before the first request.
    """
    async with contextlib.AsyncExitStack() as opened:
        if not settings.database_url:
            opened.callback(DataFolder(Path(settings.data)).close)
        application = await _build(
            settings,
            opened,
            part,
            models or build_models(settings),
            clock or _Clock(),
            code_engine or (NoEngine(*CODE_ELSEWHERE) if part == "api" else build_code_engine(settings)),
            parser or build_parser(settings),
            embedder or build_embedder(settings),
            store,
        )
        opened.push_async_callback(application.close)
        await application.start(work=part != "api")
        yield application


async def _build(
    settings: Settings,
    opened: contextlib.AsyncExitStack,
    part: Part,
    models: ChatModels,
    clock: Clock,
    code_engine: CodeEngine,
    parser: Parser,
    embedder: Embedder | None,
    store: Store | None = None,
) -> Application:
    """opened: takes what must be closed after the application."""
    opened.push_async_callback(models.close)
    run_memory = None if store or settings.database_url else LocalRunMemory()
    store = store or await _open_store(settings, run_memory=run_memory)
    opened.push_async_callback(store.close)
    if source := await store.read(unfinished_move):
        raise ConfigError(f"The database is being filled from {source}: run `afterglow migrate` to its end first.")
    if part != "worker":
        await check_exposure(settings, store)
    metrics = Metrics()
    outbound = GuardedClient()
    opened.push_async_callback(outbound.close)
    plugs = (_cluster if settings.database_url else _laptop)(settings, clock, store, metrics, opened)
    house = House(
        settings=settings,
        clock=clock,
        store=store,
        models=models,
        images=GuardedFetcher(outbound, allow_private=settings.private_images),
        outbound=outbound,
        blobs=await _open_blobs(settings, opened),
        code_engine=code_engine,
        index=await _open_index(settings, opened),
        embedder=embedder,
        limits=Limiter(shared=bool(settings.database_url)),
        metrics=metrics,
        traces=build_traces(settings),
        mcp=build_mcp(settings, outbound),
        run_memory=run_memory,
        **plugs,
    )
    await _check_folder(house)
    if not settings.database_url:
        await _take_over(house)
    if settings.assistants:
        await declare_assistants(house, settings.assistants)
    access = Access(settings, store, clock, house.limits)
    if part != "worker":
        await access.ensure_projects()
    return Application(settings, house, Worker(house), Pipeline(house, parser), access)


def _laptop(
    settings: Settings, clock: Clock, store: Store, metrics: Metrics, opened: contextlib.AsyncExitStack
) -> dict[str, Any]:
    """What tells one process of itself."""
    events = LocalEvents(
        store,
        clock,
        flush_ms=settings.event_flush_ms,
        keep_alive_s=settings.keep_alive_s,
        on_flush=metrics.event_flush_rows.observe,
    )
    opened.push_async_callback(events.close)
    events.start()
    return {
        "events": events,
        "queue": LocalQueue(),
        "ingest_queue": LocalQueue(),
        "webhook_queue": LocalQueue(),
        "locks": LocalLocks(),
    }


def _cluster(
    settings: Settings, clock: Clock, store: Store, metrics: Metrics, opened: contextlib.AsyncExitStack
) -> dict[str, Any]:
    """What tells processes that share a Postgres of one another."""
    from afterglow.events.postgres import PostgresEvents
    from afterglow.queue.postgres import PostgresQueue
    from afterglow.store.locks import PostgresLocks
    from afterglow.store.notify import Notifier

    direct = settings.database_listen_url or settings.database_url
    notifier, locks = Notifier(direct), PostgresLocks(direct)
    events = PostgresEvents(
        store,
        clock,
        notifier,
        gone=gone_event(),
        flush_ms=min(settings.event_flush_ms, CLUSTER_FLUSH_MS),
        keep_alive_s=settings.keep_alive_s,
        on_flush=metrics.event_flush_rows.observe,
    )
    plugs = {
        "events": events,
        "queue": PostgresQueue(notifier, "runs"),
        "ingest_queue": PostgresQueue(notifier, "files"),
        "webhook_queue": PostgresQueue(notifier, "webhooks"),
        "locks": locks,
    }
    for plug in (locks, notifier, events):
        opened.push_async_callback(plug.close)
    events.start()
    notifier.start()
    return plugs


async def _take_over(house: House) -> None:
    """Nobody else can be at work on this folder: whatever was in progress may be taken over at once."""
    if left := await house.store.write(release_leases):
        log.warning("%d runs were in progress when the server last stopped; they go on now.", left)
    if left := await house.store.write(release_jobs):
        log.warning("%d files were being indexed when the server last stopped; they are indexed now.", left)
    await house.store.write(release_deliveries)
    await sweep_blobs(house, math.inf)
    await tidy_files(house)  # a file whose deletion was begun is not there to be indexed


async def _check_folder(house: House) -> None:
    """Make sure that this process finds the bytes that others store, and they its own. Raises ConfigError."""
    settings = house.settings
    if settings.database_url and not settings.blob_url and not settings.shared_data:
        await check_data_folder(house.store, Path(settings.data), house.clock.now())
