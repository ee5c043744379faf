"""A cell behaves as in a notebook. These run the worker alone, with the test in the place of its agent."""

from __future__ import annotations

import ast
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import afterglow.sandbox
from afterglow.sandbox.guest import cells
from afterglow.sandbox.guest.frames import Frames, pack, parse_header

START = """
import random, sys, types
random.seed(1)
sys.modules["numpy.random"] = types.ModuleType("numpy.random")
sys.modules["numpy.random"].seed = lambda: setattr(sys, "seeded", True)
sys.path.insert(0, sys.argv[1])
from guest import cells
cells.main(int(sys.argv[2]), int(sys.argv[3]))
"""


class Ran(NamedTuple):
    """text: what was printed. told: the text of its exceptions. pictures: their first bytes."""

    text: str
    told: str
    pictures: list[bytes]
    status: str


class Notebook:
    """A worker in a child process."""

    def __init__(self, folder: Path) -> None:
        self._agent, control = socket.socketpair()
        self._text, text = os.pipe()
        os.set_blocking(self._text, False)
        guest = str(Path(afterglow.sandbox.__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", START, guest, str(control.fileno()), str(text)],
            pass_fds=[control.fileno(), text],
            stdin=subprocess.DEVNULL,
            stdout=text,
            stderr=text,
            cwd=folder,
        )
        control.close()
        os.close(text)
        self._frames = Frames(parse_header)
        self._number = 0
        self._interrupted = False

    def begin(self, code: str) -> None:
        self._number += 1
        self._interrupted = False
        self._agent.sendall(pack({"t": "exec", "id": self._number}, code.encode()))

    def end(self) -> Ran:
        text, told, picture, pictures = b"", b"", b"", []
        while True:
            ready, _, _ = select.select([self._agent, self._text], [], [], 0.5)
            if not ready and self._interrupted:
                self.interrupt()  # as the agent does: one that comes just before a system call is not seen
            text += self.read_text()
            if self._agent not in ready:
                continue
            for header, body in self._frames.feed(self._agent.recv(65_536)):
                assert header["id"] == self._number
                text += self.read_text()
                if header["t"] == "done":
                    return Ran(text.decode(), told.decode(), pictures, header["status"])
                if header["t"] == "error":
                    told += body
                else:
                    picture += body
                    if header["last"]:
                        pictures.append(picture[:8])
                        picture = b""
                self._agent.sendall(pack({"t": "taken"}))

    def read_text(self) -> bytes:
        try:
            return os.read(self._text, 1 << 20)
        except BlockingIOError:
            return b""

    def run(self, code: str) -> Ran:
        self.begin(code)
        return self.end()

    def interrupt(self) -> None:
        self._interrupted = True
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self._agent.close()
        self.process.kill()
        self.process.wait()
        os.close(self._text)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """One worker for all tests of this file, as its users' cells share one."""
    started = Notebook(tmp_path_factory.mktemp("data"))
    yield started
    started.close()


def ok(text: str) -> Ran:
    return Ran(text, "", [], "ok")


# --- results


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 + 1", "2\n"),
        ("x = 1", ""),
        ("None", ""),
        ("1 + 1;", ""),
        ("'text'", "'text'\n"),
        ("for i in range(2): i", ""),
        ("print('a')\n'b'  # a comment\n", "a\n'b'\n"),
        ("", ""),
        ("\n\n# only a comment", ""),
        ("display(1, 'a')", "1\n'a'\n"),
    ],
)
def test_the_last_value_is_shown(notebook: Notebook, code: str, text: str) -> None:
    """The value of a last expression is shown by its repr, unless it is None or ends in a semicolon."""
    assert notebook.run(code) == ok(text)


def test_the_last_value_is_kept(notebook: Notebook) -> None:
    """`_` is what was shown last."""
    notebook.run("6 * 7")
    assert notebook.run("_ + 1") == ok("43\n")


def test_cells_are_the_main_module(notebook: Notebook) -> None:
    """What is defined can be pickled, and found in `__main__`."""
    notebook.run("import pickle, __main__\nclass Point: pass\nx = 5")
    assert notebook.run("__name__, type(pickle.loads(pickle.dumps(Point()))) is Point, __main__.x").text == (
        "('__main__', True, 5)\n"
    )


def test_cells_inherit_no_future(notebook: Notebook) -> None:
    """A cell is compiled without the `__future__` imports of the program that runs it."""
    assert notebook.run("def f(x: int): pass\nf.__annotations__['x']") == ok("<class 'int'>\n")


def test_await_at_the_top(notebook: Notebook) -> None:
    """A cell may await, in its middle and at its end, and the event loop lives on."""
    notebook.run("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x\nlock = asyncio.Lock()")
    assert notebook.run("a = await f(1)\nasync with lock: print(a)\nawait f(2)") == ok("1\n2\n")
    assert notebook.run("asyncio.run(f(3))") == ok("3\n")
    assert "ValueError" in notebook.run("async def g(): raise ValueError\nawait g()").told


def test_a_long_repr_is_cut(notebook: Notebook) -> None:
    """The middle of what is too long is left out, and how much is said."""
    ran = notebook.run("list(range(100_000))")
    assert ran.text.startswith("[0, 1,")
    assert ran.text.endswith("99998, 99999]\n")
    assert "characters left out]" in ran.text


def test_pictures(notebook: Notebook) -> None:
    """What has `_repr_png_` or `_repr_jpeg_` is a picture; what only says so is not."""
    notebook.run(
        "class P:\n    def __init__(self, data): self.data = data\n    def __repr__(self): return 'P'\n"
        "    def _repr_png_(self): return self.data\n"
        "class J:\n    def _repr_jpeg_(self): return b'\\xff\\xd8\\xff'"
    )
    ran = notebook.run("display(P(b'\\x89PNG\\r\\n\\x1a\\n' + bytes(600_000)), J(), P(None), P(b'<svg>'), P)")
    assert ran.pictures == [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]
    assert ran.text == "P\nP\n<class '__main__.P'>\n"


def test_chance_is_the_worker_s_own(notebook: Notebook) -> None:
    """What was drawn from before the fork, here with a known seed, and numpy's global state begin anew."""
    ran = notebook.run("import random, sys\nrandom.random(), sys.seeded")
    assert ran.text != f"({random.Random(1).random()}, True)\n"
    assert ran.text.endswith(", True)\n")


def test_ipython_display_has_a_stand_in(notebook: Notebook) -> None:
    """The habit of importing display, Image and Markdown from IPython does no harm where there is no IPython."""
    ran = notebook.run(
        "from IPython.display import display, Image, Markdown\n"
        "display(Markdown('# hi'))\nopen('a.png', 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n')\nImage(filename='a.png')"
    )
    assert ran == Ran("# hi\n", "", [b"\x89PNG\r\n\x1a\n"], "ok")


# --- errors


def test_a_traceback_shows_the_lines_of_cells(notebook: Notebook) -> None:
    """A traceback names cells and their lines, also those of earlier cells, and no file of ours."""
    notebook.run("def broken():\n    raise ValueError('no')")
    told = notebook.run("try:\n    broken()\nexcept ValueError as error:\n    raise KeyError('x') from error").told
    assert told.count("<cell ") == 3
    assert "    raise ValueError('no')\n" in told
    assert "The above exception was the direct cause" in told
    assert "cells.py" not in told


def test_a_syntax_error_shows_the_place(notebook: Notebook) -> None:
    """A cell that is no Python shows where, without a traceback."""
    ran = notebook.run("x = 1\nfoo bar")
    assert ran.told.splitlines()[0].endswith("line 2")
    assert "    foo bar\n        ^" in ran.told
    assert "Traceback" not in ran.told
    assert ran.status == "error"


@pytest.mark.parametrize(
    ("code", "told", "status"),
    [
        ("exit()", "", "ok"),
        ("import sys; sys.exit(0)", "", "ok"),
        ("quit(3)", "SystemExit: 3\n", "error"),
        ("import sys; sys.exit('why')", "SystemExit: why\n", "error"),
        ("raise SystemExit", "", "ok"),
    ],
)
def test_exit_ends_the_cell(notebook: Notebook, code: str, told: str, status: str) -> None:
    """exit() ends the cell, not the session."""
    assert notebook.run(f"x = 1\n{code}\nx = 2") == Ran("", told, [], status)
    assert notebook.run("x").text == "1\n"


def test_input_says_that_nobody_is_there(notebook: Notebook) -> None:
    """input() raises what can be understood."""
    told = notebook.run("input('Name? ')").told
    assert "nobody is there to answer" in told
    assert told.count("File ") == 1


@pytest.mark.parametrize(
    "code",
    [
        "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
        "class E(BaseException): pass\nraise E",
        "class R:\n    def __repr__(self): raise ValueError\nR()",
        "raise ExceptionGroup('several', [ValueError('a'), KeyError('b')])",
        "def f(): f()\nf()",
        "raise KeyboardInterrupt",
        "a = ValueError('a'); b = KeyError('b'); a.__context__ = b; b.__context__ = a; raise a",
        "raise ValueError('x' * 100_000)",
        "x = " + "(" * 5000 + ")" * 5000,
        "'\\0'; \0",
    ],
)
def test_whatever_is_raised_is_told(notebook: Notebook, code: str) -> None:
    """No exception is too odd to be shown, within bounds, and the next cell runs."""
    ran = notebook.run(code)
    assert ran.status == "error"
    assert 0 < len(ran.told) < 20_000
    assert notebook.run("1") == ok("1\n")


def test_what_cells_do_to_their_output_is_mended(notebook: Notebook) -> None:
    """A cell that closes or replaces stdout, or its file, takes it from no other."""
    notebook.run("import logging, sys\nlogging.basicConfig(stream=sys.stderr)")
    for code in ("import io; sys.stdout = io.StringIO()", "sys.stdout.close()", "import os; os.close(1); os.close(2)"):
        notebook.run(code)
        assert notebook.run("print('here')") == ok("here\n")
    assert notebook.run("logging.warning('still')") == ok("WARNING:root:still\n")


# --- interrupts


def interrupted(notebook: Notebook, code: str) -> Ran:
    notebook.begin(f"print('begun', flush=True)\n{code}")
    while b"begun" not in notebook.read_text():
        os.sched_yield()
    notebook.interrupt()
    return notebook.end()


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "while True: print(end='')",
        "import asyncio; await asyncio.sleep(100)",
        "class R:\n    def __repr__(self):\n        while True: pass\nR()",
        "class P:\n    def _repr_png_(self): return b'\\x89PNG\\r\\n\\x1a\\n'\nwhile True: display(P())",
        "import subprocess; subprocess.run(['sleep', '100'])",
        "!sleep 100",
    ],
)
def test_an_interrupt_ends_the_cell(notebook: Notebook, code: str) -> None:
    """Whatever a cell is at, an interrupt ends it, and its variables stay."""
    notebook.run("x = 1")
    ran = interrupted(notebook, code)
    assert ran.status == "interrupted"
    assert "KeyboardInterrupt" in ran.told
    assert notebook.run("x") == ok("1\n")


def test_an_interrupt_between_cells_is_nothing(notebook: Notebook) -> None:
    """One that comes too late touches neither the worker nor the next cell."""
    notebook.run("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); x = 1")
    notebook.run("x = 2")
    notebook.interrupt()
    assert notebook.run("x") == ok("2\n")


def test_awaiting_can_go_on_after_an_interrupt(notebook: Notebook) -> None:
    """The task of an interrupted cell is not taken up by the next one."""
    notebook.run("import asyncio\nasync def late():\n    await asyncio.sleep(0.1)\n    print('late')")
    code = "await late()"
    assert interrupted(notebook, code).status == "interrupted"
    assert notebook.run("await asyncio.sleep(0.15)") == ok("")


# --- children and threads


def test_a_forked_child_speaks_for_no_one(notebook: Notebook) -> None:
    """A child that comes to the end of the cell, or shows a picture, leaves the parent's answer alone."""
    code = (
        "import os, sys\npid = os.fork()\n"
        "class P:\n    def _repr_png_(self): return b'\\x89PNG\\r\\n\\x1a\\n'\n"
        "if pid: os.waitpid(pid, 0)\nelse: display(P())\n'end'"
    )
    ran = notebook.run(code)
    assert (ran.status, ran.pictures) == ("ok", [])
    assert notebook.run("1") == ok("1\n")


def test_processes_of_multiprocessing(notebook: Notebook) -> None:
    """A pool of processes knows what cells have defined."""
    code = "import multiprocessing\ndef square(x): return x * x\n"
    code += "with multiprocessing.Pool(2) as pool: print(pool.map(square, [1, 2, 3]))"
    assert notebook.run(code) == ok("[1, 4, 9]\n")


def test_a_thread_shows_nothing_between_cells(notebook: Notebook) -> None:
    """A picture that a thread shows after its cell has ended goes nowhere, and disturbs nothing."""
    notebook.run(
        "import threading\nclass P:\n    def _repr_png_(self): return b'\\x89PNG\\r\\n\\x1a\\n'\n"
        "go = threading.Event()\nthread = threading.Thread(target=lambda: (go.wait(), display(P())))\n"
        "thread.start()\nthreading.Timer(0.05, go.set).start()"
    )
    time.sleep(0.1)
    assert notebook.run("thread.join()").status == "ok"


# --- what is no Python


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("!echo hi", "hi\n"),
        ("print(1)\n!echo it\\'s | tr a-z A-Z\nprint(2)", "1\nIT'S\n2\n"),
        ("if True:\n    !echo inside", "inside\n"),
        ("%matplotlib inline\n1", "1\n"),
        ("%time 1 + 1", "2\n"),
        ("%pip install x", cells.NO_NETWORK + "\n"),
        ("!pip install x", cells.NO_NETWORK + "\n"),
        ("!python3 -m pip install x", cells.NO_NETWORK + "\n"),
        ("%nonsense at all", "%nonsense is not known here.\n"),
        ("%%bash\necho a\necho b", "a\nb\n"),
        ("%%time\n3", "3\n"),
        ("%%writefile x.txt\nhello", "Writing x.txt\n"),
        ("!cat x.txt", "hello\n"),
        ("'''\n!echo a\n%time\n'''.count('!')", "1\n"),
        ("10\\\n%4", "2\n"),
        ("(10\n%4)", "2\n"),
        ("a = 'x'\n!echo \"$HOME\" > /dev/null\nprint('''\n!b''')", "\n!b\n"),
    ],
)
def test_commands_and_magics(notebook: Notebook, code: str, text: str) -> None:
    """Lines with `!` and `%` do what they do in a notebook, as far as it means something here; Python is left alone."""
    assert notebook.run(code) == ok(text)


def test_only_the_line_that_fails_is_changed() -> None:
    """A line within a text stays as it is, although another line of the cell is a command."""
    tree = cells.parse("text = '''\n!in the text\n'''\n!outside", "<cell 1>")
    assert isinstance(tree.body[0], ast.Assign)
    assert ast.unparse(tree) == "text = '\\n!in the text\\n'\n__shell__('outside')"


def test_cut() -> None:
    """Only the middle goes."""
    assert cells.cut("abc", 3) == "abc"
    assert cells.cut("a" * 75 + "x" * 900 + "b" * 25, 100) == "a" * 75 + "\n[900 characters left out]\n" + "b" * 25
