"""Other clients, each in an environment of its own under `.venv/clients/`, installed once by name and exact version.

Where they cannot be installed the tests that need them are skipped, or fail if the variable CI is set.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import ROOT, environment

CLIENTS = ROOT / ".venv" / "clients"
INSTALL_S = 180


def python_client(name: str, *requirements: str) -> Path:
    """The interpreter of an environment with these requirements and nothing of this project."""

    def install(folder: Path) -> None:
        install_or_skip(sys.executable, "-m", "venv", folder)
        install_or_skip(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *requirements)

    name = f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    return _installed(name, requirements, install) / "bin" / "python"


def node_client(version: str) -> Path:
    """A folder whose scripts can import openai-node of this version."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")

    def install(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}')
        # Each release asks for the newest Node; what matters here is whether it runs on the one at hand.
        install_or_skip(
            "npm", "install", "--no-audit", "--no-fund", "--engine-strict=false", f"openai@{version}", cwd=folder
        )

    return _installed(f"node-{version}", (version,), install)


def _installed(name: str, requirements: tuple[str, ...], install: Callable[[Path], None]) -> Path:
    """The folder, made anew unless it was finished with the same requirements."""
    folder = CLIENTS / name
    finished = folder / ".finished"
    wanted = "\n".join([sys.executable, *requirements])
    with _locked(name):
        if not finished.exists() or finished.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            install(folder)
            finished.write_text(wanted)
    return folder


@contextmanager
def _locked(name: str) -> Generator[None, None, None]:
    """Two test runs at the same time must not install into the same folder."""
    CLIENTS.mkdir(parents=True, exist_ok=True)
    with (CLIENTS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install_or_skip(*command: Any, **options: Any) -> None:
    """Run what needs a package index."""
    try:
        ended = subprocess.run(
            [*map(str, command)], env=environment(), capture_output=True, text=True, timeout=INSTALL_S, **options
        )
    except subprocess.TimeoutExpired:
        _missing(f"{command[0]} did not finish within {INSTALL_S} s")
        return
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip().splitlines() or ["nothing"]
        _missing(f"{Path(str(command[0])).name} could not install it and said: {said[-1]}")


def _missing(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"This client is needed here, but {reason}")
    pytest.skip(f"This client cannot be had: {reason}")
