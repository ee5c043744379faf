"""Which files a filter lets through. No SQL: the files of a store are few, and no two databases compare values alike.

- A number is a number, whole or not; a boolean is no number, and `"1"` is not 1. Values of two kinds are never equal
  and never in order.
- A file that lacks the attribute equals nothing and stands before and after nothing: `eq`, `in`, `gt`, `gte`, `lt`
  and `lte` are false of it. `ne` and `nin` are exactly what `eq` and `in` are not, so they are true of it.
- Texts are ordered by code points, which for dates as in 2024-05-31 is their order in time. Booleans have no order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from afterglow.objects import And, AttributeValue, Eq, Filter, Gt, Gte, In, Lt, Lte, Ne, Nin, Or

ORDERS: dict[type, Callable[[Any, Any], bool]] = {
    Gt: operator.gt,
    Gte: operator.ge,
    Lt: operator.lt,
    Lte: operator.le,
}


def matches(where: Filter, attributes: Mapping[str, AttributeValue]) -> bool:
    """Whether `where` is true of a file with these attributes."""
    if isinstance(where, And):
        return all(matches(part, attributes) for part in where.filters)
    if isinstance(where, Or):
        return any(matches(part, attributes) for part in where.filters)
    return _compare(where, attributes.get(where.key))


def depth(where: Filter) -> int:
    """How deep filters are nested: 1 for a comparison."""
    deepest, level = 0, [where]
    while level:
        deepest += 1
        level = [part for node in level if isinstance(node, And | Or) for part in node.filters]
    return deepest


def _compare(where: Eq | Ne | Gt | Gte | Lt | Lte | In | Nin, value: AttributeValue | None) -> bool:
    match where:
        case Eq():
            return _equal(value, where.value)
        case Ne():
            return not _equal(value, where.value)
        case In():
            return any(_equal(value, one) for one in where.value)
        case Nin():
            return not any(_equal(value, one) for one in where.value)
        case _:
            ordered = _kind(value) is _kind(where.value) is not bool
            return ordered and ORDERS[type(where)](value, where.value)


def _equal(value: AttributeValue | None, other: AttributeValue) -> bool:
    return _kind(value) is _kind(other) and value == other


def _kind(value: AttributeValue | None) -> type:
    return float if type(value) is int else type(value)
