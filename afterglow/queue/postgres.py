"""The run queue of processes that share a database: wake-ups and cancels travel as words of the notifier.

The queue itself is the table: a run is claimed in a transaction. A word that is lost costs a poll.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from afterglow.queue.local import LocalQueue

if TYPE_CHECKING:
    from afterglow.store.notify import Notifier


class PostgresQueue(LocalQueue):
    """A `contracts.RunQueue` that tells this process at once, as `LocalQueue` does, and then all the others."""

    def __init__(self, notifier: Notifier, name: str) -> None:
        """name: of the queue, the same in all processes. Made before the notifier is started."""
        super().__init__()
        self._notifier = notifier
        self._queued_channel = f"afterglow_{name}_queued"
        self._cancelled_channel = f"afterglow_{name}_cancelled"
        notifier.listen(self._queued_channel, lambda _: self._queued.set())
        notifier.listen(self._cancelled_channel, self._hear_cancels)
        notifier.on_return(self._queued.set)

    def wake(self) -> None:
        super().wake()
        self._notifier.notify(self._queued_channel, "")

    def cancel(self, run_id: str) -> None:
        super().cancel(run_id)
        self._notifier.notify(self._cancelled_channel, run_id)

    def _hear_cancels(self, run_ids: list[str]) -> None:
        for run_id in run_ids:
            super().cancel(run_id)
