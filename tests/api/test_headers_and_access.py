"""Who may call: keys, projects, hosts, origins and sizes; and the headers that come with every answer."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from afterglow.access import new_key
from afterglow.app import OPEN_ROUTES, ROUTES, open_application
from afterglow.contracts import Transaction
from afterglow.errors import ConfigError
from afterglow.rows import keys as key_rows
from afterglow.settings import load
from afterglow.testing import ScriptedModels, SetClock, says
from tests.api.test_errors import BODIES, filled
from tests.api.wire import Answer, Fault, Json, Wire
from tests.conftest import Server, ServerFactory

NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank username) if you're accessing the "
    "API from your browser and are prompted for a username and password. You can obtain an API key from "
    "https://platform.openai.com/account/api-keys."
)
WRONG_KEY = "Incorrect API key provided: {}. You can find your API key at https://platform.openai.com/account/api-keys."
MEGABYTE = 1024 * 1024


async def asked_with(wire: Wire, **headers: str) -> Answer:
    """GET /assistants with these headers; `_` stands for `-`, and an empty one is left out."""
    wire.client.headers.pop("authorization", None)
    return await wire.get("/assistants", headers={name.replace("_", "-"): value for name, value in headers.items()})


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


async def make_key(server: Server, project: str = "default") -> tuple[str, str]:
    """As `afterglow keys create` does; return the secret and the key's id."""
    secret, row, key_hash = new_key(project, "", 0)

    async def work(tx: Transaction) -> None:
        await key_rows.insert_key(tx, project, row, key_hash)

    await server.house.store.write(work)
    return secret, row.id


async def revoke(server: Server, key_id: str) -> None:
    async def work(tx: Transaction) -> bool:
        return await key_rows.revoke_key(tx, key_id, 1)

    assert await server.house.store.write(work)


# --- keys ------------------------------------------------------------------------------------------------------


async def test_on_loopback_any_key_will_do(wire: Wire):
    """With no keys made, any that is not empty stands for the one project, however it is presented."""
    made = await wire.made("/assistants", {"model": "m"})
    for headers in (
        {"authorization": "Bearer x"},
        {"authorization": "bearer  sk-other"},
        {"authorization": "BEARER x"},
        {"authorization": basic(":sk-password")},
        {"authorization": basic("user:sk-password")},
        {"api_key": "azure"},
        {"authorization": "Bearer x", "openai_organization": "org-1", "openai_project": "proj_1"},
    ):
        assert (await asked_with(wire, **headers)).ids == [made["id"]]


async def test_no_key_is_told_what_to_do(wire: Wire):
    """A missing, empty or unreadable key is a 401 in the API's words."""
    for headers in (
        {},
        {"authorization": "Bearer"},
        {"authorization": "x"},
        {"authorization": "Token x"},
        {"authorization": basic("user")},
        {"authorization": basic("user:")},
        {"authorization": "Basic %%%"},
        {"authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()},
        {"api_key": ""},
    ):
        assert (await asked_with(wire, **headers)).fault == Fault(401, NO_KEY)
    odd = await wire.get("/assistants", headers=[(b"authorization", b"Basic \xe9")])
    assert odd.fault == Fault(401, NO_KEY)


async def test_without_a_key_there_is_no_route(wire: Wire):
    """Every route but the three open ones asks for a key first, also for what is not served."""
    del wire.client.headers["authorization"]
    for method, path, act in ROUTES:
        answer = await wire.ask(method, filled(path), BODIES.get(act.__name__))
        assert answer.fault == Fault(401, NO_KEY)
    for method, path in (("GET", "/v1/nowhere"), ("POST", "/v1/chat/completions"), ("GET", "/openai/assistants")):
        assert (await wire.ask(method, f"/{path}")).fault == Fault(401, NO_KEY)
    for method, path, _ in OPEN_ROUTES:
        assert (await wire.ask(method, f"/{path}")).status == 200


async def test_once_keys_are_made_only_they_are_known(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """After the first key was made, no other is accepted; what was believed before is forgotten within a second."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        wire = connect(server, "sk-ab-guessed-guessed-wxyz")
        assert (await wire.get("/assistants")).status == 200
        secret, _ = await make_key(server)
        clock.time += 1
        wrong = Fault(401, WRONG_KEY.format("sk-ab*****************wxyz"), None, "invalid_api_key")
        assert (await wire.get("/assistants")).fault == wrong
        assert (await wire.get("/nowhere")).fault == wrong
        short = await connect(server, "short").get("/assistants")
        assert short.fault.message == WRONG_KEY.format("*****")
        assert (await connect(server, secret).get("/assistants")).status == 200
        assert (await connect(server, secret + "x").get("/assistants")).status == 401
        with pytest.raises(openai.AuthenticationError) as refused:
            await server.client.beta.assistants.list()
        assert refused.value.code == "invalid_api_key"


async def test_a_revoked_key_is_dead_within_a_second(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Revoking ends a key at the latest one second later, and taking back the last one lets nobody else in."""
    clock = SetClock()
    async with start_server(tmp_path, clock=clock) as server:
        secret, key_id = await make_key(server)
        wire = connect(server, secret)
        assert (await wire.get("/assistants")).status == 200
        await revoke(server, key_id)
        clock.time += 1
        assert (await wire.get("/assistants")).fault.code == "invalid_api_key"
        assert (await connect(server, "sk-anything").get("/assistants")).fault.code == "invalid_api_key"


async def test_configured_keys_need_no_database(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Keys from the settings, with or without a project, are known beside those that were made, and close the door."""
    async with start_server(tmp_path, api_keys=("sk-plain", "sk-team:blue")) as server:
        plain, blue = connect(server, "sk-plain"), connect(server, "sk-team")
        made = await plain.made("/assistants", {"model": "m"})
        assert (await blue.get(f"/assistants/{made['id']}")).status == 404
        secret, _ = await make_key(server)
        assert (await connect(server, secret).get("/assistants")).ids == [made["id"]]
        for key in ("other", "sk-team:blue", "blue"):
            assert (await connect(server, key).get("/assistants")).status == 401


async def test_other_addresses_need_keys(tmp_path: Path):
    """Listening beyond loopback without a key is refused, with the command that makes one."""
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        settings = load({"data": str(tmp_path / "data"), "host": host}, environ={})
        with pytest.raises(ConfigError, match="afterglow keys create"):
            async with open_application(settings, models=ScriptedModels()):
                pass


# --- projects --------------------------------------------------------------------------------------------------


async def test_a_project_can_import_ids_of_its_own(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Lists, filters and deletes touch the caller's project alone, also where two projects look alike."""
    async with start_server(tmp_path, api_keys=("sk-a:a", "sk-b:b")) as server:
        wires = [connect(server, "sk-a"), connect(server, "sk-b")]
        made = [await wire.made("/threads", {"metadata": {"user": "ada"}}) for wire in wires]
        for wire, thread in zip(wires, made, strict=True):
            assert (await wire.get("/threads?metadata[user]=ada")).ids == [thread["id"]]
        await wires[0].delete(f"/threads/{made[0]['id']}")
        assert (await wires[1].get("/threads")).ids == [made[1]["id"]]


# --- hosts, origins, sizes -------------------------------------------------------------------------------------


async def test_hosts_that_are_not_ours_are_refused(wire: Wire):
    """On loopback only loopback names are served, in any case and with any port: a web page's name may point here."""
    for host in ("localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"):
        assert (await wire.get("/assistants", headers={"host": host})).status == 200
    for host in ("example.com", "127.0.0.1.example.com", "localhost.example.com:80", "10.0.0.1", "[::2]:80", "x" * 300):
        answer = await wire.get("/assistants", headers={"host": host})
        name = host.removesuffix(":80")[:100]
        message = f"The host '{name}' is not served here. Add it to AFTERGLOW_ALLOWED_HOSTS."
        assert answer.fault == Fault(403, message)
        assert (await wire.get("//healthz", headers={"host": host})).status == 200  # probes come by address


async def test_hosts_can_be_allowed(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Named hosts are served beside loopback names and the address that is listened on; `*` serves all."""
    for number, (settings, good, bad) in enumerate(
        (
            ({"allowed_hosts": ("api.example.com",)}, ["API.example.com:443", "localhost"], ["example.com"]),
            ({"allowed_hosts": ("*",)}, ["anything.example.com"], []),
            ({"host": "127.0.0.2"}, ["127.0.0.2:8000", "localhost"], ["127.0.0.3"]),
            ({"host": "0.0.0.0", "api_keys": ("sk-wire",)}, ["anything.example.com", "10.0.0.1:80"], []),
            (
                {"host": "0.0.0.0", "api_keys": ("sk-wire",), "allowed_hosts": ("one.example.com",)},
                ["one.example.com", "127.0.0.1"],
                ["two.example.com"],
            ),
        )
    ):
        async with start_server(tmp_path / str(number), **settings) as server:
            wire = connect(server)
            for host in good:
                assert (await wire.get("/assistants", headers={"host": host})).status == 200, host
            for host in bad:
                assert (await wire.get("/assistants", headers={"host": host})).status == 403, host


async def test_web_pages_are_refused(server: Server, wire: Wire):
    """A request that names an origin comes from a web page, and none is allowed unless it is named."""
    for origin in ("https://example.com", "null", server.url, "*"):
        answer = await wire.get("/assistants", headers={"origin": origin})
        message = f"Web pages of {origin} may not call here. Add it to AFTERGLOW_ALLOWED_ORIGINS."
        assert answer.fault == Fault(403, message)
        assert "access-control-allow-origin" not in answer.headers


async def test_web_pages_can_be_allowed(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """A named origin may call and read ids and poll times; its preflight is answered; others stay out."""
    page = "https://app.example.com"
    async with start_server(tmp_path, allowed_origins=(page,)) as server:
        wire = connect(server)
        answer = await wire.get("/assistants", headers={"origin": page})
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == page
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await wire.client.options("/v1/threads", headers={"origin": page, **asked})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page
        other = await wire.get("/assistants", headers={"origin": "https://evil.example.com"})
        assert other.status == 403
        missing = await wire.get("/assistants/asst_x", headers={"origin": page})
        assert (missing.status, missing.headers["access-control-allow-origin"]) == (404, page)


async def test_a_body_has_its_limit(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """A body just at `max_body_mb` is read, one byte more is a 413, whether its length is told beforehand or not."""
    async with start_server(tmp_path, max_body_mb=1) as server:
        wire = connect(server)
        body = b'{"metadata":{}}'
        body += b" " * (MEGABYTE - len(body))

        async def parts(content: bytes) -> AsyncIterator[bytes]:
            for at in range(0, len(content), 65_536):
                yield content[at : at + 65_536]

        for path in ("/threads", "/assistants", "/threads/thread_x/messages"):
            for content in (body + b" ", parts(body + b" ")):
                answer = await wire.ask("POST", path, content=content)
                assert answer.fault == Fault(413, "The request body is larger than 1 MB.")
        for content in (body, parts(body)):
            assert (await wire.ask("POST", "/threads", content=content)).status == 200


# --- headers ---------------------------------------------------------------------------------------------------


async def test_each_answer_has_a_request_id_of_its_own(server: Server, wire: Wire):
    """Good or bad, every answer has another id, which the official client hands on."""
    paths = ["/assistants", "/assistants/asst_x", "/nowhere", "//nowhere", "//healthz", "/models"] * 5
    seen = {(await wire.get(path)).headers["x-request-id"] for path in paths}
    assert len(seen) == len(paths)
    made = await server.client.beta.threads.create()
    assert re.fullmatch("req_[0-9a-f]{32}", made._request_id or "")


async def test_a_stream_has_the_headers_of_an_answer(server: Server, wire: Wire):
    """An event stream names its type and carries the request id, and proxies are told not to hold it back."""
    server.model.will(says("Hello."))
    assistant = await server.assistant()
    answer = await wire.post("/threads/runs", {"assistant_id": assistant.id, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


async def test_polls_are_told_when_to_come_again(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Every GET of a run has `openai-poll-after-ms`, as an integer, over or not."""
    async with start_server(tmp_path, poll_after_ms=7) as server:
        wire = connect(server)
        server.model.will(says("Hello."))
        run = await wire.made("/threads/runs", {"assistant_id": (await server.assistant()).id})
        for _ in range(2):
            answer = await wire.get(f"/threads/{run['thread_id']}/runs/{run['id']}")
            assert answer.headers["openai-poll-after-ms"] == "7"
            await wire.stopped(run)


async def test_the_beta_header_is_not_demanded(wire: Wire):
    """It may be missing, in any case, or in a list; who asks for v1 is told to ask for v2."""
    for beta in ("", "assistants=v2", "Assistants=V2", "foo=1, assistants=v2", "agents=v1", "assistants"):
        assert (await wire.get("/assistants", headers={"openai-beta": beta})).status == 200
    for beta in ("assistants=v1", "ASSISTANTS=V1", "foo=1, assistants=v1"):
        answer = await wire.get("/assistants", headers={"OpenAI-Beta": beta})
        message = (
            "You must provide the 'OpenAI-Beta' header to access the Assistants API. Please try again by setting the "
            "header 'OpenAI-Beta: assistants=v2'."
        )
        assert answer.fault == Fault(400, message, None, "invalid_beta")


async def test_what_clients_send_besides_is_left_alone(wire: Wire):
    """The SDKs' own headers, in any case, change nothing."""
    headers: Json = {
        "X-Stainless-Lang": "python",
        "x-stainless-retry-count": "2",
        "X-Stainless-Poll-Helper": "true",
        "x-stainless-custom-poll-interval": "50",
        "X-STAINLESS-STREAM-HELPER": "threads.runs.create_and_stream",
        "Idempotency-Key": "k",
        "OpenAI-Organization": "org-1",
        "Accept": "application/binary",
    }
    assert (await wire.get("/assistants", headers=headers)).status == 200


async def test_a_root_path_is_taken_off(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """Behind a proxy that leaves the path as it is, and behind one that does not, the same routes answer."""
    async with start_server(tmp_path, root_path="/llm/") as server:
        wire = connect(server)
        for path in ("//llm/v1/assistants", "/assistants", "//llm/healthz", "//healthz"):
            assert (await wire.get(path)).status == 200
        for path, shown in (("//llm/assistants", "/assistants"), ("//llm", "/"), ("//llmv1/models", "/llmv1/models")):
            assert (await wire.get(path)).fault == Fault(404, f"Invalid URL (GET {shown})")
