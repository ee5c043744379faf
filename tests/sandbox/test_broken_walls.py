"""A wall with one step left out keeps the engine off: each test leaves one out, and starts the engine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from afterglow.sandbox import cgroups
from afterglow.sandbox.guest import launch
from tests.sandbox.conftest import StartEngine
from tests.sandbox.processes import descendants

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the native engine is for Linux"),
    pytest.mark.asyncio(loop_scope="module"),
]

FILTER = "    code = ctypes.create_string_buffer(_filter(worker))\n"
READ_ONLY = "wall.ATTR_RDONLY | wall.ATTR_NOSUID | wall.ATTR_NODEV, below"
# What is left out: the module, the code, and what is in its place.
STEPS: dict[str, list[tuple[str, str, str]]] = {
    "Landlock": [("wall", "    known = landlock(landlock_abi())\n", "    return\n")],
    "all filters": [("wall", FILTER, "    return\n")],
    "the worker's filter": [("wall", FILTER, f"    if worker: return\n{FILTER}")],
    "capabilities": [("wall", "    prctl(PR_SET_SECUREBITS, SECUREBITS_ALL_LOCKED)\n", "    return\n")],
    "the bounding set": [("wall", "        for capability in range(64):\n", "        for capability in ():\n")],
    "no_new_privs": [("wall", "    prctl(PR_SET_NO_NEW_PRIVS, 1)\n", "")],
    "the user namespace": [("wall", "    own_user_namespace(INNER_UID)\n", "")],
    "the network": [("wall", "NEWNS | NEWNET | NEWIPC | NEWUTS)", "NEWNS | NEWIPC | NEWUTS)")],
    "the IPC namespace": [("wall", "NEWNS | NEWNET | NEWIPC | NEWUTS)", "NEWNS | NEWNET | NEWUTS)")],
    "the name of the host": [("wall", "NEWNS | NEWNET | NEWIPC | NEWUTS)", "NEWNS | NEWNET | NEWIPC)")],
    "the pid namespace": [("wall", "    unshare(NEWPID)\n", "")],
    "the session's group": [("wall", "    os.setsid()  # first", "    pass  # first")],
    "the core limit": [("wall", "(resource.RLIMIT_CORE, 1)", "(resource.RLIMIT_CORE, 0)")],
    "the limit of processes": [("wall", "        (resource.RLIMIT_NPROC, limits.processes),\n", "")],
    "the limit of data": [("wall", "        (resource.RLIMIT_DATA, sizes[5] + limits.memory_bytes),\n", "")],
    "the limit of addresses": [
        ("wall", "        (resource.RLIMIT_AS, sizes[0]", "        (resource.RLIMIT_RSS, sizes[0]")
    ],
    "the limit of files": [("wall", "        (resource.RLIMIT_NOFILE, OPEN_FILES),\n", "")],
    "the size of its folder": [("wall", "size={limits.disk_bytes},", "")],
    "read-only folders": [("launch", READ_ONLY, "wall.ATTR_NOSUID | wall.ATTR_NODEV, below")],
    "folders without setuid": [("launch", READ_ONLY, "wall.ATTR_RDONLY | wall.ATTR_NODEV, below")],
    "folders without devices": [("launch", READ_ONLY, "wall.ATTR_RDONLY | wall.ATTR_NOSUID, below")],
    "a root that is read-only": [("launch", "            wall.make_read_only(root)\n", "")],
    "an agent that hides": [
        ("wall", "    prctl(PR_SET_DUMPABLE, int(dumpable))", "    prctl(PR_SET_DUMPABLE, 1)"),
        ("agent", "    _prctl(_SET_DUMPABLE, 0)", "    _prctl(_SET_DUMPABLE, 1)"),
    ],
    "a small /proc": [("wall", ', "subset=pid")', ")")],
    "users of their own": [("warm", "list(range(1, min(most, there - 1) + 1))", "[1] * most")],
    "other users than the jail's": [("warm", "list(range(1, min(most, there - 1) + 1))", "[0] * most")],
    "only what programs need": [("launch", 'SYSTEM = ("usr/bin"', 'SYSTEM = ("usr/src", "usr/bin"')],
    "no variables": [
        ("launch", '        "HOME": wall.HOME,\n', '        "HOME": wall.HOME,\n        "A_SECRET": "x",\n')
    ],
}
FOR_ROOT = ("users of their own", "other users than the jail's")


def left_out(step: str, folder: Path) -> Path:
    """A copy of the guest's modules without that step."""
    copy = shutil.copytree(Path(launch.__file__).parent, folder / "guest")
    for module, code, instead in STEPS.get(step, []):
        file = copy / f"{module}.py"
        text = file.read_text()
        assert code in text, f"{module}.py has changed: {code}"
        file.write_text(text.replace(code, instead))
    return copy.parent


@pytest.fixture
def broken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The name of the step that engines started now leave out."""
    step: str = request.param
    if step in FOR_ROOT and os.geteuid() != 0:
        pytest.skip("an ordinary user has but itself")
    folder = left_out(step, tmp_path_factory.mktemp("afterglow-guest"))
    command = launch.command
    here = str(Path(launch.__file__).parent.parent)
    monkeypatch.setattr(launch, "command", lambda python: [part.replace(here, str(folder)) for part in command(python)])
    return step


@pytest.mark.parametrize("broken", STEPS, indirect=True)
async def test_a_wall_without_one_step_keeps_the_engine_off(broken: str, start_engine: StartEngine) -> None:
    """Whatever step is left out, the engine says so, does not run, and leaves no process."""
    before = descendants(os.getpid())
    async with start_engine(sandbox_pool=0) as engine:
        assert engine.status.state == "off", f"nobody notices that {broken} is left out"
        assert descendants(os.getpid()) == before


@pytest.mark.parametrize("broken", ["nothing"], indirect=True)
async def test_a_whole_wall_does_not(broken: str, start_engine: StartEngine) -> None:
    """The same copy with nothing left out is on."""
    async with start_engine(sandbox_pool=0) as engine:
        assert engine.status.state == "on", engine.status


@pytest.mark.parametrize("left", ["limits", "members"])
async def test_a_cgroup_that_does_not_hold_keeps_the_engine_off(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Limits that are not what was written, or a session that is not in its group, are noticed."""
    async with start_engine(sandbox_pool=0) as engine:
        if engine.status.unenforced:
            pytest.skip("no cgroup can be made here")
    if left == "limits":
        monkeypatch.setattr(cgroups, "V1", tuple(file._replace(value=lambda _limits: "") for file in cgroups.V1))
        monkeypatch.setattr(cgroups, "V2", tuple(file._replace(value=lambda _limits: "") for file in cgroups.V2))
    else:
        monkeypatch.setattr(cgroups.Group, "add", lambda _group, _pid: None)
    async with start_engine(sandbox_pool=0) as engine:
        assert engine.status.state == "off"


async def test_a_folder_of_the_servers_that_is_shown_keeps_the_engine_off(
    start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data folder in a place that sessions are shown is noticed."""
    monkeypatch.setattr("afterglow.sandbox.local.own_files", lambda _folder: ["/usr/bin/env"])
    async with start_engine(sandbox_pool=0) as engine:
        assert engine.status.state == "off"
        assert "see files of the server's" in engine.status.reason
