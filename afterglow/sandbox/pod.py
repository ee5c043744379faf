"""`afterglow sandbox serve`: becomes the first program of a pod, which gives one session to a server elsewhere.

The pod is the wall, as a container is for the engine `docker`, and here nobody builds it for us. Its manifest must give
it, and `deploy/kubernetes/sandbox.yaml` does: a kernel of its own (`runtimeClassName`, gVisor or Kata), a user that is
not root, no capabilities, a root that cannot be written, folders of a fixed size at `FOLDERS`, limits on memory and
processors, no service account, and a network that lets servers in and nothing out. What can be checked before anybody
is let in is checked here; the rest by the attacks that each server tries at its start (`remote.py`).

The program itself is `guest/door.py`, run by the Python of the interpreter's packages with variables of its own: the
token is not in its memory, nor in what /proc tells of it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from afterglow.errors import ConfigError
from afterglow.sandbox import packages
from afterglow.sandbox.cgroups import AGENT_TASKS
from afterglow.sandbox.guest import contained, door, wall
from afterglow.settings import Settings

FOLDERS = (wall.WORK, "/tmp", "/dev/shm", wall.HOME)  # noqa: S108  all that a session can write to
TOKEN_CHARACTERS = 32
MB = 1 << 20
START = "import sys; sys.path.insert(0, {!r}); from guest.door import main; main()"


def serve(settings: Settings, host: str, port: int) -> NoReturn:
    """Become that program. Raises ConfigError where this is no pod, or one that would not hold."""
    check_token(settings.sandbox_token)
    _check_pod()
    found = packages.describe(packages.environment(settings))
    if not found.usable:
        raise ConfigError(f"{found.reason} {found.remedy}")
    told = json.dumps(configuration(settings, host, port, str(found.path / "matplotlib")))
    ours, theirs = os.pipe()  # not its arguments, which sessions can read
    os.write(theirs, told.encode())
    os.dup2(ours, 0)
    command = [str(found.python), "-I", "-B", "-c", START.format(str(Path(__file__).parent))]
    os.execve(command[0], command, environment(found.python.parent))  # noqa: S606


def check_token(token: str) -> None:
    """Raises ConfigError for one that could be found by trying, given what a session may see of it."""
    if len(token) < TOKEN_CHARACTERS:
        raise ConfigError(
            f"sandbox_token: must have {TOKEN_CHARACTERS} characters or more; `openssl rand -hex 32` makes one."
        )


def _check_pod() -> None:
    if os.getpid() != 1:
        raise ConfigError(
            "`afterglow sandbox serve` runs in a pod of its own, as its first process: it empties /tmp and /mnt/data,"
            " and holds nothing back that the pod does not. See deploy/kubernetes/sandbox.yaml."
        )
    if os.getuid() == 0:
        raise ConfigError("`afterglow sandbox serve` must not be root: give the pod `runAsNonRoot` and `runAsUser`.")
    for folder in FOLDERS:
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"`afterglow sandbox serve` cannot write to {folder}: mount an emptyDir there.")


def configuration(settings: Settings, host: str, port: int, fonts: str) -> dict[str, Any]:
    """What `door.main` is told."""
    return {
        "host": host,
        "port": port,
        "digest": door.digest_of(door.key_of(settings.sandbox_token)).hex(),
        "folder": FOLDERS[0],
        "others": FOLDERS[1:],
        "fonts": fonts,
        "disk_bytes": settings.sandbox_disk_mb * MB,
        # Of all pods on a machine where they share a user and a kernel; how many this pod may have is the kubelet's.
        "processes": settings.sandbox_sessions * (settings.sandbox_processes + AGENT_TASKS) * 4,
        "most_s": settings.sandbox_ttl_s + 60,
    }


def environment(programs: Path) -> dict[str, str]:
    """All variables that the pod's programs have. programs: the folder of the packages' Python."""
    return {"PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin", **contained.VARIABLES}
