"""Images in messages: passed on as URLs, or fetched first for servers that take only data."""

from __future__ import annotations

import asyncio

import pytest

from afterglow.errors import ImageUnavailable
from afterglow.testing import says
from tests.conftest import Server

PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}
QUESTION = {"type": "text", "text": "What is this?"}


class Album:
    """An image fetcher that knows one picture."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = asyncio.Event()
        self.answer.set()

    async def data_url(self, url: str) -> str:
        self.asked.append(url)
        await self.answer.wait()
        if not url.endswith("a.png"):
            raise ImageUnavailable(f"The image {url} cannot be fetched.")
        return "data:image/png;base64,AAAA"

    async def close(self) -> None:
        """Nothing to let go of."""


@pytest.fixture
def album(server: Server) -> Album:
    made = Album()
    server.house.images = made
    return made


async def ask(server: Server, *content: object) -> str:
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": list(content)}])  # type: ignore[arg-type, list-item, typeddict-item]
    assistant = await server.assistant()
    run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
    return (await server.poll(run)).status


async def test_an_image_is_passed_on_as_its_url(server: Server, album: Album) -> None:
    """A server that fetches images itself gets URL and detail as the caller sent them."""
    server.model.will(says("A cat."))
    assert await ask(server, QUESTION, PICTURE) == "completed"
    assert server.model.requests[0].messages[-1]["content"] == [QUESTION, PICTURE]
    assert album.asked == []


async def test_an_image_is_fetched_for_a_server_that_takes_only_data(server: Server, album: Album) -> None:
    """Such a server gets the image itself, with the detail; data that came as data is left alone."""
    server.model.inline_images = True
    server.model.will(says("A cat."))
    given = {"type": "image_url", "image_url": {"url": "data:image/png;base64,BBBB"}}
    assert await ask(server, PICTURE, given) == "completed"
    sent = [part["image_url"] for part in server.model.requests[0].messages[-1]["content"]]
    assert sent == [
        {"url": "data:image/png;base64,AAAA", "detail": "low"},
        {"url": "data:image/png;base64,BBBB", "detail": "auto"},
    ]


async def test_an_image_that_cannot_be_fetched_ends_the_run(server: Server, album: Album) -> None:
    """The run fails with invalid_prompt and says which image; the model is not asked."""
    server.model.inline_images = True
    thread = await server.client.beta.threads.create(
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/b"}}]}]
    )
    assistant = await server.assistant()
    run = await server.poll(await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id))
    assert run.status == "failed"
    assert run.last_error is not None
    assert (run.last_error.code, run.last_error.message) == (
        "invalid_prompt",
        "The image https://example.com/b cannot be fetched.",
    )
    assert server.model.requests == []


async def test_a_cancel_wins_against_an_image_that_does_not_come(server: Server, album: Album) -> None:
    """A run that waits for an image is cancelled at once."""
    server.model.inline_images = True
    album.answer.clear()
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": [PICTURE]}])  # type: ignore[list-item]
    assistant = await server.assistant()
    run = await server.client.beta.threads.runs.create(thread.id, assistant_id=assistant.id)
    while not album.asked:
        await asyncio.sleep(0.001)
    await server.client.beta.threads.runs.cancel(run.id, thread_id=thread.id)
    async with asyncio.timeout(1):
        assert (await server.poll(run)).status == "cancelled"
