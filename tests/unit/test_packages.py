"""The interpreter's packages: found, set up whole or not at all, and locked; with a stand-in for Python and pip."""

from __future__ import annotations

import errno
import fcntl
import grp
import json
import os
import pwd
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from afterglow.errors import ConfigError
from afterglow.sandbox import packages
from afterglow.settings import Settings

PROGRAM = r"""#!/bin/sh
# Stands in for Python, alone and in an environment: it makes one as venv does, and pip says what it was told to say.
here=$(dirname "$(readlink -f "$0")")
case "$*" in
*version_info*) cat "$here/version"; echo "$here/python3.11" ;;
*"-m venv"*)
    mkdir -p "$4/bin" "$4/lib/python3.11/site-packages"
    ln -s "$here/python3.11" "$4/bin/python3.11"; ln -s python3.11 "$4/bin/python"
    echo "#!$4/bin/python" >"$4/bin/pip"
    printf 'home = %s\nversion = %s\n' "$here" "$(cat "$here/version")" >"$4/pyvenv.cfg" ;;
*"pip install"*)
    echo "$@" >"$here/asked"
    touch "$(dirname "$0")/../lib/python3.11/site-packages/numpy.py"
    cat "$here/pip"; exit "$(cat "$here/status")" ;;
*) echo "$@" >>"$here/did" ;;
esac
"""


class StandIn:
    """The stand-in's program, and what its pip says and does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "python3.11"
        self.library = folder.parent / "lib/python3.11"
        folder.mkdir()
        self.library.mkdir(parents=True)
        (self.library / "os.py").touch()
        self.program.write_text(PROGRAM)
        self.program.chmod(0o755)
        self.is_version("3.11.7")
        self.pip_says("")

    def is_version(self, version: str) -> None:
        (self.folder / "version").write_text(f"{version}\n")

    def pip_says(self, text: str, status: int = 0) -> None:
        (self.folder / "pip").write_text(text)
        (self.folder / "status").write_text(str(status))


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(packages, "RESTRICTION", tmp_path / "no-such-file")
    return StandIn(tmp_path / "python")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the environment is to be; its folder holds nothing else."""
    return tmp_path / "place" / "sandbox"


def set_up(path: Path, python: StandIn, level: packages.Level = "base") -> list[str]:
    said: list[str] = []
    packages.setup(path, level, str(python.program), said.append)
    return said


def left_beside(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()} - {path.name, f".{path.name}.lock"}


# --- finding ---------------------------------------------------------------------------------------------------


def test_the_setting_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`sandbox_env` is taken as it is, made absolute; `~` is the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.environment(Settings(sandbox_env="~/there")) == tmp_path / "there"
    monkeypatch.chdir(tmp_path)
    assert packages.environment(Settings(sandbox_env="here")) == tmp_path / "here"


def test_the_folder_without_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """It is inside the server's virtual environment, and at home when there is none."""
    monkeypatch.setattr(sys, "prefix", "/srv/venv")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert packages.environment(Settings()) == Path("/srv/venv/sandbox")
    monkeypatch.setattr(sys, "prefix", "/usr")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.environment(Settings()) == tmp_path / ".local/share/afterglow/sandbox"


def test_nothing_is_found_where_nothing_is(tmp_path: Path, python: StandIn, path: Path):
    """No folder, a file, an empty folder, a broken description or a Python that has gone: the packages are missing."""
    found = packages.describe(path)
    assert (found.state, found.remedy) == ("missing", "Run `afterglow sandbox setup`.")
    (tmp_path / "file").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pyvenv.cfg").write_bytes(b"\xff\xfe home = ")
    for there in (tmp_path, tmp_path / "file", tmp_path / "broken"):
        assert not packages.describe(there).usable
    set_up(path, python)
    python.program.unlink()
    assert packages.describe(path).state == "missing"


def test_an_environment_of_the_operators_own(python: StandIn, path: Path):
    """A virtual environment that setup did not make is used as it is, and never replaced."""
    set_up(path, python)
    (path / packages.MARKER).unlink()
    found = packages.describe(path)
    assert (found.state, found.level, found.usable) == ("own", "", True)
    with pytest.raises(ConfigError, match="was not made by this command, and is left alone"):
        set_up(path, python)
    assert packages.describe(path) == found


@pytest.mark.parametrize("marker", ["", "[]", "null", "{}", '{"level": "huge", "lock": ""}', '{"level": ["base"]}'])
def test_a_marker_that_is_none(python: StandIn, path: Path, marker: str):
    """What is no marker of ours makes the environment the operator's own."""
    set_up(path, python)
    (path / packages.MARKER).write_text(marker)
    assert packages.describe(path).state == "own"


def test_what_is_found(python: StandIn, path: Path):
    """A finished environment tells level, Python, and where its packages are."""
    set_up(path, python, "standard")
    assert packages.describe(path) == packages.Packages(
        path=path,
        state="current",
        level="standard",
        python=path / "bin/python",
        version="3.11.7",
        base_prefix=python.folder.parent,
        site_packages=path / "lib/python3.11/site-packages",
    )


# --- who could change it ---------------------------------------------------------------------------------------

OTHER = 4242
MADE = ("", "bin", "bin/python", "bin/python3.11", "pyvenv.cfg", "lib", "lib/python3.11/site-packages")


def seems(monkeypatch: pytest.MonkeyPatch, place: Path, uid: int | None = None, gid: int | None = None) -> None:
    """Have a file belong to another user or group, as far as `lstat` tells."""
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        told = list(real(path))
        if path == place:
            told[4:6] = [told[4] if uid is None else uid, told[5] if gid is None else gid]
        return os.stat_result(told)

    monkeypatch.setattr(Path, "lstat", lstat)


def places(path: Path, python: StandIn) -> list[Path]:
    """What an environment's Python takes code from, and a folder on the way."""
    return [*(path / name for name in MADE), path.parent, python.program, python.folder, python.library]


def test_what_belongs_to_others(python: StandIn, path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Python whose code is another user's is not run: the packages are not usable, and why is told."""
    set_up(path, python)
    for place in places(path, python):
        with monkeypatch.context() as changed:
            seems(changed, place, uid=OTHER)
            found = packages.describe(path)
        assert not found.usable
        assert found.reason == f"Others could change what the server runs: {place} belongs to user {OTHER}."
        assert "`afterglow sandbox setup`" in found.remedy
    assert packages.describe(path).usable


def test_what_others_can_write(python: StandIn, path: Path):
    """The same of what anyone may write to."""
    set_up(path, python)
    for place in places(path, python):
        place = place.resolve()
        before = place.stat().st_mode
        place.chmod(before | 0o002)
        found = packages.describe(path)
        place.chmod(before)
        assert (found.state, found.usable) == ("unsafe", False)
        assert found.reason == f"Others could change what the server runs: {place} can be written by everyone."
        assert found.remedy == f"Take them the right to: `chmod go-w {place}`."
    assert packages.describe(path).usable


def test_a_sticky_folder(python: StandIn, path: Path, monkeypatch: pytest.MonkeyPatch):
    """It may be on the way, since nobody can replace what is another's there, but not hold the packages themselves."""
    set_up(path, python)
    path.parent.chmod(0o1777)
    assert packages.describe(path).usable
    (path.parent / "link").symlink_to(path)
    assert packages.describe(path.parent / "link").usable
    seems(monkeypatch, path.parent / "link", uid=OTHER)
    assert f"{path.parent}/link belongs to" in packages.describe(path.parent / "link").reason
    (path / "lib/python3.11/site-packages").chmod(0o1777)
    assert "can be written by everyone" in packages.describe(path).reason


@pytest.mark.parametrize(
    ("group", "gid", "members", "usable"),
    [
        ("root", 0, ["operator"], True),
        ("me", 1000, [], True),
        ("me", 1000, ["me"], True),
        ("me", 1000, ["other"], False),
        ("staff", 50, [], True),
        ("staff", 50, ["other"], False),
        ("users", 100, [], False),  # another's first group
        ("domain users", 20_000, [], False),  # of a directory that lists nobody
    ],
)
def test_what_a_group_can_write(
    python: StandIn, path: Path, monkeypatch: pytest.MonkeyPatch, group: str, gid: int, members: list[str], usable: bool
):
    """What a group may write to will do when nobody else is in it: the user's own group, or the system's empty one."""
    set_up(path, python)
    path.chmod(0o775)
    seems(monkeypatch, path, gid=gid)
    users = [("me", os.geteuid(), 1000), ("other", OTHER, 100)]
    known = [pwd.struct_passwd((name, "x", uid, first, "", "/", "")) for name, uid, first in users]
    monkeypatch.setattr(pwd, "getpwall", lambda: known)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((group, "x", gid, members)))
    assert packages.describe(path).usable is usable
    assert ("a group with others" in packages.describe(path).reason) is not usable


def test_an_access_list(python: StandIn, path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a group of one may write to will not do when an access list lets others in as well."""
    set_up(path, python)
    path.chmod(0o775)
    seems(monkeypatch, path, gid=0)
    assert packages.describe(path).usable
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_access"])
    assert not packages.describe(path).usable


def test_links_without_end(python: StandIn, path: Path):
    """A home that is a circle of links is no Python that is run."""
    set_up(path, python)
    (path.parent / "circle").symlink_to("circle")
    (path / "pyvenv.cfg").write_text(f"home = {path.parent}/circle\nversion = 3.11.7\n")
    assert packages.describe(path).reason == f"{path.parent}/circle cannot be examined: {os.strerror(errno.ELOOP)}."


# --- setting up ------------------------------------------------------------------------------------------------


def test_what_is_made(python: StandIn, path: Path):
    """pip installs from the lock with hashes and no builds; all is compiled and tried; no program but Python stays."""
    said = set_up(path, python)
    asked = (python.folder / "asked").read_text()
    for flag in ("--require-hashes", "--no-deps", "--only-binary :all:", f"--requirement {packages.lock_file('base')}"):
        assert flag in asked
    did = (python.folder / "did").read_text().splitlines()
    assert [line for line in did if line.startswith("-I -m")] == [
        "-I -m pip uninstall --yes --quiet pip setuptools",
        next(line for line in did if "-m compileall" in line),
    ]
    assert {file.name for file in (path / "bin").iterdir()} == {"python", "python3.11"}
    assert json.loads((path / packages.MARKER).read_text())["python"] == "3.11.7"
    assert said[0] == "Making the interpreter's environment: base, Python 3.11.7"
    assert re.fullmatch(rf"Ready after \d+ s: \d+ MB in {path}", said[-1])


def test_a_second_time_does_nothing(python: StandIn, path: Path):
    """What is there and current is left as it is, also when a lower level is asked for."""
    set_up(path, python, "standard")
    (python.folder / "asked").unlink()
    assert set_up(path, python) == [f"Already there: standard, Python 3.11.7, in {path}"]
    assert not (python.folder / "asked").exists()


def test_a_higher_level_replaces_a_lower(python: StandIn, path: Path):
    """Asked for more, it makes the environment anew."""
    set_up(path, python)
    set_up(path, python, "full")
    assert packages.describe(path).level == "full"
    assert left_beside(path) == set()


def test_another_release_renews_it_at_its_level(python: StandIn, path: Path):
    """A changed lock file makes it old, but usable; setup then keeps the level that was chosen before."""
    set_up(path, python, "standard")
    marker = json.loads((path / packages.MARKER).read_text())
    (path / packages.MARKER).write_text(json.dumps({**marker, "lock": "of an earlier release"}))
    assert (packages.describe(path).state, packages.describe(path).usable) == ("old", True)
    set_up(path, python)
    assert (packages.describe(path).state, packages.describe(path).level) == ("current", "standard")


def test_another_python_that_is_named_replaces_it(python: StandIn, path: Path):
    """Without --python the one that is there stays; a named one of another version takes its place."""
    set_up(path, python)
    said: list[str] = []
    packages.setup(path, "base", None, said.append)
    assert said == [f"Already there: base, Python 3.11.7, in {path}"]
    python.is_version("3.12.1")
    assert set_up(path, python)[0] == "Making the interpreter's environment: base, Python 3.12.1"


def test_a_failure_leaves_what_was_there(python: StandIn, path: Path):
    """When pip fails, neither a half environment nor any other trace is left, and the old one still stands."""
    python.pip_says("ERROR: it was not to be\n", 1)
    with pytest.raises(ConfigError, match="it was not to be"):
        set_up(path, python)
    assert not path.exists()
    python.pip_says("")
    set_up(path, python)
    python.pip_says("ERROR: it was not to be\n", 1)
    with pytest.raises(ConfigError):
        set_up(path, python, "full")
    assert (packages.describe(path).state, packages.describe(path).level) == ("current", "base")
    assert left_beside(path) == set()


def test_what_a_killed_setup_left(python: StandIn, path: Path):
    """A half environment beside the place counts for nothing, and the next setup clears it away."""
    half = path.parent / ".sandbox.new" / "lib"
    half.mkdir(parents=True)
    (path.parent / ".sandbox.old").mkdir()
    assert packages.describe(path).state == "missing"
    set_up(path, python)
    assert packages.describe(path).state == "current"
    assert left_beside(path) == set()


def test_something_else_is_in_the_way(python: StandIn, path: Path):
    """A folder with something in it, or a file, is refused and untouched; an empty folder is taken."""
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is left alone"):
        set_up(path, python)
    assert (path / "thesis.txt").read_text() == "years of work"
    (path / "thesis.txt").unlink()
    set_up(path, python)
    assert packages.describe(path).state == "current"


def test_two_at_once(python: StandIn, path: Path):
    """The second waits until the first is done, and then does nothing more."""
    set_up(path, python)
    said: list[str] = []
    with (path.parent / ".sandbox.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)

        def listen(line: str) -> None:
            said.append(line)
            fcntl.flock(first, fcntl.LOCK_UN)

        packages.setup(path, "base", str(python.program), listen)
    assert said[0] == "Another setup is at work on it; waiting for that one."
    assert said[1].startswith("Already there")


def test_a_lock_that_is_a_link(python: StandIn, path: Path, tmp_path: Path):
    """A link in the place of the lock is not followed: what it leads to is as it was."""
    (tmp_path / "victim").write_text("precious")
    path.parent.mkdir()
    (path.parent / ".sandbox.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"cannot be made: .*\.sandbox\.lock"):
        set_up(path, python)
    assert (tmp_path / "victim").read_text() == "precious"
    (path.parent / ".sandbox.lock").unlink()
    os.link(tmp_path / "victim", path.parent / ".sandbox.lock")
    set_up(path, python)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_that_others_can_write(python: StandIn, path: Path):
    """Nothing is made in a folder where anyone could put something else in its place; in a sticky one it is."""
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(ConfigError, match=rf"{path.parent} can be written by everyone\. .*chmod go-w"):
        set_up(path, python)
    assert list(path.parent.iterdir()) == []
    path.parent.chmod(0o1777)
    set_up(path, python)
    assert packages.describe(path).usable


def test_of_a_python_that_others_could_change(python: StandIn, path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of such a Python no environment is made, and nothing is fetched for it."""
    seems(monkeypatch, python.program, uid=OTHER)
    with pytest.raises(ConfigError, match=rf"{python.program} belongs to user {OTHER}\. .*`--python`"):
        set_up(path, python)
    assert not (python.folder / "asked").exists()
    assert left_beside(path) == set()


def test_an_environment_that_others_could_change_is_renewed(python: StandIn, path: Path):
    """setup does not count it as done, and makes it anew."""
    set_up(path, python, "standard")
    (path / "bin").chmod(0o777)
    assert packages.describe(path).state == "unsafe"
    set_up(path, python)
    assert (packages.describe(path).state, packages.describe(path).level) == ("current", "standard")


def test_byte_code_names_no_folder_of_the_machine(tmp_path: Path):
    """It has a session's paths, and is taken where it lies, without a look at its source."""
    folder = tmp_path / "lib/python3.11/site-packages"
    (folder / "module").mkdir(parents=True)
    (folder / "module/__init__.py").write_text("value = 1\n")
    packages._compile(Path(sys.executable), tmp_path)
    [compiled] = folder.rglob("*.pyc")
    assert b"/opt/packages/module/__init__.py" in compiled.read_bytes()
    assert str(tmp_path).encode() not in compiled.read_bytes()
    (folder / "module/__init__.py").write_text("value = 2\n")
    code = f"import sys; sys.path.append({str(folder)!r}); import module; print(module.value, module.__file__)"
    said = subprocess.check_output([sys.executable, "-I", "-S", "-B", "-c", code], text=True)
    assert said == f"1 {folder}/module/__init__.py\n"


def test_others_can_read_it(python: StandIn, path: Path):
    """Whatever the user's mask, everyone can read what was installed, as sessions must, and nobody else write to it."""
    before = os.umask(0o077)
    try:
        set_up(path, python)
    finally:
        os.umask(before)
    for file in [path, *path.rglob("*")]:
        mode = stat.S_IMODE(file.stat().st_mode)
        assert mode & 0o444 == 0o444, file
        assert not mode & 0o022, file


def test_a_copied_python_where_apparmor_wants_one(python: StandIn, path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the kernel restricts user namespaces, the program is a file of its own; one with a link is renewed."""
    set_up(path, python)
    assert packages.is_a_link(path / "bin" / "python")
    monkeypatch.setattr(packages, "RESTRICTION", Path(__file__))
    assert packages.describe(path).state == "old"
    set_up(path, python)
    assert not packages.is_a_link(path / "bin" / "python")
    assert (path / "bin" / "python").resolve() == path / "bin" / "python3.11"
    assert os.access(path / "bin" / "python", os.X_OK)
    assert packages.describe(path).state == "current"


@pytest.mark.parametrize(
    ("version", "said"), [("3.10.13", "is Python 3.10.13; the code interpreter needs 3.11"), ("", "no")]
)
def test_a_python_that_will_not_do(python: StandIn, path: Path, version: str, said: str):
    """A Python before 3.11, or what is none, is refused by name."""
    python.is_version(version)
    with pytest.raises(ConfigError, match=said):
        set_up(path, python)
    with pytest.raises(ConfigError, match=r"nowhere/python is no Python program\."):
        packages.setup(path, "base", "/nowhere/python", print)


def test_a_place_that_cannot_be_written(python: StandIn, tmp_path: Path):
    """An operating system's refusal becomes a sentence that names the setting."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made: .*/file: File exists\. The setting sandbox_env"):
        set_up(tmp_path / "file" / "sandbox", python)


# --- pip's words -----------------------------------------------------------------------------------------------


def test_what_is_told_of_pips_words(python: StandIn, path: Path):
    """Each package with its number of how many, and its size; those for other machines are not counted."""
    pinned = len(re.findall(r"^\S+==", packages.lock_file("base").read_text(), re.MULTILINE))
    python.pip_says(
        "Looking in indexes: https://me:secret@index.example/simple\n"
        "Ignoring contourpy: markers 'python_full_version >= \"3.12\"' don't match your environment\n"
        "Processing /mirror/et_xmlfile-2.0.0-py3-none-any.whl (from -r base.txt (line 151))\n"
        "Collecting fonttools==4.68.0 (from -r base.txt (line 155))\n"
        "  Downloading https://index.example/fonttools-4.68.0-cp311-cp311-manylinux.whl (5.5 MB)\n"
        "Collecting pillow==13.0.0\n"
        "  Using cached pillow-13.0.0-cp311-cp311-manylinux.whl (920 kB)\n"
        "Installing collected packages: pillow, fonttools, et-xmlfile\n"
        "Successfully installed et-xmlfile-2.0.0 fonttools-4.68.0 pillow-13.0.0\n"
    )
    assert set_up(path, python)[1:-2] == [
        f"   1 of {pinned - 1}  et-xmlfile 2.0.0",
        f"   2 of {pinned - 1}  fonttools 4.68.0 (5.5 MB)",
        f"   3 of {pinned - 1}  pillow 13.0.0 (920 kB)",
        "Installing …",
    ]


RETRYING = (
    "WARNING: Retrying (Retry(total=4, connect=None, read=None, redirect=None, status=None)) after connection broken by"
    " 'NewConnectionError(': Failed to establish a new connection: [Errno 111] Connection refused')': /simple/numpy/\n"
)


@pytest.mark.parametrize(
    ("pip", "said"),
    [
        (
            RETRYING * 5 + "ERROR: No matching distribution found for numpy==2.4.6\n",
            "The package index cannot be reached.",
        ),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n",
            "another file than the one that was",
        ),
        ("ERROR: No matching distribution found for numpy==2.4.6\n", "no ready-made package for this machine"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
            "The disk is full.",
        ),
        (
            "ERROR: 401 for https://me:p@ss@index.example/simple\n",
            "pip said: ERROR: 401 for https://index.example/simple",
        ),
        ("Killed\n", "pip said: Killed"),
        ("", "pip said: nothing"),
    ],
)
def test_what_pip_cannot_do(python: StandIn, path: Path, pip: str, said: str):
    """Each way in which pip fails becomes a sentence about what to do, and no address shows a password."""
    python.pip_says(pip, 1)
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        set_up(path, python)
    assert "p@ss" not in str(error.value)


def test_an_index_that_is_silent_is_told_of_once(python: StandIn, path: Path):
    """While pip tries again and again, one line says so."""
    python.pip_says(RETRYING * 3)
    assert set_up(path, python)[1:-2] == ["The package index does not answer; trying again …"]


# --- the lock files --------------------------------------------------------------------------------------------

# Packages under the AGPL or the GPL that model-written code is known to ask for, and what they stand on.
COPYLEFT = {
    "borb", "cvxopt", "ghostscript", "html2text", "igraph", "levenshtein", "mutagen", "mysqlclient", "pdf2docx",
    "pymupdf", "pymupdfb", "pyqt5", "pyqt6", "python-levenshtein", "rpy2", "thefuzz", "ultralytics", "unidecode",
}  # fmt: skip


def locked(level: packages.Level) -> dict[str, set[str]]:
    """The versions of each package; two, where old Pythons need another one."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", packages.lock_file(level).read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def wanted(file: IO[str]) -> set[str]:
    return {line.strip() for line in file if line[:1].isalpha()}


@pytest.mark.parametrize("level", packages.LEVELS)
def test_everything_is_locked_by_hash(level: packages.Level):
    """Each package has an exact version and a SHA-256, what was wanted is there, and no address is in the file."""
    text = packages.lock_file(level).read_text()
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.match(r"[\w.-]+==[\w.]+( ; [^\\]+)? \\\n", entry), entry.splitlines()[0]
        assert re.search(r"\n    --hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]
    assert "://" not in text
    with packages.lock_file(level).with_suffix(".in").open() as file:
        assert wanted(file) <= locked(level).keys()


@pytest.mark.parametrize(("lower", "higher"), [("base", "standard"), ("standard", "full")])
def test_levels_build_on_each_other(lower: packages.Level, higher: packages.Level):
    """A higher level has all of a lower one, in the same versions."""
    assert locked(lower).items() <= locked(higher).items()


@pytest.mark.parametrize("level", packages.LEVELS)
def test_no_licence_binds_the_operator(level: packages.Level):
    """Nothing that is locked is under the AGPL or the GPL."""
    assert not COPYLEFT & locked(level).keys()
