"""The wall as the kernel holds it: processes that really enter it, in both ways, and try what they must not be able to.

Nothing of the engine takes part. `launch.py` builds the jail as it does for a server, but what it starts there as the
fork server is FORK_SERVER, which runs whatever a test sends it in a session of its own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afterglow.sandbox.guest import launch, syscalls, wall

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the wall is Linux's")

X86_64 = os.uname().machine == "x86_64"
FOLDER = Path(launch.__file__).parent
NOBODY = 65_534
LIMITS = {"memory_bytes": 256 << 20, "disk_bytes": 8 << 20, "processes": 16, "tmp_bytes": 4 << 20}

FORK_SERVER = '''
"""Runs what a test sends, in a session of its own, and sends back what it leaves in `result`."""
import json, os, signal, socket, time
from . import syscalls, wall

def main():
    control = socket.socket(fileno=3)
    home = os.open("/proc/self/ns/pid", os.O_RDONLY)
    held = []
    wall.make_read_only("/opt/cache")
    control.send(b"[]")
    while request := control.recv(1 << 18):
        asked = json.loads(request)
        pid = os.fork() if asked["outer"] else wall.fork_as_init(home)
        if pid == 0:
            be_session(control, asked)
        if asked["hold"]:
            held.append(pid)
        else:
            status = os.waitpid(pid, 0)[1]
            control.send(json.dumps({"ended": os.waitstatus_to_exitcode(status)}).encode())
    os._exit(0)

def be_session(control, asked):
    known = {"wall": wall, "syscalls": syscalls, "os": os, "json": json, "control": control}
    try:
        if not asked["outer"]:
            wall.keep_only(3)
            exec(asked["before"], known)
            wall.enter_session(asked["uid"], wall.Limits(**asked["limits"]))
            if asked["worker"]:
                wall.restrict_calls(worker=True)
        exec(asked["code"], known)
        told = {"result": known["result"]}
    except BaseException as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    control.send(json.dumps(told).encode())
    while asked["hold"]:
        time.sleep(60)
    os._exit(0)
'''


class Died(Exception):
    """The session ended without an answer; status: as of a shell, negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(f"ended with status {status}")
        self.status = status


class Jail:
    """A built jail. uid: what its sessions are to be."""

    def __init__(self, way: str, python: str, folder: Path) -> None:
        self.way = way
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.orders, their_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(30)
        limits = {"memory_bytes": 4 << 30, "free_bytes": 0}
        self.control.send(json.dumps({"guard": limits, "packages": str(folder / "packages")}).encode())
        command = [part.replace(repr(str(FOLDER.parent)), repr(str(folder))) for part in launch.command(python)]
        self.pid = spawn(BECOME[way](command), theirs, their_orders)
        self.first = self.control.recv(65_536)
        self._uid = 0

    def run(
        self,
        code: str,
        *,
        before: str = "",
        worker: bool = True,
        outer: bool = False,
        hold: bool = False,
        **limits: int,
    ) -> Any:
        """What `code` leaves in `result`. before: done before the session is entered. outer: not in a session, but
        where the fork server is. hold: the session lives on."""
        self._uid = self._uid % 500 + 1
        asked = {
            "code": textwrap.dedent(code),
            "before": before,
            "worker": worker,
            "outer": outer,
            "hold": hold,
            "uid": self._uid if self.way == "root" else 0,
            "limits": {**LIMITS, **limits},
        }
        self.control.send(json.dumps(asked).encode())
        told = json.loads(self.control.recv(1 << 18))
        if not hold and "ended" not in told:
            ended = json.loads(self.control.recv(65_536))["ended"]
            assert ended == 0
        if "ended" in told:
            raise Died(told["ended"])
        if "error" in told:
            raise AssertionError(told["error"])
        return told["result"]

    def close(self) -> None:
        self.control.close()
        self.orders.close()
        os.waitpid(self.pid, 0)


def spawn(command: list[str], control: socket.socket, orders: socket.socket) -> int:
    """Start a launcher with the two sockets as its descriptors 3 and 4."""
    ends = ((control, 3), (orders, 4))
    moved = [(fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 10), number) for end, number in ends]
    actions = [(os.POSIX_SPAWN_DUP2, *pair) for pair in moved]
    pid = os.posix_spawn(command[0], command, {}, file_actions=actions, setsid=True)
    for fd, _number in moved:
        os.close(fd)
    control.close()
    orders.close()
    return pid


def as_nobody(command: list[str]) -> list[str]:
    if os.geteuid() != 0:
        return command
    become = f"import os, sys; os.setgroups([]); os.setresgid(*3 * [{NOBODY}]); os.setresuid(*3 * [{NOBODY}])"
    return [command[0], "-c", f"{become}; os.execv(sys.argv[1], sys.argv[1:])", *command]


def without_mounting(command: list[str]) -> list[str]:
    give_up = f"import ctypes, os, sys; ctypes.CDLL(None).prctl(24, {launch.CAP_SYS_ADMIN}, 0, 0, 0)"
    return [command[0], "-c", f"{give_up}; os.execv(sys.argv[1], sys.argv[1:])", *command]


BECOME: dict[str, Callable[[list[str]], list[str]]] = {"root": list, "user": as_nobody, "container": without_mounting}


def python_for(way: str) -> str:
    """One that is there for this way: root's may be where nobody else can read."""
    if way == "root":
        return sys.executable
    if os.geteuid() != 0:
        return sys.executable
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path):
            asked = subprocess.run([path, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True)
            if asked.stdout == b"True\n":
                return path
    pytest.skip("there is no Python 3.11 that an ordinary user can run")


@pytest.fixture(scope="module")
def guest() -> Iterator[Path]:
    """A copy of the guest's modules that anyone can read, with FORK_SERVER in the place of `warm`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(FOLDER, folder / "guest", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "guest" / "warm.py").write_text(FORK_SERVER)
        (folder / "packages").mkdir()
        (folder / "packages" / "present.py").touch()
        yield folder


@pytest.fixture(scope="module", params=["root", "user"])
def jail(request: pytest.FixtureRequest, guest: Path) -> Iterator[Jail]:
    """A jail built with the powers of root, and one built by an ordinary user."""
    if request.param == "root" and launch.choose_way() is not launch.Way.ROOT:
        pytest.skip("needs root")
    jail = Jail(request.param, python_for(request.param), guest)
    if jail.first != b"[]":
        os.waitpid(jail.pid, 0)
        pytest.skip(f"no wall can be built here: {jail.first.decode()}")
    yield jail
    jail.close()


# --- who a session is ------------------------------------------------------------------------------------------


def test_a_session_is_an_ordinary_user_alone_in_its_namespaces(jail: Jail) -> None:
    """It is user 1000 and nobody else, pid 1 of its own processes, in a session and a folder of its own."""
    result = jail.run("result = [os.getresuid(), os.getresgid(), os.getpid(), os.getsid(0), os.getpgrp(), os.getcwd()]")
    assert result == [[1000] * 3, [1000] * 3, 1, 1, 1, wall.WORK]


def test_a_session_has_no_capability_left(jail: Jail) -> None:
    """Seen from outside: all five sets are empty, no_new_privs is on, and both filters are there."""
    pid = jail.run("result = os.getpid()", hold=True)
    assert pid == 1
    status = jail.run(OUTSIDE + "result = sessions()[-1]", outer=True)
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == ("1", "2", "2")
    if jail.way == "root":
        assert status["Groups"] == ""
        assert int(status["Uid"].split()[0]) > 0


OUTSIDE = """
def status_of(pid):
    with open(f"/proc/{pid}/status") as file:
        pairs = [line.partition(":") for line in file]
    return {name: value.strip() for name, _, value in pairs}
def sessions():
    found = [status_of(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    return [status for status in found if len(status["NSpid"].split()) > 1]
"""


def test_sessions_of_root_are_different_users(jail: Jail) -> None:
    """No two living sessions are the same user to the kernel, where there is more than one to choose from."""
    for _ in range(2):
        jail.run("result = 0", hold=True)
    found = jail.run(OUTSIDE + "result = [status['Uid'].split()[0] for status in sessions()]", outer=True)
    assert len(found) >= 2
    assert len(set(found)) == (len(found) if jail.way == "root" else 1)


def test_a_session_has_but_the_descriptors_it_was_given(jail: Jail) -> None:
    """Descriptors 0, 1 and 2 are /dev/null, and beside them only the one that was kept is open."""
    result = jail.run(
        """
        found = {}
        for fd in range(1024):
            try:
                found[fd] = os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
            except OSError:
                pass
        result = found
        """
    )
    assert result == {"0": "/dev/null", "1": "/dev/null", "2": "/dev/null", "3": "socket"}


# --- files -----------------------------------------------------------------------------------------------------


def test_nothing_of_the_host_is_there_but_what_programs_need(jail: Jail) -> None:
    """The root shows the runtime and the session's own folders; packages of the system's Python are hidden."""
    result = jail.run(
        """
        shown = ("/", "/opt", "/etc", "/dev", "/home", "/mnt", "/opt/packages")
        result = {path: sorted(os.listdir(path)) for path in shown}
        result["hidden"] = [os.listdir(path) for path in ("/usr/lib/systemd", "/usr/lib/python3/dist-packages")
                            if os.path.isdir(path)]
        """
    )
    assert set(result["/"]) <= {"bin", "dev", "etc", "home", "lib", "lib64", "mnt", "opt", "proc", "tmp", "usr"}
    assert set(result["/opt"]) <= {"afterglow", "cache", "packages", "python"}
    assert set(result["/etc"]) <= {
        *("alternatives", "fonts", "group", "hosts", "ld.so.cache", "localtime", "mime.types", "mtab", "nsswitch.conf"),
        "passwd",
    }
    assert set(result["/dev"]) == {*launch.DEVICES, *launch.DEVICE_LINKS, "shm"}
    assert (result["/home"], result["/mnt"], result["/opt/packages"]) == (["sandbox"], ["data"], ["present.py"])
    assert result["hidden"] == [[]] * len(result["hidden"])


def test_nothing_tells_a_path_of_the_host(jail: Jail, guest: Path) -> None:
    """Not the variables, not the arguments, not sys.path; and of /proc only names can be read."""
    result = jail.run(
        """
        import sys
        files = {}
        for name in ("environ", "cmdline", "maps", "mountinfo", "cgroup", "status", "mem"):
            try:
                files[name] = open(f"/proc/self/{name}", "rb").read(10)
            except OSError as error:
                files[name] = error.errno
        result = [files, dict(os.environ), sys.path, sys.orig_argv, os.listdir("/proc")]
        """
    )
    files, *told = result
    assert set(files.values()) == {errno.EACCES}
    for path in (str(guest), str(Path(sys.executable).parent.parent), str(Path.home()), str(FOLDER)):
        assert path == "/" or path not in json.dumps(told)
    assert set(result[-1]) == {"1", "self", "thread-self"}


WRITES = """
    import errno
    failed = {}
    for path in ("/x", "/usr/x", "/usr/lib/x", "/etc/x", "/etc/passwd", "/opt/x", "/opt/cache/x", "/opt/packages/x",
                 "/mnt/x", "/home/x", "/dev/x", "/opt/afterglow/guest/wall.py", "/proc/self/oom_score_adj",
                 "/dev/zero", "/dev/full"):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
            failed[path] = None
        except OSError as error:
            failed[path] = errno.errorcode[error.errno]
    for path in ("/usr", "/dev/null", "/etc/hosts"):
        try:
            os.chmod(path, 0o777)
            failed[path] = None
        except OSError as error:
            failed[path] = errno.errorcode[error.errno]
    result = failed
"""


def test_nothing_can_be_written_but_its_own_folders(jail: Jail) -> None:
    """All the rest is refused; and its own are there, empty, and its own."""
    assert None not in jail.run(WRITES).values()
    result = jail.run(
        """
        for path in ("/mnt/data", "/tmp", "/dev/shm", "/home/sandbox"):
            assert os.listdir(path) == [] and os.stat(path).st_uid == 1000
            os.mkdir(path + "/folder")
            with open(path + "/folder/file", "w") as file:
                file.write("text")
            os.rename(path + "/folder/file", path + "/other")
            os.unlink(path + "/other")
        with open("/dev/null", "w") as file:
            file.write("nothing")
        result = open("/dev/zero", "rb").read(3).hex()
        """
    )
    assert result == "000000"


def test_mounts_alone_refuse_what_landlock_does(jail: Jail) -> None:
    """Without Landlock and seccomp the tree is still read-only, and what it is made of cannot be changed."""
    without = "wall.restrict_files = lambda *paths: None; wall.restrict_calls = lambda **roles: None"
    refused = jail.run(WRITES, before=without, worker=False)
    open_devices = {"/dev/zero", "/dev/full", "/proc/self/oom_score_adj"}  # as the kernel has them; here Landlock's
    assert {path for path, error in refused.items() if error is None} <= open_devices
    result = jail.run(
        """
        import ctypes
        libc = ctypes.CDLL(None)
        attempts = {
            "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
            "umount data": libc.umount2(b"/mnt/data", 2),
            "umount proc": libc.umount2(b"/proc", 2),
            "umount usr": libc.umount2(b"/usr", 2),
            "remount": libc.mount(None, b"/usr", None, 32 | 4096, None),
            "bind": libc.mount(b"/mnt/data", b"/tmp", None, 4096, None),
            "unshare mounts": libc.unshare(0x20000),
            "chroot": libc.chroot(b"/mnt/data"),
            "hostname": libc.sethostname(b"x", 1),
            "setuid": libc.setuid(0),
            "mknod": libc.mknod(b"/mnt/data/null", 0o20666, 0x103),
        }
        result = [name for name, answer in attempts.items() if answer == 0]
        """,
        before=without,
        worker=False,
    )
    assert result == []


def test_a_new_user_namespace_would_give_no_power_over_the_mounts(jail: Jail) -> None:
    """Even where unshare is not refused, the mounts stay as they are: they belong to a namespace above."""
    result = jail.run(
        """
        import ctypes
        libc = ctypes.CDLL(None)
        result = [libc.unshare(0x10000000 | 0x20000), libc.umount2(b"/mnt/data", 2), libc.umount2(b"/proc", 2),
                  libc.mount(None, b"/usr", None, 32 | 4096, None)]
        """,
        before="wall.restrict_files = lambda *paths: None; wall.restrict_calls = lambda **roles: None",
        worker=False,
    )
    assert -1 in result[:1] or result == [0, -1, -1, -1]


def test_files_are_bounded_in_size_and_number(jail: Jail) -> None:
    """A full folder says so; nothing else fills up."""
    result = jail.run(
        """
        import errno
        told = []
        for path in ("/mnt/data", "/tmp", "/dev/shm", "/home/sandbox"):
            written = 0
            try:
                for number in range(64):
                    with open(f"{path}/{number}", "wb", buffering=0) as file:
                        written += file.write(bytes(1 << 20))
            except OSError as error:
                told.append([errno.errorcode[error.errno], written >> 20])
        result = [told, os.statvfs("/mnt/data").f_files, os.statvfs("/dev/shm").f_files]
        """
    )
    assert result == [[["ENOSPC", 8], ["ENOSPC", 4], ["ENOSPC", 4], ["ENOSPC", 16]], wall.INODES, 1024]


def test_sessions_do_not_see_each_other(jail: Jail) -> None:
    """Neither files, nor processes, nor sockets of another session's, though it lives."""
    jail.run(
        """
        import socket
        open("/mnt/data/secret", "w").close(); open("/tmp/secret", "w").close(); open("/dev/shm/secret", "w").close()
        known["listening"] = listening = socket.socket(socket.AF_UNIX)
        listening.bind("\\0meeting")
        listening.listen()
        result = 0
        """.replace('known["listening"] = ', ""),
        hold=True,
    )
    result = jail.run(
        """
        import socket
        try:
            socket.socket(socket.AF_UNIX).connect("\\0meeting")
            met = True
        except OSError:
            met = False
        result = [os.listdir(path) for path in ("/mnt/data", "/tmp", "/dev/shm")] + [met, sorted(os.listdir("/proc"))]
        """
    )
    assert result == [[], [], [], False, ["1", "self", "thread-self"]]


# --- signals, limits, network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("abi", [1, 3, 5, 7])
def test_a_signal_to_its_group_reaches_nobody_outside(jail: Jail, abi: int) -> None:
    """kill(0) and kill(-1) end at the session, whatever Landlock's version can hold; the jail lives on."""
    before = f"real = wall.landlock_abi; wall.landlock_abi = lambda: min(real(), {abi})"
    code = """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(0, signal.SIGTERM)
        try:
            os.kill(-1, signal.SIGTERM)
        except ProcessLookupError:
            result = "nobody else is there"
    """
    assert jail.run(code, before=before) == "nobody else is there"
    assert jail.run("result = 'alive'") == "alive"


def test_priorities_of_others_are_out_of_reach(jail: Jail) -> None:
    """setpriority is refused, and without seccomp it still reaches nobody: the process group is its own."""
    code = """
        import ctypes
        libc = ctypes.CDLL(None)
        result = [libc.setpriority(kind, 0, 15) for kind in (0, 1, 2)]
    """
    assert jail.run(code) == [-1, -1, -1]
    nice = "result = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (1, os.getppid())]"
    assert jail.run(nice, outer=True) == [0, 0]
    without = "wall.restrict_calls = lambda **roles: None"
    jail.run(code.replace("(0, 1, 2)", "(1,)"), before=without, worker=False)
    assert jail.run(nice, outer=True) == [0, 0]


def test_limits_are_set_and_stay(jail: Jail) -> None:
    """Files, processes and memory are bounded, RLIMIT_CORE is 1 and cannot be changed, and nothing can be raised."""
    result = jail.run(
        """
        import resource
        names = ("NOFILE", "NPROC", "FSIZE", "MEMLOCK", "MSGQUEUE", "SIGPENDING", "NICE", "RTPRIO")
        limits = {name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in names}
        refused = []
        for kind, value in (("CORE", (0, 0)), ("CORE", (1, 1)), ("NPROC", (17, 17)), ("AS", (-1, -1))):
            try:
                resource.setrlimit(getattr(resource, "RLIMIT_" + kind), value)
            except (OSError, ValueError):
                refused.append(kind)
        result = [limits, refused]
        """
    )
    expected = {"NOFILE": 128, "NPROC": 16, "FSIZE": 8 << 20, "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": 256}
    assert result[0] == {name: [value, value] for name, value in {**expected, "NICE": 0, "RTPRIO": 0}.items()}
    assert result[1] == ["CORE", "CORE", "NPROC", "AS"]
    assert jail.run("import resource; result = resource.getrlimit(resource.RLIMIT_CORE)") == [1, 1]


def test_a_process_cannot_have_more_memory_than_its_limit(jail: Jail) -> None:
    """An allocation beyond it fails, and the program goes on; reserving without use is free."""
    result = jail.run(
        """
        import mmap
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = mmap.mmap(-1, 2 << 30, flags=private, prot=mmap.PROT_READ)
        try:
            bytearray(300 << 20)
            result = "had it"
        except MemoryError:
            result = len(bytearray(100 << 20)) >> 20
        """
    )
    assert result == 100


def test_a_fork_bomb_ends_at_the_number_of_processes(jail: Jail) -> None:
    """Forks fail beyond it, in this session alone."""
    result = jail.run(
        """
        import time
        started = 0
        try:
            while started < 100:
                if os.fork() == 0:
                    time.sleep(60)
                started += 1
        except BlockingIOError:
            pass
        result = started
        """
    )
    assert result == LIMITS["processes"] - 1
    assert jail.run("result = 'alive'") == "alive"


def test_there_is_no_network(jail: Jail) -> None:
    """Only unix sockets can be made; and if others could, their network has no interface up."""
    families = "[2, 10, 16, 17, 29, 38, 40, 44]"
    code = f"""
        import socket
        made = []
        for family in {families}:
            for make in (socket.socket, socket.socketpair):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                    try:
                        make(family, kind)
                        made.append([family, kind])
                    except OSError as error:
                        assert error.errno == 1, error
        left, right = socket.socketpair()
        left.send(b"hello")
        result = [made, right.recv(5).decode()]
    """
    assert jail.run(code) == [[], "hello"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
            import socket
            try:
                socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=1)
                result = "connected"
            except OSError as error:
                result = error.errno
        """
        without = "wall.restrict_calls = lambda **roles: None; wall.restrict_files = lambda *paths: None"
        assert jail.run(code, before=without, worker=False) == errno.ENETUNREACH


def test_the_machine_does_not_tell_how_long_it_has_been_up(jail: Jail) -> None:
    """Clocks since boot start with the jail, where the kernel has time namespaces."""
    if not os.path.exists("/proc/self/ns/time"):
        pytest.skip("this kernel has no time namespaces")
    import time

    told = jail.run("import time; result = [time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)]")
    assert max(told) < time.clock_gettime(time.CLOCK_BOOTTIME)
    assert max(told) < 600


# --- calls -----------------------------------------------------------------------------------------------------


def in_child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code that walls itself in, outside of any jail."""
    begin = "import ctypes, errno, json, os, sys\nfrom afterglow.sandbox.guest import syscalls, wall\n"
    begin += "libc = ctypes.CDLL(None, use_errno=True)\n"
    command = [sys.executable, "-B", "-c", begin + textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=FOLDER.parents[2], check=False)


EACH_CALL = """
    import resource, signal
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wall.restrict_calls()
    wall.restrict_calls(worker=True)
    blocking = {syscalls.X86_64["pause"], syscalls.X86_64["ppoll"]}
    allowed = {}
    for number in range(475):
        pid = os.fork()
        if pid == 0:
            signal.setitimer(signal.ITIMER_REAL, 0.05 if number in blocking else 0)
            answer = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(value) for value in (-1, 0, 0, 0, 0, 0)])
            os._exit(ctypes.get_errno() if answer == -1 else 0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status not in (errno.EPERM, errno.ENOTTY):
            allowed[number] = status
    print(json.dumps(allowed))
"""

# Each was called with (-1, 0, 0, 0, 0, 0); a name that is missing here answered EPERM. A change here is one of the
# wall.
PASSED = """
    access alarm accept accept4 bind brk chdir chmod chown clock_getres clock_gettime clock_nanosleep close close_range
    connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait
    eventfd2 execve exit exit_group faccessat faccessat2 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat
    fcntl fgetxattr flistxattr fork fstat fstatfs ftruncate futex futimesat getcpu getcwd getdents getdents64 getegid
    geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getrandom getresgid getresuid
    getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid getxattr kill lchown lgetxattr link
    linkat listen listxattr llistxattr lseek lstat madvise mkdir mkdirat mmap mprotect mremap munmap nanosleep
    newfstatat open openat pause pipe pipe2 poll ppoll pread64 preadv pselect6 pwrite64 pwritev read readlink
    readlinkat readv recvfrom recvmsg rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending
    rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getparam sched_getscheduler sched_yield select sendfile sendmsg sendto set_robust_list
    set_tid_address setitimer setpgid setsid shutdown sigaltstack stat statfs statx symlink symlinkat sysinfo tgkill
    time times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork wait4 waitid write writev
"""
PRETENDED = {"fadvise64", "fdatasync", "fsync", "msync", "readahead", "sync", "sync_file_range", "syncfs"}
UNKNOWN = {"clone3", "futex_waitv", "io_uring_setup", "openat2", "pidfd_open", "preadv2", "pwritev2", "timer_create"}
UNSUPPORTED = {"setxattr", "lsetxattr", "fsetxattr"}
PROBES = {335, 336}  # uretprobe and uprobe: the kernel lets them through to itself, and they fail where no probe is


@pytest.mark.skipif(not X86_64, reason="the numbers are those of x86-64")
def test_every_call_of_the_kernel_is_on_the_list_or_refused() -> None:
    """Of all system calls only these do not answer EPERM, or ENOTTY; some of them are told to be done, some unknown."""
    ended = in_child(EACH_CALL)
    assert ended.returncode == 0, ended.stderr
    answers = {int(number): answer for number, answer in json.loads(ended.stdout).items() if int(number) not in PROBES}
    names = {number: name for name, number in syscalls.X86_64.items()}
    told = {names.get(number, str(number)): answer for number, answer in answers.items()}
    assert {name for name, answer in told.items() if answer == errno.ENOSYS} == UNKNOWN
    assert {name: told[name] for name in PRETENDED} == dict.fromkeys(PRETENDED, 0)
    assert {name for name, answer in told.items() if answer == errno.EOPNOTSUPP} == UNSUPPORTED
    assert sorted(told.keys() - UNSUPPORTED - UNKNOWN - PRETENDED) == sorted(PASSED.split())


if X86_64:
    BY_INT_80 = "b814000000cd80c3"  # mov eax, 20 (getpid, of 32 bit); int 0x80; ret
    RUN_CODE = """
        import mmap, resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
        page.write(bytes.fromhex(sys.argv[1]))
        run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        wall.restrict_calls()
        print(run())
    """

    def test_32_bit_calls_kill() -> None:
        """int 0x80 enters the kernel by another door, with other numbers: the process ends."""
        assert in_child(RUN_CODE, BY_INT_80).returncode in (-signal.SIGSYS, -signal.SIGSEGV)

    def test_x32_calls_kill() -> None:
        """Numbers of the x32 interface end the process."""
        code = "wall.restrict_calls()\nlibc.syscall(ctypes.c_long(0x40000000 + 39))"
        assert in_child(code).returncode == -signal.SIGSYS


def test_the_worker_loses_what_the_agent_has() -> None:
    """New filters and dumpability are the agent's; nothing gives them back."""
    ended = in_child(
        """
        attempts = [lambda: wall.set_dumpable(False), lambda: wall.restrict_calls(worker=True)]
        def tries():
            told = []
            for attempt in attempts:
                try:
                    attempt()
                    told.append(None)
                except OSError as error:
                    told.append(errno.errorcode[error.errno])
            return told
        wall.restrict_calls()
        print(tries())
        print(tries())
        """
    )
    assert ended.stdout.splitlines() == ["[None, None]", "['EPERM', 'EPERM']"], ended.stderr


def test_arguments_are_looked_at(jail: Jail) -> None:
    """Calls that are allowed for some arguments are refused for others, and answer as programs expect."""
    result = jail.run(
        """
        import ctypes, errno, fcntl, mmap, resource, socket
        libc = ctypes.CDLL(None, use_errno=True)
        def answer(call, *arguments):
            return 0 if call(*arguments) != -1 else errno.errorcode[ctypes.get_errno()]
        def raised(call):
            try:
                call()
                return 0
            except OSError as error:
                return errno.errorcode[error.errno]
            except ValueError:
                return "EPERM"
        libc.mmap.restype = ctypes.c_long
        null = os.open("/dev/null", os.O_RDWR)
        file = os.open("/mnt/data/file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(file, 4096)
        left, right = socket.socketpair()
        result = {
            "shared anonymous": raised(lambda: mmap.mmap(-1, 4096)),
            "huge pages": raised(lambda: mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)),
            "private": raised(lambda: mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)),
            "shared file": raised(lambda: mmap.mmap(file, 4096)),
            "notify": raised(lambda: fcntl.fcntl(file, fcntl.F_NOTIFY, 2)),
            "owner": raised(lambda: fcntl.fcntl(file, fcntl.F_SETOWN, 1)),
            "posix lock": raised(lambda: fcntl.lockf(file, fcntl.LOCK_EX)),
            "flock": raised(lambda: fcntl.flock(file, fcntl.LOCK_EX)),
            "a terminal's ioctl": raised(lambda: fcntl.ioctl(null, 0x5412, b"x")),
            "clone of a file": raised(lambda: fcntl.ioctl(file, 0x40049409, null)),
            "out of band": raised(lambda: left.send(b"x", socket.MSG_OOB)),
            "big buffer": raised(lambda: left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)),
            "filter": raised(lambda: left.setsockopt(socket.SOL_SOCKET, 26, bytes(16))),
            "limits of another": answer(libc.prlimit, 1, 7, None, None),
            "own limits": answer(libc.prlimit, 0, 7, None, None),
            "core limit": raised(lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1))),
            "what the core limit is": resource.getrlimit(resource.RLIMIT_CORE),
            "keep caps": answer(libc.prctl, 8, 1, 0, 0, 0),
            "name": answer(libc.prctl, 15, b"name", 0, 0, 0),
            "merge pages": answer(libc.prctl, 67, 1, 0, 0, 0),
            "flush": raised(lambda: os.fsync(file)),
            "throw out of memory": raised(lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)),
            "what is in memory": raised(lambda: os.preadv(file, [bytearray(1)], 0, 8)),
        }
        """
    )
    assert result == {
        "shared anonymous": "EPERM",
        "huge pages": "EPERM",
        "private": 0,
        "shared file": 0,
        "notify": "EPERM",
        "owner": "EPERM",
        "posix lock": 0,
        "flock": "EPERM",
        "a terminal's ioctl": "ENOTTY",
        "clone of a file": "EXDEV" if result["clone of a file"] == "EXDEV" else "ENOTSUP",
        "out of band": "EPERM",
        "big buffer": "EPERM",
        "filter": "EPERM",
        "limits of another": "EPERM",
        "own limits": 0,
        "core limit": "EPERM",
        "what the core limit is": [1, 1],
        "keep caps": "EPERM",
        "name": 0,
        "merge pages": "EPERM",
        "flush": 0,
        "throw out of memory": 0,
        "what is in memory": "ENOTSUP",
    }


def test_the_agent_cannot_be_looked_into(jail: Jail) -> None:
    """A process of the same user finds the first one's memory, files and root closed, also without Landlock."""
    result = jail.run(
        """
        if os.fork() == 0:
            told = []
            for name in ("mem", "maps", "environ", "root/etc", "cwd/x", "fd/3"):
                try:
                    os.close(os.open(f"/proc/1/{name}", os.O_RDONLY))
                    told.append(name)
                except OSError:
                    pass
            control.send(json.dumps({"result": told}).encode())
            os._exit(0)
        os.wait()
        os._exit(0)
        """,
        before="wall.restrict_files = lambda *paths: None",
    )
    assert result in ([], ["maps"])  # which opens, and then has nothing to read


# --- Landlock --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abi", range(1, 8))
def test_landlock_of_every_version_holds_files(abi: int, tmp_path: Path) -> None:
    """Whatever version the kernel has: what is not named cannot be opened, read-only is read-only, names are names."""
    for name in ("read", "write", "names", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("text")
    ended = in_child(
        """
        abi, base = int(sys.argv[1]), sys.argv[2]
        real = wall.landlock_abi()
        wall.landlock_abi = lambda: min(real, abi)
        wall.prctl(wall.PR_SET_NO_NEW_PRIVS, 1)
        wall.restrict_files([base + "/read", base + "/missing"], [base + "/write"], [base + "/names"])
        def tries(attempt):
            try:
                attempt()
                return 1
            except OSError:
                return 0
        told = {}
        for name in ("read", "write", "names", "other"):
            path = f"{base}/{name}"
            attempts = [lambda: os.listdir(path), lambda: open(path + "/file").close(),
                        lambda: open(path + "/file", "a").close(), lambda: open(path + "/new", "w").close(),
                        lambda: os.mkfifo(path + "/pipe"), lambda: os.mkdir(path + "/folder"),
                        lambda: os.unlink(path + "/file")]
            told[name] = [tries(attempt) for attempt in attempts]
        print(json.dumps(told))
        """,
        str(abi),
        str(tmp_path),
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {
        "read": [1, 1, 0, 0, 0, 0, 0],
        "write": [1, 1, 1, 1, 0, 1, 1],
        "names": [1, 0, 0, 0, 0, 0, 0],
        "other": [0, 0, 0, 0, 0, 0, 0],
    }


# --- the fork server, and starting -----------------------------------------------------------------------------


def test_a_lock_is_held_by_nobody(jail: Jail) -> None:
    """Locks are told to be set, and no other process, in the session or out of it, ever finds one."""
    result = jail.run(
        """
        import fcntl, struct
        def locked(path, mode):
            file = open(path, mode)
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.fork() == 0:
                asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
                told = fcntl.fcntl(open(path, mode), fcntl.F_GETLK, asked)
                os._exit(struct.unpack_from("h", told)[0])
            return os.waitstatus_to_exitcode(os.wait()[1])
        result = [locked("/mnt/data/own", "w+"), locked("/etc/passwd", "r"), locked("/usr/bin/env", "rb")]
        """
    )
    assert result == [fcntl.F_UNLCK] * 3


def test_a_fork_server_that_finds_no_way_back_ends(jail: Jail) -> None:
    """What it forked later would be in the namespace of a session: it ends, and the guard ends the rest."""
    with pytest.raises(Died) as died:
        jail.run("result = wall.fork_as_init(os.open('/dev/null', os.O_RDONLY)) or os._exit(0)", outer=True)
    assert died.value.status == 1
    assert jail.run("result = 'alive'") == "alive"


def test_a_fork_that_fails_leaves_the_fork_server_where_it_was(jail: Jail) -> None:
    """It is back in its own pid namespace, and the next fork works."""
    result = jail.run(
        """
        import resource
        home = os.open("/proc/self/ns/pid", os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
        try:
            if wall.fork_as_init(home) == 0:
                os._exit(1)
            result = "forked"
        except BlockingIOError:
            children = os.readlink("/proc/self/ns/pid_for_children")
            result = children == os.readlink("/proc/self/ns/pid")
        """,
        outer=True,
    )
    assert result in (True, "forked")  # root of the whole machine is bound by no such limit


def test_what_honest_programs_need_is_there(jail: Jail) -> None:
    """Threads, forks, shells, temporary files, databases, archives, shared memory in files, clocks and time zones."""
    result = jail.run(
        """
        import asyncio, sqlite3, subprocess, sys, tempfile, threading, time, zipfile, zoneinfo
        done = []
        threads = [threading.Thread(target=done.append, args=[number]) for number in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        if (pid := os.fork()) == 0:
            os._exit(7)
        done.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        done.append(subprocess.run(["ls", "/mnt"], capture_output=True, text=True, check=True).stdout)
        done.append(subprocess.run("echo a | wc -l", shell=True, capture_output=True, text=True).stdout.strip())
        python = [sys.executable, "-c", "import json; print(1)"]
        done.append(subprocess.run(python, capture_output=True, text=True).stdout)
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"text")
        for mode in ("delete", "wal"):
            with sqlite3.connect(f"/mnt/data/{mode}.db") as database:
                database.execute(f"pragma journal_mode={mode}")
                database.execute("create table t (a)")
                database.execute("insert into t values (1)")
        with zipfile.ZipFile("z.zip", "w") as archive:
            archive.write("wal.db")
        done.append(str(zoneinfo.ZoneInfo("Europe/Oslo")))
        async def sleeps():
            await asyncio.sleep(0)
            return "slept"
        done.append(asyncio.run(sleeps()))
        result = done
        """
    )
    assert result == [0, 1, 2, 3, 7, "data\n", "1", "1\n", "Europe/Oslo", "slept"]


def test_root_without_its_powers_becomes_an_ordinary_user(guest: Path) -> None:
    """Root of a container may not mount, and to the kernel's user 0 no process limit applies: sessions are nobody's."""
    if launch.choose_way() is not launch.Way.ROOT:
        pytest.skip("needs root")
    jail = Jail("container", python_for("user"), guest)
    if jail.first != b"[]":
        os.waitpid(jail.pid, 0)
        pytest.skip(f"no wall can be built here: {jail.first.decode()}")
    assert jail.run("result = os.getuid()", hold=True) == wall.INNER_UID
    status = jail.run(OUTSIDE + "result = sessions()[-1]", outer=True)
    jail.close()
    assert (status["CapEff"], status["Groups"]) == ("0" * 16, "")


def test_a_refusal_says_which_step_and_what_to_do(guest: Path) -> None:
    """Where unshare is refused, as in a container with default settings, the launcher says so in words, and ends."""
    refuse = """
import struct
from afterglow.sandbox.guest import syscalls, wall
steps = [syscalls.Step(0x20, 0, 0, 0), syscalls.Step(0x15, 0, 1, UNSHARE), syscalls.Step(6, 0, 0, 0x50001),
         syscalls.Step(6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(step.packed() for step in steps))
wall.prctl(38, 1)
wall._check(wall._call("seccomp", 1, 0, struct.pack("@HP", 4, ctypes.addressof(code))), "seccomp")
os.execv(sys.argv[1], sys.argv[1:])
"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, socket.socket(socket.AF_UNIX) as orders:
        ours.settimeout(30)
        ours.send(json.dumps({"guard": {}}).encode())
        number = 272 if X86_64 else 97
        begin = f"import ctypes, os, sys; sys.path.insert(0, {str(FOLDER.parents[2])!r})"
        command = [
            sys.executable,
            "-c",
            begin + refuse.replace("UNSHARE", str(number)),
            *launch.command(sys.executable),
        ]
        pid = spawn(command, theirs, orders)
        told = json.loads(ours.recv(65_536))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert (told["step"], told["errno"]) == ("namespaces", errno.EPERM)
    assert "seccomp=unconfined" in told["remedy"]
