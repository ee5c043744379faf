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
DECIMAL = re.compile(r"[0-9]{1,15}(\.[0-9]{1,10})?")
FLAGS = {"true": True, "false": False, "1": True, "0": False}
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
        limit=query_integer(request, "limit", 1, MAX_LIMIT) or page.limit,
        order=cast(Literal["asc", "desc"], query_choice(request, "order", ORDERS) or page.order),
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


def query_flag(request: Request, name: str) -> bool:
    """As `query_value`; False when it is absent."""
    return FLAGS[query_choice(request, name, list(FLAGS)) or "false"]


def query_integer(request: Request, name: str, low: int | None = None, high: int | None = None) -> int | None:
    """As `query_value`, within these bounds; both are allowed values."""
    text = query_value(request, name)
    if text is None:
        return None
    if not INTEGER.fullmatch(text):
        raise faults.wrong_type(name, "an integer", text)
    faults.check_range(int(text), low, high, name)
    return int(text)


def query_decimal(request: Request, name: str, low: float | None = None, high: float | None = None) -> float | None:
    """As `query_integer`, of a number without a sign."""
    text = query_value(request, name)
    if text is None:
        return None
    if not DECIMAL.fullmatch(text):
        raise faults.wrong_type(name, "a decimal number", text)
    faults.check_range(float(text), low, high, name, "decimal")
    return float(text)


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
