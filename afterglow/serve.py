"""Running the server: the socket, the signals, and what is said at start."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
import socket
import sys
from collections.abc import Callable, Generator

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from afterglow.app import Application, open_application
from afterglow.errors import ConfigError, InvalidRequest
from afterglow.settings import Settings

GRACE_S = 3
KEEP_ALIVE_S = 75  # longer than clients and load balancers keep a connection that they may write to again
# Each statement gives the interpreter up and must get it back from a busy event loop: with the usual 5 ms the
# database's threads starve under load (first delta at 500 streams: p99 about a quarter longer).
SWITCH_INTERVAL_S = 0.0002
# Streams keep much alive for seconds, which the usual (700, 10, 10) walks through again and again: a tenth of the CPU.
GC_THRESHOLDS = (50_000, 20, 100)
BACKLOG = 4096


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. say: takes the lines for whoever started it. Raises ConfigError."""
    _raise_file_limit()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)
    uvloop.run(_serve(settings, say))


async def _serve(settings: Settings, say: Callable[[str], None]) -> None:
    listening = _listen(settings.host, settings.port)
    try:
        async with open_application(settings) as application:
            config = uvicorn.Config(
                application,
                loop="none",
                http=_Protocol,
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
    say("Stopped. Everything acknowledged is stored; runs in progress go on at the next start.")


class _Protocol(HttpToolsProtocol):
    """Answers what cannot be read as HTTP in the API's own form."""

    def send_400_response(self, msg: str) -> None:
        body = InvalidRequest(msg).body()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head.encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """Greets once it listens; on a signal lets go of streams first, so that stopping is quick."""

    def __init__(self, config: uvicorn.Config, application: Application, greet: Callable[[], None]) -> None:
        super().__init__(config)
        self._application = application
        self._greet = greet

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._greet()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._application.end_streams()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


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
    say(f"Data       {settings.data}")
    say(f"Model      {model}")
    say("Stop       Ctrl-C")


def _raise_file_limit() -> None:
    """Every stream is a file; the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
