"""/v1/uploads by the official client and by hand: parts, order, checks, and what is left on the disk."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow import uploads
from afterglow.api.edge import MAX_PART_MB
from afterglow.contracts import Transaction
from afterglow.files import Stored
from afterglow.testing import SetClock
from tests.api.wire import Answer, Fault, Json, Wire
from tests.conftest import Server, ServerFactory

HOUR_S = 3600
TEXT = b"The quick brown fox jumps over the lazy dog."


async def begin(wire: Wire, size: int = len(TEXT), **fields: Any) -> Json:
    body = {"filename": "a.txt", "purpose": "assistants", "bytes": size, "mime_type": "text/plain", **fields}
    return await wire.made("/uploads", body)


async def send(wire: Wire, upload_id: str, data: bytes) -> Answer:
    return await wire.ask("POST", f"/uploads/{upload_id}/parts", files={"data": ("upload", data)})


async def sent(wire: Wire, upload_id: str, data: bytes) -> str:
    answer = await send(wire, upload_id, data)
    assert answer.status == 200, answer.content
    return str(answer.json["id"])


def blobs_in(server: Server) -> list[str]:
    folder = Path(server.house.settings.data, "blobs")
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


async def rows_of(server: Server, table: str) -> list[Any]:
    async def work(tx: Transaction) -> list[Any]:
        return await tx.fetch(f"SELECT * FROM {table}")

    return await server.house.store.read(work)


# --- the story -------------------------------------------------------------------------------------------------


async def test_the_sdk_uploads_in_parts(server: Server):
    """create, parts, complete: the file is whole, has the name and purpose that were said, and can be used."""
    client = server.client
    upload = await client.uploads.create(
        filename="fox.txt", purpose="assistants", bytes=len(TEXT), mime_type="text/plain"
    )
    assert (upload.status, upload.file, upload.expires_at) == ("pending", None, upload.created_at + HOUR_S)
    halves = TEXT[:20], TEXT[20:]
    parts = [await client.uploads.parts.create(upload.id, data=half) for half in halves]
    assert {(part.object, part.upload_id) for part in parts} == {("upload.part", upload.id)}
    md5 = hashlib.md5(TEXT).hexdigest()
    done = await client.uploads.complete(upload.id, part_ids=[part.id for part in parts], md5=md5)
    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.filename, done.file.purpose, done.file.bytes) == ("fox.txt", "assistants", len(TEXT))
    assert (await client.files.content(done.file.id)).read() == TEXT
    assert (await client.files.list()).data == [done.file]
    assert blobs_in(server) == [done.file.id]
    store = await client.vector_stores.create()
    file = await client.vector_stores.files.create_and_poll(done.file.id, vector_store_id=store.id, poll_interval_ms=5)
    assert file.status == "completed"


async def test_the_sdk_uploads_a_file_in_chunks(server: Server):
    """upload_file_chunked, which reads a file from the disk."""
    done = await server.client.uploads.upload_file_chunked(
        file=TEXT, filename="fox.txt", bytes=len(TEXT), mime_type="text/plain", purpose="user_data", part_size=7
    )
    assert done.file is not None
    assert (await server.client.files.content(done.file.id)).read() == TEXT


async def test_parts_come_in_any_order(server: Server, wire: Wire):
    """At the same time as well; `part_ids` says which come where, and the others are dropped."""
    upload = await begin(wire)
    pieces = [TEXT[at : at + 9] for at in range(0, len(TEXT), 9)]
    ids = await asyncio.gather(*(sent(wire, upload["id"], piece) for piece in [*reversed(pieces), b"another try"]))
    assert len(blobs_in(server)) == len(pieces) + 1
    done = await wire.made(f"/uploads/{upload['id']}/complete", {"part_ids": ids[-2::-1]})
    assert done == upload | {"status": "completed", "file": done["file"]}
    assert (await wire.get(f"/files/{done['file']['id']}/content")).content == TEXT
    assert blobs_in(server) == [done["file"]["id"]]
    assert await rows_of(server, "upload_parts") == await rows_of(server, "loose_blobs") == []


async def test_what_was_said_is_checked(server: Server, wire: Wire):
    """Bytes, md5, parts that are not there or named twice: refused, and the upload goes on as it was."""
    upload, other = await begin(wire), await begin(wire)
    first, second = await sent(wire, upload["id"], TEXT[:20]), await sent(wire, upload["id"], TEXT[20:])
    foreign = await sent(wire, other["id"], TEXT)
    path = f"/uploads/{upload['id']}/complete"
    md5 = hashlib.md5(TEXT).hexdigest()
    before = blobs_in(server)
    for body, fault in (
        (
            {"part_ids": [first]},
            Fault(400, f"The parts have 20 bytes together, and the upload was to have {len(TEXT)}."),
        ),
        ({"part_ids": [first, first]}, Fault(400, "A part is named twice - 'part_ids'")),
        ({"part_ids": [first, "part_x"]}, Fault(404, "No part found with id 'part_x'.")),
        ({"part_ids": [foreign]}, Fault(404, f"No part found with id '{foreign}'.")),
        (
            {"part_ids": [first, second], "md5": "0" * 32},
            Fault(400, f"The file's md5 is {md5}, and the request says {'0' * 32}."),
        ),
    ):
        assert (await wire.post(path, body)).fault == fault
    assert blobs_in(server) == before
    assert (await wire.get("/files")).ids == []
    done = await wire.made(path, {"part_ids": [first, second], "md5": md5.upper()})
    assert done["status"] == "completed"


async def test_a_closed_upload_takes_nothing_more(server: Server, wire: Wire):
    """Completed or cancelled: no parts, no completing, no cancelling; a cancel deletes the parts."""
    done, cancelled = await begin(wire), await begin(wire)
    part = await sent(wire, done["id"], TEXT)
    await sent(wire, cancelled["id"], TEXT)
    file = (await wire.made(f"/uploads/{done['id']}/complete", {"part_ids": [part]}))["file"]
    assert await wire.made(f"/uploads/{cancelled['id']}/cancel") == cancelled | {"status": "cancelled"}
    assert blobs_in(server) == [file["id"]]
    for upload, status in ((done, "completed"), (cancelled, "cancelled")):
        path = f"/uploads/{upload['id']}"
        assert (await send(wire, upload["id"], TEXT)).fault == Fault(
            400, f"Cannot add parts to upload with status '{status}'."
        )
        completing = await wire.post(f"{path}/complete", {"part_ids": [part]})
        assert completing.fault == Fault(400, f"Cannot complete upload with status '{status}'.")
        assert (await wire.post(f"{path}/cancel")).fault == Fault(400, f"Cannot cancel upload with status '{status}'.")
    assert blobs_in(server) == [file["id"]]
    for method, end, body in (("POST", "/cancel", None), ("POST", "/complete", {"part_ids": ["x"]})):
        answer = await wire.ask(method, f"/uploads/upload_x{end}", body)
        assert answer.fault == Fault(404, "No upload found with id 'upload_x'.")
    assert (await send(wire, "upload_x", TEXT)).fault == Fault(404, "No upload found with id 'upload_x'.")


async def test_an_upload_lives_for_an_hour(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Then it takes nothing more; its parts are deleted some time later, not under the hands of who completes it."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        wire = connect(server)
        upload = await begin(wire)
        part = await sent(wire, upload["id"], TEXT)
        clock.time += HOUR_S
        completing = await wire.post(f"/uploads/{upload['id']}/complete", {"part_ids": [part]})
        assert completing.fault == Fault(400, "Cannot complete upload with status 'expired'.")
        await uploads.tidy_uploads(server.house)
        assert blobs_in(server) == [part]
        clock.time += HOUR_S + 1
        await uploads.tidy_uploads(server.house)
        assert blobs_in(server) == []
        assert (await send(wire, upload["id"], TEXT)).fault.message.endswith("with status 'expired'.")


async def test_two_that_complete_at_once_make_one_file(server: Server, wire: Wire):
    """One is told that it was too late, and leaves nothing behind."""
    upload = await begin(wire)
    part = await sent(wire, upload["id"], TEXT)
    path = f"/uploads/{upload['id']}/complete"
    answers = await asyncio.gather(*(wire.post(path, {"part_ids": [part]}) for _ in range(2)))
    assert sorted(answer.status for answer in answers) == [200, 400]
    assert blobs_in(server) == (await wire.get("/files")).ids


async def test_a_cancel_while_it_is_put_together_is_said(server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch):
    """Its parts are gone then: that is the caller's doing, no fault of the server's, and not to be tried again."""
    upload = await begin(wire)
    part = await sent(wire, upload["id"], TEXT)
    storing = uploads.storing

    @asynccontextmanager
    async def after_a_cancel(*args: Any) -> AsyncGenerator[Stored, None]:
        await wire.made(f"/uploads/{upload['id']}/cancel")
        async with storing(*args) as stored:
            yield stored

    monkeypatch.setattr(uploads, "storing", after_a_cancel)
    answer = await wire.post(f"/uploads/{upload['id']}/complete", {"part_ids": [part]})
    assert answer.fault == Fault(400, "Cannot complete upload with status 'cancelled'.")
    assert blobs_in(server) == []


async def test_parts_survive_a_restart(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """An upload goes on where it was."""
    async with start_server(tmp_path) as server:
        upload = await begin(connect(server))
        first = await sent(connect(server), upload["id"], TEXT[:20])
    async with start_server(tmp_path) as server:
        wire = connect(server)
        second = await sent(wire, upload["id"], TEXT[20:])
        done = await wire.made(f"/uploads/{upload['id']}/complete", {"part_ids": [first, second]})
        assert (await wire.get(f"/files/{done['file']['id']}/content")).content == TEXT


# --- bodies ----------------------------------------------------------------------------------------------------


BAD_UPLOADS: list[Any] = [
    ({"bytes": "abc"}, "'abc' is not of type 'integer' - 'bytes'", None),
    ({"bytes": 1.5}, "1.5 is not of type 'integer' - 'bytes'", None),
    ({"bytes": 0}, "0 is less than the minimum of 1 - 'bytes'", None),
    ({"bytes": 2**40}, f"{2**40} is greater than the maximum of {8 * 1024**3} - 'bytes'", None),
    (
        {"purpose": "bogus"},
        "'bogus' is not one of ['fine-tune', 'assistants', 'batch', 'user_data', 'vision', 'evals'] - 'purpose'",
        "purpose",
    ),
    ({"filename": 5}, "5 is not of type 'string' - 'filename'", None),
    ({"filename": ""}, "'' is too short - 'filename'", None),
    ({"filename": "a/.."}, "'a/..' is not the name of a file - 'filename'", None),
    ({"x": 1}, "Additional properties are not allowed ('x' was unexpected)", None),
    (
        {"expires_after": {"anchor": "created_at", "seconds": 1}},
        "1 is less than the minimum of 3600 - 'expires_after.seconds'",
        None,
    ),
    ({"expires_after": {"anchor": "created_at"}}, "'seconds' is a required property", None),
]


async def test_a_bad_upload_is_refused(wire: Wire):
    """In the words of the older validator, which has no codes."""
    for fields, message, param in BAD_UPLOADS:
        body = {"filename": "a.txt", "purpose": "assistants", "bytes": 1, "mime_type": "text/plain", **fields}
        assert (await wire.post("/uploads", body)).fault == Fault(400, message, param)


async def test_other_bad_bodies_are_refused(wire: Wire):
    """What is missing, what is no object, and lists of parts that are none."""
    upload = await begin(wire)
    path = f"/uploads/{upload['id']}/complete"
    for where, body, message in (
        ("/uploads", {"filename": "a.txt"}, "'purpose' is a required property"),
        ("/uploads", [], "[] is not of type 'object' - ''"),
        (path, {}, "'part_ids' is a required property"),
        (path, {"part_ids": "part_x"}, "'part_x' is not of type 'array' - 'part_ids'"),
        (path, {"part_ids": []}, "[] is too short - 'part_ids'"),
        (path, {"part_ids": [1]}, "1 is not of type 'string' - 'part_ids.0'"),
        (path, {"part_ids": ["part_x"], "md5": 1}, "1 is not of type 'string' - 'md5'"),
    ):
        assert (await wire.post(where, body)).fault.message == message
    assert (await wire.post("/uploads", b"{")).fault.message.startswith("We could not parse the JSON body")


async def test_a_part_is_a_form_with_data(server: Server, wire: Wire):
    """Under another name, or as JSON, it is none."""
    upload = await begin(wire)
    path = f"/uploads/{upload['id']}/parts"
    wrong = await wire.ask("POST", path, files={"file": ("upload", TEXT)})
    assert wrong.fault == Fault(400, "Additional properties are not allowed ('file' was unexpected)")
    assert (await wire.post(path, {"data": "x"})).fault.message.startswith("Invalid Content-Type header")
    assert blobs_in(server) == []


@pytest.mark.slow
async def test_a_part_has_64_megabytes(server: Server, wire: Wire):
    """It may be larger than other bodies; one of more than that is a 413."""
    size = server.house.settings.max_body_mb * 1024**2 + 1
    upload = await begin(wire, size)
    part = await sent(wire, upload["id"], bytes(size))
    assert (await send(wire, upload["id"], bytes(MAX_PART_MB * 1024**2 + 1))).status == 413
    assert blobs_in(server) == [part]


async def test_sizes_have_limits(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Of the whole, and of all parts together, used or not."""
    async with start_server(tmp_path, max_upload_mb=1) as server:
        wire = connect(server)
        fields = {"filename": "a", "purpose": "batch", "mime_type": "x", "bytes": 2**20 + 1}
        refused = await wire.post("/uploads", fields)
        assert refused.fault == Fault(400, f"{2**20 + 1} is greater than the maximum of 1 MB - 'bytes'")
        upload = await begin(wire)
        await sent(wire, upload["id"], bytes(2**20))
        full = Fault(400, "The parts of an upload can have 1 MB together.")
        assert (await send(wire, upload["id"], b"x")).fault == full
        assert len(blobs_in(server)) == 1


async def test_files_of_uploads_expire_as_files_do(server: Server, wire: Wire):
    """After `expires_after`, and those of purpose batch after 30 days; names come without folders."""
    expiry = {"anchor": "created_at", "seconds": 7200}
    for fields, life_s in (({"purpose": "batch"}, 30 * 24 * HOUR_S), ({"expires_after": expiry}, 7200), ({}, None)):
        upload = await begin(wire, filename="../C:\\x\\a.txt", **fields)
        assert upload["filename"] == "a.txt"
        part = await sent(wire, upload["id"], TEXT)
        file = (await wire.made(f"/uploads/{upload['id']}/complete", {"part_ids": [part]}))["file"]
        assert file["expires_at"] == (life_s and file["created_at"] + life_s)


async def test_another_key_cannot_use_an_upload(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """To another project it is not there, nor are its parts."""
    async with start_server(tmp_path, api_keys=("sk-a:a", "sk-b:b")) as server:
        ours, theirs = connect(server, "sk-a"), connect(server, "sk-b")
        upload = await begin(ours)
        part = await sent(ours, upload["id"], TEXT)
        missing = Fault(404, f"No upload found with id '{upload['id']}'.")
        assert (await send(theirs, upload["id"], TEXT)).fault == missing
        assert (await theirs.post(f"/uploads/{upload['id']}/complete", {"part_ids": [part]})).fault == missing
        own = await begin(theirs)
        stolen = await theirs.post(f"/uploads/{own['id']}/complete", {"part_ids": [part]})
        assert stolen.fault == Fault(404, f"No part found with id '{part}'.")


async def test_a_crash_while_completing_leaves_the_upload(server: Server, wire: Wire, monkeypatch: pytest.MonkeyPatch):
    """Bytes of the half-made file are deleted; the parts are still there, and completing works."""
    upload = await begin(wire)
    part = await sent(wire, upload["id"], TEXT)

    async def crashes(*_: Any) -> None:
        raise KeyError("the process dies here")

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "insert_file", crashes)
        with pytest.raises(openai.InternalServerError):
            await server.client.uploads.complete(upload["id"], part_ids=[part])
    assert blobs_in(server) == [part]
    assert (await wire.made(f"/uploads/{upload['id']}/complete", {"part_ids": [part]}))["status"] == "completed"
