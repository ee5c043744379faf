"""What all kinds of events do for followers: waiting for news, keep-alives, and segments cut to measure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping

from afterglow.contracts import Position, Segment


class Followed:
    """One run that is followed. followers: how many. waiting: one future for each that has nothing more to read."""

    __slots__ = ("followers", "waiting")

    def __init__(self) -> None:
        self.followers = 0
        self.waiting: list[asyncio.Future[bool]] = []

    async def news(self) -> bool:
        """Return when there is something to read, or, with False, when there was long silence."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        return await future

    def wake(self, news: bool) -> None:
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(news)


async def break_silence_forever(runs: Mapping[str, Followed], every_s: float) -> None:
    """One clock for all followers: each hears of silence within one to two periods."""
    while True:
        waiting_before = {id(future) for run in runs.values() for future in run.waiting}
        await asyncio.sleep(every_s)
        for run in list(runs.values()):
            if any(id(future) in waiting_before for future in run.waiting):
                run.wake(False)


def join(segments: list[Segment]) -> Segment:
    """Consecutive segments of one attempt as one."""
    first, last = segments[0], segments[-1]
    return Segment(first.attempt, first.first, last.last, b"".join(s.data for s in segments), last.stop)


def to_each_stop(segments: list[Segment]) -> Iterator[list[Segment]]:
    """In batches that end with a stop, all but perhaps the last: a POST stream ends there, and must hold no more."""
    begin = 0
    for end, segment in enumerate(segments, 1):
        if segment.stop or end == len(segments):
            yield segments[begin:end]
            begin = end


def before(segment: Segment) -> Position:
    return Position(segment.attempt, segment.first - 1)


def end_of(segment: Segment) -> Position:
    return Position(segment.attempt, segment.last)


def cut(segment: Segment, after: Position) -> Segment | None:
    """What of a segment comes after a place: all, a part, or None."""
    if (segment.attempt, segment.first - 1) >= after:
        return segment
    if (segment.attempt, segment.last) <= after:
        return None
    mark = b"\nid: %d.%d\n\n" % after
    return segment._replace(first=after.sequence + 1, data=segment.data.partition(mark)[2])


def chain(segments: Iterable[Segment], after: Position) -> Iterator[Segment]:
    """What comes after a place, in order; segments may overlap, and what was there before is left out."""
    for segment in segments:
        if part := cut(segment, after):
            yield part
            after = end_of(part)


def end_before(segments: list[Segment], place: Position) -> list[Segment]:
    """The end of a log, without its text, when a place beyond it is asked for: nothing will ever come there."""
    last = segments[-1] if segments else None
    return [last._replace(data=b"")] if last and last.stop == "end" and end_of(last) < place else []
