"""Active runs that were lately asked for, in memory, for the one process that can change them.

Theory of operation. The store says which runs a transaction changes while it is still open, and when it is over. What
was kept of a run is dropped at the first; until the second nothing is kept of it, since a reader may still see what
was before. And what was read when the change began is not kept either: each reader takes a mark before it reads, and a
change takes the mark away. So what is kept is what was committed last, always, and is never older than what another
reader has seen.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from afterglow.contracts import KnownRun
from afterglow.objects import ACTIVE_RUNS

MAX_CHARS = 16 * 1024 * 1024

_Key = tuple[str, str]  # project and run id


class LocalRunMemory:
    """A `contracts.RunMemory`. The store's writer calls `changing` and `changed` in a thread of its own."""

    def __init__(self, max_chars: int = MAX_CHARS) -> None:
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, tuple[str, KnownRun]] = OrderedDict()
        self._chars = 0
        self._reading: dict[_Key, object] = {}
        self._changing: set[_Key] = set()

    def get(self, project: str, thread_id: str, run_id: str) -> KnownRun | None:
        with self._lock:
            found = self._kept.get((project, run_id))
            if found is None or found[0] != thread_id:
                return None
            self._kept.move_to_end((project, run_id))
            return found[1]

    def reading(self, project: str, run_id: str) -> object:
        mark, key = object(), (project, run_id)
        with self._lock:
            if key not in self._changing:
                self._reading[key] = mark
        return mark

    def keep(self, project: str, thread_id: str, run_id: str, mark: object, run: KnownRun | None) -> None:
        key = (project, run_id)
        with self._lock:
            if self._reading.get(key) is not mark:
                return
            del self._reading[key]
            if run is not None and run.status in ACTIVE_RUNS:
                self._drop(key)
                self._kept[key] = (thread_id, run)
                self._chars += len(run.text)
            while self._chars > self._max_chars:
                self._drop(next(iter(self._kept)))

    def changing(self, project: str, run_id: str) -> None:
        """A transaction that is not over yet has changed or deleted this run."""
        key = (project, run_id)
        with self._lock:
            self._changing.add(key)
            self._reading.pop(key, None)
            self._drop(key)

    def changed(self) -> None:
        """The transaction is over, whatever became of it."""
        with self._lock:
            self._changing.clear()

    def _drop(self, key: _Key) -> None:
        if (found := self._kept.pop(key, None)) is not None:
            self._chars -= len(found[1].text)
