"""What the kernel says of a session, on a /proc of plain files: the whole wall, and each fault."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from afterglow.sandbox import outside

INIT, WORKER, OTHER, FORK_SERVER = 50, 51, 60, 40
BOUNDS = outside.Bounds(memory=256 << 20, disk=64 << 20, processes=32)
STATUS = {
    "PPid": str(FORK_SERVER),
    "Uid": "1001\t1001\t1001\t1001",
    **dict.fromkeys(outside.CAPABILITIES, "0" * 16),
    "NoNewPrivs": "1",
    "Seccomp_filters": "2",
}


class Table:
    """The files of a server, a fork server, and two sessions, as they should be."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder
        self.limits(INIT)
        self.limits(WORKER)
        self.status("self", Seccomp_filters="1")
        self.status(FORK_SERVER, Uid="1000\t1000\t1000\t1000")
        self.status(INIT)
        self.status(WORKER, Seccomp_filters="3")
        self.status(OTHER, Uid="1002\t1002\t1002\t1002")
        (self.proc / str(FORK_SERVER) / "uid_map").write_text("         0       1000      65536\n")

    def status(self, pid: int | str, **changed: str) -> None:
        folder = self.proc / str(pid)
        folder.mkdir(exist_ok=True)
        lines = [f"{name}:\t{value}\n" for name, value in {"Name": "a: b", **STATUS, **changed}.items()]
        (folder / "status").write_text("".join(lines))

    def limits(self, pid: int, **changed: str) -> None:
        folder = self.proc / str(pid)
        folder.mkdir(exist_ok=True)
        lines = [f"{'Limit':<26}{'Soft Limit':<21}{'Hard Limit':<21}Units\n"]
        for name, most in BOUNDS.limits().items():
            limit = changed.get(name.replace(" ", "_"), str(most))
            lines.append(f"{name:<26}{limit:<21}{limit:<21}units\n")
        (folder / "limits").write_text("".join(lines))

    def faults(self) -> list[str]:
        return outside.faults(INIT, OTHER, BOUNDS, self.proc)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(outside, "worker_of", lambda _init: WORKER)
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (0, resource.RLIM_INFINITY))
    return Table(tmp_path)


def test_a_whole_wall_has_no_fault(table: Table) -> None:
    """As it should be, there is nothing to say."""
    assert table.faults() == []


@pytest.mark.parametrize("pid", [INIT, WORKER])
@pytest.mark.parametrize("name", outside.CAPABILITIES)
def test_a_capability_is_a_fault(table: Table, name: str, pid: int) -> None:
    """In whatever set, of whatever process."""
    table.status(pid, **{"Seccomp_filters": "2" if pid == INIT else "3", name: "0000000000000400"})
    assert table.faults() == ["it has capabilities"]


@pytest.mark.parametrize("limit", ["unlimited", "99999999999999"])
@pytest.mark.parametrize("name", BOUNDS.limits())
def test_a_limit_that_is_too_high_is_a_fault(table: Table, name: str, limit: str) -> None:
    """Whatever limit it is."""
    table.limits(WORKER, **{name.replace(" ", "_"): limit})
    assert table.faults()[0].startswith(f"its limit `{name}` is {limit}")


def test_a_core_limit_that_wakes_the_handler_is_a_fault(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 does, which is lower than 1; it is let pass only where 1 cannot be had."""
    table.limits(INIT, Max_core_file_size="0")
    assert table.faults() == ["a crash in it may start the machine's core handler"]
    table.limits(WORKER, Max_core_file_size="0")
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (0, 0))
    assert table.faults() == []


def test_one_filter_too_few_is_a_fault(table: Table) -> None:
    """The agent has one more than the server, which may have some, and the worker one more than the agent."""
    table.status(WORKER)
    assert table.faults() == ["a filter of system calls is missing"]
    table.status(WORKER, Seccomp_filters="3")
    table.status("self", Seccomp_filters="2")
    assert table.faults() == ["a filter of system calls is missing"]


def test_one_user_for_all_is_a_fault_where_there_are_more(table: Table) -> None:
    """Two sessions, or a session and the fork server, are not one user, unless the jail has but one."""
    table.status(OTHER)
    assert table.faults() == ["sessions are one user"]
    table.status(OTHER, Uid="1000\t1000\t1000\t1000")
    assert table.faults() == ["sessions are one user"]
    (table.proc / str(FORK_SERVER) / "uid_map").write_text("0 1000 1\n")
    assert table.faults() == []


def test_what_is_not_told_is_no_answer(table: Table) -> None:
    """A kernel that keeps a fact to itself is not taken for one that says all is well."""
    table.status(INIT)
    text = (table.proc / str(INIT) / "status").read_text()
    (table.proc / str(INIT) / "status").write_text(text.replace("CapBnd", "Other"))
    with pytest.raises(KeyError):
        table.faults()


def test_a_worker_is_the_only_child() -> None:
    """None, or more than one, is not what a session looks like."""
    with pytest.raises(ValueError, match="unpack"):
        outside.worker_of(2**22 + os.getpid())
