"""The worker of a session: runs cells as a notebook does, and keeps their variables.

What a cell prints goes to one pipe, stdout and stderr alike, so that their order is kept. Pictures, the text of an
error and the end of a cell go to the agent as frames; each but the last waits until it was taken, so that nothing
printed later can overtake it. The agent believes none of it (`agent.py`).
"""

from __future__ import annotations

import ast
import builtins
import codecs
import contextlib
import gc
import importlib.util
import inspect
import io
import linecache
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any, NoReturn

from .frames import IMAGE_BYTES, Frames, is_image, pack, parse_header

if TYPE_CHECKING:
    import asyncio

RESULT_CHARS = 65_536
ERROR_CHARS = 16_384
CHUNK_BYTES = 262_144
NO_NETWORK = "There is no network here, so nothing can be installed. Use the packages that are there."

_HERE = os.path.dirname(__file__)
_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_INSTALLS = re.compile(r"(python[\d.]*\s+-m\s+)?(pip[\d.]*|conda|mamba|uv\s+pip)\s+(install|download)\b")


class Interrupts:
    """SIGINT ends the cell that runs, once, and touches nothing else. Inside `with` it waits for the end of that."""

    def __init__(self) -> None:
        self.armed = False
        self.struck = False  # this cell was ended by it
        self._shielded = False
        self._held = False

    def arm(self) -> None:
        """A cell begins. Its predecessor may have set a handler of its own."""
        self.struck = self._held = False
        signal.signal(signal.SIGINT, self._come)
        self.armed = True

    def _come(self, _number: int, _frame: object) -> None:
        if self.armed and self._shielded:
            self._held = True
        elif self.armed:
            self._strike()

    def _strike(self) -> None:
        self.armed, self.struck = False, True
        raise KeyboardInterrupt

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._shielded = True

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._shielded = False
            if self._held and self.armed:
                self._strike()


class Agent:
    """The agent as the worker sees it: gives cells, takes frames."""

    def __init__(self, control: int, interrupts: Interrupts) -> None:
        self._socket = socket.socket(fileno=control)
        self._interrupts = interrupts
        self._frames = Frames(parse_header)
        self._received: deque[tuple[dict[str, Any], bytes]] = deque()
        self._lock = threading.Lock()
        self._cell: int | None = None
        self._pid = os.getpid()

    def next_cell(self) -> str:
        """Wait for a cell and return its code."""
        header, code = self._receive()
        self._cell = header["id"]
        return code.decode()

    def show(self, kind: str, data: bytes, **fields: Any) -> None:
        """Give a picture or an error's text, in pieces. Between cells, and in a forked child, nobody would take it."""
        with self._interrupts, self._lock:
            for start in range(0, len(data), CHUNK_BYTES):
                if self._cell is None or os.getpid() != self._pid:
                    return
                piece = data[start : start + CHUNK_BYTES]
                last = start + CHUNK_BYTES >= len(data)
                self._socket.sendall(pack({"t": kind, "id": self._cell, "last": last, **fields}, piece))
                self._receive()

    def end_cell(self, status: str) -> None:
        with self._lock:
            cell, self._cell = self._cell, None
            self._socket.sendall(pack({"t": "done", "id": cell, "status": status}))

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        while not self._received:
            data = self._socket.recv(65_536)
            if not data:
                os._exit(0)
            self._received.extend(self._frames.feed(data))
        return self._received.popleft()


class Cells:
    """Cells that share one namespace, which is that of the module `__main__`."""

    def __init__(self, control: int, text: int) -> None:
        codecs.register_error("shown", _mark)
        self._interrupts = Interrupts()
        self._agent = Agent(control, self._interrupts)
        self._text = text
        self._streams = [_text_stream(1), _text_stream(2)]
        self._pid = os.getpid()
        self._number = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self._names = module.__dict__
        self._names["__builtins__"] = builtins
        sys.displayhook = self._show_result
        vars(builtins).update(
            display=self.display, input=_no_input, exit=_exit, quit=_exit, __shell__=_shell, __magic__=_magic
        )

    def serve(self) -> NoReturn:
        """Run cells until the agent is gone."""
        while True:
            code = self._agent.next_cell()
            self._number += 1
            self._restore_streams()
            self._agent.end_cell(self._run(code))

    def _restore_streams(self) -> None:
        """A cell may have closed or replaced what is printed to. Handlers of `logging` hold on to these objects."""
        for number, stream in enumerate(self._streams):
            os.dup2(self._text, number + 1)
            if not _is_open(stream):
                self._streams[number] = _text_stream(number + 1)
        sys.stdout, sys.stderr = self._streams

    def _run(self, code: str) -> str:
        """Run one cell to its end, whatever it does, and return `ok`, `error` or `interrupted`."""
        try:
            self._interrupts.arm()
            status = self._attempt(lambda: self._execute(code))
            if not self._interrupts.struck:
                status = self._attempt(self._show_figures, status)
            self._close_figures()
            self._flush()
            self._interrupts.armed = False
        except KeyboardInterrupt:  # it came while an error was told
            status = "interrupted"
            self._agent.show("error", b"KeyboardInterrupt\n")
        if os.getpid() != self._pid:
            os._exit(status != "ok")  # a child that the cell forked, and that came back here
        return status

    def _attempt(self, step: Callable[[], None], status: str = "ok") -> str:
        try:
            step()
        except SystemExit as stop:
            return self._stopped(stop)
        except BaseException as error:  # noqa: BLE001  one of the three doors: whatever a cell raises is told
            self._tell(error)
            return "interrupted" if self._interrupts.struck else "error"
        return status

    def _execute(self, code: str) -> None:
        name = f"<cell {self._number}>"
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        tree = parse(code, name)
        result = tree.body[-1:] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
        if result and not code.rstrip().endswith(";"):
            del tree.body[-1]
        else:
            result = []
        self._execute_tree(tree, name, "exec")
        self._execute_tree(ast.Interactive(result), name, "single")

    def _execute_tree(self, tree: ast.Module | ast.Interactive, name: str, mode: str) -> None:
        if not tree.body:
            return
        # Not inherited: else the cell would be compiled with the __future__ imports of this file.
        compiled = compile(tree, name, mode, _AWAIT, dont_inherit=True)
        value = eval(compiled, self._names)  # noqa: S307  running it is what we are here for
        if compiled.co_flags & inspect.CO_COROUTINE:
            self._wait_for(value)

    def _wait_for(self, coroutine: Any) -> None:
        import asyncio  # only few cells await, and it takes a while

        self._loop = self._loop or asyncio.new_event_loop()
        task = self._loop.create_task(coroutine)
        try:
            self._loop.run_until_complete(task)
        except KeyboardInterrupt:
            task.cancel()  # else the next cell that awaits would go on with it
            raise

    def _stopped(self, stop: SystemExit) -> str:
        """exit() ends the cell, not the session."""
        if stop.code is None or stop.code == 0:
            return "ok"
        self._flush()
        self._agent.show("error", _encoded(f"SystemExit: {stop.code}\n"))
        return "error"

    def _tell(self, error: BaseException) -> None:
        self._flush()
        self._agent.show("error", _encoded(cut(traceback_text(error), ERROR_CHARS)))

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr, *self._streams):
            with contextlib.suppress(Exception):  # it may be the cell's own object, or closed
                stream.flush()

    # --- what a cell shows

    def _show_result(self, value: object) -> None:
        if value is not None:
            self._names["_"] = value
            self.display(value)

    def display(self, *values: object, **_ignored: Any) -> None:
        """Show each value: as a picture where it can be one, else as its repr."""
        for value in values:
            if (picture := picture_of(value)) is None:
                print(cut(repr(value), RESULT_CHARS))
            else:
                self._show_picture(*picture)

    def _show_picture(self, data: bytes, mime: str) -> None:
        self._flush()
        if len(data) > IMAGE_BYTES:
            print(f"[a picture of {len(data) >> 20} MB is too large to be shown]")
        else:
            self._agent.show("picture", data, mime=mime)

    def _show_figures(self) -> None:
        plt = _pyplot()
        try:
            for number in plt.get_fignums() if plt else ():
                figure = plt.figure(number)
                if figure.axes or figure.texts or figure.images:
                    self._show_picture(_figure_png(figure), "image/png")
        finally:
            self._close_figures()

    def _close_figures(self) -> None:
        if plt := _pyplot():
            plt.close("all")

    # --- what is made fit for a notebook

    def prepare(self) -> None:
        """Suit the libraries to what they are used for here, those that are loaded and those that come later."""
        random.seed()
        suits: dict[str, Callable[[Any], None]] = {
            "numpy.random": lambda numpy_random: numpy_random.seed(),  # else it is the same in every session
            "pandas": _suit_pandas,
            "matplotlib.pyplot": self._suit_pyplot,
        }
        if sys.version_info >= (3, 14):
            # A forked child knows what cells have defined; one that starts afresh could not import it.
            suits["multiprocessing"] = lambda module: module.set_start_method("fork", force=True)
        for name in [name for name in suits if name in sys.modules]:
            suits[name](sys.modules[name])
            del suits[name]
        sys.meta_path.insert(0, _AfterImport(suits))
        sys.meta_path.append(_IPythonStandIn(self.display))

    def _suit_pyplot(self, plt: Any) -> None:
        plt.switch_backend("agg")
        plt.show = lambda *_args, **_fields: self._show_figures()
        plt.Figure.show = lambda figure, *_args, **_fields: self.display(figure)


def main(control: int, text: int) -> NoReturn:
    """Serve the agent on the connected socket `control`; what cells print goes to the pipe `text`. Never returns."""
    gc.enable()
    if "" not in sys.path:
        sys.path.insert(0, "")
    sys.argv = [""]
    try:
        cells = Cells(control, text)
        cells.prepare()
        cells.serve()
    except OSError:  # a cell closed our files: the agent sees it
        os._exit(1)


def parse(code: str, name: str) -> ast.Module:
    """A cell as a syntax tree. Lines that are no Python, but a notebook's `!command` or `%magic`, become calls."""
    lines = code.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if code.startswith("%%"):
        lines = _cell_magic(lines)
    while True:
        try:
            tree: ast.Module = compile("\n".join(lines), name, "exec", ast.PyCF_ONLY_AST | _AWAIT, dont_inherit=True)
            return tree
        except SyntaxError as error:
            # Only the line that Python stumbles over: elsewhere `%` and `!` begin lines of texts and expressions.
            number = (error.lineno or 0) - 1
            python = _as_python(lines[number]) if 0 <= number < len(lines) else None
            if python is None:
                raise
            lines[number] = python


def _as_python(line: str) -> str | None:
    if (match := re.fullmatch(r"(\s*)([!%])(.*)", line)) is None:
        return None
    indent, sign, rest = match.groups()
    if sign == "%" and (timed := re.match(r"time(?:it)?\s+(.+)", rest)):
        return str(indent + timed[1])
    return f"{indent}{'__shell__' if sign == '!' else '__magic__'}({rest.strip()!r})"


def _cell_magic(lines: list[str]) -> list[str]:
    name, _, rest = lines[0][2:].strip().partition(" ")
    body = "\n".join(lines[1:]) + "\n"
    if name in ("bash", "sh"):
        return [f"__shell__({body!r})"]
    if name == "writefile":
        return [f"__magic__({f'writefile {rest}'!r}, {body!r})"]
    return [("" if name in ("time", "timeit", "capture") else f"__magic__({name!r})"), *lines[1:]]


def _shell(command: str) -> None:
    """What `!command` does."""
    if _INSTALLS.match(command):
        print(NO_NETWORK)
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, check=False)  # noqa: S602  so a notebook does


def _magic(line: str, body: str = "") -> None:
    """What `%name …` does: the few of IPython's commands that mean something here."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("pip", "conda", "mamba", "uv", "ls", "cat", "mkdir", "rm", "cp", "mv"):
        _shell(line)
    elif name == "cd":
        os.chdir(os.path.expanduser(rest or "~"))
    elif name == "pwd":
        print(os.getcwd())
    elif name == "writefile":
        with open(rest, "w") as file:
            file.write(body)
        print(f"Writing {rest}")
    elif name not in ("matplotlib", "config", "load_ext", "reload_ext", "autoreload", "precision"):
        print(f"%{name} is not known here.", file=sys.stderr)


def _no_input(prompt: object = "") -> NoReturn:
    raise RuntimeError("input() cannot be used: nobody is there to answer. Put the values into the code.")


def _exit(code: object = None) -> NoReturn:
    raise SystemExit(code)


def traceback_text(error: BaseException) -> str:
    """What a notebook shows of an error: frames of the cell and of libraries, none of ours."""
    told = traceback.TracebackException.from_exception(error, compact=True)
    for part in _chain(told):
        frames = [frame for frame in part.stack if not _is_ours(frame.filename)]
        first = next((i for i, frame in enumerate(frames) if frame.filename.startswith("<cell ")), 0)
        part.stack[:] = frames[first:]
    if not told.stack:
        return "".join(told.format_exception_only())
    return "".join(told.format())


def _is_ours(filename: str) -> bool:
    return filename.startswith((_HERE, "<frozen importlib"))


def _chain(told: traceback.TracebackException) -> Iterable[traceback.TracebackException]:
    waiting, seen = [told], set()
    while waiting:
        part = waiting.pop()
        if id(part) not in seen:
            seen.add(id(part))
            waiting += [other for other in (part.__cause__, part.__context__) if other]
            waiting += part.exceptions or []
            yield part


def cut(text: str, limit_chars: int) -> str:
    """`text`, without its middle where it is too long."""
    if len(text) <= limit_chars:
        return text
    head, tail = limit_chars * 3 // 4, limit_chars // 4
    return f"{text[:head]}\n[{len(text) - head - tail} characters left out]\n{text[-tail:]}"


def picture_of(value: object) -> tuple[bytes, str] | None:
    """The picture that a value is, with its media type: figures, PIL's images, whatever has `_repr_png_`."""
    figure = getattr(sys.modules.get("matplotlib.figure"), "Figure", None)
    if figure is not None and isinstance(value, figure):
        try:
            return _figure_png(value), "image/png"
        finally:
            if plt := _pyplot():
                plt.close(value)  # shown once is enough: the cell's end shows those that are open
    for method, mime in (("_repr_png_", "image/png"), ("_repr_jpeg_", "image/jpeg")):
        make = getattr(type(value), method, None)
        data = make(value) if callable(make) else None
        if isinstance(data, bytes) and is_image(data[:16], mime):
            return data, mime
    return None


def _figure_png(figure: Any) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", bbox_inches="tight")
    return held.getvalue()


def _pyplot() -> Any:
    plt = sys.modules.get("matplotlib.pyplot")
    return plt if hasattr(plt, "get_fignums") and hasattr(plt, "close") else None  # it may be half imported


def _suit_pandas(pandas: Any) -> None:
    for name, value in (("display.width", 160), ("display.max_columns", 30), ("display.max_colwidth", 80)):
        pandas.set_option(name, value)


def _is_open(stream: io.TextIOWrapper) -> bool:
    try:
        return not stream.closed
    except ValueError:  # its buffer was detached
        return False


def _text_stream(fd: int) -> io.TextIOWrapper:
    return open(fd, "w", buffering=1, encoding="utf-8", errors="shown", closefd=False)


def _mark(error: UnicodeError) -> tuple[bytes, int]:
    """What cannot be written in UTF-8, lone surrogates, becomes the sign for it."""
    assert isinstance(error, UnicodeEncodeError)
    return "\ufffd".encode() * (error.end - error.start), error.end


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "shown")


class _AfterImport:
    """Calls a function with a module when it has been imported."""

    def __init__(self, calls: dict[str, Callable[[Any], None]]) -> None:
        self._calls = calls

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        call = self._calls.pop(name, None)
        if call is None:
            return None
        spec = importlib.util.find_spec(name)
        self._calls[name] = call
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_call(module: types.ModuleType) -> None:
            load(module)
            call(module)

        spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return spec


class _IPythonStandIn:
    """`from IPython.display import display` is a habit: without IPython, these few names stand in for it."""

    def __init__(self, display: Callable[..., None]) -> None:
        self._display = display

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        if name not in ("IPython", "IPython.display"):
            return None
        return ModuleSpec(name, self, is_package=name == "IPython")  # type: ignore[arg-type]

    def create_module(self, _spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "IPython":
            vars(module).update(version_info=(9, 0, 0), get_ipython=lambda: None)
            return
        texts = {kind: type(kind, (_Text,), {}) for kind in ("HTML", "Markdown", "Latex", "Pretty", "Code")}
        vars(module).update(display=self._display, clear_output=lambda wait=False: None, Image=_Image, **texts)


class _Text:
    def __init__(self, data: object = "", **_ignored: Any) -> None:
        self._data = data

    def __repr__(self) -> str:
        return str(self._data)


class _Image:
    def __init__(self, data: bytes | str | None = None, filename: str | None = None, **_ignored: Any) -> None:
        if not isinstance(data, bytes):
            with open(filename or str(data), "rb") as file:
                data = file.read()
        self._data = data

    def _repr_png_(self) -> bytes:
        return self._data

    def _repr_jpeg_(self) -> bytes:
        return self._data
