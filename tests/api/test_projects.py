"""Projects: made, changed and archived; and whose objects a request sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai

from afterglow.testing import SetClock
from tests.api.test_keys import ADMIN
from tests.api.wire import Fault, Wire
from tests.conftest import Server, ServerFactory

PROJECTS = "/organization/projects"
ARCHIVED = "The project you are requesting has been archived and is no longer accessible"
MISMATCHED = "OpenAI-Project header should match project for API key"


async def seen(wire: Wire, project: str) -> list[str]:
    """The assistants that a request naming this project sees."""
    return (await wire.get("/assistants", headers={"OpenAI-Project": project})).ids


async def test_a_project_is_made_changed_and_archived(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """By the official client, page by page; archived ones are listed only when they are asked for."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=(ADMIN,)) as server:
        api = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", admin_api_key="sk-admin", api_key="", http_client=server.client._client
        ).admin.organization.projects
        made = await api.create(name="Blue team")
        assert (made.name, made.status, made.archived_at) == ("Blue team", "active", None)
        assert made.id.startswith("proj_")
        changed = await api.update(made.id, name="Green team")
        assert (changed.id, changed.name) == (made.id, "Green team")
        assert await api.retrieve(made.id) == changed
        assert {project.id async for project in api.list(limit=1)} == {made.id, "default"}
        archived = await api.archive(made.id)
        assert (archived.status, archived.archived_at) == ("archived", int(clock.time))
        clock.time += 5
        assert await api.archive(made.id) == archived
        assert {project.id async for project in api.list()} == {"default"}
        assert {project.id async for project in api.list(include_archived=True)} == {made.id, "default"}


async def test_settings_change_part_by_part(wire: Wire):
    """What is not given stays; a part that is given takes the place of the one before; nonsense is refused by path."""
    limits = {"requests_per_minute": 600, "storage_mb": 10}
    made = await wire.made(PROJECTS, {"name": "n", "settings": {"limits": limits, "budget": {"day_cost": 5}}})
    path = f"{PROJECTS}/{made['id']}"
    changed = await wire.made(path, {"settings": {"limits": {"concurrent_runs": 2}, "retention": {"files_days": 3}}})
    settings = changed["settings"]
    assert (settings["limits"]["concurrent_runs"], settings["limits"]["storage_mb"]) == (2, None)
    assert (settings["retention"]["files_days"], settings["budget"]["day_cost"]) == (3, 5)
    assert await wire.made(path, {}) == changed
    assert await wire.read(path) == changed
    for body, param, code in (
        ({"settings": {"limits": {"storage_mb": -1}}}, "settings.limits.storage_mb", "integer_below_min_value"),
        ({"settings": {"limits": {"storage": 1}}}, "settings.limits.storage", "unknown_parameter"),
        ({"settings": {"budget": {"day_cost": "5"}}}, "settings.budget.day_cost", "invalid_type"),
        ({"name": None}, "name", "invalid_type"),
        ({"name": ""}, "name", "string_below_min_length"),
    ):
        fault = (await wire.post(path, body)).fault
        assert (fault.status, fault.param, fault.code) == (400, param, code)
    assert await wire.read(path) == changed


async def test_what_is_no_project_is_not_found(wire: Wire):
    """Each route says so; and the default project cannot be archived."""
    for method, path in (("GET", ""), ("POST", ""), ("POST", "/archive"), ("GET", "/api_keys"), ("POST", "/api_keys")):
        body = None if method == "GET" else {}
        answer = await wire.ask(method, f"{PROJECTS}/proj_x{path}", body)
        assert answer.fault == Fault(404, "No project found with id 'proj_x'.")
    refusal = await wire.post(f"{PROJECTS}/default/archive")
    assert refusal.fault == Fault(400, "The default project cannot be archived.")
    wrong = (await wire.get(f"{PROJECTS}?include_archived=yes")).fault
    assert (wrong.status, wrong.param) == (400, "include_archived")


async def test_the_keys_of_an_archived_project_are_refused(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Within a second, those of the settings as well; no new ones are made; its data stays, for administrators."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=(ADMIN, "sk-blue:blue")) as server:
        admin, blue = connect(server, "sk-admin"), connect(server, "sk-blue")
        made = await blue.made("/assistants", {"model": "m"})
        value = (await admin.made(f"{PROJECTS}/blue/api_keys", {}))["value"]
        assert (await connect(server, value).get("/assistants")).ids == [made["id"]]
        await admin.made(f"{PROJECTS}/blue/archive")
        clock.time += 1
        for key in ("sk-blue", value):
            refusal = await connect(server, key).get("/assistants")
            assert refusal.fault == Fault(401, ARCHIVED, None, "not_authorized_invalid_project")
        late = (await admin.post(f"{PROJECTS}/blue/api_keys", {})).fault
        assert (late.status, late.message.startswith("The project 'blue' is archived")) == (400, True)
        assert await seen(admin, "blue") == [made["id"]]


async def test_the_project_header_counts_where_it_names_one(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """A project that is not here is one of the app's old ones, and ignored; a key's own is fine; another one's is for
    administrators, who then see and make what is in it."""
    async with start_server(tmp_path, api_keys=(ADMIN, "sk-blue:blue", "sk-red:red")) as server:
        admin, blue = connect(server, "sk-admin"), connect(server, "sk-blue")
        own = (await blue.made("/assistants", {"model": "m"}))["id"]
        assert await seen(blue, "proj_of_old") == [own]
        assert await seen(blue, "blue") == [own]
        assert await seen(blue, "p" * 10_000) == [own]
        assert set(server.application._access._projects._known) == {"proj_of_old"}
        refusal = await blue.get("/assistants", headers={"OpenAI-Project": "red"})
        assert refusal.fault == Fault(401, MISMATCHED, None, "mismatched_project")
        assert await seen(admin, "blue") == [own]
        assert await seen(admin, "red") == await seen(admin, "proj_of_old") == []
        for_red = await admin.post("/assistants", {"model": "m"}, headers={"OpenAI-Project": "red"})
        assert await seen(connect(server, "sk-red"), "") == [for_red.json["id"]]
        client = server.client.with_options(api_key="sk-blue", project="proj_of_old", organization="org-of-old")
        assert [assistant.id async for assistant in client.beta.assistants.list()] == [own]


async def test_on_loopback_without_keys_the_header_is_ignored(server: Server, wire: Wire):
    """There is one project then, whatever an app says."""
    other = (await wire.made(PROJECTS, {"name": "other"}))["id"]
    own = (await wire.made("/assistants", {"model": "m"}))["id"]
    assert await seen(wire, other) == await seen(wire, "proj_of_old") == [own]
