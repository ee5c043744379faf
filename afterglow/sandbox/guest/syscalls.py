"""Which system calls a session may make, and the program by which the kernel knows (seccomp, classic BPF).

Whatever is not named here is refused with EPERM: a call that a later kernel adds, too. There are two sets of rules:
AGENT's are set before the agent starts, WORKER's on top of them before any user code, and a call must pass both.
A rule looks at the low 32 bits of an argument: all that are ruled on are ints to the kernel, or flags in those bits;
only of a pointer all 64 count. What it points to cannot be looked at; that is what Landlock and the namespaces are for.

Left out on purpose, though honest programs know them (they get on without): inotify (its quota is the host user's, and
it would watch files that others read), flock (a lock on a file shared with the host), mincore (tells which pages others
have read), memfd_create and System V memory (no file system bounds them), mknod (no pipes or devices among the
outputs), setxattr (memory without bound), setpriority, sched_set*, timer_create, splice, tee, execveat,
get_robust_list, and everything that reads, stops or names by descriptor another process, mounts, or makes a namespace.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# --- the calls -------------------------------------------------------------------------------------------------

# fmt: off
# What we call ourselves before the rules are set (mounts, Landlock, …) has its number here as well.
X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
    "mremap": 25, "msync": 26, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36,
    "alarm": 37, "setitimer": 38, "getpid": 39, "sendfile": 40, "socket": 41, "connect": 42, "accept": 43, "sendto": 44,
    "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "bind": 49, "listen": 50, "getsockname": 51,
    "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55, "clone": 56, "fork": 57, "vfork": 58,
    "execve": 59, "exit": 60, "wait4": 61, "kill": 62, "uname": 63, "fcntl": 72, "fsync": 74, "fdatasync": 75,
    "truncate": 76, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83,
    "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90, "fchmod": 91,
    "chown": 92, "fchown": 93, "lchown": 94, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
    "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "setpgid": 109,
    "getppid": 110, "getpgrp": 111, "setsid": 112, "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121,
    "getsid": 124, "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "utime": 132,
    "statfs": 137, "fstatfs": 138, "sched_getparam": 143, "sched_getscheduler": 145, "sched_get_priority_max": 146,
    "sched_get_priority_min": 147, "pivot_root": 155, "prctl": 157, "arch_prctl": 158, "setrlimit": 160, "sync": 162,
    "gettid": 186, "readahead": 187, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "getxattr": 191,
    "lgetxattr": 192, "fgetxattr": 193, "listxattr": 194, "llistxattr": 195, "flistxattr": 196, "tkill": 200,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "epoll_create": 213, "getdents64": 217, "set_tid_address": 218,
    "restart_syscall": 219, "fadvise64": 221, "timer_create": 222, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234, "utimes": 235,
    "waitid": 247, "openat": 257, "mkdirat": 258, "fchownat": 260, "futimesat": 261, "newfstatat": 262, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "sync_file_range": 277, "utimensat": 280, "epoll_pwait": 281,
    "fallocate": 285, "accept4": 288, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295,
    "pwritev": 296, "prlimit64": 302, "syncfs": 306, "getcpu": 309, "renameat2": 316, "seccomp": 317, "getrandom": 318,
    "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332, "rseq": 334, "io_uring_setup": 425,
    "pidfd_open": 434, "clone3": 435, "close_range": 436, "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441,
    "mount_setattr": 442, "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446,
    "futex_waitv": 449, "fchmodat2": 452,
}
AARCH64 = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "getxattr": 8, "lgetxattr": 9, "fgetxattr": 10, "listxattr": 11,
    "llistxattr": 12, "flistxattr": 13, "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21,
    "epoll_pwait": 22, "dup": 23, "dup3": 24, "fcntl": 25, "ioctl": 29, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36,
    "linkat": 37, "renameat": 38, "pivot_root": 41, "statfs": 43, "fstatfs": 44, "truncate": 45, "ftruncate": 46,
    "fallocate": 47, "faccessat": 48, "chdir": 49, "fchdir": 50, "fchmod": 52, "fchmodat": 53, "fchownat": 54,
    "fchown": 55, "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64,
    "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "preadv": 69, "pwritev": 70, "sendfile": 71,
    "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "sync": 81, "fsync": 82,
    "fdatasync": 83, "sync_file_range": 84, "utimensat": 88, "exit": 93, "exit_group": 94, "waitid": 95,
    "set_tid_address": 96, "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103,
    "timer_create": 107, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getscheduler": 120,
    "sched_getparam": 121, "sched_getaffinity": 123, "sched_yield": 124, "sched_get_priority_max": 125,
    "sched_get_priority_min": 126, "restart_syscall": 128, "kill": 129, "tkill": 130, "tgkill": 131, "sigaltstack": 132,
    "rt_sigsuspend": 133, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigpending": 136, "rt_sigtimedwait": 137,
    "rt_sigreturn": 139, "getresuid": 148, "getresgid": 150, "times": 153, "setpgid": 154, "getpgid": 155,
    "getsid": 156, "setsid": 157, "getgroups": 158, "uname": 160, "getrlimit": 163, "setrlimit": 164, "getrusage": 165,
    "umask": 166, "prctl": 167, "getcpu": 168, "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174,
    "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "socket": 198, "socketpair": 199,
    "bind": 200, "listen": 201, "accept": 202, "connect": 203, "getsockname": 204, "getpeername": 205, "sendto": 206,
    "recvfrom": 207, "setsockopt": 208, "getsockopt": 209, "shutdown": 210, "sendmsg": 211, "recvmsg": 212,
    "readahead": 213, "brk": 214, "munmap": 215, "mremap": 216, "clone": 220, "execve": 221, "mmap": 222,
    "fadvise64": 223, "mprotect": 226, "msync": 227, "madvise": 233, "accept4": 242, "wait4": 260, "prlimit64": 261,
    "syncfs": 267, "renameat2": 276, "seccomp": 277, "getrandom": 278, "copy_file_range": 285, "preadv2": 286,
    "pwritev2": 287, "statx": 291, "rseq": 293, "io_uring_setup": 425, "pidfd_open": 434, "clone3": 435,
    "close_range": 436, "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441, "mount_setattr": 442,
    "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446, "futex_waitv": 449,
    "fchmodat2": 452,
}
# fmt: on


class Machine(NamedTuple):
    """What seccomp and the kernel call a kind of processor. numbers: of all calls named in this file that it has."""

    audit: int
    numbers: Mapping[str, int]


X32 = 0x40000000  # calls from here on are those of x86-64's other, forgotten interface
MACHINES = {"x86_64": Machine(0xC000003E, X86_64), "aarch64": Machine(0xC00000B7, AARCH64)}

# --- what is allowed -------------------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FREE = _names(
    # files: what may be reached is Landlock's and the mounts' business
    "open openat creat close close_range read write readv writev pread64 pwrite64 preadv pwritev lseek sendfile"
    " copy_file_range truncate ftruncate fallocate stat fstat lstat newfstatat statx statfs fstatfs access"
    " faccessat faccessat2 getdents getdents64 getcwd chdir fchdir rename renameat mkdir mkdirat rmdir"
    " link linkat unlink unlinkat symlink symlinkat readlink readlinkat chmod fchmod fchmodat fchmodat2 chown"
    " fchown lchown fchownat umask utime utimes futimesat utimensat getxattr lgetxattr fgetxattr listxattr"
    " llistxattr flistxattr dup dup2 dup3"
    # waiting, pipes, sockets (of which kinds: below)
    " pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2"
    " eventfd2 connect accept accept4 shutdown bind listen getsockname getpeername getsockopt"
    # memory
    " brk mprotect munmap mremap"
    # processes and threads
    " fork vfork execve exit exit_group wait4 waitid kill tkill tgkill getpid getppid gettid setpgid getpgid getpgrp"
    " setsid getsid getuid geteuid getgid getegid getresuid getresgid getgroups set_tid_address set_robust_list rseq"
    " restart_syscall sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max"
    " sched_get_priority_min getcpu getrlimit getrusage times sysinfo uname getrandom"
    # signals and time
    " rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause nanosleep"
    " clock_nanosleep clock_gettime clock_getres gettimeofday time getitimer setitimer alarm"
)

# Answered as done, and not done. All that a session can write is memory: there is nothing to flush. Really done, fsync
# on a shared file makes the host's disk flush its cache, and fadvise throws such files out of memory, for all.
PRETENDED = _names("fsync fdatasync msync sync syncfs sync_file_range fadvise64 readahead")

# Answered as a kernel would that does not have them, so that libraries take the older way: a clone3's flags are out of
# seccomp's sight, and so are what an openat2 or the rings of io_uring are to do.
UNKNOWN = _names("clone3 io_uring_setup openat2 preadv2 pwritev2 futex_waitv pidfd_open timer_create")

# Answered as a file system that does not have such attributes: cp and mv then keep quiet.
UNSUPPORTED = _names("setxattr lsetxattr fsetxattr")


class OneOf(NamedTuple):
    """The argument, less the bits in `beside`, is one of these values."""

    argument: int
    values: tuple[int, ...]
    beside: int = 0


class Without(NamedTuple):
    """None of these bits is set."""

    argument: int
    bits: int


class NotAll(NamedTuple):
    """Not all of these bits are set together."""

    argument: int
    bits: int


class Pretended(NamedTuple):
    """With one of these values the call is answered as done, and not done; with others this says nothing."""

    argument: int
    values: tuple[int, ...]


class UnlessNull(NamedTuple):
    """The rule holds, or this pointer is NULL."""

    pointer: int
    rule: OneOf


Rule = OneOf | Without | NotAll | Pretended | UnlessNull

AF_UNIX = 1
MSG_OOB = 0x1  # on unix sockets: young code, seldom used, and once a way into the kernel
MAP_SHARED, MAP_ANONYMOUS, MAP_HUGETLB = 0x1, 0x20, 0x40000
FUTEX_PRIVATE, FUTEX_CLOCK_REALTIME = 128, 256
RLIMIT_CORE, RLIM_NLIMITS = 4, 16
CAN_BE_SET = tuple(limit for limit in range(RLIM_NLIMITS) if limit != RLIMIT_CORE)
# Everything but what threads, fork and vfork are made of: all namespaces, CLONE_PIDFD, PTRACE, PARENT, UNTRACED, IO.
CLONE_REFUSED = 0xFE82B080
SOL_SOCKET = 1
RENAME_WHITEOUT = 4

SHARED_RULES: dict[str, tuple[Rule, ...]] = {
    # No memory that stays when no process shows it (files in the tmpfs can be shared), none of the host's huge pages.
    "mmap": (NotAll(3, MAP_SHARED | MAP_ANONYMOUS), Without(3, MAP_HUGETLB)),
    # NORMAL RANDOM SEQUENTIAL WILLNEED DONTNEED FREE DONTFORK DOFORK HUGEPAGE NOHUGEPAGE DONTDUMP DODUMP WIPEONFORK
    # KEEPONFORK POPULATE_READ POPULATE_WRITE GUARD_INSTALL GUARD_REMOVE; no page-out, no merging with others' pages.
    "madvise": (OneOf(2, (0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 18, 19, 22, 23, 102, 103)),),
    "clone": (Without(0, CLONE_REFUSED),),
    # WAIT WAKE REQUEUE CMP_REQUEUE WAKE_OP WAIT_BITSET WAKE_BITSET; none that inherit priorities.
    "futex": (OneOf(1, (0, 1, 3, 4, 5, 9, 10), beside=FUTEX_PRIVATE | FUTEX_CLOCK_REALTIME),),
    "socket": (OneOf(0, (AF_UNIX,)),),
    "socketpair": (OneOf(0, (AF_UNIX,)),),
    "sendto": (Without(3, MSG_OOB),),
    "recvfrom": (Without(3, MSG_OOB),),
    "sendmsg": (Without(2, MSG_OOB),),
    "recvmsg": (Without(2, MSG_OOB),),
    # REUSEADDR BROADCAST KEEPALIVE LINGER REUSEPORT PASSCRED RCVTIMEO SNDTIMEO (both forms); no filters or big buffers.
    "setsockopt": (OneOf(1, (SOL_SOCKET,)), OneOf(2, (2, 6, 9, 13, 15, 16, 20, 21, 66, 67))),
    # DUPFD GETFD SETFD GETFL SETFL GETLK, DUPFD_CLOEXEC GETPIPE_SZ; no F_NOTIFY, owners, leases, seals. SETLK, SETLKW
    # are pretended: SQLite wants them, but a lock is kernel memory that nothing bounds, and one on a file that all can
    # read is seen by other sessions and the host.
    "fcntl": (Pretended(1, (6, 7)), OneOf(1, (0, 1, 2, 3, 4, 5, 1030, 1032))),
    # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX, TCGETS2, FICLONE (which a tmpfs politely declines).
    "ioctl": (OneOf(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A, 0x40049409)),),
    "renameat2": (Without(4, RENAME_WHITEOUT),),  # it would leave a device behind
    # Only the caller's own. RLIMIT_CORE can be read, never set: 1 keeps the host's core handler from being started, 0
    # would not.
    "prlimit64": (OneOf(0, (0,)), UnlessNull(2, OneOf(1, CAN_BE_SET))),
    "setrlimit": (OneOf(0, CAN_BE_SET),),
    # SET_GS SET_FS GET_FS GET_GS; GET_XCOMP_SUPP GET_XCOMP_PERM REQ_XCOMP_PERM.
    "arch_prctl": (OneOf(0, (0x1001, 0x1002, 0x1003, 0x1004, 0x1021, 0x1022, 0x1023)),),
}
# SET_PDEATHSIG GET_PDEATHSIG GET_DUMPABLE SET_NAME GET_NAME CAPBSET_READ SET_NO_NEW_PRIVS GET_NO_NEW_PRIVS SVE_GET_VL
PRCTL_FREE = (1, 2, 3, 15, 16, 23, 38, 39, 51)
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
SECCOMP_SET_MODE_FILTER = 1


class Rules(NamedTuple):
    """free: allowed whatever the arguments; ruled: allowed when all rules hold; unknown: answered with ENOSYS."""

    free: frozenset[str]
    ruled: Mapping[str, tuple[Rule, ...]]
    unknown: frozenset[str]


WORKER = Rules(FREE, {**SHARED_RULES, "prctl": (OneOf(0, PRCTL_FREE),)}, UNKNOWN)
# The agent hides its memory from the worker, adopts what the worker leaves behind, and sets the worker's rules.
AGENT = Rules(
    FREE,
    {
        **SHARED_RULES,
        "prctl": (OneOf(0, (*PRCTL_FREE, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER)),),
        "seccomp": (OneOf(0, (SECCOMP_SET_MODE_FILTER,)), OneOf(1, (0,))),
    },
    UNKNOWN,
)

# --- the program -----------------------------------------------------------------------------------------------

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, KILL, ANSWER = 0x7FFF0000, 0x80000000, 0x00050000  # ANSWER: with the errno in the low bits
NUMBER_AT, AUDIT_AT, ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data; both machines are little-endian


class Step(NamedTuple):
    """One instruction. then, otherwise: how many to skip when a comparison holds, or does not."""

    code: int
    then: int
    otherwise: int
    value: int

    def packed(self) -> bytes:
        return struct.pack("=HBBI", *self)


STEP_BYTES = 8


def program(machine: Machine, rules: Rules) -> list[Step]:
    """The filter for one kind of processor. Foreign calls (32 bit, x32) kill the process."""
    steps = [_load(AUDIT_AT), Step(JUMP_EQUAL, 1, 0, machine.audit), _return(KILL)]
    steps += [_load(NUMBER_AT), Step(JUMP_AT_LEAST, 0, 1, X32), _return(KILL)]
    for name in sorted(rules.ruled):
        steps += _when(machine, name, _checked(rules.ruled[name], _refusal(name)))
    for names, answer in (
        (rules.free, ALLOW),
        (PRETENDED, ANSWER),
        (UNSUPPORTED, ANSWER | errno.EOPNOTSUPP),
        (rules.unknown, ANSWER | errno.ENOSYS),
    ):
        for name in sorted(names):
            steps += _when(machine, name, [_return(answer)])
    return [*steps, _return(ANSWER | errno.EPERM)]


def _load(offset: int) -> Step:
    return Step(LOAD, 0, 0, offset)


def _return(answer: int) -> Step:
    return Step(RETURN, 0, 0, answer)


def _refusal(name: str) -> int:
    """ENOTTY is what programs expect of an ioctl that a file does not know, and all of them go on after it."""
    return ANSWER | (errno.ENOTTY if name == "ioctl" else errno.EPERM)


def _when(machine: Machine, name: str, then: list[Step]) -> list[Step]:
    """Nothing for a call that this machine does not have: open, fork and others like them on aarch64."""
    if name not in machine.numbers:
        return []
    return [Step(JUMP_EQUAL, 0, len(then), machine.numbers[name]), *then]


def _checked(rules: Iterable[Rule], refusal: int) -> list[Step]:
    return [step for rule in rules for step in _check(rule, refusal)] + [_return(ALLOW)]


def _check(rule: Rule, refusal: int) -> list[Step]:
    """Falls through when the rule holds."""
    if isinstance(rule, UnlessNull):
        low, then = ARGUMENTS_AT + 8 * rule.pointer, _check(rule.rule, refusal)
        high = [_load(low + 4), Step(JUMP_EQUAL, len(then), 0, 0)]
        return [_load(low), Step(JUMP_EQUAL, 0, len(high), 0), *high, *then]
    steps = [_load(ARGUMENTS_AT + 8 * rule.argument)]
    if isinstance(rule, Pretended):
        left = len(rule.values)
        steps += [Step(JUMP_EQUAL, left - at, 0, value) for at, value in enumerate(rule.values, 1)]
        steps[-1] = steps[-1]._replace(otherwise=1)
        return [*steps, _return(ANSWER)]
    if isinstance(rule, OneOf):
        if rule.beside:
            steps.append(Step(AND, 0, 0, ~rule.beside & 0xFFFFFFFF))
        left = len(rule.values)
        steps += [Step(JUMP_EQUAL, left - at, 0, value) for at, value in enumerate(rule.values)]
    elif isinstance(rule, Without):
        steps.append(Step(JUMP_ANY_BIT, 0, 1, rule.bits))
    else:
        steps += [Step(AND, 0, 0, rule.bits), Step(JUMP_EQUAL, 0, 1, rule.bits)]
    return [*steps, _return(refusal)]
