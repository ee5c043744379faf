"""Query strings and cursor lists: what a caller asks for, and the envelope of the answer.

Unknown query parameters are left alone: extensions live there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, cast

import msgspec
from starlette.requests import Request

from afterglow.api import faults
from afterglow.errors import InvalidRequest
from afterglow.objects import INCLUDE_FILE_SEARCH_CONTENT

MAX_LIMIT = 100
ORDERS = ("asc", "desc")
INTEGER = re.compile(r"-?[0-9]{1,100}")
NUMBER = re.compile(r"[0-9]{1,10}(\.[0-9]{1,10})?")
INCLUDE = re.compile(r"include(\[[0-9]*\])?")


class Page(msgspec.Struct, frozen=True):
    """Which part of a list. limit: 1–100; order: by `created_at`; after, before: ids of objects, not included."""

    limit: int = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None
    before: str | None = None


def read_page(request: Request) -> Page:
    """The cursor query of a list. Raises InvalidRequest."""
    page = Page()
    return Page(
        limit=_limit(query_value(request, "limit"), page.limit),
        order=_order(query_value(request, "order"), page.order),
        after=query_value(request, "after"),
        before=query_value(request, "before"),
    )


def query_value(request: Request, name: str) -> str | None:
    """The one value of a query parameter; None when it is absent or empty. Raises InvalidRequest when repeated."""
    values = request.query_params.getlist(name)
    if len(values) > 1:
        message = (
            f"Duplicate parameter: '{name}'. You provided multiple values for this parameter, whereas only one is "
            "allowed. If you are trying to provide a list of values, use the array syntax instead e.g. "
            f"'{name}[]=<value>'."
        )
        raise InvalidRequest(message, param=name, code="duplicate_parameter")
    if not values or not values[0]:
        return None
    faults.check_text(values[0], name)
    return values[0]


def query_choice(request: Request, name: str, choices: Sequence[str]) -> str | None:
    """As `query_value`, of a parameter that takes these values alone."""
    value = query_value(request, name)
    if value is not None and value not in choices:
        raise faults.unsupported_value(name, value, choices)
    return value


def _limit(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not INTEGER.fullmatch(text):
        raise faults.wrong_type("limit", "an integer", text)
    limit = int(text)
    faults.check_range(limit, 1, MAX_LIMIT, "limit")
    return limit


def read_seconds(name: str, text: str, low: float, high: float) -> float:
    """Raises InvalidRequest."""
    if not NUMBER.fullmatch(text):
        raise faults.wrong_type(name, "a number", text)
    seconds = float(text)
    faults.check_range(seconds, low, high, name, "decimal")
    return seconds


def _order(text: str | None, default: Literal["asc", "desc"]) -> Literal["asc", "desc"]:
    if text is None:
        return default
    if text not in ORDERS:
        raise faults.unsupported_value("order", text, ORDERS)
    return cast(Literal["asc", "desc"], text)


def read_include(request: Request) -> list[str]:
    """The values of `include[]` (also written `include` or `include[0]`), each once. Raises InvalidRequest."""
    values = [value for name, value in request.query_params.multi_items() if INCLUDE.fullmatch(name)]
    for index, value in enumerate(values):
        if value != INCLUDE_FILE_SEARCH_CONTENT:
            raise faults.unsupported_value(f"include[{index}]", value, [INCLUDE_FILE_SEARCH_CONTENT])
    return values[:1]


def list_body(objects: Sequence[str | bytes], ids: Sequence[str], has_more: bool) -> bytes:
    """The list envelope around ready JSON texts. ids: of the same objects, in the same order."""
    data = b",".join(item.encode() if isinstance(item, str) else item for item in objects)
    return b'{"object":"list","data":[%b],"first_id":%b,"last_id":%b,"has_more":%b}' % (
        data,
        msgspec.json.encode(ids[0] if ids else None),
        msgspec.json.encode(ids[-1] if ids else None),
        msgspec.json.encode(has_more),
    )
