"""A cgroup for each session: found, filled in and removed on trees of plain folders that look like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from afterglow.sandbox import cgroups
from afterglow.sandbox.cgroups import Limits

LIMITS = Limits(memory_bytes=1 << 30, processes=32, cpus=1.5)
PID = os.getpid()


class Tree:
    """A /proc and a /sys/fs/cgroup of plain files."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.mounted = folder / "cgroup"
        self.process(PID, started=1000)
        (self.proc / "self").mkdir()

    def process(self, pid: int, started: int) -> None:
        (self.proc / str(pid)).mkdir(parents=True)
        fields = ["S", *["0"] * 18, str(started), "0"]
        (self.proc / str(pid) / "stat").write_text(f"{pid} (a) b) {' '.join(fields)}\n")

    def v2(self, path: str = "/user.slice/afterglow.service", root: str = "/", pid: int = PID) -> Path:
        for name in (str(pid), "self"):
            (self.proc / name / "cgroup").write_text(f"0::{path}\n")
        line = f"30 24 0:26 {root} {self.mounted} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
        (self.proc / "self/mountinfo").write_text(f"22 1 254:1 / / rw - ext4 /dev/root rw\n{line}\n")
        own = self.mounted / path.removeprefix(root).lstrip("/")
        own.mkdir(parents=True, exist_ok=True)
        (own / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
        (own / "cgroup.subtree_control").write_text("\n")
        (own / "cgroup.procs").write_text(f"{pid}\n")
        return own

    def v1(self, controllers: tuple[str, ...] = ("memory", "pids", "cpu,cpuacct")) -> None:
        for name in (str(PID), "self"):
            lines = [f"{number}:{names}:/ours" for number, names in enumerate(controllers, 2)]
            (self.proc / name / "cgroup").write_text("\n".join([*lines, "0::/\n"]))
        lines = [f"3 2 0:3 / {self.mounted / names} rw - cgroup cgroup rw,{names}" for names in controllers]
        (self.proc / "self/mountinfo").write_text("\n".join(lines) + "\n")
        for names in controllers:
            (self.mounted / names / "ours").mkdir(parents=True)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def plain_rmdir(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes folders as cgroupfs does: with the files in them, unless they hold a process."""

    def rmdir(folder: Path) -> None:
        held = folder / "cgroup.procs"
        if held.exists() and held.read_text().strip():
            raise OSError(16, "busy")
        for file in folder.iterdir():
            file.unlink()
        os.rmdir(folder)

    monkeypatch.setattr(Path, "rmdir", rmdir)


def read(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


def only_child(folder: Path) -> Path:
    [found] = folder.glob("afterglow-*-*")
    return found


def test_a_delegated_group_gets_children(tree: Tree) -> None:
    """Alone in a delegated v2 group the server moves one down, and each session gets a group with every limit."""
    own = tree.v2()
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    assert (own / "afterglow-server/cgroup.procs").read_text() == str(PID)
    assert (own / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    groups.make().add(77)
    ours = only_child(own)
    assert ours.name == f"afterglow-{PID}-1000-0"
    assert (ours / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert read(ours / "s1") == {
        "memory.max": str(1 << 30),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "36",
        "cpu.max": "150000 100000",
        "cgroup.procs": "77",
    }
    assert {cgroups.CPU, cgroups.SWAP} <= groups.bounded


def test_others_in_the_group_are_not_moved(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that others live in, as a login's does, is left as it is."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    own = tree.v2()
    (own / "cgroup.procs").write_text(f"{PID}\n4711\n")
    assert cgroups.find(LIMITS, tree.proc) is None
    assert not list(own.glob("afterglow-*"))
    assert (own / "cgroup.subtree_control").read_text() == "\n"


def test_a_second_engine_finds_the_group_divided(tree: Tree) -> None:
    """Moved down already, the process makes its next groups beside its own leaf and not below it."""
    own = tree.v2()
    assert cgroups.find(LIMITS, tree.proc)
    (own / "cgroup.subtree_control").write_text("cpu memory pids\n")
    for name in (str(PID), "self"):
        (tree.proc / name / "cgroup").write_text("0::/user.slice/afterglow.service/afterglow-server\n")
    assert cgroups.find(LIMITS, tree.proc)
    assert sorted(folder.name[-2:] for folder in own.glob("afterglow-*-*")) == ["-0", "-1"]


def test_without_controllers_there_is_no_group(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A v2 group to which memory was not delegated is of no use."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    own = tree.v2()
    (own / "cgroup.controllers").write_text("cpu pids\n")
    assert cgroups.find(LIMITS, tree.proc) is None


def test_a_container_sees_a_part_of_the_tree(tree: Tree) -> None:
    """Where only a part of the hierarchy is mounted, paths are taken from that part's root."""
    own = tree.v2("/docker/abc/server", root="/docker/abc")
    assert own == tree.mounted / "server"
    assert cgroups.find(LIMITS, tree.proc)
    assert only_child(own)


def test_a_group_outside_what_is_mounted_is_not_guessed(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is not below the mounted part leads nowhere."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    tree.v2("/docker/abc/server", root="/docker/abc")
    (tree.proc / str(PID) / "cgroup").write_text("0::/docker/abcdef/server\n")
    assert cgroups.find(LIMITS, tree.proc) is None


def test_root_divides_the_old_hierarchies(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under v1 root gets a group in each hierarchy, below the server's own."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    tree.v1()
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    groups.make().add(77)
    assert {cgroups.CPU, cgroups.SWAP} <= groups.bounded
    found = {names: read(only_child(tree.mounted / names / "ours") / "s1") for names in ("memory", "pids")}
    assert found["memory"] == {
        "memory.limit_in_bytes": str(1 << 30),
        "memory.memsw.limit_in_bytes": str(1 << 30),
        "cgroup.procs": "77",
    }
    assert found["pids"] == {"pids.max": "36", "cgroup.procs": "77"}
    cpu = read(only_child(tree.mounted / "cpu,cpuacct/ours") / "s1")
    assert (cpu["cpu.cfs_quota_us"], cpu["cpu.cfs_period_us"]) == ("150000", "100000")


def test_without_the_memory_hierarchy_there_is_no_group(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """v1 without memory is refused, and what was made for it is removed."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    tree.v1(("pids", "cpu"))
    assert cgroups.find(LIMITS, tree.proc) is None
    assert not list(tree.mounted.glob("*/ours/*"))


@pytest.mark.usefixtures("plain_rmdir")
def test_what_dead_servers_left_is_removed(tree: Tree) -> None:
    """Groups of servers that are gone are removed, also when their pid was given to another; living ones stay."""
    own = tree.v2()
    tree.process(500, started=5)
    for name in ("afterglow-400-4-0", "afterglow-500-1-0", "afterglow-500-5-0"):
        (own / name / "s1").mkdir(parents=True)
    assert cgroups.find(LIMITS, tree.proc)
    assert sorted(folder.name for folder in own.glob("afterglow-*-*")) == sorted(
        ["afterglow-500-5-0", f"afterglow-{PID}-1000-0"]
    )


@pytest.mark.usefixtures("plain_rmdir")
def test_a_group_that_is_still_held_is_removed_later(tree: Tree) -> None:
    """A group whose last process is not quite gone is removed when the next is made."""
    own = tree.v2()
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    group = groups.make()
    group.add(77)
    groups.release(group)
    first = only_child(own) / "s1"
    assert first.exists()
    (first / "cgroup.procs").write_text("")
    second = groups.make()
    assert not first.exists()
    groups.close()
    groups.release(second)
    assert not list(own.glob("afterglow-*-*"))


def test_a_limit_is_read_back(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that was written and is not there is none, and no group is made."""
    tree.v2()
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    monkeypatch.setattr(Path, "write_text", lambda _path, _text: 0)
    with pytest.raises(OSError, match=r"memory\.max"):
        groups.make()


@pytest.mark.usefixtures("plain_rmdir")
def test_a_folder_that_somebody_removed_is_made_anew(tree: Tree) -> None:
    """Whoever tidies up the machine's groups does not put an end to sessions."""
    own = tree.v2()
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    groups.release(groups.make())
    assert cgroups._remove_folder(only_child(own))
    groups.make().add(77)
    assert (only_child(own) / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert (only_child(own) / "s2/memory.max").read_text() == str(1 << 30)


def test_a_group_knows_who_is_in_it_and_what_they_used(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are told apart from others', and its processor time is the kernel's, of both versions."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    tree.v1(("memory", "pids", "cpu", "cpuacct"))
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    group = groups.make()
    assert group.cpu_s() == 0
    group.add(77)
    assert (group.holds([77]), group.holds([77, 78])) == (True, False)
    (only_child(tree.mounted / "cpuacct/ours") / "s1/cpuacct.usage").write_text("1500000000\n")
    assert group.cpu_s() == 1.5
    (only_child(tree.mounted / "cpu/ours") / "s1/cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    assert group.cpu_s() == 2.5


@pytest.mark.parametrize("file", ["memory.events", "memory.oom_control"])
def test_the_kernel_tells_of_memory_that_ran_out(tree: Tree, file: str) -> None:
    """Of both versions the counter of kills is read."""
    own = tree.v2()
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    group = groups.make()
    assert not group.ran_out_of_memory()
    counter = only_child(own) / "s1" / file
    counter.write_text("oom 0\nunder_oom 0\noom_kill 0\n")
    assert not group.ran_out_of_memory()
    counter.write_text("oom 3\nunder_oom 0\noom_kill 2\n")
    assert group.ran_out_of_memory()


def test_an_old_kernel_is_asked_for_an_alarm(tree: Tree) -> None:
    """v1 tells of memory that ran out by a descriptor, which is closed with the group."""
    own = tree.v2()
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    group = groups.make()
    assert group.alarm is None
    for name in ("memory.oom_control", "cgroup.event_control"):
        (only_child(own) / "s1" / name).touch()
    group.set_alarm()
    assert group.alarm is not None
    alarm = group.alarm
    assert (only_child(own) / "s1/cgroup.event_control").read_text().startswith(f"{alarm} ")
    groups.release(group)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(alarm)


def test_a_limit_that_cannot_be_set_undoes_the_group(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """No group is made without its memory limit; one without a limit on swap is."""
    tree.v2()
    groups = cgroups.find(LIMITS, tree.proc)
    assert groups is not None
    write = Path.write_text
    refused = {"memory.swap.max"}

    def write_text(path: Path, text: str) -> int:
        if path.name in refused:
            raise PermissionError(path)
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    groups.make()
    assert cgroups.SWAP not in groups.bounded
    refused.add("memory.max")
    with pytest.raises(PermissionError):
        groups.make()


def test_systemd_is_asked_for_a_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a user manager at hand the launcher is started in a scope of its own, delegated, with no environment."""
    monkeypatch.setattr("shutil.which", lambda name, path: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cgroups.scope_command("unit", tmp_path) == []
    (tmp_path / "user/1000").mkdir(parents=True)
    (tmp_path / "user/1000/bus").touch()
    command = cgroups.scope_command("unit", tmp_path)
    assert command[:3] == ["/usr/bin/env", "-i", f"XDG_RUNTIME_DIR={tmp_path}/user/1000"]
    assert {"--user", "--scope", "--unit=unit", "--property=Delegate=yes"} <= set(command)
    assert command[-3:] == ["--", "/usr/bin/env", "-i"]


def test_a_scope_is_used_when_it_is_really_there(tree: Tree) -> None:
    """All of a scope's processes are ours and moved down; another group than the one asked for is not taken."""
    tree.process(600, started=6)
    own = tree.v2("/user.slice/afterglow-1-2.scope", pid=600)
    (own / "cgroup.procs").write_text("600\n601\n602\n")
    assert cgroups.in_scope("afterglow-9-9", 600, LIMITS, tree.proc) is None
    groups = cgroups.in_scope("afterglow-1-2", 600, LIMITS, tree.proc)
    assert groups is not None
    groups.make()
    assert (own / "afterglow-server/cgroup.procs").read_text() == "602"  # the last of the three written
    assert only_child(own)


def test_room_is_what_the_narrowest_group_leaves(tree: Tree) -> None:
    """The tightest bound on processes counts, wherever it is above us."""
    own = tree.v2()
    (own / "pids.max").write_text("max\n")
    (own / "pids.current").write_text("3\n")
    (own.parent / "pids.max").write_text("100\n")
    (own.parent / "pids.current").write_text("40\n")
    assert cgroups.process_room(tree.proc) == 60
