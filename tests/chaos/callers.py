"""Callers who keep a record of what they were told: what was acknowledged, refused, or never answered."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import httpx2
import msgspec

from tests.chaos.model import FUNCTION, Script, output_for, random_script

# What became of a request: kept (answered), refused (4xx), unknown (no answer, or 503).
Fate = Literal["kept", "refused", "unknown"]
OVER = ("completed", "failed", "cancelled", "incomplete", "expired")
POLL_S = 0.25
UNTIL_OVER_S = 45.0
UNTIL_INDEXED_S = 30.0
LOOK_BACK = 5
DONE = b"event: done\ndata: [DONE]\n\n"


class NoAnswer(Exception):
    """It may have been done or not."""


class Reply(msgspec.Struct):
    status: int
    body: Any

    @property
    def ok(self) -> bool:
        return self.status == 200


class Heard(msgspec.Struct):
    """What was read of one stream. whole: up to its `done`. first: it began where the run did."""

    first: bool
    data: bytes = b""

    @property
    def whole(self) -> bool:
        return self.data.endswith(DONE)


class Post(msgspec.Struct):
    hand: str
    text: str
    fate: Fate


class Ordered(msgspec.Struct):
    """A run that was asked for. over: the run as it was when it was first seen to be over. forgotten: nobody has given
    it the outputs that it waits for."""

    script: Script
    run_id: str = ""
    heard: list[Heard] = []
    cancelled: bool = False
    over: Any = None
    forgotten: bool = False


class Talk(msgspec.Struct):
    """A thread, as its callers know it. deleted: None when nobody asked."""

    thread_id: str
    posts: list[Post] = []
    orders: list[Ordered] = []
    deleted: Fate | None = None


class Shelf(msgspec.Struct):
    """A vector store. files: what was attached, by id. bytes, gone: of files. deleted: the store."""

    store_id: str
    files: dict[str, Fate] = {}
    detached: dict[str, Fate] = {}
    deleted: Fate | None = None


class Records(msgspec.Struct):
    """faults: answers that should not have been. uploads: the bytes of each acknowledged file."""

    talks: list[Talk] = []
    shelves: list[Shelf] = []
    assistants: list[str] = []
    uploads: dict[str, bytes] = {}
    gone_files: dict[str, Fate] = {}
    faults: list[str] = []
    cancels_s: list[float] = []


class Door:
    """The servers behind one address: each request goes to one of those that are up."""

    def __init__(self, rng: random.Random, urls: Callable[[], list[str]], records: Records) -> None:
        self._rng = rng
        self._urls = urls
        self._records = records
        limits = httpx2.Limits(max_connections=None)
        timeout = httpx2.Timeout(5.0, connect=2.0)
        self._http = httpx2.AsyncClient(
            timeout=timeout, limits=limits, headers={"authorization": "Bearer key"}, verify=False, trust_env=False
        )

    async def _url(self, path: str) -> str:
        while not (urls := self._urls()):
            await asyncio.sleep(0.05)
        return self._rng.choice(urls) + path

    async def ask(self, method: str, path: str, body: Any = None, **more: Any) -> Reply:
        """Raises NoAnswer."""
        try:
            answer = await self._http.request(method, await self._url(path), json=body, **more)
        except httpx2.TransportError as error:
            raise NoAnswer from error
        self._check(method, path, answer)
        return Reply(answer.status_code, answer.json())

    async def look(self, path: str) -> Reply:
        """GET, until somebody answers."""
        while True:
            try:
                return await self.ask("GET", path)
            except NoAnswer:
                await asyncio.sleep(0.1)

    async def content(self, path: str) -> bytes:
        """The body of a GET as it is."""
        answer = await self._http.get(await self._url(path))
        return answer.content

    async def do(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[Fate, Any]:
        """What became of it, and the answer's body."""
        try:
            reply = await self.ask(method, path, body, **more)
        except NoAnswer:
            return "unknown", None
        return ("kept" if reply.ok else "refused"), reply.body

    async def hear(self, path: str, body: Any, heard: Heard, leave_after_s: float | None) -> Reply:
        """Read a stream, perhaps not to its end. Raises NoAnswer when it does not begin."""
        answer = None
        try:
            async with asyncio.timeout(leave_after_s):
                async with self._http.stream("POST", await self._url(path), json=body) as answer:
                    if answer.status_code != 200:
                        await answer.aread()
                        self._check("POST", path, answer)
                        return Reply(answer.status_code, answer.json())
                    async for piece in answer.aiter_bytes():
                        heard.data += piece
        except (httpx2.TransportError, TimeoutError) as error:
            if answer is None:
                raise NoAnswer from error
        return Reply(200, None)

    def _check(self, method: str, path: str, answer: httpx2.Response) -> None:
        if answer.status_code == 503:
            raise NoAnswer
        if answer.status_code >= 500:
            self._records.faults.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
            raise NoAnswer

    async def close(self) -> None:
        await self._http.aclose()


class Caller:
    """Talks on threads until it is told to stop."""

    def __init__(self, rng: random.Random, door: Door, records: Records, name: str, calm: asyncio.Event) -> None:
        self._rng = rng
        self._door = door
        self._records = records
        self._name = name
        self._stop = calm
        self._numbers = itertools.count()

    async def talk_on(self) -> None:
        while not self._stop.is_set():
            await self._talk(await self.new_thread())

    async def new_thread(self) -> Talk:
        while True:
            fate, thread = await self._door.do("POST", "/threads", {})
            if fate == "kept":
                talk = Talk(thread["id"])
                self._records.talks.append(talk)
                return talk
            await asyncio.sleep(0.1)

    async def _talk(self, talk: Talk) -> None:
        for _ in range(self._rng.randint(1, 3)):
            await self.post(talk, self._rng.randint(0, 3))
            ordered = await self.order(talk)
            if ordered is None or not await self._see_through(talk, ordered):
                break
        if self._rng.random() < 0.2:
            await self._delete(talk)

    async def post(self, talk: Talk, number: int) -> None:
        """Post messages, one after the other."""
        for _ in range(number):
            post = self._new_post(talk)
            body = {"role": "user", "content": post.text}
            post.fate, _ = await self._door.do("POST", f"/threads/{talk.thread_id}/messages", body)

    def _new_post(self, talk: Talk) -> Post:
        post = Post(self._name, f"{self._name} says {next(self._numbers)}.", "unknown")
        talk.posts.append(post)
        return post

    async def order(self, talk: Talk, script: Script | None = None) -> Ordered | None:
        """Have a run made, and hear it if it is streamed. Return None when it was not, as far as anybody can tell."""
        script = script or random_script(self._rng, f"{self._name}n{next(self._numbers)}x")
        script.after = [post.text for post in talk.posts if post.hand == self._name and post.fate == "kept"][
            -LOOK_BACK:
        ]
        ordered = Ordered(script)
        talk.orders.append(ordered)
        body: dict[str, Any] = {"assistant_id": self._rng.choice(self._records.assistants)}
        body["tools"] = [FUNCTION] if script.rounds else []
        posts = [self._new_post(talk) for _ in range(self._rng.choice([0, 0, 1]))]
        if posts:
            script.after += [post.text for post in posts]
            body["additional_messages"] = [{"role": "user", "content": post.text} for post in posts]
        body["instructions"] = script.instructions
        path = f"/threads/{talk.thread_id}/runs"
        if not posts and self._rng.random() < 0.5:  # messages that wait may come after those that are posted later
            path += "?if_busy=queue"
        fate = await self._order(path, body, ordered)
        if not ordered.run_id and await self._find(talk, ordered):
            fate = "kept"
        for post in posts:
            post.fate = fate
        return ordered if ordered.run_id else None

    async def _order(self, path: str, body: dict[str, Any], ordered: Ordered) -> Fate:
        try:
            if self._rng.random() < 0.6:
                reply = await self._hear(path, body, ordered, first=True)
                if found := re.search(rb'"id":"(run_\w+)"', ordered.heard[-1].data):
                    ordered.run_id = found[1].decode()
            else:
                reply = await self._door.ask("POST", path, body)
                ordered.run_id = reply.body["id"] if reply.ok else ""
        except NoAnswer:
            return "unknown"
        return "kept" if ordered.run_id else "unknown" if reply.ok else "refused"

    async def _hear(self, path: str, body: Any, ordered: Ordered, *, first: bool) -> Reply:
        heard = Heard(first)
        ordered.heard = [*ordered.heard, heard]
        leaves = ordered.script.kind == "hangs" or self._rng.random() < 0.3
        leave_after_s = self._rng.uniform(0.05, 2) if leaves else UNTIL_OVER_S
        return await self._door.hear(path, {**body, "stream": True}, heard, leave_after_s)

    async def _find(self, talk: Talk, ordered: Ordered) -> bool:
        """Look among the thread's runs for one whose answer did not come."""
        reply = await self._door.look(f"/threads/{talk.thread_id}/runs?limit=100")
        for run in reply.body["data"] if reply.ok else ():
            if run["instructions"] == ordered.script.instructions:
                ordered.run_id = run["id"]
                return True
        return False

    async def _see_through(self, talk: Talk, ordered: Ordered) -> bool:
        """Return whether the thread is free again, and there."""
        chance = self._rng.random()
        if chance < 0.05:
            await self._delete(talk)
            return False
        if chance < 0.15 and ordered.script.rounds:
            ordered.forgotten = True
            return False
        if chance < 0.3 or (ordered.script.kind == "hangs" and self._rng.random() < 0.9):
            await asyncio.sleep(self._rng.uniform(0, 1.0))
            await self.cancel(talk, ordered)
        return await self.until_over(talk, ordered)

    async def _delete(self, talk: Talk) -> None:
        talk.deleted = "unknown"
        talk.deleted, _ = await self._door.do("DELETE", f"/threads/{talk.thread_id}")

    async def cancel(self, talk: Talk, ordered: Ordered) -> Fate:
        fate, _ = await self._door.do("POST", f"/threads/{talk.thread_id}/runs/{ordered.run_id}/cancel")
        ordered.cancelled = ordered.cancelled or fate != "refused"
        return fate

    async def until_over(self, talk: Talk, ordered: Ordered) -> bool:
        """Poll, and give the outputs that are waited for."""
        path = f"/threads/{talk.thread_id}/runs/{ordered.run_id}"
        deadline = time.monotonic() + UNTIL_OVER_S
        while time.monotonic() < deadline:
            reply = await self._door.look(path)
            if not reply.ok:
                self._records.faults.append(f"GET {path}: {reply.status}, though nobody has deleted it")
                return False
            run = reply.body
            if run["status"] in OVER:
                ordered.over = run
                return True
            if run["status"] == "requires_action":
                await self._submit(path, run, ordered)
            else:
                await asyncio.sleep(POLL_S)
        ordered.forgotten = True
        return False

    async def _submit(self, path: str, run: Any, ordered: Ordered) -> None:
        calls = run["required_action"]["submit_tool_outputs"]["tool_calls"]
        cities = [msgspec.json.decode(call["function"]["arguments"])["city"] for call in calls]
        outputs = [
            {"tool_call_id": call["id"], "output": output_for(city)} for call, city in zip(calls, cities, strict=True)
        ]
        body = {"tool_outputs": outputs}
        path += "/submit_tool_outputs"
        if len(outputs) > 1 and self._rng.random() < 0.3:
            await self._door.do("POST", path, {"tool_outputs": outputs[:1], "partial": True})
            if self._rng.random() < 0.5:
                body = {"tool_outputs": outputs[1:]}
        if self._rng.random() < 0.5:
            await self._door.do("POST", path, body)
            return
        try:
            await self._hear(path, body, ordered, first=False)
        except NoAnswer:
            return


class Crowd(Caller):
    """One of several who post to the same thread, and at times put a run on it, without asking each other."""

    async def join_in(self, talk: Talk) -> None:
        while not self._stop.is_set():
            await self.post(talk, 1)
            await asyncio.sleep(self._rng.uniform(0, 0.1))
            if self._rng.random() < 0.15:
                quick = Script(key=f"{self._name}n{next(self._numbers)}x", words=5, pause_ms=self._rng.choice([0, 20]))
                ordered = await self.order(talk, quick)
                if ordered is not None:
                    await self.until_over(talk, ordered)


class Librarian:
    """Fills vector stores, searches them, and clears them out."""

    def __init__(self, rng: random.Random, door: Door, records: Records, name: str, calm: asyncio.Event) -> None:
        self._rng = rng
        self._door = door
        self._records = records
        self._name = name
        self._stop = calm
        self._numbers = itertools.count()

    async def work_on(self) -> None:
        while not self._stop.is_set():
            fate, store = await self._door.do("POST", "/vector_stores", {"name": self._name})
            if fate == "kept":
                shelf = Shelf(store["id"])
                self._records.shelves.append(shelf)
                await self._fill(shelf)
                await self._clear_out(shelf)

    async def _fill(self, shelf: Shelf) -> None:
        for _ in range(self._rng.randint(1, 3)):
            if (file_id := await self._upload()) is not None:
                shelf.files[file_id] = "unknown"
                path = f"/vector_stores/{shelf.store_id}"
                if self._rng.random() < 0.5:
                    shelf.files[file_id], _ = await self._door.do("POST", f"{path}/files", {"file_id": file_id})
                else:
                    body = {"file_ids": [file_id]}
                    shelf.files[file_id], _ = await self._door.do("POST", f"{path}/file_batches", body)
        if self._rng.random() < 0.6:
            await self._until_indexed(shelf)

    async def _upload(self) -> str | None:
        word = word_of(f"{self._name}{next(self._numbers)}")
        content = f"The word of the day is {word}. {'Nothing else happens. ' * self._rng.choice([1, 400])}".encode()
        if self._rng.random() < 0.3:
            file = await self._upload_parts(f"{word}.md", content)
        else:
            files = {"file": (f"{word}.md", content)}
            fate, file = await self._door.do("POST", "/files", data={"purpose": "assistants"}, files=files)
            file = file if fate == "kept" else None
        if file is None:
            return None
        self._records.uploads[file["id"]] = content
        return str(file["id"])

    async def _upload_parts(self, name: str, content: bytes) -> Any:
        """Return the file, or None when any of it was not acknowledged."""
        body = {"filename": name, "purpose": "assistants", "bytes": len(content), "mime_type": "text/markdown"}
        fate, upload = await self._door.do("POST", "/uploads", body)
        if fate != "kept":
            return None
        path, ids = f"/uploads/{upload['id']}", []
        for piece in (content[:20], content[20:]):
            fate, part = await self._door.do("POST", f"{path}/parts", files={"data": ("part", piece)})
            if fate != "kept":
                return None
            ids.append(part["id"])
        fate, upload = await self._door.do("POST", f"{path}/complete", {"part_ids": ids})
        return upload["file"] if fate == "kept" else None

    async def _until_indexed(self, shelf: Shelf) -> None:
        deadline = time.monotonic() + UNTIL_INDEXED_S
        while time.monotonic() < deadline and not self._stop.is_set():
            reply = await self._door.look(f"/vector_stores/{shelf.store_id}")
            if reply.ok and reply.body["file_counts"]["in_progress"] == 0:
                await self._search(shelf)
                return
            await asyncio.sleep(POLL_S)

    async def _search(self, shelf: Shelf) -> None:
        """Whichever process is asked: what is indexed, all find, and what is detached, none."""
        path = f"/vector_stores/{shelf.store_id}"
        for file_id in shelf.files:
            reply = await self._door.look(f"{path}/files/{file_id}")
            query = {"query": word_in(self._records.uploads[file_id])}
            fate, found = await self._door.do("POST", f"{path}/search", query)
            wanted = [file_id] if reply.ok and reply.body["status"] == "completed" else []
            if fate == "kept" and [hit["file_id"] for hit in found["data"]] != wanted:
                self._records.faults.append(f"{path}: {reply}, and a search found {found['data']}")

    async def _clear_out(self, shelf: Shelf) -> None:
        for file_id in list(shelf.files):
            chance = self._rng.random()
            if chance < 0.2:
                path = f"/vector_stores/{shelf.store_id}/files/{file_id}"
                shelf.detached[file_id], _ = await self._door.do("DELETE", path)
            elif chance < 0.3:
                self._records.gone_files[file_id] = "unknown"
                self._records.gone_files[file_id], _ = await self._door.do("DELETE", f"/files/{file_id}")
        if self._rng.random() < 0.5:
            await self._until_indexed(shelf)
        if self._rng.random() < 0.2:
            shelf.deleted = "unknown"
            shelf.deleted, _ = await self._door.do("DELETE", f"/vector_stores/{shelf.store_id}")


def word_of(name: str) -> str:
    """A word that stands in one file alone."""
    return "xyz" + name.replace("-", "")


def word_in(content: bytes) -> str:
    """The word of a file."""
    return content.split()[6].decode().rstrip(".")
