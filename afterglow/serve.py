"""Running the server: the socket, the signals, and what is said at start."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
import socket
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

GRACE_S = 3
KEEP_ALIVE_S = 75  # longer than clients and load balancers keep a connection that they may write to again
# Each statement gives the interpreter up and must get it back from a busy event loop: with the usual 5 ms the
# database's threads starve under load (first delta at 500 streams: p99 about a quarter longer).
SWITCH_INTERVAL_S = 0.0002
# Streams keep much alive for seconds, which the usual (700, 10, 10) walks through again and again: a tenth of the CPU.
GC_THRESHOLDS = (50_000, 20, 100)
BACKLOG = 4096
TICKS_A_SECOND = 10  # uvicorn's
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
            )
            port = listening.getsockname()[1]
            await _Server(config, application, lambda: _greet(settings, port, say)).serve([listening])
    finally:
        listening.close()
    say(STOPPED)


class _Server(uvicorn.Server):
    """Greets once it listens; when it is to stop, lets go of streams first, so that stopping is quick."""

    def __init__(self, config: uvicorn.Config, application: Application, greet: Callable[[], None]) -> None:
        super().__init__(config)
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
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._application.end_streams()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with _signals(self._application.drain, self._stop):
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
    say(f"Base URL   http://{host}:{port}{settings.root_path.rstrip('/')}/v1")
    say(f"Data       {without_password(settings.database_url) if settings.database_url else settings.data}")
    say(f"Model      {model}")
    say("Stop       Ctrl-C")


def _raise_file_limit() -> None:
    """Every stream is a file; the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
