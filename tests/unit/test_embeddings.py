"""A server of embeddings: what it is asked, what of its answers is believed, and when it is asked again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from afterglow.embeddings import EmbeddingServer
from afterglow.errors import (
    ConfigError,
    ModelBroke,
    ModelError,
    ModelRateLimited,
    ModelRefused,
    ModelTimeout,
    ModelUnreachable,
)
from afterglow.settings import load

Answer = httpx2.Response | Exception
SETTINGS: dict[str, Any] = {
    "embedding_url": "http://10.0.0.5:9000/v1",
    "embedding_model": "bge-m3",
    "embedding_key": "sk-secret",
    "model_retries": 2,
}


class Scripted:
    """A server that gives these answers in turn. asked: the requests. slept: the pauses before further tries."""

    def __init__(self, *answers: Answer | Callable[[], Any], **settings: Any) -> None:
        self.answers = list(answers)
        self.asked: list[httpx2.Request] = []
        self.slept: list[float] = []
        loaded = load(SETTINGS | settings, environ={})
        self.server = EmbeddingServer(loaded, transport=httpx2.MockTransport(self._answer), sleep=self._sleep)

    async def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx2.Response):
            return answer
        await answer()
        raise AssertionError("nobody waits for this")

    async def _sleep(self, wait_s: float) -> None:
        self.slept.append(wait_s)


def vectors(*values: list[float], backwards: bool = False) -> httpx2.Response:
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(values)]
    return httpx2.Response(200, json={"object": "list", "data": data[::-1] if backwards else data, "model": "bge-m3"})


async def test_texts_become_vectors_in_their_order():
    """One request, with model and key; the answer's own order is that of its indexes."""
    scripted = Scripted(vectors([1.0, 0.0], [0.0, 1.0], backwards=True))
    assert await scripted.server.embed(["a", "b"]) == [[1.0, 0.0], [0.0, 1.0]]
    [request] = scripted.asked
    assert str(request.url) == "http://10.0.0.5:9000/v1/embeddings"
    assert json.loads(request.content) == {"model": "bge-m3", "input": ["a", "b"]}
    assert request.headers["authorization"] == "Bearer sk-secret"
    assert scripted.server.model == "bge-m3"
    await scripted.server.close()


async def test_what_passes_is_waited_for():
    """Refused connections, 429 and 5xx are tried again, with growing pauses or those that the server names."""
    scripted = Scripted(
        httpx2.ConnectError("refused"), httpx2.Response(429, headers={"retry-after": "7"}), vectors([1.0])
    )
    assert await scripted.server.embed(["a"]) == [[1.0]]
    assert 0.3 < scripted.slept[0] <= 0.5
    assert scripted.slept[1:] == [7.0]


@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        ([httpx2.ConnectError("refused")] * 3, ModelUnreachable, "cannot be reached"),
        ([httpx2.Response(503, text="loading")] * 3, ModelBroke, "loading"),
        ([httpx2.Response(429)] * 3, ModelRateLimited, "rate limit"),
        ([httpx2.Response(401, json={"error": {"message": "bad key sk-secret"}})], ModelRefused, "key"),
        ([httpx2.Response(404)], ModelRefused, "no embeddings at this URL"),
        ([httpx2.Response(400, json={"error": {"message": "input is empty"}})], ModelRefused, "input is empty"),
        ([httpx2.Response(200, text="<html>")], ModelBroke, "no list of embeddings"),
        ([vectors([1.0])], ModelBroke, "1 embeddings for 2 texts"),
        ([vectors([1.0], [1.0, 2.0])], ModelBroke, "of several lengths"),
        ([vectors([], [])], ModelBroke, "of several lengths"),
        ([httpx2.Response(200, content=b'{"data":[{"embedding":[NaN]},{"embedding":[1]}]}')], ModelBroke, "no list"),
    ],
)
async def test_what_does_not_pass_is_told(answers: list[Answer], error: type[ModelError], words: str):
    """In words that name the model and never the key."""
    scripted = Scripted(*answers)
    with pytest.raises(error, match=words) as raised:
        await scripted.server.embed(["a", "b"])
    assert scripted.answers == []
    assert "bge-m3" in str(raised.value)
    assert "sk-secret" not in str(raised.value)


async def test_a_server_that_hangs_is_given_up():
    """After `embedding_timeout_s`, each time."""
    scripted = Scripted(asyncio.Event().wait, asyncio.Event().wait, embedding_timeout_s=0.01, model_retries=1)
    with pytest.raises(ModelTimeout, match=r"No answer within 0.01 s from model 'bge-m3'"):
        await scripted.server.embed(["a"])


def test_settings_are_checked():
    """A URL needs a model beside it, and must be one."""
    with pytest.raises(ConfigError, match="embedding_model"):
        load({"embedding_url": "http://x/v1"}, environ={})
    with pytest.raises(ConfigError, match="embedding_url"):
        load({"embedding_url": "x", "embedding_model": "m"}, environ={})
    with pytest.raises(ConfigError, match="thread_store_days"):
        load({"thread_store_days": 366}, environ={})
