"""A chat-completions server that costs next to nothing, so that what is measured is Afterglow.

The model's name says how it answers: `stub:tokens=64,rate=20` sends 64 tokens, 20 a second, the first at once;
`rate=0` sends all of them in one write. With `stamped=1`, which needs a rate, each token is `@` and the time it was
sent, in seconds of `perf_counter`, which all processes of a machine share. Usage is reported as a real server does it.
Requests are not pipelined.

    python -m bench.stub [--host 127.0.0.1] [--port 0]      prints its base URL, then serves until it is ended
"""

from __future__ import annotations

import argparse
import asyncio
from functools import lru_cache
from time import perf_counter
from typing import cast

import httptools
import msgspec
import uvloop

PREFIX = "stub:"
BYTES_PER_TOKEN = 4
HEAD = {"id": "chatcmpl-stub", "object": "chat.completion.chunk", "created": 1700000000}


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to answer. tokens: how many; rate: tokens per second, 0 for all at once; stamped: they say when they were
    sent."""

    tokens: int = 16
    rate: float = 0.0
    stamped: bool = False


class Part(msgspec.Struct):
    text: str = ""


class Message(msgspec.Struct):
    content: str | list[Part] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Request(msgspec.Struct):
    """What of a chat-completions body the answer depends on."""

    model: str
    messages: list[Message] = []
    stream: bool = False
    stream_options: StreamOptions | None = None


class Script(msgspec.Struct, frozen=True):
    """A streamed answer, ready to send but for the usage. opening: the HTTP head and the chunk that says the role.
    stamped: the model's name, if the tokens are to be stamps."""

    opening: bytes
    tokens: list[bytes]
    ending: bytes
    stamped: str


def model_name(tokens: int, rate: float = 0.0, *, stamped: bool = False) -> str:
    """The model to ask for."""
    return f"{PREFIX}tokens={tokens},rate={rate:g}" + (",stamped=1" if stamped else "")


def text_of(tokens: int) -> str:
    """The whole answer of a model of so many tokens: every token is different, so that a lost one shows."""
    return "".join(_token(number) for number in range(tokens))


def _token(number: int) -> str:
    return f" w{number}" if number else "w0"


@lru_cache(maxsize=64)
def plan_for(model: str) -> Plan:
    """Read the plan from a model's name; a name that is not ours gets the default.

    Raises msgspec.ValidationError for an option that does not exist or has no number.
    """
    if not model.startswith(PREFIX):
        return Plan()
    options = dict(option.partition("=")[::2] for option in model.removeprefix(PREFIX).split(",") if option)
    return msgspec.convert(options, Plan, strict=False)


@lru_cache(maxsize=64)
def script_for(model: str) -> Script:
    """Everything of a streamed answer that does not depend on the prompt."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    plan = plan_for(model)
    return Script(
        opening=head + _chunk(model, {"role": "assistant"}),
        tokens=[_chunk(model, {"content": _token(number)}) for number in range(plan.tokens)],
        ending=_chunk(model, {}, finish_reason="stop"),
        stamped=model if plan.stamped else "",
    )


def _chunk(model: str, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return _framed(msgspec.json.encode({**HEAD, "model": model, "choices": [choice]}))


def _stamp(model: str) -> bytes:
    return _chunk(model, {"content": f"@{perf_counter():.6f} "})


def _framed(data: bytes) -> bytes:
    """One SSE event as one HTTP chunk."""
    return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)


def usage_of(request: Request) -> dict[str, int]:
    """Usage as a real server would report it: four bytes of prompt text make a token."""
    size = sum(_size(message.content) for message in request.messages)
    prompt, completion = -(-size // BYTES_PER_TOKEN), plan_for(request.model).tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _size(content: str | list[Part] | None) -> int:
    if isinstance(content, str):
        return len(content.encode())
    return sum(len(part.text.encode()) for part in content or ())


def _reply(status: str, body: object) -> bytes:
    data = msgspec.json.encode(body)
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status.encode(),
        len(data),
        data,
    )


def _ending(request: Request) -> bytes:
    """The chunks after the last token, and the end of the HTTP body."""
    usage = b""
    if request.stream_options and request.stream_options.include_usage:
        usage = _framed(
            msgspec.json.encode({**HEAD, "model": request.model, "choices": [], "usage": usage_of(request)})
        )
    return script_for(request.model).ending + usage + _framed(b"[DONE]") + b"0\r\n\r\n"


def _completion(request: Request) -> bytes:
    message = {"role": "assistant", "content": text_of(plan_for(request.model).tokens)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    fields = {**HEAD, "object": "chat.completion", "model": request.model, "choices": [choice]}
    return _reply("200 OK", {**fields, "usage": usage_of(request)})


class StubProtocol(asyncio.Protocol):
    """One connection. The parser calls the `on_…` methods."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._path = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_message_begin(self) -> None:
        self._path = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        route = (self._parser.get_method(), self._path.partition(b"?")[0])
        if route == (b"POST", b"/v1/chat/completions"):
            self._complete()
        elif route in ((b"GET", b"/v1/models"), (b"GET", b"/healthz")):
            self._transport.write(_reply("200 OK", {"object": "list", "data": []}))
        else:
            self._transport.write(_reply("404 Not Found", {"error": {"message": "No such route."}}))

    def _complete(self) -> None:
        try:
            request = msgspec.json.decode(self._body, type=Request)
            plan = plan_for(request.model)
        except msgspec.DecodeError as error:
            self._transport.write(_reply("400 Bad Request", {"error": {"message": str(error)}}))
            return
        if request.stream:
            self._stream(request, plan)
        elif plan.rate:
            self._at(self._now() + plan.tokens / plan.rate, _completion(request))
        else:
            self._transport.write(_completion(request))

    def _stream(self, request: Request, plan: Plan) -> None:
        script = script_for(request.model)
        if plan.rate:
            self._transport.write(script.opening)
            self._send_token(script, _ending(request), 0, self._now(), 1 / plan.rate)
        else:
            self._transport.write(b"".join([script.opening, *script.tokens, _ending(request)]))

    def _send_token(self, script: Script, ending: bytes, number: int, start: float, period: float) -> None:
        # Each token has its own due time, so that a late one does not delay those that follow.
        if number == len(script.tokens):
            self._transport.write(ending)
            return
        self._transport.write(_stamp(script.stamped) if script.stamped else script.tokens[number])
        due = start + (number + 1) * period
        self._timer = self._loop().call_at(due, self._send_token, script, ending, number + 1, start, period)

    def _at(self, due: float, data: bytes) -> None:
        self._timer = self._loop().call_at(due, self._transport.write, data)

    def _now(self) -> float:
        return self._loop().time()

    @staticmethod
    def _loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()


async def serve(host: str, port: int) -> asyncio.Server:
    """Start listening; port 0 takes a free one."""
    return await asyncio.get_running_loop().create_server(StubProtocol, host, port, backlog=4096)


def base_url(server: asyncio.Server) -> str:
    """What to give as `--model-url`."""
    host, port = server.sockets[0].getsockname()[:2]
    return f"http://{host}:{port}/v1"


async def _main(host: str, port: int) -> None:
    server = await serve(host, port)
    print(base_url(server), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A chat-completions stub for measurements.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(options.host, options.port))
