"""What is deleted is gone: its text is in no table and, on SQLite, in no file of the data folder."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from afterglow.contracts import CellEnd, Logs, Transaction
from afterglow.finding import index_messages
from afterglow.runs import calling
from afterglow.testing import Write, calls, says
from afterglow.vector_stores import expire_stores
from tests.api.stores import settled, upload
from tests.api.streams import polled
from tests.api.wire import Wire
from tests.conftest import GET_WEATHER, Server, ServerFactory
from tests.endpoints import Answer, Endpoint, endpoint

WITH_CONTENT = "include[]=step_details.tool_calls[*].file_search.results[*].content"
OUTSIDE: Any = {"type": "function", "function": {"name": "outside", "parameters": {"type": "object"}}}
IMAGE = b"\x89PNG\r\n\x1a\n" + b"zqfile" * 20


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "PAUSE_S", 0.001)


@pytest.fixture
async def tool() -> AsyncGenerator[Endpoint, None]:
    async with endpoint() as made:
        made.will(Answer(b'{"output": "zqthread outside output"}'))
        yield made


@pytest.fixture
async def server(start_server: ServerFactory, tmp_path: Path) -> AsyncGenerator[Server, None]:
    settings = {"private_tools": True, "private_webhooks": True, "messages_while_active": True}
    async with start_server(tmp_path / "data", **settings) as running:
        yield running


async def tables(server: Server) -> dict[str, list[tuple[Any, ...]]]:
    """All that the database holds."""
    on_postgres = bool(server.house.settings.database_url)
    names = (
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        if on_postgres
        else "SELECT name FROM sqlite_master WHERE type = 'table'"
    )

    async def work(tx: Transaction) -> dict[str, list[tuple[Any, ...]]]:
        return {
            name: [tuple(row) for row in await tx.fetch(f"SELECT * FROM {name}")] for (name,) in await tx.fetch(names)
        }

    return await server.house.store.read(work)


async def where(server: Server, word: str) -> set[str]:
    """The tables that have a word, and the folders of the files that have it."""
    found = {
        table
        for table, rows in (await tables(server)).items()
        for row in rows
        for value in row
        if word.encode() in (bytes(value) if isinstance(value, bytes | memoryview) else str(value).encode())
    }
    data = Path(server.house.settings.data)
    for path in data.rglob("*"):
        if path.is_file() and path.parent != data and word.encode() in path.read_bytes():
            found.add(path.relative_to(data).parts[0] + "/")
    return found


class Made(NamedTuple):
    """Ids. message_id, answer_id: of two messages of the thread, the answer being a model's."""

    assistant_id: str
    thread_id: str
    message_id: str
    answer_id: str
    file_ids: list[str]
    store_id: str


async def post(wire: Wire, path: str, body: Any) -> Any:
    """With an idempotency key, so that the answer is kept."""
    answer = await wire.ask(
        "POST", path, body, headers={"idempotency-key": f"{path} {sha256(repr(body).encode()).hexdigest()}"[-255:]}
    )
    assert answer.status == 200, answer.content
    return answer.json


async def one_of_everything(server: Server, wire: Wire, tool: Endpoint) -> Made:
    """Each with a word of its own: `zqthread` is in all that hangs on the thread but for two of its messages."""
    await wire.made("/webhook_endpoints", {"url": f"{tool.url}/hook", "event_types": ["*"]})
    file_ids = await _files(server, wire)
    store_id = (await post(wire, "/vector_stores", {"name": "zqstore", "metadata": {"zqstore": "zqstore"}}))["id"]
    in_store = {"file_id": file_ids[1], "attributes": {"a": "zqattribute"}}
    await post(wire, f"/vector_stores/{store_id}/files", in_store)
    await settled(server, store_id)
    assistant = await post(
        wire,
        "/assistants",
        {
            "model": "gpt-4o",
            "name": "zqassistant",
            "instructions": "zqassistant",
            "metadata": {"a": "zqassistant"},
            "tools": [
                {"type": "code_interpreter"},
                {"type": "file_search"},
                GET_WEATHER,
                OUTSIDE | {"x-afterglow": {"url": f"{tool.url}/outside"}},
            ],
            "tool_resources": {
                "file_search": {"vector_store_ids": [store_id]},
                "code_interpreter": {"file_ids": [file_ids[0]]},
            },
        },
    )
    attached = [{"file_id": file_ids[0], "tools": [{"type": "code_interpreter"}]}]
    first = {"role": "user", "content": "zqthread first", "attachments": attached}
    thread_id = (await post(wire, "/threads", {"messages": [first], "metadata": {"t": "zqthread"}}))["id"]
    picture = {"type": "image_file", "image_file": {"file_id": file_ids[2]}}
    said = {"role": "user", "content": [{"type": "text", "text": "zqmessage"}, picture]}
    message_id = (await post(wire, f"/threads/{thread_id}/messages", said))["id"]
    await post(wire, f"/threads/{thread_id}/messages/{message_id}", {"metadata": {"m": "zqmessage"}})
    run_id = await _runs(server, wire, thread_id, assistant["id"])
    [answer] = (await server.client.beta.threads.messages.list(thread_id, run_id=run_id)).data
    await post(wire, f"/threads/{thread_id}/messages/{answer.id}", {"metadata": {"m": "zqanswer"}})
    await index_messages(server.house)
    return Made(assistant["id"], thread_id, message_id, answer.id, file_ids, store_id)


async def _files(server: Server, wire: Wire) -> list[str]:
    picture = await server.client.files.create(file=("zqfile.png", IMAGE), purpose="vision")
    new = {"filename": "zqfile.up", "purpose": "assistants", "bytes": 6, "mime_type": "text/plain"}
    path = f"/uploads/{(await post(wire, '/uploads', new))['id']}"
    part = await wire.ask("POST", f"{path}/parts", files={"data": ("upload", b"zqfile")})
    uploaded = await post(wire, f"{path}/complete", {"part_ids": [part.json["id"]]})
    table = await upload(server, b"zqfile in a table", "zqfile.csv")
    text = await upload(server, b"zqfile says that cats sleep.", "zqfile.txt")
    return [table, text, picture.id, uploaded["file"]["id"]]


async def _runs(server: Server, wire: Wire, thread_id: str, assistant_id: str) -> str:
    """One that does all that a run can do, one that waited for it, and one that waited in vain."""
    runs, path = server.client.beta.threads.runs, f"/threads/{thread_id}/runs"
    code, search = ("python", {"code": "print('zqthread')"}), ("file_search", {"query": "zqthread cats"})
    server.model.will(
        calls(code, search, ("outside", {"zqthread": 1})),
        calls(("get_weather", {"city": "zqthread"}), ("get_weather", {"city": "zqthread"})),
        says("zqanswer it is 【1†source】 zqanswer"),
        says("zqthread later"),
    )
    server.code.will([Logs("zqthread logs"), Write("zqthread.txt", b"zqthread out"), CellEnd("ok")])
    asked = {"assistant_id": assistant_id, "additional_messages": [{"role": "user", "content": "zqthread more"}]}
    more = {"additional_instructions": "zqthread", "metadata": {"r": "zqthread"}}
    run = await runs.retrieve((await post(wire, f"{path}?{WITH_CONTENT}", asked | more))["id"], thread_id=thread_id)
    run = await polled(server, run)
    assert run.required_action is not None
    later = await post(wire, f"{path}?if_busy=queue", asked | {"instructions": "zqthread"})
    never = await post(wire, f"{path}?if_busy=queue", asked | {"instructions": "zqthread", "temperature": 1})
    await runs.cancel(never["id"], thread_id=thread_id)
    for number, call in enumerate(run.required_action.submit_tool_outputs.tool_calls):
        output = {"tool_call_id": call.id, "output": "zqthread output"}
        await post(wire, f"{path}/{run.id}/submit_tool_outputs", {"tool_outputs": [output], "partial": not number})
    assert (await polled(server, run)).status == "completed"
    assert (await polled(server, await runs.retrieve(later["id"], thread_id=thread_id))).status == "completed"
    options: Any = {"params": {"dry_run": "true"}, "headers": {"idempotency-key": "tried"}}
    await server.client.post(path, cast_to=object, body=asked | {"instructions": "zqdry"}, options=options)
    return run.id


@pytest.mark.slow
async def test_what_is_deleted_is_nowhere(server: Server, wire: Wire, tool: Endpoint):
    """Of a message, an answer, an assistant, files, a vector store and a thread nothing is left once they are deleted,
    in whatever table, but for what the docs name."""
    made = await one_of_everything(server, wire, tool)
    words = ("zqassistant", "zqthread", "zqmessage", "zqanswer", "zqfile", "zqstore")
    kept = {word: await where(server, word) for word in words}
    assert all({"answers"} < kept[word] for word in words)  # or the test would prove nothing
    assert await where(server, "zqdry") == set()
    client = server.client

    for message_id, word in ((made.message_id, "zqmessage"), (made.answer_id, "zqanswer")):
        await client.beta.threads.messages.delete(message_id, thread_id=made.thread_id)
        await index_messages(server.house)
        assert await where(server, word) == set()
    await client.beta.assistants.delete(made.assistant_id)
    assert await where(server, "zqassistant") == {"answers", "runs"}  # its runs keep what they were given
    await client.vector_stores.files.delete(made.file_ids[1], vector_store_id=made.store_id)
    assert await where(server, "zqattribute") == set()
    for file_id in made.file_ids:
        await client.files.delete(file_id)
    assert await where(server, "zqfile") == {"uploads", "steps", "model_calls"}  # its name, and no more
    await client.vector_stores.delete(made.store_id)
    await expire_stores(server.house)
    assert await where(server, "zqstore") == set()
    await client.beta.threads.delete(made.thread_id)
    await index_messages(server.house)
    async for output in client.files.list(purpose="assistants_output"):
        await client.files.delete(output.id)
    for word in words:
        assert await where(server, word) == ({"uploads"} if word == "zqfile" else set())
    if not server.house.settings.database_url:
        await server.application.close()
        await server.house.store.close()
        data = [path.read_bytes() for path in Path(server.house.settings.data).rglob("*") if path.is_file()]
        assert [word for word in words if any(word.encode() in one for one in data)] == ["zqfile"]


async def test_a_deleted_endpoint_leaves_no_answers(server: Server, wire: Wire, tool: Endpoint):
    """What was answered of a webhook endpoint to requests with a key goes with it. The audit log keeps its name."""
    hook = await wire.made("/webhook_endpoints", {"url": f"{tool.url}/zqhook", "event_types": ["*"]})
    path = f"/webhook_endpoints/{hook['id']}"
    await post(wire, path, {"name": "zqhook"})
    assert await where(server, "zqhook") == {"answers", "audit_log", "webhook_endpoints"}
    await wire.ask("DELETE", path)
    assert await where(server, "zqhook") == {"audit_log"}
