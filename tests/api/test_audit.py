"""The audit log: which acts are in it, who did them, and how it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai

from afterglow.testing import SetClock
from tests.api.test_keys import ADMIN
from tests.api.test_projects import PROJECTS
from tests.api.wire import Fault, Json, Wire
from tests.conftest import ServerFactory

LOG = "/organization/audit_logs"


async def acts(wire: Wire, query: str = "") -> list[Json]:
    found: list[Json] = (await wire.read(f"{LOG}?order=asc&limit=100{query}"))["data"]
    return found


async def test_administrative_acts_are_written_down(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Each with who did it, from where and with what; what changed nothing or was refused is no act; no secret is in
    it."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=(ADMIN,)) as server:
        wire = connect(server, "sk-admin")
        project = (await wire.made(PROJECTS, {"name": "Blue"}))["id"]
        path = f"{PROJECTS}/{project}"
        await wire.made(path, {"name": "Green", "settings": {"limits": {"storage_mb": 5}}})
        await wire.made(path, {"name": "Green"})
        key = await wire.made(f"{path}/api_keys", {"scopes": ["read"], "name": "the shop"})
        await wire.made(f"{path}/api_keys/{key['id']}", {"scopes": ["read", "write"]})
        await wire.delete(f"{path}/api_keys/{key['id']}", headers={"user-agent": "curl/8"})
        await wire.delete(f"{path}/api_keys/{key['id']}")
        await wire.made(f"{path}/archive")
        await wire.made(f"{path}/archive")
        await wire.post(f"{PROJECTS}/default/archive")
        log = await acts(wire)
        assert [(act["type"], act[act["type"]]["id"]) for act in log] == [
            ("project.created", project),
            ("project.updated", project),
            ("api_key.created", key["id"]),
            ("api_key.updated", key["id"]),
            ("api_key.deleted", key["id"]),
            ("project.archived", project),
        ]
        assert {act["project"]["id"] for act in log} == {project}
        assert {act["effective_at"] for act in log} == {int(clock.time)}
        assert log[1]["project.updated"]["changes_requested"]["title"] == "Green"
        assert log[2]["api_key.created"]["data"] == {"scopes": ["read"], "name": "the shop"}
        actor = log[4]["actor"]
        assert (actor["type"], actor["session"]) == ("api_key", {"ip_address": "127.0.0.1", "user_agent": "curl/8"})
        assert actor["api_key"]["id"].startswith("key_env_")
        text = json.dumps(log)
        assert key["value"] not in text
        assert key["value"][-4:] not in text
        assert "sk-admin" not in text


async def test_acts_on_webhooks_are_written_down(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Made, changed, another secret, deleted: each with who and what, and neither secrets nor the URL's path are there;
    what is refused, or changes nothing, is no act."""
    async with start_server(tmp_path, api_keys=(ADMIN,)) as server:
        wire = connect(server, "sk-admin")
        hook = {"url": "https://app.example/T0KEN?k=T0KEN", "event_types": ["*"], "metadata": {"a": "T0KEN"}}
        made = await wire.made("/webhook_endpoints", hook)
        path = f"/webhook_endpoints/{made['id']}"
        await wire.made(path, {"url": "https://other.example/T0KEN", "status": "disabled"})
        await wire.made(path, {"status": "disabled"})
        fresh = await wire.made(f"{path}/rotate_secret")
        await wire.post(path, {"url": "ftp://app.example"})
        await wire.delete(path)
        await wire.delete(path)
        log = await acts(wire)
        kind = "webhook_endpoint"
        data = {"name": made["name"], "event_types": ["*"], "status": "enabled", "host": "app.example"}
        changes = {"status": "disabled", "host": "other.example"}
        assert [(act["type"], act[act["type"]]) for act in log] == [
            (f"{kind}.created", {"id": made["id"], "data": data}),
            (f"{kind}.updated", {"id": made["id"], "changes_requested": changes}),
            (f"{kind}.secret_rotated", {"id": made["id"]}),
            (f"{kind}.deleted", {"id": made["id"]}),
        ]
        assert {act["project"]["id"] for act in log} == {"default"}
        assert [act["type"] for act in await acts(wire, f"&resource_ids[]={made['id']}")] == [
            act["type"] for act in log
        ]
        text = json.dumps(log)
        assert "T0KEN" not in text
        for secret in (made["signing_secret"], fresh["signing_secret"]):
            assert secret[-8:] not in text


async def test_the_address_is_the_one_that_a_trusted_proxy_tells_of(
    start_server: ServerFactory, connect: Any, tmp_path: Path
):
    """Behind a proxy, the log has its caller's address; from anybody else, that header is nothing."""
    for trusted, address in ((("127.0.0.1",), "203.0.113.7"), ((), "127.0.0.1")):
        async with start_server(tmp_path / address, api_keys=(ADMIN,), trusted_proxies=trusted) as server:
            wire = connect(server, "sk-admin")
            await wire.post(PROJECTS, {"name": "n"}, headers={"x-forwarded-for": "198.51.100.1, 203.0.113.7"})
            [act] = await acts(wire)
            assert act["actor"]["session"]["ip_address"] == address


async def test_the_log_is_read_by_filters_and_pages(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """By time, type, project, actor and resource, together; newest first, page by page with the official client."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock, api_keys=(ADMIN,)) as server:
        wire = connect(server, "sk-admin")
        first = (await wire.made(PROJECTS, {"name": "first"}))["id"]
        clock.time += 10
        second = (await wire.made(PROJECTS, {"name": "second"}))["id"]
        clock.time += 10
        await wire.made(f"{PROJECTS}/{first}/archive")
        began = int(clock.time) - 20
        [actor] = {act["actor"]["api_key"]["id"] for act in await acts(wire)}
        for query, kinds in (
            (f"&effective_at[gt]={began}", ["created", "archived"]),
            (f"&effective_at[gte]={began}&effective_at[lt]={began + 20}", ["created", "created"]),
            (f"&effective_at[lte]={began}", ["created"]),
            ("&event_types[]=project.archived&event_types[]=project.updated", ["archived"]),
            (f"&project_ids[]={second}", ["created"]),
            (f"&resource_ids[]={first}&event_types[]=project.created", ["created"]),
            (f"&actor_ids[]={actor}", ["created", "created", "archived"]),
            ("&actor_ids[]=key_x", []),
        ):
            assert [act["type"].removeprefix("project.") for act in await acts(wire, query)] == kinds, query
        api = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", admin_api_key="sk-admin", api_key="", http_client=server.client._client
        ).admin.organization.audit_logs
        listed = [act async for act in api.list(limit=1, effective_at={"gte": began}, project_ids=[first, second])]
        assert [act.type for act in listed] == ["project.archived", "project.created", "project.created"]
        assert listed[0].project is not None
        assert listed[0].project.name == "first"
        for query, param in (
            ("effective_at[gt]=x", "effective_at[gt]"),
            ("effective_at[lt]=-1", "effective_at[lt]"),
            ("event_types[]=a%00", "event_types[0]"),
            ("&".join(["project_ids[]=p"] * 101), "project_ids"),
        ):
            fault = (await wire.get(f"{LOG}?{query}")).fault
            assert (fault.status, fault.param) == (400, param)
        missing = await wire.get(f"{LOG}?after=audit_log-x")
        assert missing.fault == Fault(404, "No audit log found with id 'audit_log-x'.", "after")
