"""Builds the jail around all sessions, and starts the guard and the fork server in it.

    server ── launcher (this, run by the Python of the interpreter's environment; it waits and ends as the guard ends)
                └─ guard, pid 1 of the jail (this program, forked: `guard.main`)
                     └─ fork server (the same Python, as the jail shows it: `warm.main`)

Descriptors: 2 shows what breaks unforeseen; 3 is the control socket, 4 the guard's, both SOCK_SEQPACKET. The first
message on 3 is ours, a JSON object:
    guard       the limits that `guard.main` is given
    packages    optional: the folder to import from; default: site-packages of the environment whose Python runs this
    fonts       optional: a folder with a font cache for matplotlib; default: `matplotlib` in that environment
All later messages are the fork server's. When the jail cannot be built, one answer is sent, and our status is 1:
    {"error": text, "step": name, "errno": number, "reason": words, "remedy": words}
When it can, nothing is sent: the fork server speaks first.

There are two ways. With the powers of real root (`Way.ROOT`) the tree is put together first, since the Python may be
where only root can read, and then everything moves into a user namespace of 65,536 users that exist nowhere else;
sessions get one each, from 1. An ordinary user (`Way.USER`) starts with a user namespace in which it is the only one.

In the jail: /opt/afterglow/guest, this folder; /opt/packages; /opt/python, the Python, unless it is the one of /usr;
CACHE, which only the fork server can fill, and seals. No argument, variable or traceback names a path of the host.
An ordinary user cannot let go of its groups: what they may read in /usr, its sessions may. Quotas that the kernel keeps
by user (pipes, watches of epoll) are shared with the server then; so a user of its own for the server is better.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from . import guard, refusals, wall

CONTROL_FD, GUARD_FD = 3, 4
CONFIG_BYTES = 65_536

GUEST, PACKAGES, PYTHON, CACHE = "/opt/afterglow/guest", "/opt/packages", "/opt/python", "/opt/cache"
FONTS = f"{CACHE}/matplotlib"
# Where the tree is put together: the first that is on the way to nothing that belongs into it.
BUILT_AT = ("/mnt", "/media", "/srv", "/run", "/tmp", "/var/tmp")  # noqa: S108 - a mount that hides what is there

USERS = 65_536
FIRST_USER = 0x7000_0000  # above all that systemd and others hand out
USER_RANGES = 2048  # the next launcher's sessions have other users, as far as possible
NOBODY = 65_534
CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 6, 7, 21
NEWTIME = 0x80
OUTER = wall.NEWNS | wall.NEWPID | wall.NEWNET | wall.NEWIPC | wall.NEWUTS

SYSTEM = ("usr/bin", "usr/lib", "usr/lib64", "bin", "lib", "lib64", "etc/alternatives", "etc/fonts")
SHARED = ("fontconfig", "fonts", "i18n", "locale", "poppler", "terminfo", "tesseract-ocr", "zoneinfo")  # of /usr/share
COPIED = ("etc/ld.so.cache", "etc/localtime", "etc/mime.types")  # copies: nobody else reads or locks these
WRITTEN = {
    "etc/passwd": f"sandbox:x:{wall.INNER_UID}:{wall.INNER_UID}::{wall.HOME}:/bin/sh\n",
    "etc/group": f"sandbox:x:{wall.INNER_UID}:\n",
    "etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/mtab": "".join(f"tmpfs {path} tmpfs rw 0 0\n" for path in (wall.WORK, "/tmp")),  # noqa: S108 - for df
}
# In the system's libraries, but for others: packages and programs of the operator's, and what only a host needs.
HIDDEN = (
    *("python3*/site-packages", "python3*/dist-packages", "node_modules", "cgi-bin"),
    *("systemd", "modules", "firmware"),
)
DEVICES = ("null", "zero", "full", "random", "urandom")
DEVICE_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
EMPTY = ("proc", "tmp", "dev/shm", wall.WORK[1:], wall.HOME[1:], CACHE[1:])


class Refused(Exception):
    """A step that the kernel or this machine refused. step: its name; reason: in words, where they are known."""

    def __init__(self, step: str, error: int, text: str, reason: str = "") -> None:
        super().__init__(f"{step}: {text}")
        self.step = step
        self.error = error
        self.reason = reason


class Way(Enum):
    """With which powers the jail is built."""

    ROOT = "root"
    USER = "user"


class Python(NamedTuple):
    """The Python that sessions run. name: `python3.12`; program, library: its files here, prefix: what they are in."""

    name: str
    prefix: str
    program: str
    library: str

    @property
    def is_system(self) -> bool:
        return self.prefix == "/usr"

    @property
    def inside(self) -> str:
        """Its path in the jail."""
        return f"/usr/bin/{self.name}" if self.is_system else f"{PYTHON}/bin/{self.name}"


class Bind(NamedTuple):
    """A file or folder of the host, and where it is in the jail (without the leading slash)."""

    source: str
    target: str


def command(python: str) -> list[str]:
    """What starts the launcher. python: the program of the interpreter's environment.

    To be started with an empty environment, as a session leader, and with descriptors as the module says.
    """
    folder = str(Path(__file__).parent.parent)
    return [python, "-I", "-S", "-B", "-c", _start("launch", f"sys.path.append({folder!r})")]


def _start(module: str, paths: str) -> str:
    return f"import sys; {paths}; from guest.{module} import main; main()"


def main() -> NoReturn:
    """Build, start, wait; ends with the guard's status."""
    os.chdir("/")
    os.umask(0o022)
    wall.close_from(GUARD_FD + 1)  # whatever the server's libraries have left open
    control = socket.socket(fileno=CONTROL_FD)
    try:
        jail = Jail(json.loads(control.recv(CONFIG_BYTES)))
        jail.build()
        pid = _fork()
        if pid == 0:
            jail.be_first()
    except Refused as refused:
        control.send(json.dumps(_told(refused)).encode())
        os._exit(1)
    control.close()
    os.close(GUARD_FD)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


def _told(refused: Refused) -> dict[str, str | int]:
    reason, remedy = refusals.explain(refused.step, refused.error)
    return {
        "error": str(refused),
        "step": refused.step,
        "errno": refused.error,
        "reason": refused.reason or reason,
        "remedy": remedy,
    }


class Jail:
    """One jail in the making; each part is a step that may be refused."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.limits: guard.Limits = config["guard"]
        self.way = choose_way()
        self.python = this_python()
        here = os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))
        self.packages = config.get("packages") or own_packages(here, self.python)
        self.fonts = read_fonts(config.get("fonts") or f"{here}/matplotlib")
        own = [*python_binds(self.python), Bind(str(Path(__file__).parent), GUEST[1:])]
        if self.packages:
            own.append(Bind(self.packages, PACKAGES[1:]))
        self.own = [bind.source for bind in own]
        self.binds = [*system_binds(), *own]
        self.root = place_to_build([bind.source for bind in self.binds])

    def build(self) -> None:
        """In the launcher: the tree and the namespaces, in the order of the way."""
        keep_core_handler_out()
        if self.way is Way.ROOT:
            with step("namespaces"):
                wall.unshare(wall.NEWNS)
            self._build_tree()
            with step("namespaces"):
                own_users(FIRST_USER + USERS * (os.getpid() % USER_RANGES), OUTER)
        else:
            if os.geteuid() == 0:
                _become_nobody()
            with step("namespaces"):
                wall.own_user_namespace(0, OUTER)
            self._build_tree()
        _start_clocks_anew()

    def be_first(self) -> NoReturn:
        """In pid 1 of the jail: the last of the tree, then the fork server; and the watch."""
        wall.prctl(wall.PR_SET_PDEATHSIG, signal.SIGKILL)
        with step("proc"):
            wall.bind(self.root, self.root)  # a mount that came with us into a user namespace cannot be the new root
            wall.mount("proc", f"{self.root}/proc", "proc", wall.MS_NOSUID | wall.MS_NODEV | wall.MS_NOEXEC)
            for path, size in ((CACHE, "64m"), ("/tmp", "8m")):  # noqa: S108 - the jail's; only now are they ours
                options = f"size={size},nr_inodes=4096,mode=755"
                wall.mount("own", self.root + path, "tmpfs", wall.MS_NOSUID | wall.MS_NODEV, options)
        with step("pivot"):
            wall.pivot(self.root)
        with step("fonts"):
            os.mkdir(FONTS)
            for name, content in self.fonts.items():
                Path(FONTS, name).write_bytes(content)
        wall.set_dumpable(False)
        fork_server = _fork()
        if fork_server == 0:
            self._exec_fork_server()
        os.close(CONTROL_FD)
        guard.main(GUARD_FD, fork_server, self.limits)
        os._exit(0)

    def _exec_fork_server(self) -> NoReturn:
        os.close(GUARD_FD)
        os.set_inheritable(CONTROL_FD, True)
        program = self.python.inside
        paths = f"sys.path.append({PACKAGES!r}); sys.path.insert(0, {str(Path(GUEST).parent)!r})"
        with step("exec"):
            arguments = [program, "-I", "-S", "-B", "-c", _start("warm", paths)]
            os.execve(program, arguments, environment(self.python))  # noqa: S606

    def _build_tree(self) -> None:
        root = self.root
        check_readable(self.own, self.way)
        with step("mounts"):
            wall.mount("none", "/", None, wall.MS_REC | wall.MS_PRIVATE)
            wall.mount("root", root, "tmpfs", wall.MS_NOSUID | wall.MS_NODEV, "size=16m,nr_inodes=4096,mode=755")
        with step("tree"):
            for bind in self.binds:
                bind_read_only(bind.source, f"{root}/{bind.target}")
            for name in DEVICES:
                bind_device(f"/dev/{name}", f"{root}/dev/{name}")
            write_small_files(root, self.python)
            for name in EMPTY:
                os.makedirs(f"{root}/{name}", exist_ok=True)
            for path in hidden(root):
                wall.mount("hidden", path, "tmpfs", wall.MS_NOSUID | wall.MS_NODEV, "size=4k,nr_inodes=2,mode=555")
                wall.make_read_only(path)
            wall.make_read_only(root)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Name what is being done, for the case that it is refused."""
    try:
        yield
    except OSError as error:
        raise Refused(name, error.errno or 0, str(error)) from None


def _fork() -> int:
    with step("fork"):
        return os.fork()


# --- who we are ------------------------------------------------------------------------------------------------


def choose_way() -> Way:
    """Real root is who may mount, change users, and has all the users of the machine to choose from."""
    may_all = may(CAP_SYS_ADMIN) and may(CAP_SETUID) and may(CAP_SETGID)
    highest = FIRST_USER + USERS * USER_RANGES
    return Way.ROOT if may_all and users_here() >= highest else Way.USER


def may(capability: int) -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        [effective] = [int(line.split()[1], 16) for line in file if line.startswith("CapEff:")]
    return bool(effective >> capability & 1)


def users_here() -> int:
    """The first number above all users of this user namespace."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return max(int(line.split()[0]) + int(line.split()[2]) for line in file)


def _become_nobody() -> None:
    """Root without the powers of real root, as in a container. For the kernel's user 0 no process limit counts."""
    with step("user"):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        wall.set_dumpable(True)  # else the files in /proc by which it maps itself would be root's


def own_users(first: int, others: int) -> None:
    """Move into a user namespace whose users 0 to 65,535 are `first` and on outside, and become its root.

    Only a process that has stayed outside may write such a map.
    """
    ready, tell = os.pipe()
    launcher = os.getpid()
    helper = os.fork()
    if helper == 0:
        os._exit(_map_users(launcher, first, ready))
    wall.unshare(wall.NEWUSER | others)
    os.write(tell, b".")
    failed = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    os.close(ready)
    os.close(tell)
    if failed:
        raise OSError(failed, f"uid_map: {os.strerror(failed)}")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    wall.set_dumpable(True)  # as in _become_nobody


def _map_users(pid: int, first: int, ready: int) -> int:
    os.read(ready, 1)
    try:
        for kind in ("uid_map", "gid_map"):
            wall.write(f"/proc/{pid}/{kind}", f"0 {first} {USERS}")
    except OSError as error:
        return error.errno or errno.EPERM
    return 0


def keep_core_handler_out() -> None:
    """A core limit of 1 is what keeps a crash in a session from starting the host's core handler, as root.

    Where the hard limit is 0 it cannot be set, and 0 itself does not keep it: it is for files.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except (ValueError, OSError):
        if Path("/proc/sys/kernel/core_pattern").read_bytes()[:1] in (b"|", b"@"):
            raise Refused("core", errno.EPERM, "RLIMIT_CORE cannot be 1: its hard limit is 0") from None


def check_readable(paths: Iterable[str], way: Way) -> None:
    """Whether sessions, which are other users when real root builds, may read what they are to be shown."""
    for path in paths:
        with step("tree"):
            mode = os.stat(path).st_mode
        needed = 5 if stat.S_ISDIR(mode) else 4
        readable = mode & needed == needed if way is Way.ROOT else os.access(path, needed)
        if not readable:
            reason = f"{path} is needed in the interpreter's sessions, and cannot be read by their users."
            raise Refused("files", errno.EACCES, path, reason)


def _start_clocks_anew() -> None:
    """So that clocks do not tell how long the machine has been up. Not all kernels can."""
    with suppress(OSError):
        wall.unshare(NEWTIME)
        since_boot = int(time.clock_gettime(time.CLOCK_BOOTTIME))
        running = int(time.clock_gettime(time.CLOCK_MONOTONIC))
        wall.write("/proc/self/timens_offsets", f"monotonic -{running} 0\nboottime -{since_boot} 0\n")


# --- what is in the jail ---------------------------------------------------------------------------------------


def this_python() -> Python:
    """The Python that runs this, or the one that its virtual environment was made from."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    name = os.path.basename(library)  # python3.12, or python3.13t
    prefix = os.path.dirname(os.path.dirname(library))
    program = next(
        (path for path in (f"{prefix}/bin/{name}", os.path.realpath(sys.executable)) if os.path.isfile(path)), ""
    )
    return Python(name, prefix, program, library)


def own_packages(environment: str, python: Python) -> str:
    """site-packages of a virtual environment, or of the Python itself; empty when there is none."""
    for prefix in (environment, python.prefix):
        path = f"{prefix}/lib/{python.name}/site-packages"
        if os.path.isdir(path):
            return path
    return ""


def system_binds() -> list[Bind]:
    """What any program needs of this system. Links (/bin, /lib on most) are made anew, not followed."""
    names = [*SYSTEM, *(f"usr/share/{name}" for name in SHARED)]
    return [Bind(f"/{name}", name) for name in names if os.path.isdir(f"/{name}") and not os.path.islink(f"/{name}")]


def python_binds(python: Python) -> list[Bind]:
    """Of a Python that is not the system's only itself: its folder may be a user's, and hold anything.

    Conda's is an exception: there, what its modules need lies beside the library.
    """
    if python.is_system:
        return []
    lib = os.path.dirname(python.library)
    binds = [Bind(python.program, python.inside[1:])]
    if os.path.isdir(f"{python.prefix}/conda-meta"):
        return [*binds, Bind(lib, f"{PYTHON[1:]}/lib")]
    binds.append(Bind(python.library, f"{PYTHON[1:]}/lib/{python.name}"))
    shared = sorted(path for path in Path(lib).glob("libpython*.so*") if path.is_file())
    return [*binds, *(Bind(str(path), f"{PYTHON[1:]}/lib/{path.name}") for path in shared)]


def place_to_build(sources: Iterable[str]) -> str:
    """A folder that can be covered while the tree is put together."""
    needed = [path for source in sources for path in (source, os.path.realpath(source))]
    for place in BUILT_AT:
        if (
            os.path.realpath(place) == place
            and os.path.isdir(place)
            and not any(Path(path).is_relative_to(place) for path in needed)
        ):
            return place
    raise Refused("tree", errno.EBUSY, f"none of {', '.join(BUILT_AT)} can be covered")


def hidden(root: str) -> list[str]:
    """Folders of the tree that are covered by empty ones."""
    libraries = [Path(root, name) for name in ("usr/lib", "usr/lib64", "lib", "lib64", f"{PYTHON[1:]}/lib")]
    real = [path for path in libraries if path.is_dir() and not path.is_symlink()]
    found = {str(path) for library in real for pattern in HIDDEN for path in library.glob(pattern)}
    return sorted(path for path in found if os.path.isdir(path) and not os.path.islink(path))


def bind_read_only(source: str, target: str) -> None:
    """With all that is mounted below it: no part of it can be left out of sight."""
    _make_place(target, os.path.isdir(source))
    wall.bind(source, target)
    wall.set_mount(target, wall.ATTR_RDONLY | wall.ATTR_NOSUID | wall.ATTR_NODEV, below=True)


def bind_device(source: str, target: str) -> None:
    """Read-only keeps its owner from changing its mode; it is a device, so it can still be written to."""
    if not stat.S_ISCHR(os.stat(source).st_mode):
        raise OSError(errno.ENODEV, f"{source} is no device")
    _make_place(target, folder=False)
    wall.bind(source, target)
    wall.set_mount(target, wall.ATTR_RDONLY | wall.ATTR_NOSUID | wall.ATTR_NOEXEC)


def _make_place(target: str, folder: bool) -> None:
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))


def write_small_files(root: str, python: Python) -> None:
    """Links, copies and made-up files."""
    os.makedirs(f"{root}/etc", exist_ok=True)
    for name in COPIED:
        with suppress(FileNotFoundError):
            Path(root, name).write_bytes(Path("/", name).read_bytes())
    for name, text in WRITTEN.items():
        Path(root, name).write_text(text, "ascii")
    for name, leads_to in DEVICE_LINKS.items():
        os.symlink(leads_to, f"{root}/dev/{name}")
    for name in SYSTEM:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
    if not python.is_system:
        for name in ("python3", "python"):
            os.symlink(python.name, f"{root}{PYTHON}/bin/{name}")


def read_fonts(folder: str) -> dict[str, bytes]:
    """The files of a font cache. Without it, or with one that does not fit, matplotlib makes it anew."""
    with suppress(OSError):
        return {entry.name: Path(entry.path).read_bytes() for entry in os.scandir(folder) if entry.is_file()}
    return {}


def environment(python: Python) -> dict[str, str]:
    """The fork server's variables, and so those of every session."""
    variables = {
        "PATH": f"{PYTHON}/bin:/usr/bin:/bin",
        "HOME": wall.HOME,
        "LANG": "C.UTF-8",
        "PYTHONPATH": PACKAGES,  # for the Python that a cell starts; the fork server does not look
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLBACKEND": "agg",
        "MPLCONFIGDIR": FONTS,
        "OPENBLAS_NUM_THREADS": "1",  # a fork server must have one thread, and a session has one processor
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
    if not python.is_system:
        variables["LD_LIBRARY_PATH"] = f"{PYTHON}/lib"
    return variables
