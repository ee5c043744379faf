"""The Python packages that model-written code may import: a virtual environment of its own, apart from the server's.

`setup` makes it from a lock file with hashes, beside its place, and renames it into it when it is whole: what is there
is finished. pip does the installing, so that index, proxy and certificates are those that the user has configured.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from afterglow.errors import ConfigError
from afterglow.settings import Settings

Level = Literal["base", "standard", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)
LOCKS = Path(__file__).parent / "locks"
MARKER = "afterglow.json"
OLDEST_PYTHON = (3, 11)
COMPILERS_AT_MOST = 8
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

    state: `missing`, there is none, or its Python is gone; `own`, a virtual environment that the operator made, used
    as it is; `old`, made by another release, or not as this machine needs it, but usable; `current`. level: empty for
    `own`. python: its program; version: `3.11.7`; base_prefix: the installation that it stands on; site_packages: what
    to put on sys.path. With `missing` none of these lead anywhere.
    Beside them `path / "matplotlib"` holds a font cache: copied to a folder that can be written, and named by
    MPLCONFIGDIR, it saves matplotlib the search for fonts.
    """

    path: Path
    state: Literal["missing", "own", "old", "current"]
    level: Level | Literal[""] = ""
    python: Path = Path()
    version: str = ""
    base_prefix: Path = Path()
    site_packages: Path = Path()

    @property
    def usable(self) -> bool:
        return self.state != "missing"


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
        return Packages(path, "missing")
    level, lock = _made_from(path)
    state: Literal["own", "old", "current"] = "own"
    if level:
        current = lock == _hash(level) and not (_must_copy() and is_a_link(python))
        state = "current" if current else "old"
    return Packages(path, state, level, python, version, Path(config["home"]).parent, site_packages)


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


# --- setting it up ---------------------------------------------------------------------------------------------


def setup(path: Path, level: Level, python: str | None, say: Say) -> Packages:
    """Have the packages of `level`, or of a higher one that is there already, at `path`; say what is done, in lines.

    python: the program to make it of; None: this one, unless what is there will do. Does nothing when all is as it
    should be. Raises ConfigError, and then nothing has changed.
    """
    base = _ask(python or sys.executable)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another setup is at work on it; waiting for that one.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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

    Without a check of the source's time, which an image or a copied folder would not keep. Some packages carry files
    that are wrong on purpose, for their tests; so the exit status says nothing.
    """
    workers = min(os.cpu_count() or 1, COMPILERS_AT_MOST)
    command: list[str | Path] = [python, "-I", "-m", "compileall", "-qq", "-j", str(workers)]
    command += ["--invalidation-mode", "unchecked-hash", build / "lib"]
    subprocess.run(command, capture_output=True, umask=0o022, check=False)  # noqa: S603


def _try(python: Path, build: Path) -> None:
    """Import the packages, and keep the list of fonts that matplotlib makes when it is first imported."""
    plain = {"MPLCONFIGDIR": str(build / "matplotlib"), "HOME": "/nonexistent", "PATH": "/usr/bin:/bin"}
    _run("The packages do not work", python, "-B", "-c", TRIAL, env=plain)
