"""A cgroup for each session, where this machine lets us have one.

Three ways, tried in this order: a v2 group that is ours alone (systemd's `Delegate=yes`), the v1 hierarchies as root,
and a scope that systemd makes for the launcher. A group is the one true bound on memory: it also counts what no
process shows (socket buffers, pages of a tmpfs, kernel objects). Groups are always made below the group that this
process is in, so no limit set on the server is left behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
CPU_PERIOD_US = 100_000
LEAF = "afterglow-server"  # where a process moves to that must leave its group, so that the group may have children
MOST_ENGINES = 100  # of one process, as tests have
SWAP, CPU = "swap", "cpu"
AGENT_TASKS = 4  # of ours in each session, beside the processes its user may have


@dataclass(frozen=True, slots=True)
class Limits:
    """What one session may use. processes: threads too."""

    memory_bytes: int
    processes: int
    cpus: float


class _File(NamedTuple):
    """One control file. needed: without it there is no limit worth the name. bounds: what else it is that it bounds."""

    controller: str
    name: str
    value: Callable[[Limits], str]
    needed: bool
    bounds: str = ""


def _cpu_quota(limits: Limits) -> int:
    return int(limits.cpus * CPU_PERIOD_US)


V2 = (
    _File("memory", "memory.max", lambda limits: str(limits.memory_bytes), True),
    _File("memory", "memory.swap.max", lambda limits: "0", False, SWAP),
    _File("memory", "memory.oom.group", lambda limits: "1", True),
    _File("pids", "pids.max", lambda limits: str(limits.processes + AGENT_TASKS), True),
    _File("cpu", "cpu.max", lambda limits: f"{_cpu_quota(limits)} {CPU_PERIOD_US}", False, CPU),
)
V1 = (
    _File("memory", "memory.limit_in_bytes", lambda limits: str(limits.memory_bytes), True),
    _File("memory", "memory.memsw.limit_in_bytes", lambda limits: str(limits.memory_bytes), False, SWAP),
    _File("pids", "pids.max", lambda limits: str(limits.processes + AGENT_TASKS), True),
    _File("cpu", "cpu.cfs_period_us", lambda limits: str(CPU_PERIOD_US), False),
    _File("cpu", "cpu.cfs_quota_us", lambda limits: str(_cpu_quota(limits)), False, CPU),
)
OOM_COUNTERS = ("memory.events", "memory.oom_control")  # of v2, of v1


class Group:
    """The cgroup of one session.

    alarm: a descriptor that can be read when its memory runs out, until it is removed; None where the kernel itself
    ends all that is in such a group.
    """

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self.alarm: int | None = None

    def add(self, pid: int) -> None:
        """Move a process in; what it forks from now on is in it, too. Takes the kernel 10-30 ms now and then."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def holds(self, pids: Iterable[int]) -> bool:
        """Whether these processes are in it."""
        wanted = {str(pid) for pid in pids}
        return all(wanted <= set(_read(folder / "cgroup.procs").split()) for folder in self._folders)

    def cpu_s(self) -> float:
        """Processor time of all that ever ran in it; 0 where nothing counts it."""
        for folder in self._folders:
            counted = _read(folder / "cpu.stat").split()  # of v2
            if "usage_usec" in counted:
                return int(counted[counted.index("usage_usec") + 1]) / 1e6
            if usage := _read(folder / "cpuacct.usage"):
                return int(usage) / 1e9
        return 0.0

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed something in it for want of memory."""
        for folder in self._folders:
            for name in OOM_COUNTERS:
                words = _read(folder / name).split()
                if "oom_kill" in words and words[words.index("oom_kill") + 1] != "0":
                    return True
        return False

    def set_alarm(self) -> None:
        """v1: the kernel ends one process of several there, and goes on."""
        for folder in self._folders:
            if (folder / "cgroup.event_control").exists() and (folder / "memory.oom_control").exists():
                self.alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                with open(folder / "memory.oom_control", encoding="ascii") as watched:
                    (folder / "cgroup.event_control").write_text(f"{self.alarm} {watched.fileno()}")

    def remove(self) -> bool:
        """Whether it is gone; a group with processes in it stays."""
        if self.alarm is not None:
            os.close(self.alarm)
            self.alarm = None
        return [_remove_folder(folder) for folder in self._folders].count(False) == 0


class Groups:
    """Makes groups in `folders`, one folder for each controller (under v2 the same for all).

    bounded: what the last group that was made bounds beside memory and processes.
    """

    def __init__(self, files: tuple[_File, ...], folders: Mapping[str, Path], limits: Limits) -> None:
        self._files = files
        self._folders = folders
        self._limits = limits
        self._made = 0
        self._left_over: list[Group] = []
        self._closed = False
        self.bounded: set[str] = set()

    def make(self) -> Group:
        """A new group with its limits set, and read back. Raises OSError."""
        self._left_over = [group for group in self._left_over if not group.remove()]
        self._made += 1
        mine = {controller: folder / f"s{self._made}" for controller, folder in self._folders.items()}
        folders = list(dict.fromkeys(mine.values()))
        group = Group(folders)
        try:
            self._make_folders(folders)
            there = [file for file in self._files if file.controller in mine]
            self.bounded = {file.bounds for file in there if self._set(mine[file.controller] / file.name, file)}
            group.set_alarm()
        except OSError:
            group.remove()
            raise
        return group

    def _make_folders(self, folders: list[Path]) -> None:
        if not all(folder.parent.is_dir() for folder in folders):  # somebody has tidied up
            for folder in dict.fromkeys(self._folders.values()):
                folder.mkdir(exist_ok=True)
                if self._files is V2:
                    _enable(folder, self._folders)
        for folder in folders:
            folder.mkdir()

    def _set(self, path: Path, file: _File) -> bool:
        """Whether the limit is set now. Raises OSError when one that is needed is not."""
        value = file.value(self._limits)
        try:
            path.write_text(value)
        except OSError:
            if file.needed:
                raise
        is_set = _read(path).strip() == value
        if file.needed and not is_set:
            raise OSError(errno.EINVAL, f"{file.name} of a cgroup cannot be set")
        return is_set

    def release(self, group: Group) -> None:
        """Remove a group; one that the kernel still holds is tried again later."""
        if not group.remove():
            self._left_over.append(group)
        if self._closed:
            self.close()

    def close(self) -> None:
        """Remove all that was made here, as far as it is released; the rest with the last group."""
        self._closed = True
        for folder in set(self._folders.values()):
            _remove_folder(folder)


def find(limits: Limits, proc: Path = PROC) -> Groups | None:
    """Groups below the one that this process is in, or None. May move this process one group down, if it is alone."""
    return _delegated_to(os.getpid(), limits, proc) or _as_root(limits, proc)


def process_room(proc: Path = PROC) -> int:
    """How many more processes and threads the groups that this process is in allow."""
    room = sys.maxsize
    for own in (_own_folder("self", "", proc), _own_folder("self", "pids", proc)):
        folders = [] if own is None else [own, *own.parents]
        for folder in folders:
            most, now = _read(folder / "pids.max").strip(), _read(folder / "pids.current").strip()
            if most.isdigit() and now.isdigit():
                room = min(room, int(most) - int(now))
    return room


def scope_command(unit: str, runtime: Path = Path("/run")) -> list[str]:
    """What to put before a command so that systemd runs it in a scope of its own, with an empty environment.

    Empty where there is no systemd to ask. `in_scope` tells afterwards whether it helped.
    """
    runner = shutil.which("systemd-run", path="/usr/bin:/bin")
    uid = os.geteuid()
    bus = runtime / f"user/{uid}/bus" if uid else runtime / "systemd/private"
    if runner is None or not bus.exists():
        return []
    asked_of = ["--user"] if uid else ["--system"]
    options = ["--scope", "--quiet", "--collect", f"--unit={unit}", "--property=Delegate=yes"]
    return [
        *("/usr/bin/env", "-i", f"XDG_RUNTIME_DIR={runtime}/user/{uid}"),
        *(runner, *asked_of, *options, "--", "/usr/bin/env", "-i"),
    ]


def in_scope(unit: str, pid: int, limits: Limits, proc: Path = PROC) -> Groups | None:
    """Groups in the scope `unit`, made by `scope_command` for `pid`, or None if it is not there."""
    own = _own_folder(str(pid), "", proc)
    if own is None or unit not in own.name:
        return None
    return _delegated_to(pid, limits, proc, alone=True)


def _delegated_to(pid: int, limits: Limits, proc: Path, alone: bool = False) -> Groups | None:
    """v2. alone: all processes of that group are known to be ours."""
    own = _own_folder(str(pid), "", proc)
    if own is None:
        return None
    home = own.parent if own.name == LEAF else own
    offered = set(_read(home / "cgroup.controllers").split())
    if not {"memory", "pids"} <= offered:
        return None
    wanted = [name for name in ("memory", "pids", "cpu") if name in offered]
    try:
        if not set(wanted) <= set(_read(home / "cgroup.subtree_control").split()):
            inside = _read(home / "cgroup.procs").split()
            if not alone and inside not in ([], [str(pid)]):
                return None  # the others are not ours to move, and a group with processes cannot have children
            _move_down(home, inside)
            _enable(home, wanted)
        folder = _fresh_folder(home, proc)
        _enable(folder, wanted)
    except OSError:
        return None
    return Groups(V2, dict.fromkeys(wanted, folder), limits)


def _move_down(home: Path, pids: list[str]) -> None:
    leaf = home / LEAF
    leaf.mkdir(exist_ok=True)
    for pid in pids:
        (leaf / "cgroup.procs").write_text(pid)


def _enable(folder: Path, controllers: Iterable[str]) -> None:
    (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))


def _as_root(limits: Limits, proc: Path) -> Groups | None:
    """v1: memory and pids are needed, the others are welcome."""
    if os.geteuid() != 0:
        return None
    folders: dict[str, Path] = {}
    made: dict[Path, Path] = {}
    for controller in ("memory", "pids", "cpu", "cpuacct"):  # the last two are often one
        home = _own_folder("self", controller, proc)
        try:
            if home is not None:
                made[home] = folders[controller] = made.get(home) or _fresh_folder(home, proc)
        except OSError:
            continue
    if {"memory", "pids"} <= set(folders):
        return Groups(V1, folders, limits)
    for folder in made.values():
        _remove_folder(folder)
    return None


def _own_folder(pid: str, controller: str, proc: Path) -> Path | None:
    """Where the group of `pid` is mounted. controller: of v1; empty for v2."""
    path = None
    for line in _read(proc / pid / "cgroup").splitlines():
        _number, names, found = line.split(":", 2)
        if names == controller or controller in names.split(","):
            path = found
    if path is None:
        return None
    for line in _read(proc / "self/mountinfo").splitlines():
        fields, _dash, rest = line.partition(" - ")
        root, mounted_at = fields.split()[3:5]
        kind, _source, options = rest.split(" ", 2)
        is_it = controller in options.split(",") if controller else True
        if kind == ("cgroup" if controller else "cgroup2") and is_it and f"{path}/".startswith(f"{root.rstrip('/')}/"):
            return Path(mounted_at + path.removeprefix(root.rstrip("/"))).resolve()
    return None


def _fresh_folder(home: Path, proc: Path) -> Path:
    """A folder of this process's own in `home`; those that dead servers left are removed first."""
    for folder in home.glob("afterglow-*-*-*"):
        _prefix, pid, started, _number = folder.name.split("-", 3)
        if _started(pid, proc) != started:
            _remove_folder(folder)
    own = str(os.getpid())
    for number in range(MOST_ENGINES):
        folder = home / f"afterglow-{own}-{_started(own, proc)}-{number}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise FileExistsError(home)


def _started(pid: str, proc: Path) -> str:
    """When a process started, in clock ticks since boot; empty when there is none."""
    fields = _read(proc / pid / "stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _remove_folder(folder: Path) -> bool:
    """Remove a group and the empty ones in it."""
    try:
        for child in folder.iterdir():
            if child.is_dir():
                _remove_folder(child)
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
