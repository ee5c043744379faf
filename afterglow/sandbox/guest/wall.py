"""The kernel's layers, by ctypes: namespaces, mounts, limits, capabilities, Landlock, seccomp.

Their order for a session is `enter_session`, here; that of the jail around all sessions is in `launch.py`; which system
calls are left is in `syscalls.py`. What the kernel refuses is raised as OSError, and says what it was.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from . import syscalls

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8  # of mount_setattr
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
LAST_DESCRIPTOR = 0x7FFFFFFF

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 1, 4, 24, 28
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4
SECUREBITS_ALL_LOCKED = 0xEF  # root is nobody special, setuid gives and keeps nothing; and so it stays

INNER_UID = 1000  # what a session sees itself as
WORK, HOME = "/mnt/data", "/home/sandbox"
READ = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/opt", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
WRITE = (WORK, "/tmp", "/dev/shm", HOME, "/dev/null")  # noqa: S108 - mounts of the session's own
# Of /proc only the names: what its files say of this process, it knows; they also tell the host's paths and cgroups.
LIST = ("/",)

MB = 1 << 20
HOME_BYTES = 16 * MB
INODES = 32_768  # of /mnt/data; each is kernel memory that no size counts
OPEN_FILES = 128
ADDRESSES_BYTES = 4 << 30  # more than memory: threads and allocators reserve far more than they use
NICE = 10


class Limits(NamedTuple):
    """What one session may use.

    memory_bytes: what one process may write to above what it is born with (the sum of all is a cgroup's or the guard's
    business); disk_bytes: /mnt/data; processes: with threads; tmp_bytes: /tmp, and as much again for /dev/shm.
    """

    memory_bytes: int
    disk_bytes: int
    processes: int
    tmp_bytes: int = 64 * MB


# --- a session -------------------------------------------------------------------------------------------------


def fork_as_init(own_pid_namespace: int) -> int:
    """Fork a child that is pid 1 of a pid namespace of its own; answers as os.fork does.

    own_pid_namespace: a descriptor of the caller's (`/proc/self/ns/pid`), to which it goes back, also when the fork
    fails. The caller has one thread. Raises OSError: there is no room for another. Where there is no way back it ends
    the caller: all that it forked later would be in a session's namespace.
    """
    for worker in (False, True):
        _filter(worker)  # so that this is done once, for all sessions
    unshare(NEWPID)
    child = -1
    try:
        child = os.fork()
    finally:
        if child != 0 and _libc().setns(own_pid_namespace, NEWPID) != 0:
            os._exit(1)
    return child


def keep_only(*descriptors: int) -> None:
    """Point descriptors 0, 1 and 2 at /dev/null and close all others but these, which are above 2."""
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for standard in range(3):
        os.dup2(nothing, standard)
    first = 3
    for descriptor in sorted(descriptors):
        os.closerange(first, descriptor)
        first = descriptor + 1
    close_from(first)


def close_from(first: int) -> None:
    """Close this descriptor and all above it. Not os.closerange: where libc is old, that tries a million of them."""
    _check(_call("close_range", first, LAST_DESCRIPTOR, 0), "close_range")


def enter_session(uid: int, limits: Limits) -> None:
    """Build the wall around the calling process, for good: everything between its fork and the agent.

    The caller is pid 1 of its pid namespace (`fork_as_init`), has one thread, and is root in the outer jail.
    uid: the session's user in the outer jail: from 1, and no other living session's; 0 where the jail has but one user.
    On return it is uid 1000 in /mnt/data, not dumpable, with the rules of `syscalls.AGENT`.
    Raises OSError: the wall is half built, and the caller must end.
    """
    os.setsid()  # first of all: a signal to its process group would reach the server, past the pid namespace
    unshare(NEWNS | NEWNET | NEWIPC | NEWUTS)
    _check(_libc().sethostname(b"sandbox", 7), "sethostname")
    _mount_session(uid, limits)  # while it still may: the mounts will belong to a user namespace above its own
    os.chdir(WORK)
    _become(uid)
    own_user_namespace(INNER_UID)
    _limit_resources(limits)  # after it: the kernel counts processes by user namespace, and only then this one's alone
    drop_privileges()
    restrict_files(READ, WRITE, LIST)
    set_dumpable(False)  # before the agent has anything that the worker must not read
    restrict_calls()


def _mount_session(uid: int, limits: Limits) -> None:
    """Everything it may write to, of a fixed size and its own; and a /proc that shows its own processes only."""
    apart = MS_NOSUID | MS_NODEV
    owned = f"uid={uid},gid={uid}"
    mount("proc", "/proc", "proc", apart | MS_NOEXEC, "subset=pid")
    mount("data", WORK, "tmpfs", apart, f"size={limits.disk_bytes},nr_inodes={INODES},mode=755,{owned}")
    mount("tmp", "/tmp", "tmpfs", apart, f"size={limits.tmp_bytes},nr_inodes=8192,mode=1777,{owned}")  # noqa: S108
    mount("shm", "/dev/shm", "tmpfs", apart | MS_NOEXEC, f"size={limits.tmp_bytes},nr_inodes=1024,mode=1777,{owned}")  # noqa: S108
    mount("home", HOME, "tmpfs", apart, f"size={HOME_BYTES},nr_inodes=4096,mode=755,{owned}")


def _become(uid: int) -> None:
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    set_dumpable(True)  # else the files in /proc by which it maps itself would be root's


def _limit_resources(limits: Limits) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/statm", "rb") as file:
        sizes = [int(pages) * page for pages in file.read().split()]
    for kind, value in (
        (resource.RLIMIT_CORE, 1),  # of all values this one alone keeps the host's core handler from being started
        (resource.RLIMIT_AS, sizes[0] + limits.memory_bytes + ADDRESSES_BYTES),
        (resource.RLIMIT_DATA, sizes[5] + limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.disk_bytes),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NICE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_RTPRIO, 0),
        (resource.RLIMIT_SIGPENDING, 256),
    ):
        lower_limit(kind, value)
    os.nice(NICE)
    write("/proc/self/oom_score_adj", "1000")
    # Where the scheduler groups by session, nice counts inside a group alone, and the group has a nice of its own.
    with suppress(OSError):
        write("/proc/self/autogroup", str(NICE))


def lower_limit(kind: int, value: int) -> None:
    """Set a limit, or leave it where the host has set a lower one."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


# --- namespaces and users --------------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    """Move the caller into new namespaces."""
    _check(_libc().unshare(flags), "unshare")


def own_user_namespace(inner_uid: int, others: int = 0) -> None:
    """Move the caller into a new user namespace, where it is `inner_uid`, the only user, with all capabilities there.

    others: more namespaces to make with it; they belong to it.
    """
    uid, gid = os.geteuid(), os.getegid()
    unshare(NEWUSER | others)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{inner_uid} {uid} 1")
    write("/proc/self/gid_map", f"{inner_uid} {gid} 1")


def drop_privileges() -> None:
    """Give up all capabilities, and every way to come by new ones."""
    prctl(PR_SET_SECUREBITS, SECUREBITS_ALL_LOCKED)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    with suppress(OSError):  # the kernel's last capability is the one before the first that it does not know
        for capability in range(64):
            prctl(PR_CAPBSET_DROP, capability)
    version_3 = struct.pack("Ii", 0x20080522, 0)
    _check(_libc().capset(version_3, bytes(24)), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def set_dumpable(dumpable: bool) -> None:
    """Whether others of the same user may look into this process; an exec sets it to True. Not for the worker."""
    prctl(PR_SET_DUMPABLE, int(dumpable))


# --- mounts ----------------------------------------------------------------------------------------------------


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    texts = [text.encode() if text else None for text in (source, target, kind)]
    _check(_libc().mount(*texts, ctypes.c_ulong(flags), options.encode()), f"mount of {kind or source} at {target}")


def bind(source: str, target: str) -> None:
    """Show a file or folder, and what is mounted below it, at a second place, which exists."""
    mount(source, target, None, MS_BIND | MS_REC)


def set_mount(path: str, attributes: int, below: bool = False) -> None:
    """Add attributes to a mount. below: to those below it, too."""
    change = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if below else 0
    _check(_call("mount_setattr", AT_FDCWD, path.encode(), flags, change, len(change)), f"mount_setattr of {path}")


def make_read_only(path: str) -> None:
    """For the fork server, when it has filled a folder."""
    set_mount(path, ATTR_RDONLY)


def pivot(root: str) -> None:
    """Make the mount at `root` the root of everything, and let go of what was."""
    os.chdir(root)
    _check(_call("pivot_root", b".", b"."), "pivot_root")
    _check(_libc().umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


# --- Landlock --------------------------------------------------------------------------------------------------

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
MAKE_CHAR, MAKE_FIFO, MAKE_BLOCK = 1 << 6, 1 << 10, 1 << 11
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
LANDLOCK_VERSION, PATH_BENEATH, LOG_OFF = 1, 1, 1


class Landlock(NamedTuple):
    """What one version of Landlock can refuse. files, tcp, scopes: bits; flags: for the last call."""

    files: int
    tcp: int
    scopes: int
    flags: int

    def ruleset(self) -> bytes:
        """The struct, no longer than that version knows it."""
        known = [self.files, self.tcp, self.scopes]
        while known[-1] == 0:
            known.pop()
        return struct.pack(f"{len(known)}Q", *known)


def landlock_abi() -> int:
    """The version of Landlock that the kernel has; 0 when it has none, or has it switched off."""
    return max(_call("landlock_create_ruleset", None, 0, LANDLOCK_VERSION), 0)


def landlock(abi: int) -> Landlock:
    """All that a version can refuse. It is refused unless a rule allows it: so TCP and signals to outside, always."""
    files = 0x1FFF
    for since, bits in ((2, 1 << 13), (3, TRUNCATE), (5, IOCTL_DEV)):
        files |= bits if abi >= since else 0
    return Landlock(files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0, LOG_OFF if abi >= 7 else 0)


def restrict_files(read: Iterable[str], write: Iterable[str], names: Iterable[str]) -> None:
    """Landlock: from here on only these files and folders, and what is below them.

    read: may be read and run. write: may be changed and run as well, but no devices and pipes can be made there.
    names: only what is there can be listed. Paths that do not exist are passed over. Needs no_new_privs.
    """
    known = landlock(landlock_abi())
    struct_ = known.ruleset()
    rules = _check(_call("landlock_create_ruleset", struct_, len(struct_), 0), "landlock_create_ruleset")
    changing = known.files & ~(MAKE_CHAR | MAKE_FIFO | MAKE_BLOCK | IOCTL_DEV)
    for paths, rights in ((read, EXECUTE | READ_FILE | READ_DIR), (write, changing), (names, READ_DIR)):
        for path in paths:
            with suppress(FileNotFoundError):
                _allow(rules, path, rights)
    _check(_call("landlock_restrict_self", rules, known.flags), "landlock_restrict_self")
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= ON_FILES & ~EXECUTE
        rule = struct.pack("=Qi", rights, place)
        _check(_call("landlock_add_rule", rules, PATH_BENEATH, rule, 0), f"landlock_add_rule for {path}")
    finally:
        os.close(place)


# --- seccomp ---------------------------------------------------------------------------------------------------


def restrict_calls(*, worker: bool = False) -> None:
    """seccomp: from here on only the calls of `syscalls.AGENT`.

    `enter_session` has done it for the agent. The worker calls it once more with worker=True, before any user code, and
    is left with `syscalls.WORKER`.
    """
    code = ctypes.create_string_buffer(_filter(worker))
    program = struct.pack("@HP", len(code) // syscalls.STEP_BYTES, ctypes.addressof(code))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _check(_call("seccomp", syscalls.SECCOMP_SET_MODE_FILTER, 0, program), "seccomp")


@cache
def _filter(worker: bool) -> bytes:
    rules = syscalls.WORKER if worker else syscalls.AGENT
    steps = syscalls.program(syscalls.MACHINES[os.uname().machine], rules)
    return b"".join(step.packed() for step in steps)


# --- the kernel ------------------------------------------------------------------------------------------------


def prctl(option: int, *arguments: int) -> int:
    """prctl(2)."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    return _check(_libc().prctl(option, *map(ctypes.c_ulong, padded)), f"prctl {option}")


SECCOMP_GET_ACTION_AVAIL = 2


def check_kernel() -> str | None:
    """Why this kernel cannot hold the wall, in words; None when it can, as far as can be told without trying."""
    machine = os.uname().machine
    if machine not in syscalls.MACHINES or struct.calcsize("P") != 8:
        return f"The wall is written for x86-64 and 64-bit ARM, and this Python runs on {machine}."
    if landlock_abi() < 1:
        return _no_landlock(ctypes.get_errno())
    if not os.path.exists("/proc/self/ns/user"):
        return "This kernel has no user namespaces, or /proc is not mounted."
    kill = struct.pack("I", syscalls.KILL)
    if _call("seccomp", SECCOMP_GET_ACTION_AVAIL, 0, kill) != 0:
        return "This kernel has no seccomp filters, or does not let them be used here."
    return None


def _no_landlock(error: int) -> str:
    if error == errno.EOPNOTSUPP:
        return "Landlock is built into this kernel, but not switched on: `landlock` is missing in its lsm= parameter."
    if error == errno.ENOSYS:
        return f"This kernel ({os.uname().release}) has no Landlock: 5.13 or newer is needed, built with it."
    return f"Landlock cannot be used here: {os.strerror(error)}."


def write(path: str, text: str) -> None:
    """Write a file of /proc, in one call, as the kernel wants it."""
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"writing {path}: {error.strerror}") from None
    finally:
        os.close(file)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _call(name: str, *arguments: int | bytes | None) -> int:
    """A system call by its name, for those that libc has no function for. Negative: see ctypes.get_errno."""
    number = syscalls.MACHINES[os.uname().machine].numbers[name]
    words = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return int(_libc().syscall(ctypes.c_long(number), *words))


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result
