"""What `ingest/parse.py` promises: a hostile document costs its own failure and nothing else."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from afterglow.errors import Unreadable
from afterglow.ingest import parse as parse_module
from afterglow.ingest.extract import TOO_LARGE
from afterglow.ingest.parse import Parsed, Parsers
from tests.documents import docx, paragraph, pdf, xlsx, zipped


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@asynccontextmanager
async def parsers(**arguments: Any) -> AsyncIterator[Parsers]:
    pool = Parsers(**arguments)
    try:
        yield pool
    finally:
        await pool.close()


async def why_not(pool: Parsers, data: bytes, name: str) -> Unreadable:
    failure = await failure_of(pool, data, name)
    assert failure is not None
    return failure


async def failure_of(pool: Parsers, data: bytes, name: str) -> Unreadable | None:
    try:
        await pool.parse(name, pieces(data))
    except Unreadable as failure:
        return failure
    return None


def children(pool: Parsers) -> list[int]:
    return [child._process.pid for child in [*pool._idle, *pool._busy]]


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def hello(pool: Parsers) -> Parsed:
    return await pool.parse("hello.txt", pieces(b"hello " * 10))


async def test_one_child_reads_file_after_file() -> None:
    """Files of many kinds, failures among them, are read by one process, and chunks come with their places."""
    async with parsers(processes=1) as pool:
        parsed = await pool.parse("a.pdf", pieces(pdf("one\n" * 30, "two\n" * 100), 7), 100, 50)
        (pid,) = children(pool)
        text = parsed.extracted.text
        assert all(text[chunk.start : chunk.end] == chunk.text for chunk in parsed.chunks)
        assert [chunk.index for chunk in parsed.chunks] == list(range(len(parsed.chunks)))
        assert [page.number for page in parsed.extracted.pages or []] == [1, 2]
        assert {chunk.page for chunk in parsed.chunks} == {1, 2}
        assert (await why_not(pool, b"\x89PNG\r\n\x1a\n", "a.pdf")).code == "unsupported_file"
        assert (await why_not(pool, b"", "a.txt")).message == "The file could not be parsed because it is empty."
        assert (await pool.parse("a.docx", pieces(docx(paragraph("Ada"))))).extracted.text.strip() == "Ada"
        assert (await hello(pool)).chunks[0].tokens >= 10
        assert children(pool) == [pid]
    assert not runs(pid)


async def test_the_children_are_walled_in() -> None:
    """A child has no variables of the server's, no way to write its output, and limits."""
    async with parsers(processes=1, memory_mb=700) as pool:
        await hello(pool)
        (pid,) = children(pool)
        place = Path(f"/proc/{pid}")
        if not place.exists():
            pytest.skip("no /proc here")
        assert set(place.joinpath("environ").read_bytes().split(b"\0")) == {
            b"RAYON_NUM_THREADS=1",
            b"MALLOC_ARENA_MAX=1",
            b"",
        }
        assert str(700 << 20) in place.joinpath("limits").read_text()
        assert os.readlink(place / "fd" / "1") == os.readlink(place / "fd" / "2") == os.devnull
        assert os.getpriority(os.PRIO_PROCESS, pid) >= os.getpriority(os.PRIO_PROCESS, 0) + 10


async def test_a_child_that_dies_fails_its_file_alone() -> None:
    """When a child is killed in the middle of a file, that file fails, and the next has a new child."""
    async with parsers(processes=1) as pool:
        await hello(pool)
        (pid,) = children(pool)

        async def deadly() -> AsyncIterator[bytes]:
            yield b"text"
            os.kill(pid, signal.SIGSEGV)
            while True:
                yield b"text" * 10_000

        with pytest.raises(Unreadable, match="breaks the parser") as failure:
            await pool.parse("a.txt", deadly())
        assert failure.value.code == "invalid_file"
        assert (await hello(pool)).extracted.text.startswith("hello")
        assert children(pool) != [pid]


async def test_a_child_that_died_idle_is_replaced() -> None:
    """A child that was killed between two files costs nothing but a new one."""
    async with parsers(processes=1) as pool:
        await hello(pool)
        process = pool._idle[0]._process
        process.kill()
        await process.wait()
        assert (await hello(pool)).chunks


async def test_a_child_that_hangs_is_killed() -> None:
    """A child that stands still, using no processor time, is killed when its time has passed."""
    async with parsers(processes=1) as pool:
        await hello(pool)
        (pid,) = children(pool)
        pool._idle[0]._timeout_s = 0.1
        os.kill(pid, signal.SIGSTOP)
        assert "takes longer than 0.1 seconds" in (await why_not(pool, b"hello", "a.txt")).message
        assert not runs(pid)


async def test_cancel_kills_the_child() -> None:
    """Whoever stops waiting for a file ends its reading."""
    async with parsers(processes=1) as pool:
        await hello(pool)
        (pid,) = children(pool)
        started = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            started.set()
            yield b"a"
            await asyncio.Event().wait()

        reading = asyncio.create_task(pool.parse("a.txt", endless()))
        await started.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert not runs(pid)


async def test_what_the_bytes_raise_is_raised() -> None:
    """A store that fails while it gives the bytes is not the document's fault; the next file is read."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise OSError("no such blob")

    async with parsers(processes=1) as pool:
        with pytest.raises(OSError, match="no such blob"):
            await pool.parse("a.txt", broken())
        assert (await hello(pool)).chunks


async def test_files_wait_their_turn() -> None:
    """However many files come at once, no more children run than allowed."""
    async with parsers(processes=2) as pool:
        most = 0

        async def watched() -> AsyncIterator[bytes]:
            nonlocal most
            most = max(most, len(children(pool)))
            yield b"hello"

        await asyncio.gather(*(pool.parse(f"{number}.txt", watched()) for number in range(30)))
        assert most == 2
        assert len(children(pool)) <= 2


async def test_a_child_with_nothing_to_do_ends() -> None:
    """After a time without files there is no child."""
    async with parsers(processes=1, idle_s=0.01) as pool:
        await hello(pool)
        process = pool._idle[0]._process
        assert await process.wait() == 0
        assert children(pool) == []
        assert (await hello(pool)).chunks


async def test_a_file_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 512 MB nothing is read to its end."""
    monkeypatch.setattr(parse_module, "MAX_FILE_BYTES", 1000)
    async with parsers(processes=1) as pool:
        assert (await why_not(pool, b"x" * 2000, "a.txt")).message == TOO_LARGE


async def test_a_parser_that_cannot_start_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process to be had: server_error, not invalid_file."""
    monkeypatch.setattr(parse_module.sys, "executable", "/nowhere/python")
    async with parsers() as pool:
        failure = await why_not(pool, b"x", "a.txt")
        assert (failure.code, "could be started" in failure.message) == ("server_error", True)


def hostile() -> Iterator[tuple[str, str, bytes]]:
    """Name, words of the failure (empty: it may be read), bytes."""
    million = "".join(f"{n} 0 obj\n<< /Next {n + 1} 0 R >>\nendobj\n" for n in range(10, 1_000_000))
    yield "objects.pdf", "", pdf("hello").replace(b"xref", million.encode() + b"xref", 1)
    yield "line.txt", "too large", b"a b " * 25_000_000
    yield "letters.txt", "", b"a" * 100_000_000
    yield "spaces.txt", "empty", b" " * 100_000_000
    yield "line.csv", "", b"x," * 10_000_000
    yield "quote.csv", "", b'"' + b"x" * 20_000_000
    yield "deep.html", "", b"<div>" * 1_000_000 + b"x"
    yield "open.html", "", b"<" * 1_000_000
    yield "comment.html", "", b"<!--" * 1_000_000
    yield "attribute.html", "", b"<a " + b"b=c " * 2_000_000
    yield "deep.json", "", b'{"a":' * 2_000_000
    yield "line.json", "", b"[" + b"1," * 10_000_000 + b"1]"
    yield (
        "deep.docx",
        "",
        docx("<w:tbl><w:tr><w:tc>" * 300_000 + paragraph("core") + "</w:tc></w:tr></w:tbl>" * 300_000),
    )
    yield "bomb.docx", "too large", zipped({"word/document.xml": b"<a>" + b"x" * 300_000_000})
    row = '<row><c r="XFD1" t="inlineStr"><is><t>wide</t></is></c></row>'
    yield "wide.xlsx", "", xlsx(One=row * 5_000)
    yield "noise.pdf", "", b"%PDF-1.7\n" + random.Random(1).randbytes(5_000_000)
    yield "noise.txt", "binary", random.Random(2).randbytes(5_000_000)


@pytest.mark.slow
async def test_hostile_documents() -> None:
    """Bombs, depth and endless lines: each is read or fails clearly within its limits, and the next file is read."""
    async with parsers(processes=1, timeout_s=5, memory_mb=1024) as pool:
        for name, words, data in hostile():
            failure = await failure_of(pool, data, name)
            assert failure is None or failure.code != "server_error", (name, failure.message)
            assert not words or (failure is not None and words in failure.message), name
            assert (await hello(pool)).chunks


@pytest.mark.slow
async def test_processor_time_is_limited() -> None:
    """A document that takes too much work is stopped by its processor time."""
    async with parsers(processes=1, timeout_s=1) as pool:
        assert "takes longer than 1 seconds" in (await why_not(pool, b"word and word. " * 4_000_000, "a.txt")).message


@pytest.mark.slow
async def test_memory_is_limited() -> None:
    """A document that needs more memory than allowed fails, and says how much that is."""
    async with parsers(processes=1, memory_mb=200) as pool:
        assert "200 MB" in (await why_not(pool, "é中".encode() * 20_000_000, "a.txt")).message
        assert (await hello(pool)).chunks


@pytest.mark.slow
async def test_damaged_pdfs() -> None:
    """PDFs with changed bytes and cut ones are read or refused; the parser in C++ is not trusted with the server."""
    chance = random.Random(3)
    whole = pdf("hello\nworld", "page two", title="x")
    async with parsers(processes=1, timeout_s=10) as pool:
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            cut = bytes(data[: chance.randint(len(data) // 2, len(data))])
            failure = await failure_of(pool, cut, "a.pdf")
            assert failure is None or failure.code != "server_error", failure.message
