"""Traces of runs, as a collector on loopback gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from afterglow import app
from afterglow.contracts import CellEnd, Logs
from afterglow.errors import ConfigError, ModelBroke
from afterglow.settings import Settings, load
from afterglow.testing import calls, says
from tests.api.streams import happened, idle
from tests.conftest import GET_WEATHER, Server, ServerFactory
from tests.scripted_server import ScriptedServer, reply

PRIVATE = "the text of a message, which is nobody's business"
CALLER = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")


class Collector:
    """What has come of spans, in the order of their beginnings."""

    def __init__(self, http: ScriptedServer) -> None:
        self._http = http
        self.url = http.url.removesuffix("/v1")
        http.on("POST /v1/traces", reply(b"", content_type="application/x-protobuf"))

    @property
    def bodies(self) -> list[bytes]:
        return [request.body for request in self._http.requests]

    @property
    def spans(self) -> list[Span]:
        found = [
            span
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def named(self, name: str) -> Span:
        [span] = [span for span in self.spans if span.name == name]
        return span


@asynccontextmanager
async def collecting() -> AsyncGenerator[Collector, None]:
    async with ScriptedServer() as http:
        yield Collector(http)


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in span.attributes}


def is_within(span: Span, outer: Span) -> bool:
    inside = outer.start_time_unix_nano - 10**6 <= span.start_time_unix_nano <= span.end_time_unix_nano
    return inside and (span.trace_id, span.parent_span_id) == (outer.trace_id, outer.span_id)


async def test_the_trace_of_a_run(tmp_path: Path, start_server: ServerFactory):
    """One trace: the run, in it the attempt, in that model calls and tool calls, with ids, tokens and times; and no
    text of anybody's."""
    async with collecting() as collector:
        async with start_server(tmp_path, trace_url=collector.url) as server:
            server.code.will([Logs(PRIVATE), CellEnd("ok")])
            server.model.will(calls(("python", {"code": f"print({PRIVATE!r})"})), says(PRIVATE))
            run = await server.run(PRIVATE, instructions=PRIVATE, tools=[{"type": "code_interpreter"}])
            await idle(server)
        root, attempt, first, tool, second = collector.spans
        assert (root.name, attempt.name, tool.name) == ("run", "attempt 1", "execute_tool code_interpreter")
        assert first.name == second.name == "chat gpt-4o"
        assert not root.parent_span_id
        assert is_within(attempt, root)
        assert all(is_within(span, attempt) for span in (first, tool, second))
        assert root.trace_id.hex() == sha256(run.id.encode()).hexdigest()[:32]
        of_run = attributes(root)
        assert (of_run["afterglow.run.id"], of_run["gen_ai.conversation.id"]) == (run.id, run.thread_id)
        assert (of_run["afterglow.run.status"], of_run["gen_ai.usage.input_tokens"]) == ("completed", 20)
        assert attributes(attempt)["afterglow.queued_ms"] < 10_000
        assert attributes(first)["gen_ai.response.model"] == "scripted"
        assert attributes(second)["gen_ai.usage.output_tokens"] == 5
        assert attributes(tool)["gen_ai.tool.name"] == "code_interpreter"
        assert {span.status.code for span in collector.spans} == {Status.STATUS_CODE_UNSET}
        for body in collector.bodies:
            assert PRIVATE.encode() not in body


async def test_a_run_that_waits_for_its_caller(tmp_path: Path, start_server: ServerFactory):
    """Its attempts are parts of one trace, though they come in two lives of the server, and the root comes once."""
    async with collecting() as collector:
        async with start_server(tmp_path, trace_url=collector.url) as server:
            server.model.will(calls(("get_weather", {"city": "Oslo"})))
            run = await server.run("Weather?", tools=[GET_WEATHER])
            await idle(server)
        async with start_server(tmp_path, trace_url=f"{collector.url}/v1/traces") as server:
            server.model.will(says("Rain."))
            await server.submit(run, {"get_weather": "rain"})
            await idle(server)
        root = collector.named("run")
        assert [is_within(collector.named(f"attempt {number}"), root) for number in (1, 2)] == [True, True]
        assert len(collector.spans) == 5


async def test_what_does_not_end_well(tmp_path: Path, start_server: ServerFactory):
    """A failed call says with which error, and the run with which code; neither quotes the model server."""
    async with collecting() as collector:
        async with start_server(tmp_path, trace_url=collector.url) as server:
            server.model.will([ModelBroke(PRIVATE)])
            await server.run("Hi.")
            await idle(server)
        call, root = collector.named("chat gpt-4o"), collector.named("run")
        assert (call.status.code, call.status.message) == (Status.STATUS_CODE_ERROR, "ModelBroke")
        assert (root.status.code, root.status.message) == (Status.STATUS_CODE_ERROR, "server_error")
        assert PRIVATE.encode() not in b"".join(collector.bodies)


async def test_a_run_that_is_cancelled(tmp_path: Path, start_server: ServerFactory):
    """The call that was going on was interrupted."""
    async with collecting() as collector:
        async with start_server(tmp_path, trace_url=collector.url) as server:
            server.model.will([*says("Hello there.")[:1], asyncio.Event()])
            assistant, thread = await server.assistant(), await server.client.beta.threads.create()
            run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
            await happened(server, run.id, "thread.message.delta")
            await server.client.beta.threads.runs.cancel(run.id, thread_id=thread.id)
            assert (await server.poll(run)).status == "cancelled"
            await idle(server)
        assert collector.named("chat gpt-4o").status.message == "interrupted"
        assert attributes(collector.named("run"))["afterglow.run.status"] == "cancelled"


async def created_by(server: Server, traceparent: str) -> None:
    assistant, thread = await server.assistant(), await server.client.beta.threads.create()
    headers = {"traceparent": traceparent}
    run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id, extra_headers=headers)
    await server.poll(run)
    await idle(server)


async def test_the_trace_of_the_caller(tmp_path: Path, start_server: ServerFactory):
    """A POST with a traceparent leaves a span in its caller's trace, with a link to that of the run."""
    async with collecting() as collector:
        async with start_server(tmp_path, trace_url=collector.url) as server:
            await created_by(server, "00-{}-{}-01".format(*CALLER))
        created, root = collector.named("create run"), collector.named("run")
        assert (created.trace_id.hex(), created.parent_span_id.hex()) == CALLER
        assert [(link.trace_id, link.span_id) for link in created.links] == [(root.trace_id, root.span_id)]


@pytest.mark.parametrize("traceparent", ["00-{}-{}-00", "nonsense", "00-{}-0000000000000000-01", "ff-{}-{}-01", ""])
async def test_a_caller_whose_trace_is_not_kept(tmp_path: Path, start_server: ServerFactory, traceparent: str):
    """Without the sign that it is kept, or with something else in the header, there is the run's own trace alone."""
    async with collecting() as collector:
        async with start_server(tmp_path, trace_url=collector.url) as server:
            await created_by(server, traceparent.format(*CALLER))
        assert [span.name for span in collector.spans] == ["run", "attempt 1", "chat gpt-4o"]


@pytest.mark.slow
async def test_a_collector_that_is_not_there(tmp_path: Path, start_server: ServerFactory):
    """Runs go on as ever, and the server stops as ever."""
    async with start_server(tmp_path, trace_url="http://127.0.0.1:9") as server:
        assert (await server.run("Hi.")).status == "completed"


@pytest.mark.parametrize("url", ["collector:4318", "ftp://collector", "http://"])
def test_an_address_that_is_none(url: str):
    """Is told at the start, with an example of one."""
    with pytest.raises(ConfigError, match="such as http"):
        app.build_traces(load({"trace_url": url}, environ={}))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch):
    """`trace_url` says what to install; without it nothing is wrong."""
    monkeypatch.delitem(sys.modules, "afterglow.traces", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'afterglow\[otel\]'"):
        app.build_traces(load({"trace_url": "http://localhost:4318"}, environ={}))
    assert app.build_traces(Settings()) is None


@pytest.mark.slow
def test_nothing_is_imported_without_a_trace_url():
    """The server without traces does not load OpenTelemetry."""
    code = "import sys, afterglow.serve; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
