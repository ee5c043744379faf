"""Cursor lists: the one query shape that all list endpoints share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from afterglow.contracts import SqlValue, Transaction

T = TypeVar("T")
# For lists of jobs: what another process is just claiming is passed over, instead of waiting for it in vain.
PASSING_OVER = "/* postgres: FOR UPDATE SKIP LOCKED */"
# For what is to stay until the transaction ends: whoever changes or deletes it waits, others may hold it as well.
HELD = "/* postgres: FOR SHARE */"
# For what is about to be changed, as the change itself would hold it.
LOCKED = "/* postgres: FOR NO KEY UPDATE */"
# What a list is to keep: a condition with `{}` for each of its values.
Kept = tuple[str, tuple[SqlValue, ...]]


class ListPage(NamedTuple):
    """objects: the wire's JSON texts in the order asked for; ids beside them; has_more: more follow that way."""

    objects: list[str]
    ids: list[str]
    has_more: bool


class UnknownCursor(Exception):
    """`after` or `before` names nothing in this list. args: the parameter's name, and its value."""


async def list_page(
    tx: Transaction,
    table: str,
    where: str,
    values: tuple[SqlValue, ...],
    *,
    limit: int,
    order: str,
    after: str | None,
    before: str | None,
    status: str | None = None,
    kept: Sequence[Kept] = (),
) -> ListPage:
    """One page of `table`, ordered by (created_at, seq, id).

    where: conditions on `values` as `$1`…; its first two must be `project_id = $1` and whatever scopes cursors.
    order: `asc` or `desc`. after, before: ids; both given means what lies between. With `before` alone, the page is
    the one just before it, still in the order asked for. status: only rows of this status; what a cursor names may
    have another by now; so with kept. Raises UnknownCursor.
    """
    forward = before is None or after is not None
    conditions, arguments = [where], list(values)
    if status is not None:
        arguments.append(status)
        conditions.append(f"status = ${len(arguments)}")
    for condition, its_values in kept:
        conditions.append(condition.format(*(f"${len(arguments) + at}" for at in range(1, len(its_values) + 1))))
        arguments += its_values
    for name, cursor in (("after", after), ("before", before)):
        if cursor is not None:
            place = await _place(tx, table, where, values, name, cursor)
            newer = (name == "after") == (order == "asc")
            numbers = ", ".join(f"${len(arguments) + offset}" for offset in (1, 2, 3))
            conditions.append(f"(created_at, seq, id) {'>' if newer else '<'} ({numbers})")
            arguments += place
    direction = "ASC" if (order == "asc") == forward else "DESC"
    rows = await tx.fetch(
        f"SELECT object, id FROM {table} WHERE {' AND '.join(conditions)}"
        f" ORDER BY created_at {direction}, seq {direction}, id {direction} LIMIT {limit + 1}",
        *arguments,
    )
    has_more = len(rows) > limit
    rows = rows[:limit] if forward else rows[:limit][::-1]
    return ListPage([row[0] for row in rows], [row[1] for row in rows], has_more)


def repeated(values: Sequence[T]) -> list[T]:
    """The values, the last of them repeated up to a power of two: so there are few different statements with `IN`."""
    return [*values, *([values[-1]] * ((1 << (len(values) - 1).bit_length()) - len(values)))] if values else []


async def _place(
    tx: Transaction, table: str, where: str, values: tuple[SqlValue, ...], name: str, cursor: str
) -> list[SqlValue]:
    rows = await tx.fetch(
        f"SELECT created_at, seq, id FROM {table} WHERE {where} AND id = ${len(values) + 1}",
        *values,
        cursor,
    )
    if not rows:
        raise UnknownCursor(name, cursor)
    return list(rows[0])
