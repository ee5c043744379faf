"""The wall between projects: every route with every object of another project, generated from the route table.

Who adds a route need do nothing here, unless its path has a new kind of id: that is made in `furnished`. Who adds an
id to a body names it in NAMING. The tests fail until that is done.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from afterglow.app import ROUTES
from afterglow.finding import index_messages
from afterglow.objects import WebhookEvent
from afterglow.rows.webhooks import insert_delivery
from afterglow.testing import calls
from afterglow.webhooks import new_delivery
from tests.api.test_errors import BODIES, FORMS, OLDER_BODIES
from tests.api.wire import Answer, Json, Wire
from tests.conftest import GET_WEATHER, Server, ServerFactory

OURS, THEIRS = "sk-ours", "sk-theirs"
SECRET = "the treasure lies under the pear tree"
NO_TENANT = {"model"}  # parameters of paths that name nothing of a project
READING = ("search_vector_store", "explain_search")  # POSTs that change nothing
LISTED = ("thread_id", "run_id", "message_id", "step_id", "assistant_id", "file_id", "vector_store_id")
# What a query can name, and the ids that are tried there.
QUERIES = {"after": LISTED, "before": LISTED, **{name: (name,) for name in LISTED}}
WORDS = {"query": "pear", "q": "pear", "project": "ours", "project_id": "ours"}
# Routes for administrators answer 403 to everybody else, whatever their ids are.
ADMINISTRATION = "/organization"

ATTACHED = {"attachments": [{"file_id": "{file_id}", "tools": [{"type": "file_search"}]}]}
FOR_CODE = {"attachments": [{"file_id": "{file_id}", "tools": [{"type": "code_interpreter"}]}]}
SHOWN = {"content": [{"type": "image_file", "image_file": {"file_id": "{file_id}"}}]}
HELLO = {"role": "user", "content": "hi"}
MESSAGES = [{**HELLO, **ATTACHED}, {**HELLO, **FOR_CODE}, {**HELLO, **SHOWN}]
NEW_STORE = {"file_search": {"vector_stores": [{"file_ids": ["{file_id}"]}]}}
RESOURCES: list[Json] = [
    {"tool_resources": {"code_interpreter": {"file_ids": ["{file_id}"]}}},
    {"tool_resources": {"file_search": {"vector_store_ids": ["{vector_store_id}"]}}},
]
# Bodies that name something by its id, by the name of their route. `{…}` stands for an id.
NAMING: dict[str, list[Json]] = {
    "create_assistant": [{"model": "m", **named} for named in (*RESOURCES, {"tool_resources": NEW_STORE})],
    "modify_assistant": RESOURCES,
    "create_thread": [*RESOURCES, {"tool_resources": NEW_STORE}, *({"messages": [one]} for one in MESSAGES)],
    "modify_thread": RESOURCES,
    "create_message": MESSAGES,
    "create_run": [
        {"assistant_id": "{assistant_id}"},
        *({"assistant_id": "{own_assistant_id}", "additional_messages": [one]} for one in MESSAGES),
    ],
    "create_thread_and_run": [
        {"assistant_id": "{assistant_id}"},
        *({"assistant_id": "{own_assistant_id}", **named} for named in RESOURCES),
        *({"assistant_id": "{own_assistant_id}", "thread": {"messages": [one]}} for one in MESSAGES),
        *({"assistant_id": "{own_assistant_id}", "thread": named} for named in RESOURCES),
        {"assistant_id": "{own_assistant_id}", "thread": {"tool_resources": NEW_STORE}},
    ],
    "create_vector_store": [{"file_ids": ["{file_id}"]}],
    "create_vector_store_file": [{"file_id": "{file_id}"}],
    "create_file_batch": [{"file_ids": ["{file_id}"]}, {"files": [{"file_id": "{file_id}"}]}],
    "complete_upload": [{"part_ids": ["{part_id}"]}],
    "submit_tool_outputs": [{"tool_outputs": [{"tool_call_id": "{call_id}", "output": "stolen"}]}],
}


class Tenant(NamedTuple):
    """A project with one of everything. ids: by the name of the parameter, as in paths and in NAMING."""

    wire: Wire
    ids: dict[str, str]


async def furnished(server: Server, wire: Wire, text: str) -> Tenant:
    """One of everything that a path can name."""
    server.model.will(calls(("get_weather", {"city": text})))
    asked = {"model": "m", "tools": [GET_WEATHER], "instructions": text, "metadata": {"k": text}}
    assistant = await wire.made("/assistants", asked)
    message = {"role": "user", "content": text, "metadata": {"k": text}}
    thread = await wire.made("/threads", {"messages": [message], "metadata": {"k": text}})
    run = await wire.stopped(await wire.made(f"/threads/{thread['id']}/runs", {"assistant_id": assistant["id"]}))
    [call] = run["required_action"]["submit_tool_outputs"]["tool_calls"]
    form = {"files": {"file": (f"{text}.txt", text.encode())}, "data": {"purpose": "assistants"}}
    file = (await wire.post("/files", **form)).json
    store = await wire.made("/vector_stores", {"name": text})
    batch = await wire.made(f"/vector_stores/{store['id']}/file_batches", {"file_ids": [file["id"]]})
    while batch["status"] == "in_progress":
        batch = await wire.read(f"/vector_stores/{store['id']}/file_batches/{batch['id']}")
    upload = await wire.made("/uploads", {**OLDER_BODIES["create_upload"], "bytes": 4})
    part = (await wire.post(f"/uploads/{upload['id']}/parts", files={"data": ("a", b"part")})).json
    ids = {
        "assistant_id": assistant["id"],
        "thread_id": thread["id"],
        "message_id": (await wire.get(f"/threads/{thread['id']}/messages")).ids[-1],
        "run_id": run["id"],
        "step_id": (await wire.get(f"/threads/{thread['id']}/runs/{run['id']}/steps")).ids[0],
        "call_id": call["id"],
        "file_id": file["id"],
        "vector_store_id": store["id"],
        "batch_id": batch["id"],
        "upload_id": upload["id"],
        "part_id": part["id"],
        **await _webhook(server, wire, text),
    }
    return Tenant(wire, ids)


async def _webhook(server: Server, wire: Wire, text: str) -> dict[str, str]:
    """An endpoint that nothing is sent to, with a delivery in its log."""
    endpoint = await wire.made("/webhook_endpoints", BODIES["create_webhook_endpoint"] | {"name": text})
    event = WebhookEvent(id="evt_1", created_at=1, type="thread.run.completed", data={"id": text})
    delivery = new_delivery(endpoint["id"], event, 1)
    delivery.status = "failed"
    project = "ours" if text == SECRET else "theirs"
    await server.house.store.write(lambda tx: insert_delivery(tx, project, delivery, "thread_x", 1, 1))
    return {"endpoint_id": endpoint["id"], "delivery_id": delivery.id}


class Both(NamedTuple):
    server: Server
    ours: Tenant
    theirs: Tenant


@pytest.fixture
async def both(start_server: ServerFactory, connect: Any, tmp_path: Path) -> AsyncGenerator[Both, None]:
    """Two projects with one of everything each."""
    async with start_server(tmp_path, api_keys=(f"{OURS}:ours", f"{THEIRS}:theirs")) as server:
        ours = await furnished(server, connect(server, OURS), SECRET)
        theirs = await furnished(server, connect(server, THEIRS), "nothing of interest")
        run = f"/threads/{theirs.ids['thread_id']}/runs/{theirs.ids['run_id']}"
        await theirs.wire.stopped(await theirs.wire.made(f"{run}/cancel"))  # so that nothing that is read goes on
        await server.application._attempts.flush(server.house)
        await index_messages(server.house)
        yield Both(server, ours, theirs)


def parameters(path: str) -> list[str]:
    return [name for name in re.findall(r"{(\w+)(?::path)?}", path) if name not in NO_TENANT]


def filled(path: str, ids: dict[str, str]) -> str:
    return re.sub(r"{(\w+)(?::path)?}", lambda found: ids.get(found[1], f"{found[1]}_x"), path)


def body_of(route: str, ids: dict[str, str]) -> Any:
    """A good body of that route."""
    if route in FORMS:
        return b"--b\r\ncontent-disposition: form-data; name=data; filename=a\r\n\r\nx\r\n--b--\r\n"
    body = (BODIES | OLDER_BODIES).get(route)
    named = NAMING.get(route, [body])[0]
    return None if body is None else json.loads(_with_ids(json.dumps(named), ids))


def _with_ids(text: str, ids: dict[str, str], own: dict[str, str] | None = None) -> str:
    for name, value in (own or ids).items():
        text = text.replace(f"{{own_{name}}}", value)
    for name, value in ids.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def mixtures(names: list[str], own: dict[str, str], foreign: dict[str, str]) -> Iterator[dict[str, str]]:
    """Every way to fill a path in which at least one id is foreign."""
    for chosen in itertools.product((own, foreign), repeat=len(names)):
        if foreign in chosen:
            yield {name: ids[name] for name, ids in zip(names, chosen, strict=True)}


def strangers(ids: dict[str, str]) -> dict[str, str]:
    """Ids that nobody has."""
    return {name: value[:-6] + "nobody" for name, value in ids.items()}


async def ask(wire: Wire, method: str, path: str, route: str, body: Any) -> Answer:
    form = {"headers": {"content-type": "multipart/form-data; boundary=b"}} if route in FORMS else {}
    return await wire.ask(method, path, body, **form)


async def rows_of(server: Server, project: str) -> dict[str, list[Any]]:
    """All that the database holds of a project, by table."""
    on_postgres = bool(server.house.settings.database_url)
    tables = (
        "SELECT table_name FROM information_schema.columns WHERE column_name = 'project_id' AND table_schema = 'public'"
        if on_postgres
        else "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE '%project_id%'"
    )

    async def work(tx: Any) -> dict[str, list[Any]]:
        found = {}
        for (table,) in await tx.fetch(tables):
            found[table] = sorted(map(repr, await tx.fetch(f"SELECT * FROM {table} WHERE project_id = $1", project)))
        found["projects"] = await tx.fetch("SELECT * FROM projects WHERE id = $1", project)
        return found

    return dict(await server.house.store.read(work))


# --- claims ----------------------------------------------------------------------------------------------------


async def test_foreign_ids_are_ids_that_nobody_has(both: Both):
    """On every route, with any of its ids foreign and the others one's own, the answer is word for word that of an id
    that does not exist: 404. Nothing of the other project is changed."""
    server, ours, theirs = both
    before = await rows_of(server, "ours")
    assert len(before["messages"]) == 1
    nobody = strangers(ours.ids)
    tried = 0
    for method, path, act in ROUTES:
        names = parameters(path)
        if path.startswith(ADMINISTRATION):
            assert (await theirs.wire.ask(method, filled(path, {}), b"{}")).status == 403, (method, path)
            continue
        assert set(names) <= set(ours.ids), f"{method} {path}: make one in `furnished`"
        for ids in mixtures(names, theirs.ids, ours.ids):
            body = body_of(act.__name__, theirs.ids)
            answer = await ask(theirs.wire, method, filled(path, ids), act.__name__, body)
            missing = {name: nobody[name] if value == ours.ids[name] else value for name, value in ids.items()}
            other = await ask(theirs.wire, method, filled(path, missing), act.__name__, body)
            assert answer.status == 404, (method, path, ids, answer.content)
            assert SECRET not in answer.content.decode()
            assert _without_ids(answer, ours.ids) == _without_ids(other, nobody), (method, path)
            tried += 1
    assert tried > 80
    assert await rows_of(server, "ours") == before


def _without_ids(answer: Answer, ids: dict[str, str]) -> str:
    text = answer.content.decode()
    for value in ids.values():
        text = text.replace(value, "…")
    return text


async def test_foreign_ids_in_bodies_are_not_found(both: Both):
    """An assistant, thread, message, run or store that names another project's file, store or assistant is refused
    with the words for what does not exist, and nothing is made or changed."""
    server, ours, theirs = both
    before, own_before = await rows_of(server, "ours"), await rows_of(server, "theirs")
    nobody = strangers(ours.ids)
    paths = {act.__name__: (method, path) for method, path, act in ROUTES}
    free = {**theirs.ids, "thread_id": (await theirs.wire.made("/threads"))["id"]}
    for route, bodies in NAMING.items():
        method, path = paths[route]
        place = filled(path, theirs.ids if route == "submit_tool_outputs" else free)
        for body in bodies:
            foreign, missing = [
                await theirs.wire.ask(method, place, json.loads(_with_ids(json.dumps(body), ids, theirs.ids)))
                for ids in (ours.ids, nobody)
            ]
            assert foreign.status in (400, 404), (route, body, foreign.content)
            assert _without_ids(foreign, ours.ids) == _without_ids(missing, nobody), (route, body)
    assert await rows_of(server, "ours") == before
    own_after = await rows_of(server, "theirs")
    assert {table: len(rows) for table, rows in own_after.items()} == {
        table: len(rows) + (table in ("threads", "requests")) for table, rows in own_before.items()
    }


async def test_nothing_foreign_is_listed_or_found(both: Both):
    """Lists, reads and searches of one's own show neither id nor word of another project, whatever the query names."""
    _, ours, theirs = both
    words = {SECRET, *ours.ids.values()}
    queries = [(query, ours.ids[name]) for query, names in QUERIES.items() for name in names] + list(WORDS.items())
    for method, path, act in ROUTES:
        if method == "GET" or act.__name__ in READING:
            body = json.dumps({"query": "pear treasure"} if act.__name__ in READING else {})
            for query, value in [("", ""), *queries]:
                asked = f"/v1{filled(path, theirs.ids)}?{query}={value}"
                answer = await theirs.wire.client.request(method, asked, content=body)
                assert query or "{model" in path or answer.status_code in (200, 400, 403), (asked, answer.text)
                if answer.status_code == 200:
                    assert not [word for word in words - {value} if word in answer.text], asked


async def test_every_id_in_a_body_is_tried(server: Server, wire: Wire):
    """Each key of a request's body that holds an id is in a body of NAMING."""
    described = (await wire.get("//openapi.json")).json
    for method, path, act in ROUTES:
        if method != "POST" or act.__name__ in FORMS or path.startswith(ADMINISTRATION):
            continue
        operation = described["paths"][f"/v1{path.replace(':path', '')}"]["post"]
        content = operation.get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema", {})
        wanted = set(_id_keys(schema, described, set()))
        named = set(re.findall(r'"(\w+_ids?)"', json.dumps(NAMING.get(act.__name__, []))))
        assert wanted <= named, f"{act.__name__}: name {wanted - named} in NAMING"


def _id_keys(schema: Any, described: Any, seen: set[str]) -> Iterator[str]:
    if isinstance(schema, list):
        for one in schema:
            yield from _id_keys(one, described, seen)
    elif isinstance(schema, dict):
        if (reference := schema.get("$ref")) and reference not in seen:
            seen.add(reference)
            yield from _id_keys(described["components"]["schemas"][reference.rpartition("/")[2]], described, seen)
        yield from (name for name in schema.get("properties", {}) if re.search("_ids?$", name))
        for key, inner in schema.items():
            if key not in ("example", "default"):
                yield from _id_keys(inner, described, seen)
