"""Why a step of building the wall was refused, and what to do about it, in words for the operator."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

OTHER_ENGINE = "Use the docker engine instead, or switch the code interpreter off."
CONTAINER = (
    "In a container it needs, for Docker, `--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    " --security-opt systempaths=unconfined`; for Kubernetes, `hostUsers: false` and `procMount: Unmasked`. "
)


def explain(name: str, error: int, proc: Path = Path("/proc")) -> tuple[str, str]:
    """Why a step was refused, and what to do about it: two texts for the operator. name: the step's; error: errno."""
    said = os.strerror(error)
    if name in ("namespaces", "mounts", "tree", "proc", "pivot") and error in (errno.EPERM, errno.EACCES, errno.ENOSPC):
        return _namespaces_refused(name, said, proc)
    if name == "user":
        return (
            f"The server is root, but may not change to another user ({said}), and root's sessions cannot be bounded.",
            "Run the server as an ordinary user, or give it the capabilities SETUID and SETGID.",
        )
    if name == "core":
        return (
            f"This server's hard limit for core files is 0 ({said}), and this machine hands core dumps to a program: a"
            " crash in a session would start that program as root.",
            "Raise the limit to 1 or more: `LimitCORE=1` for systemd, `--ulimit core=1` for Docker, `ulimit -Hc`.",
        )
    if name == "files":
        return (
            f"The interpreter's files cannot be read by the users of its sessions ({said}).",
            "Make them readable (`chmod -R o+rX`; for a server that is not root, the folders above them, too), or make"
            " the environment anew with umask 022.",
        )
    if name == "exec":
        return (
            f"The interpreter's Python does not start inside the wall ({said}): it, its loader or a library is in a"
            " folder that is not shown there, or can be read by its owner only.",
            "Make its environment from a Python of this system, or of uv or pyenv, with files that others can read. "
            + OTHER_ENGINE,
        )
    return f"The wall cannot be built: step `{name}` was refused ({said}).", OTHER_ENGINE


def _namespaces_refused(name: str, said: str, proc: Path) -> tuple[str, str]:
    if _setting(proc, "user/max_user_namespaces") == "0":
        return (
            f"User namespaces are switched off on this machine ({said}).",
            "Switch them on: `sudo sysctl -w user.max_user_namespaces=15000`, and the same in /etc/sysctl.d.",
        )
    if _setting(proc, "kernel/unprivileged_userns_clone") == "0":
        return (
            f"This kernel refuses user namespaces to ordinary users ({said}).",
            "Allow them: `sudo sysctl -w kernel.unprivileged_userns_clone=1`, and the same in /etc/sysctl.d.",
        )
    if _setting(proc, "kernel/apparmor_restrict_unprivileged_userns") == "1" and os.geteuid() != 0:
        return (
            f"AppArmor refuses user namespaces to this program ({said}).",
            "Add a profile that allows them to the interpreter's Python alone: `sudo afterglow sandbox apparmor`.",
        )
    if name == "proc":
        return f"A /proc of its own is refused, as where parts of /proc are covered ({said}).", CONTAINER + OTHER_ENGINE
    return f"Namespaces and mounts are refused here (step `{name}`: {said}).", CONTAINER + OTHER_ENGINE


def _setting(proc: Path, name: str) -> str:
    with suppress(OSError):
        return (proc / "sys" / name).read_text("ascii").strip()
    return ""
