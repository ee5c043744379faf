"""What the wall decides before it asks the kernel: rights, folders, words. What comes of it is in tests/sandbox."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from afterglow.sandbox.guest import launch, refusals, syscalls, wall
from afterglow.sandbox.guest.launch import Bind, Python, Refused, Way

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the wall is Linux's")


# --- Landlock --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("abi", "files", "tcp", "scopes", "flags", "size"),
    [
        (1, 0x1FFF, 0, 0, 0, 8),
        (2, 0x3FFF, 0, 0, 0, 8),
        (3, 0x7FFF, 0, 0, 0, 8),
        (4, 0x7FFF, 3, 0, 0, 16),
        (5, 0xFFFF, 3, 0, 0, 16),
        (6, 0xFFFF, 3, 3, 0, 24),
        (7, 0xFFFF, 3, 3, 1, 24),
        (99, 0xFFFF, 3, 3, 1, 24),
    ],
)
def test_landlock_refuses_all_that_its_version_can(
    abi: int, files: int, tcp: int, scopes: int, flags: int, size: int
) -> None:
    """Each version is asked for everything it knows, in a struct of the size it knows; later ones for what we know."""
    known = wall.landlock(abi)
    assert known == (files, tcp, scopes, flags)
    assert len(known.ruleset()) == size
    assert struct.unpack_from("Q", known.ruleset()) == (files,)


def test_no_folder_of_the_host_can_be_written() -> None:
    """What may be written to is the session's own and /dev/null; of /proc only names are shown."""
    assert set(wall.WRITE) == {"/mnt/data", "/tmp", "/dev/shm", "/home/sandbox", "/dev/null"}
    assert "/proc" not in wall.READ
    assert "/" not in wall.READ


# --- the kernel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing", "error", "words"),
    [
        ("landlock_create_ruleset", errno.ENOSYS, "has no Landlock: 5.13 or newer"),
        ("landlock_create_ruleset", errno.EOPNOTSUPP, "lsm="),
        ("landlock_create_ruleset", errno.EPERM, "cannot be used here"),
        ("seccomp", errno.ENOSYS, "no seccomp"),
    ],
)
def test_what_the_kernel_lacks_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch, failing: str, error: int, words: str
) -> None:
    """Each missing layer has its own sentence for the operator."""

    def call(name: str, *_arguments: Any) -> int:
        ctypes.set_errno(error)
        return -1 if name == failing else 1 if name == "landlock_create_ruleset" else 0

    monkeypatch.setattr(wall, "_call", call)
    assert words in str(wall.check_kernel())


def test_an_unknown_processor_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are tables of system calls for two kinds of processor, and nothing runs on others."""
    monkeypatch.setattr(syscalls, "MACHINES", {})
    assert "x86-64 and 64-bit ARM" in str(wall.check_kernel())


# --- what is in the jail ---------------------------------------------------------------------------------------


def a_python(prefix: Path, name: str = "python3.12") -> Python:
    """A Python in a folder with much beside it that is none of a session's business."""
    for folder in (f"lib/{name}/site-packages/secret", "lib/private", "bin", "etc", "share", "pkgs"):
        (prefix / folder).mkdir(parents=True)
    for file in (f"bin/{name}", "bin/private", f"lib/{name}/os.py", f"lib/lib{name}.so.1.0", "lib/libpython3.so"):
        (prefix / file).touch()
    return Python(name, str(prefix), str(prefix / "bin" / name), str(prefix / "lib" / name))


def test_of_a_python_of_its_own_only_the_python_is_shown(tmp_path: Path) -> None:
    """Its program, its library and libpython; the rest of its folder may be a home."""
    python = a_python(tmp_path)
    assert launch.python_binds(python) == [
        Bind(f"{tmp_path}/bin/python3.12", "opt/python/bin/python3.12"),
        Bind(f"{tmp_path}/lib/python3.12", "opt/python/lib/python3.12"),
        Bind(f"{tmp_path}/lib/libpython3.12.so.1.0", "opt/python/lib/libpython3.12.so.1.0"),
        Bind(f"{tmp_path}/lib/libpython3.so", "opt/python/lib/libpython3.so"),
    ]
    assert python.inside == "/opt/python/bin/python3.12"
    assert launch.environment(python)["LD_LIBRARY_PATH"] == "/opt/python/lib"


def test_of_conda_the_libraries_are_shown_too(tmp_path: Path) -> None:
    """There a module of the standard library may need what lies beside it; tokens and packages are elsewhere."""
    python = a_python(tmp_path)
    (tmp_path / "conda-meta").mkdir()
    assert launch.python_binds(python) == [
        Bind(f"{tmp_path}/bin/python3.12", "opt/python/bin/python3.12"),
        Bind(f"{tmp_path}/lib", "opt/python/lib"),
    ]


def test_the_python_of_the_system_is_shown_with_the_system() -> None:
    """Nothing is bound for it twice, and it has no library path."""
    python = Python("python3.12", "/usr", "/usr/bin/python3.12", "/usr/lib/python3.12")
    assert launch.python_binds(python) == []
    assert python.inside == "/usr/bin/python3.12"
    assert "LD_LIBRARY_PATH" not in launch.environment(python)


def test_nothing_local_of_the_system_is_shown() -> None:
    """Neither /usr/local nor /etc as a whole, nor any folder that holds data of users or programs."""
    sources = {bind.source for bind in launch.system_binds()}
    assert "/usr/bin" in sources
    assert all(source.startswith(("/usr/", "/bin", "/lib", "/etc/alternatives", "/etc/fonts")) for source in sources)
    assert not any(source.startswith("/usr/local") or source == "/usr/share" for source in sources)


def test_packages_are_hidden_where_they_are(tmp_path: Path) -> None:
    """Packages of the system's and of the interpreter's Python are covered, wherever a distribution puts them."""
    covered = [
        *("usr/lib/python3/dist-packages", "usr/lib/python3.12/site-packages", "usr/lib64/python3.12/site-packages"),
        *("opt/python/lib/python3.12/site-packages", "usr/lib/node_modules", "usr/lib/systemd", "lib/modules"),
    ]
    for path in (*covered, "usr/lib/python3.12/json", "usr/lib/x86_64-linux-gnu"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "lib64").symlink_to("usr/lib64")
    assert launch.hidden(str(tmp_path)) == sorted(str(tmp_path / path) for path in covered)


def test_the_packages_are_those_of_the_environment(tmp_path: Path) -> None:
    """A virtual environment's come first, else the Python's own; with neither there are none."""
    python = a_python(tmp_path / "base")
    environment = tmp_path / "env"
    assert launch.own_packages(str(environment), python).startswith(str(tmp_path / "base"))
    (environment / "lib/python3.12/site-packages").mkdir(parents=True)
    assert launch.own_packages(str(environment), python) == str(environment / "lib/python3.12/site-packages")
    assert launch.own_packages("/nowhere", Python("python3.12", "/nowhere", "", "")) == ""


def test_this_python_is_found_in_a_virtual_environment() -> None:
    """Its files are those of the Python that the environment was made from."""
    python = launch.this_python()
    assert python.library == os.path.dirname(os.path.realpath(json.__path__[0]))
    assert os.access(python.program, os.X_OK)
    assert Path(python.library).is_relative_to(python.prefix)


def test_the_tree_is_built_where_it_covers_nothing_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder on the way to a source is passed over, also when the way leads through a link."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    link = tmp_path / "link"
    link.symlink_to(first)
    monkeypatch.setattr(launch, "BUILT_AT", (str(tmp_path / "missing"), str(link), str(first), str(second)))
    assert launch.place_to_build(["/usr/bin"]) == str(first)
    assert launch.place_to_build([f"{first}/packages"]) == str(second)
    (first / "packages").mkdir()
    assert launch.place_to_build([f"{link}/packages"]) == str(second)
    with pytest.raises(Refused):
        launch.place_to_build([f"{first}/a", f"{second}/b"])


def test_a_folder_closed_to_sessions_is_said_beforehand(tmp_path: Path) -> None:
    """Real root can read it, its sessions cannot: without this they would fail one import after the other."""
    tmp_path.chmod(stat.S_IRWXU)
    with pytest.raises(Refused) as refused:
        launch.check_readable([str(tmp_path)], Way.ROOT)
    assert (refused.value.step, refused.value.error) == ("files", errno.EACCES)
    assert str(tmp_path) in refused.value.reason
    tmp_path.chmod(0o755)
    launch.check_readable([str(tmp_path)], Way.ROOT)
    launch.check_readable([str(tmp_path)], Way.USER)


def test_no_variable_names_the_host() -> None:
    """The fork server's variables are the same on every machine."""
    python = Python("python3.12", "/home/me/.pyenv/versions/3.12.1", "/home/me/x", "/home/me/y")
    assert "/home/me" not in json.dumps(launch.environment(python))


# --- starting --------------------------------------------------------------------------------------------------


def test_the_command_finds_the_launcher_and_nothing_else_of_ours() -> None:
    """It imports the guest's modules alone, without the environment's site, and only adds to the end of the path."""
    python, *flags, option, code = launch.command(sys.executable)
    assert (python, flags, option) == (sys.executable, ["-I", "-S", "-B"], "-c")
    shown = code.replace("; main()", "; print(sys.path[-1], 'afterglow' in sys.modules, main.__module__)")
    ended = subprocess.run([python, *flags, option, shown], capture_output=True, text=True, check=True, env={})
    assert ended.stdout.split() == [str(Path(launch.__file__).parent.parent), "False", "guest.launch"]


def test_a_core_limit_that_cannot_be_set_is_refused_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a machine that hands core dumps to a program starts one, as root, for a crash in a session."""

    def refuse(_kind: int, _limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(Path, "read_bytes", lambda _path: b"core\n")
    launch.keep_core_handler_out()
    monkeypatch.setattr(Path, "read_bytes", lambda _path: b"|/usr/share/apport/apport %p\n")
    with pytest.raises(Refused) as refused:
        launch.keep_core_handler_out()
    assert "LimitCORE=1" in refusals.explain(refused.value.step, refused.value.error)[1]


# --- words -----------------------------------------------------------------------------------------------------


def settings(tmp_path: Path, **values: str) -> Path:
    for name, value in values.items():
        file = tmp_path / "sys" / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("values", "uid", "reason", "remedy"),
    [
        ({"user__max_user_namespaces": "0"}, 1000, "switched off", "sysctl -w user.max_user_namespaces="),
        (
            {"user__max_user_namespaces": "9", "kernel__unprivileged_userns_clone": "0"},
            1000,
            "refuses user namespaces to ordinary users",
            "sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        (
            {"user__max_user_namespaces": "9", "kernel__apparmor_restrict_unprivileged_userns": "1"},
            1000,
            "AppArmor",
            "`sudo afterglow sandbox apparmor`",
        ),
        (
            {"user__max_user_namespaces": "9", "kernel__apparmor_restrict_unprivileged_userns": "1"},
            0,
            "Namespaces and mounts are refused here",
            "--security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconf",
        ),
        ({}, 1000, "Namespaces and mounts are refused here", "`hostUsers: false` and `procMount: Unmasked`"),
    ],
)
def test_refused_namespaces_are_explained_by_what_refuses_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, str], uid: int, reason: str, remedy: str
) -> None:
    """The operator is told which switch it is, and what to type."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    told = refusals.explain("namespaces", errno.EPERM, settings(tmp_path, **values))
    assert reason in told[0]
    assert remedy in told[1]


@pytest.mark.parametrize(
    ("step", "error", "reason", "remedy"),
    [
        ("proc", errno.EPERM, "parts of /proc are covered", "systempaths=unconfined"),
        ("user", errno.EPERM, "root's sessions cannot be bounded", "ordinary user"),
        ("files", errno.EACCES, "cannot be read", "chmod -R o+rX"),
        ("exec", errno.ENOENT, "does not start inside the wall", "docker engine"),
        ("fork", errno.EAGAIN, "step `fork` was refused", "docker engine"),
        ("tree", errno.ENOENT, "step `tree` was refused (No such file or directory)", "docker engine"),
    ],
)
def test_every_step_has_words(tmp_path: Path, step: str, error: int, reason: str, remedy: str) -> None:
    """What is refused is named, and there is always something to do."""
    told = refusals.explain(step, error, tmp_path)
    assert reason in told[0]
    assert remedy in told[1]
