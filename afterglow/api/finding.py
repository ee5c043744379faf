"""/v1/messages and /v1/runs: what is found across the threads of a project. Extensions, as are the filters here."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

from starlette.requests import Request
from starlette.responses import Response

from afterglow.api import faults
from afterglow.api.answers import project_of, reply_list
from afterglow.api.pages import query_choice, query_integer, query_value
from afterglow.contracts import Transaction
from afterglow.objects import RunStatus
from afterglow.rows import message_words as word_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.lists import Kept, ListPage, repeated
from afterglow.rows.message_words import Wanted
from afterglow.search.words import MAX_ASKED, asked_words

RUN_STATUSES: tuple[RunStatus, ...] = get_args(RunStatus)
LATEST = 2**53
MAX_QUERY_CHARS = 1_000
MOST_MESSAGES = 10_000  # whose threads a query finds
CREATED_AT = {"gte": (0, 0), "gt": (0, 1), "lt": (1, 0), "lte": (1, 1)}  # bound, and what is added to it


class Created(NamedTuple):
    """When something was created, Unix seconds; `until` not included."""

    since: int = 0
    until: int = LATEST

    def kept(self) -> list[Kept]:
        kept: list[Kept] = []
        if self.since > 0:
            kept.append(("created_at >= {}", (self.since,)))
        if self.until < LATEST:
            kept.append(("created_at < {}", (self.until,)))
        return kept


async def search_messages(request: Request) -> Response:
    """GET /messages: the messages of all threads that have all words of `query`, those that came last first. A message
    can be found a second or two after it was written."""
    query = query_value(request, "query")
    if query is None:
        raise faults.missing("query")
    created, project = read_created(request), project_of(request)
    wanted = Wanted(_words(query), *created, query_value(request, "thread_id"))

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        return await word_rows.find_messages(tx, project, wanted, **cursor)

    return await reply_list(request, "message", page)


async def list_project_runs(request: Request) -> Response:
    """GET /runs: the runs of all threads."""
    project = project_of(request)
    kept = read_created(request).kept()
    for name in ("assistant_id", "thread_id", "model"):
        if value := query_value(request, name):
            kept.append((f"{name} = {{}}", (value,)))
    if status := query_choice(request, "status", RUN_STATUSES):
        kept.append(("status = {}", (status,)))

    async def page(tx: Transaction, **cursor: Any) -> ListPage:
        return await run_rows.list_project_runs(tx, project, kept, **cursor)

    return await reply_list(request, "run", page)


class ThreadFilters(NamedTuple):
    """Which threads a caller wants to see. words: that occur in one of their messages; None asks for none."""

    created: Created
    assistant_id: str | None
    run_status: str | None
    words: list[str] | None

    async def kept(self, tx: Transaction, project: str) -> list[Kept]:
        kept = self.created.kept()
        if self.assistant_id is not None:
            kept += await thread_rows.of_assistant(tx, project, self.assistant_id)
        if self.run_status is not None:
            kept += await thread_rows.of_last_run(tx, project, self.run_status)
        if self.words is not None:
            found = repeated(await word_rows.find_threads(tx, project, Wanted(self.words), MOST_MESSAGES))
            kept.append((f"id IN ({', '.join('{}' for _ in found) or 'NULL'})", tuple(found)))
        return kept


def read_thread_filters(request: Request) -> ThreadFilters:
    """Raises InvalidRequest."""
    query = query_value(request, "query")
    return ThreadFilters(
        read_created(request),
        query_value(request, "assistant_id"),
        query_choice(request, "run_status", RUN_STATUSES),
        None if query is None else _words(query),
    )


def read_created(request: Request) -> Created:
    """`created_at[gte]`, `[gt]`, `[lt]` and `[lte]`, as the organization's lists of the original have them. Raises
    InvalidRequest."""
    bounds = [0, LATEST]
    for sign, (which, more) in CREATED_AT.items():
        asked = query_integer(request, f"created_at[{sign}]")
        if asked is not None:
            bound = max(0, min(asked + more, LATEST))
            bounds[which] = max(bounds[0], bound) if which == 0 else min(bounds[1], bound)
    return Created(*bounds)


def _words(query: str) -> list[str]:
    """Raises InvalidRequest when there are too many of them, or none."""
    if len(query) > MAX_QUERY_CHARS:
        raise faults.invalid(
            "query", f"string too long. Expected at most {MAX_QUERY_CHARS} characters.", "string_above_max_length"
        )
    words = asked_words(query)
    if not words:
        raise faults.invalid("query", "it has no words.", "invalid_value")
    if len(words) > MAX_ASKED:
        raise faults.invalid("query", f"too many words. Expected at most {MAX_ASKED}.", "invalid_value")
    return words
