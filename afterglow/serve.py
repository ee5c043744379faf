"""Running the server: the socket, the signals, and what is said at start."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any

import uvicorn
import uvloop

from afterglow.app import Application, Part, open_application
from afterglow.connection import Connection, connections
from afterglow.errors import ConfigError
from afterglow.probes import serve_metrics
from afterglow.settings import Settings, without_password
from afterglow.telemetry import log

GRACE_S = 3
KEEP_ALIVE_S = 75  # longer than clients and load balancers keep a connection that they may write to again
# Each statement gives the interpreter up and must get it back from a busy event loop: with the usual 5 ms the
# database's threads starve under load (first delta at 500 streams: p99 about a quarter longer).
SWITCH_INTERVAL_S = 0.0002
# Streams keep much alive for seconds, which the usual (700, 10, 10) walks through again and again: a tenth of the CPU.
GC_THRESHOLDS = (50_000, 20, 100)
BACKLOG = 4096
TICKS_A_SECOND = 10  # uvicorn's
TLS_LOOKED_AT_EVERY_S = 60
STOPPED = "Stopped. Everything acknowledged is stored; runs in progress go on at the next start."


def serve(settings: Settings, say: Callable[[str], None], *, work: bool = True) -> None:
    """Serve until SIGINT or SIGTERM. say: takes the lines for whoever started it. work: execute runs, too. Raises
    ConfigError."""
    if not (work or settings.database_url):
        raise ConfigError("--no-worker needs database_url: on SQLite nobody else could execute the runs.")
    _run(_serve(settings, say, "all" if work else "api"))


def run_worker(settings: Settings, say: Callable[[str], None]) -> None:
    """Execute runs and index files for servers on the same Postgres, until SIGINT or SIGTERM. Raises ConfigError."""
    if not settings.database_url:
        raise ConfigError(
            "A worker of its own needs database_url; on SQLite `afterglow serve` executes the runs itself."
        )
    _run(_work(settings, say))


def _run(serving: Coroutine[Any, Any, None]) -> None:
    _raise_file_limit()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)
    uvloop.run(serving)


async def _work(settings: Settings, say: Callable[[str], None]) -> None:
    async with open_application(settings, part="worker") as application, _probes(settings, application):
        stopped = asyncio.Event()
        with _signals(application.drain, stopped.set):
            say("Working. Stop with Ctrl-C")
            await stopped.wait()
    say(STOPPED)


@contextlib.asynccontextmanager
async def _probes(settings: Settings, application: Application) -> AsyncIterator[None]:
    """The second port, if there is to be one."""
    if not settings.metrics_port:
        yield
        return
    async with serve_metrics(application, _listen(settings.host, settings.metrics_port)):
        yield


async def _serve(settings: Settings, say: Callable[[str], None], part: Part) -> None:
    listening = _listen(settings.host, settings.port)
    try:
        async with open_application(settings, part=part) as application, _probes(settings, application):
            config = uvicorn.Config(
                application,
                loop="none",
                http=connections(settings),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                ssl_certfile=settings.tls_cert or None,
                ssl_keyfile=settings.tls_key or None,
            )
            tls = _Tls(config, settings) if settings.tls_cert else None
            port = listening.getsockname()[1]
            await _Server(config, application, lambda: _greet(settings, port, say), tls).serve([listening])
    finally:
        listening.close()
    say(STOPPED)


class _Tls:
    """The certificate that is shown. A renewed one is taken up by new connections: on SIGHUP, or within a minute."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        """Raises ConfigError when certificate and key cannot be used."""
        self._files = settings.tls_cert, settings.tls_key
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls_cert and tls_key cannot be used: {error.strerror or error}.") from None
        assert config.ssl is not None
        self._context = config.ssl
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._changed_at()

    def _changed_at(self) -> list[int]:
        return [os.stat(file).st_mtime_ns for file in self._files]

    def reload_if_changed(self) -> None:
        with contextlib.suppress(OSError):  # a file is just being put into its place
            if self._changed_at() != self._seen:
                self.reload()

    def reload(self) -> None:
        """Keep the old one when the new one cannot be used: what is half written now is whole at the next look."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._files)
            self._context.load_cert_chain(*self._files)
            self._seen = self._changed_at()
        except OSError as error:  # ssl.SSLError is one
            log.error("The TLS certificate cannot be used, and the old one is kept: %s", error)
        else:
            log.info("The TLS certificate was loaded again.")


class _Server(uvicorn.Server):
    """Greets once it listens; when it is to stop, lets go of streams first, so that stopping is quick."""

    def __init__(
        self, config: uvicorn.Config, application: Application, greet: Callable[[], None], tls: _Tls | None
    ) -> None:
        super().__init__(config)
        self._tls = tls
        self._application = application
        self._greet = greet

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._greet()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: look after a tenth of the connections."""
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections)[counter % TICKS_A_SECOND :: TICKS_A_SECOND]:
            if isinstance(connection, Connection):
                connection.check(now)
        if self._tls and counter % (TLS_LOOKED_AT_EVERY_S * TICKS_A_SECOND) == 0:
            self._tls.reload_if_changed()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._application.end_streams()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with _signals(self._application.drain, self._stop):
            if self._tls:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._tls.reload)
            yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


@contextlib.contextmanager
def _signals(drain: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[], None]) -> Generator[None, None, None]:
    """SIGTERM drains and then stops; SIGINT, or a second SIGTERM, stops at once."""
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    def drain_first() -> None:
        if draining:
            stop()
            return
        draining.append(asyncio.create_task(drain()))
        draining[0].add_done_callback(lambda _: stop())

    loop.add_signal_handler(signal.SIGINT, stop)
    loop.add_signal_handler(signal.SIGTERM, drain_first)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # what follows names host and port once more
        raise ConfigError(f"Cannot listen on {host}, port {port}: {reason}.") from None


def _greet(settings: Settings, port: int, say: Callable[[str], None]) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if settings.upstreams:
        model = ", ".join(f"{name} ({upstream.url})" for name, upstream in settings.upstreams.items())
    elif settings.model_url:
        model = settings.model_url + (f", {settings.default_model}" if settings.default_model else "")
    else:
        model = "the built-in offline model, which is no language model (--model-url URL names a real one)"
    scheme = "https" if settings.tls_cert else "http"
    say(f"Base URL   {scheme}://{host}:{port}{settings.root_path.rstrip('/')}/v1")
    say(f"Data       {without_password(settings.database_url) if settings.database_url else settings.data}")
    say(f"Model      {model}")
    say("Stop       Ctrl-C")


def _raise_file_limit() -> None:
    """Every stream is a file; the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
