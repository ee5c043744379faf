"""The child process that reads documents: a loop of file in, text and chunks out. Its parent is `parse.py`."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import tempfile
import traceback
from types import TracebackType
from typing import BinaryIO

import msgspec

from afterglow.errors import Unreadable
from afterglow.ingest.chunk import TokenCounter, chunks
from afterglow.ingest.parse import Failure, Job, Span, Success
from afterglow.ingest.read import read

_LESS_IMPORTANT = 10  # than answering requests


def main() -> None:
    """Read files until there are no more. Arguments: see `_Child.start`."""
    timeout_s, memory_mb, max_file_bytes, folder = float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    answers, log = _take_pipes()
    sys.excepthook = lambda kind, error, trace: _report(log, kind, trace)
    os.nice(_LESS_IMPORTANT)
    _limit(resource.RLIMIT_AS, memory_mb << 20)
    _limit(resource.RLIMIT_FSIZE, max_file_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    counter = TokenCounter()
    while header := _receive(sys.stdin.buffer):
        job = msgspec.msgpack.decode(header, type=Job)
        with tempfile.TemporaryFile(dir=folder or None) as file:
            while piece := _receive(sys.stdin.buffer):
                file.write(piece)
            file.seek(0)
            _limit(resource.RLIMIT_CPU, int(_processor_s() + timeout_s) + 1)
            answer = msgspec.msgpack.encode(_work(file, job, counter, memory_mb))
        answers.write(len(answer).to_bytes(8, "big"))
        answers.write(answer)
        answers.flush()


def _work(file: BinaryIO, job: Job, counter: TokenCounter, memory_mb: int) -> Success | Failure:
    try:
        extracted = read(file, job.name)
        found = chunks(extracted.text, extracted.pages, job.max_tokens, job.overlap_tokens, counter)
    except Unreadable as error:
        return Failure(error.code, error.message)
    except MemoryError:
        return Failure(
            "invalid_file", f"The file could not be parsed because reading it takes more than {memory_mb} MB of memory."
        )
    return Success(extracted, [Span(chunk.start, chunk.end, chunk.page, chunk.tokens) for chunk in found])


def _take_pipes() -> tuple[BinaryIO, int]:
    """The pipe for answers and the server's log. What libraries print may be a document's text, and goes nowhere."""
    answers, log = os.fdopen(os.dup(1), "wb"), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return answers, log


def _report(log: int, kind: type[BaseException], trace: TracebackType | None) -> None:
    """Where it failed, without the message: that could hold text of the document."""
    lines = [*traceback.format_tb(trace), f"{kind.__name__} while reading a document\n"]
    os.write(log, "".join(lines).encode())


def _receive(pipe: BinaryIO) -> bytes:
    """The next piece; empty at the end of a file, and when the parent is gone."""
    return pipe.read(int.from_bytes(pipe.read(4), "big"))


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _limit(what: int, most: int) -> None:
    """Set a limit, but never above the one this process was given. Not every system knows every limit."""
    hard = resource.getrlimit(what)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
