"""Pods of the engine `remote`, as processes on loopback: the true program and wire, without a pod around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import afterglow.sandbox
from afterglow.sandbox import pod
from afterglow.settings import Settings

TOKEN = "a token for tests that is long enough"
SANDBOX = str(Path(afterglow.sandbox.__file__).parent)
BARE = (sys.executable, "-S")  # without packages it is there sooner


class FakePod:
    """A process of `guest/door.py`. port: of the address that it listens at, once `free` was waited for."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.port = 0

    async def free(self) -> None:
        """Wait until it lets somebody in, for the first time or again."""
        assert self.process.stdout is not None
        said = await self.process.stdout.readline()
        assert said.startswith(b"sandbox: free"), said
        self.port = int(said.split()[-1])

    async def ended(self) -> int:
        return await self.process.wait()


@contextlib.asynccontextmanager
async def fake_pod(
    folder: Path,
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    python: tuple[str, ...] = BARE,
    most_s: float = 600,
) -> AsyncGenerator[FakePod]:
    """A pod that is free. Its /mnt/data is `folder`; python: what runs it, a launcher before it perhaps."""
    folder.mkdir(exist_ok=True)
    told = pod.configuration(settings, host, port, "") | {"folder": str(folder), "others": [], "most_s": most_s}
    variables = pod.environment(Path(python[-1]).parent) | {"HOME": str(folder), "MPLCONFIGDIR": f"{folder}.fonts"}
    process = await asyncio.create_subprocess_exec(
        *(*python, "-I", "-B", "-c", pod.START.format(SANDBOX)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=variables,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(told).encode())
    process.stdin.close()
    started = FakePod(process, folder)
    try:
        await started.free()
        yield started
    finally:
        await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill it and all that it has started: without a pod around it, some would be left."""
    kill(descendants(process.pid))
    await process.wait()


def kill(pids: set[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> set[int]:
    """A process, if it lives, and all that has come from it."""
    found, waiting = {pid} if Path(f"/proc/{pid}").exists() else set(), [pid]
    while waiting:
        new = children(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def children(pid: int) -> set[int]:
    """None when it has just ended."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found.update(map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()))
    return found
