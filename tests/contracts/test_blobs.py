"""What `contracts.Blobs` promises, kept by every place for bytes; then what a folder and an object store must survive
each for itself."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from afterglow.contracts import Blobs, Store
from afterglow.errors import BlobMissing, ConfigError, StoreFull, StoreUnavailable
from afterglow.store import object_blobs
from afterglow.store.blobs import PIECE_BYTES, LocalBlobs, check_data_folder
from afterglow.store.object_blobs import PART_BYTES, ObjectBlobs
from afterglow.store.postgres import PostgresStore
from tests.contracts.test_store import files_no_larger_than
from tests.objects import Bucket, fresh_bucket
from tests.postgres import fresh_database

OpenBlobs = Callable[[], Blobs]
NothingLeft = Callable[[], bool]
KEY = "aa/file-aa"
SIZES = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7, PART_BYTES, 2 * PART_BYTES + 7]
LARGE = 3 * PART_BYTES


class Unlucky(Exception):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def bucket() -> Bucket:
    return fresh_bucket()


@pytest.fixture(params=["local", pytest.param("objects", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    """A new kind is another of these `params`."""
    return request.param


@pytest.fixture
def open_blobs(request: pytest.FixtureRequest, kind: str) -> OpenBlobs:
    """Opens the same place each time it is called."""
    if kind == "local":
        folder = request.getfixturevalue("folder")
        return lambda: LocalBlobs(folder)
    return request.getfixturevalue("bucket").open


@pytest.fixture
def nothing_left(request: pytest.FixtureRequest, kind: str) -> NothingLeft:
    """Whether the place holds neither a blob nor a part of one."""
    if kind == "local":
        folder = request.getfixturevalue("folder")
        return lambda: not any(path.is_file() for path in folder.rglob("*"))
    bucket = request.getfixturevalue("bucket")
    return lambda: not (bucket.keys() or bucket.unfinished())


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


@pytest.mark.parametrize("size", [100, LARGE])
@pytest.mark.parametrize("error", [Unlucky(), FileNotFoundError("gone"), OSError(28, "not ours")])
async def test_when_the_bytes_fail_nothing_is_kept(
    blobs: Blobs, nothing_left: NothingLeft, size: int, error: Exception
):
    """What `chunks` raises is raised as it is, and no part of the blob is there."""
    with pytest.raises(type(error)) as raised:
        await blobs.put(KEY, cut(bytes(size), then=error))
    assert raised.value is error
    assert await missing(blobs)
    await until(nothing_left)


async def test_a_blob_is_there_when_it_is_whole(blobs: Blobs):
    """Until the last byte has come, whoever asks hears that it is missing."""
    more = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bytes(LARGE)
        await more.wait()
        yield b"end"

    putting = asyncio.create_task(blobs.put(KEY, slow()))
    for _ in range(20):
        assert await missing(blobs)
    more.set()
    assert await putting == LARGE + 3
    assert not await missing(blobs)


async def test_a_put_that_is_cancelled_leaves_nothing(blobs: Blobs, nothing_left: NothingLeft):
    """Neither a blob nor a part of one."""
    reached = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield bytes(LARGE)
        reached.set()
        await asyncio.Event().wait()

    putting = asyncio.create_task(blobs.put(KEY, endless()))
    await reached.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert await missing(blobs)
    await until(nothing_left)


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


async def until(nothing_left: NothingLeft) -> None:
    """obstore takes away what it has begun in a thread of its own."""
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(nothing_left):
            await asyncio.sleep(0.001)


# --- a folder --------------------------------------------------------------------------------------------------


async def emptied(folder: Path) -> None:
    await until(lambda: not any(path.is_file() for path in folder.rglob("*")))


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


# --- a folder, and a database that several processes share -----------------------------------------------------


@pytest.fixture
async def store() -> AsyncGenerator[Store, None]:
    async with fresh_database() as url:
        opened = await PostgresStore.open(url, connections=6, pooled=False)
        yield opened
        await opened.close()


def new_folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


@pytest.mark.slow
async def test_two_folders_on_one_database_are_refused(store: Store, tmp_path: Path):
    """Who would keep bytes where the others do not find them is told so, with both places and the way out."""
    one, other = new_folder(tmp_path, "one"), new_folder(tmp_path, "other")
    await check_data_folder(store, one, 1_000)
    with pytest.raises(ConfigError, match=f"{other}.*{one}.*blob_url.*shared_data"):
        await check_data_folder(store, other, 2_000)
    await check_data_folder(store, one, 3_000)


async def test_a_folder_is_known_again_wherever_it_is_seen_from(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Many processes may use one folder, also when another host or container sees it in another place."""
    await check_data_folder(store, new_folder(tmp_path, "one"), 1_000)
    (tmp_path / "one").rename(tmp_path / "mounted")
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    await asyncio.gather(*(check_data_folder(store, tmp_path / "mounted", 1_001) for _ in range(5)))


async def test_a_folder_that_was_replaced_or_long_unused_is_forgotten(store: Store, tmp_path: Path):
    """A new folder in the old place counts as it; and a day after its last use a folder is no obstacle any more."""
    await check_data_folder(store, new_folder(tmp_path, "one"), 1_000)
    (tmp_path / "one").rename(tmp_path / "away")
    await check_data_folder(store, new_folder(tmp_path, "one"), 1_001)
    await check_data_folder(store, new_folder(tmp_path, "other"), 1_002 + 86_400)


async def test_of_two_folders_that_come_at_once_one_is_refused(store: Store, tmp_path: Path):
    """However close together two processes start, they do not both go on with folders of their own."""
    folders = [new_folder(tmp_path, name) for name in ("one", "other")]
    ends = await asyncio.gather(
        *(check_data_folder(store, folder, 1_000) for folder in folders), return_exceptions=True
    )
    assert sorted(map(type, ends), key=str) == [type(None), ConfigError]


# --- an object store -------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_bucket_that_can_be_used_is_left_as_it_was(bucket: Bucket):
    """The check at the start writes, reads and deletes, and leaves nothing."""
    await bucket.open().check()
    assert bucket.keys() == []


async def test_blobs_stand_below_the_prefix_of_the_address(bucket: Bucket):
    """`s3://BUCKET/PREFIX`: several servers can have one bucket."""
    await bucket.open().put(KEY, cut(b"x"))
    assert bucket.keys() == [f"some/where/{KEY}"]


async def test_a_bucket_that_is_not_there_is_a_fault_of_the_configuration(bucket: Bucket):
    """Whoever starts the server is told what is missing, and what it needs."""
    missing_bucket = Bucket(bucket.endpoint, "nowhere").open()
    with pytest.raises(
        ConfigError, match=r"blob_url: s3://nowhere/some/where: there is no such bucket\. The bucket must"
    ):
        await missing_bucket.check()
    with pytest.raises(StoreUnavailable):
        await missing_bucket.put(KEY, cut(b"x"))


@pytest.mark.parametrize("size", [1, LARGE])
async def test_a_server_that_refuses_connections_is_told_as_such(
    bucket: Bucket, size: int, monkeypatch: pytest.MonkeyPatch
):
    """Reading, writing and deleting raise StoreUnavailable, after some tries, and no secret is in the text."""
    monkeypatch.setitem(object_blobs.RETRIES, "max_retries", 1)
    blobs = bucket.open(endpoint="http://127.0.0.1:1")
    for act in (blobs.put(KEY, cut(bytes(size))), read(blobs), blobs.delete([KEY]), blobs.put(KEY, endless_bytes())):
        with pytest.raises(StoreUnavailable, match="error sending request") as raised:
            await act
        assert "hush" not in str(raised.value)


async def endless_bytes() -> AsyncIterator[bytes]:
    while True:
        yield bytes(PIECE_BYTES)


async def test_options_that_are_not_there_are_named(bucket: Bucket):
    """All of them at once, and never their values."""
    with pytest.raises(ConfigError, match="no option 'colour', 'acces_key'") as raised:
        bucket.open(colour="red", acces_key="hush")
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "options", "told"),
    [
        ("s3://", {}, "expected s3://BUCKET"),
        ("ftp://bucket", {}, "expected s3://BUCKET"),
        ("s3://bucket", {"timeout": "soon"}, 'failed to parse "soon" as Duration'),
        ("s3://bucket", {"virtual_hosted_style_request": "perhaps"}, "boolean"),
        ("gs://bucket", {"service_account_key": "{hush-hush"}, "key must be a string"),
        (
            "gs://bucket",
            {"access_key_id": "hush"},
            "no option 'access_key_id'; its options are those of obstore's GCSS",
        ),
        ("az://container", {}, "Account must be specified"),
        ("az://container", {"account_name": "me", "account_key": "hush-hush!"}, "Invalid Access Key"),
    ],
)
def test_wrong_options_are_faults_of_the_configuration(url: str, options: dict[str, str], told: str):
    """In every kind of store, before anything is asked of it; and without secrets."""
    with pytest.raises(ConfigError, match=told) as raised:
        ObjectBlobs(url, options)
    assert "hush" not in str(raised.value)


async def test_without_tls_only_when_the_address_says_so(bucket: Bucket):
    """An endpoint is spoken to without TLS when it begins with http://, and not otherwise."""
    await bucket.open().check()
    with pytest.raises(ConfigError, match="builder error"):
        await bucket.open(allow_http="false").check()


@pytest.mark.parametrize(("scheme", "options"), [("gs", {}), ("az", {"account_name": "me", "account_key": "aHVzaA=="})])
async def test_every_kind_of_store_tells_that_it_is_unreachable(
    scheme: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Google's and Microsoft's as Amazon's."""
    monkeypatch.setitem(object_blobs.RETRIES, "max_retries", 0)
    key = '{"gcs_base_url": "http://127.0.0.1:1", "disable_oauth": true, "client_email": "", "private_key": "", '
    given = {"gs": {"service_account_key": key + '"private_key_id": ""}', "allow_http": "true"}}
    options = given.get(scheme, {"endpoint": "http://127.0.0.1:1", **options})
    with pytest.raises(ConfigError, match=f"blob_url: {scheme}://bucket: .*error sending request. The bucket must"):
        await ObjectBlobs(f"{scheme}://bucket", options).check()


@asynccontextmanager
async def answering(*answers: tuple[int, str]) -> AsyncGenerator[Bucket, None]:
    """A server that says these statuses and texts, one after another, and then nothing any more."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if left:
                status, text = left.pop(0)
                head = f"HTTP/1.1 {status} Said\r\nConnection: close\r\nETag: x\r\nContent-Length: {len(text)}"
                writer.write(f"{head}\r\n\r\n{text}".encode())
            else:
                await reader.read()
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Bucket(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "bucket")


async def test_credentials_that_are_refused_are_told_as_such():
    """In words, and without the credentials."""
    refusal = "<Error><Code>SignatureDoesNotMatch</Code><Message>Not hush-hush-hush.</Message></Error>"
    async with answering((403, refusal)) as bucket:
        with pytest.raises(StoreUnavailable, match=r"credentials were refused: SignatureDoesNotMatch: Not …$"):
            await bucket.open().put(KEY, cut(b"x"))


async def test_a_place_that_is_full_is_told_as_such(monkeypatch: pytest.MonkeyPatch):
    """What a server of one's own answers when its disks are full is StoreFull."""
    monkeypatch.setitem(object_blobs.RETRIES, "max_retries", 0)
    async with answering((507, "<Error><Code>XMinioStorageFull</Code></Error>")) as bucket:
        with pytest.raises(StoreFull, match="XMinioStorageFull"):
            await bucket.open().put(KEY, cut(b"x"))


async def test_what_passes_is_tried_again():
    """A store that is busy for a moment makes nothing fail."""
    async with answering((503, "SlowDown"), (500, "InternalError"), (200, "")) as bucket:
        assert await bucket.open().put(KEY, cut(b"x")) == 1


async def test_a_large_upload_needs_little_memory(monkeypatch: pytest.MonkeyPatch):
    """When the store takes nothing, no more than some parts are read of what is to be sent."""
    monkeypatch.setitem(object_blobs.RETRIES, "max_retries", 0)
    taken = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += PIECE_BYTES
            yield bytes(PIECE_BYTES)

    async with answering() as bucket:
        putting = asyncio.create_task(bucket.open(timeout="200ms").put(KEY, counted()))
        with pytest.raises(StoreUnavailable):
            await putting
    assert PART_BYTES <= taken <= 4 * PART_BYTES
