"""The AppArmor profile with which an ordinary user's Python may build the wall, on systems that forbid it by default.

Ubuntu, since 23.10, lets a program make user namespaces only when a profile names its path. Ours names the copied
Python of the interpreter's environment: for a link it would have to name the system's, and free every Python program.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from afterglow.errors import ConfigError
from afterglow.sandbox.packages import RESTRICTION, Packages, Say, is_a_link

PROFILE_FILE = Path("etc/apparmor.d/afterglow-sandbox")
PROFILE = """# Written by `afterglow sandbox apparmor`: lets one Python program, and no other, make user namespaces.
abi <abi/4.0>,
include <tunables/global>

profile afterglow-sandbox "{python}" flags=(unconfined) {{
  userns,

  include if exists <local/afterglow-sandbox>
}}
"""
PARSERS = "/usr/sbin:/sbin:/usr/bin:/bin"  # before the caller's PATH, from which root should run nothing
PLAIN_PATH = re.compile(r"[\w./ +-]+", re.ASCII)  # what means itself in a profile


def add_profile(found: Packages, say: Say, root: Path = Path("/")) -> None:
    """Write and load the profile for an environment's Python. root: the file system, for tests. Raises ConfigError."""
    if not (root / RESTRICTION.relative_to("/")).exists():
        say("This kernel does not restrict user namespaces by AppArmor: no profile is needed, and none was written.")
        return
    python = _program(found)
    file = root / PROFILE_FILE
    _load(file, PROFILE.format(python=python))
    say(f"Wrote and loaded {file}: {python} may make user namespaces.")
    if python.stat().st_uid != 0:
        say("Its owner is not root: whoever can replace that file can use the profile, too.")
    say("A running server tries again when it is restarted. `afterglow sandbox check` tells whether it helped.")


def remove_profile(say: Say, root: Path = Path("/")) -> None:
    """Unload and delete it. Raises ConfigError."""
    file = root / PROFILE_FILE
    if not file.exists():
        say(f"There is no {file}: nothing to remove.")
        return
    _need_root(file)
    _parse("--remove", file)
    file.unlink()
    say(f"Unloaded and deleted {file}.")


def _program(found: Packages) -> Path:
    if found.state == "missing":  # one that belongs to the server's user is no fault: root only looks at it
        raise ConfigError(
            f"There is no environment in {found.path}. Make it with `afterglow sandbox setup`, as the server's user, or"
            " name its folder with --sandbox-env: under sudo the default may be another one."
        )
    if is_a_link(found.python):
        raise ConfigError(
            f"{found.python} is a link, and a profile for what it leads to would free every program of that Python."
            " `afterglow sandbox setup` makes an environment with a copy."
        )
    program = Path(os.path.realpath(found.python))
    if not PLAIN_PATH.fullmatch(str(program)):
        raise ConfigError(
            f"{program}: the path has characters that mean something else in a profile. Use another folder."
        )
    return program


def _load(file: Path, text: str) -> None:
    _need_root(file)
    before = file.read_text("utf-8") if file.exists() else None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    file.chmod(0o644)
    try:
        _parse("--replace", file)
    except ConfigError:
        if before is None:
            file.unlink()
        else:
            file.write_text(before, "utf-8")
        raise


def _need_root(file: Path) -> None:
    if os.geteuid() != 0:
        raise ConfigError(f"Changing {file} needs root. Run this command with sudo.")


def _parse(what: str, file: Path) -> None:
    parser = shutil.which("apparmor_parser", path=PARSERS) or shutil.which("apparmor_parser")
    if parser is None:
        raise ConfigError("apparmor_parser is not installed. Debian, Ubuntu: apt-get install apparmor.")
    ended = subprocess.run([parser, what, file], capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()
        raise ConfigError(f"apparmor_parser does not take the profile. It said: {said[-1]}")
