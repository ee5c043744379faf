"""What `contracts.Blobs` promises, kept by every place for bytes; then what a folder alone must survive."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from afterglow.contracts import Blobs
from afterglow.errors import BlobMissing, ConfigError, StoreFull, StoreUnavailable
from afterglow.store.blobs import PIECE_BYTES, LocalBlobs
from tests.contracts.test_store import files_no_larger_than

OpenBlobs = Callable[[], Blobs]
KEY = "aa/file-aa"
SIZES = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7]


class Unlucky(Exception):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture(params=["local"])
def open_blobs(request: pytest.FixtureRequest, folder: Path) -> OpenBlobs:
    """Opens the same place each time it is called. A new kind is another `params`."""
    return {"local": lambda: LocalBlobs(folder)}[request.param]


@pytest.fixture
async def blobs(open_blobs: OpenBlobs) -> AsyncGenerator[Blobs, None]:
    opened = open_blobs()
    yield opened
    await opened.close()


async def cut(data: bytes, size: int = 65_537, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]
    if then is not None:
        raise then


async def read(blobs: Blobs, key: str = KEY, start: int = 0, end: int | None = None) -> bytes:
    async with aclosing(blobs.get(key, start, end)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def missing(blobs: Blobs, key: str = KEY) -> bool:
    try:
        await read(blobs, key)
    except BlobMissing:
        return True
    return False


# --- every place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_what_was_put_is_what_one_gets(open_blobs: OpenBlobs, size: int):
    """The bytes come back as they were, in whatever pieces they came, also to whoever opens the place anew."""
    data = os.urandom(size)
    assert await open_blobs().put(KEY, cut(data)) == size
    assert await read(open_blobs()) == data


@pytest.mark.parametrize(("start", "end"), [(0, 1), (5, 5), (10, PIECE_BYTES + 10), (PIECE_BYTES, None), (7, 10**12)])
async def test_a_part_can_be_had(blobs: Blobs, start: int, end: int | None):
    """From `start` up to `end`, or to the end of what is there."""
    data = os.urandom(2 * PIECE_BYTES)
    await blobs.put(KEY, cut(data))
    assert await read(blobs, start=start, end=end) == data[start:end]


async def test_what_is_not_there_is_told_before_the_first_byte(blobs: Blobs):
    """Whoever asks for a missing blob hears BlobMissing."""
    with pytest.raises(BlobMissing):
        await anext(blobs.get("zz/none"))
    with pytest.raises(BlobMissing):
        await anext(blobs.get("zz/none", 3, 4))


@pytest.mark.parametrize("size", [100, 5 * PIECE_BYTES])
@pytest.mark.parametrize("error", [Unlucky(), FileNotFoundError("gone"), OSError(28, "not ours")])
async def test_when_the_bytes_fail_nothing_is_kept(blobs: Blobs, folder: Path, size: int, error: Exception):
    """What `chunks` raises is raised as it is, and no part of the blob is there."""
    with pytest.raises(type(error)) as raised:
        await blobs.put(KEY, cut(bytes(size), then=error))
    assert raised.value is error
    assert await missing(blobs)
    await emptied(folder)


async def test_a_blob_is_there_when_it_is_whole(blobs: Blobs):
    """Until the last byte has come, whoever asks hears that it is missing."""
    more = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bytes(3 * PIECE_BYTES)
        await more.wait()
        yield b"end"

    putting = asyncio.create_task(blobs.put(KEY, slow()))
    for _ in range(20):
        assert await missing(blobs)
    more.set()
    assert await putting == 3 * PIECE_BYTES + 3
    assert not await missing(blobs)


async def test_a_put_that_is_cancelled_leaves_nothing(blobs: Blobs, folder: Path):
    """Neither a blob nor a part of one."""
    reached = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield bytes(3 * PIECE_BYTES)
        reached.set()
        await asyncio.Event().wait()

    putting = asyncio.create_task(blobs.put(KEY, endless()))
    await reached.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert await missing(blobs)
    await emptied(folder)


async def test_deleting_is_for_several_and_takes_what_is_gone_for_deleted(blobs: Blobs):
    """Those named are gone, the others stay, and one that was not there is no error."""
    for name in ("aa/1", "aa/2", "bb/3"):
        await blobs.put(name, cut(name.encode()))
    await blobs.delete(["aa/1", "zz/none", "bb/3"])
    await blobs.delete(["aa/1"])
    assert [await missing(blobs, name) for name in ("aa/1", "aa/2", "bb/3")] == [True, False, True]


async def test_many_at_once(blobs: Blobs):
    """Blobs that are written and read side by side do not mix."""
    data = {f"{number:02}/x": os.urandom(PIECE_BYTES + number) for number in range(8)}
    await asyncio.gather(*(blobs.put(key, cut(text)) for key, text in data.items()))
    assert await asyncio.gather(*(read(blobs, key) for key in data)) == list(data.values())


# --- a folder --------------------------------------------------------------------------------------------------


async def emptied(folder: Path) -> None:
    """obstore takes away what it has begun in a thread of its own."""
    async with asyncio.timeout(10):
        while any(path.is_file() for path in folder.rglob("*")):
            await asyncio.sleep(0.001)


async def test_others_on_the_machine_cannot_look_into_it(folder: Path):
    """The folder is its owner's alone, also when it was there with other rights, and so are the files."""
    folder.mkdir(mode=0o755)
    blobs = LocalBlobs(folder)
    await blobs.put(KEY, cut(b"secret"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / KEY).stat().st_mode) == 0o600


async def test_what_a_crash_left_unfinished_is_deleted_with_its_key(folder: Path):
    """Bytes that were written when the process died stand beside the key, and go when it is deleted."""
    blobs = LocalBlobs(folder)
    begun: list[str] = []

    async def looked_at() -> AsyncIterator[bytes]:
        yield bytes(3 * PIECE_BYTES)
        begun.extend(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        raise Unlucky

    with pytest.raises(Unlucky):
        await blobs.put(KEY, looked_at())
    assert begun == [f"{KEY}#1"]
    await emptied(folder)
    (folder / begun[0]).write_bytes(b"left")
    await blobs.delete([KEY])
    await emptied(folder)


@pytest.mark.parametrize("size", [300_000, 3 * PIECE_BYTES])
async def test_a_full_disk_is_told_as_such(folder: Path, size: int):
    """What the system refuses to write is StoreFull, and nothing of it is kept."""
    blobs = LocalBlobs(folder)
    with files_no_larger_than(200_000), pytest.raises(StoreFull):
        await blobs.put(KEY, cut(bytes(size)))
    assert await missing(blobs)
    await emptied(folder)


async def test_a_disk_that_fails_is_told_as_such(folder: Path):
    """Anything else that the system says is StoreUnavailable."""
    blobs = LocalBlobs(folder)
    (folder / "aa").write_bytes(b"in the way")
    for size in (1, 3 * PIECE_BYTES):
        with pytest.raises(StoreUnavailable):
            await blobs.put(KEY, cut(bytes(size)))
    with pytest.raises(StoreUnavailable):
        await read(blobs)


def test_a_folder_that_cannot_be_is_a_fault_of_the_configuration(tmp_path: Path):
    """Whoever starts the server is told the place."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="blobs cannot be used"):
        LocalBlobs(tmp_path / "file" / "blobs")
