"""Cells after which a session does not answer any more, or not truly, and what must come of each."""

from __future__ import annotations

import asyncio
import os

from afterglow.contracts import CellEnd, CodeSession
from afterglow.sandbox.local import NativeEngine
from tests.sandbox.processes import descendants

TIMEOUT_S = 0.3
PATIENCE_S = 20.0  # none of these would ever end by itself

SPIN = "\nwhile True: pass"
FRAME = """
import json, os, socket, struct, sys, threading, time
def say(body=b"", **header):
    told = json.dumps({**header, **({"n": len(body)} if body else {})}).encode()
    os.write(3, struct.pack("!I", len(told)) + told + body)
def cell():
    frame = sys._getframe()
    while "_agent" not in dir(frame.f_locals.get("self")):
        frame = frame.f_back
    return frame.f_locals["self"]._agent._cell
"""

WEDGES = {
    "close everything": f"import os\nos.closerange(3, 64){SPIN}",
    "half a frame": f"import os\nos.write(3, b'\\0\\0\\0\\x20{{'){SPIN}",
    "a length that is none": f"import os\nos.write(3, b'\\xff' * 4){SPIN}",
    "a frame that is no JSON": f"import os\nos.write(3, b'\\0\\0\\0\\x04nope'){SPIN}",
    "a body of a terabyte": f"{FRAME}\nsay(t='picture', id=cell(), n=1 << 40){SPIN}",
    "a body of less than nothing": f"{FRAME}\nsay(t='picture', id=cell(), n=-5){SPIN}",
    "JSON without a floor": f"import os, struct\nos.write(3, struct.pack('!I', 60000) + b'[' * 60000){SPIN}",
    "a header without a type": f"{FRAME}\nsay(id=cell()){SPIN}",
    "leave a child in its place": f"import os\nif os.fork(): os._exit(0){SPIN}",
    "become another program": "import os\nos.execv('/bin/sh', ['sh', '-c', 'while :; do :; done'])",
    "stop itself": f"import os, signal\nos.kill(os.getpid(), signal.SIGSTOP){SPIN}",
    "stop everything": f"""
import os, signal
if os.fork(): os.kill(-1, signal.SIGSTOP)
os.kill(os.getpid(), signal.SIGSTOP){SPIN}
""",
    "ignore interrupts": f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN){SPIN}",
    "block all signals": f"import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)){SPIN}",
    "catch what ends it": """
import time
while True:
    try:
        while True: time.sleep(0.01)
    except BaseException: pass
""",
    "compute where no signal is looked at": "sum(range(10 ** 15))",
    "wait for what never comes": """
import signal, socket
signal.signal(signal.SIGINT, signal.SIG_IGN)
one, other = socket.socketpair()
one.recv(1)
""",
    "spin in many threads": f"""
import signal, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)
def spin():
    while True: pass
for _ in range(8): threading.Thread(target=spin, daemon=True).start(){SPIN}
""",
    "hide behind children": f"""
import os, signal
for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP): signal.signal(number, signal.SIG_IGN)
for _ in range(12):
    if os.fork() == 0:
        os.setsid()
        break{SPIN}
""",
    "wake the agent without end": "import os, signal\nwhile True: os.kill(1, signal.SIGCHLD)",
    "fork faster than can be looked": """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    try:
        if os.fork(): os._exit(0)
    except OSError: pass
""",
    "take the agent's interrupt away": f"""
import sys
sys.modules["guest.cells"].Interrupts._come = sys.modules["guest.cells"].Interrupts._strike = lambda *_: None
import signal
signal.signal(signal.SIGINT, lambda *_: None){SPIN}
""",
    "use up every descriptor": f"""
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    while True: os.dup(0)
except OSError: pass
{SPIN}
""",
}

# How those end that crash, by what the caller is told.
CRASHES = {
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)": "killed",
    "import os, signal\nif os.fork(): os.kill(-1, signal.SIGKILL)\nos.kill(os.getpid(), signal.SIGKILL)": "killed",
    "import ctypes\nctypes.string_at(0)": "SIGSEGV",
    "import os\nos.abort()": "SIGABRT",
    "import os\nos._exit(3)": "exit code 3",
    "import ctypes\nctypes.CDLL(None).syscall(0x40000027)": "system call",
}


async def end_of(session: CodeSession, code: str, timeout_s: float) -> CellEnd:
    """How a cell ended; TimeoutError when it did not."""
    ends = []
    async with asyncio.timeout(PATIENCE_S):
        async for part in session.run(code, timeout_s):
            if isinstance(part, CellEnd):
                ends.append(part)
    [end] = ends
    return end


async def why_not_ended(engine: NativeEngine, code: str) -> str:
    """What is wrong with the end of a wedge: empty when it was ended in time, and left no process. The engine makes no
    sessions ahead, and has no other."""
    before = descendants(os.getpid())
    session = await engine.open()
    try:
        end = await end_of(session, code, TIMEOUT_S)
    except TimeoutError:
        return "it was not ended"
    finally:
        await session.close()
    left = descendants(os.getpid()) - before
    if end.status not in ("lost", "timeout"):
        return f"it ended as {end}"
    return f"left after close: {left}" if left else ""
