"""What those who share a machine can learn or take from each other, and what code can leave behind with the server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai.types.beta.threads import Run
from openai.types.beta.threads.runs import CodeInterpreterToolCall

from afterglow.contracts import CodeSession
from afterglow.sandbox.local import NativeEngine
from afterglow.testing import calls, says
from tests.conftest import Server, running_server
from tests.sandbox.bait import put_out
from tests.sandbox.conftest import run, running_engine, settings
from tests.sandbox.endings import WEDGES
from tests.sandbox.processes import children, descendants, fork_server_of, living, until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the native engine is for Linux"),
    pytest.mark.asyncio(loop_scope="module"),
]

MB = 1 << 20
DISK_MB = 64
PYTHON: Any = [{"type": "code_interpreter"}]
FOLDERS = ("/mnt/data", "/tmp", "/dev/shm", "/home/sandbox")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(packages_folder: Path) -> AsyncGenerator[NativeEngine]:
    """One place, so that the next session follows the last, and one session made ahead."""
    async with running_engine(sandbox_pool=1, sandbox_sessions=2) as running:
        assert running.status.state == "on", running.status
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(engine: NativeEngine, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Server]:
    """The whole server, with the real engine and a scripted model."""
    folder = tmp_path_factory.mktemp("data")
    async with running_server(
        folder / "data", code_engine=engine, sandbox_disk_mb=DISK_MB, cell_timeout_s=3
    ) as running:
        yield running


# --- the next one -----------------------------------------------------------------------------------------------

LEAVE = f"""
import os, subprocess, sys, threading, numpy, builtins, gc
os.environ["LEFT"] = "{{mark}}"
kept = builtins.left = "{{mark}}" * 1000
numpy.random.seed(7)
os.umask(0)
for folder in {FOLDERS}:
    open(f"{{{{folder}}}}/left", "w").write("{{mark}}")
    os.symlink("/etc/passwd", f"{{{{folder}}}}/link")
for name in (".config", ".local/lib/python3/site-packages"):
    os.makedirs(f"/home/sandbox/{{{{name}}}}", exist_ok=True)
open("/home/sandbox/.local/lib/python3/site-packages/left.pth", "w").write("import os")
if os.fork() == 0:
    os.setsid()
    import time
    time.sleep(600)
"""
FIND = f"""
import builtins, numpy, os
found = [(folder, os.listdir(folder)) for folder in {FOLDERS} if os.listdir(folder)]
found += [name for name in ("kept", "left") if name in globals() or hasattr(builtins, name)]
found += [name for name in os.environ if name == "LEFT"]
found += [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) > 2]
numpy.random.seed(None) if (drawn := numpy.random.rand()) == numpy.random.RandomState(7).rand() else None
print(found, drawn == numpy.random.RandomState(7).rand(), oct(os.umask(0o22)))
"""


@pytest.mark.slow
async def test_the_next_session_finds_nothing_of_the_last(engine: NativeEngine) -> None:
    """Files, memory, variables, processes and the state of generators end with their session: neither the one that was
    made ahead nor those made later have any of it."""
    last = await engine.open()
    assert (await run(last, LEAVE.format(mark=os.urandom(8).hex()))).status == "ok"
    await last.close()
    for _ in range(4):
        session = await engine.open()
        assert (await run(session, FIND)).text == "[] False 0o22\n"
        await session.close()


async def test_sessions_share_no_kernel_object(engine: NativeEngine, session: CodeSession) -> None:
    """Abstract sockets, names in shared memory and process groups of one session do not exist for another."""
    await run(
        session,
        "import socket\nlistening = socket.socket(socket.AF_UNIX)\nlistening.bind('\\0shared')\nlistening.listen()\n"
        "open('/dev/shm/shared', 'w')",
    )
    other = await engine.open()
    told = await run(
        other,
        "import os, socket\ntry:\n    socket.socket(socket.AF_UNIX).connect('\\0shared')\n"
        "except OSError as error:\n    print(error.errno, os.path.exists('/dev/shm/shared'))",
    )
    assert told.text == "111 False\n"
    await other.close()


# --- secrets ----------------------------------------------------------------------------------------------------

KNOWN = {"PATH", "HOME", "LANG", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "MPLBACKEND", "MPLCONFIGDIR"} | {
    *("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "LD_LIBRARY_PATH"),
}


async def test_no_process_of_the_engine_has_a_variable_of_the_servers(
    engine: NativeEngine, session: CodeSession
) -> None:
    """The launcher and the guard have no variables, the fork server and sessions those that we gave them."""
    if os.geteuid() != 0:
        pytest.skip("only root may look")
    family = descendants(os.getpid())
    assert len(family) >= 5
    for process in family:
        variables = Path(f"/proc/{process.pid}/environ").read_bytes().decode().split("\0")
        assert {variable.partition("=")[0] for variable in variables if variable} <= KNOWN
        assert str(settings().data) not in Path(f"/proc/{process.pid}/cmdline").read_text()


async def test_a_session_is_told_no_path_of_the_host(session: CodeSession) -> None:
    """Nothing that a program asks about itself names a folder that only the host has."""
    code = """
import inspect, json, numpy, os, pandas, sys, sysconfig, traceback, site
told = [sys.path, sys.prefix, sys.base_prefix, sys.exec_prefix, sys.executable, sys.argv, sys.orig_argv, os.getcwd(),
        json.dumps.__code__.co_filename, pandas.read_csv.__code__.co_filename, sys._base_executable, dict(os.environ),
        sysconfig.get_paths(), [os.readlink(f"/proc/self/{name}") for name in ("exe", "cwd", "root")],
        [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]]
try:
    json.loads("nope")
except ValueError:
    told.append(traceback.format_exc())
print(json.dumps(told))
"""
    told = (await run(session, code)).text
    assert json.loads(told)
    here = str(Path(__file__).parents[2])
    for path in {here, "/home/" * 2, str(Path(sys.prefix)), str(Path(sys.base_prefix)), str(Path.home())}:
        assert path not in told or path in ("/usr", "/"), path


# --- through the API --------------------------------------------------------------------------------------------


async def compute(server: Server, code: str, thread_id: str | None = None) -> Run:
    server.model.will(calls(("python", {"code": code})), says("Done."))
    return await server.run("Compute.", tools=PYTHON, thread_id=thread_id)


async def logs_of(server: Server, run: Run) -> str:
    steps = await server.client.beta.threads.runs.steps.list(run.id, thread_id=run.thread_id, order="asc")
    tool_calls = [call for step in steps.data for call in getattr(step.step_details, "tool_calls", [])]
    outputs = [
        part
        for call in tool_calls
        if isinstance(call, CodeInterpreterToolCall)
        for part in call.code_interpreter.outputs
    ]
    return "".join(part.logs for part in outputs if part.type == "logs")


async def stored(server: Server) -> dict[str, int]:
    """Names and sizes of the files that code has written and the server keeps; they are deleted."""
    files = [file async for file in server.client.files.list(purpose="assistants_output")]
    for file in files:
        await server.client.files.delete(file.id)
    return {file.filename: file.bytes for file in files}


async def test_only_plain_files_are_kept(server: Server) -> None:
    """Links, sockets and what else is no file come to nothing; a file is kept as it is, whatever it is called."""
    async with put_out() as bait:
        code = f"""
import os, socket
os.symlink({bait.folder!r} + "/afterglow.db", "link.db")
os.symlink("/etc/passwd", "passwd.txt")
os.symlink("/proc/self/fd/3", "pipe.txt")
os.symlink(".", "around")
os.mkdir("folder"); os.symlink("/etc", "folder/etc")
open("one.txt", "w").write("1"); os.link("one.txt", "two.txt")
socket.socket(socket.AF_UNIX).bind("socket.txt")
for name in ("\\u202egnp.txt", "a\\nb.txt", b"\\xff.txt", "<script>.txt", "n" * 251 + ".txt"):
    open(name, "w").write("1")
"""
        done = await compute(server, code)
        assert done.status == "completed"
        kept = await stored(server)
        assert set(kept) == {"one.txt", "two.txt", "<script>.txt", "n" * 251 + ".txt"}
        assert set(kept.values()) == {1}
        assert bait.secret not in await logs_of(server, done)


@pytest.mark.slow
async def test_files_that_cost_nothing_are_bounded(server: Server) -> None:
    """Fifty files that are all hole count as large as they say: what is kept of a call fits the session's disk."""
    done = await compute(
        server, f"for number in range(50): open(f'{{number}}.bin', 'wb').truncate({DISK_MB // 4} << 20)"
    )
    assert done.status == "completed"
    assert 0 < sum((await stored(server)).values()) <= DISK_MB * MB
    assert "Not kept" in await logs_of(server, done)


@pytest.mark.slow
async def test_files_without_number_are_bounded(server: Server) -> None:
    """Of as many files as can be made a hundred are kept, and the session and its server go on."""
    code = """
import os
made = 0
try:
    for made in range(100_000): open(f"{made:06}", "w").close()
except OSError as error: print(error.errno)
"""
    done = await compute(server, code)
    assert done.status == "completed"
    assert len(await stored(server)) == 100
    again = await compute(server, "print(made > 1000)", done.thread_id)
    assert "True\n" in await logs_of(server, again)
    await stored(server)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 10_000)",
        "import sys\nwhile True: sys.stderr.write('\\x1b[2J' * 10_000)",
        "'x' * (50 << 20)",
        "raise ValueError('\\0' * (20 << 20))",
        "def f(): f()\nf()",
        "for _ in range(100): display(open('/dev/urandom', 'rb').read(100_000))",
    ],
)
async def test_a_flood_is_a_step_of_bounded_size(server: Server, code: str) -> None:
    """Whatever floods, the run completes, and its step holds no more than the setting and a last word."""
    done = await compute(server, code)
    assert done.status == "completed"
    logs = await logs_of(server, done)
    assert 0 < len(logs.encode()) <= (server.house.settings.cell_output_kb + 64 + 2) * 1024
    assert "\0" not in logs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["close everything", "leave a child in its place", "ignore interrupts"])
async def test_a_wedge_is_a_step_that_says_so(server: Server, name: str) -> None:
    """A session that does not answer ends its step with words, the run completes, and the next call gets a new one."""
    done = await compute(server, WEDGES[name])
    assert done.status == "completed"
    assert "variables are gone" in await logs_of(server, done)
    again = await compute(server, "print(6 * 7)", done.thread_id)
    assert (await logs_of(server, again)).endswith("42\n")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "guard", "fork server"])
async def test_the_api_goes_on_without_its_fork_server(server: Server, engine: NativeEngine, victim: str) -> None:
    """A fork server, guard or launcher that is killed ends the call that runs, with words; the run completes, and the
    next call gets a session of a new one."""
    running = asyncio.create_task(compute(server, "import time\ntime.sleep(60)"))
    assert await until(lambda: any(life.session._cell is not None for life in engine.living))
    before = len(descendants(os.getpid()))
    launcher = engine._generations[-1].server.pid
    [guard] = children(launcher)
    family = descendants(launcher)
    os.kill({"launcher": launcher, "guard": guard, "fork server": fork_server_of(launcher)}[victim], signal.SIGKILL)
    done = await running
    assert done.status == "completed"
    assert "variables are gone" in await logs_of(server, done)
    assert await until(lambda: not living(family))
    again = await compute(server, "print(6 * 7)", done.thread_id)
    assert (await logs_of(server, again)).endswith("42\n")
    assert await until(lambda: len(descendants(os.getpid())) <= before)


# --- the end of the server --------------------------------------------------------------------------------------

SERVER = """
import asyncio, sys
from afterglow.sandbox.local import NativeEngine
from afterglow.settings import load
from tests.sandbox.endings import WEDGES

async def main():
    given = {"sandbox_env": sys.argv[1], "sandbox_sessions": 4, "sandbox_memory_mb": 256}
    engine = NativeEngine(load(given, environ={}))
    print((await engine.settled()).state, flush=True)
    async def keep(name):
        async for part in (await engine.open()).run(WEDGES[name], 600):
            pass
    await asyncio.gather(*(keep(name) for name in ("ignore interrupts", "hide behind children", "stop itself")))

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_killed_server_leaves_no_process(packages_folder: Path) -> None:
    """When the server is killed everything of its engine ends with it, wedged sessions and those made ahead, too."""
    code = f"import sys\nsys.path += {[path for path in sys.path if path]!r}\n{SERVER}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(packages_folder)), stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"on\n"
        assert await until(lambda: len(descendants(process.pid)) >= 3 + 3 * 2 + 12 + 2)
        family = descendants(process.pid)
    finally:
        process.kill()
        await process.communicate()
    assert await until(lambda: not living(family)), living(family)
