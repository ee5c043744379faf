"""Streams of ours, recorded once and played back with keep-alives in every place where one can fall."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from afterglow.runs.transcript import KEEP_ALIVE
from afterglow.testing import calls, says
from tests.api import streams
from tests.conftest import GET_WEATHER, Server
from tests.scripted_server import ScriptedServer, stream


async def record(server: Server) -> dict[str, bytes]:
    """Whole streams by kind: a run that answers, one that calls functions, what follows the outputs, create-and-run."""
    assistant = await server.assistant(model="gpt-4o", tools=[GET_WEATHER])
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": "Hello"}])
    body = {"assistant_id": assistant.id}
    weather = calls(("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"}))
    server.model.will(says("Good morning to you."), weather, says("Rain, and sun."), says("Hello."))
    recorded = {"text": await streams.stream(server, f"/threads/{thread.id}/runs", body)}
    recorded["calls"] = await streams.stream(server, f"/threads/{thread.id}/runs", body)
    run = (await server.client.beta.threads.runs.list(thread.id)).data[0]
    outputs = {"tool_outputs": streams.answers(run, {"get_weather": "fine"})}
    recorded["outputs"] = await streams.stream(
        server, f"/threads/{thread.id}/runs/{run.id}/submit_tool_outputs", outputs
    )
    recorded["created"] = await streams.stream(server, "/threads/runs", body)
    return recorded


def variants(raw: bytes) -> list[list[bytes]]:
    """The stream in pieces as they are sent: plain; with a ping before each event in turn; with pings before all."""
    events = streams.split(raw)
    one_each = [[*events[:place], KEEP_ALIVE, *events[place:]] for place in range(len(events))]
    everywhere = [piece for event in events for piece in (KEEP_ALIVE, KEEP_ALIVE, event)]
    return [events, *one_each, everywhere]


@asynccontextmanager
async def replaying(recorded: dict[str, bytes]) -> AsyncGenerator[tuple[str, list[str]], None]:
    """A server that answers the streaming POSTs of thread `thread_KIND_NUMBER` with that variant.

    Yields its base URL and, for the command line of a client, `KIND=COUNT` for each kind.
    """
    counts = []
    async with ScriptedServer() as server:
        for kind, raw in recorded.items():
            made = variants(raw)
            counts.append(f"{kind}={len(made)}")
            for number, pieces in enumerate(made):
                path = f"/v1/threads/thread_{kind}_{number}/runs"
                if kind == "outputs":
                    path += "/run_1/submit_tool_outputs"
                server.on(f"POST {path}", stream(*pieces))
        yield server.url, counts
