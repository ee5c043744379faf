"""The code interpreter, measured at its engine: sessions, cells, files and memory; beside it a cold Jupyter kernel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from time import perf_counter
from typing import Any

from afterglow.contracts import CellEnd, CodeSession, Logs
from afterglow.sandbox.local import NativeEngine
from afterglow.sandbox.packages import environment
from afterglow.settings import load
from bench.client import BenchFailure, percentile
from bench.processes import pss_kb

PRINT = "print('ready')"
TABLE = "import pandas as pd\nprint(pd.DataFrame({'a': range(10)}).sum().a)"
PLOT = f"import matplotlib.pyplot as plt\n{TABLE}\nplt.plot([1, 2])\nplt.savefig('/tmp/a.png')\nplt.close()"
ANSWER_LIMIT_S = 30.0
CHUNK = 1 << 20
FILE_MB = 100
SESSIONS = 50

# Starts a kernel, waits for it, runs a cell, and says in ms when each was done.
KERNEL = """
import json, sys, time
from jupyter_client.manager import start_new_kernel
began = time.perf_counter()
manager, client = start_new_kernel(startup_timeout=60)
try:
    for code in json.loads(sys.argv[1]):
        client.execute_interactive(code, output_hook=lambda message: None, timeout=60)
        print((time.perf_counter() - began) * 1000)
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


class Figures(dict[str, list[float]]):
    """Milliseconds by what was done."""

    def add(self, what: str, began: float) -> None:
        self.setdefault(what, []).append((perf_counter() - began) * 1000)


@contextlib.asynccontextmanager
async def engine(**settings: str) -> AsyncGenerator[NativeEngine, None]:
    """A native engine that is on. Raises BenchFailure with the reason when it is not."""
    started = NativeEngine(load({"sandbox_sessions": str(SESSIONS + 10), **settings}, environ={}))
    try:
        status = await started.settled()
        if status.state != "on":
            raise BenchFailure(f"{status.reason} {status.remedy}")
        yield started
    finally:
        await started.close()


async def text_of_cell(session: CodeSession, code: str) -> str:
    """What a cell printed. Raises BenchFailure when it did not end well."""
    texts: list[str] = []
    async with asyncio.timeout(ANSWER_LIMIT_S):
        async for output in session.run(code, ANSWER_LIMIT_S):
            if isinstance(output, Logs):
                texts.append(output.text)
            elif isinstance(output, CellEnd) and output.status != "ok":
                raise BenchFailure(f"a cell ended {output.status}: {output.why} {''.join(texts)[-300:]}")
    return "".join(texts)


async def open_and_run(started: NativeEngine, figures: Figures, what: str, code: str) -> None:
    """A new session to what its first cell prints."""
    began = perf_counter()
    session = await started.open()
    try:
        await text_of_cell(session, code)
        figures.add(what, began)
    finally:
        await session.close()


async def latencies(times: int) -> Figures:
    """First print and first DataFrame, from the pool and on demand, and a warm call."""
    figures = Figures()
    for pool, where in (("2", "pool"), ("0", "on demand")):
        async with engine(sandbox_pool=pool) as started:
            for code, what in ((PRINT, "print"), (TABLE, "DataFrame")):
                for _ in range(times + 1):
                    await asyncio.sleep(0.25)  # the pool fills again
                    await open_and_run(started, figures, f"{what}, {where}", code)
                del figures[f"{what}, {where}"][0]
    async with engine() as started:
        session = await started.open()
        await text_of_cell(session, TABLE)
        for _ in range(times * 10):
            began = perf_counter()
            await text_of_cell(session, PRINT)
            figures.add("warm call", began)
    return figures


async def engine_start(times: int) -> list[float]:
    """Milliseconds until an engine has built its wall, tried it and is on."""
    took = []
    for _ in range(times):
        began = perf_counter()
        async with engine():
            took.append((perf_counter() - began) * 1000)
    return took


async def memory(count: int) -> tuple[float, float, float]:
    """MB (PSS): of the engine without sessions, and of each of `count` sessions after a DataFrame and after a plot."""
    before = pss_kb(os.getpid())
    async with engine(sandbox_pool="0") as started:
        alone = pss_kb(os.getpid())
        sessions = [await started.open() for _ in range(count)]
        used = []
        for code in (TABLE, PLOT):
            for session in sessions:
                await text_of_cell(session, code)
            used.append((pss_kb(os.getpid()) - alone) / count / 1024)
    return (alone - before) / 1024, used[0], used[1]


async def crowd(count: int) -> list[float]:
    """Milliseconds until each of `count` threads that ask at once has its session and its DataFrame."""
    figures = Figures()
    async with engine() as started:
        await asyncio.gather(*[open_and_run(started, figures, "crowd", TABLE) for _ in range(count)])
    return figures["crowd"]


async def file_throughput() -> tuple[float, float]:
    """MB/s of one file put into a session, and got out of it."""
    async with engine() as started:
        session = await started.open()
        began = perf_counter()
        await session.put("a.bin", FILE_MB << 20, _zeros())
        put_s = perf_counter() - began
        began = perf_counter()
        size = 0
        async for chunk in session.get("a.bin", FILE_MB << 20):
            size += len(chunk)
        if size != FILE_MB << 20:
            raise BenchFailure(f"{size} bytes of {FILE_MB} MB came back")
        return FILE_MB / put_s, FILE_MB / (perf_counter() - began)


async def _zeros() -> AsyncIterator[bytes]:
    for _ in range(FILE_MB):
        yield bytes(CHUNK)


def cold_kernel(folder: Path, times: int) -> Figures | None:
    """A Jupyter kernel on the interpreter's own packages; None where it cannot be installed."""
    python = environment(load({}, environ={})) / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--target", str(folder)]
    wanted = ["--python-version", _version_of(python), "--only-binary", ":all:", "ipykernel", "jupyter_client"]
    if subprocess.run(pip + wanted, stderr=subprocess.DEVNULL).returncode != 0:
        return None
    # Byte-compiled first, as the interpreter's packages are.
    subprocess.run([python, "-m", "compileall", "-q", str(folder)], stdout=subprocess.DEVNULL)
    figures = Figures()
    for _ in range(times):
        lines = _in_own_group([str(python), "-c", KERNEL, json.dumps([PRINT, TABLE])], folder)
        figures.setdefault("print", []).append(lines[0])
        figures.setdefault("DataFrame", []).append(lines[1])
    return figures


def _version_of(python: Path) -> str:
    asked = [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def _in_own_group(command: list[str], packages: Path) -> list[float]:
    """The numbers that a command prints; whatever it started is ended with it."""
    environ: dict[str, Any] = {"PYTHONPATH": str(packages), "HOME": str(packages), "PATH": os.defpath}
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        raise BenchFailure(f"the Jupyter kernel ended with {process.returncode}")
    return [float(line) for line in out.split()]


def middle(values: list[float]) -> float:
    return percentile(values, 50)
