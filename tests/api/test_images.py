"""Images in messages: passed on as URLs, or fetched first for servers that take only data."""

from __future__ import annotations

import asyncio
import base64

import openai
import pytest

from afterglow.errors import ImageUnavailable
from afterglow.runs import images
from afterglow.runs.context import STORED_IMAGE
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


# --- stored images ---------------------------------------------------------------------------------------------

HEADS = {
    "image/png": b"\x89PNG\r\n\x1a\n" + b"\0" * 8,
    "image/jpeg": b"\xff\xd8\xff\xe0" + b"\0" * 12,
    "image/gif": b"GIF89a" + b"\0" * 10,
    "image/webp": b"RIFF\0\0\0\0WEBPVP8 ",
}


async def stored(server: Server, data: bytes, name: str = "data.bin") -> str:
    return (await server.client.files.create(file=(name, data), purpose="vision")).id


def part(file_id: str, detail: str = "auto") -> dict[str, object]:
    return {"type": "image_file", "image_file": {"file_id": file_id, "detail": detail}}


@pytest.mark.parametrize("media_type", HEADS)
async def test_a_stored_image_reaches_the_model_as_data(server: Server, media_type: str) -> None:
    """Its bytes decide what it is, not its name; the detail goes with it, and the message stays as it was."""
    file_id = await stored(server, HEADS[media_type])
    server.model.will(says("A cat."))
    assert await ask(server, QUESTION, part(file_id, "high")) == "completed"
    url = f"data:{media_type};base64,{base64.b64encode(HEADS[media_type]).decode()}"
    sent = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
    assert server.model.requests[0].messages[-1]["content"] == [QUESTION, sent]


async def test_a_stored_image_is_not_fetched(server: Server, album: Album) -> None:
    """A server that takes only data gets stored and fetched images alike."""
    server.model.inline_images = True
    server.model.will(says("A cat."))
    assert await ask(server, part(await stored(server, HEADS["image/png"])), PICTURE) == "completed"
    sent = [one["image_url"]["url"] for one in server.model.requests[0].messages[-1]["content"]]
    assert [url.startswith("data:image/png") for url in sent] == [True, True]
    assert album.asked == [PICTURE["image_url"]["url"]]  # type: ignore[index]


async def test_what_is_no_image_is_named(server: Server) -> None:
    """A file that only calls itself an image is told of in words, and the run goes on."""
    file_id = await stored(server, b"MZ\x90", "cat.png")
    server.model.will(says("I see none."))
    assert await ask(server, QUESTION, part(file_id)) == "completed"
    said = f"What is this?\n[image: {file_id}, no PNG, JPEG, GIF or WebP image]"
    assert server.model.requests[0].messages[-1]["content"] == said


async def test_an_image_that_was_deleted_is_named(server: Server) -> None:
    """A run after the delete goes on, and the model is told that there was an image."""
    file_id = await stored(server, HEADS["image/png"])
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": [part(file_id)]}])  # type: ignore[list-item,typeddict-item]
    await server.client.files.delete(file_id)
    server.model.will(says("Gone."))
    assert (await server.run("And now?", thread_id=thread.id)).status == "completed"
    assert server.model.requests[0].messages[0]["content"] == f"[image: {file_id}]"


async def test_a_model_that_does_not_see_is_told_of_the_image(server: Server) -> None:
    """Where the operator says that a model takes no images, it reads of them."""
    server.model.info_of_all.vision = False
    file_id = await stored(server, HEADS["image/png"])
    server.model.will(says("Hm."))
    assert await ask(server, QUESTION, part(file_id)) == "completed"
    assert server.model.requests[0].messages[-1]["content"] == f"What is this?\n[image: {file_id}]"


async def test_images_have_a_limit_each_and_together(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too large is named; of too many together, the newest are sent."""
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100)
    monkeypatch.setattr(images, "MAX_TOGETHER_BYTES", 150)
    sizes = (101, 60, 60, 60)
    ids = [await stored(server, HEADS["image/png"].ljust(size, b"\0")) for size in sizes]
    server.model.will(says("Many."))
    assert await ask(server, *(part(file_id) for file_id in ids)) == "completed"
    large, oldest, *newest = server.model.requests[0].messages[-1]["content"]
    assert large == {"type": "text", "text": f"[image: {ids[0]}, too large to be shown]"}
    assert oldest == {"type": "text", "text": f"[image: {ids[1]}, too large to be shown]"}
    assert [one["type"] for one in newest] == ["image_url", "image_url"]


async def test_a_url_of_ours_cannot_be_sent_by_callers(server: Server) -> None:
    """What stands for stored bytes in a prompt is refused in a message."""
    with pytest.raises(openai.BadRequestError):
        await ask(server, {"type": "image_url", "image_url": {"url": f"{STORED_IMAGE}file-x"}})
