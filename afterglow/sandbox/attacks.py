"""The attacks that every engine must withstand before it may run anything: tried on a session of its own at start.

ATTACKS are for every engine; NATIVE ones for the wall of the native engine, which hides more than a container does.
Each is a few lines of Python that return something only if the wall has a hole. What raises is stopped; what ends in
any other way than `stopped` counts as a success of the attack's, for nobody knows then.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import tempfile
import textwrap
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import MappingProxyType
from typing import NamedTuple

from afterglow.contracts import CodeSession, Logs

EACH_S = 5.0
STOPPED = "stopped"
SOMEWHERE = "192.0.2.1"  # documentation's address: connecting a UDP socket to it sends nothing, but picks our address

BEGIN = """
import ctypes, glob, os, platform, resource, socket, threading
libc = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"
def call(on_x86, on_arm, *arguments):
    return libc.syscall(on_x86 if x86 else on_arm, *arguments) >= 0
def opens(path, mode="rb"):
    try:
        with open(path, mode) as file:
            return file.read(4096) if mode == "rb" else True
    except OSError:
        return None
def connects(family, address):
    try:
        with socket.socket(family) as tried:
            tried.settimeout(0.3)
            tried.connect(address)
            return True
    except OSError:
        return None
def makes(family, kind, protocol=0):
    try:
        return socket.socket(family, kind, protocol)
    except OSError:
        return None
def attempt(attack):
    try:
        return attack()
    except (OSError, ValueError, RuntimeError):
        return None
"""

TRY = """
def attack():
{body}
print("got through" if attempt(attack) else "{stopped}")
"""

ATTACKS = {
    "read a file of the server's": """
        paths = [PLANTED, *(f"{root}{PLANTED}" for root in glob.glob("/proc/*/root"))]
        return any(opens(path) for path in [*paths, "/etc/shadow", os.path.expanduser("~root/.bashrc"), "/proc/1/mem"])
    """,
    "read the variables of another process": """
        found = b"".join(opens(path) or b"" for path in glob.glob("/proc/*/environ"))
        return any(word in found.upper() for word in (b"AFTERGLOW", b"KEY", b"TOKEN", b"SECRET", b"PASSWORD"))
    """,
    "see other processes": """
        return len([name for name in os.listdir("/proc") if name.isdigit()]) > 4 or os.getpgid(0) == 0
    """,
    "connect to the machine": """
        return any(connects(socket.AF_INET, (address, port)) for address, port in LISTENING) or connects(
            socket.AF_UNIX, ABSTRACT)
    """,
    "make a network socket": """
        tried = [(2, 1), (2, 2), (10, 2), (2, 3, 1), (16, 3, 0), (17, 3, 768), (40, 1), (38, 5)]
        return any(makes(*kind) for kind in tried)
    """,
    "write outside its folders": """
        places = ["/", "/usr/", "/usr/bin/", "/usr/lib/", "/etc/", "/opt/", "/mnt/", "/home/", "/dev/", "/sys/"]
        files = ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/etc/passwd", "/dev/mem", "/dev/kmsg"]
        return any(opens(place + "afterglow-attack", "wb") for place in places) or any(
            opens(file, "ab") for file in files)
    """,
    "mount": """
        return (libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 or libc.umount2(b"/mnt/data", 2) == 0
            or libc.mount(None, b"/", None, 32 | 4096, None) == 0 or call(428, 428, -100, b"/", 1))
    """,
    "make a namespace": """
        kinds = (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x10020000)
        return any(libc.unshare(kind) == 0 for kind in kinds) or opens("/proc/1/ns/mnt")
    """,
    "become another user": """
        os.setuid(0)
        return True
    """,
    "look into another process": """
        return libc.ptrace(16, 1, 0, 0) == 0 or call(310, 270, 1, None, 0, None, 0, 0) or call(438, 438, 3, 1, 0)
    """,
    "reach seldom used parts of the kernel": """
        room = ctypes.create_string_buffer(256)
        return (call(425, 425, 1, room) or call(321, 280, 0, room, 72) or call(298, 241, room, 0, -1, -1, 0)
            or call(323, 282, 1) or call(248, 217, b"user", b"a", b"b", 1, -2) or call(250, 219, 0, -3, 1)
            or call(246, 104, 0, 0, None, 0) or call(101, 117, 0, 0, 0, 0) or call(304, 265, 0, room, 0))
    """,
    "raise its limits": """
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        if hard < 0 or hard > 100_000:
            return True
        resource.setrlimit(resource.RLIMIT_NPROC, (hard + 1, hard + 1))
        return True
    """,
    "run first": """
        os.nice(-1)
        return True
    """,
    "start too many processes": """
        go_on, started = threading.Event(), 0
        try:
            for started in range(PROCESSES + 64):
                threading.Thread(target=go_on.wait, daemon=True).start()
        finally:
            go_on.set()
        return True
    """,
    "fill the disk": """
        for path in ("/mnt/data", "/tmp", "/dev/shm"):
            if not os.path.isdir(path):
                return True
            found = os.statvfs(path)
            if not 0 < found.f_blocks * found.f_frsize <= DISK_BYTES or not 0 < found.f_files <= 200_000:
                return True
    """,
}

NATIVE = {
    "see files of the server's": """
        return any(os.path.lexists(path) for path in HIDDEN)
    """,
    "see folders of the machine's": """
        there = [folder for folder in SHOWN if os.path.isdir(folder)]
        return any(set(os.listdir(folder)) - set(SHOWN[folder].split()) for folder in there)
    """,
    "see variables that are not its own": """
        return set(os.environ) - set(VARIABLES.split())
    """,
    "read of /proc what Landlock hides": """
        return any(opens(f"/proc/self/{name}") is not None for name in ("stat", "status", "mountinfo", "environ"))
    """,
    "see more of /proc than processes": """
        others = {name for name in os.listdir("/proc") if not name.isdigit()} - {"self", "thread-self"}
        return others or any(os.path.lexists(f"/proc/{name}") for name in ("cmdline", "meminfo", "sys"))
    """,
    "look into its first process": """
        return os.readlink("/proc/1/cwd")
    """,
    "use what is shown for more than reading": """
        there = [folder for folder in SHOWN if os.path.isdir(folder)]
        shown = [f"{folder}/{name}".replace("//", "/") for folder in there for name in os.listdir(folder)]
        own = ("/proc", "/tmp", "/dev", "/mnt", "/home")
        return any(os.statvfs(path).f_flag & 7 != 7 for path in shown if not path.startswith(own)) or any(
            not os.statvfs(path).f_flag & 1 for path in ("/", "/dev", "/dev/null", "/mnt", "/home")) or any(
            os.statvfs(path).f_flag & 6 != 6 for path in ("/mnt/data", "/tmp", "/dev/shm", "/proc", "/home/sandbox"))
    """,
}
# What NATIVE ones are told that the session should see; on some machines there is less.
SHOWN = {
    "/": "bin dev etc home lib lib64 mnt opt proc tmp usr",
    "/dev": "fd full null random shm stderr stdin stdout urandom zero",
    "/etc": "alternatives fonts group hosts ld.so.cache localtime mime.types mtab nsswitch.conf passwd",
    "/home": "sandbox",
    "/mnt": "data",
    "/opt": "afterglow cache packages python",
    "/usr": "bin lib lib64 share",
    "/usr/share": "fontconfig fonts i18n locale poppler terminfo tesseract-ocr zoneinfo",
}
VARIABLES = (
    "PATH HOME LANG PYTHONPATH PYTHONDONTWRITEBYTECODE MPLBACKEND MPLCONFIGDIR OPENBLAS_NUM_THREADS OMP_NUM_THREADS"
    " MALLOC_ARENA_MAX LD_LIBRARY_PATH"
)
NAMESPACES = ("ipc", "mnt", "net", "pid", "user", "uts")


class _Bait(NamedTuple):
    """What is put out for the attacks: the path of a secret, and addresses that somebody listens on."""

    planted: str
    listening: list[tuple[str, int]]
    abstract: str


async def probe(
    session: CodeSession,
    processes: int = 256,
    disk_mb: int = 4096,
    *,
    more: Mapping[str, str] = MappingProxyType({}),
    hidden: Iterable[str] = (),
) -> list[str]:
    """Try all attacks, and return those that succeeded. The session is of no use afterwards.

    processes, disk_mb: what the session may have at most; where nobody says, at least some bound is wanted.
    more: NATIVE, for that engine. hidden: paths of the host that must not be there, for the first of those.
    """
    async with _bait() as bait:
        names = {
            "PLANTED": bait.planted,
            "LISTENING": bait.listening,
            "ABSTRACT": bait.abstract,
            "PROCESSES": processes,
            "DISK_BYTES": disk_mb << 20,
            "HIDDEN": [bait.planted, *hidden],
            "SHOWN": SHOWN,
            "VARIABLES": VARIABLES,
        }
        known = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        if not await _stops(session, f'{BEGIN}{known}print("{STOPPED}")'):
            return ["run at all"]
        tried = {**more, **ATTACKS}
        return [name for name, body in tried.items() if not await _stops(session, _cell(body))]


async def shared_namespaces(one: CodeSession, other: CodeSession) -> list[str]:
    """Which namespaces two sessions share with each other or with us; words, if one does not tell."""
    ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}
    code = f"import os\nfor name in {NAMESPACES}: print(name, os.readlink(f'/proc/self/ns/{{name}}'))"
    told = [(await _said(session, code)).splitlines() for session in (one, other)]
    found = [{line.partition(" ")[0]: line.partition(" ")[2] for line in lines} for lines in told]
    if any(set(names) != set(NAMESPACES) for names in found):
        return ["what its namespaces are is not told"]
    return [
        f"sessions share a namespace: {name}"
        for name in NAMESPACES
        if len({ours[name], found[0][name], found[1][name]}) < 3
    ]


def _cell(body: str) -> str:
    return TRY.format(body=textwrap.indent(textwrap.dedent(body), "    "), stopped=STOPPED)


async def _stops(session: CodeSession, code: str) -> bool:
    return await _said(session, code) == STOPPED


async def _said(session: CodeSession, code: str) -> str:
    said = [part.text async for part in session.run(code, EACH_S) if isinstance(part, Logs)]
    return "".join(said).strip()


@asynccontextmanager
async def _bait() -> AsyncGenerator[_Bait]:
    abstract = f"\0afterglow-{secrets.token_hex(8)}"
    async with AsyncExitStack() as stack:
        planted = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="afterglow-planted-"))  # noqa: SIM115
        planted.write(secrets.token_hex(16))
        planted.flush()
        listening = []
        for address in {"127.0.0.1", _own_address()}:
            server = await stack.enter_async_context(await asyncio.start_server(_hang_up, address, 0))
            listening.append(server.sockets[0].getsockname()[:2])
        if sys.platform == "linux":  # nobody else has such sockets
            await stack.enter_async_context(await asyncio.start_unix_server(_hang_up, abstract))
        yield _Bait(planted.name, listening, abstract)


def _hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((SOMEWHERE, 9))
        except OSError:
            return "127.0.0.1"
        return str(asking.getsockname()[0])
