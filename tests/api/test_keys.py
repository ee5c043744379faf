"""Keys: what they may do, how long, and what is known of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.datastructures import Headers

from afterglow import projects
from afterglow.access import Access, configured_key, new_key
from afterglow.contracts import Store, Transaction
from afterglow.errors import ConfigError
from afterglow.objects import CreateApiKey, KeyScope
from afterglow.rows.audit import Actor
from afterglow.rows.keys import get_key, insert_key
from afterglow.settings import Settings
from afterglow.testing import SetClock
from tests.api.wire import Answer, Fault, Json, Wire
from tests.conftest import Server, ServerFactory

ADMIN = "sk-admin:default:read+write+admin"
MISSING = (
    "You have insufficient permissions for this operation. Missing scopes: {}. Check that you have the correct role in "
    "your organization (Reader, Writer, Owner) and project (Member, Owner), and if you're using a restricted API key, "
    "that it has the necessary scopes."
)
DAY_S = 24 * 3600
KEYS = "/organization/projects/default/api_keys"


async def make_key(server: Server, *scopes: KeyScope, **fields: Any) -> str:
    """Make a key of the default project, as `afterglow keys create` does, and return its secret."""
    body = CreateApiKey(scopes=list(scopes), **fields)
    now = server.house.clock.now()
    return (await projects.create_key(server.house.store, now, Actor("session", "tests"), "default", body)).secret


async def status(wire: Wire) -> int:
    return (await wire.get("/assistants")).status


async def test_a_key_does_what_its_scopes_say(server: Server, connect: Any):
    """read is for GET, write for everything else, admin for /v1/organization; what is missing is a 403 that says so."""
    asks: list[tuple[str, str, str, Json | None]] = [
        ("read", "GET", "/assistants", None),
        ("write", "POST", "/assistants", {"model": "m"}),
        ("write", "DELETE", "/assistants/asst_x", None),
        ("admin", "GET", "/organization/projects", None),
        ("admin", "POST", "/organization/projects", {"name": "n"}),
        ("admin", "GET", "/organization/nowhere", None),
        ("admin", "GET", "//openai/v1/organization/projects", None),
        ("admin", "GET", "//openai/organization/audit_logs", None),
    ]
    for scopes in (("read",), ("write",), ("admin",), ("read", "write"), ("read", "write", "admin")):
        wire = connect(server, await make_key(server, *scopes))
        for needed, method, path, body in asks:
            answer: Answer = await wire.ask(method, path, body)
            if needed in scopes:
                assert answer.status in (200, 404), (scopes, path)
            else:
                assert answer.fault == Fault(403, MISSING.format(needed), None, "missing_scope")


async def test_the_sdk_raises_its_own_kinds(server: Server):
    """A scope that is missing is a PermissionDeniedError, an unknown key an AuthenticationError."""
    reader = server.client.with_options(api_key=await make_key(server, "read"))
    assert (await reader.beta.assistants.list()).data == []
    with pytest.raises(openai.PermissionDeniedError) as denied:
        await reader.beta.assistants.create(model="m")
    assert (denied.value.code, denied.value.type) == ("missing_scope", "invalid_request_error")
    with pytest.raises(openai.AuthenticationError):
        await server.client.with_options(api_key="sk-nobody-has-this").beta.assistants.list()


async def test_alone_on_loopback_one_may_do_everything(wire: Wire):
    """With no keys made, the one local project may be administered, too."""
    listed = await wire.read("/organization/projects")
    assert [project["id"] for project in listed["data"]] == ["default"]


async def test_a_key_expires(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """From its hour on a key is a wrong one, within a second."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        wire = connect(server, await make_key(server, "read", expires_in_seconds=DAY_S))
        assert await status(wire) == 200
        clock.time += DAY_S - 0.5
        assert await status(wire) == 200
        clock.time += 1
        assert (await wire.get("/assistants")).fault.code == "invalid_api_key"


async def test_when_a_key_was_last_used_is_known_to_the_minute(
    start_server: ServerFactory, connect: Any, tmp_path: Path
):
    """It is written beside the requests, at most once a minute, and shown."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=(ADMIN,)) as server:
        admin = connect(server, "sk-admin")
        made = await admin.made(KEYS, {})
        wire, access = connect(server, made["value"]), server.application._access
        assert made["last_used_at"] is None

        async def used_at() -> int | None:
            await access.write_uses()
            shown: int | None = (await admin.read(f"{KEYS}/{made['id']}"))["last_used_at"]
            return shown

        assert await used_at() is None
        first = int(clock.time)
        assert await status(wire) == 200
        assert await used_at() == first
        for passed_s, expected in ((30, first), (29, first), (1, first + 60)):
            clock.time += passed_s
            assert await status(wire) == 200
            assert await used_at() == expected


async def test_keys_of_the_settings_may_have_scopes(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """`key:project:scope+scope`; without scopes a key reads and writes."""
    entries = (ADMIN, "sk-plain", "sk-reader:blue:read")
    async with start_server(tmp_path, api_keys=entries) as server:
        ids = [project["id"] for project in (await connect(server, "sk-admin").read("/organization/projects"))["data"]]
        assert sorted(ids) == ["blue", "default"]
        for key in ("sk-plain", "sk-reader"):
            assert (await connect(server, key).get("/organization/projects")).fault.code == "missing_scope"
        assert (await connect(server, "sk-plain").post("/threads")).status == 200
        assert (await connect(server, "sk-reader").post("/threads")).fault.code == "missing_scope"
    with pytest.raises(ConfigError, match="no scope 'owner'") as refused:
        configured_key("sk-secret:blue:owner")
    assert "sk-secret" not in str(refused.value)


async def test_a_key_is_made_shown_changed_and_revoked(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """By the official client: the value is answered once, and a key that was revoked is dead and not listed."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=(ADMIN,)) as server:
        admin = connect(server, "sk-admin")
        limits = {"requests_per_minute": 5}
        made = await admin.made(KEYS, {"name": "the shop", "limits": limits, "expires_in_seconds": DAY_S})
        assert await status(connect(server, made["value"])) == 200
        api = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", admin_api_key="sk-admin", api_key="", http_client=server.client._client
        ).admin.organization.projects.api_keys
        [listed] = [key async for key in api.list("default")]
        shown = await api.retrieve(made["id"], project_id="default")
        assert shown == listed
        assert (shown.name, shown.created_at, shown.expires_at) == (
            "the shop",
            int(clock.time),
            int(clock.time) + DAY_S,
        )
        assert shown.redacted_value.endswith(made["value"][-4:])
        assert made["value"] not in shown.to_json()
        extra = shown.model_extra or {}
        assert (extra["scopes"], extra["limits"]["requests_per_minute"]) == (["read", "write"], 5)
        changed = await api.update(made["id"], project_id="default", scopes=["read"])
        assert changed.model_extra is not None
        assert (changed.model_extra["scopes"], changed.expires_at) == (["read"], shown.expires_at)
        clock.time += 1
        assert (await connect(server, made["value"]).post("/threads")).fault.code == "missing_scope"
        gone = await api.delete(made["id"], project_id="default")
        assert (gone.id, gone.deleted) == (made["id"], True)
        clock.time += 1
        assert await status(connect(server, made["value"])) == 401
        assert [key async for key in api.list("default")] == []
        with pytest.raises(openai.NotFoundError):
            await api.delete(made["id"], project_id="default")


async def test_a_key_is_found_in_its_project_alone(server: Server, wire: Wire):
    """Under another project's address it is not there."""
    other = (await wire.made("/organization/projects", {"name": "other"}))["id"]
    now = int(server.house.clock.now())
    _, row, key_hash = new_key("default", "", now)
    await server.house.store.write(lambda tx: insert_key(tx, "default", row, key_hash))
    admin = await make_key(server, "admin")
    wire.client.headers["authorization"] = f"Bearer {admin}"
    server.application._access._keys._known.clear()
    path = f"/organization/projects/{other}/api_keys"
    assert (await wire.read(path))["data"] == []
    for method in ("GET", "DELETE"):
        answer = await wire.ask(method, f"{path}/{row.id}")
        assert answer.fault == Fault(404, f"No key found with id '{row.id}'.")

    async def still(tx: Transaction) -> object:
        return await get_key(tx, "default", row.id)

    assert await server.house.store.read(still) is not None


async def test_keys_are_listed_by_pages(server: Server, wire: Wire):
    """Newest first, with cursors, as every list."""
    made = [(await wire.made(KEYS, {"scopes": ["admin"]}))["value"]]
    wire.client.headers["authorization"] = f"Bearer {made[0]}"
    ids = (await wire.get(KEYS)).ids
    ids = [*[(await wire.made(KEYS, {}))["id"] for _ in range(3)], *ids]
    page = await wire.read(f"{KEYS}?limit=2&order=asc")
    rest = await wire.read(f"{KEYS}?order=asc&after={page['last_id']}")
    found = [key["id"] for key in page["data"] + rest["data"]]
    assert (page["has_more"], rest["has_more"]) == (True, False)
    assert sorted(found) == sorted(ids)
    assert (await wire.get(KEYS)).ids == found[::-1]


async def test_what_many_ask_at_once_is_looked_up_once(server: Server):
    """However many requests come with the same key in the same moment, the database is asked once a second."""
    secret = await make_key(server, "read")
    asked = 0

    class Counting:
        async def read(self, work: Any) -> Any:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0)
            return await server.house.store.read(work)

    store: Store = Counting()  # type: ignore[assignment]
    clock = SetClock()
    access = Access(Settings(), store, clock)
    headers = Headers({"authorization": f"Bearer {secret}"})
    callers = await asyncio.gather(*(access.caller(headers) for _ in range(50)))
    assert len({caller.key_id for caller in callers}) == 1
    assert asked == 1
    clock.time += 1
    await asyncio.gather(*(access.caller(headers) for _ in range(50)))
    assert asked == 2
