"""`afterglow doctor`: is everything there, and if not, what to do about it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from afterglow import __version__
from afterglow.access import check_exposure
from afterglow.app import build_code_engine, build_models, database_path, open_place, open_store
from afterglow.contracts import EngineStatus, Transaction
from afterglow.errors import AfterglowError
from afterglow.settings import Settings

FREE_BYTES_WANTED = 1024**3
FILES_WANTED = 4096
ENGINE_SETTLES_S = 60.0
COUNTED = ("assistants", "threads", "messages", "runs", "events", "model_calls", "spend", "api_keys")


class Finding(NamedTuple):
    """ok: None for what is neither good nor bad. mend: what to do, when it is not ok."""

    ok: bool | None
    what: str
    mend: str = ""


def examine(settings: Settings, say: Callable[[str], None]) -> int:
    """Print every finding; return 0 when nothing is wrong, else 1."""
    found = [*_versions(), *_limits(), *asyncio.run(_database(settings)), *_folder(settings)]
    found += asyncio.run(_bucket(settings))
    found += asyncio.run(_models(settings))
    found += _code_interpreter(settings, asyncio.run(_try_engine(settings)))
    _report(found, say)
    wrong = sum(finding.ok is False for finding in found)
    say(f"\n{wrong} of {len(found)} findings want mending." if wrong else "\nAll is well.")
    return 1 if wrong else 0


def examine_code_interpreter(settings: Settings, say: Callable[[str], None]) -> int:
    """Print what there is to say of the code interpreter alone; return 0 when it is on, else 1."""
    status = asyncio.run(_try_engine(settings))
    _report(_code_interpreter(settings, status), say)
    return 0 if status.state == "on" else 1


def _report(found: list[Finding], say: Callable[[str], None]) -> None:
    for finding in found:
        mark = {True: "ok ", False: "BAD", None: " – "}[finding.ok]
        say(f"{mark}  {finding.what}")
        if finding.mend and finding.ok is not True:
            say(f"     → {finding.mend}")


def _versions() -> list[Finding]:
    new_enough = sys.version_info >= (3, 11)
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE VIRTUAL TABLE words USING fts5(text)")
        fts5 = True
    except sqlite3.OperationalError:
        fts5 = False
    finally:
        connection.close()
    sqlite_good = sqlite3.sqlite_version_info >= (3, 35) and fts5
    return [
        Finding(True, f"Afterglow {__version__}"),
        Finding(new_enough, f"Python {sys.version.split()[0]}", "Install Python 3.11 or newer."),
        Finding(
            sqlite_good,
            f"SQLite {sqlite3.sqlite_version}, {'with' if fts5 else 'without'} full-text search",
            "Use a Python whose sqlite3 is 3.35 or newer and has FTS5, such as your system's or python.org's.",
        ),
    ]


def _limits() -> list[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= FILES_WANTED
    files = "no limit of" if hard == resource.RLIM_INFINITY else f"up to {hard:,}"
    return [
        Finding(
            enough or None, f"{files} open files", f"Each stream needs two; raise the hard limit to {FILES_WANTED:,}."
        )
    ]


async def _database(settings: Settings) -> list[Finding]:
    try:
        async with open_store(settings) as store:
            counts = await store.read(_counts)
            found = [Finding(True, "database: " + ", ".join(f"{count:,} {table}" for table, count in counts.items()))]
            try:
                await check_exposure(settings, store)
            except AfterglowError as error:
                found.append(Finding(False, f"listening on {settings.host}", str(error)))
            return found
    except AfterglowError as error:
        if settings.database_url:
            return [Finding(False, "the database of database_url", str(error))]
        return [Finding(False, f"data folder {settings.data}", f"{error} Or name another folder with --data.")]


async def _bucket(settings: Settings) -> list[Finding]:
    """Write to it, read and delete, as every start does."""
    if not settings.blob_url:
        return []
    try:
        async with open_place(settings):
            return [Finding(True, f"bytes of files: {settings.blob_url}")]
    except AfterglowError as error:
        return [Finding(False, f"bytes of files: {settings.blob_url}", str(error))]


def _folder(settings: Settings) -> list[Finding]:
    folder = Path(settings.data)
    if not folder.is_dir():
        return []
    found = [Finding(True, f"data folder {folder.resolve()}")]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    found.append(Finding(None, f"{size / 1e6:,.1f} MB used, of which the database {_size(settings) / 1e6:,.1f} MB"))
    found.append(
        Finding(free >= FREE_BYTES_WANTED or None, f"{free / 1e9:,.1f} GB free", "Less than 1 GB is left on this disk.")
    )
    found.append(Finding(None, "a server is running on it" if _is_served(folder) else "no server is running on it"))
    return found


async def _counts(tx: Transaction) -> dict[str, int]:
    return {table: (await tx.fetch(f"SELECT COUNT(*) FROM {table}"))[0][0] for table in COUNTED}  # noqa: S608


def _size(settings: Settings) -> int:
    path = database_path(settings)
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def _is_served(folder: Path) -> bool:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


async def _models(settings: Settings) -> list[Finding]:
    try:
        models = build_models(settings)
    except AfterglowError as error:
        return [Finding(False, "model servers", str(error))]
    try:
        checks = await models.check()
    finally:
        await models.close()
    if not checks:
        offline = "the built-in offline model answers; it is no language model"
        return [Finding(None, offline, "Name a real one with --model-url, for instance http://127.0.0.1:11434/v1")]
    return [Finding(check.ok, f"{check.name}: {check.detail}", _advice(check.name)) for check in checks]


def _advice(name: str) -> str:
    if name.endswith("calls functions"):
        return "Choose a model that was trained to call functions; vLLM also needs --enable-auto-tool-choice."
    return "Check that the server runs, the URL (it ends in /v1 as a rule), the key and the model's name."


async def _try_engine(settings: Settings) -> EngineStatus:
    """Build the wall as the server would, and take it down again."""
    engine = build_code_engine(settings)
    try:
        engine.start()
        async with asyncio.timeout(ENGINE_SETTLES_S):
            return await engine.settled()
    except TimeoutError:
        return engine.status
    finally:
        await engine.close()


def _code_interpreter(settings: Settings, status: EngineStatus) -> list[Finding]:
    if status.state == "starting":
        slow = f"the code interpreter is not ready after {ENGINE_SETTLES_S:.0f} s, and may still become so"
        return [Finding(None, slow, "The docker engine builds its image the first time, which takes minutes.")]
    if status.state == "off":
        demanded = settings.code_interpreter in ("native", "docker", "remote")
        return [Finding(False if demanded else None, status.reason, status.remedy)]
    found = [Finding(True, f"code interpreter: {status.engine}")]
    if not status.unenforced:
        return [*found, Finding(True, "all limits of its sessions are enforced")]
    page = "docs/code-interpreter.md says what is missing, and how it can be had."
    return found + [Finding(None, f"not enforced here: {limit}", page) for limit in status.unenforced]
