"""What the official Python client makes of recorded streams, each played back with keep-alives in other places.

    python client_pings.py BASE_URL KIND=COUNT…          against the server of `recordings.replaying`

Fails unless all variants of a kind give the same, with the sync and the async client, with the stream helper and raw.
"""

from __future__ import annotations

import asyncio
import sys

import openai
from client_story import items, opened, value


async def by_helper(client, kind, thread_id):
    """Names of the events, and the final state as the helper tells it."""
    runs = client.beta.threads.runs
    if kind == "outputs":
        manager = runs.submit_tool_outputs_stream(thread_id=thread_id, run_id="run_1", tool_outputs=[])
    else:
        manager = runs.stream(thread_id=thread_id, assistant_id="asst_1")
    async with opened(manager) as stream:
        events = [event.to_dict() for event in await items(stream)]
        run = await value(stream.get_final_run())
        said = [] if kind == "calls" else await value(stream.get_final_messages())
        steps = await value(stream.get_final_run_steps())
    return events, run.to_dict(), [each.to_dict() for each in said], [each.to_dict() for each in steps]


async def raw(client, kind, thread_id):
    """The events themselves."""
    runs = client.beta.threads.runs
    if kind == "outputs":
        answer = runs.submit_tool_outputs("run_1", thread_id=thread_id, tool_outputs=[], stream=True)
    else:
        answer = runs.create(thread_id, assistant_id="asst_1", stream=True)
    return [event.to_dict() for event in await items(await value(answer))]


async def compare(client, kind, count):
    for read in (by_helper, raw):
        first, *others = [await read(client, kind, f"thread_{kind}_{number}") for number in range(count)]
        for number, other in enumerate(others, 1):
            assert other == first, (kind, read.__name__, number)
    return len(others)


async def main(client, counts):
    for each in counts:
        kind, _, count = each.partition("=")
        print(kind, await compare(client, kind, int(count)), "variants: all the same")
    await value(client.close())


if __name__ == "__main__":
    for client in (openai.OpenAI, openai.AsyncOpenAI):
        asyncio.run(main(client(base_url=sys.argv[1], api_key="any", max_retries=0, timeout=20), sys.argv[2:]))
