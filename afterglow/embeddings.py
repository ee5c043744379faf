"""Embeddings from any OpenAI-compatible server: `embedding_url`, `embedding_model`.

It is asked as model servers are (`chat/server.py`), with the same retries and the same words for what goes wrong.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import httpx2
import msgspec

from afterglow.chat.http1 import Http1Transport
from afterglow.chat.server import ModelServer, Sleep, Trouble, backoff_s, read_at_most
from afterglow.errors import ModelBroke, ModelRefused, ModelTimeout
from afterglow.settings import Settings, Upstream

log = logging.getLogger("afterglow.embeddings")

MAX_ANSWER_BYTES = 256 * 1024 * 1024


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Answer(msgspec.Struct):
    data: list[_Vector]


class EmbeddingServer:
    """A `contracts.Embedder`. transport: in place of the network, for tests. sleep: waits between two tries.

    Raises ConfigError.
    """

    def __init__(
        self, settings: Settings, *, transport: httpx2.AsyncBaseTransport | None = None, sleep: Sleep = asyncio.sleep
    ) -> None:
        self.model = settings.embedding_model
        self._timeout_s = settings.embedding_timeout_s
        self._retries = settings.model_retries
        self._transport = transport or Http1Transport()
        self._sleep = sleep
        upstream = Upstream(name="embedding_url", url=settings.embedding_url, key=settings.embedding_key)
        self._server = ModelServer(upstream, settings, self._transport, sleep)
        self._who = self._server.who(self.model)

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        body = msgspec.json.encode({"model": self.model, "input": texts})
        for attempt in range(self._retries + 1):
            try:
                return await self._ask(body, len(texts))
            except Trouble as trouble:
                if not trouble.passing or attempt == self._retries:
                    raise trouble.error from None
                wait_s = trouble.wait_s if trouble.wait_s is not None else backoff_s(attempt)
            log.info("asking %s again in %.1f s (%d of %d)", self._who, wait_s, attempt + 1, self._retries)
            await self._sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def _ask(self, body: bytes, count: int) -> list[list[float]]:
        """One try. Raises Trouble."""
        try:
            async with asyncio.timeout(self._timeout_s):
                status, headers, said = await self._post(body)
        except TimeoutError:
            error = ModelTimeout(f"No answer within {self._timeout_s:g} s from {self._who}.")
            raise Trouble(error, passing=True) from None
        except httpx2.TransportError as error:
            raise self._server.broken_connection(error, self.model) from None
        if status == 404:
            raise Trouble(ModelRefused(f"No such model, or no embeddings at this URL: {self._who} (HTTP 404)."))
        if status != 200:
            raise self._server.refused(status, headers, said, self.model)
        # Some megabytes of numbers, which take some tens of milliseconds.
        return await asyncio.to_thread(self._read, said, count)

    async def _post(self, body: bytes) -> tuple[int, httpx2.Headers, bytes]:
        json = [("content-type", "application/json")]
        response = await self._server.send("POST", self._server.url("/embeddings"), body, json)
        try:
            return response.status_code, response.headers, await read_at_most(response, MAX_ANSWER_BYTES)
        finally:
            await response.aclose()

    def _read(self, said: bytes, count: int) -> list[list[float]]:
        try:
            answer = msgspec.json.decode(said, type=_Answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Trouble(ModelBroke(f"The answer is no list of embeddings, from {self._who}.")) from None
        vectors = [vector.embedding for vector in sorted(answer.data, key=lambda vector: vector.index)]
        if len(vectors) != count or len({len(vector) for vector in vectors}) > 1 or not all(vectors):
            found = f"{len(vectors)} embeddings for {count} texts, or of several lengths"
            raise Trouble(ModelBroke(f"The answer has {found}, from {self._who}."))
        return vectors

    async def close(self) -> None:
        self._server.close()
        await self._transport.aclose()
