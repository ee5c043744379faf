"""The Python packages that model-written code may import: a virtual environment of its own, apart from the server's.

`setup` makes it from a lock file with hashes, beside its place, and renames it into it when it is whole: what is there
is finished. pip does the installing, so that index, proxy and certificates are those that the user has configured.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import hashlib
import json
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from afterglow.errors import ConfigError
from afterglow.sandbox.guest.launch import PACKAGES
from afterglow.settings import Settings

Level = Literal["base", "standard", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)
LOCKS = Path(__file__).parent / "locks"
MARKER = "afterglow.json"
OLDEST_PYTHON = (3, 11)
COMPILERS_AT_MOST = 8
LIBRARIES = ("lib", "lib64")
STEPS_AT_MOST = 1000  # on the way to a file, links included
FIRST_ORDINARY_GROUP = 1000
NOT_THERE = ("The interpreter's packages are not installed.", "Run `afterglow sandbox setup`.")
# Where the kernel has this file, AppArmor may refuse user namespaces to programs without a profile of their own.
RESTRICTION = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")

# Imports what every level has, and keeps only those fonts in matplotlib's cache that a session will find as well.
TRIAL = """
import pathlib, matplotlib, numpy, openpyxl, pandas, PIL
from matplotlib import font_manager
fonts, seen = font_manager.fontManager, (matplotlib.get_data_path(), "/usr/share/fonts/")
fonts.ttflist = [font for font in fonts.ttflist if font.fname.startswith(seen)]
fonts.afmlist = [font for font in fonts.afmlist if font.fname.startswith(seen)]
[cache] = pathlib.Path(matplotlib.get_cachedir()).glob("fontlist-*.json")
font_manager.json_dump(fonts, cache)
"""
ASK_PYTHON = """
import os, sys
print(*sys.version_info[:3], sep=".")
print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
"""

# What pip says of a package before it fetches it, from an index or from a folder of files.
PACKAGE = re.compile(
    r"(?:Collecting (?=\S+==)|Processing (?:\S*/)?)(?P<name>[\w.]+(?:-[\w.]+)*?)(?:==|-)(?P<version>\d[^-;\s]*)"
)
SIZE = re.compile(r" +(?:Downloading|Using cached) \S+ \(([\d.]+ [kMG]B)\)")

Say = Callable[[str], None]


class Packages(NamedTuple):
    """An environment as it is found.

    state: `missing`, there is none, or its Python is gone; `unsafe`, others than root and us could change what it
    runs; `own`, a virtual environment that the operator made, used as it is; `old`, made by another release, or not as
    this machine needs it, but usable; `current`. level: empty for one that the operator made. python: its program;
    version: `3.11.7`; base_prefix: the installation that it stands on; site_packages: what to put on sys.path. With
    `missing` none of these lead anywhere. reason, remedy: why it is not usable, as in `EngineStatus`.
    Beside them `path / "matplotlib"` holds a font cache: copied to a folder that can be written, and named by
    MPLCONFIGDIR, it saves matplotlib the search for fonts.
    """

    path: Path
    state: Literal["missing", "unsafe", "own", "old", "current"]
    level: Level | Literal[""] = ""
    python: Path = Path()
    version: str = ""
    base_prefix: Path = Path()
    site_packages: Path = Path()
    reason: str = ""
    remedy: str = ""

    @property
    def usable(self) -> bool:
        return self.state not in ("missing", "unsafe")


class Unsafe(Exception):
    """Others than root and us could change a file or folder. reason, remedy: as in `EngineStatus`."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason} {remedy}")
        self.reason = reason
        self.remedy = remedy


class _Python(NamedTuple):
    """A Python that an environment can be made of; not itself in one."""

    program: str
    version: str


# --- what is there ---------------------------------------------------------------------------------------------


def environment(settings: Settings) -> Path:
    """Where the packages are, or would be: the setting, else in the server's virtual environment, else at home."""
    if settings.sandbox_env:
        return Path(settings.sandbox_env).expanduser().absolute()
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix) / "sandbox"
    return Path.home() / ".local" / "share" / "afterglow" / "sandbox"


def describe(path: Path) -> Packages:
    """What is at `path`. Runs nothing and never fails: what cannot be read is `missing`."""
    config = _configuration(path)
    version = config.get("version") or config.get("version_info", "")
    minor = ".".join(version.split(".")[:2])
    python, site_packages = path / "bin" / "python", path / "lib" / f"python{minor}" / "site-packages"
    if "home" not in config or not os.path.exists(python) or not os.path.isdir(site_packages):
        return Packages(path, "missing", reason=NOT_THERE[0], remedy=NOT_THERE[1])
    level, lock = _made_from(path)
    state: Literal["own", "old", "current"] = "own"
    if level:
        current = lock == _hash(level) and not (_must_copy() and is_a_link(python))
        state = "current" if current else "old"
    home = Path(config["home"])
    found = Packages(path, state, level, python, version, home.parent, site_packages)
    try:
        for place in _taken_by_python(found, home):
            only_ours(place)
    except Unsafe as unsafe:
        return found._replace(state="unsafe", reason=unsafe.reason, remedy=unsafe.remedy)
    return found


def _configuration(path: Path) -> dict[str, str]:
    try:
        lines = (path / "pyvenv.cfg").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.partition("=") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _made_from(path: Path) -> tuple[Level | Literal[""], str]:
    """Level and hash of the lock file, by the marker that `setup` writes last."""
    try:
        marker = json.loads((path / MARKER).read_bytes())
        return next(level for level in LEVELS if level == marker["level"]), marker["lock"]
    except (OSError, ValueError, TypeError, LookupError, StopIteration):
        return "", ""


def _hash(level: Level) -> str:
    return hashlib.sha256(lock_file(level).read_bytes()).hexdigest()


def lock_file(level: Level) -> Path:
    """The packages of a level, by exact version and hash."""
    return LOCKS / f"{level}.txt"


def _must_copy() -> bool:
    """Whether AppArmor may want a profile for our Python: it goes by path, and a link's path is every Python's."""
    return RESTRICTION.exists()


def is_a_link(python: Path) -> bool:
    """Whether an environment's program lies outside it, as it does unless it was copied."""
    return Path(os.path.realpath(python)).parent != Path(os.path.realpath(python.parent))


# --- who could change it ---------------------------------------------------------------------------------------
#
# The engine starts the environment's Python with the server's rights, before there is a wall: whoever can change what
# that runs is the server. So its files and folders, and the way to them, must be root's or ours, and nobody else's to
# write to. What lies deeper in those folders is not looked at: only root or we could have put it there.
#
# What a group may write to passes when nobody else is in that group: on many systems a user has a group of its own,
# and a mask that lets it write, and Debian gives /usr/local to the group `staff`, which is empty.


def _taken_by_python(found: Packages, home: Path) -> Iterator[Path]:
    """What its Python takes code from when it starts, and where it looks for some."""
    library = found.site_packages.parent
    yield from (found.path, found.path / "pyvenv.cfg", found.python.parent, found.python)
    yield from (library.parent, library, found.site_packages)
    for folder in (home, *home.parents):
        yield folder
        looked_at = [place for lib in LIBRARIES for place in (folder / lib, folder / lib / library.name)]
        yield from filter(os.path.isdir, looked_at)
        if any(os.path.exists(place / "os.py") for place in looked_at):
            return


def only_ours(path: Path, sticky: bool = False) -> None:
    """Raise Unsafe when others than root and us could change what `path` leads to, or what is in it.

    sticky: whether they may add to it, if they cannot rename what is there. On the way to it they always may.
    """
    try:
        steps = _steps(path)
        for step in steps:
            _check_step(step, sticky or step != steps[-1])
    except OSError as error:
        raise Unsafe(f"{path} cannot be examined: {error.strerror}.", "Make it readable for the server.") from None


def _steps(path: Path) -> list[Path]:
    """Every folder and link on the way to `path`, and what it leads to in the end. Raises OSError."""
    here, steps, left = Path("/"), list[Path](), list(reversed(path.parts))
    while left:
        name = left.pop()
        here = here.parent if name == ".." else here / name
        steps.append(here)
        if here.is_symlink():
            left += reversed(here.readlink().parts)
            here = here.parent
        if len(steps) > STEPS_AT_MOST:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return steps


def _check_step(step: Path, sticky: bool) -> None:
    found = step.lstat()
    if found.st_uid not in (0, os.geteuid()):
        raise Unsafe(
            f"Others could change what the server runs: {step} belongs to {_name_of(found.st_uid)}.",
            "Let it belong to root or to the server's user; or, as that user, make the environment in another folder"
            " (`--sandbox-env`) or of another Python (`--python`): `afterglow sandbox setup`.",
        )
    if stat.S_ISLNK(found.st_mode) or (sticky and found.st_mode & stat.S_ISVTX):
        return
    everyone = found.st_mode & stat.S_IWOTH
    if everyone or (found.st_mode & stat.S_IWGRP and (_has_others(found.st_gid) or _names_more(step))):
        who = "everyone" if everyone else "a group with others in it"
        raise Unsafe(
            f"Others could change what the server runs: {step} can be written by {who}.",
            f"Take them the right to: `chmod go-w {shlex.quote(str(step))}`.",
        )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _has_others(gid: int) -> bool:
    """Whether others than root and us are in a group, or may be: a directory service need not list them."""
    if gid == 0:
        return False
    users = pwd.getpwall()
    ours = {user.pw_name for user in users if user.pw_uid in (0, os.geteuid())}
    try:
        name, _, _, members = grp.getgrgid(gid)
    except KeyError:
        return gid != os.getegid()
    listed = {*members, *(user.pw_name for user in users if user.pw_gid == gid)}
    return bool(listed - ours) or (name not in ours and gid >= FIRST_ORDINARY_GROUP)


def _names_more(path: Path) -> bool:
    """Whether an access list names others; then what a mode says of the group bounds them, too."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        return False


# --- setting it up ---------------------------------------------------------------------------------------------


def setup(path: Path, level: Level, python: str | None, say: Say) -> Packages:
    """Have the packages of `level`, or of a higher one that is there already, at `path`; say what is done, in lines.

    python: the program to make it of; None: this one, unless what is there will do. Does nothing when all is as it
    should be. Raises ConfigError, and then nothing has changed.
    """
    base = _ask(python or sys.executable)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        only_ours(path.parent, sticky=True)
        with _alone(path, say):
            found = describe(path)
            if not found.level and (found.usable or _is_something_else(path)):
                raise ConfigError(
                    f"{path} was not made by this command, and is left alone. Remove it, or name another folder."
                )
            level = max(level, found.level or level, key=LEVELS.index)
            same = python is None or _minor(base.version) == _minor(found.version)
            if (found.state, found.level) == ("current", level) and same:
                say(f"Already there: {level}, Python {found.version}, in {path}")
                return found
            return _build(path, level, base, say)
    except Unsafe as unsafe:
        raise ConfigError(str(unsafe)) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(
            f"The environment {path} cannot be made: {where}{error.strerror}. The setting sandbox_env names another"
            " place."
        ) from None


def _build(path: Path, level: Level, base: _Python, say: Say) -> Packages:
    started = time.monotonic()
    with _building(path) as build:
        _make(build, level, base, say)
        _put_in_place(build, path)
    say(f"Ready after {time.monotonic() - started:.0f} s: {_size(path) / 1e6:,.0f} MB in {path}")
    return describe(path)


@contextlib.contextmanager
def _alone(path: Path, say: Say) -> Iterator[None]:
    """Two at once would build in the same folder; the second waits, and then finds it done."""
    # In a sticky folder it may be another's: neither a link is followed, nor a pipe waited for, nor anything written.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    lock = os.open(path.parent / f".{path.name}.lock", flags, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another setup is at work on it; waiting for that one.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_something_else(path: Path) -> bool:
    """Whether there is something at `path` that `setup` did not put there."""
    if not os.path.lexists(path):
        return False
    return not path.is_dir() or (not (path / MARKER).exists() and any(path.iterdir()))


def _ask(python: str) -> _Python:
    try:
        asked = subprocess.run([python, "-I", "-c", ASK_PYTHON], capture_output=True, text=True, check=True)  # noqa: S603
        version, program = asked.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError, ValueError):
        raise ConfigError(f"{python} is no Python program.") from None
    if _minor(version) < OLDEST_PYTHON:
        raise ConfigError(f"{python} is Python {version}; the code interpreter needs 3.11 or newer.")
    return _Python(program, version)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


@contextlib.contextmanager
def _building(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, and none at the end, whatever happens. What a killed setup left there goes first."""
    build, old = _beside(path, "new"), _beside(path, "old")
    shutil.rmtree(build, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    build.mkdir()
    build.chmod(0o755)
    try:
        yield build
    finally:
        shutil.rmtree(build, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, what: str) -> Path:
    return path.parent / f".{path.name}.{what}"


def _make(build: Path, level: Level, base: _Python, say: Say) -> None:
    lock = lock_file(level)
    say(f"Making the interpreter's environment: {level}, Python {base.version}")
    _run("The virtual environment cannot be made", base.program, "-m", "venv", build)
    if (empty := describe(build)).state == "unsafe":  # the Python that it is made of
        raise Unsafe(empty.reason, empty.remedy)
    python = build / "bin" / "python"
    _install(python, lock, say)
    _run("pip cannot be removed", python, "-m", "pip", "uninstall", "--yes", "--quiet", "pip", "setuptools")
    _strip(build)
    if _must_copy():
        _copy_python(python)
    say("Compiling, and looking for fonts …")
    _compile(python, build)
    _try(python, build)
    marker = build / MARKER
    marker.write_text(json.dumps({"level": level, "lock": _hash(level), "python": base.version}), "utf-8")
    marker.chmod(0o644)


def _put_in_place(build: Path, path: Path) -> None:
    if path.exists():
        path.rename(_beside(path, "old"))
    build.rename(path)


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


# --- the steps -------------------------------------------------------------------------------------------------


def _run(trouble: str, *command: str | Path, **options: Any) -> None:
    """Run a Python to its end, apart from the user's own modules. Raises ConfigError with the last it said."""
    program, *arguments = command
    # Whatever the user's mask is: the server and its sessions may run as others, and must be able to read.
    ended = subprocess.run(  # noqa: S603
        [program, "-I", *arguments], capture_output=True, text=True, errors="replace", umask=0o022, **options
    )
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()
        hint = " Debian, Ubuntu: apt-get install python3-venv." if "ensurepip" in ended.stderr + ended.stdout else ""
        raise ConfigError(f"{trouble}: {without_secrets(said[-1])}.{hint}")


def _install(python: Path, lock: Path, say: Say) -> None:
    command: list[str | Path] = [python, "-I", "-u", "-m", "pip", "install", "--require-hashes", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-compile", "--no-user", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--requirement", lock]
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", umask=0o022
    ) as pip:
        assert pip.stdout is not None
        said = _follow(pip.stdout, len(_pinned(lock)), say)
    if pip.returncode:
        raise ConfigError(_why(said))


def _pinned(lock: Path) -> list[str]:
    return re.findall(r"^([a-z0-9][\w.-]*)==", lock.read_text("utf-8"), re.MULTILINE)


def _follow(lines: Iterable[str], total: int, say: Say) -> list[str]:
    """Say of pip's words what a waiting person wants to know, and return all of them."""
    heard: list[str] = []
    number, waiting = 0, ""
    for line in lines:
        if waiting:  # the line after a package's name tells its size, when it is fetched
            size = SIZE.match(line)
            say(f"{waiting} ({size[1]})" if size else waiting)
            waiting = ""
        if line.startswith("Ignoring "):  # it is for other machines or Pythons
            total -= 1
        elif found := PACKAGE.match(line):
            number += 1
            waiting = f"  {number:2} of {total}  {found['name'].replace('_', '-')} {found['version']}"
        elif line.startswith("Installing "):
            say("Installing …")
        elif "Retrying (" in line and not any("Retrying (" in earlier for earlier in heard):
            say("The package index does not answer; trying again …")
        heard.append(line.rstrip())
    return heard


def _why(said: list[str]) -> str:
    """What went wrong with pip, and what to do about it."""
    text = "\n".join(said)
    last = next((line for line in reversed(said) if line.startswith("ERROR: ")), said[-1] if said else "nothing")
    if "Retrying (" in text or "Could not fetch URL" in text:
        return (
            "The package index cannot be reached. Check the network; `pip config list` shows the index and the proxy"
            f" that are used. pip said: {without_secrets(last)}"
        )
    if "DO NOT MATCH THE HASHES" in text:
        return (
            "The package index serves another file than the one that was locked; nothing of it was installed. Use an"
            " index that mirrors files unchanged."
        )
    if "No matching distribution" in text:
        return (
            "The package index has no ready-made package for this machine and this Python; another Python can be named"
            f" with --python. pip said: {without_secrets(last)}"
        )
    if "No space left on device" in text:
        return "The disk is full."
    return f"The packages cannot be installed. pip said: {without_secrets(last)}"


def without_secrets(text: str) -> str:
    """The text, without user names and passwords in addresses."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _strip(build: Path) -> None:
    """Programs that came with packages name the folder they were built in, and nobody calls them."""
    for file in (build / "bin").iterdir():
        if not file.name.startswith("python"):
            file.unlink()


def _copy_python(python: Path) -> None:
    program = Path(os.path.realpath(python))
    link = next(file for file in python.parent.iterdir() if file.is_symlink() and os.path.isabs(os.readlink(file)))
    link.unlink()
    shutil.copy2(program, link)


def _compile(python: Path, build: Path) -> None:
    """Into byte code, once: in a session the folder is read-only, and each would compile anew.

    Without a check of the source's time, which an image or a copied folder would not keep; and with the paths that a
    session has, to which the folders of this machine are not known. Some packages carry files that are wrong on
    purpose, for their tests; so the exit status says nothing.
    """
    workers = min(os.cpu_count() or 1, COMPILERS_AT_MOST)
    command: list[str | Path] = [python, "-I", "-m", "compileall", "-qq", "-j", str(workers)]
    [folder] = build.glob("lib/python*/site-packages")
    command += ["--invalidation-mode", "unchecked-hash", "-s", folder, "-p", PACKAGES, folder]
    subprocess.run(command, capture_output=True, umask=0o022, check=False)  # noqa: S603


def _try(python: Path, build: Path) -> None:
    """Import the packages, and keep the list of fonts that matplotlib makes when it is first imported."""
    plain = {"MPLCONFIGDIR": str(build / "matplotlib"), "HOME": "/nonexistent", "PATH": "/usr/bin:/bin"}
    _run("The packages do not work", python, "-B", "-c", TRIAL, env=plain)
