"""The other ways in: Azure's paths, the list of models, and what is passed on to the model server as bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from afterglow.app import ROUTES
from afterglow.llm import Models
from afterglow.testing import says
from tests import scripted_server
from tests.api.test_errors import BODIES, filled
from tests.api.wire import Fault, Wire, until
from tests.conftest import Server, ServerFactory
from tests.scripted_server import ScriptedServer

VERSION = "2024-05-01-preview"
COMPLETION = {"id": "chatcmpl-1", "object": "chat.completion", "choices": []}


# --- Azure -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def azure(server: Server) -> AsyncGenerator[openai.AsyncAzureOpenAI, None]:
    client = openai.AsyncAzureOpenAI(azure_endpoint=server.url, api_key="az", api_version=VERSION, max_retries=0)
    yield client
    await client.close()


async def test_the_azure_client_works(server: Server, azure: openai.AsyncAzureOpenAI):
    """The official Azure client creates, runs, polls, lists and deletes as the plain one does, on the same objects."""
    server.model.will(says("Hello."))
    assistant = await azure.beta.assistants.create(model="gpt-4o", name="Ada")
    thread = await azure.beta.threads.create(messages=[{"role": "user", "content": "hi"}])
    run = await azure.beta.threads.runs.create_and_poll(
        thread_id=thread.id, assistant_id=assistant.id, poll_interval_ms=5
    )
    assert run.status == "completed"
    assert await server.last_text(thread.id) == "Hello."
    assert (await server.client.beta.assistants.retrieve(assistant.id)).name == "Ada"
    assert [model.id async for model in azure.models.list()] == ["scripted"]
    await azure.beta.threads.delete(thread.id)
    with pytest.raises(openai.NotFoundError):
        await azure.beta.threads.retrieve(thread.id)


async def test_every_route_is_served_under_every_prefix(wire: Wire):
    """`/openai/…?api-version=` and `/openai/v1/…` answer as `/v1/…` does, on every route."""
    del wire.client.headers["authorization"]
    wire.client.headers["api-key"] = "az"
    for method, path, act in ROUTES:
        if "{" not in path:
            continue
        body = BODIES.get(act.__name__)
        expected = (await wire.ask(method, filled(path), body)).fault
        for prefix in ("/openai", "/openai/v1"):
            answer = await wire.ask(method, f"/{prefix}{filled(path)}?api-version={VERSION}", body)
            assert answer.fault == expected
    for prefix in ("/openai", "/openai/v1"):
        thread = await wire.made(f"/{prefix}/threads?api-version={VERSION}")
        listed = await wire.get(f"/{prefix}/threads?api-version={VERSION}&limit=1")
        assert listed.ids == [thread["id"]]
        path = f"{prefix}/nowhere"
        assert (await wire.get(f"/{path}?api-version=1")).fault == Fault(404, f"Invalid URL (GET {path})")


# --- models ----------------------------------------------------------------------------------------------------


class Passing(NamedTuple):
    """A server in front of a scripted upstream, with the real model client between them."""

    server: Server
    upstream: ScriptedServer
    wire: Wire


@pytest.fixture
async def passing(start_server: ServerFactory, connect: Any, tmp_path: Path) -> AsyncGenerator[Passing, None]:
    async with ScriptedServer() as upstream:
        listed = [{"id": "org/llama 3", "object": "model", "created": 7, "owned_by": "org"}, {"id": "stub-1"}]
        upstream.on("GET /v1/models", scripted_server.reply({"object": "list", "data": listed}))
        settings = {"model_url": upstream.url, "model_key": "sk-upstream", "aliases": "gpt-4o=stub-1"}
        async with start_server(tmp_path, **settings, max_body_mb=1) as server:
            server.house.models = Models(server.house.settings)
            yield Passing(server, upstream, connect(server, "sk-caller"))


async def test_models_are_listed_and_retrieved(passing: Passing):
    """The upstream's models and the aliases are listed, unpaged, and each can be retrieved, with or without an encoded
    slash."""
    wire = passing.wire
    listed = await wire.read("/models")
    assert set(listed) == {"object", "data"}
    assert {model["id"] for model in listed["data"]} == {"org/llama 3", "stub-1", "gpt-4o"}
    for model in listed["data"]:
        for name in (model["id"].replace(" ", "%20"), model["id"].replace("/", "%2F").replace(" ", "%20")):
            assert await wire.read(f"/models/{name}") == model
    assert listed["data"][0] == {"id": "org/llama 3", "object": "model", "created": 7, "owned_by": "org"}
    models = passing.server.client.models
    assert [model.id async for model in models.list()] == [model["id"] for model in listed["data"]]
    assert (await models.retrieve("org/llama 3")).owned_by == "org"


async def test_an_unknown_model_is_named(wire: Wire):
    """Retrieving what is not listed, and deleting anything, is a 404 with the model's name."""
    for method, name in (("GET", "org%2Fx"), ("GET", "org/x"), ("DELETE", "org/x")):
        answer = await wire.ask(method, f"/models/{name}")
        assert answer.fault == Fault(404, "The model 'org/x' does not exist", "model", "model_not_found")
    assert (await wire.delete("/models/scripted")).fault.code == "model_not_found"


# --- passing on ------------------------------------------------------------------------------------------------


async def test_other_routes_are_the_upstreams(passing: Passing):
    """Requests that are not ours arrive as they were sent, but for the alias and the key, and so do the answers."""
    _, upstream, wire = passing
    for method, path in (
        ("POST", "/chat/completions"),
        ("POST", "/completions"),
        ("POST", "/embeddings"),
        ("POST", "/moderations"),
        ("POST", "/audio/speech"),
        ("POST", "/images/generations"),
        ("POST", "/responses"),
        ("GET", "/responses/resp_1/input_items"),
        ("DELETE", "/responses/resp_1"),
    ):
        upstream.on(f"{method} /v1{path}", scripted_server.reply({"path": path}, 202, x_upstream="yes"))
        body = b'{ "model": "gpt-4o", "input": "\xc3\xa9", "x": 1.0 }' if method == "POST" else None
        headers = {"content-type": "application/json", "openai-beta": "assistants=v2"}
        for prefix in ("/v1", "/openai", "/openai/v1"):
            answer = await wire.client.request(method, f"{prefix}{path}?a=1&b=%20", content=body, headers=headers)
            assert (answer.status_code, answer.json()) == (202, {"path": path})
            assert answer.headers["x-upstream"] == "yes"
            assert answer.headers["x-request-id"].startswith("req_")
            asked = upstream.requests[-1]
            assert (asked.method, asked.path) == (method, f"/v1{path}?a=1&b=%20")
            assert asked.headers["authorization"] == "Bearer sk-upstream"
            assert "sk-caller" not in json.dumps(asked.headers)
            if method == "POST":
                assert asked.json == {"model": "stub-1", "input": "é", "x": 1.0}


async def test_the_upstreams_refusals_are_passed_on(passing: Passing):
    """Status and body of an upstream's error reach the caller unchanged."""
    passing.upstream.says(scripted_server.refusal(429, "Slow down.", code="rate_limit_exceeded"))
    with pytest.raises(openai.RateLimitError) as refused:
        await passing.server.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    assert refused.value.code == "rate_limit_exceeded"


async def test_the_official_clients_chat_through_us(passing: Passing):
    """Plain and streamed chat completions of both official clients go through, Azure's deployments among them."""
    server, upstream, _ = passing
    upstream.says(*[scripted_server.reply(COMPLETION)] * 2, scripted_server.says("Hel", "lo"))
    ask: Any = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
    assert (await server.client.chat.completions.create(**ask)).id == "chatcmpl-1"
    azure = openai.AsyncAzureOpenAI(azure_endpoint=server.url, api_key="az", api_version=VERSION, max_retries=0)
    async with azure:
        assert (await azure.chat.completions.create(**ask)).id == "chatcmpl-1"
    chunks = [chunk async for chunk in await server.client.chat.completions.create(**ask, stream=True)]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "Hello"
    chats = [request for request in upstream.requests if request.method == "POST"]
    assert [request.path.partition("?")[0] for request in chats] == ["/v1/chat/completions"] * 3
    assert {request.json["model"] for request in chats} == {"stub-1"}


async def test_a_stream_is_passed_on_as_it_comes(passing: Passing):
    """The first bytes arrive while the upstream is still talking, and a caller who leaves frees the upstream."""
    gate = asyncio.Event()
    passing.upstream.says(scripted_server.stream(b"data: 1\n\n", gate, b"data: 2\n\n"))
    body = json.dumps({"model": "m", "stream": True}).encode()
    async with passing.wire.client.stream("POST", "/v1/chat/completions", content=body) as answer:
        parts = answer.aiter_raw()
        assert await anext(parts) == b"data: 1\n\n"
        gate.set()
        assert await anext(parts) == b"data: 2\n\n"
    passing.upstream.says(scripted_server.stream(b"data: 1\n\n", scripted_server.HANG))
    async with passing.wire.client.stream("POST", "/v1/chat/completions", content=body) as answer:
        assert await anext(answer.aiter_raw()) == b"data: 1\n\n"
    await until(lambda: passing.upstream.chats[-1].gone.is_set())


async def test_paths_are_passed_on_encoded(passing: Passing):
    """What was encoded in a path is encoded again: nothing in it can end the path, the line or the folder."""
    _, upstream, wire = passing
    for path in ("a%3Fb", "a%23b", "a%20HTTP/1.1", "%C3%A9", "a:b@c", "a%7F", "%25"):
        await wire.client.get(f"/v1/audio/{path}")
        assert upstream.requests[-1].path == f"/v1/audio/{path}"
    before = len(upstream.requests)
    assert (await wire.get("/audio/a%0D%0AX-Evil:%201%0D%0A%0D%0A")).status == 404
    for path in ("audio/../models", "audio/%2e%2e/models", "audio/..%2fmodels", "images/a/../../../admin"):
        reader, writer = await asyncio.open_connection(wire.client.base_url.host, wire.client.base_url.port)
        writer.write(f"GET /v1/{path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer x\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 404")
        writer.close()
        await writer.wait_closed()
    assert len(upstream.requests) == before


async def test_nothing_else_of_the_upstreams_is_reached(passing: Passing):
    """Below a deployment as elsewhere: its files, its models and its administration are not this server's to show."""
    _, upstream, wire = passing
    before = len(upstream.requests)
    for path in ("files", "files/file-1", "models", "organization/projects", "chat", ""):
        for method in ("GET", "POST", "DELETE"):
            assert (await wire.ask(method, f"//openai/deployments/m/{path}")).status == 404
    assert len(upstream.requests) == before


async def test_a_body_that_is_passed_on_has_its_limit(passing: Passing):
    """What is larger than `max_body_mb` is a 413 here as well, told beforehand or found on the way."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b" " * 65_536

    for content in (b" " * 1_100_000, parts()):
        answer = await passing.wire.post(
            "/chat/completions", content=content, headers={"content-type": "application/json"}
        )
        assert answer.fault == Fault(413, "The request body is larger than 1 MB.")
    assert passing.upstream.chats == []


async def test_passing_on_can_be_switched_off(start_server: ServerFactory, connect: Any, tmp_path: Path):
    """With `passthrough` off, or with no upstream, those routes are 404."""
    async with start_server(tmp_path / "off", passthrough=False) as server:
        wire = connect(server)
        for path in ("/v1/chat/completions", "/openai/deployments/gpt-4o/chat/completions"):
            assert (await wire.post(f"/{path}", {})).fault == Fault(404, f"Invalid URL (POST {path})")
    async with start_server(tmp_path / "offline") as server:
        server.house.models = Models(server.house.settings, offline=object())  # type: ignore[arg-type]
        answer = await connect(server).post("/embeddings", {})
        assert (answer.status, "--model-url" in answer.fault.message) == (404, True)
