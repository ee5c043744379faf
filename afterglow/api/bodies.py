"""From the bytes of a request to what the route asked for, or to the error that says why not.

msgspec decodes the good case and the rest is `api/faults.py`'s. The size of a body is the edge's business.
"""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from afterglow.api import faults
from afterglow.errors import InvalidRequest
from afterglow.objects import Body

T = TypeVar("T", bound=Body)

ESCAPED_NUL = b"\\u0000"
LARGE_BYTES = 256 * 1024
MAX_INTEGER_CHARS = 4300  # Python converts no more, lest it take forever


async def parse(request: Request, kind: type[T], *, empty_ok: bool = False) -> T:
    """Read the body as a `kind`. empty_ok: no body at all stands for `{}`.

    Raises InvalidRequest, worded as the API words it, for the first fault in it.
    """
    body = await request.body()
    if empty_ok and not body:
        return kind()
    if len(body) > LARGE_BYTES:  # tens of MB take seconds, in which nobody else may wait
        return await asyncio.to_thread(decode, body, kind)
    return decode(body, kind)


def decode(body: bytes, kind: type[T]) -> T:
    """Decode JSON text as a `kind`. Raises InvalidRequest, and nothing else."""
    parsed = _decode_quickly(body, kind)
    if parsed is None:
        parsed = _decode_carefully(body, kind)
    faults.check_rules(parsed)
    return parsed


@cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


def _decode_quickly(body: bytes, kind: type[T]) -> T | None:
    """None when the body needs a closer look: msgspec refused it, or took what we may have to refuse."""
    try:
        parsed = _decoder(kind).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    # msgspec itself refuses lone surrogates. An escaped NUL may be the text of one (`\\u0000`): look closer.
    return None if ESCAPED_NUL in body or faults.holds_vendor_keys(parsed) else parsed


def _decode_carefully(body: bytes, kind: type[T]) -> T:
    plain = read_plain(body)
    faults.check_shape(kind, plain)
    faults.gather_vendor_keys(plain)
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"Invalid request body: {error}.") from None


def read_plain(body: bytes) -> Any:
    """JSON as Python reads it, with what msgspec refuses: lone surrogates, so that their path can be told. The last of
    equal keys counts. Raises InvalidRequest."""
    try:
        return json.loads(body.decode(), parse_int=_integer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise faults.not_json() from None


def _integer(text: str) -> float:
    return int(text) if len(text) <= MAX_INTEGER_CHARS else float(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
