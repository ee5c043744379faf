"""The filters of system calls, run in a small simulator of the kernel's, for both kinds of processor."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from afterglow.sandbox.guest import syscalls
from afterglow.sandbox.guest.syscalls import AGENT, ALLOW, ANSWER, KILL, MACHINES, WORKER, Machine, Rules, Step

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
NOT_ON_AARCH64 = """
    access alarm arch_prctl chmod chown creat dup2 epoll_create epoll_wait fork futimesat getdents getpgrp lchown link
    lstat mkdir open pause pipe poll readlink rename rmdir select stat symlink time unlink utime utimes vfork
"""
NOTHING, REFUSED, UNKNOWN = ANSWER, ANSWER | errno.EPERM, ANSWER | errno.ENOSYS
UNSUPPORTED = ANSWER | errno.EOPNOTSUPP
HIGH = 0xDEAD_BEEF << 32  # what may stand in the half of a register that the kernel does not look at

everywhere = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
both = pytest.mark.parametrize("rules", [AGENT, WORKER], ids=["agent", "worker"])


ROLES = {"agent": AGENT, "worker": WORKER}
PROGRAMS = {
    (machine.audit, role): syscalls.program(machine, ROLES[role]) for machine in MACHINES.values() for role in ROLES
}


def program(machine: Machine, rules: Rules) -> list[Step]:
    return PROGRAMS[machine.audit, "agent" if rules is AGENT else "worker"]


def run(steps: Sequence[Step], machine: int, number: int, arguments: Sequence[int] = ()) -> int:
    """What a filter answers to a call: the kernel's classic BPF, as far as filters use it."""
    padded = [argument & (1 << 64) - 1 for argument in [*arguments, *[0] * 6][:6]]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, machine, 0, *padded)
    at = accumulator = 0
    while True:
        code, then, otherwise, value = steps[at]
        at += 1
        if code == syscalls.RETURN:
            return value
        if code == syscalls.LOAD:
            assert value % 4 == 0
            [accumulator] = struct.unpack_from("<I", data, value)
        elif code == syscalls.AND:
            accumulator &= value
        elif code == syscalls.JUMP_EQUAL:
            at += then if accumulator == value else otherwise
        elif code == syscalls.JUMP_AT_LEAST:
            at += then if accumulator >= value else otherwise
        else:
            assert code == syscalls.JUMP_ANY_BIT
            at += then if accumulator & value else otherwise


def answer(machine: Machine, rules: Rules, name: str, *arguments: int) -> int:
    return run(program(machine, rules), machine.audit, machine.numbers[name], arguments)


# --- the tables ------------------------------------------------------------------------------------------------


def from_headers(machine: str) -> dict[str, int]:
    text = HEADERS[machine].read_text()
    found = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", text)}
    if "fstatat" in found:
        found["newfstatat"] = found["fstatat"]  # as the kernel names it where there is but one
    return found


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_those_of_the_kernel_headers(machine: str) -> None:
    """Every number that this machine's headers know is the same in our table."""
    if not HEADERS[machine].exists():
        pytest.skip("the kernel's headers are not installed")
    real = from_headers(machine)
    ours = MACHINES[machine].numbers
    assert len(ours.keys() & real.keys()) > 150
    assert {name: number for name, number in ours.items() if real.get(name, number) != number} == {}


def test_both_machines_have_the_same_calls() -> None:
    """What one table lacks is only what the processor never had: the calls that newer ones replaced."""
    x86_64, aarch64 = syscalls.X86_64.keys(), syscalls.AARCH64.keys()
    assert x86_64 - aarch64 == set(NOT_ON_AARCH64.split())
    assert aarch64 - x86_64 == set()


@everywhere
def test_numbers_are_used_once(machine: Machine) -> None:
    """No two names have one number, and none is in the range of x32."""
    assert len(set(machine.numbers.values())) == len(machine.numbers)
    assert max(machine.numbers.values()) < 470


@both
def test_every_name_has_a_number(rules: Rules) -> None:
    """A name with a slip of the pen would be left out of the filter without a word."""
    named = rules.free | rules.ruled.keys() | rules.unknown | syscalls.PRETENDED | syscalls.UNSUPPORTED
    assert named <= syscalls.X86_64.keys()


@both
def test_every_name_is_in_one_list(rules: Rules) -> None:
    """The lists do not overlap: what comes first in the filter would hide the rest."""
    lists = [rules.free, rules.ruled.keys(), rules.unknown, syscalls.PRETENDED, syscalls.UNSUPPORTED]
    assert sum(len(names) for names in lists) == len(set().union(*lists))


# --- the programs ----------------------------------------------------------------------------------------------


@everywhere
@both
def test_programs_are_what_the_kernel_takes(machine: Machine, rules: Rules) -> None:
    """Fewer steps than the kernel's limit, jumps forward and within, and the last one returns."""
    steps = program(machine, rules)
    assert len(steps) < 1024  # the kernel's limit is 4096, and the sum of both filters counts
    for at, step in enumerate(steps):
        assert 0 <= step.then <= 255
        assert 0 <= step.otherwise <= 255
        if step.code in (syscalls.JUMP_EQUAL, syscalls.JUMP_AT_LEAST, syscalls.JUMP_ANY_BIT):
            assert at + 1 + max(step.then, step.otherwise) < len(steps)
    assert steps[-1].code == syscalls.RETURN
    assert len(steps[0].packed()) == syscalls.STEP_BYTES


@everywhere
@both
def test_foreign_calls_kill(machine: Machine, rules: Rules) -> None:
    """Calls of 32 bit, of another processor, and x32's end the process, whatever their number."""
    steps = program(machine, rules)
    for other in (0x40000003, 0x40000028, *(each.audit for each in MACHINES.values() if each is not machine)):
        assert {run(steps, other, number) for number in range(500)} == {KILL}
    for number in (0x40000000, 0x40000000 + 39, 0xFFFFFFFF):
        assert run(steps, machine.audit, number) == KILL


@everywhere
@both
def test_every_number_is_answered_as_its_list_says(machine: Machine, rules: Rules) -> None:
    """Free calls pass with any arguments; all that is not named is refused, up to numbers that do not exist yet."""
    steps = program(machine, rules)
    names = {number: name for name, number in machine.numbers.items()}
    for number in range(1000):
        told = {run(steps, machine.audit, number, [value] * 6) for value in (0, -1, 1 << 31)}
        name = names.get(number)
        if name in rules.free:
            assert told == {ALLOW}, name
        elif name in rules.unknown:
            assert told == {UNKNOWN}, name
        elif name in syscalls.PRETENDED:
            assert told == {NOTHING}, name
        elif name in syscalls.UNSUPPORTED:
            assert told == {UNSUPPORTED}, name
        elif name not in rules.ruled:
            assert told == {REFUSED}, name or number


@everywhere
def test_what_must_not_be_named_is_refused(machine: Machine) -> None:
    """By number, so that a slip in our own tables could not hide it."""
    steps = program(machine, AGENT)
    column = list(MACHINES.values()).index(machine)
    for name, numbers in FORBIDDEN.items():
        assert run(steps, machine.audit, numbers[column]) in (REFUSED, UNKNOWN, UNSUPPORTED), name


FORBIDDEN = {
    # name: (x86-64, aarch64)
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "open_by_handle_at": (304, 265),
    "io_uring_enter": (426, 426),
    "io_setup": (206, 0),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262),
    "flock": (73, 32),
    "mincore": (27, 232),
    "splice": (275, 76),
    "tee": (276, 77),
    "vmsplice": (278, 75),
    "execveat": (322, 281),
    "setpriority": (141, 140),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "get_robust_list": (274, 100),
    "personality": (135, 92),
    "mknodat": (259, 33),
    "setxattr": (188, 5),
    "setuid": (105, 146),
    "setgroups": (116, 159),
    "capset": (126, 91),
    "landlock_restrict_self": (446, 446),
    "timer_create": (222, 107),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "acct": (163, 89),
    "swapon": (167, 224),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "statmount": (457, 457),
    "cachestat": (451, 451),
    "rt_sigqueueinfo": (129, 138),
}


# --- the rules -------------------------------------------------------------------------------------------------

F_NOTIFY, F_SETLEASE, F_SETOWN, F_SETSIG, F_ADD_SEALS, F_SETPIPE_SZ = 1026, 1024, 8, 10, 1033, 1031
NAMESPACES = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
THREAD = 0x3D0F00  # VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID CHILD_CLEARTID

ALLOWED = {
    "mmap": [(0, 4096, 3, 0x22), (0, 4096, 7, 0x22), (0, 4096, 1, 0x1), (0, 4096, 3, 0x3), (0, 4096, 3, 0x2)],
    "madvise": [(0, 0, 4), (0, 0, 14), (0, 0, 8), (0, 0, 102)],
    "clone": [(17,), (0x1200011,), (THREAD,), (0x4111,), (0x11 | HIGH,)],
    "futex": [(0, 0), (0, 128), (0, 129), (0, 9 | 128 | 256), (0, 128 | 10)],
    "socket": [(1, 1), (1, 2 | 0x80000), (1 | HIGH, 5)],
    "socketpair": [(1, 1)],
    "sendto": [(3, 0, 0, 0), (3, 0, 0, 0x4000), (3, 0, 0, 0x40)],
    "recvmsg": [(3, 0, 0), (3, 0, 0x40000000), (3, 0, 2)],
    "setsockopt": [(3, 1, 2), (3, 1, 20), (3, 1, 16)],
    "fcntl": [(3, command) for command in (0, 1, 2, 3, 4, 5, 1030)],
    "ioctl": [(3, request) for request in (0x5401, 0x5413, 0x5421, 0x5451, 0x40049409, 0x5451 | HIGH)],
    "prctl": [(15,), (38,), (1,), (3,)],
    "prlimit64": [(0, 7), (0, 8), (HIGH, 9), (0, 4, 0, 0x1000), (0, 7, 0x1000)],
    "setrlimit": [(7,), (9,)],
    "renameat2": [(0, 0, 0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 2)],
    "arch_prctl": [(0x1002,), (0x1023,)],
}
DENIED = {
    "mmap": [(0, 4096, 3, 0x21), (0, 4096, 3, 0x23), (0, 4096, 3, 0x21 | 0x4000), (0, 1 << 21, 3, 0x40022)],
    "madvise": [(0, 0, advice) for advice in (9, 12, 20, 21, 25, 100, 101)],
    "clone": [(17 | flag,) for flag in (*NAMESPACES, 0x1000, 0x2000, 0x8000, 0x800000, 0x80000000)],
    "futex": [(0, operation | 128) for operation in (2, 6, 7, 8, 11, 12, 13)],
    "socket": [(family, kind) for family in (0, 2, 10, 16, 17, 29, 38, 40, 44) for kind in (1, 2, 3)],
    "socketpair": [(2, 1), (10, 1), (16, 3), (40, 1)],
    "sendto": [(3, 0, 0, 1), (3, 0, 0, 0x4001)],
    "recvfrom": [(3, 0, 0, 1)],
    "sendmsg": [(3, 0, 1)],
    "recvmsg": [(3, 0, 1)],
    "setsockopt": [(3, 1, 26), (3, 1, 50), (3, 1, 7), (3, 1, 8), (3, 0, 2), (3, 6, 2), (3, 263, 1)],
    "fcntl": [
        (3, command) for command in (F_NOTIFY, F_SETLEASE, F_SETOWN, F_SETSIG, F_ADD_SEALS, F_SETPIPE_SZ, 15, 37)
    ],
    "prctl": [(8, 1), (22, 2), (24, 0), (29,), (35,), (47, 2), (53,), (59,), (62,), (67,), (0x53564D41,)],
    "prlimit64": [(1, 7), (0, 4, 0x1000), (0, 4, 1 << 40), (0, 16, 0x1000), (-1, 7), (4242, 4)],
    "setrlimit": [(4,)],
    "renameat2": [(0, 0, 0, 0, 4), (0, 0, 0, 0, 5)],
    "arch_prctl": [(0x1012,), (0x4002,), (0x5001,), (0x2003,)],
}


@everywhere
@both
def test_honest_arguments_pass(machine: Machine, rules: Rules) -> None:
    """What threads, forks, files, locks and sockets of honest programs use is allowed, by agent and worker alike."""
    for name, calls in ALLOWED.items():
        for arguments in calls if name in machine.numbers else ():
            assert answer(machine, rules, name, *arguments) == ALLOW, (name, arguments)


@everywhere
@both
def test_other_arguments_are_refused(machine: Machine, rules: Rules) -> None:
    """Memory that nothing shows, namespaces, other families, locks of leases, limits of others, the core limit."""
    for name, calls in DENIED.items():
        for arguments in calls if name in machine.numbers else ():
            assert answer(machine, rules, name, *arguments) == REFUSED, (name, arguments)


@everywhere
@both
def test_every_rule_is_tried_here(machine: Machine, rules: Rules) -> None:
    """A call with rules is in both tables above, so that no rule goes untested."""
    assert rules.ruled.keys() - {"seccomp"} <= (ALLOWED.keys() | DENIED.keys() | {"ioctl"})


@everywhere
def test_a_refused_ioctl_is_answered_as_no_such_ioctl(machine: Machine) -> None:
    """TIOCSTI, TIOCLINUX, FIOASYNC and all others; programs that try one go on after ENOTTY."""
    for request in (0x5412, 0x541C, 0x5452, 0x8902, 0x6611, 0xAF00, 0x5423):
        assert answer(machine, WORKER, "ioctl", 3, request) == ANSWER | errno.ENOTTY


@everywhere
@both
def test_locks_are_pretended(machine: Machine, rules: Rules) -> None:
    """Whoever sets a lock is told that it is set; a lock would be memory without bound, and be seen by others."""
    for command in (6, 7, 6 | HIGH):
        assert answer(machine, rules, "fcntl", 3, command) == NOTHING


@everywhere
def test_only_the_agent_may_hide_and_add_filters(machine: Machine) -> None:
    """What the agent has beyond the worker, and no more; a filter that reports to a listener neither may set."""
    for option in (syscalls.PR_SET_DUMPABLE, syscalls.PR_SET_CHILD_SUBREAPER):
        assert (answer(machine, AGENT, "prctl", option), answer(machine, WORKER, "prctl", option)) == (ALLOW, REFUSED)
    assert answer(machine, AGENT, "seccomp", 1, 0) == ALLOW
    assert answer(machine, WORKER, "seccomp", 1, 0) == REFUSED
    for operation, flags in ((0, 0), (1, 8), (1, 1), (1, 4), (2, 0), (3, 0)):
        assert answer(machine, AGENT, "seccomp", operation, flags) == REFUSED


def test_a_worker_may_nothing_that_the_agent_may_not() -> None:
    """Both filters are asked, so the second can only take away; that the lists say so as well keeps them readable."""
    assert WORKER.free == AGENT.free
    assert WORKER.ruled.keys() < AGENT.ruled.keys()
