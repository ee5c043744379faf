"""The engine `native` itself: real sessions behind the real wall. Skipped where its packages are not installed."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from afterglow.contracts import CellEnd, CodeEngine, CodeSession, Logs, Picture
from afterglow.sandbox import packages
from afterglow.sandbox.local import NativeEngine
from afterglow.settings import Settings, load

ENVIRONMENT = "AFTERGLOW_SANDBOX_ENV"
MEMORY_MB = 256

StartEngine = Callable[..., AbstractAsyncContextManager[NativeEngine]]


def settings(**changed: Any) -> Settings:
    given = {name: os.environ[name] for name in (ENVIRONMENT,) if name in os.environ}
    return load({"sandbox_memory_mb": MEMORY_MB, "sandbox_disk_mb": 64, **changed}, environ=given)


@asynccontextmanager
async def running_engine(**changed: Any) -> AsyncGenerator[NativeEngine]:
    """An engine with settings of one's own, started or not as the machine will have it."""
    engine = NativeEngine(settings(**changed))
    try:
        await engine.settled()
        yield engine
    finally:
        await engine.close()


@pytest.fixture(scope="session")
def packages_folder() -> Path:
    """Where the interpreter's packages are."""
    folder = packages.environment(settings())
    if not packages.describe(folder).usable:
        missing = f"the interpreter's packages are not installed in {folder}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    return folder


@pytest.fixture
def start_engine(packages_folder: Path) -> StartEngine:
    """Start engines by hand: `async with start_engine(sandbox_pool=0) as engine`."""
    return running_engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(packages_folder: Path) -> AsyncGenerator[NativeEngine]:
    """One engine for the tests of a module, which run on that module's event loop."""
    async with running_engine(sandbox_pool=1, sandbox_sessions=4) as running:
        assert running.status.state == "on", running.status
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def session(engine: CodeEngine) -> AsyncGenerator[CodeSession]:
    opened = await engine.open()
    yield opened
    await opened.close()


class Cell:
    """What a cell has shown, and how it ended."""

    def __init__(self) -> None:
        self.text = ""
        self.pictures: list[bytes] = []
        self.end = CellEnd("lost", "it gave no end")

    @property
    def status(self) -> str:
        return self.end.status


async def run(session: CodeSession, code: str, timeout_s: float = 30.0) -> Cell:
    """Run a cell to its end."""
    cell = Cell()
    async for part in session.run(code, timeout_s):
        if isinstance(part, Logs):
            cell.text += part.text
        elif isinstance(part, Picture):
            cell.pictures.append(part.data)
        else:
            cell.end = part
    return cell
