"""The attacks once more, by an ordinary user: a program of its own, which prints as JSON what was not stopped.

Started by `started`, as root, with a Python and packages that this user may read.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afterglow.contracts import Logs
from afterglow.sandbox import packages
from afterglow.sandbox import session as sessions
from afterglow.sandbox.local import NativeEngine
from afterglow.settings import load
from tests.sandbox.attack_cells import INVENTED, MATRIX, carry_out, program, why_not_stopped
from tests.sandbox.bait import put_out
from tests.sandbox.endings import WEDGES, why_not_ended

NOBODY = "65534"
SETTINGS = {"sandbox_memory_mb": 256, "sandbox_disk_mb": 64, "sandbox_pool": 0}


async def attack(environment: str, names: list[str]) -> dict[str, Any]:
    """What was not stopped, by name; `unenforced` and `sessions` as the engine has them."""
    engine = NativeEngine(load({"sandbox_env": environment, **SETTINGS}, environ={}))
    try:
        status = await engine.settled()
        if status.state != "on":
            return {"engine": f"{status.reason} {status.remedy}"}
        failed = await _attacks(engine, [name for name in {**MATRIX, **INVENTED} if name in names])
        failed |= await _wedges(engine, [name for name in WEDGES if name in names])
        return {"failed": failed, "unenforced": status.unenforced, "sessions": engine._most}
    finally:
        await engine.close()


async def _attacks(engine: NativeEngine, names: list[str]) -> dict[str, str]:
    failed = {}
    session = None
    async with put_out() as bait:
        for name in names:
            if session is None or not session.alive:
                session = await engine.open()
                async for part in session.run(program(bait.names()), 20):
                    assert not isinstance(part, Logs), part
            attack = {**MATRIX, **INVENTED}[name]
            if why := why_not_stopped(attack, await carry_out(session, attack)):
                failed[name] = why
        if bait.touched:
            failed["touched"] = ", ".join(bait.touched)
    if session is not None:
        await session.close()
    return failed


async def _wedges(engine: NativeEngine, names: list[str]) -> dict[str, str]:
    sessions.GRACE_S = 0.5
    return {name: why for name in names if (why := await why_not_ended(engine, WEDGES[name]))}


def main() -> None:
    environment, *names = sys.argv[1:]
    print(json.dumps(asyncio.run(attack(environment, names))))


def can_start(folder: Path) -> str:
    """Why an ordinary user cannot be played here; empty when one can."""
    system = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=False).stdout
    minor = ".".join(packages.describe(folder).version.split(".")[:2])
    if os.geteuid() != 0:
        return "whoever runs this is an ordinary user"
    if shutil.which("setpriv") is None or not system.startswith(f"Python {minor}."):
        return "needs setpriv, and a system Python of the packages' version"
    return ""


def started(folder: Path, made: Path, names: Iterable[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this program as NOBODY. folder: of the interpreter's packages; made: an empty one, for an environment."""
    environment_for_others(folder, made)
    paths = [str(Path(__file__).parents[2]), *(path for path in sys.path if "site-packages" in path)]
    code = f"import sys; sys.path += {paths!r}; from tests.sandbox.as_user import main; main()"
    become = ("setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "/usr/bin/python3")
    command = [*become, "-I", "-B", "-c", code, str(made), *names]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **options)


def environment_for_others(folder: Path, made: Path) -> None:
    """The packages, with the system's Python, which everybody may run."""
    found = packages.describe(folder)
    minor = ".".join(found.version.split(".")[:2])
    for parent in (made, *made.parents):
        if "pytest-of-" in str(parent):  # one more with several workers
            parent.chmod(0o755)
    (made / "bin").mkdir()
    (made / "bin/python").symlink_to("/usr/bin/python3")
    (made / f"lib/python{minor}").mkdir(parents=True)
    (made / f"lib/python{minor}/site-packages").symlink_to(found.site_packages)
    (made / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {found.version}\n")
