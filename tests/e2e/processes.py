"""Real processes: `afterglow` commands and other programs, started here and, whatever happens, ended here."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30
PIPE = asyncio.subprocess.PIPE
AFTERGLOW = (sys.executable, "-m", "afterglow.cli")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Served:
    """A running `afterglow serve`. greeting: what it said at the start, by name. log: all of its stderr so far."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.greeting: dict[str, str] = {}
        self._log = log

    @property
    def url(self) -> str:
        """The base URL, as a client takes it."""
        return self.greeting["Base URL"]

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def complaints(self) -> list[str]:
        """The lines of the log but those of level info, which tell of runs that ended."""
        return [line for line in self.log.splitlines() if line.split()[1:2] != ["info"]]

    async def hear(self) -> None:
        """Take in the greeting. Fails with the log when the server ends instead."""
        assert self.process.stdout is not None
        while "Stop" not in self.greeting:
            line = (await self.process.stdout.readline()).decode()
            assert line, self.log
            name, _, rest = line.strip().partition("  ")
            self.greeting[name] = rest.strip()

    async def stop(self, number: int = signal.SIGTERM, within_s: float = PATIENCE_S) -> Ended:
        """End it by a signal."""
        self.process.send_signal(number)
        out, _ = await asyncio.wait_for(self.process.communicate(), within_s)
        return Ended(await self.process.wait(), out.decode(), self.log)


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would configure a server or a client, and with `more`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AFTERGLOW_", "OPENAI_"))}
    return {**own, "AFTERGLOW_CODE_INTERPRETER": "off", **more}  # or each would start one in the background


@asynccontextmanager
async def _started(*command: Any, **options: Any) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    process = await asyncio.create_subprocess_exec(*map(str, command), **options)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(
    *command: Any, env: Mapping[str, str] | None = None, cwd: Path = ROOT, within_s: int = PATIENCE_S
) -> Ended:
    """Run a program to its end."""
    options = {"stdin": asyncio.subprocess.DEVNULL, "stdout": PIPE, "stderr": PIPE, "cwd": cwd}
    async with _started(*command, env=env or environment(), **options) as process:
        out, err = await asyncio.wait_for(process.communicate(), within_s)
        return Ended(await process.wait(), out.decode(), err.decode())


async def afterglow(*arguments: Any, **options: Any) -> Ended:
    """Run an `afterglow` command to its end."""
    return await run(*AFTERGLOW, *arguments, **options)


@asynccontextmanager
async def serving(
    folder: Path,
    *flags: Any,
    env: Mapping[str, str] | None = None,
    program: Sequence[Any] = AFTERGLOW,
) -> AsyncGenerator[Served, None]:
    """`afterglow serve` on the data folder `folder/data` and a free port."""
    log = folder / "serve.log"
    with log.open("ab") as stderr:
        command = (*program, "serve", "--port", 0, "--data", folder / "data", *flags)
        async with _started(*command, env=env or environment(), stdout=PIPE, stderr=stderr, cwd=folder) as process:
            served = Served(process, log)
            await asyncio.wait_for(served.hear(), PATIENCE_S)
            yield served


@asynccontextmanager
async def working(folder: Path, env: Mapping[str, str]) -> AsyncGenerator[Path, None]:
    """`afterglow worker`, working; gives its log."""
    log = folder / "worker.log"
    with log.open("ab") as stderr:
        command = (*AFTERGLOW, "worker", "--data", folder / "data")
        async with _started(*command, env=env, stdout=PIPE, stderr=stderr, cwd=folder) as process:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
            assert line.startswith(b"Working."), log.read_text()
            yield log
