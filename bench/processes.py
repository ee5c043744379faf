"""The processes that are measured: started here, watched through /proc, ended by their own handle."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple

from bench.client import BenchFailure, Connection

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0

Part = Literal["all", "api", "worker"]
COMMANDS: dict[Part, tuple[str, ...]] = {
    "all": ("serve", "--port"),
    "api": ("serve", "--no-worker", "--port"),
    "worker": ("worker", "--metrics-port"),
}


class Server(NamedTuple):
    """A running process of Afterglow. port: where it serves, or a worker its probes. start_s: from its start to the
    first 200 on /healthz."""

    pid: int
    port: int
    start_s: float


class Memory(NamedTuple):
    """Resident memory in KB (1,024 bytes): of the server process, and of all that it started."""

    server_kb: int
    children_kb: int


@asynccontextmanager
async def stub() -> AsyncIterator[int]:
    """Run the model stub in a process of its own; gives its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.stub", cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        async with asyncio.timeout(START_LIMIT_S):
            line = (await process.stdout.readline()).decode()
        if not line:
            raise BenchFailure("the model stub did not start")
        yield int(line.split(":")[2].partition("/")[0])
    finally:
        await _end(process)


@asynccontextmanager
async def afterglow(
    program: Path,
    data: Path,
    stub_port: int,
    code_interpreter: str = "off",
    *,
    part: Part = "all",
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Server]:
    """Run a process of Afterglow on a free port with settings as they come; what it logs goes to a file beside `data`.
    code_interpreter: that setting; its engine would start in the background, under what is measured. settings: others,
    as variables of its environment.

    Raises BenchFailure when it does not come up; to what fails while it is measured, the end of its log is added.
    """
    port = _free_port()
    log = data.with_suffix(".log" if part == "all" else f".{port}.log")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AFTERGLOW_")}
    environ |= {"AFTERGLOW_CODE_INTERPRETER": code_interpreter, **(settings or {})}
    model_url = f"http://127.0.0.1:{stub_port}/v1"
    flags = (str(port), "--host", "127.0.0.1", "--data", str(data), "--model-url", model_url)
    with log.open("wb") as out:
        start = perf_counter()
        process = await asyncio.create_subprocess_exec(
            program, *COMMANDS[part], *flags, env=environ, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        await _until_healthy(port, process)
        yield Server(process.pid, port, perf_counter() - start)
    except (BenchFailure, OSError) as error:
        raise BenchFailure(f"{error}; {_tail(log)}") from error
    finally:
        await _end(process)


async def _until_healthy(port: int, process: asyncio.subprocess.Process) -> None:
    connection = Connection(port)
    deadline = perf_counter() + START_LIMIT_S
    while perf_counter() < deadline:
        try:
            if (await connection.ask("GET", "/healthz")).status == 200:
                connection.close()
                return
        except OSError:
            pass
        if process.returncode is not None:
            raise BenchFailure(f"the server ended with {process.returncode}")
        await asyncio.sleep(0.002)
    raise BenchFailure(f"no 200 on /healthz within {START_LIMIT_S:.0f} s")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_LIMIT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: Path) -> str:
    text = " ".join(log.read_text(errors="replace").split())
    return f"the server's log ends: {text[-400:]}" if text else "the server logged nothing"


def has_proc() -> bool:
    """Whether memory and CPU time of another process can be read here (Linux)."""
    return Path("/proc/self/status").exists()


def memory_of(pid: int) -> Memory:
    """What the process holds now."""
    return Memory(_rss_kb(pid), sum(_rss_kb(child) for child in _descendants(pid)))


def cpu_s(pid: int) -> float:
    """CPU seconds that the process has used so far; 0 where that cannot be read.

    Raises BenchFailure when it has ended.
    """
    if not has_proc():
        return 0.0
    try:
        user, system = _stat(pid)[11:13]
    except FileNotFoundError:
        raise BenchFailure("the server has ended") from None
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _rss_kb(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # a child that has ended since it was listed
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")), 0)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third, the state, on; the name before them may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def whole_pss_kb(pid: int) -> int:
    """Memory of the process and of all that it has started, in KB; what several processes share is divided."""
    return _pss_kb(pid) + pss_kb(pid)


def pss_kb(pid: int) -> int:
    """Memory of all that the process has started, in KB; what several share is counted once."""
    return sum(_pss_kb(child) for child in _descendants(pid))


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int(_stat(int(entry.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
