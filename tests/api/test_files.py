"""/v1/files by the official client and by hand: uploads, lists, downloads, expiry, and who may see what."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import openai
import pytest

from afterglow import files
from afterglow.contracts import Transaction
from afterglow.errors import BlobMissing
from afterglow.objects import File
from afterglow.rows import files as file_rows
from afterglow.rows.files import PlacedFile
from afterglow.testing import SetClock, says
from tests.api.wire import Answer, Fault, Json, Wire, until
from tests.conftest import Server, ServerFactory

MEGABYTE = 1024 * 1024
PURPOSES = ["fine-tune", "assistants", "batch", "user_data", "vision", "evals"]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


async def upload(wire: Wire, data: Any = b"hello", name: str = "a.txt", **fields: str) -> Answer:
    """fields: `purpose` is assistants unless given."""
    return await wire.ask("POST", "/files", files={"file": (name, data)}, data={"purpose": "assistants", **fields})


async def made(wire: Wire, data: Any = b"hello", name: str = "a.txt", **fields: str) -> Json:
    answer = await upload(wire, data, name, **fields)
    assert answer.status == 200, answer.content
    body: Json = answer.json
    return body


async def content(wire: Wire, file_id: str, **headers: str) -> Answer:
    return await wire.get(f"/files/{file_id}/content", headers=headers)


def blobs_in(server: Server) -> list[str]:
    """What lies in the folder of bytes, finished or not."""
    folder = Path(server.house.settings.data) / "blobs"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


async def rows_of(server: Server, table: str) -> list[tuple[Any, ...]]:
    return await server.house.store.read(lambda tx: tx.fetch(f"SELECT * FROM {table}"))


# --- uploads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", PURPOSES)
async def test_a_file_is_stored_and_read(server: Server, wire: Wire, purpose: Any):
    """The official client uploads, retrieves, lists, downloads and deletes a file of each purpose."""
    data = os.urandom(3 * MEGABYTE)
    file = await server.client.files.create(file=("Data.CSV", data), purpose=purpose)
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(data), "Data.CSV", purpose, "processed")
    assert file.id.startswith("file-")
    assert len(file.id) == 5 + 24
    assert await server.client.files.retrieve(file.id) == file
    assert (await server.client.files.list()).data == [file]
    assert (await server.client.files.content(file.id)).read() == data
    assert await server.client.files.wait_for_processing(file.id) == file
    gone = await server.client.files.delete(file.id)
    assert (gone.id, gone.object, gone.deleted) == (file.id, "file", True)
    for answer in (await wire.get(f"/files/{file.id}"), await content(wire, file.id)):
        assert answer.fault == Fault(404, f"No such File object: {file.id}", "id")
    assert blobs_in(server) == []


async def test_the_object_is_the_references(wire: Wire):
    """All keys are there, with null for what is not set."""
    file = await made(wire)
    created_at = file.pop("created_at")
    assert created_at > 1_700_000_000
    assert file.pop("id").startswith("file-")
    assert file == {
        "object": "file",
        "bytes": 5,
        "expires_at": None,
        "filename": "a.txt",
        "purpose": "assistants",
        "status": "processed",
        "status_details": None,
    }


async def test_a_synchronous_client_streams_from_disk(server: Server, tmp_path: Path):
    """A path or an open file is sent as the client sends it."""
    path = tmp_path / "répórt.txt"
    path.write_bytes(os.urandom(200_000))

    def use() -> tuple[str, bytes]:
        transport = openai.DefaultHttpxClient(verify=False)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", http_client=transport) as client:
            with path.open("rb") as opened:
                first = client.files.create(file=opened, purpose="assistants")
            second = client.files.create(file=path, purpose="user_data")
            assert first.filename == second.filename
            return first.filename, client.files.content(second.id).read()

    assert await asyncio.to_thread(use) == ("répórt.txt", path.read_bytes())


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_may_come_in_chunks(wire: Wire, chunked: bool):
    """With its length told beforehand or not, and with the purpose after the file."""
    data = os.urandom(300_000)
    body = (
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + data + b"\r\n"
        b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nvision\r\n--b--\r\n'
    )

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 10_000):
            yield body[at : at + 10_000]

    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = await wire.ask("POST", "/files", content=parts() if chunked else body, headers=headers)
    assert (answer.status, answer.json["purpose"], answer.json["bytes"]) == (200, "vision", len(data))
    assert (await content(wire, answer.json["id"])).content == data


async def test_an_empty_file_is_a_file(server: Server, wire: Wire):
    """It is accepted, has no bytes, and can be downloaded."""
    file = await server.client.files.create(file=("empty.txt", b""), purpose="assistants")
    assert file.bytes == 0
    assert (await content(wire, file.id)).content == b""


@pytest.mark.parametrize("name", ["naïve 日本語 😀.PDF", 'say "hi".txt', "مرحبا.TXT", "no extension", "a%22b;c=d.csv"])
async def test_names_come_back(server: Server, wire: Wire, name: str):
    """A name is shown as it was given, and the download names it in a form that every browser reads."""
    file = await server.client.files.create(file=(name, b"x"), purpose="assistants")
    expected = name.replace("%22", '"')  # which is how clients write a quote
    assert file.filename == expected
    disposition = (await content(wire, file.id)).headers["content-disposition"]
    assert disposition.isascii()
    assert disposition.startswith('attachment; filename="')
    assert unquote(disposition.partition("filename*=UTF-8''")[2]) == expected


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"purpose": "bogus"}, Fault(400, f"'bogus' is not one of {PURPOSES} - 'purpose'", "purpose")),
        ({"purpose": "output"}, Fault(400, f"'output' is not one of {PURPOSES} - 'purpose'", "purpose")),
        ({"x": "1"}, Fault(400, "Additional properties are not allowed ('x' was unexpected)")),
        (
            {"expires_after[anchor]": "created_at"},
            Fault(400, "'expires_after[seconds]' is a required property"),
        ),
        ({"expires_after[seconds]": "3600"}, Fault(400, "'expires_after[anchor]' is a required property")),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"},
            Fault(400, "3599 is less than the minimum of 3600 - 'expires_after[seconds]'"),
        ),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"},
            Fault(400, "2592001 is greater than the maximum of 2592000 - 'expires_after[seconds]'"),
        ),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "soon"},
            Fault(400, "'soon' is not of type 'integer' - 'expires_after[seconds]'"),
        ),
        (
            {"expires_after[anchor]": "now", "expires_after[seconds]": "3600"},
            Fault(400, "'now' is not one of ['created_at'] - 'expires_after[anchor]'", "expires_after[anchor]"),
        ),
    ],
)
@pytest.mark.parametrize("file_first", [False, True])
async def test_bad_fields(server: Server, wire: Wire, fields: dict[str, str], fault: Fault, file_first: bool):
    """They are refused in the words of the older validator, before the file and after it, and nothing is kept."""
    parts: list[tuple[str, Any]] = [(name, (None, value)) for name, value in {"purpose": "vision", **fields}.items()]
    file = [("file", ("a.txt", bytes(2 * MEGABYTE)))]
    answer = await wire.ask("POST", "/files", files=file + parts if file_first else parts + file)
    assert answer.fault == fault
    assert blobs_in(server) == []
    assert await rows_of(server, "files") == await rows_of(server, "loose_blobs") == []


async def test_a_purpose_must_be_given(server: Server, wire: Wire):
    """Without one nothing is stored; nor without a file."""
    answer = await wire.ask("POST", "/files", files={"file": ("a.txt", b"x")})
    assert answer.fault == Fault(400, "'purpose' is a required property")
    answer = await wire.ask("POST", "/files", files={"purpose": (None, "assistants")})
    assert answer.fault == Fault(400, "'file' is a required property")
    assert (await wire.post("/files", {"purpose": "assistants"})).fault == Fault(
        400, "Invalid Content-Type header (application/json), expected multipart/form-data."
    )
    assert blobs_in(server) == []


async def test_a_file_has_its_limit(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """A file of `max_file_mb` is stored, though a JSON body may not be so long; one byte more is a 413."""
    async with start_server(tmp_path, max_file_mb=3, max_body_mb=1) as server:
        wire = connect(server)
        assert (await made(wire, bytes(3 * MEGABYTE)))["bytes"] == 3 * MEGABYTE
        before = blobs_in(server)
        for data in (bytes(3 * MEGABYTE + 1), bytes(5 * MEGABYTE)):
            assert (await upload(wire, data)).fault == Fault(413, "The file is larger than 3 MB.")

        async def parts() -> AsyncIterator[bytes]:
            yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
            for _ in range(50):
                yield bytes(MEGABYTE // 10)

        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = await wire.ask("POST", "/files", content=parts(), headers=headers)
        assert answer.fault == Fault(413, "The file is larger than 3 MB.")
        assert blobs_in(server) == before
        with pytest.raises(openai.APIStatusError) as raised:
            await server.client.files.create(file=("big", bytes(4 * MEGABYTE)), purpose="assistants")
        assert raised.value.status_code == 413


async def test_a_broken_form_leaves_nothing(server: Server, wire: Wire):
    """A form that ends in the middle of its file is a 400, and what was stored of it is gone."""
    head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = await wire.ask("POST", "/files", content=head + bytes(3 * MEGABYTE), headers=headers)
    assert answer.fault == Fault(400, "Could not parse the multipart form: it ends before its last boundary.")
    await until(lambda: blobs_in(server) == [])
    assert await rows_of(server, "loose_blobs") == []


async def begun_upload(server: Server) -> asyncio.StreamWriter:
    """A client that has sent some of a file, and keeps silent."""
    port = int(server.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    form = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer k\r\ncontent-length: 9000000\r\n"
        b"content-type: multipart/form-data; boundary=b\r\n\r\n" + form + bytes(5 * MEGABYTE)
    )
    await writer.drain()
    await until(lambda: blobs_in(server))
    return writer


async def test_a_client_that_goes_away_leaves_nothing(server: Server):
    """When the connection ends in the middle of a file, no bytes stay and no row."""
    writer = await begun_upload(server)
    assert blobs_in(server)[0].endswith("#1")
    writer.close()
    await until(lambda: blobs_in(server) == [])
    async with asyncio.timeout(10):
        while await rows_of(server, "loose_blobs"):
            await asyncio.sleep(0.001)
    assert await rows_of(server, "files") == []


async def test_uploads_at_once_do_not_mix(server: Server, wire: Wire):
    """Files that are sent side by side keep their own bytes and names, and come in one order."""
    data = [os.urandom(100_000) for _ in range(10)]
    found = await asyncio.gather(*(made(wire, part, f"{number}.bin") for number, part in enumerate(data)))
    for number, file in enumerate(found):
        assert file["filename"] == f"{number}.bin"
        assert (await content(wire, file["id"])).content == data[number]
    assert len((await wire.get("/files")).ids) == 10


async def test_an_upload_is_written_with_what_it_was(server: Server, wire: Wire):
    """The request's row has a hash of what was sent, the same for the same file whatever the boundary."""
    first, second = await made(wire, b"same"), await made(wire, b"same")
    await made(wire, b"other")
    rows = await server.house.store.read(
        lambda tx: tx.fetch("SELECT object_id, route, body_hash FROM requests ORDER BY created_at, object_id")
    )
    hashes = {object_id: body_hash for object_id, route, body_hash in rows if route == "create_file"}
    assert hashes[first["id"]] == hashes[second["id"]]
    assert len(set(hashes.values())) == 2


# --- lists -----------------------------------------------------------------------------------------------------


async def test_files_are_listed_by_purpose_and_in_pages(server: Server, wire: Wire):
    """Newest first unless asked otherwise; `purpose` filters, and the client's pager walks through all."""
    first = [await made(wire, name=f"{number}.txt") for number in range(3)]
    other = await made(wire, name="v.png", purpose="vision")
    newest_first = [other["id"], *(file["id"] for file in reversed(first))]
    assert (await wire.get("/files")).ids == newest_first
    assert (await wire.get("/files?order=asc")).ids == newest_first[::-1]
    assert (await wire.get("/files?purpose=vision")).ids == [other["id"]]
    assert (await wire.get("/files?purpose=assistants_output")).ids == []
    assert [file.id async for file in server.client.files.list(limit=1)] == newest_first
    page = await wire.read(f"/files?limit=2&after={newest_first[0]}")
    assert ([file["id"] for file in page["data"]], page["has_more"]) == (newest_first[1:3], True)


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("limit=0", Fault(400, "0 is less than the minimum of 1 - 'limit'")),
        ("limit=10001", Fault(400, "10001 is greater than the maximum of 10000 - 'limit'")),
        ("limit=abc", Fault(400, "'abc' is not of type 'integer' - 'limit'")),
        ("order=up", Fault(400, "'up' is not one of ['asc', 'desc'] - 'order'", "order")),
        ("after=file-x", Fault(404, "Resource not found.", "after")),
    ],
)
async def test_bad_queries_of_a_list(wire: Wire, query: str, fault: Fault):
    """They are refused in the words of the older validator; a cursor that names nothing is not found."""
    assert (await wire.get(f"/files?{query}")).fault == fault


async def test_a_list_holds_ten_thousand(wire: Wire):
    """The largest limit is taken, and is the default."""
    assert (await wire.read("/files?limit=10000"))["data"] == []


# --- downloads -------------------------------------------------------------------------------------------------


async def test_a_browser_never_shows_a_file(wire: Wire):
    """Whatever a file claims to be, it is sent as bytes to be saved."""
    file = await made(wire, b"<script>alert(1)</script>", "page.html")
    headers = (await content(wire, file["id"])).headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"] == "attachment; filename=\"page.html\"; filename*=UTF-8''page.html"
    assert headers["content-length"] == "25"


async def test_a_name_cannot_break_out_of_the_header(wire: Wire):
    """Quotes, line ends and percent signs of a name are harmless in the download's header."""
    file = await made(wire, b"x", 'a"\r\nset-cookie: x=y;b%.txt')
    assert file["filename"] == 'a"\r\nset-cookie: x=y;b%.txt'
    headers = (await content(wire, file["id"])).headers
    assert "set-cookie" not in headers
    assert headers["content-disposition"] == (
        'attachment; filename="a___set-cookie: x=y;b_.txt"; '
        "filename*=UTF-8''a%22%0D%0Aset-cookie%3A%20x%3Dy%3Bb%25.txt"
    )


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-", 5, 3_000_000),
        ("bytes=1048570-1048580", 1_048_570, 1_048_581),
        ("bytes=-7", 2_999_993, 3_000_000),
        ("bytes=-99999999", 0, 3_000_000),
        ("bytes=2999999-99999999", 2_999_999, 3_000_000),
    ],
)
async def test_a_range_can_be_had(wire: Wire, wanted: str, start: int, end: int):
    """One range is answered with 206 and those bytes."""
    data = os.urandom(3_000_000)
    file = await made(wire, data)
    answer = await content(wire, file["id"], range=wanted)
    assert (answer.status, answer.content) == (206, data[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"


@pytest.mark.parametrize("wanted", ["bytes=0-1,3-4", "bytes=5-3", "bytes=-", "lines=1-2", "bytes=a-b"])
async def test_what_is_no_single_range_is_ignored(wire: Wire, wanted: str):
    """The whole file is sent then, and also when the client means another file."""
    file = await made(wire, b"0123456789")
    for headers in ({"range": wanted}, {"range": "bytes=1-2", "if-range": '"file-other"'}):
        answer = await content(wire, file["id"], **headers)
        assert (answer.status, answer.content) == (200, b"0123456789")
    answer = await content(wire, file["id"], range="bytes=1-2", **{"if-range": f'"{file["id"]}"'})
    assert (answer.status, answer.content) == (206, b"12")


@pytest.mark.parametrize("wanted", ["bytes=10-", "bytes=-0", "bytes=99-100"])
async def test_a_range_beyond_the_end(wire: Wire, wanted: str):
    """It is a 416 that tells the size."""
    file = await made(wire, b"0123456789")
    answer = await content(wire, file["id"], range=wanted)
    assert answer.fault == Fault(416, "The file has 10 bytes, and none in this range.")
    assert answer.headers["content-range"] == "bytes */10"


async def test_a_head_tells_the_size(wire: Wire):
    """HEAD has the headers of the download and no bytes."""
    file = await made(wire, b"0123456789")
    answer = await wire.ask("HEAD", f"/files/{file['id']}/content")
    assert (answer.status, answer.headers["content-length"], answer.content) == (200, "10", b"")


async def test_bytes_that_are_lost_are_told_of(server: Server, wire: Wire):
    """When the folder has lost a file's bytes, the download is a 503 in the API's form, and the row can be deleted."""
    file = await made(wire)
    [blob] = blobs_in(server)
    (Path(server.house.settings.data) / "blobs" / blob).unlink()
    assert (await content(wire, file["id"])).fault == Fault(503, "The contents of this file are missing on the server.")
    assert (await wire.delete(f"/files/{file['id']}")).status == 200


# --- expiry ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def at_a_time(
    start_server: ServerFactory, connect: Callable[..., Wire], folder: Path, clock: SetClock
) -> AsyncIterator[tuple[Server, Wire]]:
    async with start_server(folder, clock=clock) as server:
        yield server, connect(server)


async def test_a_file_expires(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """From its time on it is nowhere to be found, and the next tidying deletes row and bytes."""
    clock = SetClock()
    async with at_a_time(start_server, connect, tmp_path, clock) as (server, wire):
        lasting = await made(wire)
        expires = {"anchor": "created_at", "seconds": 3600}
        file = await server.client.files.create(file=("a", b"x"), purpose="vision", expires_after=expires)  # type: ignore[arg-type]
        assert file.expires_at == file.created_at + 3600
        clock.time += 3599
        assert (await wire.get(f"/files/{file.id}")).status == 200
        clock.time += 1
        for path in (f"/files/{file.id}", f"/files/{file.id}/content"):
            assert (await wire.get(path)).fault == Fault(404, f"No such File object: {file.id}", "id")
        assert (await wire.delete(f"/files/{file.id}")).status == 404
        assert (await wire.get("/files")).ids == [lasting["id"]]
        assert (await wire.get(f"/files?after={file.id}")).status == 404
        body = {"tool_resources": {"code_interpreter": {"file_ids": [file.id]}}}
        assert (await wire.post("/threads", body)).status == 404
        assert len(blobs_in(server)) == 2
        await files.tidy_files(server.house)
        assert [blob.rpartition("/")[2] for blob in blobs_in(server)] == [lasting["id"]]
        assert len(await rows_of(server, "files")) == 1


async def test_a_batch_file_expires_by_itself(wire: Wire):
    """The purpose `batch` means 30 days, unless the caller says otherwise."""
    file = await made(wire, purpose="batch")
    assert file["expires_at"] == file["created_at"] + 30 * 24 * 3600
    said = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = await made(wire, purpose="batch", **said)
    assert file["expires_at"] == file["created_at"] + 3600


async def test_an_expired_file_leaves_the_lists(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """When it is swept, assistants and threads name it no longer."""
    clock = SetClock()
    async with at_a_time(start_server, connect, tmp_path, clock) as (server, wire):
        expires = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        file, lasting = await made(wire, **expires), await made(wire)
        resources = {"code_interpreter": {"file_ids": [file["id"], lasting["id"]]}}
        thread = await wire.made("/threads", {"tool_resources": resources})
        clock.time += 3600
        await files.tidy_files(server.house)
        left = {"code_interpreter": {"file_ids": [lasting["id"]]}}
        assert (await wire.read(f"/threads/{thread['id']}"))["tool_resources"] == left


# --- deleting --------------------------------------------------------------------------------------------------


async def test_deleting_a_file_takes_it_out_of_every_list(wire: Wire):
    """Assistants and threads that name it for the code interpreter name only the others afterwards."""
    file, other = await made(wire), await made(wire)
    resources = {"code_interpreter": {"file_ids": [file["id"], other["id"]]}}
    assistant = await wire.made("/assistants", {"model": "m", "tool_resources": resources})
    thread = await wire.made("/threads", {"tool_resources": resources})
    attached = {"role": "user", "content": "x", "attachments": [attachment(file["id"])]}
    with_message = await wire.made("/threads", {"messages": [attached]})
    changed = await wire.made("/threads", {"tool_resources": resources})
    await wire.made(f"/threads/{changed['id']}", {"tool_resources": None})
    assert (await wire.delete(f"/files/{file['id']}")).status == 200
    left = {"code_interpreter": {"file_ids": [other["id"]]}}
    assert (await wire.read(f"/assistants/{assistant['id']}"))["tool_resources"] == left
    assert (await wire.read(f"/threads/{thread['id']}"))["tool_resources"] == left
    none = {"code_interpreter": {"file_ids": []}}
    assert (await wire.read(f"/threads/{with_message['id']}"))["tool_resources"] == none
    assert (await wire.read(f"/threads/{changed['id']}"))["tool_resources"] == {}


async def test_deleting_a_thread_or_an_assistant_keeps_the_files(server: Server, wire: Wire):
    """The files stay, and nothing of who named them is left behind."""
    file = await made(wire)
    resources = {"code_interpreter": {"file_ids": [file["id"]]}}
    assistant = await wire.made("/assistants", {"model": "m", "tool_resources": resources})
    thread = await wire.made("/threads", {"tool_resources": resources})
    placed = PlacedFile("a.txt", file["id"], 5, file["id"])
    await server.house.store.write(lambda tx: file_rows.put_sandbox_file(tx, "default", thread["id"], placed, 1))
    assert len(await rows_of(server, "file_uses")) == 2
    await wire.delete(f"/threads/{thread['id']}")
    await wire.delete(f"/assistants/{assistant['id']}")
    assert (await content(wire, file["id"])).content == b"hello"
    assert await rows_of(server, "file_uses") == await rows_of(server, "sandbox_files") == []


async def test_of_many_who_delete_one_succeeds(server: Server, wire: Wire):
    """Deletes at the same time: one is told that it is deleted, the others that it is not there."""
    file = await made(wire)
    answers = await asyncio.gather(*(wire.delete(f"/files/{file['id']}") for _ in range(10)))
    assert sorted(answer.status for answer in answers) == [200] + [404] * 9
    assert blobs_in(server) == []
    assert await rows_of(server, "loose_blobs") == []


# --- crashes ---------------------------------------------------------------------------------------------------


async def test_files_survive_a_restart(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """What was acknowledged is there at the next start, with its bytes."""
    async with start_server(tmp_path) as server:
        file = await made(connect(server), b"kept")
    async with start_server(tmp_path) as server:
        wire = connect(server)
        assert await wire.read(f"/files/{file['id']}") == file
        assert (await content(wire, file["id"])).content == b"kept"


@pytest.mark.usefixtures("on_sqlite")  # others may be writing them, where there are others
async def test_bytes_without_a_file_go_at_the_next_start(
    start_server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A crash between bytes and row, in the middle of the bytes, or while deleting, leaves nothing for long."""

    async def crashes(*_: Any) -> Any:
        raise KeyError("the process dies here")

    async def nothing(*_: Any) -> bool:
        return False

    async with start_server(tmp_path) as server:
        kept = await server.client.files.create(file=("kept", b"x"), purpose="vision")
        deleted = await server.client.files.create(file=("deleted", b"x"), purpose="vision")
        with monkeypatch.context() as patch:
            patch.setattr(files, "delete_loose", nothing)
            await server.client.files.delete(deleted.id)
            patch.setattr(files, "insert_file", crashes)
            with pytest.raises(openai.InternalServerError):
                await server.client.files.create(file=("lost", b"x"), purpose="vision")
        [(_, lost, _)] = [row for row in await rows_of(server, "loose_blobs") if deleted.id not in row[1]]
        unfinished = Path(tmp_path, "blobs", f"{lost}#1")
        unfinished.write_bytes(b"x")
        assert len(blobs_in(server)) == 4
    async with start_server(tmp_path) as server:
        assert [blob.rpartition("/")[2] for blob in blobs_in(server)] == [kept.id]
        assert await rows_of(server, "loose_blobs") == []
        assert (await server.client.files.content(kept.id)).read() == b"x"


async def test_what_is_being_written_is_not_swept(server: Server):
    """Tidying leaves alone what somebody is still sending."""
    writer = await begun_upload(server)
    await files.tidy_files(server.house)
    assert len(blobs_in(server)) == 1
    assert len(await rows_of(server, "loose_blobs")) == 1
    writer.close()
    await until(lambda: blobs_in(server) == [])


# --- projects --------------------------------------------------------------------------------------------------


async def test_a_project_sees_its_own_files_only(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Another project can neither read, list, attach, show, use as a cursor nor delete a file."""
    async with start_server(tmp_path, api_keys="sk-a:a,sk-b:b") as server:
        ours, theirs = connect(server, key="sk-a"), connect(server, key="sk-b")
        file_id = (await made(ours))["id"]
        gone = Fault(404, f"No such File object: {file_id}", "id")
        for path in (f"/files/{file_id}", f"/files/{file_id}/content"):
            assert (await theirs.get(path)).fault == gone
        assert (await theirs.delete(f"/files/{file_id}")).fault == gone
        assert (await theirs.get("/files")).ids == []
        assert (await theirs.get(f"/files?after={file_id}")).status == 404
        resources = {"tool_resources": {"code_interpreter": {"file_ids": [file_id]}}}
        image = {"type": "image_file", "image_file": {"file_id": file_id}}
        messages = (
            {"role": "user", "content": "x", "attachments": [attachment(file_id)]},
            {"role": "user", "content": [image]},
        )
        for path, body in (
            ("/threads", resources),
            ("/assistants", {"model": "m", **resources}),
            *(("/threads", {"messages": [message]}) for message in messages),
        ):
            assert (await theirs.post(path, body)).fault == gone
        with pytest.raises(BlobMissing):
            await anext(files.read_file(server.house, "b", file_id))
        assert (await content(ours, file_id)).content == b"hello"


# --- attachments and resources ---------------------------------------------------------------------------------


def attachment(file_id: str, *tools: str) -> Json:
    return {"file_id": file_id, "tools": [{"type": tool} for tool in tools or ("code_interpreter",)]}


async def test_an_attachment_for_code_is_given_to_the_thread(wire: Wire):
    """Each file once, in order, behind what the thread has; one for file search stays with its message."""
    ids = [(await made(wire))["id"] for _ in range(4)]
    thread = await wire.made("/threads", {"tool_resources": {"code_interpreter": {"file_ids": ids[:1]}}})
    path = f"/threads/{thread['id']}"
    attachments = [attachment(ids[2]), attachment(ids[0]), attachment(ids[2], "file_search", "code_interpreter")]
    message = await wire.made(f"{path}/messages", {"role": "user", "content": "hi", "attachments": attachments})
    assert message["attachments"] == attachments
    search = [attachment(ids[1], "file_search"), {"file_id": ids[3]}]
    await wire.made(f"{path}/messages", {"role": "user", "content": "hi", "attachments": search})
    resources = (await wire.read(path))["tool_resources"]
    assert resources["code_interpreter"] == {"file_ids": [ids[0], ids[2]]}
    assert resources.keys() == {"code_interpreter", "file_search"}


async def test_a_new_thread_shows_what_its_messages_attach(server: Server, wire: Wire):
    """Both alone and with a run, the answer and what is read later are the same."""
    file_id = (await made(wire))["id"]
    messages = [{"role": "user", "content": "hi", "attachments": [attachment(file_id)]}]
    thread = await wire.made("/threads", {"messages": messages})
    assert thread["tool_resources"] == {"code_interpreter": {"file_ids": [file_id]}}
    assert await wire.read(f"/threads/{thread['id']}") == thread
    assistant = await server.assistant()
    server.model.will(says("Hi."))
    run = await wire.made("/threads/runs", {"assistant_id": assistant.id, "thread": {"messages": messages}})
    assert (await wire.read(f"/threads/{run['thread_id']}"))["tool_resources"] == thread["tool_resources"]
    await wire.stopped(run)


async def test_additional_messages_attach_as_well(server: Server, wire: Wire):
    """Files that come with a run are the thread's from then on."""
    file_id = (await made(wire))["id"]
    thread = await wire.made("/threads")
    more = [{"role": "user", "content": "hi", "attachments": [attachment(file_id)]}]
    body = {"assistant_id": (await server.assistant()).id, "additional_messages": more}
    server.model.will(says("Hi."))
    await wire.stopped(await wire.made(f"/threads/{thread['id']}/runs", body))
    resources = (await wire.read(f"/threads/{thread['id']}"))["tool_resources"]
    assert resources == {"code_interpreter": {"file_ids": [file_id]}}


async def test_a_thread_has_twenty_files_for_code(wire: Wire):
    """The attachment that would be the twenty-first is refused, with its message."""
    ids = [(await made(wire))["id"] for _ in range(21)]
    thread = await wire.made("/threads", {"tool_resources": {"code_interpreter": {"file_ids": ids[:19]}}})
    path = f"/threads/{thread['id']}/messages"
    await wire.made(path, {"role": "user", "content": "x", "attachments": [attachment(ids[0]), attachment(ids[19])]})
    answer = await wire.post(path, {"role": "user", "content": "x", "attachments": [attachment(ids[20])]})
    assert answer.fault == Fault(
        400,
        "Invalid 'attachments': too many files. The code interpreter of a thread takes at most 20 files, and with these"
        " it would have 21.",
        "attachments",
    )
    assert len((await wire.get(path)).ids) == 1


async def test_resources_name_files_that_are_there(wire: Wire):
    """Each once, in the order given; modifying replaces them."""
    first, second = [(await made(wire))["id"] for _ in range(2)]
    for path, body in (("/threads", {}), ("/assistants", {"model": "m"})):
        given = {"code_interpreter": {"file_ids": [second, first, second]}}
        created = await wire.made(path, {**body, "tool_resources": given})
        assert created["tool_resources"] == {"code_interpreter": {"file_ids": [second, first]}}
        changed = {"code_interpreter": {"file_ids": [first]}}
        item = f"{path}/{created['id']}"
        assert (await wire.made(item, {"tool_resources": changed}))["tool_resources"] == changed
        bad = {"code_interpreter": {"file_ids": [first, "file-x"]}}
        assert (await wire.post(item, {"tool_resources": bad})).fault == Fault(404, "No such File object: file-x", "id")


# --- what the code interpreter does with them ------------------------------------------------------------------


async def once(data: bytes, then: Exception | None = None) -> AsyncIterator[bytes]:
    yield data
    if then is not None:
        raise then


async def nothing(tx: Transaction, file: File) -> None:
    """There is no more to be noted with it."""


async def test_outputs_are_files_that_can_be_downloaded(server: Server, wire: Wire):
    """They have the purpose `assistants_output`, and are read again in pieces."""
    file = await files.store_output(server.house, "default", "plot.png", once(PNG), nothing)
    assert (file.purpose, file.bytes, file.filename) == ("assistants_output", len(PNG), "plot.png")
    assert (await wire.read(f"/files/{file.id}"))["purpose"] == "assistants_output"
    assert (await wire.get("/files?purpose=assistants_output")).ids == [file.id]
    assert (await content(wire, file.id)).content == PNG
    assert b"".join([chunk async for chunk in files.read_file(server.house, "default", file.id)]) == PNG


async def test_an_output_that_breaks_off_is_not_kept(server: Server):
    """What the session raises is raised, and no row and no bytes stay."""
    with pytest.raises(FileNotFoundError):
        await files.store_output(server.house, "default", "x", once(PNG, FileNotFoundError("gone")), nothing)
    assert blobs_in(server) == []
    assert await rows_of(server, "loose_blobs") == await rows_of(server, "files") == []


async def test_names_below_mnt_data(server: Server, wire: Wire):
    """A name stands for one file; code changes it and keeps its input; a deleted file frees its names."""
    store = server.house.store
    given, made_by_code = (await made(wire))["id"], (await made(wire))["id"]

    async def put(*placed: PlacedFile) -> list[PlacedFile]:
        async def work(tx: Transaction) -> list[PlacedFile]:
            for file in placed:
                await file_rows.put_sandbox_file(tx, "default", "thread_1", file, 1)
            return await file_rows.list_sandbox_files(tx, "default", "thread_1")

        return await store.write(work)

    first = [PlacedFile("in.csv", given, 5, given), PlacedFile("out.csv", made_by_code, 7, None)]
    assert await put(*first) == first
    changed = PlacedFile("in.csv", made_by_code, 7, None)
    assert await put(changed) == [changed._replace(input_id=given), first[1]]
    names = ["in.csv", "out.csv", "none"]
    await store.write(lambda tx: file_rows.forget_outputs(tx, "default", "thread_1", names))
    assert await put() == [changed._replace(input_id=given)]
    await put(first[1])
    assert await store.read(lambda tx: file_rows.list_sandbox_files(tx, "other", "thread_1")) == []
    await store.write(lambda tx: file_rows.delete_sandbox_files(tx, "default", "thread_1", ["out.csv"]))
    assert await put() == [changed._replace(input_id=given)]
    await wire.delete(f"/files/{given}")
    assert await put() == []


async def test_files_are_had_by_id_in_order(server: Server, wire: Wire):
    """Those that are there, in the order asked for."""
    ids = [(await made(wire))["id"] for _ in range(3)]
    asked = [ids[2], "file-x", ids[0]]
    found = await server.house.store.write(lambda tx: file_rows.hold_files(tx, "default", asked, 0))
    assert list(found) == [ids[2], ids[0]]
    assert await server.house.store.write(lambda tx: file_rows.hold_files(tx, "other", asked, 0)) == {}
