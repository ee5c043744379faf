"""Those who wait for another status: whom to tell, and what a segment says of its run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from afterglow.contracts import DELETED, News, Segment, Watched

RUN_EVENT = b"event: thread.run."


class Watch:
    """A `contracts.Watch`. What is heard twice before it is asked for is given once, as it was last."""

    __slots__ = ("_ended", "_future", "_known", "_news", "_watches", "inside", "key", "kind", "project")

    def __init__(self, watches: Watches, kind: Watched, project: str, key: str, inside: str) -> None:
        self.kind = kind
        self.project = project
        self.key = key
        self.inside = inside
        self._watches = watches
        self._known = ""
        self._ended = False
        self._news: News | None = None
        self._future: asyncio.Future[None] | None = None

    def __enter__(self) -> Watch:
        self._watches.add(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self._watches.discard(self)

    @property
    def words(self) -> list[str]:
        """What is said when there is something to hear."""
        own = f"{self.inside}/{self.key}" if self.kind == "file" else self.key
        return [word_for(self.project, key) for key in (own, self.inside) if key]

    def hear(self, news: News | None) -> None:
        """None: nobody is to wait any longer, whatever is heard later."""
        if news is None:
            self._ended = True
        elif news.status and news.status == self._known:
            return
        self._news = news
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def next(self, known: str, timeout_s: float) -> News | None:
        self._known = known
        if self._news is None or self._news.status == known != "":
            self._news = None
            if not self._ended:
                self._future = asyncio.get_running_loop().create_future()
                async with asyncio.timeout(timeout_s):
                    await self._future
        news, self._news = self._news, None
        return None if self._ended else news


class Watches:
    """All that is watched in this process, by word."""

    def __init__(self) -> None:
        self._by_word: dict[str, set[Watch]] = {}
        self._closed = False

    def add(self, watch: Watch) -> None:
        for said in watch.words:
            self._by_word.setdefault(said, set()).add(watch)
        if self._closed:
            watch.hear(None)

    def discard(self, watch: Watch) -> None:
        for said in watch.words:
            of_word = self._by_word[said]
            of_word.discard(watch)
            if not of_word:
                del self._by_word[said]

    def tell(self, said: str, news: News) -> None:
        for watch in self._by_word.get(said, ()):
            watch.hear(news)

    def tell_of(self, said: str, segment: Segment, elsewhere: Callable[[str], None] | None = None) -> None:
        """Tell what a segment says of its run. elsewhere: called with the run's status, whoever watches here."""
        if elsewhere is None and said not in self._by_word:
            return
        if (news := news_of(segment)) is not None:
            self.tell(said, news)
            if elsewhere is not None:
                elsewhere(news.status)

    def all(self) -> set[Watch]:
        return {watch for of_word in self._by_word.values() for watch in of_word}

    def end(self) -> None:
        """Tell all that they are not to wait any longer."""
        for watch in self.all():
            watch.hear(None)

    def close(self) -> None:
        """As `end`, and whoever comes later is told as well."""
        self._closed = True
        self.end()


def word_for(project: str, key: str) -> str:
    return f"{project}/{key}"


def news_of(segment: Segment) -> News | None:
    """What the last event of a segment says of its run; None when it says nothing."""
    _, _, last = (b"\n\n" + segment.data[:-2]).rpartition(b"\n\n")  # JSON holds no line breaks
    name, _, rest = last.partition(b"\n")
    if name == b"event: error":
        return News(DELETED)
    if not name.startswith(RUN_EVENT) or name.startswith(b"event: thread.run.step."):
        return None
    return News(name.removeprefix(RUN_EVENT).decode(), rest.partition(b"\n")[0].removeprefix(b"data: "))
