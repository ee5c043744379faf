"""The attacks, as cells: each tries what must not be possible, and says what came of it.

A cell notes with `attempt` what got through, and with which error the rest was refused. So an attack that dies of a
mistake of its own has proved nothing, and its test fails. MATRIX are those of the design's table; those of INVENTED
came later. What needs more than one cell to be told, such as floods and wedges, is in `endings.py` and the tests.
"""

from __future__ import annotations

import json
import os
import textwrap
from typing import Any, NamedTuple

from afterglow.contracts import CodeSession, Logs

# Numbers on x86-64 and on ARM64.
CALLS = {
    "ptrace": (101, 117),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ioprio_set": (251, 30),
    "mq_open": (240, 180),
    "unshare": (272, 97),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "prlimit64": (302, 261),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "finit_module": (313, 273),
    "sched_setattr": (314, 274),
    "seccomp": (317, 277),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "preadv2": (327, 286),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "pidfd_open": (434, 434),
    "clone3": (435, 435),
    "openat2": (437, 437),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "memfd_secret": (447, 447),
    "process_mrelease": (448, 448),
    "cachestat": (451, 451),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "inotify_init1": (294, 26),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "timer_create": (222, 107),
    "splice": (275, 76),
    "tee": (276, 77),
    "vmsplice": (278, 75),
    "mlock": (149, 228),
    "mincore": (27, 232),
    "personality": (135, 92),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "execveat": (322, 281),
    "setxattr": (188, 5),
    "get_robust_list": (274, 100),
    "clock_adjtime": (305, 266),
    "syslog": (103, 116),
    "acct": (163, 89),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "quotactl": (179, 60),
    "mbind": (237, 235),
    "pkey_alloc": (330, 289),
    "setpriority": (141, 140),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "mknodat": (259, 33),
    "sethostname": (170, 161),
    "clone": (56, 220),
    "setuid": (105, 146),
    "setgroups": (116, 159),
    "capset": (126, 91),
    "semget": (64, 190),
}

BEGIN = '''
import ctypes, errno, glob, json, os, resource, shutil, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
room = ctypes.create_string_buffer(4096)
got, refused = [], {}

def attempt(what, action):
    """Note what gets through, and with which error the rest is refused; a mistake is raised."""
    try:
        outcome = action()
    except OSError as error:
        refused[str(what)] = errno.errorcode[error.errno]
    else:
        got.append(str(what))
        return outcome

def call(name, *arguments):
    """A system call, by its name."""
    words = [ctypes.c_long(part) if isinstance(part, int) else part for part in arguments]
    ctypes.set_errno(0)
    if (result := libc.syscall(ctypes.c_long(CALLS[name]), *words)) < 0:
        raise OSError(ctypes.get_errno(), name)
    return result

def refuse(*calls):
    for name, *arguments in calls:
        attempt(name, lambda: call(name, *arguments))

def read(path):
    with open(path, "rb") as file:
        return file.read(4096)

def write(path, mode="wb"):
    with open(path, mode) as file:
        file.write(b"x")

def connect(family, kind, address):
    with socket.socket(family, kind) as trying:
        trying.settimeout(1)
        trying.connect(address)
        if kind == socket.SOCK_DGRAM:
            trying.send(b"x")
'''
END = "print(json.dumps([got, refused]))"


class Attack(NamedTuple):
    """code: a cell's; errors: with which each attempt is to be refused; outside: harmless there, and must get through,
    so that we know it for an attack."""

    code: str
    errors: str
    outside: bool = False


class Outcome(NamedTuple):
    """What came of an attack. got: what got through; refused: errors by what was tried; said: all of its output, when
    it did not come to its end."""

    got: list[str]
    refused: dict[str, str]
    said: str = ""


def program(names: dict[str, Any]) -> str:
    """What goes before all attacks of a session."""
    numbers = {name: number[os.uname().machine == "aarch64"] for name, number in CALLS.items()}
    known = "".join(f"{name} = {value!r}\n" for name, value in {**names, "CALLS": numbers}.items())
    return f"{BEGIN}\n{known}"


def cell(attack: Attack) -> str:
    """Variables of one attack are not the next one's."""
    body = textwrap.indent(textwrap.dedent(attack.code).strip(), "    ")
    return f"got.clear(), refused.clear()\ndef attack():\n{body}\nattack()\n{END}"


async def carry_out(session: CodeSession, attack: Attack, timeout_s: float = 20) -> Outcome:
    """Run it in a session in which `program` has run."""
    said = "".join([part.text async for part in session.run(cell(attack), timeout_s) if isinstance(part, Logs)])
    return read_outcome(said)


def read_outcome(said: str) -> Outcome:
    try:
        return Outcome(*json.loads(said))
    except ValueError:
        return Outcome([], {}, said or "nothing")


def why_not_stopped(attack: Attack, outcome: Outcome) -> str:
    """What is wrong with an outcome; empty when all was tried, and all refused as it should be."""
    if outcome.said:
        return f"it did not come to its end: {outcome.said}"
    if outcome.got:
        return f"got through: {outcome.got}"
    if not outcome.refused:
        return "nothing was tried"
    others = {what: error for what, error in outcome.refused.items() if error not in attack.errors.split()}
    return f"refused for another reason: {others}" if others else ""


MATRIX = {
    "read /etc/shadow": Attack(
        'attempt("shadow", lambda: read("/etc/shadow"))\nattempt("root", lambda: os.listdir("/root"))', "ENOENT", True
    ),
    "read a secret of the server's": Attack(
        """
        attempt("file", lambda: read(PLANTED))
        attempt("folder", lambda: os.listdir(os.path.dirname(PLANTED)))
        """,
        "ENOENT",
        outside=True,
    ),
    "read it through another process's root": Attack(
        """
        for pid in {"1", *filter(str.isdigit, os.listdir("/proc"))} - {str(os.getpid())}:
            attempt(pid, lambda: read(f"/proc/{pid}/root{PLANTED}"))
        """,
        "EACCES ENOENT",
        outside=True,
    ),
    "see other processes": Attack(
        """
        attempt("server", lambda: os.kill(SERVER, 0))
        attempt("its folder", lambda: os.listdir(f"/proc/{SERVER}"))
        if len([name for name in os.listdir("/proc") if name.isdigit()]) > 2:
            got.append("others")
        """,
        "ESRCH ENOENT EPERM",
        outside=True,
    ),
    "see files of other sessions": Attack(
        """
        attempt("mounts", lambda: read("/proc/self/mountinfo"))
        attempt("root of 1", lambda: os.listdir("/proc/1/root"))
        if others := glob.glob("/proc/[0-9]*/roo?/mnt/data/../*"):
            got.extend(path for path in others if not path.startswith(f"/proc/{os.getpid()}/"))
        """,
        "EACCES",
    ),
    "connect to the machine by TCP": Attack(
        """
        for family, address, port in LISTENING:
            attempt(address, lambda: connect(family, socket.SOCK_STREAM, (address, port)))
        """,
        "EPERM",
        outside=True,
    ),
    "send to the machine by UDP": Attack(
        """
        for family, address, port in LISTENING:
            attempt(address, lambda: connect(family, socket.SOCK_DGRAM, (address, port)))
        """,
        "EPERM",
        outside=True,
    ),
    "look up a name": Attack(
        """
        attempt("a resolver", lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 53)))
        try:
            got.append(str(socket.getaddrinfo("afterglow.invalid", 443)))
        except socket.gaierror as error:
            refused["getaddrinfo"] = "gaierror"
        """,
        "EPERM gaierror",
    ),
    "make a netlink socket": Attack(
        "for protocol in (0, 9, 12, 15, 16): attempt(protocol, lambda: socket.socket(16, 3, protocol))", "EPERM", True
    ),
    "make packet and raw sockets": Attack(
        """
        for kind in ((17, 3, 768), (17, 2, 768), (2, 3, 1), (10, 3, 58)):
            attempt(kind, lambda: socket.socket(*kind))
        """,
        "EPERM",
    ),
    "make sockets of every other family": Attack(
        """
        for family in range(2, 46):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
                attempt((family, kind), lambda: socket.socket(family, kind))
            attempt((family, "pair"), lambda: socket.socketpair(family))
        """,
        "EPERM",
    ),
    "connect to an abstract socket of the machine": Attack(
        'attempt("abstract", lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, ABSTRACT))', "ECONNREFUSED EPERM", True
    ),
    "connect to a socket file of the machine": Attack(
        """
        for path in (SOCKET, "/var/run/docker.sock", "/run/docker.sock", "/run/dbus/system_bus_socket",
                     "/run/systemd/private", "/run/containerd/containerd.sock"):
            attempt(path, lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, path))
        """,
        "ENOENT",
    ),
    "read the variables of others": Attack(
        """
        for pid in {"1", "self", str(SERVER), *filter(str.isdigit, os.listdir("/proc"))}:
            attempt(pid, lambda: read(f"/proc/{pid}/environ"))
        if SECRET in str(os.environ):
            got.append("its own")
        """,
        "EACCES ENOENT",
    ),
    "write outside its folders": Attack(
        """
        folders = ["/", "/usr", "/usr/bin", "/usr/lib", "/etc", "/opt", "/opt/packages", "/opt/afterglow/guest",
                   "/opt/cache", "/mnt", "/home", "/dev", "/proc", "/sys", "/var", "/run"]
        files = ["/etc/passwd", "/etc/ld.so.cache", sys.executable, json.__file__, "/opt/afterglow/guest/cells.py",
                 "/proc/self/oom_score_adj", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/dev/mem",
                 "/dev/zero", "/dev/urandom"]
        for folder in folders:
            attempt(folder, lambda: write(f"{folder}/attack"))
            attempt(f"{folder}/", lambda: os.mkdir(f"{folder}/attack"))
        for file in files:
            attempt(file, lambda: write(file, "ab"))
            attempt(f"truncate {file}", lambda: os.truncate(file, 0))
            attempt(f"chmod {file}", lambda: os.chmod(file, 0o777))
            attempt(f"unlink {file}", lambda: os.unlink(file))
            if not file.startswith("/proc/self"):
                attempt(f"utime {file}", lambda: os.utime(file))
        """,
        "EACCES EROFS ENOENT EPERM EXDEV EINVAL EBUSY",
    ),
    "fill the disk": Attack(
        """
        for folder in ("/mnt/data", "/tmp", "/dev/shm", "/home/sandbox"):
            def fill():
                with open(f"{folder}/fill", "wb") as file:
                    for _ in range(80):
                        file.write(bytes(1 << 20))
            attempt(folder, fill)
            os.unlink(f"{folder}/fill")
        """,
        "ENOSPC EFBIG",
    ),
    "fill it with empty files": Attack(
        """
        for folder in ("/mnt/data", "/tmp", "/dev/shm", "/home/sandbox"):
            made = []
            def fill():
                for number in range(40_000):
                    made.append(f"{folder}/n{number}")
                    os.close(os.open(made[-1], os.O_CREAT | os.O_WRONLY))
            attempt(folder, fill)
            for path in made[:-1]:
                os.unlink(path)
        """,
        "ENOSPC",
    ),
    "fill the memory with one array": Attack(
        """
        import numpy
        for what, make in (("bytes", lambda: bytearray(10 << 30)), ("array", lambda: numpy.ones(10 << 27))):
            try:
                make()
                got.append(what)
            except MemoryError:
                refused[what] = "MemoryError"
        """,
        "MemoryError",
    ),
    "fill the memory where no process shows it": Attack(
        """
        import mmap
        refuse(("memfd_create", b"a", 0), ("memfd_secret", 0), ("shmget", 0, 1 << 30, 0o1600), ("msgget", 0, 0o1600))
        attempt("shared", lambda: mmap.mmap(-1, 1 << 20))
        attempt("huge", lambda: mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000))
        """,
        "EPERM",
    ),
    "fork without end": Attack(
        """
        children = []
        def bomb():
            for _ in range(5000):
                if (pid := os.fork()) == 0:
                    time.sleep(30)
                    os._exit(0)
                children.append(pid)
        attempt("fork", bomb)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        go_on = threading.Event()
        def threads():
            for _ in range(5000):
                threading.Thread(target=go_on.wait, daemon=True).start()
        try:
            threads()
            got.append("threads")
        except RuntimeError:
            refused["threads"] = "EAGAIN"
        go_on.set()
        """,
        "EAGAIN",
    ),
    "look into other processes": Attack(
        """
        for pid in (1, os.getppid(), SERVER):
            attempt(f"attach {pid}", lambda: call("ptrace", 16, pid, 0, 0))
            attempt(f"seize {pid}", lambda: call("ptrace", 0x4206, pid, 0, 0))
            attempt(f"read {pid}", lambda: call("process_vm_readv", pid, room, 1, room, 1, 0))
            attempt(f"write {pid}", lambda: call("process_vm_writev", pid, room, 1, room, 1, 0))
            attempt(f"mem {pid}", lambda: open(f"/proc/{pid}/mem", "rb+", 0))
            attempt(f"maps {pid}", lambda: open(f"/proc/{pid}/maps"))
        """,
        "EPERM EACCES ENOENT",
    ),
    "signal the server": Attack(
        """
        if SERVER > 64:
            for number in (0, signal.SIGTERM, signal.SIGKILL):
                attempt(number, lambda: os.kill(SERVER, number))
                attempt(f"group {number}", lambda: os.kill(-SERVER, number))
        attempt("siginfo", lambda: call("rt_sigqueueinfo", SERVER, 15, room))
        attempt("pidfd", lambda: call("pidfd_open", SERVER, 0))
        """,
        "ESRCH EPERM ENOSYS",
    ),
    "tamper with the agent": Attack(
        """
        for path in ("mem", "environ", "maps", "fd/10", "root/etc/passwd", "oom_score_adj", "task/1/mem"):
            attempt(path, lambda: open(f"/proc/1/{path}", "rb+" if "mem" in path else "rb", 0))
        refuse(("prlimit64", 1, 7, room, None), ("pidfd_open", 1, 0), ("process_madvise", 1, room, 1, 4, 0),
               ("kcmp", 1, os.getpid(), 2, 0, 0), ("get_robust_list", 1, room, room), ("process_mrelease", 3, 0))
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(1, number)  # not refused by the kernel, but a first process does not take it
        time.sleep(0.1)
        os.kill(1, 0)
        """,
        "EACCES EPERM ENOSYS",
    ),
    "mount and unmount": Attack(
        """
        refuse(("mount", b"none", b"/tmp", b"tmpfs", 0, None), ("mount", b"/usr", b"/tmp", None, 4096, None),
               ("mount", None, b"/", None, 32 | 4096, None), ("mount", None, b"/", None, 1 << 18, None),
               ("open_tree", -100, b"/", 1), ("move_mount", -100, b"/tmp", -100, b"/mnt", 0), ("fsopen", b"tmpfs", 0),
               ("mount_setattr", -100, b"/", 0, room, 32), ("pivot_root", b"/tmp", b"/tmp"), ("chroot", b"/tmp"))
        for place in (b"/", b"/proc", b"/mnt/data", b"/tmp", b"/usr", b"/opt/packages"):
            attempt(place, lambda: call("umount2", place, 2))
        """,
        "EPERM",
    ),
    "become another user": Attack(
        """
        attempt("setuid", lambda: os.setuid(0))
        attempt("setresuid", lambda: os.setresuid(0, 0, 0))
        attempt("setgid", lambda: os.setgid(0))
        attempt("setgroups", lambda: os.setgroups([0]))
        refuse(("capset", struct.pack("Ii", 0x20080522, 0), b"\\xff" * 24))
        """,
        "EPERM",
    ),
    "run a setuid program": Attack(
        """
        if libc.prctl(39, 0, 0, 0, 0) != 1:
            got.append("new privileges can be had")
        programs = [path for path in glob.glob("/usr/bin/*") if os.lstat(path).st_mode & 0o4000]
        for path in [*programs, "/mnt/data", "/tmp", "/home/sandbox", "/dev/shm"]:
            if not os.statvfs(path).f_flag & os.ST_NOSUID:
                got.append(path)
        shutil.copy("/usr/bin/id", "/mnt/data/id")
        os.chmod("/mnt/data/id", 0o6755)
        attempt("chown", lambda: os.chown("/mnt/data/id", 0, 0))
        for program in ("/mnt/data/id", "/usr/bin/id"):
            if subprocess.run([program, "-u"], capture_output=True, text=True).stdout != "1000\\n":
                got.append(program)
        """,
        "EPERM EINVAL",
    ),
    "make namespaces": Attack(
        """
        for flag in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            attempt(hex(flag), lambda: call("unshare", flag))
            attempt(f"clone {flag:#x}", lambda: call("clone", flag | 17, 0, 0, 0, 0))
            attempt(f"clone3 {flag:#x}", lambda: call("clone3", struct.pack("11Q", flag, *[0] * 10), 88))
        """,
        "EPERM ENOSYS",
    ),
    "enter namespaces and open by handle": Attack(
        """
        for name in os.listdir("/proc/self/ns"):
            attempt(f"own {name}", lambda: call("setns", os.open(f"/proc/self/ns/{name}", os.O_RDONLY), 0))
            attempt(f"agent's {name}", lambda: os.open(f"/proc/1/ns/{name}", os.O_RDONLY))
        refuse(("name_to_handle_at", -100, b"/usr", room, room, 0), ("open_by_handle_at", -100, room, 0),
               ("pidfd_getfd", 3, 0, 0), ("listmount", room, room, 8, 0), ("statmount", room, room, 512, 0))
        """,
        "EPERM EACCES",
    ),
    "use the kernel's keys": Attack(
        """
        refuse(("add_key", b"user", b"a", b"b", 1, -2), ("keyctl", 0, -3, 1), ("keyctl", 1, 0),
               ("request_key", b"user", b"a", None, 0))
        """,
        "EPERM",
    ),
    "use seldom used calls": Attack(
        """
        refuse(("io_uring_setup", 8, room), ("bpf", 0, room, 72), ("perf_event_open", room, 0, -1, -1, 0),
               ("userfaultfd", 1), ("kexec_load", 0, 0, None, 0), ("finit_module", 3, b"", 0), ("fanotify_init", 0, 0),
               ("inotify_init1", 0), ("seccomp", 1, 8, room), ("landlock_create_ruleset", None, 0, 1),
               ("timer_create", 0, None, room), ("mq_open", b"a", 0o102, 0o600, None), ("semget", 0, 1, 0o1600),
               ("splice", 0, None, 1, None, 1, 0), ("tee", 0, 1, 1, 0), ("vmsplice", 1, room, 1, 0),
               ("personality", 0x40000), ("execveat", 3, b"", None, None, 0x1000),
               ("setxattr", b"/tmp", b"user.a", b"", 0, 0),
               ("cachestat", 3, room, room, 0), ("pkey_alloc", 0, 0), ("mlock", room, 4096), ("mincore", 0, 0, room),
               ("sethostname", b"a", 1), ("syslog", 3, room, 100), ("acct", None), ("swapon", b"a", 0),
               ("reboot", 1, 2, 0, 0),
               ("clock_adjtime", 0, room), ("quotactl", 0, None, 0, None), ("mbind", 0, 0, 0, 0, 0, 0))
        """,
        "EPERM ENOSYS ENOTSUP",
    ),
    "call the kernel as a 32-bit program": Attack(
        """
        import mmap
        code = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
        on_x86 = os.uname().machine == "x86_64"
        code.write(bytes.fromhex("b814000000cd80c3" if on_x86 else "c0035fd6"))  # getpid, by the other table's number
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        if (pid := os.fork()) == 0:
            os._exit(0 if ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0 else 1)
        status = os.waitpid(pid, 0)[1]
        if not on_x86 or os.waitstatus_to_exitcode(status) in (-signal.SIGSYS, -signal.SIGSEGV):
            refused["int 0x80"] = "SIGSYS"
        else:
            got.append(f"int 0x80: {status}")
        """,
        "SIGSYS",
    ),
    "raise its limits": Attack(
        """
        for kind in (resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE,
                     resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
            hard = resource.getrlimit(kind)[1]
            try:
                resource.setrlimit(kind, (hard + 1, hard + 1))
                got.append(str(kind))
            except ValueError:
                refused[str(kind)] = "EPERM"
        for limits in ((0, 0), (1, 1)):
            try:
                resource.setrlimit(resource.RLIMIT_CORE, limits)
                got.append(f"core {limits}")
            except (OSError, ValueError):
                refused[f"core {limits}"] = "EPERM"
        attempt("oom", lambda: write("/proc/self/oom_score_adj"))
        attempt("nice", lambda: os.nice(-1))
        refuse(("setpriority", 0, 0, -5), ("ioprio_set", 1, 0, 1 << 13), ("sched_setattr", 0, room, 0),
               ("sched_setscheduler", 0, 1, room), ("sched_setaffinity", 0, 8, b"\\xff" * 8))
        """,
        "EPERM EACCES",
    ),
    "have the server follow a link": Attack(
        """
        for number, target in enumerate((PLANTED, "/etc/passwd", "/proc/self/fd/3", "/proc/1/mem", "/dev/zero", "..")):
            os.symlink(target, f"/mnt/data/link-{number}")
        attempt("hard link to passwd", lambda: os.link("/etc/passwd", "/mnt/data/hard"))
        attempt("hard link to exe", lambda: os.link("/proc/self/exe", "/mnt/data/hard", follow_symlinks=True))
        attempt("device", lambda: os.mknod("/mnt/data/device", 0o20666, os.makedev(1, 5)))
        attempt("pipe", lambda: os.mkfifo("/mnt/data/pipe"))
        """,
        "EXDEV EPERM",
    ),
}

INVENTED = {
    "reach the agent through its socket's peer": Attack(
        """
        with socket.socket(fileno=os.dup(3)) as control:
            process = control.getsockopt(socket.SOL_SOCKET, 77, 4)  # SO_PEERPIDFD: a descriptor of the agent
        [process] = struct.unpack("i", process)
        refuse(("pidfd_send_signal", process, 9, None, 0), ("pidfd_getfd", process, 10, 0), ("setns", process, 0x20000),
               ("process_madvise", process, room, 1, 21, 0), ("process_mrelease", process, 0))
        import fcntl
        for number in range(1, 12):
            attempt(f"ioctl {number}", lambda: fcntl.ioctl(process, 0xFF00 | number))  # PIDFD_GET_…
        attempt("fdinfo", lambda: read(f"/proc/self/fdinfo/{process}"))
        attempt("by its descriptor", lambda: os.open(f"/proc/self/fd/{process}", os.O_RDWR))
        """,
        "EPERM ENOTTY EACCES ENXIO EINVAL",
    ),
    "climb namespaces by their descriptors": Attack(
        """
        import fcntl
        for name in os.listdir("/proc/self/ns"):
            for request in range(0xB701, 0xB70C):
                file = os.open(f"/proc/self/ns/{name}", os.O_RDONLY)
                attempt((name, hex(request)), lambda: fcntl.ioctl(file, request, bytes(64)))
                os.close(file)
        """,
        "ENOTTY",
    ),
    "have the kernel start a program": Attack(
        """
        for path in ("sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/kernel/hotplug",
                     "sys/fs/binfmt_misc/register", "sysrq-trigger", "sys/kernel/ns_last_pid",
                     "self/attr/exec", "self/uid_map", "self/setgroups"):
            attempt(path, lambda: write(f"/proc/{path}", "ab"))
        for path in ("kernel/uevent_helper", "fs/cgroup/release_agent", "fs/cgroup/cgroup.procs", "kernel/mm/ksm/run"):
            attempt(path, lambda: write(f"/sys/{path}", "ab"))
        refuse(("mount", b"cgroup", b"/tmp", b"cgroup", 0, b"memory"), ("mount", b"none", b"/tmp", b"cgroup2", 0, None),
               ("mount", b"none", b"/tmp", b"overlay", 0, b"lowerdir=/usr,upperdir=/tmp/u,workdir=/tmp/w"),
               ("mount", b"none", b"/tmp", b"binfmt_misc", 0, None), ("mount", b"proc", b"/tmp", b"proc", 0, None))
        """,
        "ENOENT EACCES EPERM",
    ),
    "leave code for those who come later": Attack(
        """
        library = os.path.dirname(os.__file__)
        for path in ("/opt/packages/a.pth", "/opt/packages/sitecustomize.py", "/opt/packages/numpy/__init__.py",
                     f"{library}/sitecustomize.py", f"{library}/__pycache__/os.pyc", "/etc/ld.so.preload",
                     "/etc/profile", "/opt/afterglow/sitecustomize.py", "/opt/afterglow/guest/json.py",
                     "/opt/cache/matplotlib/a.json",
                     "/lib64/ld-linux-x86-64.so.2", "/usr/lib/locale/C.utf8/LC_CTYPE"):
            attempt(path, lambda: write(path, "ab"))
        attempt("rename", lambda: os.rename("/opt/cache/matplotlib", "/opt/cache/other"))
        attempt("exchange", lambda: os.rename("/mnt/data", "/mnt/other"))
        attempt("rmdir", lambda: os.rmdir("/mnt/data"))
        """,
        "EACCES EROFS ENOENT EBUSY EXDEV",
    ),
    "weaken its own filter": Attack(
        """
        free = {1, 2, 3, 15, 16, 23, 38, 39, 51}
        for option in {*range(1, 84), 0x59616D61, 0x53564D41} - free:
            def prctl():
                if libc.prctl(option, 1, 0, 0, 0) < 0:
                    raise OSError(ctypes.get_errno(), "prctl")
            attempt(option, prctl)
        refuse(("seccomp", 0, 0, None), ("seccomp", 1, 8, room), ("seccomp", 3, 0, room))
        """,
        "EPERM EINVAL",
    ),
    "hide flags in the upper half of an argument": Attack(
        """
        high = 1 << 32
        numbers = {"x86_64": (41, 9, 28, 72, 56), "aarch64": (198, 222, 233, 25, 220)}[os.uname().machine]
        CALLS.update(zip(("socket", "mmap", "madvise", "fcntl", "clone"), numbers))
        refuse(("socket", high | 2, 1, 0), ("socket", high | 16, 3, 0), ("mmap", 0, 4096, 3, high | 0x21, -1, 0),
               ("madvise", 0, 0, high | 12), ("fcntl", 1, high | 8, os.getpid()),
               ("clone", high | 0x10000011, 0, 0, 0, 0), ("prlimit64", high | 1, 7, None, room),
               ("prlimit64", 0, high | 4, room, None))
        """,
        "EPERM",
    ),
    "ask files for more than files do": Attack(
        """
        import fcntl
        places = {path: os.open(path, os.O_RDONLY) for path in ("/usr", "/usr/bin/env", "/mnt/data", "/dev/random")}
        requests = [0x40086602, 0x5412, 0x541C, 0xC0045877, 0xC0185879, 0x40045204, 0xC0506613, 0x4B46, 0x5452, 0x8901]
        for path, file in places.items():
            for request in requests:  # flags, typing, freezing, trimming, entropy, keys, owners
                attempt((path, hex(request)), lambda: fcntl.ioctl(file, request, bytes(256)))
            for command in (8, 10, 15, 36, 37, 38, 1024, 1026, 1031, 1033, 1036):  # owners, leases, watches, seals
                attempt((path, command), lambda: fcntl.fcntl(file, command, 1))
        """,
        "ENOTTY EPERM",
    ),
    "use memory as few programs do": Attack(
        """
        import mmap
        pages = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (9, 12, 13, 20, 21, 25, 100, 101):  # merging, page-out, poison, off-lining
            attempt(advice, lambda: pages.madvise(advice))
        attempt("shared zeros", lambda: os.open("/dev/zero", os.O_RDWR))
        attempt("held", lambda: call("mlock", room, 4096))
        """,
        "EPERM EACCES",
    ),
    "use sockets as few programs do": Attack(
        """
        one, other = socket.socketpair()
        for option in (7, 8, 12, 26, 27, 32, 33, 36, 42, 46, 50, 51, 69, 76):  # buffers, filters, marks, polling
            attempt(option, lambda: one.setsockopt(socket.SOL_SOCKET, option, struct.pack("Q", 1)))
        attempt("level", lambda: one.setsockopt(6, 1, 1))
        attempt("out of band", lambda: one.send(b"x", socket.MSG_OOB))
        attempt("received", lambda: other.recv(1, socket.MSG_OOB))
        for family in (2, 10, 16, 40):
            attempt(family, lambda: socket.socketpair(family, socket.SOCK_STREAM))
        """,
        "EPERM",
    ),
    "make threads and processes as few programs do": Attack(
        """
        for flag in (0x1000, 0x2000, 0x8000, 0x800000, 0x80000000):  # pidfd, ptrace, parent, untraced, io
            attempt(hex(flag), lambda: call("clone", flag | 17, 0, 0, 0, 0))
        refuse(("clone3", room, 88))
        CALLS["futex"] = {"x86_64": 202, "aarch64": 98}[os.uname().machine]
        for operation in (2, 6, 7, 8, 11, 12, 13):  # descriptors, and those that inherit priorities
            attempt(f"futex {operation}", lambda: call("futex", room, operation, 1, None, None, 0))
        """,
        "EPERM ENOSYS",
    ),
    "read what the kernel tells of the host": Attack(
        """
        names = ("mountinfo", "mounts", "cgroup", "status", "limits", "maps", "smaps", "pagemap", "net/unix", "net/tcp",
                 "fdinfo/0", "stat", "sched", "wchan", "stack", "syscall", "timers", "io", "numa_maps", "cmdline")
        for name in names:
            attempt(f"self {name}", lambda: read(f"/proc/self/{name}"))
        for name in ("cmdline", "config.gz", "kallsyms", "meminfo", "cpuinfo", "iomem", "interrupts", "diskstats",
                     "modules", "sys/kernel/random/boot_id", "pressure/cpu", "loadavg", "uptime", "keys", "kcore",
                     "bus/pci/devices"):
            attempt(name, lambda: read(f"/proc/{name}"))
        for path in ("/sys/class", "/var/log", "/run", "/boot", "/etc/hostname", "/etc/resolv.conf", "/etc/fstab",
                     "/etc/machine-id", "/usr/local", "/usr/src", "/var", "/srv", "/dev/log", "/dev/kmsg", "/dev/sda"):
            attempt(path, lambda: os.listdir(path))
        if socket.gethostname() != "sandbox":
            got.append(socket.gethostname())
        """,
        "EACCES ENOENT",
    ),
    "wait for what others do with shared files": Attack(
        """
        import fcntl
        file = os.open(glob.glob("/usr/lib/os-release*")[0], os.O_RDONLY)
        refuse(("inotify_init1", 0), ("fanotify_init", 0, 0), ("cachestat", file, room, room, 0),
               ("mincore", 0, 0, room), ("preadv2", file, room, 0, 0, 0, 8))
        for mode in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            attempt(f"flock {mode}", lambda: fcntl.flock(file, mode | fcntl.LOCK_NB))
        attempt("dnotify", lambda: fcntl.fcntl(os.open("/usr/lib", os.O_RDONLY), fcntl.F_NOTIFY, 1))
        attempt("lease", lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK))
        """,
        "EPERM ENOSYS",
    ),
}
SLOW = {"fill it with empty files"}
