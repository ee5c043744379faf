"""The bench's own instruments: a model stub or a percentile that is wrong makes every figure wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import perf_counter
from typing import Any

import msgspec
import pytest

from bench.client import CHUNK, Answer, BenchFailure, Connection, expect, percentile
from bench.cluster import STAMP
from bench.stub import model_name, serve, text_of


@pytest.fixture
async def stub() -> AsyncIterator[Connection]:
    server = await serve("127.0.0.1", 0)
    connection = Connection(server.sockets[0].getsockname()[1])
    yield connection
    connection.close()
    server.close()
    await server.wait_closed()
    await asyncio.sleep(0)  # both ends of the connection are closed in callbacks


async def ask(stub: Connection, model: str, **options: object) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello there"}], **options}
    return await stub.ask("POST", "/v1/chat/completions", body, mark=CHUNK)


def chunks_of(answer: Answer) -> list[dict[str, Any]]:
    events = answer.body.decode().removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [msgspec.json.decode(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("rate", [0, 1000])
async def test_a_streamed_answer_has_every_token_and_its_usage(stub, rate):
    """The tokens come in order, one chunk and one mark each, then the finish reason, then usage, then [DONE]."""
    answer = expect(await ask(stub, model_name(5, rate), stream=True, stream_options={"include_usage": True}))
    role, *tokens, finish, usage = chunks_of(answer)
    assert role["choices"][0]["delta"] == {"role": "assistant"}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in tokens) == text_of(5)
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert len(tokens) == len(answer.marks) == 5


async def test_stamped_tokens_say_when_they_were_sent(stub):
    """Each is the time between the request and its arrival, in order."""
    began = perf_counter()
    answer = expect(await ask(stub, model_name(3, 1000, stamped=True), stream=True))
    stamps = [float(stamp) for stamp in STAMP.findall(answer.body)]
    assert began <= stamps[0] <= stamps[1] <= stamps[2]
    assert all(stamp - 1e-6 <= arrived for stamp, arrived in zip(stamps, answer.marks, strict=True))


async def test_usage_comes_only_when_it_is_asked_for(stub):
    """Without include_usage the last chunk is the finish reason."""
    assert chunks_of(await ask(stub, model_name(1), stream=True))[-1]["choices"][0]["finish_reason"] == "stop"


async def test_one_connection_serves_one_request_after_another(stub):
    """A whole answer, a refusal and a route that is not there keep the connection and do not mix."""
    whole = msgspec.json.decode(expect(await ask(stub, model_name(3))).body)
    assert whole["choices"][0]["message"]["content"] == text_of(3) == "w0 w1 w2"
    assert whole["usage"]["completion_tokens"] == 3
    assert (await ask(stub, "stub:speed=3")).status == 400
    assert (await stub.ask("GET", "/v1/nothing")).status == 404


async def test_a_mark_cut_in_two_is_counted_once():
    """Marks are found across the pieces in which an answer arrives."""
    connection = Connection(0)
    connection._mark = b"event: x"
    for piece in (b"event: x event", b": x even", b"t: ", b"x"):
        connection.on_body(piece)
    assert len(connection.marks) == 3


def test_percentiles_are_values_that_were_measured():
    """Nearest rank: the smallest value that so many percent of the values do not exceed."""
    values = [15, 20, 35, 40, 50]
    assert [percentile(values, percent) for percent in (0, 5, 30, 40, 50, 100)] == [15, 15, 20, 20, 35, 50]
    assert percentile(range(1, 101), 99) == 99
    with pytest.raises(BenchFailure):
        percentile([], 50)
